"""Dropout that keeps little for the backward."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """As torch's, which on CPUs keeps a number per value for the backward; this keeps a byte.

    Args:
        p: Probability that a value becomes 0, while training; the others are divided by 1 - p.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Drop some of the values, of any shape."""
        if not self.training or self.p == 0:
            return values
        return torch.native_dropout(values, self.p, True)[0]
