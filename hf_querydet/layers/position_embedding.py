"""Position embeddings of feature map cells."""

import math

import torch
from torch import Tensor, nn

# Offset of the centre of a cell from its end, where it is counted.
CELL_CENTER = -0.5


def sine_features(positions: Tensor, num_features: int, temperature: float = 10000.0) -> Tensor:
    """Sine and cosine features of scalar positions, interleaved.

    Feature 2i is sin(p / T^(2i / n)), feature 2i + 1 the cosine of the same angle; not two halves.
    DETR (arXiv:2005.12872), Appendix A.4, after arXiv:1706.03762, Sec. 3.5.

    Args:
        positions: Any shape, in radians at the lowest frequency.
        num_features: Features per position, even.
        temperature: T.

    Returns:
        (*positions.shape, num_features), float32.
    """
    exponents = torch.arange(num_features // 2, device=positions.device, dtype=torch.float32)
    frequencies = temperature ** (-2 * exponents / num_features)
    angles = positions.float().unsqueeze(-1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def add_positions(tokens: Tensor, position_embeddings: Tensor | None) -> Tensor:
    """Tokens with their positions added; the tokens themselves if they hold them already (None)."""
    return tokens if position_embeddings is None else tokens + position_embeddings


class SinePositionEmbedding(nn.Module):
    """Fixed embedding of a cell's position within the picture's valid part.

    Positions are counted in cells that are not padding and divided by the number of such cells, so
    the last valid row and column are at 2 pi whatever the padding.

    Args:
        embedding_size: Channels; the first half encodes y, the second x. A multiple of 4.
        offset: Added to the 1-based cell count: 0 in DETR and Conditional DETR, -0.5 (cell centres)
            in Deformable DETR.
        temperature: Of :func:`sine_features`.
    """

    def __init__(
        self, embedding_size: int, *, offset: float = 0.0, temperature: float = 10000.0
    ) -> None:
        super().__init__()
        self.num_features = embedding_size // 2
        self.offset = offset
        self.temperature = temperature

    def forward(self, padding_mask: Tensor) -> Tensor:
        """Embed every cell.

        Args:
            padding_mask: (batch, height, width), True = padding.

        Returns:
            (batch, height * width, embedding_size), float32. Values on padding have no meaning.
        """
        valid = ~padding_mask
        rows = self._scaled_count(valid, dim=1)
        columns = self._scaled_count(valid, dim=2)
        embedding = torch.cat(
            [
                sine_features(rows, self.num_features, self.temperature),
                sine_features(columns, self.num_features, self.temperature),
            ],
            dim=-1,
        )
        return embedding.flatten(1, 2)

    def _scaled_count(self, valid: Tensor, dim: int) -> Tensor:
        count = valid.cumsum(dim, dtype=torch.float32)
        total = count.narrow(dim, -1, 1)
        return (count + self.offset) / (total + 1e-6) * (2 * math.pi)


class LearnedPositionEmbedding(nn.Module):
    """One trained vector per row and per column, at most ``max_cells`` of each.

    The halves stand in the authors' order, which is the reverse of the sine embedding's: first the
    column (x), then the row (y).

    Args:
        embedding_size: Channels, even.
        max_cells: Rows and columns of the tables.
    """

    def __init__(self, embedding_size: int, *, max_cells: int = 50) -> None:
        super().__init__()
        self.max_cells = max_cells
        self.row_embeddings = nn.Embedding(max_cells, embedding_size // 2)
        self.column_embeddings = nn.Embedding(max_cells, embedding_size // 2)

    def forward(self, padding_mask: Tensor) -> Tensor:
        """Embed every cell; padding plays no role.

        Args:
            padding_mask: (batch, height, width), read for its size.

        Returns:
            (batch, height * width, embedding_size).

        Raises:
            ValueError: If the map has more rows or columns than the tables.
        """
        batch_size, height, width = padding_mask.shape
        if max(height, width) > self.max_cells:
            raise ValueError(
                f"Learned position embeddings reach {self.max_cells} cells a side, but the feature "
                f"map has {height} x {width}; use smaller pictures or "
                "position_embedding_type='sine'."
            )
        columns = self.column_embeddings.weight[:width].expand(height, width, -1)
        rows = self.row_embeddings.weight[:height, None].expand(height, width, -1)
        embedding = torch.cat([columns, rows], dim=-1).flatten(0, 1)
        return embedding.expand(batch_size, -1, -1)
