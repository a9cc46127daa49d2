"""Configuration of Dynamic DETR (ICCV 2021, pp. 2988-2997)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_querydet.configuration_utils import DetectorConfig

# Stages of the backbone that each choice reads, the level of the first one, and so on upwards.
FEATURE_LEVELS = {"p3-p7": (-3, -2, -1), "p2-p6": (-4, -3, -2, -1)}
NUM_FEATURE_LEVELS = 5
# Of the backbone; the canvas is padded to whole multiples of it.
COARSEST_STRIDE = 32
# Of the group normalisation after each convolution of the encoder, as in Dynamic Head.
NUM_GROUPS = 16
CHOICES = {
    "feature_levels": tuple(FEATURE_LEVELS),
    "offset_source": ("middle", "own"),
    "scale_attention": ("channel", "scalar"),
    "encoder_activation": ("dynamic_relu", "relu"),
    "dynamic_mode": ("single", "bottleneck"),
}
FOCAL_CLASS_WEIGHT = 2.0
SOFTMAX_CLASS_WEIGHT = 1.0


@strict
class DynamicDETRConfig(DetectorConfig):
    """Configuration of a Dynamic DETR detector; the defaults are a model of the paper's size.

    Neither code nor weights were published with the paper, so this is a reconstruction. The paper
    states: a ResNet-50 and five feature levels; six encoder layers of deformable convolutions with
    the offsets of the middle level, squeeze-and-excitation and dynamic ReLU; six decoder layers,
    300 queries, self-attention among queries, RoI pooling, one 1x1 convolution whose filter each
    query generates, boxes from coarse to fine; AdamW with a learning rate of 1e-4. All else is
    chosen here, foremost: which five levels (``feature_levels``), the width of the dynamic filter
    (``dynamic_dim``), eight heads, boxes that start at the whole picture and are refined by
    deltas of Sparse R-CNN's kind, and focal classification (``use_focal``) where the paper's
    formula has a softmax.

    The paper's models by name, ``DynamicDETRConfig.from_name("r50-no-encoder")``:

    - ``"r50"``: the defaults. The filter's width of 20 gives the model 58 million parameters, the
      number that is reported for the paper's; 64, as in Sparse R-CNN, gives it 79 million.
    - ``"r50-no-encoder"``: the decoder reads the feature pyramid as it is (``encoder_layers=0``).
    - ``"r50-2-decoder-layers"``: two decoder layers instead of six.

    Fields that every detector has are described in
    :class:`~hf_querydet.configuration_utils.DetectorConfig`.

    Attributes:
        class_cost: Weight of the class term in the matching; by default 2 with focal loss and 1
            with softmax.
        cls_loss_coefficient: Weight of the classification loss, with the same default.
        encoder_layers: Number of encoder layers, also 0.
        offset_source: ``"middle"``: a level's three convolutions share offsets that are predicted
            from that level, as in the paper. ``"own"``: each predicts them from what it reads.
        modulated_offsets: The deformable convolutions also weigh their taps (version 2).
        scale_attention: ``"channel"``: squeeze-and-excitation, a factor per channel.
            ``"scalar"``: a factor per level, as in Dynamic Head.
        encoder_activation: ``"dynamic_relu"`` or ``"relu"``.
        decoder_layers: Number of decoder layers, each of which refines the boxes of the one before.
        decoder_attention_heads: Heads of the self-attention among queries.
        decoder_ffn_dim: Inner size of the decoder's feed-forward blocks.
        activation_function: Activation of the feed-forward blocks.
        dropout: Dropout on the output of each block of the decoder.
        attention_dropout: Dropout on the weights of the self-attention.
        activation_dropout: Dropout inside the feed-forward blocks.
        feature_levels: ``"p3-p7"`` (strides 8 to 128) or ``"p2-p6"`` (strides 4 to 64, four times
            the cells).
        pooling_size: Bins per side that a query's region is pooled to.
        pooling_sampling_ratio: Samples per bin and side.
        dynamic_mode: ``"single"``: one generated filter, ``d_model`` to ``dynamic_dim`` channels,
            as in the paper's formula. ``"bottleneck"``: a second one back to ``d_model``, as in
            Sparse R-CNN.
        dynamic_dim: Channels after the first generated filter; ``d_model`` makes a full matrix.
        use_focal: Independent sigmoid per label with focal loss; otherwise softmax with
            cross-entropy over the labels and "no object"; the image processor has to be told too
            (``DynamicDETRImageProcessor(use_focal=False)``).
        focal_alpha: Weight of positives in the focal loss.
        eos_coefficient: Weight of the "no object" class in the cross-entropy.

    Example:
        >>> from hf_querydet import DynamicDETRConfig, DynamicDETRForObjectDetection
        >>> config = DynamicDETRConfig(num_labels=3, backbone="resnet18", encoder_layers=3)
        >>> model = DynamicDETRForObjectDetection(config)
    """

    model_type: ClassVar[str] = "querydet_dynamic_detr"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "decoder_attention_heads",
        "num_hidden_layers": "decoder_layers",
    }
    named_configurations: ClassVar[dict[str, dict[str, Any]]] = {
        "r50": {},
        "r50-no-encoder": {"encoder_layers": 0},
        "r50-2-decoder-layers": {"decoder_layers": 2},
    }
    published_sizes: ClassVar[dict[str, tuple[float | None, float | None]]] = {
        "r50": (58, None),
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *DetectorConfig.keys_to_ignore_at_inference,
        "intermediate_boxes",
    ]

    num_queries: int = 300
    class_cost: float | int | None = None
    cls_loss_coefficient: float | int | None = None
    encoder_layers: int = 6
    offset_source: str = "middle"
    modulated_offsets: bool = True
    scale_attention: str = "channel"
    encoder_activation: str = "dynamic_relu"
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    feature_levels: str = "p3-p7"
    pooling_size: int = 7
    pooling_sampling_ratio: int = 2
    dynamic_mode: str = "single"
    dynamic_dim: int = 20
    use_focal: bool = True
    focal_alpha: float | int = 0.25
    eos_coefficient: float | int = 0.1

    @property
    def backbone_stages(self) -> tuple[int, ...]:
        """Stages that the levels are made of, counted from the last."""
        # An unknown choice gets its message from validate_architecture.
        return FEATURE_LEVELS.get(self.feature_levels, (-1,))

    @property
    def finest_level(self) -> int:
        """Number of the first level; level k has stride 2 ** k."""
        return int(self.feature_levels[1])

    @property
    def backbone_strides(self) -> list[int]:
        """Strides of the maps that the backbone must give, in pixels."""
        return [stride for stride in (4, 8, 16, COARSEST_STRIDE) if stride >= 2**self.finest_level]

    @property
    def filter_channels(self) -> tuple[int, ...]:
        """Channels after each of the convolutions whose filters a query generates."""
        if self.dynamic_mode == "single":
            return (self.dynamic_dim,)
        return (self.dynamic_dim, self.d_model)

    def __post_init__(self, **kwargs: Any) -> None:
        """See :class:`DetectorConfig`."""
        super().__post_init__(**kwargs)
        weight = FOCAL_CLASS_WEIGHT if self.use_focal else SOFTMAX_CLASS_WEIGHT
        if self.class_cost is None:
            self.class_cost = weight
        if self.cls_loss_coefficient is None:
            self.cls_loss_coefficient = weight

    def validate_architecture(self) -> None:
        """Check the fields against one another.

        Raises:
            ValueError: Naming the field, its value and what is possible.
        """
        super().validate_architecture()
        self.warn_of_untrained_heads()
        for field, choices in CHOICES.items():
            self.check_choice(field, choices)
        self.check_heads("decoder_attention_heads")
        self.check_multiple("d_model", NUM_GROUPS, "groups of the encoder's normalisation")
        self.check_at_least_1(
            "decoder_layers", "pooling_size", "pooling_sampling_ratio", "dynamic_dim"
        )
        stride = getattr(self.backbone_config, "output_stride", None)
        if stride not in (None, COARSEST_STRIDE):
            raise ValueError(
                f"The backbone's last stage has stride {stride} (dilation=True makes it 16), but "
                f"queries read a pyramid whose backbone ends at stride {COARSEST_STRIDE}; set "
                "dilation=False and leave output_stride alone."
            )
