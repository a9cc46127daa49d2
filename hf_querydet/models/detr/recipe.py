"""Training settings of DETR (arXiv:2005.12872, Sec. 4, Appendix A.4; the released runs)."""

from hf_querydet.recipe_utils import (
    SMALL_BACKBONE_STRIDE_16,
    SMALL_DECODER,
    SMALL_ENCODER,
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
    model_fields=SMALL_BACKBONE_STRIDE_16
    | SMALL_ENCODER
    | SMALL_DECODER
    # A query knows its place from what it sees there, and first learns the average box of that
    # place; the boxes of more queries, spread from the start, lie closer to any object.
    | {"num_queries": 300, "query_position_std": 8.0}
    | {"dropout": 0.0, "attention_dropout": 0.0},
    # The encoder as slow as in Conditional DETR, the rest slower than there, or what differs
    # between pictures is lost in the decoder too.
    learning_rate=2.5e-4,
    slow_parameters=("encoder_layers",),
    slow_learning_rate_factor=0.2,
)
