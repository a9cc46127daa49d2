"""Configuration of Efficient DETR (arXiv:2104.01318)."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_querydet.configuration_utils import (
    RESNET101,
    DetectorConfig,
    stages_of_levels,
)
from hf_querydet.layers.projection import NUM_GROUPS

REFERENCE_POINT_INITS = ("dense", "learnable", "grid", "center", "border")
QUERY_INITS = ("dense", "learnable")


@strict
class EfficientDETRConfig(DetectorConfig):
    """Configuration of an Efficient DETR detector; the defaults are the paper's R50 model.

    Models by name, ``EfficientDETRConfig.from_name("r101")``:

    - ``"r50"``: three encoder layers and one decoder layer, the defaults.
    - ``"r50-6-encoder-layers"``: six encoder layers and one decoder layer.
    - ``"r101"``, ``"r101-6-encoder-layers"``: the same with ResNet-101.

    Fields that every detector has are described in
    :class:`~hf_querydet.configuration_utils.DetectorConfig`; ``num_proposals`` is another name of
    ``num_queries``. No weight depends on their number as long as both ``reference_point_init`` and
    ``query_init`` are ``"dense"``: it may be set anew for a trained detector.

    Attributes:
        encoder_layers: Number of encoder layers.
        encoder_attention_heads: Heads of each encoder attention.
        encoder_ffn_dim: Inner size of the encoder's feed-forward blocks.
        encoder_n_points: Points that an encoder attention samples per head and level.
        decoder_layers: Number of decoder layers. More than one refine the boxes one after another.
        decoder_attention_heads: Heads of each decoder attention.
        decoder_ffn_dim: Inner size of the decoder's feed-forward blocks.
        decoder_n_points: Points that a cross-attention samples per head and level.
        activation_function: Activation of the feed-forward blocks.
        dropout: Dropout on the output of each attention and feed-forward block.
        attention_dropout: Dropout on the weights of the self-attention among queries.
        activation_dropout: Dropout inside the feed-forward blocks.
        num_feature_levels: Levels of features. Up to three are stages of the backbone, counted from
            its last; further ones are made by strided convolutions.
        reference_point_init: Where the queries start: at the ``"dense"`` part's best boxes; or at
            points, which are ``"learnable"``, the cell centres of a square ``"grid"``
            (``num_queries`` is its number of cells), all at the ``"center"``, or along the
            picture's ``"border"``.
        query_init: What the queries start as: the encoder's features at the ``"dense"`` part's best
            tokens, or ``"learnable"`` vectors. If neither this nor ``reference_point_init`` is
            ``"dense"``, there is no dense part, and no loss of it.
        share_head: One class head and one box head for the dense part and all decoder layers. Else
            each has its own.
        num_queries_train_start: Number of queries at the first step of training, from which it
            falls linearly to ``num_queries``; 300 is a good value for the defaults. The trainer has
            to say how far it is, see
            :meth:`~hf_querydet.modeling_utils.DetectorPreTrainedModel.set_training_progress`. None
            keeps it constant.
        focal_alpha: Weight of positives in the focal loss.

    Example:
        >>> from hf_querydet import EfficientDETRConfig, EfficientDETRForObjectDetection
        >>> config = EfficientDETRConfig(num_labels=3, backbone="resnet18")
        >>> model = EfficientDETRForObjectDetection(config)
    """

    model_type: ClassVar[str] = "querydet_efficient_detr"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
        "num_proposals": "num_queries",
    }
    named_configurations: ClassVar[dict[str, dict[str, Any]]] = {
        "r50": {},
        "r50-6-encoder-layers": {"encoder_layers": 6},
        "r101": {"backbone": RESNET101},
        "r101-6-encoder-layers": {"backbone": RESNET101, "encoder_layers": 6},
    }
    published_sizes: ClassVar[dict[str, tuple[float | None, float | None]]] = {
        "r50-6-encoder-layers": (35, 210),
        "r101-6-encoder-layers": (54, 289),
    }
    derived_from: ClassVar[tuple[str, ...]] = (
        *DetectorConfig.derived_from,
        "num_feature_levels",
    )
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *DetectorConfig.keys_to_ignore_at_inference,
        "intermediate_boxes",
        "encoder_predictions",
        "cross_sampling_locations",
        "reference_points",
        "reference_boxes",
        "usable_queries",
    ]

    class_cost: float | int = 2.0
    cls_loss_coefficient: float | int = 2.0
    encoder_layers: int = 3
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 1024
    encoder_n_points: int = 4
    decoder_layers: int = 1
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 1024
    decoder_n_points: int = 4
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    num_feature_levels: int = 4
    reference_point_init: str = "dense"
    query_init: str = "dense"
    share_head: bool = True
    num_queries_train_start: int | None = None
    focal_alpha: float | int = 0.25

    @property
    def backbone_stages(self) -> tuple[int, ...]:
        """Stages that the levels are made of, counted from the last."""
        return stages_of_levels(self.num_feature_levels)

    @property
    def has_dense_part(self) -> bool:
        """Whether anything starts from the encoder's own predictions."""
        return "dense" in (self.reference_point_init, self.query_init)

    def validate_architecture(self) -> None:
        """Check the fields against one another.

        Raises:
            ValueError: Naming the field, its value and what is possible.
        """
        super().validate_architecture()
        self.warn_of_untrained_heads()
        self.check_heads("encoder_attention_heads", "decoder_attention_heads")
        self.check_multiple("d_model", NUM_GROUPS, "groups of the normalisation of feature levels")
        self.check_at_least_1(
            "num_feature_levels",
            "encoder_n_points",
            "decoder_n_points",
            "decoder_layers",
        )
        for field, choices in (
            ("reference_point_init", REFERENCE_POINT_INITS),
            ("query_init", QUERY_INITS),
        ):
            self.check_choice(field, choices)
        side = math.isqrt(self.num_queries)
        if self.reference_point_init == "grid" and side**2 != self.num_queries:
            raise ValueError(
                "reference_point_init='grid' needs a square number of queries, got num_queries="
                f"{self.num_queries}; the nearest below is {side**2}."
            )
        self._validate_schedule()

    def _validate_schedule(self) -> None:
        start = self.num_queries_train_start
        if start is None:
            return
        if start < self.num_queries:
            raise ValueError(
                f"num_queries_train_start must be at least num_queries = {self.num_queries}, got "
                f"{start}; the number of queries falls during training."
            )
        if (self.reference_point_init, self.query_init) != ("dense", "dense"):
            raise ValueError(
                "num_queries_train_start needs reference_point_init='dense' and "
                "query_init='dense', because other queries are of a fixed number; got "
                f"{self.reference_point_init!r} and {self.query_init!r}."
            )
