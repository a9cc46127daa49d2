"""Names of Deformable DETR's tensors in transformers' files and in those of its authors.

Left: a regular expression for the name there. Right: the name here. See
``checkpoint_mapping_utils`` for how tables are read.

The heads stand in such files at the top, below the decoder, or in both places; both names lead to
one tensor here. What a table cannot say stands in the functions below, of which those about
transformers' files are called by ``DeformableDETRPreTrainedModel.from_pretrained``.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_querydet.checkpoint_mapping_utils import (
    AUTHORS_ARGUMENTS,
    AUTHORS_BACKBONE,
    AUTHORS_FEED_FORWARD,
    AUTHORS_IGNORED,
    AUTHORS_POSITIONS,
    AUTHORS_SELF_ATTENTION,
    TRANSFORMERS_BACKBONE,
    TRANSFORMERS_LAYERS,
    AuthorsFormat,
    AuthorsTensors,
    CheckpointError,
    Names,
    layer_sizes,
    position_embedding_type,
)

# What both call alike.
COMMON_NAMES = {
    r"\.value_proj\.": ".value_projection.",
    r"\.output_proj\.": ".output_projection.",
    r"\binput_proj\.": "input_projection.levels.",
    r"\blevel_embed$": "level_embeddings.weight",
    r"\breference_points\.": "reference_point_head.",
    r"\benc_output\.": "memory_projection.",
    r"\benc_output_norm\.": "memory_norm.",
    r"\bpos_trans\.": "query_projection.",
    r"\bpos_trans_norm\.": "query_norm.",
}

# Both the layout that transformers 5 writes and the one of older repositories on the Hub. None of
# the expressions matches a name of ours.
TRANSFORMERS_NAMES = {
    **TRANSFORMERS_BACKBONE,
    **TRANSFORMERS_LAYERS,
    **COMMON_NAMES,
    r"\bquery_position_embeddings\.": "query_embeddings.",
    r"^(?:model\.decoder\.)?class_embed\.(\d+)\.": r"model.heads.\1.class_head.",
    r"^(?:model\.decoder\.)?bbox_embed\.(\d+)\.": r"model.heads.\1.box_head.",
}

# github.com/fundamentalvision/Deformable-DETR
AUTHORS_NAMES: Names = {
    **AUTHORS_IGNORED,
    **AUTHORS_BACKBONE,
    **AUTHORS_POSITIONS,
    r"^(?:transformer\.decoder\.)?class_embed\.(\d+)\.": r"model.heads.\1.class_head.",
    r"^(?:transformer\.decoder\.)?bbox_embed\.(\d+)\.": r"model.heads.\1.box_head.",
    r"^query_embed\.": "model.query_embeddings.",
    r"^transformer\.(en|de)coder\.layers\.": r"model.\1coder_layers.",
    r"^transformer\.(?=level_embed|reference_points|enc_output|pos_trans)": "model.",
    r"^(?=input_proj\.)": "model.",
    **COMMON_NAMES,
    # Fused among the decoder's queries; the encoder's is deformable.
    **AUTHORS_SELF_ATTENTION,
    r"\.self_attn\.": ".self_attention.",
    r"\.cross_attn\.": ".cross_attention.",
    r"encoder_layers\.(\d+)\.norm1\.": r"encoder_layers.\1.self_attention_norm.",
    r"encoder_layers\.(\d+)\.norm2\.": r"encoder_layers.\1.feed_forward.norm.",
    # The first norm of a decoder layer belongs to its second block.
    r"decoder_layers\.(\d+)\.norm1\.": r"decoder_layers.\1.cross_attention_norm.",
    r"decoder_layers\.(\d+)\.norm2\.": r"decoder_layers.\1.self_attention_norm.",
    r"decoder_layers\.(\d+)\.norm3\.": r"decoder_layers.\1.feed_forward.norm.",
    **AUTHORS_FEED_FORWARD,
}

# Without refinement all layers have one head, and a file may have kept any layer's name for it, or
# all of them.
ONE_HEAD_NAMES = {
    r"^class_embed\.\d+\.": "model.heads.0.class_head.",
    r"^bbox_embed\.\d+\.": "model.heads.0.box_head.",
}


def authors_names(config: Any) -> Names:
    """Key table of a configuration."""
    return AUTHORS_NAMES if config.with_box_refine else ONE_HEAD_NAMES | AUTHORS_NAMES


def authors_config(tensors: AuthorsTensors, known: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`~hf_querydet.checkpoint_mapping_utils.AuthorsFormat`."""
    two_stage = "transformer.enc_output.weight" in tensors
    fields = {
        **tensors.resnet(),
        **layer_sizes(tensors, "transformer.{}.layers"),
        **position_embedding_type(tensors),
        "num_feature_levels": tensors.size("transformer.level_embed"),
        "d_model": tensors.size("transformer.level_embed", 1),
        "num_labels": tensors.size("class_embed.0.weight"),
        "with_box_refine": any(
            name.startswith("transformer.decoder.bbox_embed.") for name in tensors
        ),
        "two_stage": two_stage,
    }
    if not two_stage:
        fields["num_queries"] = tensors.size("query_embed.weight")
    for kind, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
        if fields[f"{kind}_layers"]:
            name = f"transformer.{kind}.layers.0.{attention}.attention_weights.bias"
            # Every head has a weight for every point of every level.
            num_groups = known.get(f"{kind}_attention_heads", 8) * fields["num_feature_levels"]
            num_points, rest = divmod(tensors.size(name), num_groups)
            if rest:
                raise CheckpointError(
                    f"{name!r} has {tensors.size(name)} values, which are not the same number for "
                    f"each of {num_groups} heads and levels; set {kind}_attention_heads by "
                    "--config."
                )
            fields[f"{kind}_n_points"] = num_points
    return fields


