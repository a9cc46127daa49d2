"""Names of Conditional DETR's tensors in transformers' files and in those of its authors.

Left: a regular expression for the name there. Right: the name here. See
``checkpoint_mapping_utils`` for how tables are read.
"""

from collections.abc import Mapping
from typing import Any

from hf_querydet.checkpoint_mapping_utils import (
    AUTHORS_DETR_NAMES,
    TRANSFORMERS_BACKBONE,
    TRANSFORMERS_LAYERS,
    AuthorsFormat,
    AuthorsTensors,
    Names,
    detr_fields,
)

# The decoder's projections in the authors' files and in repositories on the Hub: ``sa_``
# self-attention, ``ca_`` cross-attention.
DECODER_PROJECTIONS = {
    r"\.sa_([qk])content_proj\.": r".self_attention.\1_content_proj.",
    r"\.sa_([qk])pos_proj\.": r".self_attention.\1_position_proj.",
    r"\.sa_v_proj\.": ".self_attention.v_proj.",
    r"\.ca_([qk])content_proj\.": r".cross_attention.\1_content_proj.",
    r"\.ca_([qk])pos_proj\.": r".cross_attention.\1_position_proj.",
    r"\.ca_qpos_sine_proj\.": ".cross_attention.q_spatial_proj.",
    r"\.ca_v_proj\.": ".cross_attention.v_proj.",
}

# Both the layout that transformers 5 writes and the one of repositories on the Hub. None of the
# expressions matches a name of ours.
TRANSFORMERS_NAMES = {
    # Panoptic models hold the detector inside.
    r"^conditional_detr\.": "",
    **TRANSFORMERS_BACKBONE,
    **TRANSFORMERS_LAYERS,
    **DECODER_PROJECTIONS,
    r"\.([qk])_pos_proj\.": r".\1_position_proj.",
    r"\.q_pos_sine_proj\.": ".q_spatial_proj.",
    r"\bdecoder\.query_scale\.": "query_scale.",
    r"\bdecoder\.ref_point_head\.": "reference_point_head.",
    r"^class_labels_classifier\.": "class_head.",
    r"^bbox_predictor\.": "box_head.",
}

# github.com/Atten4Vis/ConditionalDETR
AUTHORS_NAMES: Names = {
    **AUTHORS_DETR_NAMES,
    **DECODER_PROJECTIONS,
    r"\.cross_attn\.out_proj\.": ".cross_attention.out_proj.",
    r"^transformer\.decoder\.query_scale\.": "model.query_scale.",
    r"^transformer\.decoder\.ref_point_head\.": "model.reference_point_head.",
}


def authors_names(config: Any) -> Names:
    """Key table of a configuration."""
    if config.decoder_layers > 1:
        return AUTHORS_NAMES
    # One layer has no use for it.
    return AUTHORS_NAMES | {r"^transformer\.decoder\.query_scale\.": None}


def authors_config(tensors: AuthorsTensors, known: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`~hf_querydet.checkpoint_mapping_utils.AuthorsFormat`."""
    return {**detr_fields(tensors), "num_labels": tensors.size("class_embed.weight")}


AUTHORS = AuthorsFormat(
    names=authors_names, config=authors_config, may_be_dilated=lambda told: True
)
