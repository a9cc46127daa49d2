"""How large a detector is and how much it computes."""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_querydet.configuration_utils import DetectorConfig
from hf_querydet.registration import VARIANTS, variant_of

# The shorter side of the papers' pictures, and the shape of most photographs.
DEFAULT_SIZE = (800, 1066)


@dataclass(frozen=True)
class PartInfo:
    """One part of a detector.

    Attributes:
        parameters: Number of parameters, those of frozen stages included. Affine terms of frozen
            batch norm are constants.
        multiply_adds: Multiplications with their additions in one forward on one picture; what
            papers of this family call FLOPs.
    """

    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class ModelInfo(PartInfo):
    """A whole detector.

    Attributes:
        trainable_parameters: Parameters without those of frozen backbone stages.
        parts: Its parts by name; they add up to the whole.
    """

    trainable_parameters: int
    parts: Mapping[str, PartInfo]


def model_info(config: DetectorConfig, *, size: tuple[int, int] = DEFAULT_SIZE) -> ModelInfo:
    """Count the parameters and operations of a detector, without weights and without computing.

    Counted are matrix products, convolutions and the sampling of features, by torch's
    ``FlopCounterMode``; not additions, normalisations and activations.

    Args:
        config: Configuration of any variant. Pretrained weights are not loaded; the backbone is
            counted as the configuration freezes it.
        size: (height, width) of the picture in pixels.

    Raises:
        ValueError: If the configuration is not one of this library's, or the size is not positive.
    """
    if min(size) < 1:
        raise ValueError(f"size must be (height, width) in pixels, at least 1, got {size}.")
    config = deepcopy(config)
    config.use_pretrained_backbone = False
    with torch.device("meta"):
        model = variant_of(config).detector(config).eval()
        picture = torch.empty(1, config.num_channels, *size)
    # Fused attention kernels are not counted on every device; the products they consist of are.
    model.set_attn_implementation("eager")
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # The counter would follow each output's gradient, and some have none.
    model.requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(picture)
    flops = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}

    parts = {
        name: PartInfo(_num_parameters(part), _flops(part, path, flops) // 2)
        for name, path, part in _parts(model)
    }
    total = PartInfo(_num_parameters(model), counter.get_total_flops() // 2)
    rest = PartInfo(
        total.parameters - sum(part.parameters for part in parts.values()),
        total.multiply_adds - sum(part.multiply_adds for part in parts.values()),
    )
    return ModelInfo(
        parameters=total.parameters,
        multiply_adds=total.multiply_adds,
        trainable_parameters=num_trainable,
        parts={
            name: part
            for name, part in {**parts, "other": rest}.items()
            if part.parameters or part.multiply_adds
        },
    )


def format_parts(info: ModelInfo) -> str:
    """A detector as a table, one part per line."""
    width = max(len(name) for name in info.parts) + 2
    lines = [f"{'part':<{width}}{'parameters':>12}{'G multiply-adds':>18}"]
    lines += [
        f"{name:<{width}}{part.parameters:>12,}{part.multiply_adds / 1e9:>18.2f}"
        for name, part in {**info.parts, "all": info}.items()
    ]
    return "\n".join([*lines, f"{'trainable':<{width}}{info.trainable_parameters:>12,}"])


def format_sizes(variants: Iterable[str], *, size: tuple[int, int] = DEFAULT_SIZE) -> str:
    """The papers' models as a table, with what their authors print beside what is counted.

    Args:
        variants: Names of variants.
        size: See :func:`model_info`.
    """
    lines = [
        f"{'variant':<18}{'name':<24}{'M parameters':>14}{'authors':>9}"
        f"{'G multiply-adds':>18}{'authors':>9}"
    ]
    for variant in variants:
        config_class = VARIANTS[variant].config
        for name in config_class.named_configurations:
            info = model_info(config_class.from_name(name), size=size)
            published = config_class.published_sizes.get(name, (None, None))
            parameters, multiply_adds = ("-" if each is None else f"{each:g}" for each in published)
            lines.append(
                f"{variant:<18}{name:<24}{info.parameters / 1e6:>14.2f}{parameters:>9}"
                f"{info.multiply_adds / 1e9:>18.1f}{multiply_adds:>9}"
            )
    lines += [
        "",
        f"Multiply-adds are those of one picture of {size[0]} x {size[1]} pixels; authors average "
        "over pictures of their choice.",
    ]
    return "\n".join(lines)


def _parts(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Name, path and module of what the detector and the model in it consist of."""
    root = type(model).__name__
    for name, part in model.model.named_children():
        yield name, f"{root}.model.{name}", part
    for name, part in model.named_children():
        if part is not model.model:
            yield name, f"{root}.{name}", part


def _flops(module: nn.Module, path: str, flops: Mapping[str, int]) -> int:
    """Operations of a module; a container that is never called itself has those of its children."""
    if path in flops:
        return flops[path]
    return sum(_flops(child, f"{path}.{name}", flops) for name, child in module.named_children())


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
