"""The table of variants, and what tells the Hugging Face ecosystem about them.

A new variant is one more row.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    PreTrainedConfig,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from hf_querydet.checkpoint_mapping_utils import AuthorsFormat, weight_renamings
from hf_querydet.configuration_utils import (
    HUB_OPTIONS,
    MODEL_TYPE_PREFIX,
    UNUSED_LABEL,
    DetectorConfig,
)
from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.modeling_utils import DetectorPreTrainedModel
from hf_querydet.models.anchor_detr import (
    AnchorDETRConfig,
    AnchorDETRForObjectDetection,
    AnchorDETRImageProcessor,
    AnchorDETRModel,
)
from hf_querydet.models.anchor_detr.checkpoint_mapping import AUTHORS as ANCHOR_DETR_AUTHORS
from hf_querydet.models.anchor_detr.recipe import RECIPE as ANCHOR_DETR_RECIPE
from hf_querydet.models.anchor_detr.recipe import SMALL_RECIPE as ANCHOR_DETR_SMALL_RECIPE
from hf_querydet.models.conditional_detr import (
    ConditionalDETRConfig,
    ConditionalDETRForObjectDetection,
    ConditionalDETRImageProcessor,
    ConditionalDETRModel,
)
from hf_querydet.models.conditional_detr.checkpoint_mapping import (
    AUTHORS as CONDITIONAL_DETR_AUTHORS,
)
from hf_querydet.models.conditional_detr.checkpoint_mapping import (
    TRANSFORMERS_NAMES as CONDITIONAL_DETR_NAMES,
)
from hf_querydet.models.conditional_detr.recipe import RECIPE as CONDITIONAL_DETR_RECIPE
from hf_querydet.models.conditional_detr.recipe import SMALL_RECIPE as CONDITIONAL_DETR_SMALL_RECIPE
from hf_querydet.models.deformable_detr import (
    DeformableDETRConfig,
    DeformableDETRForObjectDetection,
    DeformableDETRImageProcessor,
    DeformableDETRModel,
)
from hf_querydet.models.deformable_detr.checkpoint_mapping import AUTHORS as DEFORMABLE_DETR_AUTHORS
from hf_querydet.models.deformable_detr.checkpoint_mapping import (
    TRANSFORMERS_NAMES as DEFORMABLE_DETR_NAMES,
)
from hf_querydet.models.deformable_detr.recipe import RECIPE as DEFORMABLE_DETR_RECIPE
from hf_querydet.models.deformable_detr.recipe import SMALL_RECIPE as DEFORMABLE_DETR_SMALL_RECIPE
from hf_querydet.models.detr import (
    DETRConfig,
    DETRForObjectDetection,
    DETRImageProcessor,
    DETRModel,
)
from hf_querydet.models.detr.checkpoint_mapping import AUTHORS as DETR_AUTHORS
from hf_querydet.models.detr.checkpoint_mapping import TRANSFORMERS_NAMES as DETR_NAMES
from hf_querydet.models.detr.recipe import RECIPE as DETR_RECIPE
from hf_querydet.models.detr.recipe import SMALL_RECIPE as DETR_SMALL_RECIPE
from hf_querydet.models.dynamic_detr import (
    DynamicDETRConfig,
    DynamicDETRForObjectDetection,
    DynamicDETRImageProcessor,
    DynamicDETRModel,
)
from hf_querydet.models.dynamic_detr.recipe import RECIPE as DYNAMIC_DETR_RECIPE
from hf_querydet.models.dynamic_detr.recipe import SMALL_RECIPE as DYNAMIC_DETR_SMALL_RECIPE
from hf_querydet.models.efficient_detr import (
    EfficientDETRConfig,
    EfficientDETRForObjectDetection,
    EfficientDETRImageProcessor,
    EfficientDETRModel,
)
from hf_querydet.models.efficient_detr.recipe import RECIPE as EFFICIENT_DETR_RECIPE
from hf_querydet.models.efficient_detr.recipe import SMALL_RECIPE as EFFICIENT_DETR_SMALL_RECIPE
from hf_querydet.models.sparse_rcnn import (
    SparseRCNNConfig,
    SparseRCNNForObjectDetection,
    SparseRCNNImageProcessor,
    SparseRCNNModel,
)
from hf_querydet.models.sparse_rcnn.checkpoint_mapping import AUTHORS as SPARSE_RCNN_AUTHORS
from hf_querydet.models.sparse_rcnn.recipe import RECIPE as SPARSE_RCNN_RECIPE
from hf_querydet.models.sparse_rcnn.recipe import SMALL_RECIPE as SPARSE_RCNN_SMALL_RECIPE
from hf_querydet.recipe_utils import Recipe, SmallRecipe


@dataclass(frozen=True)
class Variant:
    """One detector: its classes, the names of its tensors elsewhere, its training settings.

    Attributes:
        config: Configuration class; its ``model_type`` is ``querydet_`` and the variant's name.
        model: Model without heads.
        detector: Model with heads.
        image_processor: Image processor.
        recipe: The paper's training settings.
        small_recipe: A small detector and how to train it on a few hundred pictures.
        transformers_names: Key table of transformers' files, empty where it has no such model.
        authors: How to read checkpoints of its authors; None where they released none.
        padding_exception: How padding reaches predictions after the backbone, a sentence for the
            model card; empty where it does not, which is the rule.
    """

    config: type[DetectorConfig]
    model: type[DetectorPreTrainedModel]
    detector: type[DetectorPreTrainedModel]
    image_processor: type[DetectionImageProcessor]
    recipe: Recipe
    small_recipe: SmallRecipe
    transformers_names: Mapping[str, str]
    authors: AuthorsFormat | None = None
    padding_exception: str = ""


VARIANTS: dict[str, Variant] = {
    "detr": Variant(
        config=DETRConfig,
        model=DETRModel,
        detector=DETRForObjectDetection,
        image_processor=DETRImageProcessor,
        recipe=DETR_RECIPE,
        small_recipe=DETR_SMALL_RECIPE,
        authors=DETR_AUTHORS,
        transformers_names=DETR_NAMES,
    ),
    "deformable_detr": Variant(
        config=DeformableDETRConfig,
        model=DeformableDETRModel,
        detector=DeformableDETRForObjectDetection,
        image_processor=DeformableDETRImageProcessor,
        recipe=DEFORMABLE_DETR_RECIPE,
        small_recipe=DEFORMABLE_DETR_SMALL_RECIPE,
        authors=DEFORMABLE_DETR_AUTHORS,
        transformers_names=DEFORMABLE_DETR_NAMES,
        padding_exception=(
            "As in the authors' code, the group normalisation of feature levels takes its "
            "statistics from the whole padded map, the extra level's convolution sees the "
            "padding's border, and two-stage proposals may come from padded tokens."
        ),
    ),
    "conditional_detr": Variant(
        config=ConditionalDETRConfig,
        model=ConditionalDETRModel,
        detector=ConditionalDETRForObjectDetection,
        image_processor=ConditionalDETRImageProcessor,
        recipe=CONDITIONAL_DETR_RECIPE,
        small_recipe=CONDITIONAL_DETR_SMALL_RECIPE,
        authors=CONDITIONAL_DETR_AUTHORS,
        transformers_names=CONDITIONAL_DETR_NAMES,
    ),
    "efficient_detr": Variant(
        config=EfficientDETRConfig,
        model=EfficientDETRModel,
        detector=EfficientDETRForObjectDetection,
        image_processor=EfficientDETRImageProcessor,
        recipe=EFFICIENT_DETR_RECIPE,
        small_recipe=EFFICIENT_DETR_SMALL_RECIPE,
        transformers_names={},
        padding_exception=(
            "As in Deformable DETR, the group normalisation of feature levels takes its statistics "
            "from the whole padded map, and the extra level's convolution sees the padding's "
            "border."
        ),
    ),
    "dynamic_detr": Variant(
        config=DynamicDETRConfig,
        model=DynamicDETRModel,
        detector=DynamicDETRForObjectDetection,
        image_processor=DynamicDETRImageProcessor,
        recipe=DYNAMIC_DETR_RECIPE,
        small_recipe=DYNAMIC_DETR_SMALL_RECIPE,
        transformers_names={},
        padding_exception=(
            "Padding is not masked: convolutions see its border, means over a map (group "
            "normalisation, scale attention, dynamic ReLU) include it, and boxes may reach into "
            "it. The canvas is padded to multiples of 32; predictions of a picture are equal only "
            "on an equal canvas."
        ),
    ),
    "sparse_rcnn": Variant(
        config=SparseRCNNConfig,
        model=SparseRCNNModel,
        detector=SparseRCNNForObjectDetection,
        image_processor=SparseRCNNImageProcessor,
        recipe=SPARSE_RCNN_RECIPE,
        small_recipe=SPARSE_RCNN_SMALL_RECIPE,
        authors=SPARSE_RCNN_AUTHORS,
        transformers_names={},
        padding_exception=(
            "As in the authors' code, padding is not masked: convolutions of the feature pyramid "
            "and the pooling of boxes see it, so that predictions are equal on equal canvases."
        ),
    ),
    "anchor_detr": Variant(
        config=AnchorDETRConfig,
        model=AnchorDETRModel,
        detector=AnchorDETRForObjectDetection,
        image_processor=AnchorDETRImageProcessor,
        recipe=ANCHOR_DETR_RECIPE,
        small_recipe=ANCHOR_DETR_SMALL_RECIPE,
        authors=ANCHOR_DETR_AUTHORS,
        transformers_names={},
        padding_exception=(
            "As in the authors' code, the group normalisation of features takes its statistics "
            "from the whole padded map, and the keys of row-column attention are averages over "
            "padded cells too; average_valid_keys=True leaves these out."
        ),
    ),
}


def load_detector(
    name_or_path: str | os.PathLike, **kwargs: Any
) -> tuple[DetectorPreTrainedModel, DetectionImageProcessor]:
    """Load a detector and its image processor, whichever variant it is.

    Unlike ``AutoModelForObjectDetection``, this loads repositories of transformers' own detectors
    with this library's class of the same variant.

    Args:
        name_or_path: Directory or Hub id.
        **kwargs: For the model's ``from_pretrained``.

    Raises:
        OSError: If there is no config.json.
        ValueError: If the configuration is of none of the variants.
    """
    hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    variant = _stored_variant(name_or_path, hub_options)
    model = variant.detector.from_pretrained(name_or_path, **kwargs)
    return model, variant.image_processor.from_pretrained(name_or_path, **hub_options)


def load_detector_for_labels(
    name_or_path: str | os.PathLike, id2label: Mapping[int, str], **kwargs: Any
) -> tuple[DetectorPreTrainedModel, DetectionImageProcessor, bool]:
    """Load a detector to be trained on a dataset, whose labels decide about its class head.

    Its weights are float32 whatever the file holds: in half types the steps of an optimizer are
    mostly too small to change anything. Mixed precision is a matter of the training loop.

    If the detector has every name of the dataset, its class head and its labels are kept, also
    where it has further names or another order. Otherwise it gets the labels of the dataset and a
    new class head, also where there are as many as before: the old weights stand for other classes.
    Either way give the dataset the labels of the detector next:
    ``dataset.with_labels(model.config.id2label)``.

    Args:
        name_or_path: Directory or Hub id.
        id2label: Labels of the dataset. Slots of the detector named "N/A" are no names.
        **kwargs: For the model's ``from_pretrained``; ``dtype`` among them, if it must be another.

    Returns:
        Detector, image processor, and whether the class head was kept.

    Raises:
        OSError: If there is no config.json.
        ValueError: If the configuration is of none of the variants.
    """
    hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    stored = load_config(name_or_path, **hub_options)
    kwargs.setdefault("dtype", torch.float32)
    names = set(id2label.values())
    if names <= set(stored.id2label.values()) - {UNUSED_LABEL}:
        return *load_detector(name_or_path, **kwargs), True
    label2id = {name: label for label, name in id2label.items()}
    model, processor = load_detector(
        name_or_path, id2label=dict(id2label), label2id=label2id, **kwargs
    )
    if stored.num_labels == len(id2label):  # loading re-creates heads of another size only
        model.reset_class_head()
    return model, processor, False


def load_config(name_or_path: str | os.PathLike, **kwargs: Any) -> DetectorConfig:
    """Load a detector's configuration, whichever variant it is; see :func:`load_detector`."""
    hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    return _stored_variant(name_or_path, hub_options).config.from_pretrained(name_or_path, **kwargs)


