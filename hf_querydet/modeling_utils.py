"""What all detectors have in common: loading, saving, first values, the way from pixels to loss."""

import logging
import os
import re
from copy import deepcopy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple
from transformers.utils import logging as transformers_logging

from hf_querydet.configuration_utils import DetectorConfig
from hf_querydet.layers.attention import MultiHeadAttention
from hf_querydet.layers.backbone import Backbone
from hf_querydet.layers.canvas import canvas_shares
from hf_querydet.layers.deformable_attention import MultiScaleDeformableAttention
from hf_querydet.layers.detection_head import DetectionHead
from hf_querydet.layers.dynamic_convolution import DynamicConvolution
from hf_querydet.layers.feature_pyramid import FeaturePyramid
from hf_querydet.layers.feed_forward import FeedForward
from hf_querydet.layers.initialization import (
    init_box_head,
    init_deformable_attention,
    init_feature_projection,
    init_feature_pyramid,
    init_focal_prior,
)
from hf_querydet.layers.position_embedding import LearnedPositionEmbedding
from hf_querydet.layers.projection import FeatureProjection
from hf_querydet.losses import SetCriterion
from hf_querydet.losses.criterion import Classification
from hf_querydet.outputs import DetectionOutput, DetectorModelOutput, SetPredictions
from hf_querydet.recording import DecoderRecording

logger = logging.getLogger(__name__)

# Words that let accelerate divide a model.
PLANNED_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


