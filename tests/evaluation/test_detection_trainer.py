"""The Trainer's numbers against an evaluation by hand of the same batches."""

import logging
import shutil

import pytest
import torch
from trainer_evaluation import by_hand, make_trainer
from transformers import TrainerState, TrainingArguments

from hf_querydet.evaluation.detection_trainer import DetectionTrainer, TrainingProgressCallback


def test_the_trainer_gives_the_numbers_of_the_whole_set(tmp_path, detector, processor, dataset):
    expected = by_hand(detector, processor, dataset)
    # Four pictures in batches of three: the last batch holds one, with several boxes.
    assert len(dataset[3]["labels"]["boxes"]) > 1
    trainer = make_trainer(tmp_path / "run", detector, processor, dataset)

    metrics = trainer.evaluate()

    assert 0 < expected["map"] < 1
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-4), name
    assert metrics["eval_loss"] > 0
    prediction = trainer.predict(dataset)
    assert prediction.metrics["test_map"] == metrics["eval_map"]
    assert prediction.predictions is None


def test_detector_of_few_bits_is_evaluated(tmp_path, detector, processor, dataset):
    expected = by_hand(detector, processor, dataset)
    arguments = {"bf16_full_eval": True}
    trainer = make_trainer(tmp_path, detector, processor, dataset, arguments=arguments)

    metrics = trainer.evaluate()

    assert trainer.model.dtype == torch.bfloat16
    assert metrics["eval_map"] == pytest.approx(expected["map"], abs=0.05)


def test_without_an_image_processor_nothing_can_be_evaluated(
    tmp_path, detector, processor, dataset
):
    trainer = make_trainer(tmp_path, detector, processor, dataset, processing_class=None)

    with pytest.raises(ValueError, match="processing_class must be the image processor"):
        trainer.evaluate()


def test_pictures_without_labels_cannot_be_evaluated(tmp_path, detector, processor, dataset):
    items = [{"pixel_values": dataset[0]["pixel_values"]}]
    trainer = make_trainer(tmp_path, detector, processor, items)

    with pytest.raises(ValueError, match="A batch has no labels"):
        trainer.evaluate()


def test_other_outputs_are_an_error(tmp_path, detector, processor, dataset):
    detector.config.keys_to_ignore_at_inference = ["loss_dict"]
    trainer = make_trainer(tmp_path, detector, processor, dataset)

    with pytest.raises(ValueError, match="list every other output in config"):
        trainer.evaluate()


class Pictures(torch.utils.data.Dataset):
    """Eight pictures with one object each."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        labels = {"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}
        return {"pixel_values": torch.randn(3, 32, 64), "labels": labels}


def progress_of_training(monkeypatch, folder, model, processor, max_steps, **options):
    """What a model is told during a training run, and at which of the Trainer's steps."""
    told = []

    def record(model, progress):
        told.append((trainer.state.global_step, progress))

    monkeypatch.setattr(type(model), "set_training_progress", record, raising=False)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        gradient_accumulation_steps=2,
    )
    trainer = make_trainer(folder, model, processor, None, args=arguments, train_dataset=Pictures())
    trainer.train(**options)
    return told


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics"])
def test_function_that_would_never_be_called_is_an_error(tmp_path, detector, name):
    arguments = TrainingArguments(tmp_path, report_to="none")

    with pytest.raises(ValueError, match=f"would never call {name}; leave it out"):
        DetectionTrainer(detector, arguments, **{name: lambda *_: {}})


def test_one_process_uses_one_gpu(tmp_path, detector, processor, dataset, caplog):
    arguments = TrainingArguments(tmp_path, per_device_train_batch_size=3, report_to="none")
    arguments._n_gpu = 2  # as a process that sees two

    with caplog.at_level(logging.WARNING):
        trainer = DetectionTrainer(detector, arguments, train_dataset=dataset)

    assert "2 GPUs are visible and the first one is used" in caplog.text
    assert trainer.args.n_gpu == 1  # with more, Trainer wraps the model in DataParallel
    assert trainer.get_train_dataloader().total_batch_size == 3


def test_the_model_is_told_how_much_of_the_run_is_done(tmp_path, detector, processor, monkeypatch):
    told = progress_of_training(monkeypatch, tmp_path, detector, processor, 4)
    # Once per optimizer step, of two batches each.
    assert told == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]

    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = progress_of_training(
        monkeypatch, tmp_path, detector, processor, 4, resume_from_checkpoint=True
    )
    assert resumed == [(2, 0.5), (3, 0.75)]


def test_models_of_other_libraries_are_told_nothing():
    TrainingProgressCallback().on_step_begin(None, None, None, model=torch.nn.Linear(1, 1))


def test_the_model_inside_a_wrapper_is_told(monkeypatch, detector):
    told = []
    monkeypatch.setattr(detector, "set_training_progress", told.append)
    state = TrainerState(global_step=3, max_steps=12)
    wrapped = torch.nn.DataParallel(detector)
    TrainingProgressCallback().on_step_begin(None, state, None, model=wrapped)
    assert told == [0.25]
