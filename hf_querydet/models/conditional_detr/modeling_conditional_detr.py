"""Conditional DETR for fast training convergence (arXiv:2108.06152).

In DETR's cross-attention, the content of a query has to tell where the ends of its object are, and
content that can do so takes hundreds of epochs to learn. Here a query also says where it looks, in
a part of its own. What differs from DETR:

- Every object query predicts a reference point, and its boxes are placed around that point.
- In cross-attention, content and spatial parts stand side by side, so each has a score of its own.
- The spatial part of a query is the sine embedding of its reference point, scaled channel by
  channel by what the query has found so far. This is the condition: each head can turn to another
  region near the point, for instance to one side of the object.
- Classes are independent sigmoids with focal loss, for 300 queries.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from hf_querydet.layers.backbone import Backbone
from hf_querydet.layers.dropout import Dropout
from hf_querydet.layers.feed_forward import MLP, FeedForward
from hf_querydet.layers.initialization import init_box_head, init_focal_prior
from hf_querydet.layers.position_embedding import (
    LearnedPositionEmbedding,
    SinePositionEmbedding,
    sine_features,
)
from hf_querydet.layers.projection import project_map
from hf_querydet.layers.transformer import TransformerEncoderLayer, encode
from hf_querydet.losses import FocalClassification
from hf_querydet.modeling_utils import (
    DetectorPreTrainedModel,
    ObjectDetectionMixin,
    build_criterion,
)
from hf_querydet.models.conditional_detr.conditional_attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
)
from hf_querydet.models.conditional_detr.configuration_conditional_detr import (
    ConditionalDETRConfig,
)
from hf_querydet.ops.boxes import place_boxes
from hf_querydet.outputs import DetectionOutput, DetectorModelOutput, SetPredictions
from hf_querydet.recording import DotProductRecord, LayerRecord


@dataclass
class ConditionalDETRModelOutput(DetectorModelOutput):
    """Output of :class:`ConditionalDETRModel`.

    Attributes:
        reference_points: Where each query starts to look and around which its box is placed,
            (batch, num_queries, 2), normalised (x, y), at least float32. The same in all layers and
            for all pictures.
    """

    reference_points: Tensor | None = None


@dataclass
class ConditionalDETRDetectionOutput(DetectionOutput):
    """Output of :class:`ConditionalDETRForObjectDetection`.

    Attributes:
        reference_points: See :class:`ConditionalDETRModelOutput`.
    """

    reference_points: Tensor | None = None


class ConditionalDETRDecoderLayer(GradientCheckpointingLayer):
    """Self-attention among queries, conditional cross-attention, feed-forward; post-norm each."""

    def __init__(self, config: ConditionalDETRConfig, *, is_first: bool) -> None:
        super().__init__()
        self.self_attention = ConditionalSelfAttention(
            config,
            hidden_size=config.d_model,
            num_heads=config.decoder_attention_heads,
            dropout=config.attention_dropout,
        )
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = ConditionalCrossAttention(
            config,
            hidden_size=config.d_model,
            num_heads=config.decoder_attention_heads,
            dropout=config.attention_dropout,
            add_positions=is_first,
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
        query_position_embeddings: Tensor,
        spatial_queries: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        memory_mask: Tensor | None = None,
        record_shape: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, DotProductRecord | None]:
        """Update the queries.

        Args:
            object_queries: Content, (batch, num_queries, d_model).
            query_position_embeddings: Same shape.
            spatial_queries: Same shape, the conditional spatial queries.
            memory: (batch, num_tokens, d_model).
            memory_positions: Same shape, or with a batch of 1.
            memory_mask: (batch, 1, 1, num_tokens), True = attend.
            record_shape: One level, height and width of the map, if a record is wanted.

        Returns:
            Queries of the same shape; the weights of self-attention and of cross-attention if the
            attention implementation returns them; the record of where they look, if wanted.
        """
        # Self-attention
        update, self_weights = self.self_attention(object_queries, query_position_embeddings)
        object_queries = self.self_attention_norm(object_queries + self.dropout(update))
        # Attention to the picture
        inputs = (
            object_queries,
            query_position_embeddings,
            spatial_queries,
            memory,
            memory_positions,
        )
        update, cross_weights = self.cross_attention(*inputs, memory_mask)
        record = None
        if record_shape is not None:
            record = self.cross_attention.record(record_shape, *inputs, attention_mask=memory_mask)
        object_queries = self.cross_attention_norm(object_queries + self.dropout(update))
        # Feed-forward
        return self.feed_forward(object_queries), self_weights, cross_weights, record


class ConditionalDETRPreTrainedModel(DetectorPreTrainedModel):
    """Base class of the Conditional DETR models."""

    config: ConditionalDETRConfig
    _no_split_modules = ("Backbone", "TransformerEncoderLayer", "ConditionalDETRDecoderLayer")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As :meth:`DetectorPreTrainedModel._init_weights`, with the values of these authors."""
        super()._init_weights(module)
        if isinstance(module, ConditionalSelfAttention | ConditionalCrossAttention):
            for projection in module.children():
                init.xavier_uniform_(projection.weight)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, ConditionalDETRModel):
            for head in (module.reference_point_head, module.query_scale):
                for layer in [] if head is None else head.layers:
                    init.xavier_uniform_(layer.weight)
        elif isinstance(module, ConditionalDETRForObjectDetection):
            init_focal_prior(module.class_head)
            init_box_head(module.box_head)


