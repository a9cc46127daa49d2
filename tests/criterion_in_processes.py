"""What each process of the distributed test of the criterion runs, importable by a new process."""

from pathlib import Path

import torch
import torch.distributed as dist

from hf_querydet.losses import FocalClassification, SetCriterion, SoftmaxClassification
from hf_querydet.outputs import SetPredictions

CLASSIFICATIONS = {
    "softmax": SoftmaxClassification(no_object_weight=0.1),
    "focal": FocalClassification(),
}
# Objects in each picture of the first and of the second process.
SPLITS = {
    "unequal": ([3, 1], [2]),
    "one process without objects": ([2, 0], [0]),
    "one object in all": ([0], [1, 0]),
    "no objects": ([0], [0, 0]),
}
LAYERS, QUERIES, CLASSES, FEATURES = 2, 4, 5, 3


def gradients(classification: str, counts: list[int], part: slice) -> dict[str, torch.Tensor]:
    """Gradients of two heads from the pictures in ``part`` of a batch."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    class_head = (rand(FEATURES, CLASSES) - 0.5).requires_grad_()
    box_head = (rand(FEATURES, 4) - 0.5).requires_grad_()
    features = (rand(LAYERS, len(counts), QUERIES, FEATURES) * 4 - 2)[:, part]
    labels = [
        {"class_labels": (rand(count) * (CLASSES - 1)).long(), "boxes": rand(count, 4) / 2 + 0.2}
        for count in counts
    ][part]
    predictions = SetPredictions(
        logits=features @ class_head, pred_boxes=(features @ box_head).sigmoid()
    )
    criterion = SetCriterion(
        CLASSIFICATIONS[classification],
        class_cost=1.0,
        bbox_cost=5.0,
        giou_cost=2.0,
        cls_loss_coefficient=1.0,
        bbox_loss_coefficient=5.0,
        giou_loss_coefficient=2.0,
    )
    loss, _ = criterion(predictions, labels, encoder_predictions=predictions)
    loss.backward()
    return {"class_head": class_head.grad, "box_head": box_head.grad}


def average_over_two_processes(rank: int, folder: str) -> None:
    """Run every case and let the first process save the averaged gradients."""
    torch.set_num_threads(1)
    store = f"file://{Path(folder, 'store')}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = {}
    for split, (first, second) in SPLITS.items():
        part = slice(0, len(first)) if rank == 0 else slice(len(first), None)
        for classification in CLASSIFICATIONS:
            averages = gradients(classification, first + second, part)
            for gradient in averages.values():
                dist.all_reduce(gradient)
                gradient /= 2
            results[split, classification] = averages
    if rank == 0:
        torch.save(results, Path(folder, "gradients.pt"))
    dist.destroy_process_group()
