"""From a checkpoint of a detector's authors to a directory that ``from_pretrained`` loads."""

import functools
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from hf_querydet.checkpoint_mapping_utils import (
    AuthorsTensors,
    CheckpointError,
    Names,
    renamed,
)
from hf_querydet.configuration_utils import MODEL_TYPE_PREFIX, UNUSED_LABEL, DetectorConfig
from hf_querydet.conversion.accounting import check_complete, shapes_of
from hf_querydet.conversion.labels import id2label_for
from hf_querydet.conversion.reading import Checkpoint, read_checkpoint
from hf_querydet.file_writing import write_directory
from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.modeling_utils import DetectorPreTrainedModel
from hf_querydet.registration import VARIANTS, Variant

# The authors start from ImageNet weights, and train neither norms nor the stem and first stage.
TRAINED_BACKBONE = {"backbone_norm": "frozen", "frozen_backbone_stages": 2}


@dataclass(frozen=True)
class Conversion:
    """A detector that was converted.

    Attributes:
        model: In evaluation mode.
        image_processor: Of its variant, with the authors' settings.
        ignored: Names of tensors in the file that the detector has no use for, the mask head of a
            panoptic one for instance.
    """

    model: DetectorPreTrainedModel
    image_processor: DetectionImageProcessor
    ignored: tuple[str, ...]

    def summary(self) -> str:
        """What was inferred and what was left out, in lines."""
        config = self.model.config
        backbone = getattr(config.backbone_config, "backbone", config.backbone_config.model_type)
        without_name = {UNUSED_LABEL, *(f"LABEL_{label}" for label in config.id2label)}
        names = [name for name in config.id2label.values() if name not in without_name]
        examples = f" ({', '.join(names[:3])}, ...)" if names else "; --labels names them"
        lines = [
            f"backbone: {backbone}, {'dilated (DC5)' if config.dilation else 'not dilated'}",
            f"layers: {config.encoder_layers} encoder, {config.decoder_layers} decoder; "
            f"queries: {config.num_queries}",
            f"labels: {config.num_labels}, {len(names)} with a name{examples}",
        ]
        if self.ignored:
            parts = Counter(name.split(".")[0] for name in self.ignored)
            listing = ", ".join(f"{count} of {part}" for part, count in sorted(parts.items()))
            lines.append(f"ignored tensors, of no use for detection: {listing}")
        return "\n".join(lines)


def convert_checkpoint(
    path: str | os.PathLike,
    output_dir: str | os.PathLike,
    variant: str,
    *,
    dilation: bool | None = None,
    overrides: Mapping[str, Any] | None = None,
    labels: str | Mapping[int, str] | None = None,
) -> Conversion:
    """Convert a checkpoint of a detector's authors.

    The directory holds weights, configuration with names of labels, and image processor. It is
    there complete, or not at all.

    Args:
        path: The authors' file, see :func:`~hf_querydet.conversion.read_checkpoint`.
        output_dir: Directory to create.
        variant: Name of the variant, as in ``VARIANTS``.
        dilation: See :func:`convert_tensors`, as the arguments that follow.
        overrides: As above.
        labels: As above.

    Raises:
        FileExistsError: If the directory exists and is not empty.
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file cannot be read or does not fit; all that is wrong is listed.
        ValueError: If an argument is wrong.
    """
    refuse_full_directory(output_dir)
    # Before a large file is read.
    _authors_of(variant)
    conversion = convert_tensors(
        read_checkpoint(path), variant, dilation=dilation, overrides=overrides, labels=labels
    )

    def write(partial: Path) -> None:
        conversion.model.save_pretrained(partial)
        conversion.image_processor.save_pretrained(partial)

    write_directory(output_dir, write)
    return conversion


def convert_tensors(
    checkpoint: Checkpoint,
    variant: str,
    *,
    dilation: bool | None = None,
    overrides: Mapping[str, Any] | None = None,
    labels: str | Mapping[int, str] | None = None,
) -> Conversion:
    """Convert what was read from a checkpoint; see :func:`convert_checkpoint`.

    Args:
        checkpoint: Tensors by their authors' names, and options of their training script.
        variant: Name of the variant, as in ``VARIANTS``.
        dilation: Whether the model has a dilated last stage (DC5), which tensors do not tell. By
            default what the options in the checkpoint say. Where they say nothing and models of
            both kinds were released, it has to be told.
        overrides: Fields of the configuration that are not to be inferred.
        labels: ``"coco"``, or label to name. By default COCO's if there are as many labels as the
            authors' models have.

    Raises:
        CheckpointError: If the tensors do not fit; all that is wrong is listed.
        ValueError: If an argument is wrong.
    """
    row = _authors_of(variant)
    config = _config(checkpoint, row, dilation, dict(overrides or {}), labels)
    with torch.device("meta"):
        wanted = shapes_of(row.detector(config).state_dict())
    tensors, original_names, ignored = _rename(checkpoint.tensors, row.authors.names(config))
    check_complete(
        shapes_of(tensors),
        {name: shape for name, shape in wanted.items() if not name.endswith("num_batches_tracked")},
        source="the checkpoint",
        original_names=original_names,
    )
    # Of mixed types the widest, or transformers would take that of the first tensor.
    types = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, types)
    model = row.detector.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return Conversion(model, row.image_processor.for_config(config), ignored)


