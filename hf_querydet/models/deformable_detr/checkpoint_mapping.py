"""Names of Deformable DETR's tensors in transformers' files.

Left: a regular expression for the name in a file of transformers, both the layout that its version
    5
writes and the one of older repositories on the Hub. Right: the name here. None of the expressions
matches a name of ours.

The heads stand in such files at the top, below the decoder, or in both places; both names lead to
one tensor here. With refinement a file may hold one class head for all layers, because transformers
ties those of a fresh model: see ``DeformableDETRPreTrainedModel.from_pretrained``.
"""

from hf_querydet.checkpoint_mapping_utils import TRANSFORMERS_ATTENTION, TRANSFORMERS_BACKBONE

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
