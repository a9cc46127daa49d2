"""Training settings of Efficient DETR (arXiv:2104.01318).

The paper trains for 36 epochs. There is no code of the authors; the other settings are those of
Deformable DETR, whose encoder and losses this detector has, with the drop after two thirds.
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
    slow_parameters=("reference_point_embeddings", "sampling_offsets"),
    slow_learning_rate_factor=0.1,
    weight_decay=1e-4,
    max_grad_norm=0.1,
    schedule="step",
    num_epochs=36,
    step_fraction=2 / 3,
)

SMALL_RECIPE = SmallRecipe(
    model_fields=SMALL_BACKBONE | SMALL_ENCODER | SMALL_DECODER | {"decoder_layers": 1},
    learning_rate=8e-4,
)
