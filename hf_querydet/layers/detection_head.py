"""Class head and box head of detectors that refine references."""

import torch
from torch import Tensor, nn

from hf_querydet.layers.feed_forward import MLP


class DetectionHead(nn.Module):
    """Class head and box head over the same tokens: queries of a decoder layer, or the memory.

    Args:
        hidden_size: Channels of a token.
        num_labels: Classes, each with a score of its own.
        size_bias: First value of the box head for width and height, in inverse-sigmoid space.
    """

    def __init__(self, *, hidden_size: int, num_labels: int, size_bias: float = 0.0) -> None:
        super().__init__()
        self.size_bias = size_bias
        self.class_head = nn.Linear(hidden_size, num_labels)
        self.box_head = MLP(
            input_size=hidden_size, hidden_size=hidden_size, output_size=4, num_layers=3
        )

    def box_deltas(self, hidden_states: Tensor) -> Tensor:
        """Raw boxes (..., 4), at least float32: half types are too coarse for what is added."""
        deltas = self.box_head(hidden_states)
        return deltas.to(torch.promote_types(deltas.dtype, torch.float32))
