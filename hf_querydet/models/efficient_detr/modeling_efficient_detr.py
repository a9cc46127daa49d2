"""Efficient DETR, an object detector with a dense prior (arXiv:2104.01318).

What differs from Deformable DETR: a dense part predicts classes and a box at every token of the
encoder; the best tokens' boxes are where the decoder's queries start, and the tokens themselves are
what they start as. One decoder layer is then enough, and its head is the dense part's own. Both
parts are trained by one-to-one matching.

There is no code of the authors. Where the paper leaves a choice, this is ours: tokens pass a linear
layer and a norm before the dense head, as in two-stage Deformable DETR, and anchors are that
detector's; queries start as the encoder's features before that layer; their positions are a sine
embedding of their reference; tokens without an anchor are neither chosen nor trained; both parts'
losses have the same weight.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import can_return_tuple

from hf_querydet.layers.backbone import Backbone
from hf_querydet.layers.deformable_attention import (
    samples_by_head,
)
from hf_querydet.layers.deformable_transformer import (
    DeformableTransformerDecoderLayer,
    DeformableTransformerEncoderLayer,
    encode_levels,
)
from hf_querydet.layers.detection_head import DetectionHead
from hf_querydet.layers.feature_levels import cell_centers, encoder_proposals
from hf_querydet.layers.position_embedding import (
    CELL_CENTER,
    SinePositionEmbedding,
    sine_features,
)
from hf_querydet.layers.projection import FeatureProjection, LevelFeatures, project_features
from hf_querydet.losses import FocalClassification
from hf_querydet.modeling_utils import (
    DetectorPreTrainedModel,
    ObjectDetectionMixin,
    build_criterion,
)
from hf_querydet.models.efficient_detr.configuration_efficient_detr import EfficientDETRConfig
from hf_querydet.ops.boxes import refine_boxes
from hf_querydet.outputs import DetectionOutput, DetectorModelOutput, SetPredictions
from hf_querydet.recording import LayerRecord, SamplingRecord

# Side of the box around a reference point, to which the first decoder layer's deltas are added:
# sigmoid(-2), as large as the first boxes of Deformable DETR.
POINT_BOX_SIZE = 1 / (1 + math.exp(2))


@dataclass
class EfficientDETRModelOutput(DetectorModelOutput):
    """Output of :class:`EfficientDETRModel`.

    Attributes:
        cross_attentions: Weights of the sampled points per decoder layer, (batch, heads,
            num_queries, levels * points), level after level, if asked for.
        encoder_attentions: The same of the encoder, (batch, heads, num_tokens, levels * points).
        intermediate_boxes: Boxes that each decoder layer predicts, (decoder_layers, batch,
            num_queries, 4), normalised cxcywh, at least float32.
        encoder_predictions: Predictions of the dense part, every token's, one layer.
        cross_sampling_locations: Where each decoder layer looks, (batch, heads, num_queries, levels
            * points, 2), normalised (x, y) in the padded canvas, if attentions are asked for.
        reference_points: Where the queries start, (batch, num_queries, 2), normalised (x, y),
            unless they start from boxes.
        reference_boxes: Boxes that the queries start from, (batch, num_queries, 4), normalised
            cxcywh, the best first.
        usable_queries: (batch, num_queries), False where a picture has fewer usable tokens than
            another of its batch or than ``num_queries``: there is no query. None without a dense
            part.
    """

    intermediate_boxes: Tensor | None = None
    encoder_predictions: SetPredictions | None = None
    cross_sampling_locations: tuple[Tensor, ...] | None = None
    reference_points: Tensor | None = None
    reference_boxes: Tensor | None = None
    usable_queries: Tensor | None = None


@dataclass
class EfficientDETRDetectionOutput(DetectionOutput):
    """Output of :class:`EfficientDETRForObjectDetection`.

    The terms of ``loss_dict`` with suffix ``_enc`` are those of the dense part. Logits of a query
    that there is not (see ``usable_queries``) are the lowest number, a score of 0.

    Attributes:
        intermediate_boxes: See :class:`EfficientDETRModelOutput`, as the fields that follow.
        encoder_predictions: As above.
        cross_sampling_locations: As above.
        reference_points: As above.
        reference_boxes: As above.
        usable_queries: As above.
    """

    intermediate_boxes: Tensor | None = None
    encoder_predictions: SetPredictions | None = None
    cross_sampling_locations: tuple[Tensor, ...] | None = None
    reference_points: Tensor | None = None
    reference_boxes: Tensor | None = None
    usable_queries: Tensor | None = None


def initial_reference_points(kind: str, num_points: int, device: torch.device) -> Tensor:
    """Points at which queries start without looking at the picture.

    Points of the border lie on the frame itself, where a box's centre is clamped to 1e-5 before its
    logarithm and moves slowly.

    Args:
        kind: ``"grid"`` (cell centres of a square grid, row by row), ``"center"`` (all alike) or
            ``"border"`` (equally spaced on the frame, clockwise from the top left corner).
        num_points: Number of points, a square for a grid.
        device: Where they are made.

    Returns:
        (1, num_points, 2), normalised (x, y), float32.
    """
    if kind == "grid":
        side = math.isqrt(num_points)
        return cell_centers([(side, side)], torch.ones(1, 1, 2, device=device))
    if kind == "center":
        return torch.full((1, num_points, 2), 0.5, device=device)
    # Way along the frame, whose four sides have length 1.
    way = torch.arange(num_points, device=device, dtype=torch.float32) * (4 / num_points)
    x = torch.minimum(way, 3 - way).clamp(0, 1)
    y = torch.minimum(way - 1, 4 - way).clamp(0, 1)
    return torch.stack([x, y], dim=-1)[None]


class EfficientDETRPreTrainedModel(DetectorPreTrainedModel):
    """Base class of the Efficient DETR models."""

    config: EfficientDETRConfig
    _no_split_modules = (
        "Backbone",
        "DeformableTransformerEncoderLayer",
        "DeformableTransformerDecoderLayer",
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As :meth:`DetectorPreTrainedModel._init_weights`, with Deformable DETR's values."""
        super()._init_weights(module)
        if isinstance(module, EfficientDETRModel):
            init.xavier_uniform_(module.query_projection.weight)
            if module.config.has_dense_part:
                init.xavier_uniform_(module.memory_projection.weight)

    def set_training_progress(self, progress: float) -> None:
        """Set the number of queries for the next steps of training.

        It is round(k0 + (k1 - k0) * progress) from k0 = ``config.num_queries_train_start`` to k1 =
        ``config.num_queries``, one number for the whole batch; always k1 without a start or outside
        of training. A model that is told nothing is as at the end. ``torch.compile`` compiles
        training steps anew for every number.

        Args:
            progress: Share of the run that is done, 0 to 1.

        Raises:
            ValueError: If progress is not between 0 and 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(
                f"progress must be between 0 and 1, steps done / steps of the run, got {progress}."
            )
        start, end = self.config.num_queries_train_start, self.config.num_queries
        if start is not None:
            self.base_model.num_train_queries = round(start + (end - start) * progress)


class EfficientDETRModel(EfficientDETRPreTrainedModel):
    """Backbone, encoder, dense part and decoder of Efficient DETR.

    The heads are part of it: the dense part's choose the queries, and decoder layers use the boxes
    of those before them. A shared head is ``heads[0]``; heads of their own are the decoder layers'
    in their order and the dense part's last.
    """

    def __init__(self, config: EfficientDETRConfig) -> None:
        super().__init__(config)
        # The schedule's number of queries; set_training_progress sets it.
        self.num_train_queries: int | None = None
        self.backbone = Backbone(
            config.backbone_config,
            pretrained=config.use_pretrained_backbone,
            norm=config.backbone_norm,
            num_frozen_stages=config.frozen_backbone_stages,
        )
        self.input_projection = FeatureProjection(
            in_channels=self.backbone.channels,
            hidden_size=config.d_model,
            num_levels=config.num_feature_levels,
        )
        self.position_embedding = SinePositionEmbedding(config.d_model, offset=CELL_CENTER)
        # Only the encoder reads them.
        self.level_embeddings = (
            nn.Embedding(config.num_feature_levels, config.d_model)
            if config.encoder_layers
            else None
        )
        self.encoder_layers = nn.ModuleList(
            DeformableTransformerEncoderLayer(
                hidden_size=config.d_model,
                num_heads=config.encoder_attention_heads,
                num_levels=config.num_feature_levels,
                num_points=config.encoder_n_points,
                inner_size=config.encoder_ffn_dim,
                activation=config.activation_function,
                dropout=config.dropout,
                activation_dropout=config.activation_dropout,
            )
            for _ in range(config.encoder_layers)
        )
        if config.has_dense_part:
            self.memory_projection = nn.Linear(config.d_model, config.d_model)
            self.memory_norm = nn.LayerNorm(config.d_model)
        if config.reference_point_init == "learnable":
            # In inverse-sigmoid space.
            self.reference_point_embeddings = nn.Embedding(config.num_queries, 2)
        if config.query_init == "learnable":
            self.query_embeddings = nn.Embedding(config.num_queries, config.d_model)
        num_coordinates = 4 if config.reference_point_init == "dense" else 2
        self.query_projection = nn.Linear(num_coordinates * config.d_model // 2, config.d_model)
        self.query_norm = nn.LayerNorm(config.d_model)
        self.decoder_layers = nn.ModuleList(
            DeformableTransformerDecoderLayer(
                config,
                hidden_size=config.d_model,
                num_heads=config.decoder_attention_heads,
                num_levels=config.num_feature_levels,
                num_points=config.decoder_n_points,
                inner_size=config.decoder_ffn_dim,
                activation=config.activation_function,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
            )
            for _ in range(config.decoder_layers)
        )
        num_heads = 1 if config.share_head else config.decoder_layers + config.has_dense_part
        self.heads = nn.ModuleList(
            DetectionHead(hidden_size=config.d_model, num_labels=config.num_labels)
            for _ in range(num_heads)
        )
        self.post_init()

    def head_of_layer(self, index: int) -> DetectionHead:
        """The head that reads decoder layer ``index``, counted from 0."""
        return self.heads[0 if self.config.share_head else index]

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_recording: bool = False,
        **kwargs: object,
    ) -> EfficientDETRModelOutput:
        """Turn pictures into object queries and boxes.

        Args:
            pixel_values: (batch, channels, height, width), normalised colours.
            pixel_mask: (batch, height, width), 1 = picture, 0 = padding; None if nothing is padded.
            output_attentions: Return attention weights and sampling locations; those of
                self-attention need ``attn_implementation="eager"``.
            output_hidden_states: Return the states between the layers.
            output_recording: Return what each decoder layer starts from and looks at, see
                :mod:`hf_querydet.recording`.
            kwargs: Of the ecosystem's trainers and tests, of no effect.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        # Features: all levels as tokens (batch, num_tokens, d_model)
        features = project_features(
            self.backbone(pixel_values, pixel_mask),
            pixel_mask,
            self.input_projection,
            self.position_embedding,
            self.level_embeddings,
        )
        spatial_shapes, valid_ratios = features.spatial_shapes, features.valid_ratios
        padding_mask = features.padding_mask

        # Encoder
        memory, encoder_states, encoder_attentions = encode_levels(
            self.encoder_layers,
            features,
            keep_states=output_hidden_states,
            keep_weights=output_attentions,
        )

        # Dense part: predictions at every token, and which tokens are best
        dense, best, usable_queries = None, None, None
        if self.config.has_dense_part:
            dense = self._dense_predictions(memory, features)
            best, usable_queries = self._best_tokens(dense)

        # Queries: where they start, and as what
        points, boxes = self._references(memory, dense, best)
        reference_points, reference_boxes = points, boxes
        object_queries = self._contents(memory, best)
        query_positions = self._positions(points if boxes is None else boxes, memory.dtype)

        # Sparse part: the decoder
        decoder_states, layer_boxes = [object_queries], []
        decoder_attentions, cross_attentions, cross_locations, layer_records = [], [], [], []
        for index, layer in enumerate(self.decoder_layers):
            # From the picture to each level's padded map; sizes as well as centres.
            level_points, level_boxes = None, None
            if boxes is None:
                level_points = points[:, :, None] * valid_ratios[:, None]
                boxes = torch.cat([points, torch.full_like(points, POINT_BOX_SIZE)], dim=-1)
            else:
                level_boxes = boxes[:, :, None] * valid_ratios.repeat(1, 1, 2)[:, None]
            object_queries, self_weights, locations, cross_weights = layer(
                object_queries,
                query_positions,
                memory,
                spatial_shapes,
                level_points,
                level_boxes,
                padding_mask,
                usable_queries,
            )
            if output_recording:
                starts_from_points = level_boxes is None
                layer_records.append(
                    LayerRecord(
                        SamplingRecord(locations.detach(), cross_weights.detach()),
                        reference_points=points.detach() if starts_from_points else None,
                        reference_boxes=None if starts_from_points else boxes,
                    )
                )
            predicted = refine_boxes(self.head_of_layer(index).box_deltas(object_queries), boxes)
            # The next layer starts from these boxes, and does not train this layer through them.
            boxes = predicted.detach()
            layer_boxes.append(predicted)
            decoder_states.append(object_queries)
            decoder_attentions.append(self_weights)
            cross_attentions.append(cross_weights)
            cross_locations.append(locations)

        return EfficientDETRModelOutput(
            last_hidden_state=object_queries,
            intermediate_hidden_states=torch.stack(decoder_states[1:]),
            encoder_last_hidden_state=memory,
            decoder_hidden_states=tuple(decoder_states) if output_hidden_states else None,
            decoder_attentions=tuple(decoder_attentions) if output_attentions else None,
            cross_attentions=samples_by_head(cross_attentions) if output_attentions else None,
            encoder_hidden_states=tuple(encoder_states) if output_hidden_states else None,
            encoder_attentions=samples_by_head(encoder_attentions) if output_attentions else None,
            intermediate_boxes=torch.stack(layer_boxes),
            encoder_predictions=dense,
            cross_sampling_locations=samples_by_head(cross_locations)
            if output_attentions
            else None,
            reference_points=reference_points,
            reference_boxes=reference_boxes,
            usable_queries=usable_queries,
            layer_records=tuple(layer_records) if output_recording else None,
        )

    def _dense_predictions(self, memory: Tensor, features: LevelFeatures) -> SetPredictions:
        """Classes and a box at every token, by the head of the dense part."""
        anchors, is_usable = encoder_proposals(
            features.spatial_shapes, features.valid_ratios, features.padding_mask
        )
        head = self.heads[0 if self.config.share_head else -1]
        tokens = self.memory_norm(self.memory_projection(memory))
        return SetPredictions(
            logits=head.class_head(tokens)[None],
            pred_boxes=refine_boxes(head.box_deltas(tokens), anchors)[None],
            is_usable=is_usable,
        )

    def _best_tokens(self, dense: SetPredictions) -> tuple[Tensor, Tensor]:
        """Indices of the tokens with the highest class score, best first, and which are usable.

        All levels compete, and a token counts with the class it is most certain of. Pictures of a
        batch have as many indices; where one runs out of usable tokens, unusable ones follow.
        """
        num_queries = self.config.num_queries
        if self.training and self.num_train_queries is not None:
            num_queries = self.num_train_queries
        scores = dense.logits[0].detach().amax(-1).masked_fill(~dense.is_usable, -math.inf)
        best = scores.topk(min(num_queries, scores.shape[1]), dim=1).indices
        return best, dense.is_usable.gather(1, best)

    def _references(
        self, memory: Tensor, dense: SetPredictions | None, best: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Points (batch, num_queries, 2) or boxes (batch, num_queries, 4), float32."""
        kind = self.config.reference_point_init
        if kind == "dense":
            # Detached: the dense loss alone trains the dense boxes.
            boxes = dense.pred_boxes[0].detach()
            return None, boxes.gather(1, best[..., None].expand(-1, -1, 4))
        if kind == "learnable":
            points = self.reference_point_embeddings.weight
            points = points.to(torch.promote_types(points.dtype, torch.float32)).sigmoid()[None]
        else:
            points = initial_reference_points(kind, self.config.num_queries, memory.device)
        if best is not None:
            # A small picture may have fewer tokens than there are points.
            points = points[:, : best.shape[1]]
        return points.expand(memory.shape[0], -1, -1), None

    def _contents(self, memory: Tensor, best: Tensor | None) -> Tensor:
        """What the queries start as, (batch, num_queries, d_model)."""
        if self.config.query_init == "dense":
            # Not detached: the sparse loss trains the encoder through its features.
            return memory.gather(1, best[..., None].expand(-1, -1, memory.shape[-1]))
        queries = self.query_embeddings.weight.to(memory.dtype)
        queries = queries[: None if best is None else best.shape[1]]
        return queries.expand(memory.shape[0], -1, -1)

    def _positions(self, references: Tensor, dtype: torch.dtype) -> Tensor:
        """Position part of the queries from their references, for all decoder layers."""
        # The coordinates in their order: (cx, cy, w, h) or (x, y).
        features = sine_features(references * (2 * math.pi), self.config.d_model // 2).flatten(2)
        return self.query_norm(self.query_projection(features.to(dtype)))


class EfficientDETRForObjectDetection(ObjectDetectionMixin, EfficientDETRPreTrainedModel):
    """Efficient DETR with its predictions and its loss.

    The loss is that of the sparse part and, where there is one, of the dense part, whatever
    ``auxiliary_loss`` says: it trains what chooses the queries. Both are matched to the same
    labels, each on its own.
    """

    output_class = EfficientDETRDetectionOutput

    def __init__(self, config: EfficientDETRConfig) -> None:
        super().__init__(config)
        self.model = EfficientDETRModel(config)
        self.criterion = build_criterion(config, FocalClassification(alpha=config.focal_alpha))
        self.post_init()

    def predict(self, outputs: EfficientDETRModelOutput, first_layer: int) -> SetPredictions:
        """See :meth:`ObjectDetectionMixin.predict`."""
        logits = torch.stack(
            [
                self.model.head_of_layer(i).class_head(outputs.intermediate_hidden_states[i])
                for i in range(first_layer, self.config.decoder_layers)
            ]
        )
        usable_queries = outputs.usable_queries
        if usable_queries is not None:
            lowest = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(~usable_queries[..., None], lowest)
        return SetPredictions(
            logits=logits,
            pred_boxes=outputs.intermediate_boxes[first_layer:],
            is_usable=usable_queries,
        )
