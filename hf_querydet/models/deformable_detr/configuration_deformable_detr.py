"""Configuration of Deformable DETR (arXiv:2010.04159)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_querydet.configuration_utils import (
    POSITION_EMBEDDING_TYPES,
    RESNET101,
    DetectorConfig,
    stages_of_levels,
)
from hf_querydet.layers.projection import NUM_GROUPS

CLASS_COST = 2.0


@strict
class DeformableDETRConfig(DetectorConfig):
    """Configuration of a Deformable DETR detector; the defaults are the paper's R50 model.

    The paper's models by name, ``DeformableDETRConfig.from_name("r50-two-stage")``:

    - ``"r50"``: four feature levels, the defaults.
    - ``"r50-single-scale"``, ``"r50-single-scale-dc5"``: one level of stride 32 or 16.
    - ``"r50-refine"``: with iterative box refinement.
    - ``"r50-two-stage"``: refinement, and queries from the encoder's proposals.
    - ``"r101-two-stage"``, ``"resnext101-two-stage"``: the same with deeper backbones. The paper's
      best row also has deformable convolutions in its backbone, which timm does not offer.

    Fields that every detector has are described in
    :class:`~hf_querydet.configuration_utils.DetectorConfig`.

    transformers' class differs from the authors in weights of matching and loss (its class terms
    count 1, here 2 as in the authors' code) and in ``attention_dropout`` and
    ``activation_dropout`` (0 there; the authors apply their one dropout rate there too). A
    configuration file of transformers is read with the class cost of the authors, because nobody
    has chosen the other one.

    Attributes:
        encoder_layers: Number of encoder layers.
        encoder_attention_heads: Heads of each encoder attention.
        encoder_ffn_dim: Inner size of the encoder's feed-forward blocks.
        encoder_n_points: Points that an encoder attention samples per head and level.
        decoder_layers: Number of decoder layers.
        decoder_attention_heads: Heads of each decoder attention.
        decoder_ffn_dim: Inner size of the decoder's feed-forward blocks.
        decoder_n_points: Points that a cross-attention samples per head and level.
        activation_function: Activation of the feed-forward blocks.
        dropout: Dropout on the output of each attention and feed-forward block.
        attention_dropout: Dropout on the weights of the self-attention among queries.
        activation_dropout: Dropout inside the feed-forward blocks.
        position_embedding_type: ``"sine"`` (fixed) or ``"learned"`` (at most 50 cells a side).
        num_feature_levels: Levels of features. Up to three are stages of the backbone, counted from
            its last; further ones are made by strided convolutions.
        with_box_refine: Every decoder layer has heads of its own and refines the boxes of the one
            before. Without it one head serves all layers.
        two_stage: Object queries come from the best of the encoder's own proposals. Needs
            ``with_box_refine``.
        two_stage_num_proposals: Object queries of a two-stage detector, whose ``num_queries``
            follows this field.
        focal_alpha: Weight of positives in the focal loss.

    Example:
        >>> from hf_querydet import DeformableDETRConfig, DeformableDETRForObjectDetection
        >>> config = DeformableDETRConfig(num_labels=3, backbone="resnet18", with_box_refine=True)
        >>> model = DeformableDETRForObjectDetection(config)
    """

    model_type: ClassVar[str] = "querydet_deformable_detr"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    named_configurations: ClassVar[dict[str, dict[str, Any]]] = {
        "r50": {},
        "r50-single-scale": {"num_feature_levels": 1},
        "r50-single-scale-dc5": {"num_feature_levels": 1, "dilation": True},
        "r50-refine": {"with_box_refine": True},
        "r50-two-stage": {"with_box_refine": True, "two_stage": True},
        "r101-two-stage": {"backbone": RESNET101, "with_box_refine": True, "two_stage": True},
        "resnext101-two-stage": {
            "backbone": "resnext101_64x4d.tv_in1k",
            "with_box_refine": True,
            "two_stage": True,
        },
    }
    published_sizes: ClassVar[dict[str, tuple[float | None, float | None]]] = {
        "r50": (40, 173),
        "r50-single-scale": (34, 78),
        "r50-single-scale-dc5": (34, 128),
        "r50-refine": (41, 173),
        "r50-two-stage": (41, 173),
    }
    derived_from: ClassVar[tuple[str, ...]] = (
        *DetectorConfig.derived_from,
        "num_feature_levels",
        "two_stage",
        "two_stage_num_proposals",
    )
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *DetectorConfig.keys_to_ignore_at_inference,
        "intermediate_boxes",
        "encoder_predictions",
        "cross_sampling_locations",
    ]

    num_queries: int = 300
    class_cost: float | int = CLASS_COST
    cls_loss_coefficient: float | int = 2.0
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 1024
    encoder_n_points: int = 4
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 1024
    decoder_n_points: int = 4
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    position_embedding_type: str = "sine"
    num_feature_levels: int = 4
    with_box_refine: bool = False
    two_stage: bool = False
    two_stage_num_proposals: int = 300
    focal_alpha: float | int = 0.25

    @property
    def backbone_stages(self) -> tuple[int, ...]:
        """Stages that the levels are made of, counted from the last."""
        return stages_of_levels(self.num_feature_levels)

    def __post_init__(self, **kwargs: Any) -> None:
        """See :class:`DetectorConfig`."""
        is_foreign = kwargs.get("model_type", "") not in ("", self.model_type)
        super().__post_init__(**kwargs)
        if is_foreign:
            self.class_cost = CLASS_COST
        if self.two_stage:
            self.num_queries = self.two_stage_num_proposals

    def validate_architecture(self) -> None:
        """Check the fields against one another.

        Raises:
            ValueError: Naming the field, its value and what is possible.
        """
        super().validate_architecture()
        if self.with_box_refine:
            self.warn_of_untrained_heads()
        self.check_heads("encoder_attention_heads", "decoder_attention_heads")
        self.check_multiple("d_model", NUM_GROUPS, "groups of the normalisation of feature levels")
        self.check_at_least_1(
            "num_feature_levels",
            "encoder_n_points",
            "decoder_n_points",
            "decoder_layers",
            "two_stage_num_proposals",
        )
        if self.two_stage and not self.with_box_refine:
            raise ValueError(
                "two_stage=True needs with_box_refine=True: the decoder starts from boxes, which "
                "its layers refine; got with_box_refine=False."
            )
        if self.two_stage and self.num_queries != self.two_stage_num_proposals:
            raise ValueError(
                f"num_queries is {self.num_queries}, but with two_stage=True it follows from "
                f"two_stage_num_proposals = {self.two_stage_num_proposals}; set that instead."
            )
        self.check_choice("position_embedding_type", POSITION_EMBEDDING_TYPES)
