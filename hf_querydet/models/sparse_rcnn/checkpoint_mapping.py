"""Names of Sparse R-CNN's tensors in its authors' files, which are detectron2's.

Left: a regular expression for the name there. Right: the name here. See
``checkpoint_mapping_utils`` for how tables are read.
"""

import math
from collections.abc import Mapping
from typing import Any

from hf_querydet.checkpoint_mapping_utils import (
    AUTHORS_FEED_FORWARD,
    AUTHORS_IGNORED,
    AUTHORS_SELF_ATTENTION,
    AuthorsFormat,
    AuthorsTensors,
    Names,
)

# More hidden layers than any tower has.
MAX_TOWER_LAYERS = 8

# detectron2's ResNet and timm's; stages are counted from 2 there.
BACKBONE_NAMES: Names = {
    r"^backbone\.bottom_up\.(?:stem\.)?": "model.backbone.body._backbone.",
    **{rf"_backbone\.res{stage + 1}\.": f"_backbone.layer{stage}." for stage in range(1, 5)},
    r"\bconv(\d)\.norm\.": r"bn\1.",
    r"\bshortcut\.norm\.": "downsample.1.",
    r"\bshortcut\.weight$": "downsample.0.weight",
}
# github.com/PeizeSun/SparseR-CNN
AUTHORS_NAMES: Names = {
    **AUTHORS_IGNORED,
    # Class weights of the softmax loss, which are settings here.
    r"^criterion\.empty_weight$": None,
    **BACKBONE_NAMES,
    **{
        rf"^backbone\.fpn_{kind}{level}\.": f"model.feature_pyramid.{name}.{level - 2}."
        for kind, name in (("lateral", "lateral_projections"), ("output", "output_convolutions"))
        for level in range(2, 6)
    },
    r"^init_proposal_(boxes|features)\.": r"model.proposal_\1.",
    r"^head\.head_series\.": "model.stages.",
    **AUTHORS_SELF_ATTENTION,
    r"\.inst_interact\.dynamic_layer\.": ".dynamic_convolution.filter_generator.",
    r"\.inst_interact\.norm1\.": ".dynamic_convolution.norms.0.",
    r"\.inst_interact\.norm2\.": ".dynamic_convolution.norms.1.",
    r"\.inst_interact\.out_layer\.": ".dynamic_convolution.output_projection.",
    r"\.inst_interact\.norm3\.": ".dynamic_convolution.output_norm.",
    r"\.norm1\.": ".self_attention_norm.",
    r"\.norm2\.": ".interaction_norm.",
    r"\.norm3\.": ".feed_forward.norm.",
    **AUTHORS_FEED_FORWARD,
    # Every hidden layer is a linear layer, a norm, a ReLU without tensors.
    **{
        rf"\.{kind}_module\.{3 * layer + offset}\.": f".{name}_tower.{part}.{layer}."
        for kind, name in (("cls", "class"), ("reg", "box"))
        for offset, part in enumerate(("layers", "norms"))
        for layer in range(MAX_TOWER_LAYERS)
    },
    r"\.class_logits\.": ".class_head.",
    r"\.bboxes_delta\.": ".box_head.",
}


def authors_config(tensors: AuthorsTensors, known: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`~hf_querydet.checkpoint_mapping_utils.AuthorsFormat`."""
    first = "head.head_series.0."
    d_model = tensors.size("init_proposal_features.weight", 1)
    use_focal = "criterion.empty_weight" not in tensors
    num_bins = tensors.size(f"{first}inst_interact.out_layer.weight", 1) // d_model
    return {
        **tensors.resnet(BACKBONE_NAMES),
        "num_queries": tensors.size("init_proposal_features.weight"),
        "d_model": d_model,
        "decoder_layers": tensors.count(r"^head\.head_series\.(\d+)\."),
        "decoder_ffn_dim": tensors.size(f"{first}linear1.weight"),
        "dynamic_dim": tensors.size(f"{first}inst_interact.norm1.weight"),
        "pooling_size": math.isqrt(num_bins),
        "class_tower_layers": -(-tensors.count(r"\.cls_module\.(\d+)\.") // 3),
        "box_tower_layers": -(-tensors.count(r"\.reg_module\.(\d+)\.") // 3),
        # Beside the classes, a softmax scores "no object".
        "num_labels": tensors.size(f"{first}class_logits.weight") - (not use_focal),
        "use_focal": use_focal,
    }


AUTHORS = AuthorsFormat(names=lambda config: AUTHORS_NAMES, config=authors_config)
