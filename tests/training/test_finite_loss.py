"""A loss that is not a number ends a run, in every process."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState, debug_launcher
from accelerate.state import AcceleratorState, GradientState

from hf_querydet.training import NonFiniteLossError, mean_loss_terms

STEP = 17


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def outputs(loss, loss_giou=1.0):
    terms = {"loss_ce": torch.tensor(2.0), "loss_giou": torch.tensor(loss_giou)}
    return SimpleNamespace(loss=torch.tensor(loss), loss_dict=terms)


def labels(*image_ids):
    return [{"image_id": torch.tensor([image_id])} for image_id in image_ids]


def test_finite_terms_come_back_as_numbers(accelerator):
    terms = mean_loss_terms(accelerator, outputs(3.5), labels(4), STEP)
    assert terms == {"loss": 3.5, "loss_ce": 2.0, "loss_giou": 1.0}


def test_step_loss_term_and_pictures_are_named(accelerator):
    message = (
        "Stopped at step 17: the loss is inf (loss_giou) for image ids [4, 9]. Lower the learning "
        "rate, warm up for longer, or look at these pictures."
    )
    with pytest.raises(NonFiniteLossError, match=re.escape(message)):
        mean_loss_terms(accelerator, outputs(torch.inf, torch.inf), labels(4, 9), STEP)


def test_in_half_precision_another_is_advised(accelerator, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(NonFiniteLossError, match=r"fp16 has a small range: try bf16\."):
        mean_loss_terms(accelerator, outputs(torch.nan), labels(4), STEP)


def one_process_fails(folder):
    PartialState._reset_state()  # what the parent process had, inherited by forking
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    terms = mean_loss_terms(accelerator, outputs(float(rank)), labels(0), STEP)
    try:
        broken = outputs(torch.nan, torch.nan) if rank == 1 else outputs(1.0)
        mean_loss_terms(accelerator, broken, labels(10 + rank), STEP)
        told = "nothing"
    except NonFiniteLossError as error:
        told = str(error)
    (Path(folder) / str(rank)).write_text(f"{terms['loss']} {told}")


def test_every_process_stops_when_one_has_to(tmp_path):
    debug_launcher(one_process_fails, args=(str(tmp_path),), num_processes=2)

    told = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith(
        "0.5 Stopped at step 17: the loss is nan (loss_giou) for image ids [11]."
    )
