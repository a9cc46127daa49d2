"""The encoder, and the decoder layer, that Deformable DETR and Efficient DETR share."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_querydet.layers.attention import MultiHeadAttention
from hf_querydet.layers.deformable_attention import MultiScaleDeformableAttention
from hf_querydet.layers.dropout import Dropout
from hf_querydet.layers.feature_levels import reference_grid
from hf_querydet.layers.feed_forward import FeedForward
from hf_querydet.layers.projection import LevelFeatures
from hf_querydet.layers.transformer import encode


class DeformableTransformerEncoderLayer(GradientCheckpointingLayer):
    """Post-norm encoder layer: deformable self-attention over all levels, then feed-forward.

    Deformable DETR (arXiv:2010.04159), Sec. 4.1, "Deformable Transformer Encoder".

    Args:
        hidden_size: Channels of a token.
        num_heads: Attention heads.
        num_levels: Feature levels.
        num_points: Sampled points per head and level.
        inner_size: Inner channels of the feed-forward block.
        activation: Activation of the feed-forward block.
        dropout: Dropout on the output of both blocks.
        activation_dropout: Dropout inside the feed-forward block.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        inner_size: int,
        activation: str,
        dropout: float,
        activation_dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = MultiScaleDeformableAttention(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
        )
        self.dropout = Dropout(dropout)
        self.self_attention_norm = nn.LayerNorm(hidden_size)
        self.feed_forward = FeedForward(
            hidden_size=hidden_size,
            inner_size=inner_size,
            activation=activation,
            dropout=dropout,
            activation_dropout=activation_dropout,
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode tokens.

        Args:
            hidden_states: All levels, (batch, num_tokens, hidden_size).
            position_embeddings: Of place and level, broadcastable to the same shape.
            reference_points: (batch, num_tokens, num_levels, 2), normalised (x, y) in each level.
            spatial_shapes: (height, width) of every level, in cells.
            padding_mask: (batch, num_tokens), True = padding.

        Returns:
            Tokens of the same shape, and the attention weights (batch, num_tokens, num_heads,
            num_levels, num_points).
        """
        update, _, weights = self.self_attention(
            hidden_states + position_embeddings,
            hidden_states,
            spatial_shapes,
            reference_points=reference_points,
            padding_mask=padding_mask,
        )
        hidden_states = self.self_attention_norm(hidden_states + self.dropout(update))
        return self.feed_forward(hidden_states), weights


def encode_levels(
    layers: Iterable[DeformableTransformerEncoderLayer],
    features: LevelFeatures,
    *,
    keep_states: bool,
    keep_weights: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run the encoder.

    Args:
        layers: In their order.
        features: Tokens of all levels, and where they are.
        keep_states: See :func:`~hf_querydet.layers.transformer.encode`.
        keep_weights: As above.

    Returns:
        As above.
    """
    return encode(
        layers,
        features.tokens,
        features.positions,
        reference_grid(features.spatial_shapes, features.valid_ratios),
        features.spatial_shapes,
        features.padding_mask,
        keep_states=keep_states,
        keep_weights=keep_weights,
    )


class DeformableTransformerDecoderLayer(GradientCheckpointingLayer):
    """Post-norm decoder layer: self-attention, deformable attention to the memory, feed-forward.

    Deformable DETR (arXiv:2010.04159), Sec. 4.1, "Deformable Transformer Decoder".

    Args:
        config: For the implementation of the self-attention, see
            :class:`~hf_querydet.layers.attention.MultiHeadAttention`.
        hidden_size: Channels of queries and memory.
        num_heads: Heads of both attentions.
        num_levels: Feature levels.
        num_points: Sampled points per head and level.
        inner_size: Inner channels of the feed-forward block.
        activation: Activation of the feed-forward block.
        dropout: Dropout on the output of all three blocks.
        attention_dropout: Dropout on the weights of the self-attention.
        activation_dropout: Dropout inside the feed-forward block.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        hidden_size: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        inner_size: int,
        activation: str,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(
            config, hidden_size=hidden_size, num_heads=num_heads, dropout=attention_dropout
        )
        self.self_attention_norm = nn.LayerNorm(hidden_size)
        self.cross_attention = MultiScaleDeformableAttention(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
        )
        self.cross_attention_norm = nn.LayerNorm(hidden_size)
        self.dropout = Dropout(dropout)
        self.feed_forward = FeedForward(
            hidden_size=hidden_size,
            inner_size=inner_size,
            activation=activation,
            dropout=dropout,
            activation_dropout=activation_dropout,
        )

    def forward(
        self,
        object_queries: Tensor,
        query_position_embeddings: Tensor,
        memory: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        reference_points: Tensor | None,
        reference_boxes: Tensor | None,
        padding_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Update the queries.

        Args:
            object_queries: Content, (batch, num_queries, hidden_size).
            query_position_embeddings: Same shape.
            memory: (batch, num_tokens, hidden_size).
            spatial_shapes: (height, width) of every level.
            reference_points: (batch, num_queries, num_levels, 2), normalised (x, y) in each level.
            reference_boxes: (batch, num_queries, num_levels, 4), cxcywh, instead of the points.
            padding_mask: (batch, num_tokens), True = padding.
            query_mask: (batch, num_queries), False = no other query attends to it; None if all
                are attended to.

        Returns:
            Queries of the same shape; the weights of self-attention if the attention implementation
            returns them; sampling locations and weights of the cross-attention, see
            :class:`~hf_querydet.layers.deformable_attention.MultiScaleDeformableAttention`.
        """
        # Self-attention
        query_and_key = object_queries + query_position_embeddings
        attention_mask = None if query_mask is None else query_mask[:, None, None, :]
        update, self_weights = self.self_attention(
            query_and_key, query_and_key, object_queries, attention_mask
        )
        object_queries = self.self_attention_norm(object_queries + self.dropout(update))
        # Attention to the picture
        update, locations, cross_weights = self.cross_attention(
            object_queries + query_position_embeddings,
            memory,
            spatial_shapes,
            reference_points=reference_points,
            reference_boxes=reference_boxes,
            padding_mask=padding_mask,
        )
        object_queries = self.cross_attention_norm(object_queries + self.dropout(update))
        # Feed-forward
        return self.feed_forward(object_queries), self_weights, locations, cross_weights
