"""From a detector of this library to a directory that transformers' own class loads."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from hf_querydet.checkpoint_mapping_utils import CheckpointError, renamed
from hf_querydet.configuration_utils import MODEL_TYPE_PREFIX, DetectorConfig
from hf_querydet.conversion.accounting import check_complete
from hf_querydet.conversion.authors import refuse_full_directory
from hf_querydet.file_writing import write_directory
from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.modeling_utils import DetectorPreTrainedModel
from hf_querydet.registration import VARIANTS, load_detector, variant_of

# transformers' processors take no shortest edge without a limit of the longest.
NO_LIMIT = 1_000_000
# Of the norms that its detectors put in place of their backbone's.
TRANSFORMERS_NORM_EPS = 1e-5


def export_transformers(
    name_or_path: str | os.PathLike, output_dir: str | os.PathLike
) -> type[PreTrainedModel]:
    """Write a detector as transformers' own class of the same variant.

    The same inputs give the same outputs there. Names of tensors are those that this library
    reads such files by, the other way round. ``auxiliary_loss`` is off in what is written, because
    it changes the forward of transformers' classes; settings of training that they have no field
    for are left out.

    Args:
        name_or_path: Directory or Hub id of a detector of this library.
        output_dir: Directory to create. It is there complete, or not at all, and transformers'
            class has loaded it once.

    Returns:
        The class that loads it.

    Raises:
        FileExistsError: If the directory exists and is not empty.
        ValueError: If transformers has no such detector, or only one that would compute something
            else, or the detector's costs are not whole.
        CheckpointError: If transformers' class has other tensors; all that do not fit are listed.
    """
    refuse_full_directory(output_dir)
    model, processor = load_detector(name_or_path)
    _check_norms(model)
    config = transformers_config(model.config)
    config.dtype = model.dtype
    with torch.device("meta"):
        their_model = AutoModelForObjectDetection.from_config(config)
    config.architectures = [type(their_model).__name__]
    tensors = _transformers_tensors(model, their_model)

    def write(partial: Path) -> None:
        config.save_pretrained(partial)
        _transformers_processor(processor, config).save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        _check_loads(type(their_model), partial)

    write_directory(output_dir, write)
    return type(their_model)


def transformers_config(config: DetectorConfig) -> PreTrainedConfig:
    """The configuration of transformers' class of the same variant.

    Raises:
        ValueError: If there is none, if it would compute something else, or if a cost is not whole,
            which its fields have to be.
    """
    if not variant_of(config).transformers_names:
        possible = [name for name, row in VARIANTS.items() if row.transformers_names]
        raise ValueError(
            f"transformers has no class for {config.model_type.removeprefix(MODEL_TYPE_PREFIX)!r}, "
            f"only for {', '.join(possible)}."
        )
    if getattr(config, "position_embeddings_at", "attention") != "attention":
        raise ValueError(
            f"position_embeddings_at is {config.position_embeddings_at!r}, as in DETR's small "
            "recipe; transformers' DETR adds positions in every attention and would compute "
            "something else with these weights."
        )
    their_class = CONFIG_MAPPING[config.model_type.removeprefix(MODEL_TYPE_PREFIX)]
    of_all_models = {field.name for field in fields(PreTrainedConfig)}
    own = config.to_dict()
    values = {
        field.name: _of_the_type(field.name, own[field.name], field.default)
        for field in fields(their_class)
        if field.name in own and field.name not in of_all_models
    }
    values |= {"auxiliary_loss": False, "id2label": config.id2label, "label2id": config.label2id}
    return their_class(**values)


def _of_the_type(name: str, value: Any, default: Any) -> Any:
    if isinstance(value, float) and type(default) is int:
        if not value.is_integer():
            raise ValueError(
                f"{name} is {value}, but transformers takes whole numbers there; set another in "
                "config.json, it matters in training only."
            )
        return int(value)
    return value


def _check_norms(model: DetectorPreTrainedModel) -> None:
    """Raise if transformers, which freezes all norms in one way, would compute something else."""
    for name, module in model.named_modules():
        if not hasattr(module, "running_mean"):  # batch norms, trained or frozen
            continue
        activation = getattr(module, "activation", getattr(module, "act", None))
        has_activation = not isinstance(activation, nn.Identity | None)
        if has_activation or module.eps != TRANSFORMERS_NORM_EPS:
            raise ValueError(
                f"The norm {name} has eps={module.eps} and the activation {activation}. "
                f"transformers puts one with eps={TRANSFORMERS_NORM_EPS} and none in its place, "
                "and would compute something else with these weights."
            )


def _transformers_tensors(
    model: DetectorPreTrainedModel, their_model: PreTrainedModel
) -> dict[str, Tensor]:
    names = variant_of(model.config).transformers_names
    own = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    their_shapes = {name: value.shape for name, value in their_model.state_dict().items()}
    own_names = {name: renamed(name, names)[0] for name in their_shapes}
    # Copies that they keep of one tensor have one name here, or none: a detector without refinement
    # has one head.
    tensors = {
        name: own[own_name].clone().contiguous()
        for name, own_name in own_names.items()
        if own_name in own
    }
    check_complete(
        {name: value.shape for name, value in own.items()},
        {own_names[name]: their_shapes[name] for name in tensors},
        source="the detector",
    )
    return tensors


def _transformers_processor(processor: DetectionImageProcessor, config: PreTrainedConfig) -> Any:
    their_class = IMAGE_PROCESSOR_MAPPING[type(config)]["torchvision"]
    possible = set(their_class.valid_kwargs.__annotations__) | set(dir(their_class))
    settings = {name: value for name, value in processor.to_dict().items() if name in possible}
    settings.pop("image_processor_type", None)
    size = dict(settings["size"])
    if set(size) == {"shortest_edge"}:
        settings["size"] = {**size, "longest_edge": NO_LIMIT}
    return their_class(**settings)


def _check_loads(their_class: type[PreTrainedModel], directory: Path) -> None:
    _, info = their_class.from_pretrained(directory, output_loading_info=True)
    problems = [f"{kind}: {sorted(names)}" for kind, names in info.items() if names]
    if problems:
        raise CheckpointError(
            f"{their_class.__name__} does not load this detector:\n" + "\n".join(problems)
        )
