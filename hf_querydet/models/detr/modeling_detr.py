"""DETR, end-to-end object detection with transformers (arXiv:2005.12872), Fig. 2 and Fig. 10.

A backbone, a transformer encoder over the cells of its last map, a decoder that turns learned
object queries into objects, and two heads. Positions are added to query and key of every
attention, never to the value; or once, to what encoder and decoder start from (Table 3).
"""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from hf_querydet.layers.attention import MultiHeadAttention
from hf_querydet.layers.backbone import Backbone
from hf_querydet.layers.dropout import Dropout
from hf_querydet.layers.feed_forward import MLP, FeedForward
from hf_querydet.layers.position_embedding import (
    LearnedPositionEmbedding,
    SinePositionEmbedding,
    add_positions,
)
from hf_querydet.layers.projection import project_map
from hf_querydet.layers.transformer import TransformerEncoderLayer, encode
from hf_querydet.losses import SoftmaxClassification
from hf_querydet.modeling_utils import (
    DetectorPreTrainedModel,
    ObjectDetectionMixin,
    build_criterion,
)
from hf_querydet.models.detr.configuration_detr import DETRConfig
from hf_querydet.outputs import DetectorModelOutput, SetPredictions
from hf_querydet.recording import DotProductRecord, LayerRecord


class DETRDecoderLayer(GradientCheckpointingLayer):
    """Self-attention among queries, attention to the memory, feed-forward; post-norm each."""

    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(
            config,
            hidden_size=config.d_model,
            num_heads=config.decoder_attention_heads,
            dropout=config.attention_dropout,
        )
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = MultiHeadAttention(
            config,
            hidden_size=config.d_model,
            num_heads=config.decoder_attention_heads,
            dropout=config.attention_dropout,
        )
        self.cross_attention_norm = nn.LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout)
        self.feed_forward = FeedForward(
            hidden_size=config.d_model,
            inner_size=config.decoder_ffn_dim,
            activation=config.activation_function,
            dropout=config.dropout,
            activation_dropout=config.activation_dropout,
        )

    def forward(
        self,
        object_queries: Tensor,
        query_position_embeddings: Tensor | None,
        memory: Tensor,
        memory_with_positions: Tensor,
        memory_mask: Tensor | None = None,
        record_shape: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, DotProductRecord | None]:
        """Update the queries.

        Args:
            object_queries: Content, (batch, num_queries, d_model).
            query_position_embeddings: Same shape; None if the content holds them.
            memory: (batch, num_tokens, d_model), the values.
            memory_with_positions: Same shape, the keys.
            memory_mask: (batch, 1, 1, num_tokens), True = attend.
            record_shape: One level, height and width of the map, if a record is wanted.

        Returns:
            Queries of the same shape; the weights of self-attention and of cross-attention if the
            attention implementation returns them; the record of where they look, if wanted.
        """
        # Self-attention
        query_and_key = add_positions(object_queries, query_position_embeddings)
        update, self_weights = self.self_attention(query_and_key, query_and_key, object_queries)
        object_queries = self.self_attention_norm(object_queries + self.dropout(update))
        # Attention to the picture
        query = add_positions(object_queries, query_position_embeddings)
        update, cross_weights = self.cross_attention(
            query, memory_with_positions, memory, memory_mask
        )
        record = None
        if record_shape is not None:
            with torch.no_grad():
                query, key = self.cross_attention.project(query, memory_with_positions)
            record = DotProductRecord(query, key, memory_mask, record_shape, parts={})
        object_queries = self.cross_attention_norm(object_queries + self.dropout(update))
        # Feed-forward
        return self.feed_forward(object_queries), self_weights, cross_weights, record


class DETRPreTrainedModel(DetectorPreTrainedModel):
    """Base class of the DETR models."""

    config: DETRConfig
    _no_split_modules = ("Backbone", "TransformerEncoderLayer", "DETRDecoderLayer")


