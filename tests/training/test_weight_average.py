"""The moving average of weights against its formula."""

import pytest
import torch
from torch import nn

from hf_querydet.training import weight_average


def small_model():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def train_a_step(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model(torch.randn(5, 3))  # moves the running statistics


def test_average_is_the_formula_with_its_warm_up():
    model = small_model()
    average = weight_average(model, decay=0.2)
    expected = None
    for step in range(5):
        train_a_step(model, step)
        average.update_parameters(model)
        values = {name: value.clone().double() for name, value in model.state_dict().items()}
        if expected is None:
            expected = values
            continue
        # 2/11 and 3/12 = 0.25: the warm-up ends between the two.
        decay = min(0.2, (1 + step) / (10 + step))
        for name, value in values.items():
            expected[name] = decay * expected[name] + (1 - decay) * value

    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_saved_average_goes_on_where_it_was():
    model = small_model()
    first, second = (weight_average(model, decay=0.9) for _ in range(2))
    for step in range(3):
        train_a_step(model, step)
        first.update_parameters(model)
    second.load_state_dict(first.state_dict())
    train_a_step(model, 3)
    for average in (first, second):
        average.update_parameters(model)

    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_average_is_for_evaluation_only():
    average = weight_average(small_model(), decay=0.9)
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.parameters())


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_decay_outside_its_range_is_an_error(decay):
    with pytest.raises(ValueError, match=f"decay must lie between 0 and 1.* got {decay}"):
        weight_average(small_model(), decay=decay)
