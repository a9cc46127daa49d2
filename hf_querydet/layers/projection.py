"""From the maps of a backbone to feature levels of one width."""

from collections.abc import Sequence

from torch import Tensor, nn

NUM_GROUPS = 32  # of the authors


class FeatureProjection(nn.Module):
    """Convolution and group normalisation per level, and levels coarser than the backbone's.

    Each map gets a 1x1 convolution. The first extra level is a 3x3 convolution of stride 2 over the
    backbone's own last map, not over its projection; further ones continue from the level before.
    Deformable DETR (arXiv:2010.04159), Sec. A.2 and Fig. 4.

    Group normalisation takes its statistics from the whole map, padding included, as in the
    authors' code.

    Args:
        in_channels: Channels of the backbone's maps, fine to coarse.
        hidden_size: Channels of every level; a multiple of 32, the number of groups.
        num_levels: Levels in all.

    Raises:
        ValueError: If there are more maps than levels, or hidden_size cannot be split into groups.
    """

    def __init__(self, *, in_channels: Sequence[int], hidden_size: int, num_levels: int) -> None:
        super().__init__()
        if len(in_channels) > num_levels:
            raise ValueError(
                f"num_feature_levels is {num_levels} but the backbone returns {len(in_channels)} "
                "maps; set out_indices of backbone_config to the stages that are to be read."
            )
        if hidden_size % NUM_GROUPS:
            raise ValueError(
                f"hidden_size must be a multiple of {NUM_GROUPS}, the groups of the normalisation, "
                f"got {hidden_size}."
            )
        convolutions = [nn.Conv2d(size, hidden_size, kernel_size=1) for size in in_channels]
        size_in = in_channels[-1]
        for _ in range(num_levels - len(in_channels)):
            convolutions.append(nn.Conv2d(size_in, hidden_size, 3, stride=2, padding=1))
            size_in = hidden_size
        self.num_maps = len(in_channels)
        self.levels = nn.ModuleList(
            nn.Sequential(convolution, nn.GroupNorm(NUM_GROUPS, hidden_size))
            for convolution in convolutions
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Project maps.

        Args:
            maps: Of the backbone, each (batch, channels, height, width).

        Returns:
            ``num_levels`` maps (batch, hidden_size, height, width), fine to coarse.
        """
        levels = [project(features) for project, features in zip(self.levels, maps, strict=False)]
        source = maps[-1]
        for project in self.levels[self.num_maps :]:
            source = project(source)
            levels.append(source)
        return levels
