"""Names of DETR's tensors in transformers' files and in those of its authors.

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
    # Panoptic models hold the detector inside, and what makes masks beside it.
    r"^detr\.": "",
    r"^(?:mask_head|bbox_attention)\.": None,
    **AUTHORS_DETR_NAMES,
    # Fused as self-attention is.
    r"\.multihead_attn\.in_proj_(weight|bias)$": (
        r".cross_attention.q_proj.\1",
        r".cross_attention.k_proj.\1",
        r".cross_attention.v_proj.\1",
    ),
    r"\.multihead_attn\.out_proj\.": ".cross_attention.out_proj.",
}


def authors_config(tensors: AuthorsTensors, known: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`~hf_querydet.checkpoint_mapping_utils.AuthorsFormat`."""
    # A panoptic model is the detector with something before every name.
    tensors = AuthorsTensors({name.removeprefix("detr."): tensors[name] for name in tensors})
    # One row of the head is "no object".
    return {**detr_fields(tensors), "num_labels": tensors.size("class_embed.weight") - 1}


AUTHORS = AuthorsFormat(
    names=lambda config: AUTHORS_NAMES, config=authors_config, may_be_dilated=lambda told: True
)
