"""Learning rates of a run that is continued."""

import pytest
import torch

from hf_querydet.training import continue_schedule, learning_rate_schedule


def optimizer_of(learning_rate, weight_decay=0.1):
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(3))], "lr": learning_rate},
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": learning_rate / 10},
    ]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def schedule_of(optimizer, kind):
    return learning_rate_schedule(optimizer, schedule=kind, num_steps=10, warmup_steps=2)


def train(optimizer, scheduler, num_steps):
    rates = []
    for _ in range(num_steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def interrupted(kind, step, **changes):
    """A new optimizer and schedule that go on where others were after some steps."""
    before = optimizer_of(0.3)
    train(before, schedule_of(before, kind), step)
    now = optimizer_of(**{"learning_rate": 0.3, **changes})
    scheduler = schedule_of(now, kind)
    now.load_state_dict(before.state_dict())
    continue_schedule(scheduler, step)
    return now, scheduler


@pytest.mark.parametrize("step", [1, 5, 9])
@pytest.mark.parametrize("kind", ["step", "cosine"])
def test_same_settings_have_the_rates_of_an_uninterrupted_run(kind, step):
    whole = optimizer_of(0.3)
    expected = train(whole, schedule_of(whole, kind), 10)
    now, scheduler = interrupted(kind, step)
    assert scheduler.get_last_lr() == expected[step]
    assert train(now, scheduler, 10 - step) == expected[step:]


def test_other_settings_rule_and_the_moments_stay():
    now, scheduler = interrupted("step", 5, learning_rate=0.02, weight_decay=0.5)
    assert scheduler.get_last_lr() == [0.02, 0.002]
    assert [group["weight_decay"] for group in now.param_groups] == [0.5, 0.5]
    moments = now.state[now.param_groups[0]["params"][0]]
    assert moments["step"] == 5
    # Gradients of 1: the first moment is 1 - 0.9 ** 5.
    torch.testing.assert_close(moments["exp_avg"], torch.full((3,), 1 - 0.9**5))
    assert train(now, scheduler, 5)[-1] == pytest.approx([0.002, 0.0002])
