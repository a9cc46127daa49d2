"""Names of Deformable DETR's tensors in transformers' files.

Left: a regular expression for the name in a file of transformers, both the layout that its fifth
version writes and the one of older repositories on the Hub. Right: the name here. None of the
expressions matches a name of ours.

The heads stand in such files at the top, below the decoder, or in both places; both names lead to
one tensor here. What a table cannot say stands in the functions below it, which
``DeformableDETRPreTrainedModel.from_pretrained`` calls.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_querydet.checkpoint_mapping_utils import TRANSFORMERS_ATTENTION, TRANSFORMERS_BACKBONE

logger = logging.getLogger(__name__)

TRANSFORMERS_NAMES = {
    **TRANSFORMERS_BACKBONE,
    **TRANSFORMERS_ATTENTION,
    r"\bencoder\.layers\.": "encoder_layers.",
    r"\bdecoder\.layers\.": "decoder_layers.",
    r"\.value_proj\.": ".value_projection.",
    r"\.output_proj\.": ".output_projection.",
    r"\.self_attn_layer_norm\.": ".self_attention_norm.",
    r"\.encoder_attn_layer_norm\.": ".cross_attention_norm.",
    r"\.final_layer_norm\.": ".feed_forward.norm.",
    r"\.(?:mlp\.)?fc1\.": ".feed_forward.expand.",
    r"\.(?:mlp\.)?fc2\.": ".feed_forward.contract.",
    r"\binput_proj\.": "input_projection.levels.",
    r"\bquery_position_embeddings\.": "query_embeddings.",
    r"\blevel_embed$": "level_embeddings.weight",
    r"\breference_points\.": "reference_point_head.",
    r"\benc_output\.": "memory_projection.",
    r"\benc_output_norm\.": "memory_norm.",
    r"\bpos_trans\.": "query_projection.",
    r"\bpos_trans_norm\.": "query_norm.",
    r"^(?:model\.decoder\.)?class_embed\.(\d+)\.": r"model.heads.\1.class_head.",
    r"^(?:model\.decoder\.)?bbox_embed\.(\d+)\.": r"model.heads.\1.box_head.",
}

# Without refinement all layers have one head, and a file may have kept any layer's name for it.
ONE_HEAD_NAMES = {
    r"^class_embed\.\d+\.": "model.heads.0.class_head.",
    r"^bbox_embed\.\d+\.": "model.heads.0.box_head.",
}


def heads_of(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The heads of a detector or of its base model, and what their names begin with."""
    base = getattr(model, model.base_model_prefix, model)
    return base.heads, "heads." if base is model else f"{model.base_model_prefix}.heads."


def lacks_its_one_head(model: PreTrainedModel, info: dict[str, Any]) -> bool:
    """Whether a detector without refinement has not found its head in a file."""
    _, prefix = heads_of(model)
    return not model.config.with_box_refine and any(
        key.startswith(prefix) for key in info["missing_keys"]
    )


@torch.no_grad()
def share_class_head(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Give the first class head to all layers of a refined detector if a file held no other.

    Args:
        model: The loaded model.
        info: What loading it reported; the tensors that are filled here are taken out.
    """
    heads, prefix = heads_of(model)
    tensors = [
        {f"{prefix}{index}.class_head.{name}" for name in ("weight", "bias")}
        for index in range(len(heads))
    ]
    others = set().union(*tensors[1:])
    absent = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    is_shared = bool(others) and others <= info["missing_keys"] and not tensors[0] & absent
    if model.config.two_stage or not is_shared:
        return
    for head in heads[1:]:
        head.class_head.load_state_dict(heads[0].class_head.state_dict())
    info["missing_keys"] -= others
    # transformers has reported them as newly initialised by now.
    logger.warning(
        "The checkpoint holds the class head of the first decoder layer only. All layers got a "
        "copy of it, as in the detector that was saved; none of the class heads that the loading "
        "report calls missing is random."
    )


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