AUTHORS = AuthorsFormat(
    names=authors_names,
    config=authors_config,
    # Two-stage files have no tensor of this length.
    arguments={**AUTHORS_ARGUMENTS, "num_queries": ("two_stage_num_proposals",)},
    may_be_dilated=lambda told: told["num_feature_levels"] == 1,
)


def heads_of(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The heads of a detector or of its base model, and what their names begin with."""
    base = getattr(model, model.base_model_prefix, model)
    return base.heads, "heads." if base is model else f"{model.base_model_prefix}.heads."


def check_keeps_refinement(stored: Mapping[str, Any], name_or_path: str | os.PathLike) -> None:
    """Refuse to load a file with a head for each layer into a detector with one head.

    Nothing else would tell: files without refinement may hold copies of their one head.

    Args:
        stored: Content of the file's config.json.
        name_or_path: Where it is, for the message.

    Raises:
        ValueError: If the file's detector refines boxes.
    """
    if stored.get("with_box_refine"):
        raise ValueError(
            f"with_box_refine=False, but {name_or_path} holds a detector with box refinement, "
            "whose layers have heads of their own; all but the first would be lost. Leave out "
            "with_box_refine."
        )


def head_has_another_name(model: PreTrainedModel, loading_info: Any) -> bool:
    """Whether a file holds the head of a detector without refinement as that of a later layer.

    Args:
        model: The loaded model.
        loading_info: What loading it has found. If the file has to be read again, by
            :data:`ONE_HEAD_NAMES`, the tensors of the head are taken out of those that are missing.
    """
    _, prefix = heads_of(model)
    missing = {key for key in loading_info.missing_keys if key.startswith(prefix)}
    is_there = any(key.startswith(prefix) for key in loading_info.unexpected_keys)
    if model.config.with_box_refine or not (missing and is_there):
        return False
    loading_info.missing_keys -= missing
    return True


@torch.no_grad()
def share_class_head(model: PreTrainedModel, loading_info: Any) -> None:
    """Give the first class head to all layers of a refined detector if a file held no other.

    transformers ties the class heads of a fresh detector, and then stores one; so every layer gets
    what it had in the detector that was saved.

    Args:
        model: The loaded model.
        loading_info: What loading it has found; the tensors that are filled here are taken out.
    """
    heads, prefix = heads_of(model)
    tensors = [
        {f"{prefix}{index}.class_head.{name}" for name in ("weight", "bias")}
        for index in range(len(heads))
    ]
    others = set().union(*tensors[1:])
    absent = loading_info.missing_keys | {key for key, *_ in loading_info.mismatched_keys}
    is_shared = bool(others) and others <= loading_info.missing_keys and not tensors[0] & absent
    if model.config.two_stage or not is_shared:
        return
    for head in heads[1:]:
        head.class_head.load_state_dict(heads[0].class_head.state_dict())
    loading_info.missing_keys -= others


def recreated_objectness(model: PreTrainedModel, info: dict[str, Any]) -> int | None:
    """Number of labels in a two-stage file whose class heads new labels have re-created."""
    heads, prefix = heads_of(model)
    name = f"{prefix}{len(heads) - 1}.class_head.weight"
    found = {key: shape for key, shape, _ in info["mismatched_keys"]}
    return found[name][0] if model.config.two_stage and name in found else None


@torch.no_grad()
def copy_objectness(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copy row 0 of the encoder's class head between models of unlike labels."""
    old, new = (heads_of(model)[0][-1].class_head for model in (source, target))
    new.weight[0] = old.weight[0].to(new.weight)
    new.bias[0] = old.bias[0].to(new.bias)
