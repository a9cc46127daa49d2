"""Names of Conditional DETR's tensors in transformers' files.

Left: a regular expression for the name in a file of transformers, both in the layout of its fifth
version's modules and in that of repositories on the Hub, where the decoder's projections have the
names of the authors (``sa_`` self-attention, ``ca_`` cross-attention). Right: the name here. None
of the expressions matches a name of ours.
"""

from hf_querydet.checkpoint_mapping_utils import TRANSFORMERS_ATTENTION, TRANSFORMERS_BACKBONE

TRANSFORMERS_NAMES = {
    **TRANSFORMERS_BACKBONE,
    **TRANSFORMERS_ATTENTION,
    r"\.sa_([qk])content_proj\.": r".self_attention.\1_content_proj.",
    r"\.sa_([qk])pos_proj\.": r".self_attention.\1_position_proj.",
    r"\.sa_v_proj\.": ".self_attention.v_proj.",
    r"\.ca_([qk])content_proj\.": r".cross_attention.\1_content_proj.",
    r"\.ca_([qk])pos_proj\.": r".cross_attention.\1_position_proj.",
    r"\.ca_qpos_sine_proj\.": ".cross_attention.q_spatial_proj.",
    r"\.ca_v_proj\.": ".cross_attention.v_proj.",
    r"\.([qk])_pos_proj\.": r".\1_position_proj.",
    r"\.q_pos_sine_proj\.": ".q_spatial_proj.",
    r"\bencoder\.layers\.": "encoder_layers.",
    r"\bdecoder\.layers\.": "decoder_layers.",
    r"\bdecoder\.layernorm\.": "decoder_norm.",
    r"\bdecoder\.query_scale\.": "query_scale.",
    r"\bdecoder\.ref_point_head\.": "reference_point_head.",
    r"\.self_attn_layer_norm\.": ".self_attention_norm.",
    r"\.encoder_attn_layer_norm\.": ".cross_attention_norm.",
    r"\.final_layer_norm\.": ".feed_forward.norm.",
    r"\.(?:mlp\.)?fc1\.": ".feed_forward.expand.",
    r"\.(?:mlp\.)?fc2\.": ".feed_forward.contract.",
    r"^class_labels_classifier\.": "class_head.",
    r"^bbox_predictor\.": "box_head.",
}
