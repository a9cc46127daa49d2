"""Names of DETR's tensors in transformers' files.

Left: a regular expression for the name in a file of transformers, both the layout that its version
    5
writes and the one of older repositories on the Hub. Right: the name here. None of the expressions
matches a name of ours.
"""

from hf_querydet.checkpoint_mapping_utils import TRANSFORMERS_ATTENTION, TRANSFORMERS_BACKBONE

TRANSFORMERS_NAMES = {
    **TRANSFORMERS_BACKBONE,
    **TRANSFORMERS_ATTENTION,
    r"\bencoder\.layers\.": "encoder_layers.",
    r"\bdecoder\.layers\.": "decoder_layers.",
    r"\bdecoder\.layernorm\.": "decoder_norm.",
    r"\.self_attn_layer_norm\.": ".self_attention_norm.",
    r"\.encoder_attn_layer_norm\.": ".cross_attention_norm.",
    r"\.final_layer_norm\.": ".feed_forward.norm.",
    r"\.(?:mlp\.)?fc1\.": ".feed_forward.expand.",
    r"\.(?:mlp\.)?fc2\.": ".feed_forward.contract.",
    r"^class_labels_classifier\.": "class_head.",
    r"^bbox_predictor\.": "box_head.",
}
