"""The form of a variant's training settings."""

from dataclasses import dataclass


@dataclass(frozen=True)
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
