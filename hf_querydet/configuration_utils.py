"""What every detector's configuration has in common: the backbone, the matching and the loss."""

import dataclasses
import difflib
import logging
import os
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, ClassVar, Self

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.models.resnet import ResNetConfig
from transformers.models.timm_backbone import TimmBackboneConfig

logger = logging.getLogger(__name__)

# A variant's type here is its type in transformers, where there is one, with this in front.
MODEL_TYPE_PREFIX = "querydet_"
# Keywords of loading that say where from; the others change the configuration.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
# The ImageNet weights of the papers are torchvision's first ones. timm's plain "resnet50" points to
# weights of a later recipe.
DEFAULT_BACKBONE = "resnet50.tv_in1k"
RESNET101 = "resnet101.tv_in1k"
BACKBONE_NORMS = ("frozen", "batch")
POSITION_EMBEDDING_TYPES = ("sine", "learned")
# More feature levels than that are made of the last stage.
MAX_BACKBONE_STAGES = 3
# Name of the slots of a class head that stand for no class (COCO's 91 ids have 11 of them).
UNUSED_LABEL = "N/A"


def stages_of_levels(num_feature_levels: int) -> tuple[int, ...]:
    """Stages of the backbone that feature levels are made of, counted from the last."""
    return tuple(range(-min(max(num_feature_levels, 1), MAX_BACKBONE_STAGES), 0))


