"""The form of a variant's training settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training settings of a paper, the defaults of the training script.

    Attributes:
        learning_rate: Of AdamW, for the paper's batch.
        backbone_learning_rate_factor: On the learning rate of a backbone with pretrained weights.
        slow_parameters: Parts of parameter names outside the backbone that learn more slowly.
        slow_learning_rate_factor: On the learning rate of these.
        weight_decay: On all parameters, norms and biases too, as in the papers.
        max_grad_norm: Gradients are clipped to this norm.
        schedule: ``"step"`` (one drop to a tenth) or ``"cosine"``.
        num_epochs: Length of the paper's run.
        step_fraction: Share of the run after which the step schedule drops.
        warmup_fraction: Share of the run over which the learning rate rises from near 0.
    """

    learning_rate: float
    backbone_learning_rate_factor: float
    slow_parameters: tuple[str, ...]
    slow_learning_rate_factor: float
    weight_decay: float
    max_grad_norm: float
    schedule: str
    num_epochs: int
    step_fraction: float
    warmup_fraction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SmallRecipe(Recipe):
    """A small detector from random weights, for a few hundred pictures and a machine without GPU.

    Not from a paper: found with ``benchmarks/bccd.py``. What variants share are the defaults here.

    Attributes:
        model_fields: Of the configuration.
        num_epochs: On two hundred pictures about what two cores do in half an hour.
        batch_size: Pictures per process and step. The learning rate was found with one process.
        shortest_edge: Size of the pictures.
        longest_edge: Limit of the longer side.
    """

    model_fields: Mapping[str, Any]
    learning_rate: float = 4e-4
    backbone_learning_rate_factor: float = 1.0
    slow_parameters: tuple[str, ...] = ()
    slow_learning_rate_factor: float = 1.0
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.1
    schedule: str = "cosine"
    num_epochs: int = 100
    step_fraction: float = 0.8
    warmup_fraction: float = 0.05
    batch_size: int = 8
    shortest_edge: int = 192
    longest_edge: int = 256


# The small detector; variants differ in what they have of it.
SMALL_BACKBONE = {"backbone": "resnet18"}
SMALL_ENCODER = {"encoder_layers": 3, "encoder_attention_heads": 8, "encoder_ffn_dim": 512}
SMALL_DECODER = {
    "d_model": 128,
    "num_queries": 100,
    "decoder_layers": 3,
    "decoder_attention_heads": 8,
    "decoder_ffn_dim": 512,
}
# Of a detector that reads one map and whose encoder attends to all of it. In its first steps a
# detector learns the average box, and such an encoder comes to give all cells nearly the same
# content, from where it takes very long to tell them apart again. Without it, the many cells of
# stride 8, which small objects need, cost no more than the stages that are left out.
SMALL_ONE_MAP = (
    SMALL_BACKBONE
    | {"backbone_kwargs": {"out_indices": [2]}}
    # The other fields are for whoever asks for layers again.
    | SMALL_ENCODER
    | {"encoder_layers": 0}
)
