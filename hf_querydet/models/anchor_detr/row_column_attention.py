"""Row-column decoupled attention (Anchor DETR, arXiv:2109.07107).

Letters: N maps, Q queries, M heads, D channels of a head, H rows and W columns of a map.
"""

import torch
from torch import Tensor, nn

from hf_querydet.layers.dropout import Dropout


class RowColumnAttention(nn.Module):
    """Attention to a map as attention along its rows and attention along its columns.

    The weight of cell (y, x) is the product of a weight of x and a weight of y, each a softmax of
    its own: `A_row[q, x] = softmax_x(q_row . k_row[x])` over keys averaged down the columns, and
    `A_column[q, y] = softmax_y(q_column . k_column[y])` over keys averaged along the rows. The
    output is the sum of `A_column[q, y] * A_row[q, x] * value[y, x]` over all cells.

    Where full attention holds Q * M * H * W weights, this holds Q * M * (H + W), and between its
    two sums a temporary of Q * M * D times the shorter side. (Fused kernels of full attention,
    which came after the paper, hold less than either.)

    The authors average projected keys; averaging before the projection is the same, the projection
    being linear, and needs H or W times fewer products.

    Args:
        hidden_size: Channels of queries, cells and output.
        num_heads: Number of heads, a divisor of ``hidden_size``.
        dropout: Dropout on the weights, of rows and of columns apart.
        average_valid_keys: Leave padding out of the averages. The authors do not.
    """

    def __init__(
        self, *, hidden_size: int, num_heads: int, dropout: float, average_valid_keys: bool
    ) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        self.average_valid_keys = average_valid_keys
        self.row_q_proj = nn.Linear(hidden_size, hidden_size)
        self.column_q_proj = nn.Linear(hidden_size, hidden_size)
        self.row_k_proj = nn.Linear(hidden_size, hidden_size)
        self.column_k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        row_queries: Tensor,
        column_queries: Tensor,
        features: Tensor,
        row_positions: Tensor,
        column_positions: Tensor,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from every query to every cell of its map.

        Args:
            row_queries: (maps, num_queries, hidden_size), embedding of x added.
            column_queries: Same shape, embedding of y added.
            features: (maps, height, width, hidden_size), the values and, positions added, the keys.
            row_positions: Embedding of each column's x, (maps or 1, width, hidden_size).
            column_positions: Embedding of each row's y, (maps or 1, height, hidden_size).
            padding_mask: (maps, height, width), True = padding, which lies at the right and at the
                bottom.

        Returns:
            (maps, num_queries, hidden_size); the weights along rows (maps, heads, num_queries,
            width) and along columns (maps, heads, num_queries, height), each with sum 1.
        """
        # Keys of one axis are averages over the other; positions are the same down the other.
        row_keys = self._average(features, padding_mask, dim=1) + row_positions
        column_keys = self._average(features, padding_mask, dim=2) + column_positions
        row_weights = self._weights(
            self.row_q_proj(row_queries),
            self.row_k_proj(row_keys),
            None if padding_mask is None else padding_mask[:, 0, :],
        )
        column_weights = self._weights(
            self.column_q_proj(column_queries),
            self.column_k_proj(column_keys),
            None if padding_mask is None else padding_mask[:, :, 0],
        )
        values = self.v_proj(features).unflatten(-1, (-1, self.head_size))
        output = sum_over_cells(self.dropout(row_weights), self.dropout(column_weights), values)
        return self.out_proj(output), row_weights, column_weights

    def _average(self, features: Tensor, padding_mask: Tensor | None, dim: int) -> Tensor:
        """(maps, height, width, hidden_size) to the same without dimension ``dim``."""
        if padding_mask is None or not self.average_valid_keys:
            return features.mean(dim)
        valid = ~padding_mask.unsqueeze(-1)
        # A row or column of padding alone has no average; nothing attends to it.
        return (features * valid).sum(dim) / valid.sum(dim).clamp(min=1).to(features.dtype)

    def _weights(self, queries: Tensor, keys: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Softmax over the keys of one axis, (maps, heads, num_queries, num_keys)."""
        queries = queries.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        keys = keys.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        scores = torch.matmul(queries * self.head_size**-0.5, keys.transpose(-1, -2))
        if padding_mask is not None:
            scores = scores.masked_fill(
                padding_mask[:, None, None, :], torch.finfo(scores.dtype).min
            )
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def sum_over_cells(row_weights: Tensor, column_weights: Tensor, values: Tensor) -> Tensor:
    """Sum the cells of a map, each weighted by its column's and its row's weight.

    The weights of cells are never formed. The longer side is summed first, because what is left in
    between has the length of the other.

    Args:
        row_weights: (maps, heads, num_queries, width).
        column_weights: (maps, heads, num_queries, height).
        values: (maps, height, width, heads, head_size).

    Returns:
        (maps, num_queries, heads * head_size).
    """
    height, width = values.shape[1:3]
    # An exported program serves all sizes, so the order there cannot depend on them.
    if torch.compiler.is_exporting() or height <= width:
        first, second = row_weights, column_weights
        values = values.permute(0, 3, 2, 1, 4)  # (N, M, W, H, D)
    else:
        first, second = column_weights, row_weights
        values = values.permute(0, 3, 1, 2, 4)  # (N, M, H, W, D)
    partial_sums = torch.matmul(first, values.flatten(3)).unflatten(-1, values.shape[-2:])
    # (N, M, Q, 1, side) @ (N, M, Q, side, D)
    output = torch.matmul(second.unsqueeze(-2), partial_sums).squeeze(-2)
    return output.transpose(1, 2).flatten(2)
