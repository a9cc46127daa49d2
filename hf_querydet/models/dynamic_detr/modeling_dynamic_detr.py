"""Dynamic DETR, end-to-end object detection with dynamic attention (ICCV 2021, pp. 2988-2997).

What differs from DETR, and why: attention over all cells of several feature levels is too expensive
to be learned soon, so both attentions become dynamic convolutions. The encoder exchanges features
between neighbouring levels by deformable convolutions, weighs levels and channels, and activates
according to the picture (`dynamic_encoder.py`). In the decoder a query does not attend to all
cells: it has a box, reads the features inside of it, and filters them with a convolution that it
generates itself. Each layer refines the boxes of the one before, starting from the whole picture.
Positions are in the boxes and in the convolutions; there are no position embeddings.

Neither code nor weights were published; what the paper leaves open and what is chosen here is said
in :class:`~hf_querydet.models.dynamic_detr.configuration_dynamic_detr.DynamicDETRConfig`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from hf_querydet.layers.attention import MultiHeadAttention
from hf_querydet.layers.backbone import Backbone
from hf_querydet.layers.canvas import pad_canvas, picture_sizes
from hf_querydet.layers.dropout import Dropout
from hf_querydet.layers.dynamic_convolution import DynamicConvolution
from hf_querydet.layers.feature_levels import SpatialShapes, flatten_levels
from hf_querydet.layers.feature_pyramid import FeaturePyramid
from hf_querydet.layers.feed_forward import FeedForward, PredictionTower
from hf_querydet.layers.initialization import init_focal_prior
from hf_querydet.layers.roi_pooling import check_strides, level_strides, pool_regions
from hf_querydet.losses import FocalClassification, SoftmaxClassification
from hf_querydet.modeling_utils import (
    DetectorPreTrainedModel,
    ObjectDetectionMixin,
    build_criterion,
)
from hf_querydet.models.dynamic_detr.configuration_dynamic_detr import (
    COARSEST_STRIDE,
    NUM_FEATURE_LEVELS,
    NUM_GROUPS,
    DynamicDETRConfig,
)
from hf_querydet.models.dynamic_detr.dynamic_encoder import (
    DeformableConvolution,
    DynamicEncoderLayer,
    DynamicReLU,
    OffsetPrediction,
)
from hf_querydet.ops.boxes import apply_box_deltas, boxes_cxcywh_to_xyxy, boxes_xyxy_to_cxcywh
from hf_querydet.outputs import DetectionOutput, DetectorModelOutput, SetPredictions
from hf_querydet.recording import LayerRecord, RegionRecord

NUM_BOX_LAYERS = 3
WHOLE_PICTURE = (0.5, 0.5, 1.0, 1.0)
CONVOLUTION_STD = 0.01


@dataclass
class DynamicDETRModelOutput(DetectorModelOutput):
    """Output of :class:`DynamicDETRModel`.

    There are neither ``cross_attentions`` nor ``encoder_attentions``: a query looks at its box, a
    level at its neighbours.

    Attributes:
        intermediate_boxes: Boxes that each decoder layer predicts, (decoder_layers, batch,
            num_queries, 4), cxcywh relative to the unpadded picture, at least float32. They may
            reach beyond the picture. Layer t + 1 looks at the boxes of layer t, the first layer at
            the learned boxes.
    """

    intermediate_boxes: Tensor | None = None


@dataclass
class DynamicDETRDetectionOutput(DetectionOutput):
    """Output of :class:`DynamicDETRForObjectDetection`.

    Attributes:
        intermediate_boxes: See :class:`DynamicDETRModelOutput`.
    """

    intermediate_boxes: Tensor | None = None


class DynamicDETRDecoderLayer(GradientCheckpointingLayer):
    """Self-attention among queries, dynamic convolution of their regions, feed-forward; post-norm.

    The paper's formulas leave out residual sums and norms, and the order of both; they stand where
    DETR has them.
    """

    def __init__(self, config: DynamicDETRConfig) -> None:
        super().__init__()
        self.finest_level = config.finest_level
        self.pooling_size = config.pooling_size
        self.pooling_sampling_ratio = config.pooling_sampling_ratio
        self.self_attention = MultiHeadAttention(
            config,
            hidden_size=config.d_model,
            num_heads=config.decoder_attention_heads,
            dropout=config.attention_dropout,
        )
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.dynamic_convolution = DynamicConvolution(
            hidden_size=config.d_model,
            filter_channels=config.filter_channels,
            num_positions=config.pooling_size**2,
        )
        self.dynamic_convolution_norm = nn.LayerNorm(config.d_model)
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
        boxes_xyxy: Tensor,
        encoder_tokens: Tensor,
        spatial_shapes: SpatialShapes,
    ) -> tuple[Tensor, Tensor | None]:
        """Update the queries.

        Args:
            object_queries: (batch, num_queries, d_model).
            boxes_xyxy: Where each query looks, (batch, num_queries, 4), pixels of the canvas.
            encoder_tokens: Maps of the encoder, fine to coarse, (batch, num_tokens, d_model).
            spatial_shapes: (height, width) of every map.

        Returns:
            Queries of the same shape; the weights of self-attention if the attention implementation
            returns them.
        """
        # Self-attention
        update, weights = self.self_attention(object_queries, object_queries, object_queries)
        object_queries = self.self_attention_norm(object_queries + self.dropout(update))
        # Each query's own region, filtered by the query
        regions = pool_regions(
            encoder_tokens,
            spatial_shapes,
            boxes_xyxy,
            finest_level=self.finest_level,
            output_size=self.pooling_size,
            sampling_ratio=self.pooling_sampling_ratio,
        )
        update = self.dynamic_convolution(object_queries, regions)
        object_queries = self.dynamic_convolution_norm(object_queries + self.dropout(update))
        # Feed-forward
        return self.feed_forward(object_queries), weights


class DynamicDETRHead(nn.Module):
    """Class head and box head of one decoder layer.

    The paper writes the boxes as a normalised linear layer with ReLU, which cannot be four
    coordinates; here such layers are hidden ones, and a plain linear layer follows.
    """

    def __init__(self, config: DynamicDETRConfig) -> None:
        super().__init__()
        self.has_focal_prior = config.use_focal
        num_classes = config.num_labels if config.use_focal else config.num_labels + 1
        self.class_tower = PredictionTower(hidden_size=config.d_model, num_layers=1)
        self.class_head = nn.Linear(config.d_model, num_classes)
        self.box_tower = PredictionTower(hidden_size=config.d_model, num_layers=NUM_BOX_LAYERS)
        self.box_head = nn.Linear(config.d_model, 4)

    def classify(self, object_queries: Tensor) -> Tensor:
        """Raw class scores, (..., d_model) to (..., num_labels), with "no object" for softmax."""
        return self.class_head(self.class_tower(object_queries))

    def refine(self, object_queries: Tensor, boxes_xyxy: Tensor) -> Tensor:
        """Boxes xyxy in pixels, (..., 4), from those that the layer looked at."""
        return apply_box_deltas(self.box_head(self.box_tower(object_queries)), boxes_xyxy)


class DynamicDETRPreTrainedModel(DetectorPreTrainedModel):
    """Base class of the Dynamic DETR models."""

    config: DynamicDETRConfig
    _no_split_modules = ("Backbone", "DynamicEncoderLayer", "DynamicDETRDecoderLayer")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As :meth:`DetectorPreTrainedModel._init_weights`, with the values chosen for this paper.

        The encoder starts with ordinary convolutions and ReLU: no offsets, and dynamic ReLU with
        the coefficients of ReLU. Matrices of the decoder are Xavier uniform.
        """
        super()._init_weights(module)
        if isinstance(module, OffsetPrediction):
            init.zeros_(module.convolution.weight)
            init.zeros_(module.convolution.bias)
        elif isinstance(module, DeformableConvolution):
            init.normal_(module.weight, std=CONVOLUTION_STD)
        elif isinstance(module, DynamicReLU):
            init.zeros_(module.coefficients.weight)
            init.zeros_(module.coefficients.bias)
        elif isinstance(module, DynamicDETRHead):
            for layer in (
                *module.class_tower.layers,
                module.class_head,
                *module.box_tower.layers,
                module.box_head,
            ):
                init.xavier_uniform_(layer.weight)
            if module.has_focal_prior:
                init_focal_prior(module.class_head)
        elif isinstance(module, DynamicDETRModel):
            boxes = module.query_boxes.weight
            init.copy_(boxes, boxes.new_tensor(WHOLE_PICTURE).expand_as(boxes))


