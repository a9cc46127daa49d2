"""Training settings of Dynamic DETR (ICCV 2021, pp. 2988-2997).

The paper states AdamW with a learning rate of 1e-4 and runs of 12, 36 and 50 epochs. The rest is
chosen here after DETR and the common 12-epoch schedule: one drop after epoch 11.
"""

from hf_querydet.recipe_utils import SMALL_BACKBONE, SMALL_DECODER, Recipe, SmallRecipe

RECIPE = Recipe(
    learning_rate=1e-4,
    backbone_learning_rate_factor=0.1,
    slow_parameters=(),
    slow_learning_rate_factor=1.0,
    weight_decay=1e-4,
    max_grad_norm=0.1,
    schedule="step",
    num_epochs=12,
    step_fraction=11 / 12,
)

SMALL_RECIPE = SmallRecipe(
    # Six stages, as in the paper, learn later than three but end far ahead of them. The encoder
    # takes the time of steps, in which a detector from random weights gains nothing by it.
    model_fields=SMALL_BACKBONE | SMALL_DECODER | {"encoder_layers": 0, "decoder_layers": 6},
)
