"""Training settings of Deformable DETR (arXiv:2010.04159, Sec. 5; the released runs).

For a batch of 32 in all, the authors' 16 GPUs of 2 pictures.
"""

from hf_querydet.recipe_utils import (
    SMALL_BACKBONE,
    SMALL_DECODER,
    SMALL_ENCODER,
    Recipe,
    SmallRecipe,
)

RECIPE = Recipe(
    learning_rate=2e-4,
    backbone_learning_rate_factor=0.1,
    slow_parameters=("reference_point_head", "sampling_offsets"),
    slow_learning_rate_factor=0.1,
    weight_decay=1e-4,
    max_grad_norm=0.1,
    schedule="step",
    num_epochs=50,
    step_fraction=0.8,
)

SMALL_RECIPE = SmallRecipe(
    model_fields=SMALL_BACKBONE
    | SMALL_ENCODER
    | SMALL_DECODER
    | {"with_box_refine": True}
    | {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    learning_rate=8e-4,
)
