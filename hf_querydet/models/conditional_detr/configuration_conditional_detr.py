"""Configuration of Conditional DETR (arXiv:2108.06152)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_querydet.configuration_utils import POSITION_EMBEDDING_TYPES, RESNET101, DetectorConfig


@strict
class ConditionalDETRConfig(DetectorConfig):
    """Configuration of a Conditional DETR detector; the defaults are the paper's R50 model.

    The paper's models by name, ``ConditionalDETRConfig.from_name("r101-dc5")``:

    - ``"r50"``: stride 32, the defaults.
    - ``"r50-dc5"``: last stage dilated, stride 16 (``dilation=True``).
    - ``"r101"``, ``"r101-dc5"``: the same with ResNet-101.

    Fields that every detector has are described in
    :class:`~hf_querydet.configuration_utils.DetectorConfig`.

    transformers' class differs from the authors in ``attention_dropout`` and
    ``activation_dropout``, which are 0 there; here they follow the authors' code, which applies its
    one dropout rate there too. Its loss does not read ``cls_loss_coefficient``; here it does. The
    pre-norm option of the authors' code stops with an error there and is not offered.

    Attributes:
        encoder_layers: Number of encoder layers.
        encoder_attention_heads: Heads of each encoder attention.
        encoder_ffn_dim: Inner size of the encoder's feed-forward blocks.
        decoder_layers: Number of decoder layers.
        decoder_attention_heads: Heads of each decoder attention.
        decoder_ffn_dim: Inner size of the decoder's feed-forward blocks.
        activation_function: Activation of the feed-forward blocks.
        dropout: Dropout on the output of each attention and feed-forward block.
        attention_dropout: Dropout on attention weights.
        activation_dropout: Dropout inside the feed-forward blocks.
        position_embedding_type: ``"sine"`` (fixed) or ``"learned"`` (at most 50 cells a side), of
            the cells. The embedding of reference points is always the sine one.
        focal_alpha: Weight of positives in the focal loss.

    Example:
        >>> from hf_querydet import ConditionalDETRConfig, ConditionalDETRForObjectDetection
        >>> config = ConditionalDETRConfig(num_labels=3, backbone="resnet18")
        >>> model = ConditionalDETRForObjectDetection(config)
    """

    model_type: ClassVar[str] = "querydet_conditional_detr"
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
        "r50": (44, 90),
        "r50-dc5": (44, 195),
        "r101": (63, 156),
        "r101-dc5": (63, 262),
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *DetectorConfig.keys_to_ignore_at_inference,
        "reference_points",
    ]

    num_queries: int = 300
    class_cost: float | int = 2.0
    cls_loss_coefficient: float | int = 2.0
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    position_embedding_type: str = "sine"
    focal_alpha: float | int = 0.25

    def validate_architecture(self) -> None:
        """Check the fields against one another.

        Raises:
            ValueError: Naming the field, its value and what is possible.
        """
        super().validate_architecture()
        self.check_heads("encoder_attention_heads", "decoder_attention_heads")
        self.check_multiple("d_model", 4, "sine and cosine of two axes")
        self.check_at_least_1("decoder_layers")
        self.check_choice("position_embedding_type", POSITION_EMBEDDING_TYPES)
