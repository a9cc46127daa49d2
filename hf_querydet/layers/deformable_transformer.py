"""The encoder layer that Deformable DETR and Efficient DETR share."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_querydet.layers.deformable_attention import MultiScaleDeformableAttention
from hf_querydet.layers.feed_forward import FeedForward


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
        self.dropout = nn.Dropout(dropout)
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
