"""The set criterion: assign predictions to objects, then sum the loss terms of all layers.

L layers, B pictures, Q queries, T objects (the largest number in a picture), N matched pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_querydet.losses.detection_losses import no_object_cross_entropy, sigmoid_focal_loss
from hf_querydet.losses.matching import (
    assign,
    box_cost,
    centers_and_sizes,
    focal_class_cost,
    softmax_class_cost,
)
from hf_querydet.ops.boxes import BOX_TOLERANCE, boxes_cxcywh_to_xyxy, generalized_box_iou
from hf_querydet.outputs import SetPredictions

Labels = Sequence[Mapping[str, Tensor]]


class Classification(Protocol):
    """How a detector scores classes: matching cost, loss, and what the loss is divided by."""

    def num_labels(self, logits: Tensor) -> int:
        """Object classes that ``logits`` (..., classes) distinguish."""

    def cost(self, logits: Tensor, class_labels: Tensor) -> Tensor:
        """Matching cost (L, B, Q, T) of logits (L, B, Q, C) and labels (B, T)."""

    def loss(self, logits: Tensor, target_classes: Tensor) -> Tensor:
        """Loss per query, (L, B, Q). ``target_classes`` (L, B, Q) is -1 where no object is."""

    def normalizer(self, num_queries: Tensor, num_matched: Tensor, num_objects: Tensor) -> Tensor:
        """What one layer's loss is divided by, from counts over all processes; scalars."""


@dataclass(frozen=True)
class SoftmaxClassification:
    """Softmax over the labels and "no object" (DETR).

    Attributes:
        no_object_weight: Weight of "no object" in the cross-entropy.
    """

    no_object_weight: float

    def num_labels(self, logits: Tensor) -> int:
        """All classes but the last, which is "no object"."""
        return logits.shape[-1] - 1

    def cost(self, logits: Tensor, class_labels: Tensor) -> Tensor:
        """See :func:`softmax_class_cost`."""
        return softmax_class_cost(logits, class_labels)

    def loss(self, logits: Tensor, target_classes: Tensor) -> Tensor:
        """See :func:`no_object_cross_entropy`."""
        classes = torch.where(target_classes < 0, logits.shape[-1] - 1, target_classes)
        return no_object_cross_entropy(logits, classes, no_object_weight=self.no_object_weight)

    def normalizer(self, num_queries: Tensor, num_matched: Tensor, num_objects: Tensor) -> Tensor:
        """Sum of the class weights, which makes the loss a weighted mean."""
        weights = num_matched + self.no_object_weight * (num_queries - num_matched)
        # Without objects and without weight for "no object" the loss is 0, not 0 / 0.
        return weights.clamp(min=1e-6)


@dataclass(frozen=True)
class FocalClassification:
    """Independent sigmoid per label with focal loss (Deformable DETR and those after it).

    Attributes:
        alpha: Weight of positives in the loss. The matching cost uses 0.25 whatever is set here, as
            in the authors' code.
        gamma: Exponent of the focal loss.
    """

    alpha: float = 0.25
    gamma: float = 2.0

    def num_labels(self, logits: Tensor) -> int:
        """All classes."""
        return logits.shape[-1]

    def cost(self, logits: Tensor, class_labels: Tensor) -> Tensor:
        """See :func:`focal_class_cost`."""
        return focal_class_cost(logits, class_labels)

    def loss(self, logits: Tensor, target_classes: Tensor) -> Tensor:
        """See :func:`sigmoid_focal_loss`."""
        # -1 equals no class, so a query without an object has only negatives.
        classes = torch.arange(logits.shape[-1], device=logits.device)
        targets = (target_classes[..., None] == classes).to(logits.dtype)
        return sigmoid_focal_loss(logits, targets, alpha=self.alpha, gamma=self.gamma).sum(-1)

    def normalizer(self, num_queries: Tensor, num_matched: Tensor, num_objects: Tensor) -> Tensor:
        """Number of objects, at least 1."""
        return num_objects.clamp(min=1)


@dataclass(frozen=True)
class Matches:
    """Queries that were assigned to objects, N pairs in order of layer and picture.

    Attributes:
        layer: (N,), int64, as the following.
        picture: Index in the batch.
        query: Index of the query.
        target: Index of the object among those of its picture.
        costs: Of every pair (N,), with their weights: ``class``, ``bbox`` and ``giou``. Their sum
            over all pairs of a layer and picture is the least that any assignment has.
    """

    layer: Tensor
    picture: Tensor
    query: Tensor
    target: Tensor
    costs: dict[str, Tensor]


