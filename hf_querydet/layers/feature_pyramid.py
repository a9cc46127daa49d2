"""Feature pyramid network: what deep maps know, at the resolution of shallow ones."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class FeaturePyramid(nn.Module):
    """Feature pyramid network (arXiv:1612.03144), Sec. 3 and Fig. 3.

    Each map of the backbone gets a 1x1 convolution; from the coarsest to the finest, the sum of
    levels so far is enlarged (nearest neighbour) and added; a 3x3 convolution makes each sum a
    level. No normalisation and no activation. Levels coarser than the backbone's are 3x3
    convolutions of stride 2, the first over the last level, further ones over the ReLU of the one
    before (arXiv:1708.02002, Sec. 4, where the first reads the backbone's map).

    Padding is not masked.

    Args:
        in_channels: Channels of the backbone's maps, fine to coarse.
        hidden_size: Channels of every level.
        num_levels: Levels in all, by default one per map.

    Raises:
        ValueError: If there are more maps than levels.
    """

    def __init__(
        self, *, in_channels: Sequence[int], hidden_size: int, num_levels: int | None = None
    ) -> None:
        super().__init__()
        num_levels = len(in_channels) if num_levels is None else num_levels
        if len(in_channels) > num_levels:
            raise ValueError(
                f"num_levels is {num_levels} but the backbone returns {len(in_channels)} maps; set "
                "out_indices of backbone_config to the stages that are to be read."
            )
        self.lateral_projections = nn.ModuleList(
            nn.Conv2d(size, hidden_size, kernel_size=1) for size in in_channels
        )
        self.output_convolutions = nn.ModuleList(
            nn.Conv2d(hidden_size, hidden_size, 3, padding=1) for _ in in_channels
        )
        self.extra_convolutions = nn.ModuleList(
            nn.Conv2d(hidden_size, hidden_size, 3, stride=2, padding=1)
            for _ in range(num_levels - len(in_channels))
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Build the levels.

        Args:
            maps: Of the backbone, each (batch, channels, height, width), fine to coarse.

        Returns:
            ``num_levels`` maps (batch, hidden_size, height, width), fine to coarse.
        """
        laterals = [
            project(features)
            for project, features in zip(self.lateral_projections, maps, strict=True)
        ]
        sums = [laterals[-1]]
        for lateral in reversed(laterals[:-1]):
            # To the finer map's size, which is not twice as large where a side was odd.
            coarser = F.interpolate(sums[0], size=lateral.shape[-2:], mode="nearest")
            sums.insert(0, lateral + coarser)
        levels = [
            convolve(features)
            for convolve, features in zip(self.output_convolutions, sums, strict=True)
        ]
        for index, convolve in enumerate(self.extra_convolutions):
            levels.append(convolve(levels[-1] if index == 0 else levels[-1].relu()))
        return levels
