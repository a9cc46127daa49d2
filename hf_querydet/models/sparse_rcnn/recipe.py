"""Training settings of Sparse R-CNN (arXiv:2011.12450, Sec. 4; the released runs).

For a batch of 16 in all, the authors' 8 GPUs of 2 pictures. The backbone learns as fast as the
rest. The authors count iterations, 270,000 of which are about 36 epochs of COCO, and drop the
learning rate twice, after 210,000 and again after 250,000; the schedule here has the first drop.
Their warm-up starts at a hundredth of the learning rate, the one here near 0.
"""

from hf_querydet.recipe_utils import SMALL_BACKBONE, SMALL_DECODER, Recipe, SmallRecipe

RECIPE = Recipe(
    learning_rate=2.5e-5,
    backbone_learning_rate_factor=1.0,
    slow_parameters=(),
    slow_learning_rate_factor=1.0,
    weight_decay=1e-4,
    max_grad_norm=1.0,
    schedule="step",
    num_epochs=36,
    step_fraction=210 / 270,
    warmup_fraction=1 / 270,
)

SMALL_RECIPE = SmallRecipe(
    # Six stages, as in the paper, learn later than three but end ahead of them.
    model_fields=SMALL_BACKBONE | SMALL_DECODER | {"decoder_layers": 6, "dynamic_dim": 32}
)
