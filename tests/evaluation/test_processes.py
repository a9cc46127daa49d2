"""Two real processes: the numbers of one, although the sampler repeats a picture."""

import json
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState, debug_launcher
from detection_data import write_image_folder
from saved_detector import build_detector
from torch.nn.parallel import DistributedDataParallel

from hf_querydet.data import load_detection_dataset
from hf_querydet.evaluation import CocoEvaluator, evaluate_detector, evaluation_loader

ID2LABEL = {0: "cat", 1: "dog"}
NUM_PICTURES = 5


def picture(number):
    """A picture with 1 to 5 objects, some found, and false alarms."""
    generator = torch.Generator().manual_seed(number)
    count = number + 1
    boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.3
    class_labels = torch.randint(2, (count,), generator=generator)
    height, width = 90 + number, 130
    labels = {
        "class_labels": class_labels,
        "boxes": boxes,
        "area": boxes[:, 2:].prod(1) * height * width,
        "iscrowd": torch.zeros(count, dtype=torch.int64),
        "image_id": torch.tensor([number]),
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor([height, width]),
    }
    top_left, size = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]
    noise = torch.randn(count, 4, generator=generator) * 0.02
    boxes_xyxy = torch.cat([top_left, top_left + size], dim=1) + noise
    prediction = {
        "boxes": boxes_xyxy * torch.tensor([width, height, width, height]),
        "labels": class_labels,
        "scores": torch.rand(count, generator=generator),
    }
    return prediction, labels


def evaluate(numbers):
    evaluator = CocoEvaluator(ID2LABEL)
    for number in numbers:
        prediction, labels = picture(number)
        evaluator.update([prediction], [labels])
    return evaluator


def evaluate_share(folder):
    PartialState._reset_state()  # what the parent process had, inherited by forking
    rank = PartialState(cpu=True).process_index
    # As even_batches does: five pictures for two processes, the first one twice.
    evaluator = evaluate([0, 2, 4] if rank == 0 else [1, 3, 0])
    result = {"metrics": evaluator.compute(), "rows": evaluator.coco_results()}
    result["metrics again"] = evaluator.compute()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))


def test_every_process_gets_the_numbers_of_one(tmp_path):
    alone = evaluate(range(NUM_PICTURES))
    expected = alone.compute()
    debug_launcher(evaluate_share, args=(str(tmp_path),), num_processes=2)

    assert 0 < expected["map"] < 1
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["metrics"] == result["metrics again"] == expected
        assert result["rows"] == alone.coco_results()


def evaluate_without_a_batch(folder):
    PartialState._reset_state()
    # Processes that wait for each other at different places would wait for ever.
    rank = PartialState(cpu=True, timeout=timedelta(seconds=30)).process_index
    detector, processor = build_detector("conditional_detr", scale=0.1)
    dataset = load_detection_dataset(folder, split="train").with_labels(detector.config.id2label)
    loader = evaluation_loader(dataset, processor, batch_size=8)
    evaluator = CocoEvaluator(detector.config.id2label)
    metrics = evaluate_detector(DistributedDataParallel(detector), processor, loader, evaluator)
    result = {"batches": len(loader), "metrics": metrics}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))


def test_process_without_a_batch_takes_part(tmp_path):
    write_image_folder(tmp_path, [{"bbox": [[12.0, 4.0, 30.0, 20.0]], "category": ["dog"]}])
    debug_launcher(evaluate_without_a_batch, (tmp_path,), num_processes=2)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [result["batches"] for result in results] == [1, 0]
    assert results[0]["metrics"] == results[1]["metrics"]
