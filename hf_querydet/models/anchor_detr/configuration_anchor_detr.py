"""Configuration of Anchor DETR (arXiv:2109.07107)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_querydet.configuration_utils import RESNET101, DetectorConfig
from hf_querydet.layers.projection import NUM_GROUPS

SPATIAL_PRIORS = ("learned", "grid")
ATTENTION_TYPES = ("row_column", "full")
# One map, or the last three stages; the authors have no other choice.
NUMBERS_OF_LEVELS = (1, 3)
# What the number of queries follows from.
FACTORS = ("num_query_positions", "num_query_patterns", "spatial_prior")


@strict
class AnchorDETRConfig(DetectorConfig):
    """Configuration of an Anchor DETR detector; the defaults are the paper's R50 model.

    The authors' models by name, ``AnchorDETRConfig.from_name("r50-dc5")``:

    - ``"r50"``: stride 32 (C5), the defaults.
    - ``"r50-dc5"``: last stage dilated, stride 16 (``dilation=True``). The authors' training script
      has this one as its default.
    - ``"r101"``, ``"r101-dc5"``: the same with ResNet-101.

    Fields that every detector has are described in
    :class:`~hf_querydet.configuration_utils.DetectorConfig`.

    Attributes:
        num_query_positions: Anchor points. A grid has the nearest square number of them, as in the
            authors' code: 300 becomes 289.
        num_query_patterns: Patterns at every anchor point, so that one point can find several
            objects.
        num_queries: Always ``num_query_positions`` times ``num_query_patterns``; set these two.
        spatial_prior: ``"learned"`` anchor points, or a fixed ``"grid"``.
        attention_type: Of everything that attends to the picture: ``"row_column"`` (decoupled, the
            paper's) or ``"full"`` (over all cells, as in DETR).
        average_valid_keys: Average the keys of row-column attention over the cells of the picture
            only. False averages over padding too, as the authors do: their weights give their
            results only then, but a picture's predictions depend on the padding of its batch.
        num_feature_levels: 1, or 3 for the last three stages of the backbone at one size, which
            needs ``dilation=True`` and row-column attention. The authors released no such model.
        encoder_layers: Number of encoder layers. With three levels, half of them attend within
            levels and half between levels.
        encoder_attention_heads: Heads of each encoder attention.
        encoder_ffn_dim: Inner size of the encoder's feed-forward blocks.
        decoder_layers: Number of decoder layers.
        decoder_attention_heads: Heads of each decoder attention.
        decoder_ffn_dim: Inner size of the decoder's feed-forward blocks.
        activation_function: Activation of the feed-forward blocks.
        dropout: Dropout on the output of each attention and feed-forward block.
        attention_dropout: Dropout on attention weights; those of rows and of columns apart.
        activation_dropout: Dropout inside the feed-forward blocks.
        focal_alpha: Weight of positives in the focal loss.

    Example:
        >>> from hf_querydet import AnchorDETRConfig, AnchorDETRForObjectDetection
        >>> config = AnchorDETRConfig(num_labels=3, backbone="resnet18", num_query_positions=100)
        >>> model = AnchorDETRForObjectDetection(config)
    """

    model_type: ClassVar[str] = "querydet_anchor_detr"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    named_configurations: ClassVar[dict[str, dict[str, Any]]] = {
        "r50": {},
        "r50-dc5": {"dilation": True},
        "r101": {"backbone": RESNET101},
        "r101-dc5": {"backbone": RESNET101, "dilation": True},
    }
    published_sizes: ClassVar[dict[str, tuple[float | None, float | None]]] = {
        "r50-dc5": (None, 172),
    }
    derived_from: ClassVar[tuple[str, ...]] = (
        *DetectorConfig.derived_from,
        "num_feature_levels",
        "num_queries",
        *FACTORS,
    )
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *DetectorConfig.keys_to_ignore_at_inference,
        "anchor_points",
        "cross_row_attentions",
        "cross_column_attentions",
        "encoder_row_attentions",
        "encoder_column_attentions",
    ]

    num_query_positions: int = 300
    num_query_patterns: int = 3
    num_queries: int | None = None
    spatial_prior: str = "learned"
    attention_type: str = "row_column"
    average_valid_keys: bool = False
    num_feature_levels: int = 1
    class_cost: float | int = 2.0
    cls_loss_coefficient: float | int = 2.0
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 1024
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 1024
    activation_function: str = "relu"
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    focal_alpha: float | int = 0.25

    @property
    def backbone_stages(self) -> tuple[int, ...]:
        """Stages that the levels are made of, counted from the last."""
        return tuple(range(-max(self.num_feature_levels, 1), 0))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a configuration; see :meth:`DetectorConfig.from_dict`."""
        if any(name in kwargs for name in FACTORS):
            # The stored product belongs to the stored factors.
            config_dict = {name: v for name, v in config_dict.items() if name != "num_queries"}
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        """See :class:`DetectorConfig`."""
        super().__post_init__(**kwargs)
        if self.spatial_prior == "grid" and self.num_query_positions > 0:
            self.num_query_positions = self.grid_side**2
        num_queries = self.num_query_positions * self.num_query_patterns
        if self.num_queries not in (None, num_queries):
            raise ValueError(
                f"num_queries is {self.num_queries}, but it follows from num_query_positions * "
                f"num_query_patterns = {self.num_query_positions} * {self.num_query_patterns}; set "
                "these two instead."
            )
        self.num_queries = num_queries

    @property
    def grid_side(self) -> int:
        """Anchor points in a row of the grid, and rows."""
        return round(self.num_query_positions**0.5)

    def validate_architecture(self) -> None:
        """Check the fields against one another.

        Raises:
            ValueError: Naming the field, its value and what is possible.
        """
        self.check_at_least_1("num_query_positions", "num_query_patterns", "decoder_layers")
        super().validate_architecture()
        self.check_heads("encoder_attention_heads", "decoder_attention_heads")
        self.check_multiple("d_model", NUM_GROUPS, "groups of the normalisation of feature levels")
        for field, choices in (
            ("spatial_prior", SPATIAL_PRIORS),
            ("attention_type", ATTENTION_TYPES),
            ("num_feature_levels", NUMBERS_OF_LEVELS),
        ):
            self.check_choice(field, choices)
        if self.num_feature_levels > 1:
            self._validate_levels()

    def _validate_levels(self) -> None:
        if self.attention_type != "row_column":
            raise ValueError(
                f"num_feature_levels={self.num_feature_levels} needs attention_type='row_column', "
                f"got {self.attention_type!r}."
            )
        if self.encoder_layers % 2:
            raise ValueError(
                "encoder_layers must be even with several feature levels (half within levels, half "
                f"between levels), got {self.encoder_layers}."
            )