def refuse_full_directory(directory: str | os.PathLike) -> None:
    """Raise a FileExistsError if something is in a directory that is to be created."""
    path = Path(directory)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; name a new directory.")


def _authors_of(variant: str) -> Variant:
    convertible = [name for name, row in VARIANTS.items() if row.authors is not None]
    if variant not in convertible:
        raise ValueError(
            f"variant must be one of {', '.join(convertible)}, got {variant!r}; of others no "
            "checkpoints were published."
        )
    return VARIANTS[variant]


def _config(
    checkpoint: Checkpoint,
    row: Variant,
    dilation: bool | None,
    overrides: dict[str, Any],
    labels: str | Mapping[int, str] | None,
) -> DetectorConfig:
    """The configuration: what is said, else what tensors tell, else what the options say."""
    possible = {field.name for field in fields(row.config)}
    overrides = _checked_overrides(overrides, row)
    options = {
        name: value
        for option, names in row.authors.arguments.items()
        if (value := checkpoint.arguments.get(option)) is not None
        for name in names
        if name in possible
    }
    told = row.authors.config(checkpoint.tensors, options | overrides)
    if "backbone_config" in overrides:
        del told["backbone"]
    num_labels = told.pop("num_labels")
    named = {}
    if labels is not None or not {"id2label", "num_labels"} & set(overrides):
        named = id2label_for(num_labels, row.config.named_num_labels, labels)
    overrides["dilation"] = _dilation(checkpoint, row, dilation, overrides, told)
    try:
        return row.config(**TRAINED_BACKBONE | options | told | overrides | named)
    except StrictDataclassError as error:
        raise CheckpointError(
            f"The configuration that the checkpoint tells is not possible: {error}\n"
            "Fields can be set by --config with a json file."
        ) from error


def _checked_overrides(overrides: dict[str, Any], row: Variant) -> dict[str, Any]:
    model_type = overrides.pop("model_type", row.config.model_type)
    if model_type.removeprefix(MODEL_TYPE_PREFIX) != row.config.model_type.removeprefix(
        MODEL_TYPE_PREFIX
    ):
        raise ValueError(
            f"The configuration is of type {model_type!r}, but the checkpoint is to become "
            f"{row.config.model_type!r}."
        )
    # Follows from the names of labels, wherever they come from.
    overrides.pop("label2id", None)
    row.config.check_names(overrides)
    return overrides


def _dilation(
    checkpoint: Checkpoint,
    row: Variant,
    dilation: bool | None,
    overrides: Mapping[str, Any],
    told: Mapping[str, Any],
) -> bool:
    for value in (dilation, overrides.get("dilation"), checkpoint.arguments.get("dilation")):
        if value is not None:
            # One of the authors' programs takes it as text.
            return value if isinstance(value, bool) else str(value).lower() == "true"
    if row.authors.may_be_dilated(told):
        raise CheckpointError(
            "The checkpoint does not say whether its last stage is dilated (DC5, stride 16) or not "
            "(C5, stride 32), and models of both kinds were released; pass --dc5 or --no-dc5."
        )
    return False


def _rename(
    tensors: AuthorsTensors, names: Names
) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """Tensors by their names here; what each was called; names that nothing here needs."""
    result: dict[str, Tensor] = {}
    original_names: dict[str, str] = {}
    ignored, unequal = [], []
    for name, tensor in tensors.items():
        targets = renamed(name, names)
        if not targets:
            ignored.append(name)
            continue
        can_be_split = tensor.ndim > 0 and tensor.shape[0] % len(targets) == 0
        parts = tensor.chunk(len(targets)) if can_be_split else [tensor] * len(targets)
        for number, (target, part) in enumerate(zip(targets, parts, strict=True), 1):
            if target in result and not _equal(part, result[target]):
                unequal.append(f"  {original_names[target]} and {name}")
            result[target] = part.contiguous()
            is_part = len(targets) > 1
            original_names[target] = (
                f"{name} (part {number} of {len(targets)})" if is_part else name
            )
    if unequal:
        raise CheckpointError(
            "Tensors that are one in this detector differ in the checkpoint:\n" + "\n".join(unequal)
        )
    return result, original_names, tuple(ignored)


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor, other)
