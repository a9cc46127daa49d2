"""Training settings of DETR (arXiv:2005.12872, Sec. 4, Appendix A.4; the released runs)."""

from hf_querydet.recipe_utils import SMALL_DECODER, SMALL_ONE_MAP, Recipe, SmallRecipe

RECIPE = Recipe(
    learning_rate=1e-4,
    backbone_learning_rate_factor=0.1,
    slow_parameters=(),
    slow_learning_rate_factor=1.0,
    weight_decay=1e-4,
    max_grad_norm=0.1,
    schedule="step",
    num_epochs=500,
    step_fraction=0.8,
)

SMALL_RECIPE = SmallRecipe(
    model_fields=SMALL_ONE_MAP
    | SMALL_DECODER
    | {"dropout": 0.0, "attention_dropout": 0.0}
    # Values without positions take very long to become boxes.
    | {"position_embeddings_at": "input"},
    learning_rate=1e-3,
    num_epochs=250,
)
