"""Anchor DETR, query design for transformer-based object detection (arXiv:2109.07107).

In DETR an object query is a vector that nobody can read. Here it is an anchor point, a place in the
picture, encoded with the same functions as the places of cells, so that a query looks for objects
near its point and predicts boxes relative to it. Several objects may lie around one point, so every
point comes with several patterns: 300 points of 3 patterns are 900 queries. Attention to the
picture is decoupled into attention along rows and along columns, which needs less memory than a
weight for every cell.

Beside that: sigmoid classes with focal loss, no dropout, group normalisation of the features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import can_return_tuple

from hf_querydet.layers.attention import MultiHeadAttention, attention_mask_from_padding
from hf_querydet.layers.backbone import Backbone
from hf_querydet.layers.feed_forward import MLP, FeedForward
from hf_querydet.layers.initialization import (
    init_box_head,
    init_feature_projection,
    init_focal_prior,
)
from hf_querydet.layers.position_embedding import sine_features
from hf_querydet.losses import FocalClassification
from hf_querydet.modeling_utils import (
    DetectorPreTrainedModel,
    ObjectDetectionMixin,
    build_criterion,
)
from hf_querydet.models.anchor_detr.configuration_anchor_detr import NUM_GROUPS, AnchorDETRConfig
from hf_querydet.models.anchor_detr.row_column_attention import RowColumnAttention
from hf_querydet.models.anchor_detr.transformer_layers import (
    AnchorDETRDecoderLayer,
    AnchorDETREncoderLayer,
    full_attention_encoder_layer,
)
from hf_querydet.ops.boxes import place_boxes
from hf_querydet.outputs import DetectionOutput, DetectorModelOutput, SetPredictions
from hf_querydet.recording import LayerRecord

INITIAL_SIZE_BIAS = -2.0


@dataclass
class AnchorDETRModelOutput(DetectorModelOutput):
    """Output of :class:`AnchorDETRModel`.

    With row-column attention the weight of a cell is the product of a row weight (of its x) and a
    column weight (of its y). Weights of several feature levels stand side by side, level after
    level; the sums that are said to be 1 are then those of each level.

    Attributes:
        cross_attentions: Attention from queries to memory per decoder layer, (batch, heads,
            num_queries, num_tokens), if asked for: the products of the factors below, or with
            ``attention_type="full"`` the weights themselves, which need
            ``attn_implementation="eager"``.
        encoder_attentions: With ``attention_type="full"`` as in DETR. None with row-column
            attention, which is there to avoid weights between all pairs of cells.
        anchor_points: Of every query, (batch, num_queries, 2), normalised (x, y), at least float32.
        cross_row_attentions: Factors along rows per decoder layer, (batch, heads, num_queries,
            width), with sum 1; if asked for, as the fields that follow.
        cross_column_attentions: Factors along columns, (batch, heads, num_queries, height).
        encoder_row_attentions: Per encoder layer, (batch, heads, num_tokens, width).
        encoder_column_attentions: Per encoder layer, (batch, heads, num_tokens, height).
    """

    anchor_points: Tensor | None = None
    cross_row_attentions: tuple[Tensor, ...] | None = None
    cross_column_attentions: tuple[Tensor, ...] | None = None
    encoder_row_attentions: tuple[Tensor, ...] | None = None
    encoder_column_attentions: tuple[Tensor, ...] | None = None


@dataclass
class AnchorDETRDetectionOutput(DetectionOutput):
    """Output of :class:`AnchorDETRForObjectDetection`.

    Attributes:
        anchor_points: See :class:`AnchorDETRModelOutput`, as the fields that follow.
        cross_row_attentions: As above.
        cross_column_attentions: As above.
        encoder_row_attentions: As above.
        encoder_column_attentions: As above.
    """

    anchor_points: Tensor | None = None
    cross_row_attentions: tuple[Tensor, ...] | None = None
    cross_column_attentions: tuple[Tensor, ...] | None = None
    encoder_row_attentions: tuple[Tensor, ...] | None = None
    encoder_column_attentions: tuple[Tensor, ...] | None = None


class AnchorDETRFeatureProjection(nn.Module):
    """Convolution and group normalisation per map of the backbone, to maps of one size and width.

    A single map gets a 1x1 convolution. The finest of several is halved by a 3x3 convolution of
    stride 2, which makes it as large as the others where the last stage is dilated.

    Args:
        in_channels: Channels of the backbone's maps, fine to coarse.
        hidden_size: Channels of every level.
        num_levels: Number of maps.

    Raises:
        ValueError: If the backbone returns another number of maps.
    """

    def __init__(self, *, in_channels: list[int], hidden_size: int, num_levels: int) -> None:
        super().__init__()
        if len(in_channels) != num_levels:
            raise ValueError(
                f"num_feature_levels is {num_levels} but the backbone returns {len(in_channels)} "
                "maps; set out_indices of backbone_config to the stages that are to be read."
            )
        convolutions = [nn.Conv2d(size, hidden_size, kernel_size=1) for size in in_channels]
        if num_levels > 1:
            convolutions[0] = nn.Conv2d(in_channels[0], hidden_size, 3, stride=2, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(convolution, nn.GroupNorm(NUM_GROUPS, hidden_size))
            for convolution in convolutions
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Project maps (batch, channels, height, width).

        Returns:
            (batch, levels, height, width, hidden_size).

        Raises:
            ValueError: If the levels are not of one size.
        """
        levels = [project(features) for project, features in zip(self.levels, maps, strict=True)]
        sizes = [tuple(level.shape[-2:]) for level in levels]
        if any(size != sizes[0] for size in sizes):
            raise ValueError(
                f"num_feature_levels={len(levels)} needs levels of one size, got {sizes}; set "
                "dilation=True, or num_feature_levels=1."
            )
        return torch.stack(levels, dim=1).movedim(2, -1)


