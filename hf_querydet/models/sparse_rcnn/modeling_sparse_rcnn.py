"""Sparse R-CNN, end-to-end object detection with learnable proposals (arXiv:2011.12450), Fig. 3.

What differs from DETR: no encoder and no attention to the picture. A query is a learned proposal, a
box and a feature. Each of six heads pools the proposal's box from a feature pyramid, lets the
proposal's feature filter what was pooled, and moves the box.

Boxes are absolute xyxy in pixels of the canvas inside the model, and leave it normalised cxcywh as
those of every detector. Nothing is masked: pooling and pyramid see the canvas as it is, so that a
picture's predictions depend on the size of its canvas. The canvas is padded to whole multiples of
32 here, as in the authors' code.
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
from hf_querydet.models.sparse_rcnn.configuration_sparse_rcnn import (
    COARSEST_STRIDE,
    SparseRCNNConfig,
)
from hf_querydet.ops.boxes import apply_box_deltas, boxes_cxcywh_to_xyxy, boxes_xyxy_to_cxcywh
from hf_querydet.outputs import DetectionOutput, DetectorModelOutput, SetPredictions
from hf_querydet.recording import LayerRecord, RegionRecord

COARSEST_LEVEL = 5  # of stride 32
WHOLE_PICTURE = (0.5, 0.5, 1.0, 1.0)


@dataclass
class SparseRCNNModelOutput(DetectorModelOutput):
    """Output of :class:`SparseRCNNModel`.

    There is no memory and no cross-attention: ``encoder_last_hidden_state``, ``cross_attentions``
    and ``encoder_attentions`` are None.

    Attributes:
        encoder_hidden_states: The levels of the feature pyramid as tokens (batch, num_tokens,
            d_model), fine to coarse, in a tuple of one, if asked for.
        intermediate_boxes: Boxes that each stage predicts, (decoder_layers, batch, num_queries, 4),
            normalised cxcywh, at least float32.
    """

    intermediate_boxes: Tensor | None = None


@dataclass
class SparseRCNNDetectionOutput(DetectionOutput):
    """Output of :class:`SparseRCNNForObjectDetection`.

    Attributes:
        intermediate_boxes: See :class:`SparseRCNNModelOutput`.
    """

    intermediate_boxes: Tensor | None = None


class DynamicInstanceInteractiveHead(GradientCheckpointingLayer):
    """One stage of Sparse R-CNN (Sec. 3.3, Fig. 4): it refines every proposal's feature and box."""

    def __init__(self, config: SparseRCNNConfig, *, finest_level: int) -> None:
        super().__init__()
        self.finest_level = finest_level
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
            filter_channels=(config.dynamic_dim, config.d_model),
            num_positions=config.pooling_size**2,
        )
        self.interaction_norm = nn.LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout)
        self.feed_forward = FeedForward(
            hidden_size=config.d_model,
            inner_size=config.decoder_ffn_dim,
            activation=config.activation_function,
            dropout=config.dropout,
            activation_dropout=config.activation_dropout,
        )
        self.class_tower = PredictionTower(
            hidden_size=config.d_model, num_layers=config.class_tower_layers
        )
        num_no_object = 0 if config.use_focal else 1
        self.class_head = nn.Linear(config.d_model, config.num_labels + num_no_object)
        self.box_tower = PredictionTower(
            hidden_size=config.d_model, num_layers=config.box_tower_layers
        )
        self.box_head = nn.Linear(config.d_model, 4)

    def forward(
        self,
        proposal_features: Tensor,
        proposal_boxes: Tensor,
        pyramid_tokens: Tensor,
        spatial_shapes: SpatialShapes,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Refine the proposals.

        Args:
            proposal_features: (batch, num_queries, d_model).
            proposal_boxes: (batch, num_queries, 4), xyxy in pixels of the canvas.
            pyramid_tokens: Maps of the feature pyramid, fine to coarse, (batch, num_tokens,
                d_model).
            spatial_shapes: (height, width) of every map.

        Returns:
            Features of the same shape; boxes of the same shape, at least float32; the weights of
            self-attention if the attention implementation returns them.
        """
        # Attention among proposals, without positions
        update, weights = self.self_attention(
            proposal_features, proposal_features, proposal_features
        )
        proposal_features = self.self_attention_norm(proposal_features + self.dropout(update))
        # Each proposal with the features of its own box
        regions = pool_regions(
            pyramid_tokens,
            spatial_shapes,
            proposal_boxes,
            finest_level=self.finest_level,
            output_size=self.pooling_size,
            sampling_ratio=self.pooling_sampling_ratio,
        )
        update = self.dynamic_convolution(proposal_features, regions)
        proposal_features = self.interaction_norm(proposal_features + self.dropout(update))
        # Feed-forward
        proposal_features = self.feed_forward(proposal_features)
        # Box
        box_deltas = self.box_head(self.box_tower(proposal_features))
        return proposal_features, apply_box_deltas(box_deltas, proposal_boxes), weights

    def classify(self, proposal_features: Tensor) -> Tensor:
        """Logits (..., num_classes) of this stage's output features (..., d_model)."""
        return self.class_head(self.class_tower(proposal_features))


class SparseRCNNPreTrainedModel(DetectorPreTrainedModel):
    """Base class of the Sparse R-CNN models."""

    config: SparseRCNNConfig
    # Of a stage only the part that has nearly all of its weights: what classifies runs outside the
    # stage's forward, where weights that were divided with the stage are not gathered.
    _no_split_modules = ("Backbone", "FeaturePyramid", "DynamicConvolution")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As :meth:`DetectorPreTrainedModel._init_weights`, with the values of these authors.

        All matrices of a stage are Xavier uniform. The authors let the stages start with equal
        biases; here each draws its own.
        """
        super()._init_weights(module)
        if isinstance(module, PredictionTower):
            for layer in module.layers:
                init.xavier_uniform_(layer.weight)
        elif isinstance(module, DynamicInstanceInteractiveHead):
            init.xavier_uniform_(module.class_head.weight)
            init.xavier_uniform_(module.box_head.weight)
            if self.config.use_focal:
                # The authors find this bias by its length, the number of classes, and with some
                # numbers of classes hit other tensors too.
                init_focal_prior(module.class_head)
        elif isinstance(module, SparseRCNNModel):
            boxes = module.proposal_boxes.weight
            init.copy_(boxes, torch.tensor(WHOLE_PICTURE).to(boxes).expand_as(boxes))


class SparseRCNNModel(SparseRCNNPreTrainedModel):
    """Backbone, feature pyramid, proposals and stages of Sparse R-CNN.

    The box heads are part of it: each stage pools from the boxes of the one before.
    """

    def __init__(self, config: SparseRCNNConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(
            config.backbone_config,
            pretrained=config.use_pretrained_backbone,
            norm=config.backbone_norm,
            num_frozen_stages=config.frozen_backbone_stages,
        )
        channels = self.backbone.channels
        finest_level = COARSEST_LEVEL - len(channels) + 1
        self.strides = [2**level for level in range(finest_level, COARSEST_LEVEL + 1)]
        self.feature_pyramid = FeaturePyramid(in_channels=channels, hidden_size=config.d_model)
        self.proposal_boxes = nn.Embedding(config.num_queries, 4)  # cxcywh of the picture
        self.proposal_features = nn.Embedding(config.num_queries, config.d_model)
        self.stages = nn.ModuleList(
            DynamicInstanceInteractiveHead(config, finest_level=finest_level)
            for _ in range(config.decoder_layers)
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
    ) -> SparseRCNNModelOutput:
        """Turn pictures into proposals.

        Args:
            pixel_values: (batch, channels, height, width), normalised colours.
            pixel_mask: (batch, height, width), 1 = picture, 0 = padding; None if nothing is padded.
                Read for the size of each picture.
            output_attentions: Return the weights of self-attention (with
                ``attn_implementation="eager"``).
            output_hidden_states: Return the features between the stages, and the pyramid.
            output_recording: Return what each decoder layer starts from and looks at, see
                :mod:`hf_querydet.recording`.
            kwargs: Of the ecosystem's trainers and tests, of no effect.

        Raises:
            ValueError: If the backbone's maps do not end at stride 32, each half as fine as the one
                before.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        # Feature pyramid of the canvas, padding and all
        canvas = pad_canvas(pixel_values, multiple=COARSEST_STRIDE)
        maps = [features for features, _ in self.backbone(canvas)]
        check_strides(maps, canvas, strides=self.strides)
        levels = self.feature_pyramid(maps)
        tokens, spatial_shapes = flatten_levels(levels)

        # Proposals: learned relative to the picture, pixels from here on
        scale = picture_sizes(pixel_values, pixel_mask).repeat(1, 2)[:, None]  # (batch, 1, 4)
        boxes = boxes_cxcywh_to_xyxy(self.proposal_boxes.weight.to(scale.dtype) * scale)
        features = self.proposal_features.weight.expand(pixel_values.shape[0], -1, -1)

        # Stages
        all_features, all_boxes, attentions, layer_records = [features], [], [], []
        for stage in self.stages:
            features, predicted, weights = stage(features, boxes, tokens, spatial_shapes)
            if output_recording:
                strides = level_strides(
                    boxes, finest_level=stage.finest_level, num_levels=len(spatial_shapes)
                )
                references = boxes_xyxy_to_cxcywh(boxes.detach() / scale)
                layer_records.append(
                    LayerRecord(RegionRecord(references, strides), reference_boxes=references)
                )
            # The next stage starts from these boxes, and does not train this one through them.
            boxes = predicted.detach()
            all_features.append(features)
            all_boxes.append(boxes_xyxy_to_cxcywh(predicted / scale))
            attentions.append(weights)

        return SparseRCNNModelOutput(
            last_hidden_state=features,
            intermediate_hidden_states=torch.stack(all_features[1:]),
            decoder_hidden_states=tuple(all_features) if output_hidden_states else None,
            decoder_attentions=tuple(attentions) if output_attentions else None,
            encoder_hidden_states=(tokens,) if output_hidden_states else None,
            intermediate_boxes=torch.stack(all_boxes),
            layer_records=tuple(layer_records) if output_recording else None,
        )


class SparseRCNNForObjectDetection(ObjectDetectionMixin, SparseRCNNPreTrainedModel):
    """Sparse R-CNN with its predictions and its loss.

    The paper describes the L1 distance of centres and sizes; as in the authors' code it is that of
    corners, relative to the unpadded picture.
    """

    output_class = SparseRCNNDetectionOutput

    def __init__(self, config: SparseRCNNConfig) -> None:
        super().__init__(config)
        self.model = SparseRCNNModel(config)
        self.criterion = build_criterion(
            config,
            FocalClassification(alpha=config.focal_alpha)
            if config.use_focal
            else SoftmaxClassification(no_object_weight=config.eos_coefficient),
            box_coordinates=boxes_cxcywh_to_xyxy,
        )
        self.post_init()

    def predict(self, outputs: SparseRCNNModelOutput, first_layer: int) -> SetPredictions:
        """See :meth:`ObjectDetectionMixin.predict`."""
        stages = zip(
            self.model.stages[first_layer:],
            outputs.intermediate_hidden_states[first_layer:],
            strict=True,
        )
        return SetPredictions(
            logits=torch.stack([stage.classify(features) for stage, features in stages]),
            pred_boxes=outputs.intermediate_boxes[first_layer:],
        )
