"""compute_metrics in a plain Trainer, against an evaluation by hand of the same pictures."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, debug_launcher
from trainer_evaluation import by_hand, make_trainer
from transformers import EvalPrediction, Trainer

from hf_querydet.data import DetectionCollator
from hf_querydet.evaluation import DetectionMetrics, FlatLabelsCollator
from hf_querydet.evaluation.detection_metrics import flatten_labels, unflatten_labels

ARGUMENTS = {"label_names": ["flat_labels"], "batch_eval_metrics": True}


def plain_trainer(folder, detector, processor, dataset, arguments=ARGUMENTS):
    return make_trainer(
        folder,
        detector,
        processor,
        dataset,
        trainer=Trainer,
        arguments=arguments,
        data_collator=FlatLabelsCollator(DetectionCollator(processor)),
        compute_metrics=DetectionMetrics(processor, detector.config.id2label),
    )


@pytest.mark.parametrize("keeps_all", [False, True])
def test_plain_trainer_gives_the_numbers_of_the_whole_set(
    tmp_path, detector, processor, dataset, keeps_all
):
    # Four pictures in batches of three: the last batch holds one, with several boxes.
    assert len(dataset[3]["labels"]["boxes"]) > 1
    expected = by_hand(detector, processor, dataset)
    arguments = {**ARGUMENTS, "batch_eval_metrics": not keeps_all}
    trainer = plain_trainer(tmp_path, detector, processor, dataset, arguments)

    metrics = trainer.evaluate()

    assert 0 < expected["map"] < 1
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-4), name
    assert metrics["eval_loss"] > 0
    # A second evaluation starts from nothing.
    assert trainer.evaluate()["eval_map"] == metrics["eval_map"]


def evaluate_share(folder, detector, processor, dataset):
    PartialState._reset_state()  # what the parent process had, inherited by forking
    metrics = plain_trainer(folder, detector, processor, dataset).evaluate()
    rank = PartialState().process_index
    (Path(folder) / f"{rank}.json").write_text(json.dumps(metrics))


def test_two_processes_give_the_numbers_of_the_whole_set(tmp_path, detector, processor, dataset):
    expected = by_hand(detector, processor, dataset)

    debug_launcher(
        evaluate_share, args=(str(tmp_path), detector, processor, dataset), num_processes=2
    )

    for rank in range(2):
        metrics = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, value in expected.items():
            assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-4), name


def test_labels_survive_being_one_tensor():
    labels = [
        {
            "image_id": torch.tensor([2**40 + 1]),
            "orig_size": torch.tensor([480, 640]),
            "size": torch.tensor([60, 80]),
            "class_labels": torch.tensor([3, 0]),
            "boxes": torch.rand(2, 4),
            "area": torch.tensor([123.4567, 1.0]),
            "iscrowd": torch.tensor([0, 0]),
            "crowd_class_labels": torch.tensor([1]),
            "crowd_boxes": torch.rand(1, 4),
        },
        {
            "image_id": torch.tensor([7]),
            "orig_size": torch.tensor([31, 33]),
            "size": torch.tensor([62, 66]),
            "class_labels": torch.zeros(0, dtype=torch.int64),
            "boxes": torch.zeros(0, 4),
            "area": torch.zeros(0),
            "iscrowd": torch.zeros(0, dtype=torch.int64),
        },
    ]
    found = unflatten_labels(flatten_labels(labels))
    for label, expected in zip(found, labels, strict=True):
        for name, value in expected.items():
            assert torch.equal(label[name], value), name
    assert found[1]["crowd_boxes"].shape == (0, 4)


def test_labels_of_another_form_are_an_error(processor):
    metrics = DetectionMetrics(processor, {0: "cat"})
    prediction = EvalPrediction(predictions=(), label_ids=[{"boxes": torch.zeros(1, 4)}])
    with pytest.raises(ValueError, match=r"compute_metrics needs flat_labels, got list; pass"):
        metrics(prediction, compute_result=True)
