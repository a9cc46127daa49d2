"""Dropout that keeps little for the backward and draws its zeros quickly on CPUs."""

from typing import Any

import torch
from torch import Tensor, nn

# Random numbers of this many bits decide about one value each.
BITS = 16


class Dropout(nn.Dropout):
    """As torch's, which on CPUs keeps a number per value for the backward; this keeps a byte.

    On CPUs the probability is rounded to a multiple of 2**-16, so that one random number of 64 bits
    decides about four values.

    Args:
        p: Probability that a value becomes 0, while training; the others are divided by 1 - p.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Drop some of the values, of any shape."""
        if not self.training or self.p == 0:
            return values
        if not _draws_itself(values, self.p):
            return torch.native_dropout(values, self.p, True)[0]
        # Filling by a mask is cheaper than multiplying by it, which makes numbers of it first.
        return (values * (1 / (1 - self.p))).masked_fill_(_random_mask(values, self.p), 0)


class ReluDropout(Dropout):
    """ReLU, then dropout, which keep nothing but their result for the backward.

    What follows keeps that as well. The input is overwritten, so nothing else may need it.

    Args:
        p: See :class:`Dropout`.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Activate, then drop some of the values, of any shape."""
        if not self.training or self.p == 0:
            return values.relu_()
        if not _draws_itself(values, self.p):
            # The same in this order, in which ReLU needs nothing but the result.
            return super().forward(values).relu_()
        return _ReluDropout.apply(values, self.p)


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float) -> Tensor:
        ctx.factor = 1 / (1 - p)
        values.masked_fill_(_random_mask(values, p), 0).relu_().mul_(ctx.factor)
        ctx.mark_dirty(values)
        ctx.save_for_backward(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Whatever made a value 0, its gradient is 0.
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, output, 0).mul_(ctx.factor), None


def _draws_itself(values: Tensor, p: float) -> bool:
    """Where torch's own kernel is slow, and so is what its compiler makes of it."""
    return values.device.type == "cpu" and p < 1


def _random_mask(values: Tensor, p: float) -> Tensor:
    """Bool, of the shape of values, True with probability p."""
    int64 = torch.iinfo(torch.int64)
    num_words = -(-values.numel() * BITS // 64)
    # Not random_, which is a little faster, but which torch.compile does not take.
    words = torch.randint(int64.min, int64.max, (num_words,), device=values.device)
    bits = words.view(torch.int16)[: values.numel()].view(values.shape)
    # Integers of 16 bits run from -2**15 to 2**15 - 1.
    return bits < min(round(p * 2**BITS), 2**BITS - 1) - 2 ** (BITS - 1)