class AnchorDETRPreTrainedModel(DetectorPreTrainedModel):
    """Base class of the Anchor DETR models."""

    config: AnchorDETRConfig
    _no_split_modules = (
        "Backbone",
        "AnchorDETREncoderLayer",
        "TransformerEncoderLayer",
        "AnchorDETRDecoderLayer",
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As :meth:`DetectorPreTrainedModel._init_weights`, with the values of these authors.

        They leave more at PyTorch's default than DETR's: feed-forward blocks and the output of
        attention.
        """
        if isinstance(module, FeedForward):
            return
        super()._init_weights(module)
        if isinstance(module, MultiHeadAttention):
            init.kaiming_uniform_(module.out_proj.weight, a=5**0.5)
        elif isinstance(module, RowColumnAttention):
            # The authors fill the five projections as one matrix of five times the rows: the range
            # is the root of 6 / (5n + n) instead of 6 / (n + n).
            for projection in (
                module.row_q_proj,
                module.column_q_proj,
                module.row_k_proj,
                module.column_k_proj,
                module.v_proj,
            ):
                init.xavier_uniform_(projection.weight, gain=(1 / 3) ** 0.5)
                init.zeros_(projection.bias)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, AnchorDETRFeatureProjection):
            init_feature_projection(module)
        elif isinstance(module, AnchorDETRModel):
            if module.config.spatial_prior == "learned":
                init.uniform_(module.anchor_points.weight)
        elif isinstance(module, AnchorDETRForObjectDetection):
            init_focal_prior(module.class_head)
            init_box_head(module.box_head, size_bias=INITIAL_SIZE_BIAS)


class AnchorDETRModel(AnchorDETRPreTrainedModel):
    """Backbone, encoder and decoder of Anchor DETR, without heads.

    With several feature levels the authors' code pairs queries with the maps of other pictures, and
    lets levels attend across the batch, as soon as a batch has more than one picture. Here every
    picture is treated as theirs treats a batch of one.
    """

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(
            config.backbone_config,
            pretrained=config.use_pretrained_backbone,
            norm=config.backbone_norm,
            num_frozen_stages=config.frozen_backbone_stages,
        )
        self.input_projection = AnchorDETRFeatureProjection(
            in_channels=self.backbone.channels,
            hidden_size=config.d_model,
            num_levels=config.num_feature_levels,
        )
        if config.spatial_prior == "learned":
            self.anchor_points = nn.Embedding(config.num_query_positions, 2)
        self.patterns = nn.Embedding(config.num_query_patterns, config.d_model)
        # Queries, cells and all layers share them; x and y share the first.
        if config.attention_type == "row_column":
            self.coordinate_mlp = MLP(
                input_size=config.d_model,
                hidden_size=config.d_model,
                output_size=config.d_model,
                num_layers=2,
            )
        self.point_mlp = MLP(
            input_size=config.d_model,
            hidden_size=config.d_model,
            output_size=config.d_model,
            num_layers=2,
        )
        has_levels = config.num_feature_levels > 1
        num_map_layers = config.encoder_layers // 2 if has_levels else config.encoder_layers
        self.encoder_layers = nn.ModuleList(
            AnchorDETREncoderLayer(config)
            if config.attention_type == "row_column"
            else full_attention_encoder_layer(config)
            for _ in range(num_map_layers)
        )
        if has_levels:
            self.level_embeddings = nn.Embedding(config.num_feature_levels, config.d_model)
            self.level_layers = nn.ModuleList(
                full_attention_encoder_layer(config) for _ in range(num_map_layers)
            )
        self.decoder_layers = nn.ModuleList(
            AnchorDETRDecoderLayer(config) for _ in range(config.decoder_layers)
        )
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
    ) -> AnchorDETRModelOutput:
        """Turn pictures into object queries.

        Args:
            pixel_values: (batch, channels, height, width), normalised colours.
            pixel_mask: (batch, height, width), 1 = picture, 0 = padding; None if nothing is padded.
            output_attentions: Return attention weights; those among queries, and those of full
                attention, need ``attn_implementation="eager"``.
            output_hidden_states: Return the states between the layers.
            output_recording: Return what each decoder layer starts from and looks at, see
                :mod:`hf_querydet.recording`.
            kwargs: Of the ecosystem's trainers and tests, of no effect.

        Raises:
            ValueError: If several feature levels are not of one size.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        # Features: (batch, levels, height, width, d_model)
        stages = self.backbone(pixel_values, pixel_mask)
        maps = self.input_projection([features for features, _ in stages])
        batch_size, num_levels, height, width, _ = maps.shape
        # All levels are of one size; the authors give them the mask of the last.
        memory, cell_inputs = self._cells(maps, stages[-1][1])

        # Queries: pattern after pattern, each at all anchor points
        points = self._anchor_points()
        object_queries = self.patterns.weight.repeat_interleave(len(points), dim=0)
        object_queries = object_queries.to(maps.dtype).expand(batch_size, -1, -1)
        points = points.repeat(self.config.num_query_patterns, 1)
        query_positions = self._embed_points(points[:, 0], points[:, 1], maps.dtype)

        # Encoder
        encoder_states, encoder_weights = [memory], []
        for index, layer in enumerate(self.encoder_layers):
            memory, *weights = layer(memory, *cell_inputs)
            # What nobody asks for is not kept: with thousands of cells it fills the memory.
            if output_attentions:
                encoder_weights.append(weights)
            if output_hidden_states:
                encoder_states.append(memory)
            if num_levels > 1:
                memory = self._attend_between_levels(index, memory)
                if output_hidden_states:
                    encoder_states.append(memory)

        # Decoder
        if self.config.attention_type == "row_column":
            query_coordinates = self._embed_coordinates(points, maps.dtype)
            picture = (*query_coordinates.unbind(1), memory, *cell_inputs)
        else:
            positions, memory_mask = cell_inputs
            picture = (query_positions, memory + positions, memory, memory_mask)
        decoder_states, decoder_attentions, cross_weights = [object_queries], [], []
        layer_records = []
        record_shape = (num_levels, height, width) if output_recording else None
        for layer in self.decoder_layers:
            object_queries, evidence, self_weights, *weights = layer(
                object_queries, query_positions, *picture, record_shape=record_shape
            )
            if output_recording:
                anchors = points.detach().expand(batch_size, -1, -1)
                layer_records.append(LayerRecord(evidence, reference_points=anchors))
            decoder_states.append(object_queries)
            if output_attentions:
                decoder_attentions.append(self_weights)
                cross_weights.append(weights)

        attentions = {}
        if output_attentions:
            attentions = self._attention_outputs(encoder_weights, cross_weights)
            attentions["decoder_attentions"] = tuple(decoder_attentions)

        def as_tokens(state: Tensor) -> Tensor:
            return state.reshape(batch_size, num_levels * height * width, self.config.d_model)

        return AnchorDETRModelOutput(
            last_hidden_state=object_queries,
            intermediate_hidden_states=torch.stack(decoder_states[1:]),
            encoder_last_hidden_state=as_tokens(memory),
            decoder_hidden_states=tuple(decoder_states) if output_hidden_states else None,
            encoder_hidden_states=tuple(as_tokens(state) for state in encoder_states)
            if output_hidden_states
            else None,
            anchor_points=points.expand(batch_size, -1, -1),
            layer_records=tuple(layer_records) if output_recording else None,
            **attentions,
        )

    def _cells(
        self, maps: Tensor, padding_mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Cells as attention takes them, and their positions and padding.

        With row-column attention (batch * levels, height, width, d_model), positions of rows, of
        columns, padding mask; with full attention (batch, num_tokens, d_model), positions,
        attention mask.
        """
        num_levels, height, width = maps.shape[1:4]
        if padding_mask is None:
            x, y = cell_coordinates(torch.zeros_like(maps[:1, 0, ..., 0], dtype=torch.bool))
        else:
            x, y = cell_coordinates(padding_mask)
        if self.config.attention_type == "row_column":
            positions = [self._embed_coordinates(axis, maps.dtype) for axis in (x, y)]
            if padding_mask is not None:
                # Once for every level of a picture; without padding all maps share one.
                positions = [each.repeat_interleave(num_levels, 0) for each in positions]
                padding_mask = padding_mask.repeat_interleave(num_levels, 0)
            return maps.flatten(0, 1), (*positions, padding_mask)
        positions = self._embed_points(
            x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width), maps.dtype
        )
        memory_mask = None
        if padding_mask is not None:
            memory_mask = attention_mask_from_padding(padding_mask.flatten(1))
        return maps.flatten(1, 3), (positions.flatten(1, 2), memory_mask)

    def _anchor_points(self) -> Tensor:
        """Anchor points without their patterns, (num_query_positions, 2), at least float32."""
        if self.config.spatial_prior == "grid":
            return anchor_grid(self.config.grid_side, device=self.patterns.weight.device)
        # Used as they are, not through a sigmoid; nothing keeps them inside the picture.
        points = self.anchor_points.weight
        return points.to(torch.promote_types(points.dtype, torch.float32))

    def _embed_coordinates(self, coordinates: Tensor, dtype: torch.dtype) -> Tensor:
        """Embedding of single coordinates, (...) to (..., d_model)."""
        features = sine_features(coordinates * (2 * math.pi), self.config.d_model)
        return self.coordinate_mlp(features.to(dtype)).to(dtype)

    def _embed_points(self, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Embedding of points, two of (...) to (..., d_model)."""
        # First y, then x, as in the authors' code.
        features = [
            sine_features(coordinate * (2 * math.pi), self.config.d_model // 2)
            for coordinate in (y, x)
        ]
        return self.point_mlp(torch.cat(features, dim=-1).to(dtype)).to(dtype)

    def _attend_between_levels(self, index: int, memory: Tensor) -> Tensor:
        """Let the levels of every cell attend to one another, (maps, height, width, d_model)."""
        maps = memory.unflatten(0, (-1, self.config.num_feature_levels))
        cells = maps.movedim(1, 3)  # (batch, height, width, levels, d_model)
        updated, _ = self.level_layers[index](
            cells.flatten(0, 2), self.level_embeddings.weight.to(memory.dtype)
        )
        return updated.view_as(cells).movedim(3, 1).flatten(0, 1)

    def _attention_outputs(
        self, encoder_weights: list[list[Tensor]], cross_weights: list[list[Tensor]]
    ) -> dict[str, tuple[Tensor, ...]]:
        """Weights of all layers as :class:`AnchorDETRModelOutput` describes them."""
        if self.config.attention_type == "full":
            return {
                "encoder_attentions": tuple(weights for (weights,) in encoder_weights),
                "cross_attentions": tuple(weights for (weights,) in cross_weights),
            }

        def by_picture(weights: Tensor) -> Tensor:
            return weights.unflatten(0, (-1, self.config.num_feature_levels))

        def cell_weights(rows: Tensor, columns: Tensor) -> Tensor:
            # (batch, levels, heads, num_queries, height, width)
            products = by_picture(columns)[..., :, None] * by_picture(rows)[..., None, :]
            return products.flatten(-2).movedim(1, -2).flatten(-2)

        def of_queries(weights: Tensor) -> Tensor:
            return by_picture(weights).movedim(1, -2).flatten(-2)

        def of_cells(weights: Tensor) -> Tensor:
            return by_picture(weights).transpose(1, 2).flatten(2, 3)

        return {
            "cross_attentions": tuple(cell_weights(*weights) for weights in cross_weights),
            "cross_row_attentions": tuple(of_queries(rows) for rows, _ in cross_weights),
            "cross_column_attentions": tuple(of_queries(columns) for _, columns in cross_weights),
            "encoder_row_attentions": tuple(of_cells(rows) for rows, _ in encoder_weights),
            "encoder_column_attentions": tuple(of_cells(columns) for _, columns in encoder_weights),
        }


class AnchorDETRForObjectDetection(ObjectDetectionMixin, AnchorDETRPreTrainedModel):
    """Anchor DETR with its class head and box head, which all decoder layers share.

    A box is predicted relative to the anchor point of its query, which stays where it is from layer
    to layer: there is no iterative refinement.
    """

    output_class = AnchorDETRDetectionOutput

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__(config)
        self.model = AnchorDETRModel(config)
        self.class_head = nn.Linear(config.d_model, config.num_labels)
        self.box_head = MLP(
            input_size=config.d_model, hidden_size=config.d_model, output_size=4, num_layers=3
        )
        self.criterion = build_criterion(config, FocalClassification(alpha=config.focal_alpha))
        self.post_init()

    def predict(self, outputs: AnchorDETRModelOutput, first_layer: int) -> SetPredictions:
        """See :meth:`ObjectDetectionMixin.predict`."""
        hidden_states = outputs.intermediate_hidden_states[first_layer:]
        deltas = self.box_head(hidden_states)
        # Half types are too coarse for what is added to the deltas.
        deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
        points = outputs.anchor_points.expand(len(hidden_states), -1, -1, -1)
        return SetPredictions(
            logits=self.class_head(hidden_states), pred_boxes=place_boxes(deltas, points)
        )


def cell_coordinates(padding_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the columns and rows of a map lie within the picture's valid part.

    Padding lies at the right and at the bottom, so the first row and the first column tell. On
    padding the last valid coordinate is repeated.

    Args:
        padding_mask: (batch, height, width), True = padding.

    Returns:
        x of the columns' centres, (batch, width), and y of the rows', (batch, height), in (0, 1).
    """

    def centers(valid: Tensor) -> Tensor:
        count = valid.cumsum(1, dtype=torch.float32)
        return (count - 0.5) / count[:, -1:].clamp(min=1)

    return centers(~padding_mask[:, 0, :]), centers(~padding_mask[:, :, 0])


def anchor_grid(side: int, *, device: torch.device) -> Tensor:
    """Centres of ``side`` times ``side`` equal fields of the picture.

    Returns:
        (side * side, 2), normalised (x, y); y changes faster, as in the authors' code.
    """
    centers = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side
    return torch.cartesian_prod(centers, centers)