class DynamicDETRModel(DynamicDETRPreTrainedModel):
    """Backbone, encoder and decoder of Dynamic DETR.

    The heads are part of it, because the boxes of each decoder layer are where the next one looks.
    """

    def __init__(self, config: DynamicDETRConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(
            config.backbone_config,
            pretrained=config.use_pretrained_backbone,
            norm=config.backbone_norm,
            num_frozen_stages=config.frozen_backbone_stages,
        )
        self.feature_pyramid = FeaturePyramid(
            in_channels=self.backbone.channels,
            hidden_size=config.d_model,
            num_levels=NUM_FEATURE_LEVELS,
        )
        self.encoder_layers = nn.ModuleList(
            DynamicEncoderLayer(
                hidden_size=config.d_model,
                num_groups=NUM_GROUPS,
                offset_source=config.offset_source,
                modulated=config.modulated_offsets,
                scale_attention=config.scale_attention,
                activation=config.encoder_activation,
            )
            for _ in range(config.encoder_layers)
        )
        self.query_embeddings = nn.Embedding(config.num_queries, config.d_model)
        # Normalised cxcywh, used as they are.
        self.query_boxes = nn.Embedding(config.num_queries, 4)
        self.decoder_layers = nn.ModuleList(
            DynamicDETRDecoderLayer(config) for _ in range(config.decoder_layers)
        )
        self.heads = nn.ModuleList(DynamicDETRHead(config) for _ in range(config.decoder_layers))
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
    ) -> DynamicDETRModelOutput:
        """Turn pictures into object queries and boxes.

        Args:
            pixel_values: (batch, channels, height, width), normalised colours. The canvas is padded
                to multiples of 32.
            pixel_mask: (batch, height, width), 1 = picture, 0 = padding; None if nothing is padded.
                It only says how large each picture is; padding is not masked.
            output_attentions: Return the weights of self-attention (with
                ``attn_implementation="eager"``).
            output_hidden_states: Return the states between the layers.
            output_recording: Return what each decoder layer starts from and looks at, see
                :mod:`hf_querydet.recording`.
            kwargs: Of the ecosystem's trainers and tests, of no effect.

        Raises:
            ValueError: If the backbone's maps are not those that ``feature_levels`` needs.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        # Features: five levels (batch, d_model, h, w), fine to coarse
        canvas = pad_canvas(pixel_values, multiple=COARSEST_STRIDE)
        maps = [features for features, _ in self.backbone(canvas)]
        check_strides(maps, canvas, strides=self.config.backbone_strides)
        levels = self.feature_pyramid(maps)

        # Encoder
        encoder_states = [levels]
        for layer in self.encoder_layers:
            levels = layer(*levels)
            if output_hidden_states:
                encoder_states.append(levels)

        # Decoder: boxes in pixels, from the learned ones to those of the last layer
        tokens, spatial_shapes = flatten_levels(levels)
        whwh = picture_sizes(pixel_values, pixel_mask).repeat(1, 2)[:, None]
        boxes = boxes_cxcywh_to_xyxy(self.query_boxes.weight.to(whwh.dtype) * whwh)
        object_queries = self.query_embeddings.weight.to(levels[0].dtype)
        object_queries = object_queries.expand(pixel_values.shape[0], -1, -1)
        decoder_states, decoder_attentions = [object_queries], []
        layer_boxes, layer_records = [], []
        for layer, head in zip(self.decoder_layers, self.heads, strict=True):
            object_queries, weights = layer(object_queries, boxes, tokens, spatial_shapes)
            if output_recording:
                strides = level_strides(
                    boxes, finest_level=layer.finest_level, num_levels=len(spatial_shapes)
                )
                references = boxes_xyxy_to_cxcywh(boxes.detach()) / whwh
                layer_records.append(
                    LayerRecord(RegionRecord(references, strides), reference_boxes=references)
                )
            predicted = head.refine(object_queries, boxes)
            # The next layer starts from these boxes, and does not train this layer through them.
            boxes = predicted.detach()
            layer_boxes.append(boxes_xyxy_to_cxcywh(predicted) / whwh)
            decoder_states.append(object_queries)
            decoder_attentions.append(weights)

        return DynamicDETRModelOutput(
            last_hidden_state=object_queries,
            intermediate_hidden_states=torch.stack(decoder_states[1:]),
            encoder_last_hidden_state=tokens,
            decoder_hidden_states=tuple(decoder_states) if output_hidden_states else None,
            decoder_attentions=tuple(decoder_attentions) if output_attentions else None,
            encoder_hidden_states=tuple(flatten_levels(state)[0] for state in encoder_states)
            if output_hidden_states
            else None,
            intermediate_boxes=torch.stack(layer_boxes),
            layer_records=tuple(layer_records) if output_recording else None,
        )


class DynamicDETRForObjectDetection(ObjectDetectionMixin, DynamicDETRPreTrainedModel):
    """Dynamic DETR with its predictions and its loss."""

    output_class = DynamicDETRDetectionOutput

    def __init__(self, config: DynamicDETRConfig) -> None:
        super().__init__(config)
        self.model = DynamicDETRModel(config)
        self.criterion = build_criterion(
            config,
            FocalClassification(alpha=config.focal_alpha)
            if config.use_focal
            else SoftmaxClassification(no_object_weight=config.eos_coefficient),
        )
        self.post_init()

    def predict(self, outputs: DynamicDETRModelOutput, first_layer: int) -> SetPredictions:
        """See :meth:`ObjectDetectionMixin.predict`."""
        layers = zip(
            self.model.heads[first_layer:],
            outputs.intermediate_hidden_states[first_layer:],
            strict=True,
        )
        return SetPredictions(
            logits=torch.stack([head.classify(queries) for head, queries in layers]),
            pred_boxes=outputs.intermediate_boxes[first_layer:],
        )
