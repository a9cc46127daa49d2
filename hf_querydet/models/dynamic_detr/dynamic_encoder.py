"""The dynamic encoder of Dynamic DETR (ICCV 2021, pp. 2988-2997): attention over a feature pyramid.

Self-attention over all cells of all levels is replaced by three small attentions, one after the
other: spatial (deformable convolutions move their taps), scale (channels of each neighbouring level
are weighted) and representation (the activation depends on the picture).

The paper states: five levels; each level is convolved with its two neighbours, with offsets learned
from the level in the middle; squeeze-and-excitation weighs the result; dynamic ReLU activates it.
Chosen here, where it is silent: modulated offsets, the resizing of offsets to the coarser map, the
mean over the neighbours, group normalisation, no residual sum, and all widths.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_querydet.ops import ms_deform_attn

KERNEL_SIZE = 3
NUM_TAPS = KERNEL_SIZE * KERNEL_SIZE
# Channels of a hidden layer are the width divided by these.
SQUEEZE_REDUCTION = 16
DYNAMIC_RELU_REDUCTION = 4
# Slope and offset of two lines per channel.
NUM_LINE_COEFFICIENTS = 4


def deformable_convolution(
    features: Tensor, weight: Tensor, offsets: Tensor, mask: Tensor | None, *, stride: int = 1
) -> Tensor:
    """3x3 convolution whose taps are moved, padded by one cell (arXiv:1703.06211).

    Every tap of every output cell is one sample of deformable attention, with the factor as its
    weight; the rest is a matrix product over taps and channels. torchvision's operator computes the
    same; ``benchmarks/torchvision_operators.py`` compares the two.

    Positions and factors are float32 at least, under autocast too: half types cannot tell the
    positions on a large map apart.

    Args:
        features: (batch, channels_in, height, width).
        weight: (channels_out, channels_in, 3, 3).
        offsets: (batch, 18, height_out, width_out), (dy, dx) of each tap, taps row-major, in cells
            of ``features``.
        mask: (batch, 9, height_out, width_out), factor on each tap (arXiv:1811.11168), or
            None for 1.
        stride: Of the kernel.

    Returns:
        (batch, channels_out, height_out, width_out).
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    map_size = (features.shape[-2], features.shape[-1])
    locations = _tap_locations(offsets.to(dtype), map_size, stride)
    factors = torch.ones_like(locations[..., 0])
    if mask is not None:
        factors = mask.to(dtype).permute(0, 2, 3, 1).flatten(1)
    # One head, one level, one point: (batch, cells * taps, 1, 1, 1, ...)
    tokens = features.flatten(2).transpose(1, 2)[:, :, None]
    samples = ms_deform_attn(
        tokens, [map_size], locations[:, :, None, None, None], factors[:, :, None, None, None]
    )
    samples = samples.unflatten(1, (-1, NUM_TAPS)).flatten(2)
    # Taps first and channels last, as in the samples
    output = F.linear(samples, weight.permute(0, 2, 3, 1).flatten(1))
    return output.transpose(1, 2).unflatten(2, offsets.shape[-2:])


def _tap_locations(offsets: Tensor, map_size: tuple[int, int], stride: int) -> Tensor:
    """Where taps read, (batch, cells * taps, 2): (x, y), 0 to 1 spans the map."""
    height, width = map_size
    height_out, width_out = offsets.shape[-2:]
    rows, columns = (
        stride * torch.arange(size, dtype=offsets.dtype, device=offsets.device)
        for size in (height_out, width_out)
    )
    taps = torch.arange(KERNEL_SIZE, dtype=offsets.dtype, device=offsets.device) - KERNEL_SIZE // 2
    # (batch, height_out, width_out, 3, 3)
    dy, dx = offsets.permute(0, 2, 3, 1).unflatten(3, (KERNEL_SIZE, KERNEL_SIZE, 2)).unbind(-1)
    y = (rows[:, None, None, None] + taps[:, None] + dy + 0.5) / height
    x = (columns[:, None, None] + taps + dx + 0.5) / width
    return torch.stack([x, y], dim=-1).flatten(1, 4)


