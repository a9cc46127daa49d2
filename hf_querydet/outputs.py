"""What models, losses and post-processing hand to one another."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from hf_querydet.recording import DecoderRecording, LayerRecord


@dataclass
class DetectorModelOutput(ModelOutput):
    """Output of a detector without its prediction heads.

    Attributes:
        last_hidden_state: Object queries after the last decoder layer, (batch, num_queries,
            d_model).
        intermediate_hidden_states: Object queries after every decoder layer as the heads read them,
            (decoder_layers, batch, num_queries, d_model).
        encoder_last_hidden_state: Memory, (batch, num_tokens, d_model).
        decoder_hidden_states: Inputs of all decoder layers and the output of the last, if asked
            for.
        decoder_attentions: Self-attention weights of the queries per layer, (batch, heads,
            num_queries, num_queries), if asked for (needs ``attn_implementation="eager"``).
        cross_attentions: Attention from queries to memory per layer, (batch, heads, num_queries,
            num_tokens), if asked for.
        encoder_hidden_states: Inputs of all encoder layers and the output of the last, if asked
            for.
        encoder_attentions: Encoder self-attention per layer, if asked for.
        layer_records: What each decoder layer starts from and looks at, if a recording is asked
            for.
    """

    last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    layer_records: tuple[LayerRecord, ...] | None = None


@dataclass
class SetPredictions(ModelOutput):
    """Predictions of one or more layers for the same pictures, what the set criterion consumes.

    Attributes:
        logits: (layers, batch, num_queries, num_classes), raw; softmax detectors have one class
            more than labels, the last being "no object".
        pred_boxes: (layers, batch, num_queries, 4), normalised cxcywh.
        is_usable: (batch, num_queries), False = no prediction: never assigned to an object and
            without a loss, in every layer. None if all are predictions.
    """

    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    is_usable: Tensor | None = None


@dataclass
class DetectionOutput(ModelOutput):
    """Output of a detector.

    The first four fields stand in the order that Trainer and the evaluation scripts of the
    ecosystem count on.

    Attributes:
        loss: Weighted sum of all loss terms, scalar, when ``labels`` are given.
        loss_dict: The unweighted terms by name: ``loss_ce``, ``loss_bbox``, ``loss_giou`` for the
            last layer, with suffix ``_0``, ``_1``, ... for the layers before it.
        logits: (batch, num_queries, num_labels), or one column more for softmax detectors.
        pred_boxes: (batch, num_queries, 4), normalised cxcywh relative to the unpadded picture.
        auxiliary_outputs: Predictions of the layers before the last; present when ``labels`` are
            given and ``config.auxiliary_loss`` is on.
        last_hidden_state: See :class:`DetectorModelOutput`, as the fields that follow.
        intermediate_hidden_states: As above.
        encoder_last_hidden_state: As above.
        decoder_hidden_states: As above.
        decoder_attentions: As above.
        cross_attentions: As above.
        encoder_hidden_states: As above.
        encoder_attentions: As above.
        recording: The pass through the decoder, for pictures of why a query fired; if asked for.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    auxiliary_outputs: SetPredictions | None = None
    last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    recording: DecoderRecording | None = None

    def __post_init__(self) -> None:
        """Keep what a pipeline can cut into pictures.

        It rebuilds the output with the entry ``target_size`` and then cuts every entry along its
        first dimension, which counts layers in several of those here.
        """
        if isinstance(self.loss, dict) and "target_size" in self.loss:
            self.loss = {name: self.loss[name] for name in ("target_size", "logits", "pred_boxes")}
        super().__post_init__()
