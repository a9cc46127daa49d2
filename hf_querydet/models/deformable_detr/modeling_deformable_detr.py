"""Deformable DETR, deformable transformers for end-to-end object detection (arXiv:2010.04159).

What differs from DETR: several feature levels (Fig. 1 and Fig. 4), attention that samples a few
points around a reference instead of all cells (Sec. 4.1), boxes predicted relative to references,
sigmoid classes; and two options, iterative box refinement and two-stage (Sec. 4.2, A.4).
"""

import math
import os
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import can_return_tuple

from hf_querydet.configuration_utils import HUB_OPTIONS
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
from hf_querydet.layers.feature_levels import encoder_proposals
from hf_querydet.layers.position_embedding import (
    CELL_CENTER,
    LearnedPositionEmbedding,
    SinePositionEmbedding,
    sine_features,
)
from hf_querydet.layers.projection import FeatureProjection, project_features
from hf_querydet.losses import FocalClassification
from hf_querydet.modeling_utils import (
    DetectorPreTrainedModel,
    ObjectDetectionMixin,
    build_criterion,
)
from hf_querydet.models.deformable_detr.checkpoint_mapping import (
    ONE_HEAD_NAMES,
    check_keeps_refinement,
    copy_objectness,
    head_has_another_name,
    recreated_objectness,
    share_class_head,
)
from hf_querydet.models.deformable_detr.configuration_deformable_detr import DeformableDETRConfig
from hf_querydet.ops.boxes import place_boxes, refine_boxes
from hf_querydet.outputs import DetectionOutput, DetectorModelOutput, SetPredictions
from hf_querydet.recording import LayerRecord, SamplingRecord

INITIAL_SIZE_BIAS = -2.0


@dataclass
class DeformableDETRModelOutput(DetectorModelOutput):
    """Output of :class:`DeformableDETRModel`.

    Attributes:
        cross_attentions: Weights of the sampled points per decoder layer, (batch, heads,
            num_queries, levels * points), level after level, if asked for.
        encoder_attentions: The same of the encoder, (batch, heads, num_tokens, levels * points).
        intermediate_boxes: Boxes that each decoder layer predicts, (decoder_layers, batch,
            num_queries, 4), normalised cxcywh, at least float32.
        encoder_predictions: Of a two-stage detector: the proposal of every token, one layer. Class
            0 stands for "any object".
        cross_sampling_locations: Where each decoder layer looks, (batch, heads, num_queries, levels
            * points, 2), normalised (x, y) in the padded canvas, if attentions are asked for.
    """

    intermediate_boxes: Tensor | None = None
    encoder_predictions: SetPredictions | None = None
    cross_sampling_locations: tuple[Tensor, ...] | None = None


@dataclass
class DeformableDETRDetectionOutput(DetectionOutput):
    """Output of :class:`DeformableDETRForObjectDetection`.

    The terms of ``loss_dict`` with suffix ``_enc`` are those of two-stage proposals.

    Attributes:
        intermediate_boxes: See :class:`DeformableDETRModelOutput`, as the fields that follow.
        encoder_predictions: As above.
        cross_sampling_locations: As above.
    """

    intermediate_boxes: Tensor | None = None
    encoder_predictions: SetPredictions | None = None
    cross_sampling_locations: tuple[Tensor, ...] | None = None


class DeformableDETRPreTrainedModel(DetectorPreTrainedModel):
    """Base class of the Deformable DETR models."""

    config: DeformableDETRConfig
    _head_has_another_name = False
    _no_split_modules = (
        "Backbone",
        "DeformableTransformerEncoderLayer",
        "DeformableTransformerDecoderLayer",
    )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Self:
        """Load a detector; see :meth:`DetectorPreTrainedModel.from_pretrained`.

        Beyond it: Files of transformers leave out what a fresh model of theirs has tied; the one
        class head of a refined detector goes to each of its layers, and the one head of a detector
        without refinement is found under whichever layer's name it was kept. And where new labels
        re-create the class heads of a two-stage detector, row 0 of the encoder's stays: it scores
        whether a token is any object, which does not depend on the labels.

        Raises:
            ValueError: If ``with_box_refine=False`` would drop heads of the file.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        refines = kwargs.get(
            "with_box_refine", getattr(kwargs.get("config"), "with_box_refine", None)
        )
        if refines is False and pretrained_model_name_or_path is not None:
            hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            stored, _ = cls.config_class.get_config_dict(
                pretrained_model_name_or_path, **hub_options
            )
            check_keeps_refinement(stored, pretrained_model_name_or_path)

        def load(**options: Any) -> tuple[Self, dict[str, Any]]:
            return super(DeformableDETRPreTrainedModel, cls).from_pretrained(
                pretrained_model_name_or_path, *args, **options, output_loading_info=True
            )

        model, info = load(**kwargs)
        if model._head_has_another_name:
            kwargs["key_mapping"] = {**(kwargs.get("key_mapping") or {}), **ONE_HEAD_NAMES}
            model, info = load(**kwargs)
        num_stored_labels = recreated_objectness(model, info)
        if num_stored_labels is not None:
            options = {k: v for k, v in kwargs.items() if k not in ("id2label", "label2id")}
            if "config" in options:
                options["config"] = deepcopy(options["config"])
                options["config"].num_labels = num_stored_labels
            else:
                options["num_labels"] = num_stored_labels
            copy_objectness(load(**options)[0], model)
        return (model, info) if wants_info else model

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        # Called by transformers before it reports what is missing.
        share_class_head(self, loading_info)
        self._head_has_another_name = head_has_another_name(self, loading_info)
        super()._adjust_missing_and_unexpected_keys(loading_info)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As :meth:`DetectorPreTrainedModel._init_weights`, with the values of these authors."""
        super()._init_weights(module)
        if isinstance(module, DeformableDETRModel):
            if module.config.two_stage:
                init.xavier_uniform_(module.memory_projection.weight)
                init.xavier_uniform_(module.query_projection.weight)
            else:
                init.xavier_uniform_(module.reference_point_head.weight)
                init.zeros_(module.reference_point_head.bias)