class ConditionalDETRModel(ConditionalDETRPreTrainedModel):
    """Backbone, encoder and decoder of Conditional DETR, without heads."""

    def __init__(self, config: ConditionalDETRConfig) -> None:
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
        self.reference_point_head = MLP(
            input_size=config.d_model, hidden_size=config.d_model, output_size=2, num_layers=2
        )
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
            ConditionalDETRDecoderLayer(config, is_first=index == 0)
            for index in range(config.decoder_layers)
        )
        # The first layer has no use for it, and a parameter without gradient stops training on
        # several processes.
        self.query_scale = (
            MLP(
                input_size=config.d_model,
                hidden_size=config.d_model,
                output_size=config.d_model,
                num_layers=2,
            )
            if config.decoder_layers > 1
            else None
        )
        if self.query_scale is None:
            # Other files have it all the same.
            self._keys_to_ignore_on_load_unexpected = {
                *(self._keys_to_ignore_on_load_unexpected or ()),
                r"\bquery_scale\.",
            }
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
    ) -> ConditionalDETRModelOutput:
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

        # Encoder
        memory, encoder_states, encoder_attentions = encode(
            self.encoder_layers,
            memory,
            positions,
            memory_mask,
            keep_states=output_hidden_states,
            keep_weights=output_attentions,
        )

        # Queries: content starts at zero, a query's identity and its reference point come from its
        # position embedding
        query_positions = self.query_position_embeddings.weight.to(memory.dtype)
        query_positions = query_positions.expand(memory.shape[0], -1, -1)
        object_queries = torch.zeros_like(query_positions)
        reference_points = self._reference_points(query_positions)
        point_embeddings = self._embed_points(reference_points).to(memory.dtype)

        # Decoder
        decoder_states, normed_states = [object_queries], []
        decoder_attentions, cross_attentions, layer_records = [], [], []
        record_shape = (1, *features.map_size) if output_recording else None
        for index, layer in enumerate(self.decoder_layers):
            # The condition. The first layer's queries have found nothing yet that could scale it.
            spatial_queries = point_embeddings
            if index > 0:
                spatial_queries = self.query_scale(object_queries) * point_embeddings
            object_queries, self_weights, cross_weights, record = layer(
                object_queries,
                query_positions,
                spatial_queries,
                memory,
                positions,
                memory_mask,
                record_shape,
            )
            if output_recording:
                layer_records.append(
                    LayerRecord(record, reference_points=reference_points.detach())
                )
            decoder_states.append(object_queries)
            # The norm makes a copy for the heads. Neither the next layer nor its scale reads it, or
            # asking for auxiliary outputs would change the last one.
            normed_states.append(self.decoder_norm(object_queries))
            decoder_attentions.append(self_weights)
            cross_attentions.append(cross_weights)

        return ConditionalDETRModelOutput(
            last_hidden_state=normed_states[-1],
            intermediate_hidden_states=torch.stack(normed_states),
            encoder_last_hidden_state=memory,
            decoder_hidden_states=tuple(decoder_states) if output_hidden_states else None,
            decoder_attentions=tuple(decoder_attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
            encoder_hidden_states=tuple(encoder_states) if output_hidden_states else None,
            encoder_attentions=tuple(encoder_attentions) if output_attentions else None,
            reference_points=reference_points,
            layer_records=tuple(layer_records) if output_recording else None,
        )

    def _reference_points(self, query_positions: Tensor) -> Tensor:
        """(batch, num_queries, 2), at least float32: half types are too coarse for positions."""
        points = self.reference_point_head(query_positions)
        return points.to(torch.promote_types(points.dtype, torch.float32)).sigmoid()

    def _embed_points(self, points: Tensor) -> Tensor:
        """(..., 2) to (..., d_model), in the layout of the cells' embedding: first y, then x."""
        angles = points.flip(-1) * (2 * math.pi)
        return sine_features(angles, self.config.d_model // 2).flatten(-2)


class ConditionalDETRForObjectDetection(ObjectDetectionMixin, ConditionalDETRPreTrainedModel):
    """Conditional DETR with its class head and box head, which all decoder layers share."""

    output_class = ConditionalDETRDetectionOutput

    def __init__(self, config: ConditionalDETRConfig) -> None:
        super().__init__(config)
        self.model = ConditionalDETRModel(config)
        self.class_head = nn.Linear(config.d_model, config.num_labels)
        self.box_head = MLP(
            input_size=config.d_model, hidden_size=config.d_model, output_size=4, num_layers=3
        )
        self.criterion = build_criterion(config, FocalClassification(alpha=config.focal_alpha))
        self.post_init()

    def predict(self, outputs: ConditionalDETRModelOutput, first_layer: int) -> SetPredictions:
        """See :meth:`ObjectDetectionMixin.predict`."""
        hidden_states = outputs.intermediate_hidden_states[first_layer:]
        points = outputs.reference_points
        # At least float32, as the points that the boxes are placed around.
        deltas = self.box_head(hidden_states).to(points.dtype)
        return SetPredictions(
            logits=self.class_head(hidden_states),
            pred_boxes=place_boxes(deltas, points.expand(len(deltas), -1, -1, -1)),
        )