class OffsetPrediction(nn.Module):
    """Offsets and factors of the taps of a 3x3 kernel, from an ordinary 3x3 convolution.

    It starts at zero: offsets 0 and, where there are factors, factors 0.5 (arXiv:1811.11168).

    Args:
        hidden_size: Channels of the map.
        modulated: Predict factors too.
        stride: Of the kernel that the taps are for.
    """

    def __init__(self, hidden_size: int, *, modulated: bool, stride: int = 1) -> None:
        super().__init__()
        num_channels = (3 if modulated else 2) * NUM_TAPS
        self.modulated = modulated
        self.convolution = nn.Conv2d(
            hidden_size, num_channels, KERNEL_SIZE, stride=stride, padding=KERNEL_SIZE // 2
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predict offsets (batch, 18, h, w) and factors (batch, 9, h, w) in (0, 1) or None."""
        prediction = self.convolution(features)
        if not self.modulated:
            return prediction, None
        offsets, factors = prediction.split([2 * NUM_TAPS, NUM_TAPS], dim=1)
        return offsets, factors.sigmoid()


class DeformableConvolution(nn.Module):
    """3x3 deformable convolution that takes its offsets from outside, then group normalisation.

    Args:
        hidden_size: Channels in and out.
        num_groups: Of the normalisation.
        stride: Of the kernel.
    """

    def __init__(self, hidden_size: int, *, num_groups: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size, KERNEL_SIZE, KERNEL_SIZE))
        self.norm = nn.GroupNorm(num_groups, hidden_size)

    def forward(self, features: Tensor, offsets: Tensor, mask: Tensor | None) -> Tensor:
        """See :func:`deformable_convolution`."""
        return self.norm(
            deformable_convolution(features, self.weight, offsets, mask, stride=self.stride)
        )


class ChannelScaleAttention(nn.Module):
    """Squeeze-and-excitation: a factor in (0, 1) per channel (arXiv:1709.01507).

    The mean is taken over the whole map, padding included.

    Args:
        hidden_size: Channels.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(hidden_size, hidden_size // SQUEEZE_REDUCTION)
        self.excite = nn.Linear(hidden_size // SQUEEZE_REDUCTION, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Factors (batch, channels, 1, 1) of a map (batch, channels, height, width)."""
        factors = self.excite(self.squeeze(features.mean((2, 3))).relu()).sigmoid()
        return factors[..., None, None]


class ScalarScaleAttention(nn.Module):
    """One factor in [0.5, 1] per map, from its mean (Dynamic Head, arXiv:2106.08322).

    ReLU and then hard sigmoid, as in the code of its authors.

    Args:
        hidden_size: Channels.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(hidden_size, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Factors (batch, 1, 1, 1) of a map (batch, channels, height, width)."""
        factors = F.hardsigmoid(self.projection(features.mean((2, 3))).relu())
        return factors[..., None, None]


class DynamicReLU(nn.Module):
    """The larger of two lines per channel, whose coefficients follow from the map's mean.

    DyReLU-B (arXiv:2003.10027), with a hard sigmoid in place of ``2 * sigmoid - 1``,
    as in Dynamic Head's code. The last layer starts at zero, which makes it an ordinary ReLU.

    Args:
        hidden_size: Channels.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(hidden_size, hidden_size // DYNAMIC_RELU_REDUCTION)
        self.coefficients = nn.Linear(
            hidden_size // DYNAMIC_RELU_REDUCTION, NUM_LINE_COEFFICIENTS * hidden_size
        )

    def forward(self, features: Tensor) -> Tensor:
        """Activate a map, (batch, channels, height, width) to the same shape."""
        coefficients = self.coefficients(self.squeeze(features.mean((2, 3))).relu())
        # Each between -0.5 and 0.5, (batch, channels, 1, 1)
        centered = F.hardsigmoid(coefficients)[..., None, None] - 0.5
        slope, offset, other_slope, other_offset = centered.chunk(NUM_LINE_COEFFICIENTS, dim=1)
        return torch.maximum(
            (1 + 2 * slope) * features + offset, 2 * other_slope * features + other_offset
        )


class DynamicEncoderLayer(GradientCheckpointingLayer):
    """Spatial, scale and representation attention over the levels of a pyramid.

    Each level is computed from itself and its two neighbours, all of the layer's input. The same
    weights serve all levels. There is no residual sum.

    Args:
        hidden_size: Channels of every level, a multiple of 16.
        num_groups: Of the group normalisation after each convolution.
        offset_source: ``"middle"``: the three convolutions of a level share offsets that are
            predicted from that level. ``"own"``: each predicts them from the map that it reads.
        modulated: The convolutions have factors on their taps.
        scale_attention: ``"channel"`` or ``"scalar"``.
        activation: ``"dynamic_relu"`` or ``"relu"``.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_groups: int,
        offset_source: str,
        modulated: bool,
        scale_attention: str,
        activation: str,
    ) -> None:
        super().__init__()
        self.offsets = OffsetPrediction(hidden_size, modulated=modulated)
        if offset_source == "own":
            self.finer_offsets = OffsetPrediction(hidden_size, modulated=modulated, stride=2)
            self.coarser_offsets = OffsetPrediction(hidden_size, modulated=modulated)
        else:
            self.finer_offsets = self.coarser_offsets = None
        self.middle = DeformableConvolution(hidden_size, num_groups=num_groups)
        self.finer = DeformableConvolution(hidden_size, num_groups=num_groups, stride=2)
        self.coarser = DeformableConvolution(hidden_size, num_groups=num_groups)
        self.scale_attention = (
            ChannelScaleAttention(hidden_size)
            if scale_attention == "channel"
            else ScalarScaleAttention(hidden_size)
        )
        self.activation = DynamicReLU(hidden_size) if activation == "dynamic_relu" else nn.ReLU()

    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        """Update every level.

        Args:
            levels: Maps (batch, hidden_size, height, width), fine to coarse; each has half the
                height and width of the one before it, rounded up. Separate arguments, because
                checkpointing finds no gradients inside a list.

        Returns:
            Maps of the same shapes.
        """
        return tuple(self._update(levels, index) for index in range(len(levels)))

    def _update(self, levels: tuple[Tensor, ...], index: int) -> Tensor:
        # Spatial attention
        branches = self._convolve_neighbours(levels, index)
        # Scale attention
        branches = [branch * self.scale_attention(branch) for branch in branches]
        # The mean and not the sum: the pyramid's ends have two branches, the others three.
        fused = torch.stack(branches).mean(0)
        # Representation attention
        return self.activation(fused)

    def _convolve_neighbours(self, levels: tuple[Tensor, ...], index: int) -> list[Tensor]:
        """The level itself and its neighbours, each brought to the level's size."""
        features = levels[index]
        size = features.shape[-2:]
        offsets, mask = self.offsets(features)
        branches = [self.middle(features, offsets, mask)]
        if index > 0:
            finer = levels[index - 1]
            # Stride 2 leaves the finer map at this level's size, which the offsets have.
            taps = (offsets, mask) if self.finer_offsets is None else self.finer_offsets(finer)
            branches.append(self.finer(finer, *taps))
        if index + 1 < len(levels):
            coarser = levels[index + 1]
            if self.coarser_offsets is None:
                # Convolving comes before upsampling, so the offsets go to the coarser size. Their
                # values stay: they count cells of the map that is convolved.
                taps = _resize(offsets, coarser), None if mask is None else _resize(mask, coarser)
            else:
                taps = self.coarser_offsets(coarser)
            branches.append(F.interpolate(self.coarser(coarser, *taps), size, mode="bilinear"))
        return branches


def _resize(values: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(values, like.shape[-2:], mode="bilinear")
