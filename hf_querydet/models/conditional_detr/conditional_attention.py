"""The two attentions of Conditional DETR's decoder (arXiv:2108.06152).

Both project content and position apart, with weights of their own. Self-attention adds the two;
cross-attention keeps them side by side.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_querydet.layers.attention import attend
from hf_querydet.recording import DotProductRecord


def add_linear(
    first_layer: nn.Linear, first: Tensor, second_layer: nn.Linear, second: Tensor
) -> Tensor:
    """The sum of two linear layers' outputs.

    Compiled, biases are added before they meet the tokens. Added after, both have the same
    gradient, one sum over all tokens that is kept twice, for which PyTorch 2.14's compiler writes
    C++ that no compiler takes (bfloat16 on CPUs). Otherwise the layers are called, which may be
    more than their weights: adapters, quantised ones, with hooks.

    Args:
        first_layer: Of the same output size as ``second_layer``.
        first: (..., input size of ``first_layer``).
        second_layer: The other layer.
        second: (..., input size of ``second_layer``), of the same leading sizes.

    Returns:
        (..., output size).
    """
    are_plain = type(first_layer) is type(second_layer) is nn.Linear
    if not (torch.compiler.is_compiling() and are_plain):
        return first_layer(first) + second_layer(second)
    bias = first_layer.bias + second_layer.bias
    output = nn.functional.linear(first, first_layer.weight, bias)
    return output + nn.functional.linear(second, second_layer.weight)


class ConditionalSelfAttention(nn.Module):
    """Self-attention among queries, with projections for content and for position.

    Args:
        config: For the attention implementation only, see :func:`attend`.
        hidden_size: Channels of a query.
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
        self.q_content_proj = nn.Linear(hidden_size, hidden_size)
        self.q_position_proj = nn.Linear(hidden_size, hidden_size)
        self.k_content_proj = nn.Linear(hidden_size, hidden_size)
        self.k_position_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, object_queries: Tensor, query_position_embeddings: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to every query.

        Args:
            object_queries: Content, (batch, num_queries, hidden_size).
            query_position_embeddings: Same shape.

        Returns:
            (batch, num_queries, hidden_size), and the weights of :func:`attend`.
        """
        content, positions = object_queries, query_position_embeddings
        query = add_linear(self.q_content_proj, content, self.q_position_proj, positions)
        key = add_linear(self.k_content_proj, content, self.k_position_proj, positions)
        value = self.v_proj(object_queries)
        heads = (self.num_heads, -1)
        output, weights = attend(
            self, query.unflatten(-1, heads), key.unflatten(-1, heads), value.unflatten(-1, heads)
        )
        return self.out_proj(output), weights


class ConditionalCrossAttention(nn.Module):
    """Conditional cross-attention: content looks for content, space for space.

    In every head, query and key are a content part and a spatial part side by side, so that their
    dot products add up and do not mix: score = (c_q c_k + p_q p_k) / sqrt(2 * head_size). In DETR,
    where position is added to content, c_q also meets p_k and p_q meets c_k.

    Args:
        config: For the attention implementation only, see :func:`attend`.
        hidden_size: Channels of query, memory and output.
        num_heads: Number of heads, a divisor of ``hidden_size``.
        dropout: Dropout on the attention weights.
        add_positions: Also add positions to the content parts, as the authors' code does in the
            first decoder layer, whose queries have seen nothing of the picture yet.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        add_positions: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_content_proj = nn.Linear(hidden_size, hidden_size)
        self.q_position_proj = nn.Linear(hidden_size, hidden_size) if add_positions else None
        self.q_spatial_proj = nn.Linear(hidden_size, hidden_size)
        self.k_content_proj = nn.Linear(hidden_size, hidden_size)
        self.k_position_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        object_queries: Tensor,
        query_position_embeddings: Tensor,
        spatial_queries: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to every token of the memory.

        Args:
            object_queries: Content, (batch, num_queries, hidden_size).
            query_position_embeddings: Same shape; read with ``add_positions`` only.
            spatial_queries: Same shape, where each query looks.
            memory: (batch, num_tokens, hidden_size).
            memory_positions: Same shape, or with a batch of 1.
            attention_mask: See :func:`attention_mask_from_padding`.

        Returns:
            (batch, num_queries, hidden_size), and the weights of :func:`attend`.
        """
        query, key = self.project(
            object_queries, query_position_embeddings, spatial_queries, memory, memory_positions
        )
        value = self.v_proj(memory).unflatten(-1, (self.num_heads, -1))
        output, weights = attend(self, query, key, value, attention_mask)
        return self.out_proj(output), weights

    def project(
        self,
        object_queries: Tensor,
        query_position_embeddings: Tensor,
        spatial_queries: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys whose products are the scores; see :meth:`forward` for the arguments.

        Returns:
            (batch, num_queries, heads, 2 * head_size) and (batch, num_tokens, heads, 2 *
            head_size), in each head first the content part, then the spatial part.
        """
        key_content = self.k_content_proj(memory)
        key_spatial = self.k_position_proj(memory_positions).expand_as(key_content)
        if self.q_position_proj is None:
            query_content = self.q_content_proj(object_queries)
        else:
            query_content = add_linear(
                self.q_content_proj,
                object_queries,
                self.q_position_proj,
                query_position_embeddings,
            )
            key_content = key_content + key_spatial
        return (
            self._side_by_side(query_content, self.q_spatial_proj(spatial_queries)),
            self._side_by_side(key_content, key_spatial),
        )

    @torch.no_grad()
    def record(
        self,
        map_shape: tuple[int, int, int],
        *queries_and_memory: Tensor,
        attention_mask: Tensor | None = None,
    ) -> DotProductRecord:
        """Where the queries look; takes what :meth:`forward` takes, after the shape of the map."""
        query, key = self.project(*queries_and_memory)
        head_size = query.shape[-1] // 2
        parts = {"content": slice(0, head_size), "spatial": slice(head_size, None)}
        return DotProductRecord(query, key, attention_mask, map_shape, parts)

    def _side_by_side(self, content: Tensor, spatial: Tensor) -> Tensor:
        """(batch, tokens, hidden_size) twice to (batch, tokens, heads, 2 * head_size)."""
        heads = (self.num_heads, -1)
        return torch.cat([content.unflatten(-1, heads), spatial.unflatten(-1, heads)], dim=-1)
