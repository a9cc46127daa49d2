"""Training settings of Anchor DETR (arXiv:2109.07107; the released runs).

For a batch of 8 in all, the authors' 8 GPUs of 1 picture.
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
    model_fields=SMALL_ONE_MAP
    | SMALL_DECODER
    # num_queries follows from the other two.
    | {"num_queries": None, "num_query_positions": 50, "num_query_patterns": 2},
    learning_rate=1e-3,
    num_epochs=250,
)
