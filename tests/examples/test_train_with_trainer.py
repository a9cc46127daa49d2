"""The Trainer's example, run as a user runs it."""

import json
import shutil

import pytest
import torch
from script_runs import EXAMPLES, run_script
from tiny import tiny_config
from transformers import pipeline

import hf_querydet
from hf_querydet import VARIANTS
from hf_querydet.demo import SHAPES

SCRIPT = EXAMPLES / "train_with_trainer.py"


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    VARIANTS["detr"].detector(tiny_config(VARIANTS, "detr")).save_pretrained(folder / "model")
    size = {"shortest_edge": 64, "longest_edge": 64}
    VARIANTS["detr"].image_processor(size=size).save_pretrained(folder / "model")
    words = [str(folder / "model"), str(scenes), "--output_dir", str(folder / "out")]
    words += ["--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--use_cpu"]
    words += ["--report_to", "none", "--disable_tqdm", "True", "--learning_rate", "1e-3"]
    return run_script(words, SCRIPT), folder / "out", words


def test_metrics_are_printed_and_saved(run):
    output, directory, _ = run
    assert "AP50 " in output
    metrics = json.loads((directory / "eval_results.json").read_text())
    assert 0 <= metrics["eval_map"] <= 1
    assert {f"eval_map/{shape}" for shape in SHAPES} <= set(metrics)


def test_result_works_in_a_pipeline(run, scenes):
    detect = pipeline("object-detection", model=str(run[1]))
    found = detect(str(scenes / "validation" / "0.png"), threshold=0.0)
    assert {each["label"] for each in found} <= set(SHAPES)


def test_names_of_the_detector_keep_their_labels(run, scenes, tmp_path):
    detector, processor = hf_querydet.load_detector(run[1])
    names = list(detector.config.id2label.values())[::-1]
    config = detector.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    detector.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), str(scenes), "--output_dir", str(tmp_path / "out")]
    words += ["--max_steps", "1", "--learning_rate", "0", "--use_cpu", "--report_to", "none"]

    run_script(words, SCRIPT)

    trained, _ = hf_querydet.load_detector(tmp_path / "out")
    assert list(trained.config.id2label.values()) == names
    assert torch.equal(trained.class_head.weight, detector.class_head.weight)


def test_two_splits_in_one_folder_are_an_error(run, scenes):
    words = run[2]
    words = [words[0], str(scenes / "train"), *words[2:]]
    with pytest.raises(ValueError, match="has one split: 'train' and 'validation' would both"):
        run_script(words, SCRIPT)


def test_it_continues_from_a_checkpoint(run):
    _, directory, words = run
    shutil.rmtree(directory / "checkpoint-4")
    run_script([*words, "--resume_from_checkpoint", str(directory / "checkpoint-2")], SCRIPT)
    state = json.loads((directory / "checkpoint-4" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_map" in row] == [2, 4]