class DeformableDETRModel(DeformableDETRPreTrainedModel):
    """Backbone, encoder and decoder of Deformable DETR.

    The heads are part of it: with refinement the decoder uses the boxes of each layer, in two-stage
    the encoder's scores choose the queries. In two-stage the last head is the encoder's.
    """

    def __init__(self, config: DeformableDETRConfig) -> None:
        super().__init__(config)
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
        self.position_embedding = (
            SinePositionEmbedding(config.d_model, offset=CELL_CENTER)
            if config.position_embedding_type == "sine"
            else LearnedPositionEmbedding(config.d_model)
        )
        # Only the encoder reads them.
        self.level_embeddings = (
            nn.Embedding(config.num_feature_levels, config.d_model)
            if config.encoder_layers
            else None
        )
        if config.two_stage:
            self.memory_projection = nn.Linear(config.d_model, config.d_model)
            self.memory_norm = nn.LayerNorm(config.d_model)
            self.query_projection = nn.Linear(2 * config.d_model, 2 * config.d_model)
            self.query_norm = nn.LayerNorm(2 * config.d_model)
        else:
            # Position and content of each query, side by side.
            self.query_embeddings = nn.Embedding(config.num_queries, 2 * config.d_model)
            self.reference_point_head = nn.Linear(config.d_model, 2)
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
        num_heads = config.decoder_layers if config.with_box_refine else 1
        # Only the first boxes of a one-stage detector have no size to start from.
        size_biases = [0.0 if config.two_stage else INITIAL_SIZE_BIAS]
        size_biases += [0.0] * (num_heads + config.two_stage - 1)
        self.heads = nn.ModuleList(
            DetectionHead(hidden_size=config.d_model, num_labels=config.num_labels, size_bias=bias)
            for bias in size_biases
        )
        if not config.with_box_refine:
            # Older files hold a copy of the one head for each layer.
            self._keys_to_ignore_on_load_unexpected = {
                *(self._keys_to_ignore_on_load_unexpected or ()),
                r"\bheads\.[1-9]",
            }
        self.post_init()

    def head_of_layer(self, index: int) -> DetectionHead:
        """The head that reads decoder layer ``index``, counted from 0."""
        return self.heads[index if self.config.with_box_refine else 0]

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_recording: bool = False,
        **kwargs: object,
    ) -> DeformableDETRModelOutput:
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

        Raises:
            ValueError: If a two-stage detector shall choose more proposals than there are tokens.
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

        # Queries and their references
        encoder_predictions, points, boxes = None, None, None
        if self.config.two_stage:
            encoder_predictions, boxes = self._propose(
                memory, spatial_shapes, valid_ratios, padding_mask
            )
            object_queries, query_positions = self._queries_of_boxes(boxes, memory.dtype)
        else:
            object_queries, query_positions = self._learned_queries(memory)
            points = self.reference_point_head(query_positions)
            points = points.to(torch.promote_types(points.dtype, torch.float32)).sigmoid()

        # Decoder
        decoder_states, layer_boxes = [object_queries], []
        decoder_attentions, cross_attentions, cross_locations, layer_records = [], [], [], []
        for index, layer in enumerate(self.decoder_layers):
            # From the picture to each level's padded map; sizes as well as centres.
            level_points, level_boxes = None, None
            if boxes is None:
                level_points = points[:, :, None] * valid_ratios[:, None]
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
            )
            if output_recording:
                layer_records.append(
                    LayerRecord(
                        SamplingRecord(locations.detach(), cross_weights.detach()),
                        reference_points=points.detach() if boxes is None else None,
                        reference_boxes=boxes,
                    )
                )
            deltas = self.head_of_layer(index).box_deltas(object_queries)
            if boxes is None:
                predicted = place_boxes(deltas, points)
            else:
                predicted = refine_boxes(deltas, boxes)
            # The next layer starts from these boxes, and does not train this layer through them.
            if self.config.with_box_refine:
                boxes = predicted.detach()
            layer_boxes.append(predicted)
            decoder_states.append(object_queries)
            decoder_attentions.append(self_weights)
            cross_attentions.append(cross_weights)
            cross_locations.append(locations)

        return DeformableDETRModelOutput(
            last_hidden_state=object_queries,
            intermediate_hidden_states=torch.stack(decoder_states[1:]),
            encoder_last_hidden_state=memory,
            decoder_hidden_states=tuple(decoder_states) if output_hidden_states else None,
            decoder_attentions=tuple(decoder_attentions) if output_attentions else None,
            cross_attentions=samples_by_head(cross_attentions) if output_attentions else None,
            encoder_hidden_states=tuple(encoder_states) if output_hidden_states else None,
            encoder_attentions=samples_by_head(encoder_attentions) if output_attentions else None,
            intermediate_boxes=torch.stack(layer_boxes),
            encoder_predictions=encoder_predictions,
            cross_sampling_locations=samples_by_head(cross_locations)
            if output_attentions
            else None,
            layer_records=tuple(layer_records) if output_recording else None,
        )

    def _learned_queries(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Content and position of the queries, the same for every picture."""
        queries = self.query_embeddings.weight.to(memory.dtype).expand(memory.shape[0], -1, -1)
        query_positions, object_queries = queries.chunk(2, dim=-1)
        return object_queries, query_positions

    def _propose(
        self,
        memory: Tensor,
        spatial_shapes: list[tuple[int, int]],
        valid_ratios: Tensor,
        padding_mask: Tensor | None,
    ) -> tuple[SetPredictions, Tensor]:
        """First stage: a box for every token, and the best of them, (batch, num_queries, 4)."""
        num_proposals = self.config.two_stage_num_proposals
        if memory.shape[1] < num_proposals:
            raise ValueError(
                f"two_stage_num_proposals is {num_proposals}, but the pictures have only "
                f"{memory.shape[1]} tokens; use larger pictures or set fewer proposals."
            )
        proposal_boxes, is_usable = encoder_proposals(spatial_shapes, valid_ratios, padding_mask)
        head = self.heads[-1]
        # Tokens without a proposal are cleared. They can be chosen all the same, as in the authors'
        # code; their box is the whole canvas' far corner (1, 1, 1, 1).
        tokens = memory.masked_fill(~is_usable[..., None], 0.0)
        tokens = self.memory_norm(self.memory_projection(tokens))
        logits = head.class_head(tokens)
        proposal_logits = torch.logit(proposal_boxes).masked_fill(~is_usable[..., None], math.inf)
        boxes = (head.box_deltas(tokens) + proposal_logits).sigmoid()
        # Class 0 is what the encoder's loss trains for every object.
        best = logits[..., 0].topk(num_proposals, dim=1).indices
        chosen = boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        return SetPredictions(logits=logits[None], pred_boxes=boxes[None]), chosen

    def _queries_of_boxes(self, boxes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Content and position of queries from their reference boxes alone."""
        # Four coordinates in their order: cx, cy, w, h.
        features = sine_features(boxes * (2 * math.pi), self.config.d_model // 2).flatten(2)
        queries = self.query_norm(self.query_projection(features.to(dtype)))
        query_positions, object_queries = queries.chunk(2, dim=-1)
        return object_queries, query_positions


class DeformableDETRForObjectDetection(ObjectDetectionMixin, DeformableDETRPreTrainedModel):
    """Deformable DETR with its predictions and its loss."""

    output_class = DeformableDETRDetectionOutput

    def __init__(self, config: DeformableDETRConfig) -> None:
        super().__init__(config)
        self.model = DeformableDETRModel(config)
        self.criterion = build_criterion(config, FocalClassification(alpha=config.focal_alpha))
        self.post_init()

    def predict(self, outputs: DeformableDETRModelOutput, first_layer: int) -> SetPredictions:
        """See :meth:`ObjectDetectionMixin.predict`."""
        logits = [
            self.model.head_of_layer(layer).class_head(outputs.intermediate_hidden_states[layer])
            for layer in range(first_layer, self.config.decoder_layers)
        ]
        return SetPredictions(
            logits=torch.stack(logits), pred_boxes=outputs.intermediate_boxes[first_layer:]
        )

    def encoder_labels(self, labels: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The encoder tells object from background: every object is of class 0 to it."""
        return [
            {**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels
        ]
