"""A tiny detector with weights that are neutral nowhere, in memory and in a directory."""

import torch
from tiny import perturb, tiny_config

from hf_querydet import VARIANTS

ID2LABEL = {0: "dog", 1: "ant", 2: "cat"}
SIZE = {"shortest_edge": 48, "longest_edge": 80}


def build_detector(variant="detr", *, scale=0.5):
    """The larger the scale, the more do the scores of two pictures and queries differ."""
    torch.manual_seed(0)
    config = tiny_config(VARIANTS, variant, id2label=ID2LABEL)
    model = perturb(VARIANTS[variant].detector(config), scale=scale).eval()
    return model, VARIANTS[variant].image_processor(size=SIZE)


def save_detector(folder, *args, **kwargs):
    for part in build_detector(*args, **kwargs):
        part.save_pretrained(folder)
    return folder
