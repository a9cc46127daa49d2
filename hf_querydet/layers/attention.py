"""Multi-head attention with position embeddings added to query and key, never to the value."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attention_mask_from_padding(padding_mask: Tensor) -> Tensor:
    """Turn a padding mask of keys into an attention mask.

    Args:
        padding_mask: (batch, num_keys), True = padding.

    Returns:
        (batch, 1, 1, num_keys), True = may be attended to. It broadcasts over heads and queries.
    """
    return ~padding_mask[:, None, None, :]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention written out, the only one that returns its weights.

    Args:
        module: The calling attention module.
        query: (batch, heads, num_queries, key_size).
        key: (batch, heads, num_keys, key_size).
        value: (batch, heads, num_keys, value_size).
        attention_mask: Boolean, broadcastable to (batch, heads, num_queries, num_keys), True =
            attend.
        scaling: Factor on the dot products.
        dropout: Dropout on the weights.
        kwargs: Options of other implementations, of no effect here.

    Returns:
        Output (batch, num_queries, heads, value_size) and weights (batch, heads, num_queries,
        num_keys).
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend with every head, by the implementation that the configuration names.

    Args:
        module: The calling attention module. Its ``config`` is read here only, because
            ``set_attn_implementation`` may change it at any time; its ``dropout`` acts on the
            weights.
        query: (batch, num_queries, heads, key_size).
        key: (batch, num_keys, heads, key_size).
        value: (batch, num_keys, heads, value_size).
        attention_mask: See :func:`attention_mask_from_padding`.

    Returns:
        (batch, num_queries, heads * value_size), and the weights (batch, heads, num_queries,
        num_keys) where the attention implementation returns them ("eager"), else None.
    """
    attention_forward: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    output, weights = attention_forward(
        module,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        dropout=module.dropout if module.training else 0.0,
        scaling=query.shape[-1] ** -0.5,
        is_causal=False,
    )
    return output.flatten(2), weights


class MultiHeadAttention(nn.Module):
    """Multi-head attention of DETR (arXiv:2005.12872, Appendix A.1).

    Query, key and value are projected apart; the caller adds position embeddings to what it passes
    as query and key. Self-attention passes the same tokens three times.

    Args:
        config: For the attention implementation only, see :func:`attend`.
        hidden_size: Channels of query, key, value and output.
        num_heads: Number of heads, a divisor of ``hidden_size``.
        dropout: Dropout on the attention weights.
    """

    def __init__(
        self, config: PreTrainedConfig, *, hidden_size: int, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to every key.

        Args:
            query: (batch, num_queries, hidden_size), position embeddings added.
            key: (batch, num_keys, hidden_size), position embeddings added.
            value: (batch, num_keys, hidden_size), without position embeddings.
            attention_mask: See :func:`attention_mask_from_padding`.

        Returns:
            (batch, num_queries, hidden_size), and the weights of :func:`attend`.
        """
        value = self._split_heads(self.v_proj(value))
        output, weights = attend(self, *self.project(query, key), value, attention_mask)
        return self.out_proj(output), weights

    def project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys whose products are the scores, (batch, tokens, heads, head_size)."""
        return self._split_heads(self.q_proj(query)), self._split_heads(self.k_proj(key))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1))
