"""Options that several subcommands have, and what they choose."""

import atexit
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from accelerate import PartialState


class MixedPrecision(StrEnum):
    """Arithmetic of the forward, as accelerate calls it."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"


class BoxFormat(StrEnum):
    """Numbers of a dataset's boxes: left, top, and then width, height or right, bottom."""

    XYWH = "xywh"
    XYXY = "xyxy"


Model = Annotated[str, typer.Argument(help="Model directory or Hub id.", show_default=False)]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub model.")
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Pictures at a time, per process.")
]
Precision = Annotated[
    MixedPrecision, typer.Option("--mixed-precision", help="Faster arithmetic of the model.")
]
OnCPU = Annotated[bool, typer.Option("--cpu", help="Leave a GPU alone.")]


def start_process(cpu: bool) -> "PartialState":
    """This process among those that ``accelerate launch`` has started, and its device."""
    import torch
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # shown for every file of weights, by every process
    # Said in so many words, or several processes without a GPU would each work alone.
    state = PartialState(cpu=cpu or not torch.accelerator.is_available())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # NCCL warns of groups that are left.
        atexit.register(torch.distributed.destroy_process_group)
    return state


def hide_bar(state: "PartialState") -> bool | None:
    """For tqdm: bars are for one process and for terminals, which None stands for."""
    return None if state.is_main_process else True
