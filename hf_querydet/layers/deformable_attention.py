"""Multi-scale deformable attention: offsets, weights and projections around the operator."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_querydet.layers.initialization import init_deformable_attention
from hf_querydet.ops import ms_deform_attn


class MultiScaleDeformableAttention(nn.Module):
    """Each query looks at a few points of every level, around its reference.

    Offsets and weights of the points are linear in the query; there are no keys. Deformable DETR
    (arXiv:2010.04159), Sec. 4.1, Eq. 3. There is no dropout on the weights, as in the paper.

    Args:
        hidden_size: Channels of queries and memory; a multiple of num_heads.
        num_heads: Heads, each with points of its own.
        num_levels: Feature levels that are sampled.
        num_points: Points per head and level.

    Raises:
        ValueError: If hidden_size is not a multiple of num_heads.
    """

    def __init__(
        self, *, hidden_size: int, num_heads: int, num_levels: int, num_points: int
    ) -> None:
        super().__init__()
        if hidden_size % num_heads != 0:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}."
            )
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(hidden_size, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(hidden_size, num_heads * num_levels * num_points)
        self.value_projection = nn.Linear(hidden_size, hidden_size)
        self.output_projection = nn.Linear(hidden_size, hidden_size)
        init_deformable_attention(self)

    def forward(
        self,
        object_queries: Tensor,
        memory: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        *,
        reference_points: Tensor | None = None,
        reference_boxes: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from the queries to the levels of `memory`.

        Args:
            object_queries: (batch, num_queries, hidden_size), their position embeddings added.
            memory: All levels flattened, (batch, num_tokens, hidden_size), without positions.
            spatial_shapes: (height, width) of every level, in cells.
            reference_points: (batch, num_queries, num_levels, 2), normalised (x, y) in each level.
                Offsets are in cells of the level.
            reference_boxes: (batch, num_queries, num_levels, 4), normalised cxcywh, instead of the
                points. Offsets are in half box sizes / num_points: the ring of the initial values
                ends on the box's border.
            padding_mask: (batch, num_tokens), True = padding; such tokens are sampled as zero.

        Returns:
            The attended features, (batch, num_queries, hidden_size); the sampling locations,
            (batch, num_queries, num_heads, num_levels, num_points, 2), normalised (x, y); and the
            attention weights, the same without the last dimension. Locations and weights are at
            least float32.

        Raises:
            ValueError: If not exactly one of reference_points and reference_boxes is given, its
                shape does not fit, or spatial_shapes has another number of levels.
        """
        if len(spatial_shapes) != self.num_levels:
            raise ValueError(
                f"spatial_shapes must have num_levels = {self.num_levels} entries, got "
                f"{len(spatial_shapes)}."
            )
        value = self.value_projection(memory)
        if padding_mask is not None:
            # After the projection: its bias must not come from padding either.
            value = value.masked_fill(padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))

        sampling_locations = self._sampling_locations(
            object_queries, spatial_shapes, reference_points, reference_boxes
        )
        # Jointly over the points of all levels.
        logits = self.attention_weights(object_queries).unflatten(-1, (self.num_heads, -1))
        weights = logits.to(sampling_locations.dtype).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))

        attended = ms_deform_attn(value, spatial_shapes, sampling_locations, weights)
        return self.output_projection(attended), sampling_locations, weights

    def _sampling_locations(
        self,
        object_queries: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        reference_points: Tensor | None,
        reference_boxes: Tensor | None,
    ) -> Tensor:
        """Reference plus offset, (batch, num_queries, num_heads, num_levels, num_points, 2)."""
        if (reference_points is None) == (reference_boxes is None):
            raise ValueError("give either reference_points or reference_boxes, and not both.")
        offsets = self.sampling_offsets(object_queries)
        # Half types cannot tell neighbouring cells of a large level apart.
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        shape = (self.num_heads, self.num_levels, self.num_points, 2)
        if reference_points is not None:
            # Filled on the device: a tensor made from a list would wait for the GPU.
            sizes = [offsets.new_full((1,), size) for hw in spatial_shapes for size in reversed(hw)]
            sizes = torch.cat(sizes).view(self.num_levels, 1, 2).expand(shape).flatten()
            # Divided while flat: CPUs are slow at many short rows.
            offsets = (offsets / sizes).unflatten(-1, shape)
            return self._per_level("reference_points", reference_points, 2, offsets) + offsets
        offsets = offsets.unflatten(-1, shape)
        boxes = self._per_level("reference_boxes", reference_boxes, 4, offsets)
        return boxes[..., :2] + offsets * boxes[..., 2:] * (0.5 / self.num_points)

    def _per_level(self, name: str, reference: Tensor, size: int, offsets: Tensor) -> Tensor:
        """Check a reference and insert dimensions for heads and points."""
        expected = (*offsets.shape[:2], self.num_levels, size)
        if tuple(reference.shape) != expected:
            raise ValueError(
                f"{name} must have shape (batch, num_queries, num_levels, {size}) = {expected}, "
                f"got {tuple(reference.shape)}."
            )
        return reference.to(offsets.dtype)[:, :, None, :, None]


def samples_by_head(samples: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Bring weights or locations of several layers into the form in which attentions are returned.

    Args:
        samples: Per layer (batch, num_queries, num_heads, num_levels, num_points, ...).

    Returns:
        Per layer (batch, num_heads, num_queries, num_levels * num_points, ...).
    """
    return tuple(sample.flatten(3, 4).transpose(1, 2) for sample in samples)
