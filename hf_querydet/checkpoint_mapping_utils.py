"""Key tables that several variants share: backbones and attention.

Regular expressions for names in files of transformers, and the names here; see a variant's
``checkpoint_mapping.py``.
"""

from collections.abc import Mapping

from transformers.core_model_loading import WeightRenaming

TRANSFORMERS_BACKBONE = {
    # timm backbones: ResNet modules directly below the wrapper.
    r"\bbackbone\.(?:conv_encoder\.)?model\.(?=conv1|bn1|layer\d)": "backbone.body._backbone.",
    # transformers' own ResNet.
    r"\bbackbone\.(?:conv_encoder\.)?model\.(?=embedder|encoder)": "backbone.body.",
}
TRANSFORMERS_ATTENTION = {
    r"\.self_attn\.o(?:ut)?_proj\.": ".self_attention.out_proj.",
    r"\.self_attn\.": ".self_attention.",
    r"\.encoder_attn\.o(?:ut)?_proj\.": ".cross_attention.out_proj.",
    r"\.encoder_attn\.": ".cross_attention.",
}


def weight_renamings(names: Mapping[str, str]) -> list[WeightRenaming]:
    """Turn a key table into what transformers applies while it loads, in the table's order."""
    return [WeightRenaming(source, target) for source, target in names.items()]
