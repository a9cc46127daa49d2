"""Pointwise convolutions whose filters each object query generates for its own region."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class DynamicConvolution(nn.Module):
    """Dynamic instance interaction of Sparse R-CNN (arXiv:2011.12450), Sec. 3.3 and Fig. 4.

    A query makes the filters of consecutive 1x1 convolutions, which are applied to the features of
    that query's own region; each is followed by layer normalisation and ReLU. A linear layer over
    all positions turns the result into one vector.

    The paper's pseudo-code ends with that linear layer; as in the authors' code, normalisation and
    ReLU follow it.

    Args:
        hidden_size: Channels of queries, region features and output.
        filter_channels: Channels after each of the generated convolutions: (64, 256) in Sparse
            R-CNN.
        num_positions: Positions of a region, 49 for 7x7 bins.
    """

    def __init__(
        self, *, hidden_size: int, filter_channels: Sequence[int], num_positions: int
    ) -> None:
        super().__init__()
        self.filter_shapes = list(pairwise([hidden_size, *filter_channels]))
        num_weights = sum(math.prod(shape) for shape in self.filter_shapes)
        self.filter_generator = nn.Linear(hidden_size, num_weights)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in filter_channels)
        self.output_projection = nn.Linear(num_positions * filter_channels[-1], hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size)

    def forward(self, object_queries: Tensor, region_features: Tensor) -> Tensor:
        """Let every query read its region.

        Args:
            object_queries: (batch, num_queries, hidden_size).
            region_features: (batch, num_queries, num_positions, hidden_size).

        Returns:
            (batch, num_queries, hidden_size).
        """
        weights = self.filter_generator(object_queries)
        weights = weights.split([math.prod(shape) for shape in self.filter_shapes], dim=-1)
        for one_filter, shape, norm in zip(weights, self.filter_shapes, self.norms, strict=True):
            # (positions, channels in) times (channels in, channels out), for every query its own
            region_features = norm(region_features @ one_filter.unflatten(-1, shape)).relu()
        return self.output_norm(self.output_projection(region_features.flatten(-2))).relu()
