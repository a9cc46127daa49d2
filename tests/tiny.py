"""One tiny configuration per variant, and a tiny batch."""

import numpy as np
import torch
from PIL import Image

TINY_BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_indices": [4],
}
TINY_CONFIGS = {
    "detr": {
        "num_queries": 5,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_layers": 3,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 40,
    },
    "deformable_detr": {
        "backbone_config": {**TINY_BACKBONE, "out_indices": [2, 3, 4]},
        "num_queries": 5,
        # Two channels in each group of the normalisation: one cannot be normalised in one cell.
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "encoder_n_points": 3,
        "decoder_layers": 3,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 40,
        "decoder_n_points": 2,
    },
    "anchor_detr": {
        "num_query_positions": 3,
        "num_query_patterns": 2,
        "d_model": 64,  # as above
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_layers": 3,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 40,
    },
    "conditional_detr": {
        "num_queries": 5,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_layers": 3,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 40,
    },
    "efficient_detr": {
        "backbone_config": {**TINY_BACKBONE, "out_indices": [2, 3, 4]},
        "num_queries": 5,
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "encoder_n_points": 3,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 40,
        "decoder_n_points": 2,
    },
    "dynamic_detr": {
        "backbone_config": {**TINY_BACKBONE, "out_indices": [2, 3, 4]},
        "num_queries": 5,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 40,
        "pooling_size": 3,
        "dynamic_dim": 6,
    },
    "sparse_rcnn": {
        "backbone_config": {**TINY_BACKBONE, "out_indices": [1, 2, 3, 4]},
        "num_queries": 5,
        "d_model": 32,
        # Boxes jump where rounding moves one to another level: with each stage more of them.
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "pooling_size": 3,
        "dynamic_dim": 8,
    },
}
NUM_LABELS = 3


def tiny_config(variants, name, **changes):
    """A new tiny configuration; ``variants`` is the library's table."""
    fields = {
        "backbone_config": dict(TINY_BACKBONE),
        "num_labels": NUM_LABELS,
        **TINY_CONFIGS[name],
        **changes,
    }
    return variants[name].config(**fields)


def tiny_batch():
    """Two pictures of unlike sizes on one canvas, with two objects and one object."""
    pixel_mask = torch.zeros(2, 70, 101, dtype=torch.int64)
    pixel_mask[0, :70, :64] = 1
    pixel_mask[1, :45, :101] = 1
    return {
        "pixel_values": torch.randn(2, 3, 70, 101) * pixel_mask[:, None],
        "pixel_mask": pixel_mask,
    }


def tiny_labels():
    return [
        {
            "class_labels": torch.tensor([2, 0]),
            "boxes": torch.tensor([[0.5, 0.4, 0.3, 0.5], [0.2, 0.7, 0.2, 0.1]]),
        },
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.6, 0.5, 0.7, 0.9]])},
    ]


def no_objects():
    return {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}


def in_one_graph(model, **options):
    """The compiled model; a break of the graph is an error."""
    # All detectors share one forward, and the compiler keeps only so many versions of a function.
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


def perturb(model, scale=0.1):
    """Move all weights and statistics off their first values, so that none is neutral."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The taps of a kernel add up. Above the backbone, whose norms undo it, maps would grow
            # and offsets that are made of them point far outside.
            is_kernel = parameter.ndim == 4 and "backbone" not in name
            num_taps = parameter[0, 0].numel() if is_kernel else 1
            parameter.add_(torch.randn_like(parameter) * scale * num_taps**-0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "bias")):
                buffer.add_(torch.randn_like(buffer) * scale)
            elif name.endswith(("running_var", "weight")):
                buffer.mul_(1 + torch.rand_like(buffer) * scale)
    return model


def picture(width, height, seed=0):
    """A coloured picture that is alike nowhere."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