class DetectorPreTrainedModel(PreTrainedModel):
    """Base class of all detectors.

    Class attributes that a variant sets: ``config`` (as an annotation) and ``_no_split_modules``.
    """

    config: DetectorConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Older files carry the counter of batch norms that are frozen here.
    _keys_to_ignore_on_load_unexpected = (r"num_batches_tracked",)
    # What panoptic detectors of transformers hold beside the detector.
    _mask_head_keys = re.compile(r"^(?:mask_head|bbox_attention)\.")
    # Tensors whose shape follows the number of labels, the only ones that a new label set
    # re-creates.
    _class_head_keys: tuple[str, ...] = ("class_head.weight", "class_head.bias")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Self:
        """Load a detector; see ``PreTrainedModel.from_pretrained``.

        With ``num_labels``, ``id2label`` or ``config``, a class head of another size than there are
        labels is created anew, without ``ignore_mismatched_sizes``. Any other tensor of a wrong
        shape stays an error. ``attn_implementation`` is that of the detector, as in
        :meth:`set_attn_implementation`. ``device_map="auto"`` and its like put the whole detector
        on one accelerator: a detector is too small to be worth dividing.

        Raises:
            RuntimeError: If tensors, other than a class head for new labels, have another shape
                than the checkpoint's.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        ignores_all = kwargs.pop("ignore_mismatched_sizes", False)
        if kwargs.get("device_map") in PLANNED_DEVICE_MAPS:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            kwargs["device_map"] = {"": accelerator or "cpu"}
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        if not ignores_all:
            wants_labels = bool({"num_labels", "id2label", "config"} & set(kwargs))
            cls._check_mismatched_keys(info["mismatched_keys"], new_class_head=wants_labels)
        started_anew = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        for name, module in model.named_modules():
            if isinstance(module, Backbone):
                prefix = f"{name}."
                # transformers leaves the values of timm's networks to timm.
                if module.is_timm:
                    module.reset(
                        key.removeprefix(prefix) for key in started_anew if key.startswith(prefix)
                    )
                # Loading puts new parameters in place of those that were frozen at construction.
                module.freeze_stages()
        return (model, info) if wants_info else model

    @classmethod
    def _check_mismatched_keys(cls, mismatched_keys: set[tuple], *, new_class_head: bool) -> None:
        wrong = sorted(
            f"{key}: {tuple(found)} in the checkpoint, {tuple(wanted)} in the model"
            for key, found, wanted in mismatched_keys
            if not (new_class_head and key.endswith(cls._class_head_keys))
        )
        if wrong:
            listing = "\n  ".join(wrong)
            raise RuntimeError(
                f"The checkpoint does not fit the configuration:\n  {listing}\n"
                "Only the class head is re-created, where num_labels or id2label is passed. Pass "
                "the options that the checkpoint was trained with, or ignore_mismatched_sizes=True "
                "to start these tensors anew."
            )

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        # Called by transformers before it reports what did not fit.
        super()._adjust_missing_and_unexpected_keys(loading_info)
        of_mask_head = {
            key for key in loading_info.unexpected_keys if self._mask_head_keys.search(key)
        }
        if of_mask_head:
            loading_info.unexpected_keys -= of_mask_head
            logger.warning(
                "The checkpoint is panoptic: its mask head is ignored (%d tensors of %s), classes "
                "and boxes are complete.",
                len(of_mask_head),
                " and ".join(sorted({key.split(".")[0] for key in of_mask_head})),
            )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save in this library's layout, whatever the weights were loaded from.

        See ``PreTrainedModel.save_pretrained`` for the arguments.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], **kwargs: Any
    ) -> None:
        """Switch the attention of the detector between ``"sdpa"`` and ``"eager"``.

        The backbone keeps its own: most have no attention and refuse every choice but one. To set
        both, pass ``{"": "sdpa", "backbone_config": "eager"}``.
        """
        if isinstance(attn_implementation, str):
            attn_implementation = {"": attn_implementation}
        super().set_attn_implementation(attn_implementation, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers guesses it from the text of the modeling file. Here all attention that there
        # is a choice for goes through `layers.attention.attend`.
        return True

    def get_input_embeddings(self) -> None:
        """None: pictures are looked up in no table. accelerate asks before it divides weights."""

    def set_training_progress(self, progress: float) -> None:
        """Say how much of a training run is done, before each optimizer step.

        Of no effect unless a variant has something that changes during training. Training loops of
        this library call it with steps done / steps of the run, so that a resumed run goes on where
        it was; a loop of your own should call it on the unwrapped model.

        Args:
            progress: 0 at the first step, 1 at the end.
        """

    def reset_class_head(self) -> None:
        """Give the class heads of all layers new first values, those for new labels.

        Loading does so where the number of labels changes; call this where the labels are others
        but as many. What a variant keeps of its class heads in loading is kept here too, and all
        other tensors stay as they are.
        """
        config = deepcopy(self.config)
        config.use_pretrained_backbone = False
        # One row too many, so that loading re-creates the heads in the way of each variant.
        state = {
            key: F.pad(value, [0, 0] * (value.ndim - 1) + [0, 1])
            if key.endswith(self._class_head_keys)
            else value
            for key, value in self.state_dict().items()
        }
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # its report would speak of these rows
        try:
            fresh = type(self).from_pretrained(None, config=config, state_dict=state)
        finally:
            transformers_logging.set_verbosity(verbosity)
        heads = {
            key: value
            for key, value in fresh.state_dict().items()
            if key.endswith(self._class_head_keys)
        }
        self.load_state_dict(heads, strict=False)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # In classes outside its package, transformers passes over modules without tensors of their
        # own, to protect loaded tensors from in-place initialisation. Blocks would keep the values
        # of their linear layers; and loaded tensors are safe, see _init_weights.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """First values by module type, those of DETR's authors.

        Attention and feed-forward weights are Xavier uniform; everything else (heads, input
        projections, the biases of feed-forward blocks) keeps PyTorch's default. Blocks that came
        with later detectors start as their authors' do. A module is visited
        after its children, so a block overrides its linear layers. All goes through
        ``transformers.initialization``, which leaves loaded tensors alone.
        """
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, LearnedPositionEmbedding):
            init.uniform_(module.row_embeddings.weight)
            init.uniform_(module.column_embeddings.weight)
        elif isinstance(module, MultiHeadAttention):
            # The authors fill query, key and value as one matrix of three times the rows, which
            # narrows the range: 6 / (3n + n) instead of 6 / (n + n) under the root.
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.xavier_uniform_(projection.weight, gain=0.5**0.5)
                init.zeros_(projection.bias)
            init.xavier_uniform_(module.out_proj.weight)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, FeedForward):
            init.xavier_uniform_(module.expand.weight)
            init.xavier_uniform_(module.contract.weight)
        elif isinstance(module, MultiScaleDeformableAttention):
            init_deformable_attention(module)
        elif isinstance(module, FeatureProjection):
            init_feature_projection(module)
        elif isinstance(module, FeaturePyramid):
            init_feature_pyramid(module)
        elif isinstance(module, DynamicConvolution):
            init.xavier_uniform_(module.filter_generator.weight)
            init.xavier_uniform_(module.output_projection.weight)
        elif isinstance(module, DetectionHead):
            init_focal_prior(module.class_head)
            init_box_head(module.box_head, size_bias=module.size_bias)


class ObjectDetectionMixin:
    """From pixels to boxes and their loss, the same for every variant.

    A variant's class sets ``model`` (its model without loss) and ``criterion``, and says in
    :meth:`predict` what its heads make of the queries.
    """

    output_class: ClassVar[type[DetectionOutput]] = DetectionOutput
    model: PreTrainedModel
    criterion: SetCriterion

    def predict(self, outputs: DetectorModelOutput, first_layer: int) -> SetPredictions:
        """Classes and boxes of decoder layers.

        Args:
            outputs: Of ``model``.
            first_layer: Layers from this one on, counted from 0, are wanted.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what its heads predict.")

    def encoder_labels(self, labels: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Labels that the encoder's predictions, where there are any, are trained on."""
        return labels

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_recording: bool = False,
        **kwargs: object,
    ) -> DetectionOutput:
        """Detect objects.

        Args:
            pixel_values: (batch, channels, height, width), normalised colours.
            pixel_mask: (batch, height, width), 1 = picture, 0 = padding; None if nothing is padded.
            labels: A dictionary per picture with ``class_labels`` (targets,) in 0 .. num_labels - 1
                and ``boxes`` (targets, 4), cxcywh relative to the unpadded picture; the output then
                has a loss.
            output_attentions: See ``forward`` of the variant's model.
            output_hidden_states: As above.
            output_recording: Also return what every decoder layer starts from, looks at and
                predicts, see :mod:`hf_querydet.recording`. Other outputs stay the same.
            kwargs: Of the ecosystem's trainers and tests, of no effect.

        Returns:
            ``output_class``, or its fields as a tuple with ``return_dict=False``.

        Raises:
            ValueError: If the labels do not fit the model, see
                :class:`~hf_querydet.losses.SetCriterion`; or see ``forward`` of the variant's
                model.
        """
        outputs = self.model(
            pixel_values,
            pixel_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_recording=output_recording,
            return_dict=True,
        )
        fields, recording = dict(outputs), None
        if output_recording:
            recording = self._recording(outputs, canvas_shares(pixel_values, pixel_mask))
            del fields["layer_records"]
        # The layers before the last have predictions only where a loss asks for them.
        with_auxiliary = labels is not None and self.config.auxiliary_loss
        num_layers = len(outputs.intermediate_hidden_states)
        predictions = self.predict(outputs, 0 if with_auxiliary else num_layers - 1)
        loss, loss_dict = None, None
        if labels is not None:
            loss, loss_dict = self.criterion(
                predictions,
                labels,
                encoder_predictions=outputs.get("encoder_predictions"),
                encoder_labels=self.encoder_labels,
            )
        auxiliary_outputs = None
        if with_auxiliary:
            auxiliary_outputs = SetPredictions(
                logits=predictions.logits[:-1],
                pred_boxes=predictions.pred_boxes[:-1],
                is_usable=predictions.is_usable,
            )
        return self.output_class(
            loss=loss,
            loss_dict=loss_dict,
            logits=predictions.logits[-1],
            pred_boxes=predictions.pred_boxes[-1],
            auxiliary_outputs=auxiliary_outputs,
            recording=recording,
            **fields,
        )

    @torch.no_grad()
    def _recording(self, outputs: DetectorModelOutput, shares: Tensor) -> DecoderRecording:
        predictions = self.predict(outputs, first_layer=0)
        return DecoderRecording(
            layers=outputs.layer_records,
            logits=predictions.logits,
            pred_boxes=predictions.pred_boxes.detach(),
            is_usable=predictions.is_usable,
            canvas_shares=shares,
        )


def build_criterion(
    config: DetectorConfig, classification: Classification, **options: Any
) -> SetCriterion:
    """Create the criterion with the configuration's weights.

    Args:
        config: Its costs and loss coefficients are taken.
        classification: How classes are scored.
        **options: Others of :class:`~hf_querydet.losses.SetCriterion`.
    """
    return SetCriterion(
        classification,
        class_cost=config.class_cost,
        bbox_cost=config.bbox_cost,
        giou_cost=config.giou_cost,
        cls_loss_coefficient=config.cls_loss_coefficient,
        bbox_loss_coefficient=config.bbox_loss_coefficient,
        giou_loss_coefficient=config.giou_loss_coefficient,
        **options,
    )