class SetCriterion:
    """Loss of set prediction: bipartite matching, then classification, L1 and generalised IoU.

    DETR (arXiv:2005.12872), Eqs. 1 and 2 and Appendix A.2. Every layer is matched anew. All is
    computed in float32. The costs of all layers reach the host in one transfer.

    Box terms are divided by the number of objects, averaged over processes, so that the gradient,
    which is averaged over processes too, is that of one process with the whole batch. The softmax
    classification is divided by its weight sum, averaged in the same reduction; the authors' code
    divides by each process's own. Objects count as at least 1 over all processes together; the
    authors ask for 1 on average, which makes the loss too small where there are fewer.

    Args:
        classification: :class:`SoftmaxClassification` or :class:`FocalClassification`.
        class_cost: Weight of the class term in the matching.
        bbox_cost: Weight of the L1 distance in the matching.
        giou_cost: Weight of the generalised IoU in the matching.
        cls_loss_coefficient: Weight of ``loss_ce`` in the sum.
        bbox_loss_coefficient: Weight of ``loss_bbox`` in the sum.
        giou_loss_coefficient: Weight of ``loss_giou`` in the sum.
        box_coordinates: Coordinates of normalised cxcywh boxes whose L1 distance is taken, in the
            matching and in ``loss_bbox``: centres and sizes as in DETR, or corners with
            :func:`~hf_querydet.ops.boxes.boxes_cxcywh_to_xyxy`.
    """

    def __init__(
        self,
        classification: Classification,
        *,
        class_cost: float,
        bbox_cost: float,
        giou_cost: float,
        cls_loss_coefficient: float,
        bbox_loss_coefficient: float,
        giou_loss_coefficient: float,
        box_coordinates: Callable[[Tensor], Tensor] = centers_and_sizes,
    ) -> None:
        self.classification = classification
        self.class_cost = class_cost
        self.bbox_cost = bbox_cost
        self.giou_cost = giou_cost
        self.box_coordinates = box_coordinates
        self.coefficients = {
            "loss_ce": cls_loss_coefficient,
            "loss_bbox": bbox_loss_coefficient,
            "loss_giou": giou_loss_coefficient,
        }

    def __call__(
        self,
        predictions: SetPredictions,
        labels: Labels,
        *,
        encoder_predictions: SetPredictions | None = None,
        encoder_labels: Callable[[Labels], Labels] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Args:
            predictions: Of one or more decoder layers, the last one final.
            labels: A mapping per picture with ``class_labels`` (targets,) and ``boxes`` (targets,
                4), normalised cxcywh.
            encoder_predictions: Of a two-stage detector's encoder, one layer.
            encoder_labels: Makes what these are matched to of ``labels``, once those are checked;
                None if they are the same.

        Returns:
            The weighted sum, and the unweighted terms: ``loss_ce``, ``loss_bbox``, ``loss_giou`` of
            the final layer, suffix ``_0``, ``_1``, ... for the layers before it, ``_enc`` for the
            encoder.

        Raises:
            ValueError: If labels have the wrong form, a class out of range, or a box that is not
                normalised.
        """
        # Mixed precision would take the costs and the losses to half precision.
        with torch.autocast(predictions.logits.device.type, enabled=False):
            num_layers = len(predictions.logits)
            suffixes = [*(f"_{layer}" for layer in range(num_layers - 1)), ""]
            groups = [_Group.build(predictions, labels, suffixes)]
            if encoder_predictions is not None:
                own_labels = labels if encoder_labels is None else encoder_labels(labels)
                groups.append(_Group.build(encoder_predictions, own_labels, ["_enc"]))
            matches, counts = self._match(groups)
            num_boxes, *normalizers = self._normalizers(counts, predictions.logits.device)

            total = predictions.logits.new_zeros((), dtype=torch.float32)
            loss_dict: dict[str, Tensor] = {}
            for group, pairs, normalizer in zip(groups, matches, normalizers, strict=True):
                terms = self._loss_sums(group, pairs)
                terms["loss_ce"] = terms["loss_ce"] / normalizer
                terms["loss_bbox"] = terms["loss_bbox"] / num_boxes
                terms["loss_giou"] = terms["loss_giou"] / num_boxes
                for name, values in terms.items():
                    total = total + self.coefficients[name] * values.sum()
                for layer, suffix in enumerate(group.suffixes):
                    loss_dict |= {name + suffix: values[layer] for name, values in terms.items()}
        return total, loss_dict

    @torch.no_grad()
    def match(self, predictions: SetPredictions, labels: Labels) -> Matches:
        """Assign queries to objects as the loss does, and say at which costs.

        Args:
            predictions: Of one or more layers; each is matched on its own.
            labels: As above.

        Raises:
            ValueError: As above.
        """
        with torch.autocast(predictions.logits.device.type, enabled=False):
            group = _Group.build(predictions, labels, [])
            ((pairs,), _) = self._match([group])
            arguments = group.pred_boxes, group.labels.boxes
            options = {"box_coordinates": self.box_coordinates}
            classes = self.classification.cost(group.logits, group.labels.class_labels)
            costs = {
                "class": self.class_cost * classes,
                "bbox": box_cost(*arguments, bbox_cost=self.bbox_cost, giou_cost=0.0, **options),
                "giou": box_cost(*arguments, bbox_cost=0.0, giou_cost=self.giou_cost, **options),
            }
        return Matches(*pairs, {name: cost[tuple(pairs)] for name, cost in costs.items()})

    @torch.no_grad()
    def _match(self, groups: list["_Group"]) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
        """Matched pairs of each group, (4, N): layer, picture, query, object; and its counts."""
        costs = [self._cost(group) for group in groups]
        # The labels travel along, so that they are checked without a transfer of their own.
        parts = [*costs, *(group.labels.class_labels.float() for group in groups)]
        parts += [group.labels.boxes for group in groups]
        parts += [group.is_usable.float() for group in groups]
        on_host = torch.cat([part.flatten() for part in parts]).cpu()
        arrays = [
            values.view(part.shape).numpy()
            for values, part in zip(
                on_host.split([part.numel() for part in parts]), parts, strict=True
            )
        ]
        num_groups = len(groups)
        matches, counts = [], []
        for i, group in enumerate(groups):
            class_labels, boxes = arrays[num_groups + i], arrays[2 * num_groups + i]
            num_labels = self.classification.num_labels(group.logits)
            _check_values(class_labels, boxes, num_labels)
            is_usable = arrays[3 * num_groups + i] > 0
            pairs = torch.from_numpy(np.stack(assign(arrays[i], group.labels.counts, is_usable)))
            matches.append(pairs.to(group.logits.device, non_blocking=True))
            counts.append(_count(is_usable, group.labels.counts))
        return matches, counts

    def _cost(self, group: "_Group") -> Tensor:
        boxes = box_cost(
            group.pred_boxes,
            group.labels.boxes,
            bbox_cost=self.bbox_cost,
            giou_cost=self.giou_cost,
            box_coordinates=self.box_coordinates,
        )
        classes = self.classification.cost(group.logits, group.labels.class_labels)
        return self.class_cost * classes + boxes

    def _normalizers(
        self, group_counts: list[tuple[int, int, int]], device: torch.device
    ) -> list[Tensor]:
        """Number of boxes, then each group's classification normaliser: one process's share."""
        counts = torch.tensor(group_counts, device=device, dtype=torch.float32)
        num_processes = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            num_processes = dist.get_world_size()
        # No object anywhere: the box terms are sums over nothing and must not become 0 / 0.
        num_boxes = counts[0, -1].clamp(min=1)
        normalizers = [self.classification.normalizer(*count) for count in counts]
        return [normalizer / num_processes for normalizer in (num_boxes, *normalizers)]

    def _loss_sums(self, group: "_Group", pairs: Tensor) -> dict[str, Tensor]:
        """Sum of each term per layer, (L,)."""
        layer, picture, query, target = pairs
        target_classes = torch.full(
            group.logits.shape[:3], -1, dtype=torch.int64, device=group.logits.device
        )
        target_classes[layer, picture, query] = group.labels.class_labels[picture, target]
        pred_boxes = group.pred_boxes[layer, picture, query]  # (N, 4)
        target_boxes = group.labels.boxes[picture, target]
        distance = self.box_coordinates(pred_boxes) - self.box_coordinates(target_boxes)
        giou = generalized_box_iou(
            boxes_cxcywh_to_xyxy(pred_boxes), boxes_cxcywh_to_xyxy(target_boxes)
        )
        per_layer = group.logits.new_zeros(len(group.logits))
        class_losses = self.classification.loss(group.logits, target_classes)
        return {
            "loss_ce": class_losses.masked_fill(~group.is_usable, 0.0).sum((1, 2)),
            "loss_bbox": per_layer.index_add(0, layer, distance.abs().sum(-1)),
            "loss_giou": per_layer.index_add(0, layer, 1 - giou),
        }


@dataclass(frozen=True)
class _PaddedLabels:
    """Labels of a batch, filled up to the same number of objects."""

    class_labels: Tensor  # (B, T)
    boxes: Tensor  # (B, T, 4)
    counts: list[int]

    @classmethod
    def build(cls, labels: Labels, batch_size: int, device: torch.device) -> "_PaddedLabels":
        if len(labels) != batch_size:
            raise ValueError(
                f"labels must hold one entry per picture, got {len(labels)} for {batch_size} "
                "pictures."
            )
        for index, label in enumerate(labels):
            _check_form(index, label)
        return cls(
            pad_sequence(
                # An empty list of classes makes a tensor of floats.
                [label["class_labels"].to(device, torch.int64) for label in labels],
                batch_first=True,
            ),
            pad_sequence([label["boxes"].to(device).float() for label in labels], batch_first=True),
            [len(label["class_labels"]) for label in labels],
        )


@dataclass(frozen=True)
class _Group:
    """Predictions of L layers that share their number of queries, and what they are matched to."""

    logits: Tensor  # (L, B, Q, C)
    pred_boxes: Tensor  # (L, B, Q, 4)
    is_usable: Tensor  # (B, Q)
    labels: _PaddedLabels
    suffixes: list[str]

    @classmethod
    def build(cls, predictions: SetPredictions, labels: Labels, suffixes: list[str]) -> "_Group":
        logits = predictions.logits.float()
        padded = _PaddedLabels.build(labels, logits.shape[1], logits.device)
        is_usable = predictions.is_usable
        if is_usable is None:
            is_usable = torch.ones(logits.shape[1:3], dtype=torch.bool, device=logits.device)
        return cls(logits, predictions.pred_boxes.float(), is_usable, padded, suffixes)


def _count(is_usable: np.ndarray, num_objects: list[int]) -> tuple[int, int, int]:
    """Queries of a layer, those of them that are matched, and objects."""
    num_queries = is_usable.sum(1).tolist()
    num_matched = sum(map(min, num_objects, num_queries))
    return sum(num_queries), num_matched, sum(num_objects)


def _check_form(index: int, label: Mapping[str, Tensor]) -> None:
    for name in ("class_labels", "boxes"):
        if name not in label:
            raise ValueError(
                f"labels[{index}] has no {name!r}; it must map class_labels (targets,) and boxes "
                "(targets, 4) to tensors, as the image processor makes them from annotations."
            )
    class_labels, boxes = label["class_labels"], label["boxes"]
    if class_labels.ndim != 1 or boxes.shape != (len(class_labels), 4):
        raise ValueError(
            f"labels[{index}] needs class_labels (targets,) and boxes (targets, 4), "
            f"got {tuple(class_labels.shape)} and {tuple(boxes.shape)}."
        )


def _check_values(class_labels: np.ndarray, boxes: np.ndarray, num_labels: int) -> None:
    # What fills the batch up is 0, which passes both checks.
    outside = np.argwhere((class_labels < 0) | (class_labels >= num_labels))
    if len(outside):
        picture, target = outside[0]
        raise ValueError(
            f"labels[{picture}]['class_labels'][{target}] is {int(class_labels[picture, target])}, "
            f"but the model has {num_labels} labels, 0 to {num_labels - 1}; map the dataset's "
            "categories to the model's ids, or load the model with num_labels set."
        )
    # Written so that NaN fails.
    bad = np.argwhere(~((boxes >= -BOX_TOLERANCE) & (boxes <= 1 + BOX_TOLERANCE)))
    if len(bad):
        picture, target, _ = bad[0]
        raise ValueError(
            f"labels[{picture}]['boxes'][{target}] is {boxes[picture, target].tolist()}; boxes "
            "must be (centre x, centre y, width, height) relative to the picture, between 0 and 1, "
            "as the image processor makes them from annotations."
        )
