"""Training settings of DETR (arXiv:2005.12872, Sec. 4, Appendix A.4; the released runs)."""

from hf_querydet.recipe_utils import (
    SMALL_BACKBONE_STRIDE_8,
    SMALL_DECODER,
    Recipe,
    SmallRecipe,
)

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
    model_fields=SMALL_BACKBONE_STRIDE_8
    | SMALL_DECODER
    # Values without positions take very long to become boxes; an encoder takes the time of steps.
    | {"position_embeddings_at": "input", "encoder_layers": 0}
    | {"dropout": 0.0, "attention_dropout": 0.0},
    learning_rate=1e-3,
)
