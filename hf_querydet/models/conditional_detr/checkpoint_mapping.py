"""Names of Conditional DETR's tensors in transformers' files and in those of its authors.

Left: a regular expression for the name there. Right: the name here. See
``checkpoint_mapping_utils`` for how tables are read.
"""

from collections.abc import Mapping
from typing import Any

from hf_querydet.checkpoint_mapping_utils import (
    AUTHORS_BACKBONE,
    AUTHORS_FEED_FORWARD,
    AUTHORS_IGNORED,
    AUTHORS_SELF_ATTENTION,
    TRANSFORMERS_BACKBONE,
    TRANSFORMERS_LAYERS,
    AuthorsFormat,
    AuthorsTensors,
    Names,
    layer_sizes,
    refuse_pre_norm,
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
    **AUTHORS_IGNORED,
    **AUTHORS_BACKBONE,
    r"^backbone\.1\.row_embed\.": "model.position_embedding.row_embeddings.",
    r"^backbone\.1\.col_embed\.": "model.position_embedding.column_embeddings.",
    r"^input_proj\.": "model.input_projection.",
    r"^query_embed\.": "model.query_position_embeddings.",
    r"^transformer\.(en|de)coder\.layers\.": r"model.\1coder_layers.",
    r"^transformer\.decoder\.norm\.": "model.decoder_norm.",
    r"^transformer\.decoder\.query_scale\.": "model.query_scale.",
    r"^transformer\.decoder\.ref_point_head\.": "model.reference_point_head.",
    # Fused in the encoder only.
    **AUTHORS_SELF_ATTENTION,
    **DECODER_PROJECTIONS,
    r"\.cross_attn\.out_proj\.": ".cross_attention.out_proj.",
    r"coder_layers\.(\d+)\.norm1\.": r"coder_layers.\1.self_attention_norm.",
    r"encoder_layers\.(\d+)\.norm2\.": r"encoder_layers.\1.feed_forward.norm.",
    r"decoder_layers\.(\d+)\.norm2\.": r"decoder_layers.\1.cross_attention_norm.",
    r"decoder_layers\.(\d+)\.norm3\.": r"decoder_layers.\1.feed_forward.norm.",
    **AUTHORS_FEED_FORWARD,
    r"^class_embed\.": "class_head.",
    r"^bbox_embed\.": "box_head.",
}


def authors_names(config: Any) -> Names:
    """Key table of a configuration."""
    if config.decoder_layers > 1:
        return AUTHORS_NAMES
    # One layer has no use for it.
    return AUTHORS_NAMES | {r"^transformer\.decoder\.query_scale\.": None}


def authors_config(tensors: AuthorsTensors, known: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`~hf_querydet.checkpoint_mapping_utils.AuthorsFormat`."""
    refuse_pre_norm(tensors)
    has_tables = "backbone.1.row_embed.weight" in tensors
    return {
        **tensors.resnet(),
        **layer_sizes(tensors, "transformer.{}.layers"),
        "num_queries": tensors.size("query_embed.weight"),
        "d_model": tensors.size("query_embed.weight", 1),
        "num_labels": tensors.size("class_embed.weight"),
        "position_embedding_type": "learned" if has_tables else "sine",
    }


AUTHORS = AuthorsFormat(names=authors_names, config=authors_config)
