"""Batch normalisation that training leaves alone, folded into the convolutions before it."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Large enough for every stage of a network whose coarsest map has stride 32.
PROBE_SIZE = 64


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine terms are constants.

    All four are buffers: never trained, never decayed, the same in training and evaluation. DETR
    (arXiv:2005.12872), Appendix A.4. One fused kernel, where multiplying and adding takes two
    passes; none at all where :func:`fold_frozen_norms` has given the work to a convolution.

    Args:
        num_features: Channels.
        eps: Added to the variance.
        activation: Applied to the result, for norms of timm that bring their activation along.

    Attributes:
        is_folded: The convolution before it normalises; this module only activates.
    """

    def __init__(
        self, num_features: int, *, eps: float = 1e-5, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.activation = activation
        self.is_folded = False
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def reset_parameters(self) -> None:
        """Start as a norm that changes nothing."""
        for name, buffer in self.named_buffers():
            buffer.fill_(0.0 if name in ("bias", "running_mean") else 1.0)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d) -> "FrozenBatchNorm2d":
        """Freeze a batch norm with the values that it has now."""
        frozen = cls(norm.num_features, eps=norm.eps, activation=getattr(norm, "act", None))
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, name)
            if value is not None:
                setattr(frozen, name, value.detach().clone())
        return frozen

    def forward(self, features: Tensor) -> Tensor:
        """Normalise and activate (batch, channels, height, width) to the same shape."""
        if not self.is_folded:
            features = self.normalize(features)
        return features if self.activation is None else self.activation(features)

    def normalize(self, features: Tensor) -> Tensor:
        """Normalise (batch, channels, height, width) to the same shape."""
        return F.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm as ``scale * features + shift``, both (channels,), at least float32."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        scale = self.weight.to(dtype) * (self.running_var.to(dtype) + self.eps).rsqrt()
        return scale, self.bias.to(dtype) - self.running_mean.to(dtype) * scale


