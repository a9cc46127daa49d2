"""Training settings of Conditional DETR (arXiv:2108.06152; the authors' code, the released runs).

For a batch of 16 in all, the authors' 8 GPUs of 2 pictures; 8 for their DC5 models.
"""

from hf_querydet.recipe_utils import SMALL_DECODER, SMALL_ONE_MAP, Recipe, SmallRecipe

RECIPE = Recipe(
    learning_rate=1e-4,
    backbone_learning_rate_factor=0.1,
    slow_parameters=(),
    slow_learning_rate_factor=1.0,
    weight_decay=1e-4,
    max_grad_norm=0.1,
    schedule="step",
    num_epochs=50,
    step_fraction=0.8,
)

SMALL_RECIPE = SmallRecipe(
    model_fields=SMALL_ONE_MAP | SMALL_DECODER | {"dropout": 0.0, "attention_dropout": 0.0},
    learning_rate=1e-3,
    num_epochs=250,
)