class DETRModel(DETRPreTrainedModel):
    """Backbone, encoder and decoder of DETR, without heads."""

    def __init__(self, config: DETRConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(
            config.backbone_config,
            pretrained=config.use_pretrained_backbone,
            norm=config.backbone_norm,
            num_frozen_stages=config.frozen_backbone_stages,
        )
        self.input_projection = nn.Conv2d(self.backbone.channels[-1], config.d_model, kernel_size=1)
        self.position_embedding = (
            SinePositionEmbedding(config.d_model)
            if config.position_embedding_type == "sine"
            else LearnedPositionEmbedding(config.d_model)
        )
        self.query_position_embeddings = nn.Embedding(config.num_queries, config.d_model)
        self.encoder_layers = nn.ModuleList(
            TransformerEncoderLayer(
                config,
                hidden_size=config.d_model,
                num_heads=config.encoder_attention_heads,
                inner_size=config.encoder_ffn_dim,
                activation=config.activation_function,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
            )
            for _ in range(config.encoder_layers)
        )
        self.decoder_layers = nn.ModuleList(
            DETRDecoderLayer(config) for _ in range(config.decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(config.d_model)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_recording: bool = False,
        **kwargs: object,
    ) -> DetectorModelOutput:
        """Turn pictures into object queries.

        Args:
            pixel_values: (batch, channels, height, width), normalised colours.
            pixel_mask: (batch, height, width), 1 = picture, 0 = padding; None if nothing is padded.
            output_attentions: Return attention weights (with ``attn_implementation="eager"``).
            output_hidden_states: Return the states between the layers.
            output_recording: Return what each decoder layer starts from and looks at, see
                :mod:`hf_querydet.recording`.
            kwargs: Of the ecosystem's trainers and tests, of no effect.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        # Features: (batch, channels, h, w) to tokens (batch, h * w, d_model)
        features = project_map(
            self.backbone(pixel_values, pixel_mask)[-1],
            self.input_projection,
            self.position_embedding,
        )
        memory, positions = features.tokens, features.positions
        memory_mask = features.attention_mask
        # Queries: content and position
        query_positions = self.query_position_embeddings.weight.to(memory.dtype)
        query_positions = query_positions.expand(memory.shape[0], -1, -1)
        object_queries = torch.zeros_like(query_positions)
        if self.config.position_embeddings_at == "input":
            memory, positions = memory + positions, None
            object_queries, query_positions = query_positions, None

        # Encoder
        memory, encoder_states, encoder_attentions = encode(
            self.encoder_layers,
            memory,
            positions,
            memory_mask,
            keep_states=output_hidden_states,
            keep_weights=output_attentions,
        )

        # Decoder
        memory_with_positions = add_positions(memory, positions)
        decoder_states, normed_states = [object_queries], []
        decoder_attentions, cross_attentions, layer_records = [], [], []
        record_shape = (1, *features.map_size) if output_recording else None
        for layer in self.decoder_layers:
            object_queries, self_weights, cross_weights, record = layer(
                object_queries,
                query_positions,
                memory,
                memory_with_positions,
                memory_mask,
                record_shape,
            )
            if output_recording:
                layer_records.append(LayerRecord(record))
            decoder_states.append(object_queries)
            # The norm makes a copy for the heads. What enters the next layer is not normed by it,
            # or asking for auxiliary outputs would change the last one.
            normed_states.append(self.decoder_norm(object_queries))
            decoder_attentions.append(self_weights)
            cross_attentions.append(cross_weights)

        return DetectorModelOutput(
            last_hidden_state=normed_states[-1],
            intermediate_hidden_states=torch.stack(normed_states),
            encoder_last_hidden_state=memory,
            decoder_hidden_states=tuple(decoder_states) if output_hidden_states else None,
            decoder_attentions=tuple(decoder_attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
            encoder_hidden_states=tuple(encoder_states) if output_hidden_states else None,
            encoder_attentions=tuple(encoder_attentions) if output_attentions else None,
            layer_records=tuple(layer_records) if output_recording else None,
        )


class DETRForObjectDetection(ObjectDetectionMixin, DETRPreTrainedModel):
    """DETR with its class head and box head, which all decoder layers share."""

    def __init__(self, config: DETRConfig) -> None:
        super().__init__(config)
        self.model = DETRModel(config)
        self.class_head = nn.Linear(config.d_model, config.num_labels + 1)  # and "no object"
        self.box_head = MLP(
            input_size=config.d_model, hidden_size=config.d_model, output_size=4, num_layers=3
        )
        self.criterion = build_criterion(
            config, SoftmaxClassification(no_object_weight=config.eos_coefficient)
        )
        self.post_init()

    def predict(self, outputs: DetectorModelOutput, first_layer: int) -> SetPredictions:
        """See :meth:`ObjectDetectionMixin.predict`."""
        hidden_states = outputs.intermediate_hidden_states[first_layer:]
        boxes = self.box_head(hidden_states)
        # At least float32: half types are too coarse for boxes.
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).sigmoid()
        return SetPredictions(logits=self.class_head(hidden_states), pred_boxes=boxes)