class NormalizingConv2d(nn.Conv2d):
    """A convolution that applies the frozen norm after it as well.

    Where it costs less, the norm goes into the weights: the map is then neither read and written
    once more nor, in training, kept twice for the backward pass. The weights stay what they are in
    a saved file.
    """

    norm: FrozenBatchNorm2d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Adapters make more of the kind they find. Their part would be added after the norm, and
        # before it once they are merged.
        raise TypeError(
            "NormalizingConv2d is made by from_convolution only. Adapters (LoRA) on convolutions "
            "before frozen norms are not possible: name linear layers as their targets, or load "
            "the model with backbone_norm='batch'."
        )

    @classmethod
    def from_convolution(cls, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> "NormalizingConv2d":
        """Take over a convolution's parameters. The norm stays registered where it is."""
        normalizing = cls.__new__(cls)
        with torch.device("meta"):
            nn.Conv2d.__init__(
                normalizing,
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                groups=conv.groups,
                bias=conv.bias is not None,
            )
        normalizing.weight, normalizing.bias = conv.weight, conv.bias
        normalizing.training = conv.training
        # Past the registration of modules, or its buffers would be saved twice.
        object.__setattr__(normalizing, "norm", norm)
        norm.is_folded = True
        return normalizing

    def forward(self, features: Tensor) -> Tensor:
        """Convolve and normalise (batch, in_channels, height, width)."""
        # Compilers fuse the norm themselves, and a choice by size would bind a program to sizes.
        if torch.compiler.is_compiling() or not self._folding_pays(features):
            return self.norm.normalize(super().forward(features))
        scale, shift = self.norm.scale_and_shift()
        weight = (self.weight * scale[:, None, None, None]).to(self.weight.dtype)
        if self.bias is not None:
            shift = shift + self.bias * scale
        return self._conv_forward(features, weight, shift.to(weight.dtype))

    def _folding_pays(self, features: Tensor) -> bool:
        """Whether the map has more cells than a filter has weights."""
        batch, _, height, width = features.shape
        cells = batch * (height // self.stride[0]) * (width // self.stride[1])
        return cells > self.weight[0].numel()


def freeze_batch_norm(module: nn.Module, *, inside: list[nn.Module] | None = None) -> None:
    """Replace batch norms below ``module`` by :class:`FrozenBatchNorm2d`, in place.

    Args:
        module: Root, itself not replaced.
        inside: Replace only these modules and what lies below them; None replaces all.
    """
    for name, child in module.named_children():
        applies = inside is None or child in inside
        if not isinstance(child, nn.BatchNorm2d):
            freeze_batch_norm(child, inside=None if applies else inside)
        elif applies:
            setattr(module, name, FrozenBatchNorm2d.from_batch_norm(child))


def fold_frozen_norms(body: nn.Module, num_channels: int) -> None:
    """Let convolutions do the work of the frozen norms behind them, in place.

    Names and values of all tensors stay. A norm is folded where it is the only reader of a plain
    convolution's output, which a run without values (on the meta device) tells.

    Args:
        body: Takes (batch, num_channels, height, width).
        num_channels: Of the pictures.
    """
    norms = [module for module in body.modules() if isinstance(module, FrozenBatchNorm2d)]
    if not norms:
        return
    for conv, norm in _convolutions_before(norms, body, num_channels):
        path = next(name for name, module in body.named_modules() if module is conv)
        parent, _, name = path.rpartition(".")
        setattr(body.get_submodule(parent), name, NormalizingConv2d.from_convolution(conv, norm))


@torch.no_grad()
def _convolutions_before(
    norms: list[FrozenBatchNorm2d], body: nn.Module, num_channels: int
) -> list[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    modes = [(module, module.training) for module in body.modules()]
    # Stand-ins of the same shapes: the tensors may lie on several devices, as they do where
    # accelerate builds a model without its weights.
    tensors = {**dict(body.named_parameters()), **dict(body.named_buffers())}
    stand_ins = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    stand_in_of = {id(tensor): stand_ins[name] for name, tensor in tensors.items()}
    picture = torch.zeros(
        1, num_channels, PROBE_SIZE, PROBE_SIZE, device="meta", dtype=next(body.parameters()).dtype
    )
    body.eval()
    with torch.device("meta"), _Readers() as readers:
        maps = functional_call(body, stand_ins, (picture,)).feature_maps
    for module, was_training in modes:
        module.training = was_training
    readers.count(maps)

    # Weights and statistics say which module a call belongs to; one that runs twice stays as it is.
    runs = Counter(id(weight) for _, weight in readers.convolved)
    runs += Counter(id(running_mean) for _, running_mean in readers.normalized)
    convolutions = {
        id(stand_in_of[id(module.weight)]): module
        for module in body.modules()
        if type(module) is nn.Conv2d and module.padding_mode == "zeros"
    }
    sources = {
        id(output): convolutions[id(weight)]
        for output, weight in readers.convolved
        if id(weight) in convolutions and runs[id(weight)] == 1
    }
    frozen = {id(stand_in_of[id(norm.running_mean)]): norm for norm in norms}
    return [
        (sources[id(features)], frozen[id(running_mean)])
        for features, running_mean in readers.normalized
        if id(features) in sources
        and runs[id(running_mean)] == 1
        and id(running_mean) in frozen
        and readers.counts[id(features)] == 1
    ]


class _Readers(TorchFunctionMode):
    """Notes which functions of torch read the outputs of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []  # all that was read, so that no two tensors share an id
        self.convolved: list[tuple[Tensor, Tensor]] = []  # output, weight
        self.normalized: list[tuple[Tensor, Tensor]] = []  # input, running mean
        self.counts: Counter[int] = Counter()

    def count(self, values: Any) -> None:
        """Count a reading of all tensors in a nested structure."""
        self.kept.append(values)
        self.counts.update(id(value) for value in tree_leaves(values) if isinstance(value, Tensor))

    def __torch_function__(
        self,
        func: Callable,
        types: Iterable[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Reading an attribute, such as the shape, is not reading the values.
        if getattr(func, "__name__", "") != "__get__":
            self.count((args, kwargs))
        if func is F.batch_norm:
            self.normalized.append((args[0], args[1]))
        output = func(*args, **kwargs)
        if func is torch.conv2d:
            self.convolved.append((output, args[1]))
        return output
