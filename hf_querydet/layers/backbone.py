"""The convolutional backbone: timm or transformers, its normalisation, what of it is trained."""

import logging
from collections import defaultdict
from collections.abc import Iterable

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel

from hf_querydet.layers.canvas import check_pixel_mask
from hf_querydet.layers.frozen_batch_norm import fold_frozen_norms, freeze_batch_norm

logger = logging.getLogger(__name__)

STEM_NAMES = ("embedder", "embeddings")
FIRST_STAGE_STRIDE = 4


class Backbone(nn.Module):
    """A feature extractor of timm or transformers behind one interface.

    Args:
        config: What ``AutoBackbone`` builds from, with the stages to return.
        pretrained: Load the published weights. Ignored while a checkpoint is being loaded (the
            model is then built on the meta device), because the checkpoint brings its own.
        norm: ``"frozen"`` or ``"batch"``.
        num_frozen_stages: 0 trains all, 1 freezes the stem, 2 stem and first stage, and so on.

    Attributes:
        body: The wrapped ``AutoBackbone``.
        channels: Channels of each returned feature map.
        is_timm: Whether it is a network of timm.

    Raises:
        ValueError: If stages are to be frozen in an architecture whose stages cannot be told,
            pretrained weights are wanted from a backbone that no published name is known of, or
            the network returns maps with their channels last.
        OSError: If the pretrained weights cannot be had.
    """

    def __init__(
        self, config: PreTrainedConfig, *, pretrained: bool, norm: str, num_frozen_stages: int
    ) -> None:
        super().__init__()
        # A stored configuration names the type of its weights, which this model may not have.
        dtype = {} if config.dtype is None else {"dtype": torch.get_default_dtype()}
        self.body = AutoBackbone.from_config(config, **dtype)
        _check_channels_first(self.body)
        self.channels = list(self.body.channels)
        if pretrained and not _on_meta_device(self.body):
            _load_published_weights(self.body)
        self.is_timm = _is_timm(self.body)
        self.num_frozen_stages = num_frozen_stages
        if norm == "frozen":
            freeze_batch_norm(self.body)
        else:
            freeze_batch_norm(self.body, inside=self._frozen_stages())
        fold_frozen_norms(self.body, config.num_channels)
        if not _on_meta_device(self.body):
            # transformers gives first values to modules without this mark, and those that have
            # just taken the place of others lack it.
            for module in self.body.modules():
                module._is_hf_initialized = True
        self.freeze_stages()

    def freeze_stages(self) -> None:
        """Exclude the parameters of the frozen stages from training.

        Done at construction; to be repeated when parameters have been replaced, as loading does.
        """
        for module in self._frozen_stages():
            module.requires_grad_(False)

    def reset(self, keys: Iterable[str]) -> None:
        """Give tensors new first values, for those that a checkpoint lacks.

        Args:
            keys: Their names, from this module on.

        Raises:
            ValueError: If one belongs to a module that does not know its first values.
        """
        keys_of_modules = defaultdict(set)
        for key in keys:
            module_name, _, name = key.rpartition(".")
            keys_of_modules[module_name].add(name)
        for module_name, names in keys_of_modules.items():
            module = self.get_submodule(module_name)
            if not hasattr(module, "reset_parameters"):
                raise ValueError(
                    f"The checkpoint lacks {', '.join(sorted(names))} of the backbone's "
                    f"{module_name}, and {type(module).__name__} does not say how they start; "
                    "complete the checkpoint, or start a new detector."
                )
            kept = {name: v.clone() for name, v in module.state_dict().items() if name not in names}
            module.reset_parameters()
            module.load_state_dict(kept, strict=False)

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Extract feature maps.

        Args:
            pixel_values: (batch, channels, height, width).
            pixel_mask: (batch, height, width), 1 = picture, 0 = padding; None if nothing is padded.

        Returns:
            Per stage, from fine to coarse: the map (batch, channels, height, width) and its padding
            mask (batch, height, width), True = padding, or None if nothing is padded.

        Raises:
            ValueError: If the mask is of another size than the pictures.
        """
        check_pixel_mask(pixel_values, pixel_mask)
        # Channels last: convolutions are faster so, on CPUs and on GPUs with half types, and what
        # turns cells into tokens afterwards need not copy. Compilers choose a layout themselves,
        # and a given one would bind an exported program to some sizes.
        if not torch.compiler.is_compiling():
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
            # Attention without a mask is faster. On other devices the question would make the host
            # wait for all that is queued there.
            if pixel_mask is not None and pixel_mask.is_cpu and pixel_mask.all():
                pixel_mask = None
        maps = self.body(pixel_values).feature_maps
        return [(features, resize_padding_mask(pixel_mask, features)) for features in maps]

    def _frozen_stages(self) -> list[nn.Module]:
        return _leading_stages(self.body, self.num_frozen_stages)


def resize_padding_mask(pixel_mask: Tensor | None, features: Tensor) -> Tensor | None:
    """Padding mask of a feature map: nearest resize of the pixel mask, inverted.

    Args:
        pixel_mask: (batch, height, width), 1 = picture, or None.
        features: (batch, channels, map_height, map_width).

    Returns:
        (batch, map_height, map_width), True = padding, or None.
    """
    if pixel_mask is None:
        return None
    # In float, because that is what interpolate takes; "nearest" is the authors' rule,
    # floor(index * in / out).
    resized = F.interpolate(pixel_mask[None].float(), size=features.shape[-2:], mode="nearest")
    return resized[0] == 0


def _on_meta_device(module: nn.Module) -> bool:
    return next(module.parameters()).is_meta


def _is_timm(body: PreTrainedModel) -> bool:
    return body.config.model_type == "timm_backbone"


def _check_channels_first(body: PreTrainedModel) -> None:
    layout = getattr(getattr(body, "_backbone", None), "output_fmt", "NCHW")
    if layout != "NCHW":
        raise ValueError(
            f"backbone={body.config.backbone!r} of timm returns maps with their channels last "
            "(and mostly takes pictures of one size only); use transformers' network of the kind, "
            "for instance backbone='microsoft/swin-tiny-patch4-window7-224' with "
            "use_timm_backbone=False."
        )


def _load_published_weights(body: PreTrainedModel) -> None:
    source = body.config.backbone if _is_timm(body) else body.config.name_or_path
    if not source:
        raise ValueError(
            "use_pretrained_backbone=True does not know which weights to load: the backbone_config "
            "has no name. Name a published backbone, for instance backbone='microsoft/resnet-50' "
            "with use_timm_backbone=False, or build the config with AutoConfig.from_pretrained."
        )
    try:
        weights = _published_weights(body, source)
    except Exception as error:
        # Each hub client fails in its own way (no network, no such model, offline mode).
        raise OSError(
            f"The pretrained weights of the backbone {source!r} could not be loaded "
            f"({type(error).__name__}: {error}). Connect to the network, name a backbone whose "
            "weights are on this machine, or pass use_pretrained_backbone=False to start from "
            "random weights."
        ) from error
    body.load_state_dict(weights)
    logger.info("Loaded the pretrained weights of the backbone %s.", source)


def _published_weights(body: PreTrainedModel, source: str) -> dict[str, Tensor]:
    if not _is_timm(body):
        # AutoBackbone.from_pretrained asks the Hub whether the name exists: it refuses folders and
        # does not work offline.
        return type(body).from_pretrained(source, config=body.config).state_dict()
    model = timm.create_model(
        source,
        pretrained=True,
        features_only=True,
        in_chans=body.config.num_channels,
        out_indices=tuple(body.config.out_indices),
        output_stride=body.config.output_stride,
    )
    return {f"_backbone.{name}": value for name, value in model.state_dict().items()}


def _leading_stages(body: PreTrainedModel, num_stages: int) -> list[nn.Module]:
    """Modules of the stem and the stages after it, ``num_stages`` in all with the stem."""
    if num_stages == 0:
        return []
    stages = _timm_stages(body._backbone) if _is_timm(body) else _transformers_stages(body)
    if stages is None:
        raise ValueError(
            f"frozen_backbone_stages is {num_stages}, but the stages of "
            f"{type(getattr(body, '_backbone', body)).__name__} cannot be told apart; "
            "set frozen_backbone_stages=0."
        )
    if num_stages > len(stages):
        raise ValueError(
            f"frozen_backbone_stages is {num_stages}, but the backbone has {len(stages)} stages "
            "with its stem."
        )
    return [module for stage in stages[:num_stages] for module in stage]


def _timm_stages(body: nn.Module) -> list[list[nn.Module]] | None:
    """Children of a timm feature extractor, grouped into stem and stages.

    timm lists the modules that end a feature level, with their stride. What lies before the first
    level of stride 4 is the stem, in networks that list a level inside their stem (ResNet) and in
    those that do not (ConvNeXt).
    """
    children = dict(body.named_children())
    levels = [level for level in body.feature_info.info if level["reduction"] >= FIRST_STAGE_STRIDE]
    ends = [level["module"].replace(".", "_") for level in levels]
    # The extractor drops what comes after the last level it returns.
    ends = [end for end in ends if end in children]
    if not ends:
        return None
    stages: list[list[nn.Module]] = [[]]
    remaining = iter(children.items())
    for end in ends:
        block: list[nn.Module] = []
        for name, child in remaining:
            block.append(child)
            if name == end:
                break
        # The first block holds the stem as well: all but the module that ends it.
        if len(stages) == 1 and not stages[0]:
            stages[0] = block[:-1]
            block = block[-1:]
        stages.append(block)
    return stages


def _transformers_stages(body: PreTrainedModel) -> list[list[nn.Module]] | None:
    # Some backbones are the network itself, some have it inside (Swin).
    network = body.base_model
    stem = next((getattr(network, name) for name in STEM_NAMES if hasattr(network, name)), None)
    encoder = getattr(network, "encoder", None)
    stages = getattr(encoder, "stages", None) or getattr(encoder, "layers", None)
    if stem is None or stages is None or len(stages) != len(body.stage_names) - 1:
        return None
    return [[stem], *([stage] for stage in stages)]
