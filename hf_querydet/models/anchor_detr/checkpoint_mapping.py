"""Names of Anchor DETR's tensors in its authors' files.

Left: a regular expression for the name there. Right: the name here. See
``checkpoint_mapping_utils`` for how tables are read.
"""

from collections.abc import Mapping
from typing import Any

from hf_querydet.checkpoint_mapping_utils import (
    AUTHORS_ARGUMENTS,
    AUTHORS_BACKBONE,
    AUTHORS_FEED_FORWARD,
    AUTHORS_IGNORED,
    AUTHORS_SELF_ATTENTION,
    AuthorsFormat,
    AuthorsTensors,
    Names,
    layer_sizes,
)

# github.com/megvii-research/AnchorDETR
AUTHORS_NAMES: Names = {
    **AUTHORS_IGNORED,
    **AUTHORS_BACKBONE,
    r"^input_proj\.": "model.input_projection.levels.",
    r"^transformer\.pattern\.": "model.patterns.",
    r"^transformer\.position\.": "model.anchor_points.",
    r"^transformer\.level_embed\.": "model.level_embeddings.",
    # A linear layer, a ReLU without tensors, a linear layer.
    r"^transformer\.adapt_pos1d\.0\.": "model.coordinate_mlp.layers.0.",
    r"^transformer\.adapt_pos1d\.2\.": "model.coordinate_mlp.layers.1.",
    r"^transformer\.adapt_pos2d\.0\.": "model.point_mlp.layers.0.",
    r"^transformer\.adapt_pos2d\.2\.": "model.point_mlp.layers.1.",
    r"^transformer\.encoder_layers_level\.": "model.level_layers.",
    r"^transformer\.(en|de)coder_layers\.": r"model.\1coder_layers.",
    r"\.self_attn_level\.": ".self_attn.",
    r"\.level_fc\.": ".cross_attention.level_merge.",
    r"(encoder|level)_layers\.(\d+)\.norm1\.": r"\1_layers.\2.self_attention_norm.",
    # The first norm of a decoder layer belongs to its second block.
    r"decoder_layers\.(\d+)\.norm1\.": r"decoder_layers.\1.cross_attention_norm.",
    r"decoder_layers\.(\d+)\.norm2\.": r"decoder_layers.\1.self_attention_norm.",
    r"\.ffn\.norm2\.": ".feed_forward.norm.",
    r"\.ffn\.": ".",
    **AUTHORS_FEED_FORWARD,
    # Copies of one head, one for each layer.
    r"^transformer\.class_embed\.\d+\.": "class_head.",
    r"^transformer\.bbox_embed\.\d+\.": "box_head.",
}
ROW_COLUMN_NAMES: Names = {
    # Five projections are one matrix.
    r"encoder_layers\.(\d+)\.self_attn\.in_proj_(weight|bias)$": tuple(
        rf"encoder_layers.\1.self_attention.{part}_proj.\2"
        for part in ("row_q", "column_q", "row_k", "column_k", "v")
    ),
    r"\.cross_attn\.in_proj_(weight|bias)$": tuple(
        rf".cross_attention.attention.{part}_proj.\1"
        for part in ("row_q", "column_q", "row_k", "column_k", "v")
    ),
}
FULL_NAMES: Names = {
    r"\.cross_attn\.in_proj_(weight|bias)$": tuple(
        rf".cross_attention.attention.{part}_proj.\1" for part in "qkv"
    ),
    # In every file, of use with row-column attention only.
    r"^transformer\.adapt_pos1d\.": None,
}
ATTENTION_NAMES: Names = {
    **AUTHORS_SELF_ATTENTION,
    r"\.cross_attn\.out_proj\.": ".cross_attention.attention.out_proj.",
}


def authors_names(config: Any) -> Names:
    """Key table of a configuration."""
    if config.attention_type == "row_column":
        return {**AUTHORS_NAMES, **ROW_COLUMN_NAMES, **ATTENTION_NAMES}
    return {**FULL_NAMES, **AUTHORS_NAMES, **ATTENTION_NAMES}


def authors_config(tensors: AuthorsTensors, known: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`~hf_querydet.checkpoint_mapping_utils.AuthorsFormat`."""
    d_model = tensors.size("transformer.pattern.weight", 1)
    num_levels = tensors.count(r"^input_proj\.(\d+)\.")
    fields = {
        **tensors.resnet(),
        **layer_sizes(tensors, "transformer.{}_layers", "ffn.linear1"),
        "d_model": d_model,
        "num_query_patterns": tensors.size("transformer.pattern.weight"),
        "num_feature_levels": num_levels,
        "num_labels": tensors.size("transformer.class_embed.0.weight"),
        "attention_type": "row_column"
        if tensors.size("transformer.decoder_layers.0.cross_attn.in_proj_weight") == 5 * d_model
        else "full",
        # Points of a grid are not stored.
        "spatial_prior": "learned" if "transformer.position.weight" in tensors else "grid",
    }
    if fields["spatial_prior"] == "learned":
        fields["num_query_positions"] = tensors.size("transformer.position.weight")
    if num_levels > 1:
        # As many layers attend within levels as between them.
        fields["encoder_layers"] *= 2
    return fields


AUTHORS = AuthorsFormat(
    names=authors_names,
    config=authors_config,
    # Of a grid no tensor tells the size.
    arguments={**AUTHORS_ARGUMENTS, "num_query_position": ("num_query_positions",)},
    may_be_dilated=lambda told: True,
)
