"""The encoder layer that DETR and Conditional DETR share, and the way through such layers."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_querydet.layers.attention import MultiHeadAttention
from hf_querydet.layers.dropout import Dropout
from hf_querydet.layers.feed_forward import FeedForward
from hf_querydet.layers.position_embedding import add_positions


class TransformerEncoderLayer(GradientCheckpointingLayer):
    """Post-norm encoder layer: self-attention with positions on query and key, then feed-forward.

    DETR (arXiv:2005.12872), Fig. 10.

    Args:
        config: For the attention implementation only, see :class:`MultiHeadAttention`.
        hidden_size: Channels of a token.
        num_heads: Attention heads.
        inner_size: Inner channels of the feed-forward block.
        activation: Activation of the feed-forward block.
        dropout: Dropout on the output of both blocks.
        attention_dropout: Dropout on attention weights.
        activation_dropout: Dropout inside the feed-forward block.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        hidden_size: int,
        num_heads: int,
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
        position_embeddings: Tensor | None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode tokens.

        Args:
            hidden_states: (batch, num_tokens, hidden_size).
            position_embeddings: Broadcastable to the same shape; None if the tokens hold them.
            attention_mask: (batch, 1, 1, num_tokens), True = attend.

        Returns:
            Tokens of the same shape, and the attention weights if the implementation returns them.
        """
        query_and_key = add_positions(hidden_states, position_embeddings)
        update, weights = self.self_attention(
            query_and_key, query_and_key, hidden_states, attention_mask
        )
        hidden_states = self.self_attention_norm(hidden_states + self.dropout(update))
        return self.feed_forward(hidden_states), weights


def encode(
    layers: Iterable[nn.Module],
    tokens: Tensor,
    *inputs: Any,
    keep_states: bool,
    keep_weights: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run the layers of an encoder.

    With thousands of tokens, states and weights fill the memory; they are kept for who asks.

    Args:
        layers: In their order. Each takes the tokens and ``inputs``, and returns the new tokens and
            the attention weights.
        tokens: (batch, num_tokens, hidden_size).
        inputs: What every layer takes beside the tokens.
        keep_states: Return the tokens before and after each layer.
        keep_weights: Return the attention weights of each layer.

    Returns:
        The memory, (batch, num_tokens, hidden_size); the states, and the weights, each an empty
        list if it is not kept.
    """
    states, all_weights = [tokens] if keep_states else [], []
    for layer in layers:
        tokens, weights = layer(tokens, *inputs)
        if keep_states:
            states.append(tokens)
        if keep_weights:
            all_weights.append(weights)
    return tokens, states, all_weights
