"""Configuration of Sparse R-CNN (arXiv:2011.12450)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_querydet.configuration_utils import RESNET101, DetectorConfig

COARSEST_STRIDE = 32


@strict
class SparseRCNNConfig(DetectorConfig):
    """Configuration of a Sparse R-CNN detector; the defaults are the paper's R50 model.

    The paper's models (Table 1) by name, ``SparseRCNNConfig.from_name("r101-300")``:

    - ``"r50-100"``: 100 proposals, the defaults.
    - ``"r50-300"``: 300 proposals; trained with random crops too.
    - ``"r101-100"``, ``"r101-300"``: the same with ResNet-101.

    They have 80 labels: the authors number COCO's categories without gaps.

    Fields that every detector has are described in
    :class:`~hf_querydet.configuration_utils.DetectorConfig`. ``num_proposals`` is another name of
    ``num_queries``, ``num_hidden_layers`` of ``decoder_layers``. There is no encoder: a proposal
    reads the levels of a feature pyramid, which are made of all stages of the backbone that
    ``backbone_config`` returns. The last of them has to be of stride 32, each before it of half the
    stride of the next.

    Attributes:
        encoder_layers: Always 0.
        decoder_layers: Number of dynamic heads, the stages that refine boxes one after another.
        decoder_attention_heads: Heads of the attention among proposals.
        decoder_ffn_dim: Inner size of the feed-forward blocks.
        activation_function: Activation of the feed-forward blocks.
        dropout: Dropout on the output of each block of a stage. The paper's ablations have 0.1, its
            released models 0.
        attention_dropout: Dropout on attention weights.
        activation_dropout: Dropout inside the feed-forward blocks.
        pooling_size: Bins per side that the features of a box are pooled to.
        pooling_sampling_ratio: Samples per bin and side.
        dynamic_dim: Channels between the two convolutions that a proposal generates.
        class_tower_layers: Hidden layers before the class layer.
        box_tower_layers: Hidden layers before the box layer.
        use_focal: Sigmoid per class with focal loss. Otherwise softmax over the classes and "no
            object" with cross-entropy; the image processor has to be told too
            (``SparseRCNNImageProcessor.for_config(config)``).
        focal_alpha: Weight of positives in the focal loss.
        eos_coefficient: Weight of "no object" in the cross-entropy, where there is no focal loss.

    Example:
        >>> from hf_querydet import SparseRCNNConfig, SparseRCNNForObjectDetection
        >>> config = SparseRCNNConfig(num_labels=3, backbone="resnet18", num_proposals=50)
        >>> model = SparseRCNNForObjectDetection(config)
    """

    model_type: ClassVar[str] = "querydet_sparse_rcnn"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "decoder_attention_heads",
        "num_hidden_layers": "decoder_layers",
        "num_proposals": "num_queries",
    }
    backbone_stages: ClassVar[tuple[int, ...]] = (-4, -3, -2, -1)
    named_configurations: ClassVar[dict[str, dict[str, Any]]] = {
        "r50-100": {},
        "r50-300": {"num_queries": 300},
        "r101-100": {"backbone": RESNET101},
        "r101-300": {"backbone": RESNET101, "num_queries": 300},
    }
    named_num_labels: ClassVar[int] = 80
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *DetectorConfig.keys_to_ignore_at_inference,
        "intermediate_boxes",
    ]

    class_cost: float | int = 2.0
    cls_loss_coefficient: float | int = 2.0
    encoder_layers: int = 0
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    pooling_size: int = 7
    pooling_sampling_ratio: int = 2
    dynamic_dim: int = 64
    class_tower_layers: int = 1
    box_tower_layers: int = 3
    use_focal: bool = True
    focal_alpha: float | int = 0.25
    eos_coefficient: float | int = 0.1

    def validate_architecture(self) -> None:
        """Check the fields against one another.

        Raises:
            ValueError: Naming the field, its value and what is possible.
        """
        super().validate_architecture()
        self.warn_of_untrained_heads()
        if self.encoder_layers != 0:
            raise ValueError(
                f"encoder_layers must be 0, Sparse R-CNN has no encoder, got {self.encoder_layers}."
            )
        self.check_heads("decoder_attention_heads")
        self.check_at_least_1(
            "decoder_layers", "pooling_size", "pooling_sampling_ratio", "dynamic_dim"
        )
        for field in ("class_tower_layers", "box_tower_layers"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}.")
        stride = getattr(self.backbone_config, "output_stride", None)
        if stride not in (None, COARSEST_STRIDE):
            raise ValueError(
                f"The backbone's last stage has stride {stride} (dilation=True makes it 16), but "
                f"proposals are pooled from a pyramid whose last level has {COARSEST_STRIDE}; set "
                "dilation=False and leave output_stride alone."
            )
