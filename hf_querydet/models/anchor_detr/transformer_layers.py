"""Encoder and decoder layers of Anchor DETR (arXiv:2109.07107), with either kind of attention.

Row-column attention itself is in :mod:`hf_querydet.models.anchor_detr.row_column_attention`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_querydet.layers.attention import MultiHeadAttention
from hf_querydet.layers.dropout import Dropout
from hf_querydet.layers.feed_forward import FeedForward
from hf_querydet.layers.transformer import TransformerEncoderLayer
from hf_querydet.models.anchor_detr.configuration_anchor_detr import AnchorDETRConfig
from hf_querydet.models.anchor_detr.row_column_attention import RowColumnAttention
from hf_querydet.recording import DotProductRecord, EvidenceRecord, RowColumnRecord


def full_attention_encoder_layer(config: AnchorDETRConfig) -> TransformerEncoderLayer:
    """DETR's encoder layer, in which every token attends to all, with the configuration's sizes."""
    return TransformerEncoderLayer(
        config,
        hidden_size=config.d_model,
        num_heads=config.encoder_attention_heads,
        inner_size=config.encoder_ffn_dim,
        activation=config.activation_function,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
    )


class AnchorDETREncoderLayer(GradientCheckpointingLayer):
    """Row-column attention among the cells of a map, then feed-forward; post-norm each."""

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.self_attention = RowColumnAttention(
            hidden_size=config.d_model,
            num_heads=config.encoder_attention_heads,
            dropout=config.attention_dropout,
            average_valid_keys=config.average_valid_keys,
        )
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout)
        self.feed_forward = FeedForward(
            hidden_size=config.d_model,
            inner_size=config.encoder_ffn_dim,
            activation=config.activation_function,
            dropout=config.dropout,
            activation_dropout=config.activation_dropout,
        )

    def forward(
        self,
        memory: Tensor,
        row_positions: Tensor,
        column_positions: Tensor,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode cells.

        Args:
            memory: (maps, height, width, d_model).
            row_positions: (maps or 1, width, d_model).
            column_positions: (maps or 1, height, d_model).
            padding_mask: (maps, height, width), True = padding.

        Returns:
            Cells of the same shape, and the weights of :class:`RowColumnAttention`.
        """
        update, row_weights, column_weights = self.self_attention(
            (memory + row_positions[:, None]).flatten(1, 2),
            (memory + column_positions[:, :, None]).flatten(1, 2),
            memory,
            row_positions,
            column_positions,
            padding_mask,
        )
        memory = self.self_attention_norm(memory + self.dropout(update.view_as(memory)))
        return self.feed_forward(memory), row_weights, column_weights


class RowColumnCrossAttention(nn.Module):
    """Row-column attention from queries to the maps of a picture, one after the other.

    The results of several feature levels are merged by a linear layer over all their channels.
    """

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.num_levels = config.num_feature_levels
        self.attention = RowColumnAttention(
            hidden_size=config.d_model,
            num_heads=config.decoder_attention_heads,
            dropout=config.attention_dropout,
            average_valid_keys=config.average_valid_keys,
        )
        if self.num_levels > 1:
            self.level_merge = nn.Linear(self.num_levels * config.d_model, config.d_model)

    def forward(
        self,
        object_queries: Tensor,
        query_row_positions: Tensor,
        query_column_positions: Tensor,
        memory: Tensor,
        row_positions: Tensor,
        column_positions: Tensor,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from queries to all cells.

        Args:
            object_queries: (batch, num_queries, d_model).
            query_row_positions: Embedding of every query's x, broadcastable to the same shape.
            query_column_positions: Embedding of every query's y.
            memory: (batch * levels, height, width, d_model), the levels of a picture together.
            row_positions: (batch * levels or 1, width, d_model).
            column_positions: (batch * levels or 1, height, d_model).
            padding_mask: (batch * levels, height, width), True = padding.

        Returns:
            Update of the queries, and the weights of :class:`RowColumnAttention` for every map.
        """
        update, row_weights, column_weights = self.attention(
            (object_queries + query_row_positions).repeat_interleave(self.num_levels, 0),
            (object_queries + query_column_positions).repeat_interleave(self.num_levels, 0),
            memory,
            row_positions,
            column_positions,
            padding_mask,
        )
        if self.num_levels > 1:
            # (batch, num_queries, d_model * levels), the levels of a channel side by side
            update = update.unflatten(0, (-1, self.num_levels)).movedim(1, -1).flatten(2)
            update = self.level_merge(update)
        return update, row_weights, column_weights

    def record(
        self,
        map_shape: tuple[int, int, int],
        weights: Sequence[Tensor],
        *queries_and_picture: Tensor | None,
    ) -> RowColumnRecord:
        """Where the queries look: the weights that :meth:`forward` returned, for each level."""
        rows, columns = (each.detach().unflatten(0, (-1, map_shape[0])) for each in weights)
        return RowColumnRecord(rows, columns)


class FullCrossAttention(nn.Module):
    """Attention from queries to every cell with a weight of its own, as in DETR."""

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            config,
            hidden_size=config.d_model,
            num_heads=config.decoder_attention_heads,
            dropout=config.attention_dropout,
        )

    def forward(
        self,
        object_queries: Tensor,
        query_position_embeddings: Tensor,
        memory_with_positions: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Update of the queries, and the weights; see :class:`MultiHeadAttention`."""
        return self.attention(
            object_queries + query_position_embeddings, memory_with_positions, memory, memory_mask
        )

    @torch.no_grad()
    def record(
        self,
        map_shape: tuple[int, int, int],
        weights: Sequence[Tensor | None],
        object_queries: Tensor,
        query_position_embeddings: Tensor,
        memory_with_positions: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
    ) -> DotProductRecord:
        """Where the queries look: what the weights, which not all implementations return, are of.

        Takes what :meth:`forward` takes, after the shape of the map and what it returned.
        """
        query, key = self.attention.project(
            object_queries + query_position_embeddings, memory_with_positions
        )
        return DotProductRecord(query, key, memory_mask, map_shape, parts={})


class AnchorDETRDecoderLayer(GradientCheckpointingLayer):
    """Self-attention among queries, attention to the picture, feed-forward; post-norm each."""

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(
            config,
            hidden_size=config.d_model,
            num_heads=config.decoder_attention_heads,
            dropout=config.attention_dropout,
        )
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = (
            RowColumnCrossAttention(config)
            if config.attention_type == "row_column"
            else FullCrossAttention(config)
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
        *picture: Tensor | None,
        record_shape: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor | EvidenceRecord | None, ...]:
        """Update the queries.

        Args:
            object_queries: Content, (batch, num_queries, d_model).
            query_position_embeddings: Of the anchor points, for self-attention; broadcastable to
                the same shape.
            picture: What the cross-attention takes beside the queries.
            record_shape: Levels, height and width of the map, if a record is wanted.

        Returns:
            Queries of the same shape; the record of where they look; the weights of self-attention
            if the attention implementation returns them; the weights that the cross-attention
            returns.
        """
        # Self-attention
        query_and_key = object_queries + query_position_embeddings
        update, self_weights = self.self_attention(query_and_key, query_and_key, object_queries)
        object_queries = self.self_attention_norm(object_queries + self.dropout(update))
        # Attention to the picture
        update, *cross_weights = self.cross_attention(object_queries, *picture)
        record = None
        if record_shape is not None:
            record = self.cross_attention.record(
                record_shape, cross_weights, object_queries, *picture
            )
        object_queries = self.cross_attention_norm(object_queries + self.dropout(update))
        # Feed-forward
        return self.feed_forward(object_queries), record, self_weights, *cross_weights
