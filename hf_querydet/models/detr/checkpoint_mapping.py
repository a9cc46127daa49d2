"""Names of DETR's tensors in transformers' files and in those of its authors.

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

# Both the layout that transformers 5 writes and the one of older repositories on the Hub. None of
# the expressions matches a name of ours.
TRANSFORMERS_NAMES = {
    # Panoptic models hold the detector inside.
    r"^detr\.": "",
    **TRANSFORMERS_BACKBONE,
    **TRANSFORMERS_LAYERS,
    r"^class_labels_classifier\.": "class_head.",
    r"^bbox_predictor\.": "box_head.",
}

# github.com/facebookresearch/detr
AUTHORS_NAMES: Names = {
    **AUTHORS_IGNORED,
    # Panoptic models hold the detector inside, and what makes masks beside it.
    r"^detr\.": "",
    r"^(?:mask_head|bbox_attention)\.": None,
    **AUTHORS_BACKBONE,
    r"^backbone\.1\.row_embed\.": "model.position_embedding.row_embeddings.",
    r"^backbone\.1\.col_embed\.": "model.position_embedding.column_embeddings.",
    r"^input_proj\.": "model.input_projection.",
    r"^query_embed\.": "model.query_position_embeddings.",
    r"^transformer\.(en|de)coder\.layers\.": r"model.\1coder_layers.",
    r"^transformer\.decoder\.norm\.": "model.decoder_norm.",
    **AUTHORS_SELF_ATTENTION,
    r"\.multihead_attn\.in_proj_(weight|bias)$": (
        r".cross_attention.q_proj.\1",
        r".cross_attention.k_proj.\1",
        r".cross_attention.v_proj.\1",
    ),
    r"\.multihead_attn\.out_proj\.": ".cross_attention.out_proj.",
    r"coder_layers\.(\d+)\.norm1\.": r"coder_layers.\1.self_attention_norm.",
    r"encoder_layers\.(\d+)\.norm2\.": r"encoder_layers.\1.feed_forward.norm.",
    r"decoder_layers\.(\d+)\.norm2\.": r"decoder_layers.\1.cross_attention_norm.",
    r"decoder_layers\.(\d+)\.norm3\.": r"decoder_layers.\1.feed_forward.norm.",
    **AUTHORS_FEED_FORWARD,
    r"^class_embed\.": "class_head.",
    r"^bbox_embed\.": "box_head.",
}


def authors_config(tensors: AuthorsTensors, known: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`~hf_querydet.checkpoint_mapping_utils.AuthorsFormat`."""
    # A panoptic model is the detector with something before every name.
    tensors = AuthorsTensors({name.removeprefix("detr."): tensors[name] for name in tensors})
    refuse_pre_norm(tensors)
    has_tables = "backbone.1.row_embed.weight" in tensors
    return {
        **tensors.resnet(),
        **layer_sizes(tensors, "transformer.{}.layers"),
        "num_queries": tensors.size("query_embed.weight"),
        "d_model": tensors.size("query_embed.weight", 1),
        "num_labels": tensors.size("class_embed.weight") - 1,  # without "no object"
        "position_embedding_type": "learned" if has_tables else "sine",
    }


AUTHORS = AuthorsFormat(names=lambda config: AUTHORS_NAMES, config=authors_config)