def _check_source(name_or_path: str | os.PathLike) -> None:
    """Raise for what is neither a directory nor a Hub id."""
    if os.path.isfile(name_or_path):
        raise OSError(f"{name_or_path} is a file; name its directory.")
    if not os.path.exists(name_or_path):
        meant = {_plain(name): name for name in VARIANTS}.get(_plain(os.fspath(name_or_path)))
        if meant is not None:
            raise OSError(
                f"{name_or_path} is no directory; do you mean the variant {meant}, a new detector?"
            )
        try:
            validate_repo_id(os.fspath(name_or_path))
        except HFValidationError as error:
            raise OSError(
                f"{name_or_path} is not a directory, and not a Hub id, which is NAME or OWNER/NAME."
            ) from error


def _plain(name: str) -> str:
    return re.sub("[-_ ]", "", name).lower()


def _stored_variant(name_or_path: str | os.PathLike, hub_options: dict[str, Any]) -> Variant:
    _check_source(name_or_path)
    try:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub_options)
    except OSError as error:
        if os.path.exists(name_or_path):
            raise
        raise OSError(  # without a network the error names the Hub, not what was asked for
            f"{name_or_path} is no directory here, and as a Hub id it could not be fetched: {error}"
        ) from error
    if not config:
        raise OSError(
            f"{name_or_path} has no config.json; name the directory or repository of a saved "
            "detector. In the output of a training run these are 'best' and 'last'."
        )
    variant = VARIANTS.get(config.get("model_type", "").removeprefix(MODEL_TYPE_PREFIX))
    if variant is None:
        raise ValueError(
            f"{name_or_path} holds a model of type {config.get('model_type')!r}; this library has "
            f"{', '.join(sorted(VARIANTS))}."
        )
    return variant


def variant_of(config: DetectorConfig) -> Variant:
    """The row that a configuration belongs to.

    Raises:
        ValueError: If the configuration is of none of the variants.
    """
    for variant in VARIANTS.values():
        if isinstance(config, variant.config):
            return variant
    raise ValueError(
        f"The configuration is a {type(config).__name__}; this library has "
        f"{', '.join(sorted(VARIANTS))}. Load it with this library's own class."
    )


def register() -> None:
    """Make Auto classes, pipelines and Trainer know every variant."""
    for variant in VARIANTS.values():
        model_type = variant.config.model_type
        AutoConfig.register(model_type, variant.config)
        AutoModel.register(variant.config, variant.model)
        AutoModelForObjectDetection.register(variant.config, variant.detector)
        AutoImageProcessor.register(
            variant.config, image_processor_classes={"torchvision": variant.image_processor}
        )
        # The pipeline reports models outside this plain dictionary as unsupported, and then
        # works all the same.
        MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[model_type] = variant.detector.__name__
        # Under the class names: a configuration read from a foreign file keeps its foreign type.
        for model in (variant.model, variant.detector):
            if variant.transformers_names:
                register_checkpoint_conversion_mapping(
                    model.__name__, weight_renamings(variant.transformers_names)
                )