@strict
class DetectorConfig(PreTrainedConfig):
    """Base configuration of all detectors.

    A backbone is named in one of three ways: ``backbone_config`` (a configuration or its
    dictionary), ``backbone="resnet50.tv_in1k"`` (a timm model), or
    ``backbone="microsoft/resnet-50"`` with ``use_timm_backbone=False`` (a transformers model).
    ``backbone``, ``use_timm_backbone`` and ``backbone_kwargs`` (``out_indices``, and
    ``output_stride`` of a timm model) are read once and end up in ``backbone_config``.

    Freezing belongs to pretrained weights: ``backbone_norm`` and ``frozen_backbone_stages`` default
    to ``"frozen"`` and 2 with ``use_pretrained_backbone=True``, as in the papers, and to
    ``"batch"`` and 0 for a backbone that starts from random weights, which has to be trained whole.

    Attributes:
        backbone_config: Architecture of the backbone and the stages it returns.
        num_channels: Channels of a picture. Another number than 3 is passed on to
            ``backbone_config``, otherwise its own counts.
        use_pretrained_backbone: Load the backbone's published weights when a model is built from
            this configuration. ``from_pretrained`` never does: its weights are in the checkpoint.
        dilation: Keep the stride of the last backbone stage at 16 by dilated convolutions (the
            papers' DC5); needs a timm backbone.
        backbone_norm: ``"frozen"`` (statistics and affine terms are constants) or ``"batch"``.
        frozen_backbone_stages: 0 trains everything, 1 freezes the stem, 2 the stem and the first
            stage, and so on. Normalisation inside frozen stages is frozen too.
        num_queries: Object queries. How many detections come out is for the image processor to say
            (``top_k`` of ``post_process_object_detection``).
        d_model: Channels of a token.
        auxiliary_loss: Train every decoder layer on its own predictions. Never changes the forward.
            Where layers refine boxes, nothing else trains the heads before the last one: boxes are
            detached between layers.
        class_cost: Weight of the class term when predictions are assigned to objects.
        bbox_cost: Weight of the L1 distance there.
        giou_cost: Weight of the generalised IoU there.
        cls_loss_coefficient: Weight of the classification loss.
        bbox_loss_coefficient: Weight of the L1 loss.
        giou_loss_coefficient: Weight of the generalised IoU loss.
    """

    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "loss_dict",
        "auxiliary_outputs",
        "last_hidden_state",
        "intermediate_hidden_states",
        "encoder_last_hidden_state",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "encoder_hidden_states",
        "encoder_attentions",
    ]
    # Stages of the backbone that the variant reads, counted from the last, because some networks
    # count their stem as a stage and some do not.
    backbone_stages: ClassVar[tuple[int, ...]] = (-1,)

    # Keywords that others are derived from.
    derived_from: ClassVar[tuple[str, ...]] = (
        "backbone",
        "use_timm_backbone",
        "backbone_kwargs",
        "dilation",
        "num_channels",
    )
    # Models of the variant's paper: what each of them changes of the defaults.
    named_configurations: ClassVar[dict[str, dict[str, Any]]] = {}
    # What the authors print of their sizes: millions of parameters, and billions of multiply-adds
    # averaged over pictures of their choice; None where they print nothing.
    published_sizes: ClassVar[dict[str, tuple[float | None, float | None]]] = {}
    # Of the papers' COCO models: category ids are used as they are, up to 90.
    named_num_labels: ClassVar[int] = 91

    backbone_config: dict | PreTrainedConfig | None = None
    num_channels: int = 3
    use_pretrained_backbone: bool = False
    dilation: bool = False
    backbone_norm: str | None = None
    frozen_backbone_stages: int | None = None
    num_queries: int = 100
    d_model: int = 256
    auxiliary_loss: bool = True
    class_cost: float | int = 1.0
    bbox_cost: float | int = 5.0
    giou_cost: float | int = 2.0
    cls_loss_coefficient: float | int = 1.0
    bbox_loss_coefficient: float | int = 5.0
    giou_loss_coefficient: float | int = 2.0

    @classmethod
    def from_name(cls, name: str, **fields: Any) -> Self:
        """Create the configuration of a model of the paper.

        Labels are as many as the authors' models have on COCO, and a model built from the
        configuration starts from pretrained backbone weights, as theirs did.

        Args:
            name: A key of ``named_configurations``, for example ``"r50"``.
            **fields: Fields to set otherwise, for example ``id2label``, or
                ``use_pretrained_backbone=False`` where nothing can be downloaded.

        Raises:
            ValueError: If the variant has no such model; the message lists those that it has.
        """
        if name not in cls.named_configurations:
            raise ValueError(
                f"{cls.__name__} has no model named {name!r}; "
                f"choose one of {', '.join(cls.named_configurations)}."
            )
        defaults = {"use_pretrained_backbone": True} | cls.named_configurations[name]
        if "id2label" not in fields:
            defaults["num_labels"] = cls.named_num_labels
        if "backbone_config" in fields:
            defaults.pop("backbone", None)
        return cls(**(defaults | fields))

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Raise a ValueError for names that are no fields: transformers would just store them."""
        unknown = set(names) - cls._field_names()
        if unknown:
            raise ValueError(cls._describe_unknown(unknown))

    @classmethod
    def _field_names(cls) -> set[str]:
        names = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
        return names | {"backbone", "use_timm_backbone", "backbone_kwargs", "num_labels"}

    @classmethod
    def _describe_unknown(cls, names: Iterable[str]) -> str:
        names, known = sorted(names), cls._field_names()
        near = [match for name in names for match in difflib.get_close_matches(name, known, 1)]
        hint = "see its docstring for those that it has."
        if near:
            hint = f"do you mean {', '.join(map(repr, near))}?"
        return f"{cls.__name__} has no fields {', '.join(map(repr, names))}; {hint}"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Any:
        """Load a configuration, of this library or of transformers' detector of the same variant.

        See ``PreTrainedConfig.from_pretrained`` for the arguments.

        Raises:
            ValueError: If the configuration is of another architecture.
        """
        config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        cls._check_model_type(config_dict.get("model_type"), pretrained_model_name_or_path)
        return cls.from_dict(config_dict, **kwargs)

    @classmethod
    def _check_model_type(cls, model_type: str | None, source: str | os.PathLike) -> None:
        known = {getattr(each, "model_type", "") for each in cls.__mro__}
        known |= {each.removeprefix(MODEL_TYPE_PREFIX) for each in known}
        if model_type is None or model_type in known:
            return
        own_type = MODEL_TYPE_PREFIX + model_type.removeprefix(MODEL_TYPE_PREFIX)
        detector = MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.get(own_type)
        remedy = (
            "this library has no such detector, transformers' AutoModelForObjectDetection may"
            if detector is None
            else f"load it with {detector}"
        )
        raise ValueError(
            f"{source} holds a model of type {model_type!r}, and {cls.__name__} describes "
            f"{cls.model_type.removeprefix(MODEL_TYPE_PREFIX)!r}: {remedy}."
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a configuration; see ``PreTrainedConfig.from_dict``.

        transformers sets keywords on the finished object, where nothing would follow from those
        that others are derived from, and nothing would check them.
        """
        given = {name: kwargs.pop(name) for name in cls.derived_from if name in kwargs}
        # transformers writes null for what does not apply, which is not a value of every field.
        config_dict = {name: value for name, value in config_dict.items() if value is not None}
        stored_backbone = config_dict.get("backbone_config")
        if stored_backbone is not None:
            # Some versions of transformers also write a name, which it does not mean.
            for name in ("backbone", "use_timm_backbone", "backbone_kwargs"):
                config_dict.pop(name, None)
        loses_dilation = config_dict.get("dilation") and given.get("dilation") is False
        if loses_dilation and isinstance(stored_backbone, dict):
            # The stored stride follows from the stored dilation.
            config_dict["backbone_config"] = {**stored_backbone, "output_stride": None}
        if kwargs.get("id2label") is not None:
            id2label = {int(index): name for index, name in kwargs["id2label"].items()}
            kwargs["id2label"] = id2label
            kwargs.setdefault("label2id", {name: index for index, name in id2label.items()})
        result = super().from_dict(config_dict | given, **kwargs)
        if kwargs:
            config = result[0] if isinstance(result, tuple) else result  # with unused keywords
            config.validate()
        return result

    def __post_init__(self, **kwargs: Any) -> None:
        """Resolve the backbone and the defaults that follow from it."""
        # The type that the configuration file names. transformers would put it on the instance,
        # where a foreign one ("detr") would select foreign weight conversions.
        file_type = kwargs.pop("model_type", self.model_type)
        is_foreign = file_type not in ("", self.model_type)
        if self.id2label is not None:
            if kwargs.get("num_labels") not in (None, len(self.id2label)):
                # Another number of labels: the names that came with them no longer apply.
                logger.warning(
                    "num_labels=%s contradicts the %d names of id2label, which are left out.",
                    kwargs["num_labels"],
                    len(self.id2label),
                )
                self.id2label = self.label2id = None
            elif self.label2id is None:
                self.label2id = {name: int(index) for index, name in self.id2label.items()}
        self._resolve_backbone(
            kwargs.pop("backbone", None),
            kwargs.pop("use_timm_backbone", None),
            kwargs.pop("backbone_kwargs", None) or {},
        )
        has_trained_backbone = self.use_pretrained_backbone or is_foreign
        if self.backbone_norm is None:
            self.backbone_norm = "frozen" if has_trained_backbone else "batch"
        if self.frozen_backbone_stages is None:
            self.frozen_backbone_stages = 2 if has_trained_backbone else 0
        if is_foreign:
            # transformers writes its default there without anyone having chosen it. A keyword of
            # from_pretrained is applied after this and wins.
            self.auxiliary_loss = True
            self.is_encoder_decoder = False
        super().__post_init__(**kwargs)
        # Only for whoever writes keywords: a stored configuration may have keys of another version.
        if self.transformers_version is None and (stored := kwargs.keys() & vars(self).keys()):
            logger.warning(
                "%s They are stored, but nothing here reads them.", self._describe_unknown(stored)
            )

    @PreTrainedConfig._attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, str] | None) -> None:
        # A word is for the detector. transformers would set it in the backbone too, most of which
        # have no attention and refuse every choice but one.
        value = {"": value} if isinstance(value, str) else value
        PreTrainedConfig._attn_implementation.fset(self, value)

    def _resolve_backbone(
        self, name: str | None, use_timm: bool | None, options: dict[str, Any]
    ) -> None:
        if name is not None and self.backbone_config is not None:
            raise ValueError(
                f"backbone={name!r} was given, and a backbone_config too, which a stored "
                "configuration always has; name the backbone once, or pass another "
                "backbone_config."
            )
        if isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            if "model_type" not in fields:
                raise ValueError(
                    "backbone_config needs a 'model_type', 'timm_backbone' or one of transformers' "
                    f"backbones, got a dictionary with {sorted(fields)}."
                )
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        elif self.backbone_config is None:
            self._check_backbone_kwargs(options, use_timm)
            stages = list(options.get("out_indices") or self.backbone_stages)
            if use_timm is False:
                self.backbone_config = (
                    ResNetConfig(out_indices=stages, num_channels=self.num_channels)
                    if name is None
                    else AutoConfig.from_pretrained(
                        name, out_indices=stages, num_channels=self.num_channels
                    )
                )
            else:
                self.backbone_config = TimmBackboneConfig(
                    backbone=name or DEFAULT_BACKBONE,
                    num_channels=self.num_channels,
                    out_indices=stages,
                    output_stride=options.get("output_stride"),
                )
        if self.dilation:
            self._dilate()
        self._agree_on_channels()

    @staticmethod
    def _check_backbone_kwargs(options: dict[str, Any], use_timm: bool | None) -> None:
        """Refuse what would have no effect."""
        # transformers' files repeat num_channels as in_chans.
        known = {"out_indices", "in_chans"} | (set() if use_timm is False else {"output_stride"})
        if unknown := sorted(options.keys() - known):
            raise ValueError(
                f"backbone_kwargs takes {sorted(known - {'in_chans'})} here, got {unknown}; pass a "
                "backbone_config with them instead."
            )

    def _agree_on_channels(self) -> None:
        of_backbone = getattr(self.backbone_config, "num_channels", self.num_channels)
        if self.num_channels == type(self).num_channels:
            self.num_channels = of_backbone
        elif self.num_channels != of_backbone:
            # A copy, or the caller's own configuration would change.
            self.backbone_config = deepcopy(self.backbone_config)
            self.backbone_config.num_channels = self.num_channels

    def _dilate(self) -> None:
        if self.backbone_config.model_type != "timm_backbone":
            raise ValueError(
                "dilation=True needs a timm backbone, got a backbone of type "
                f"{self.backbone_config.model_type!r}; pass backbone='{DEFAULT_BACKBONE}'."
            )
        # A copy, or the caller's own configuration would change.
        self.backbone_config = deepcopy(self.backbone_config)
        self.backbone_config.output_stride = self.backbone_config.output_stride or 16

    def validate_architecture(self) -> None:
        """Check the fields against one another.

        Raises:
            ValueError: Naming the field, its value and what is possible.
        """
        self.check_choice("backbone_norm", BACKBONE_NORMS)
        if self.frozen_backbone_stages < 0:
            raise ValueError(
                "frozen_backbone_stages must be 0 or more (2 = stem and first stage), "
                f"got {self.frozen_backbone_stages}."
            )
        self.check_at_least_1("num_queries", "num_labels")
        if sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(
                f"id2label must number the labels from 0 to {self.num_labels - 1}, got "
                f"{sorted(self.id2label)}."
            )
        # Not every variant has all of these.
        sizes = ("encoder_ffn_dim", "decoder_ffn_dim")
        self.check_at_least_1(*(field for field in sizes if hasattr(self, field)))
        if self.encoder_layers < 0:
            raise ValueError(f"encoder_layers must be at least 0, got {self.encoder_layers}.")
        for field in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(
                    f"{field} must be at least 0 and below 1, got {getattr(self, field)}."
                )
        self.check_choice("activation_function", list(ACT2FN))
        if self.class_cost == self.bbox_cost == self.giou_cost == 0:
            raise ValueError(
                "class_cost, bbox_cost and giou_cost are all 0, so nothing decides which query is "
                "assigned to which object; set at least one above 0."
            )

    def warn_of_untrained_heads(self) -> None:
        """Warn if layers refine boxes and only the last one is trained on its predictions."""
        if not self.auxiliary_loss and self.decoder_layers > 1:
            logger.warning(
                "auxiliary_loss=False trains the last decoder layer's heads only; the boxes that "
                "the %d layers before it refine stay as they start. Leave it on for training.",
                self.decoder_layers - 1,
            )

    def check_heads(self, *fields: str) -> None:
        """Raise a ValueError unless channels divide into the heads that each field counts."""
        for field in fields:
            num_heads = getattr(self, field)
            if num_heads < 1 or self.d_model % num_heads:
                raise ValueError(
                    f"d_model must be a multiple of {field}, got {self.d_model} and {num_heads}."
                )

    def check_multiple(self, field: str, divisor: int, reason: str) -> None:
        """Raise a ValueError unless the field is a multiple of the divisor."""
        if getattr(self, field) % divisor:
            raise ValueError(
                f"{field} must be a multiple of {divisor} ({reason}), got {getattr(self, field)}."
            )

    def check_at_least_1(self, *fields: str) -> None:
        """Raise a ValueError unless each field is 1 or more."""
        for field in fields:
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")

    def check_choice(self, field: str, choices: Sequence[Any]) -> None:
        """Raise a ValueError unless the field is one of the choices."""
        if getattr(self, field) not in choices:
            raise ValueError(f"{field} must be one of {choices}, got {getattr(self, field)!r}.")
