"""The training script, run as a user runs it, on generated scenes."""

import json
import re
import shutil

import pytest
import torch
from accelerate import Accelerator, DistributedType
from detection_data import write_coco
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from script_runs import OPTIONS, arguments, losses, read_metrics, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import pipeline

import hf_querydet
from hf_querydet.demo import SHAPES
from hf_querydet.training import HubError, HubRepository, NonFiniteLossError, checkpoint_name


def test_every_step_is_logged_and_metrics_are_saved(run):
    output, output_dir = run
    assert list(losses(output)) == list(range(1, 13))
    metrics = read_metrics(output_dir / "last")
    assert [row["step"] for row in metrics["history"]] == [4, 8, 12]
    assert 0 <= metrics["map"] <= 1
    assert {f"map_50/{shape}" for shape in SHAPES} <= set(metrics)


def test_labels_and_numbers_of_pictures_are_said_before_training(run):
    said, _, _ = run[0].partition("step 1/")
    assert f"{len(SHAPES)} labels: {', '.join(sorted(SHAPES))}\n" in said
    assert re.search(r"\d+ pictures to train on, \d+ to evaluate on\.\n", said)


def test_log_shows_the_speed(run):
    assert re.search(r"step 1/12 .* \d+\.\d pictures/s, \d+% waiting for them\n", run[0])


def test_saved_directory_works_in_a_pipeline(run, scenes):
    detect = pipeline("object-detection", model=str(run[1] / "best"))
    found = detect(str(scenes / "validation" / "0.png"), threshold=0.0)
    assert len(found) == OPTIONS["num_queries"]
    assert {each["label"] for each in found} <= set(SHAPES)


def test_average_is_saved_and_not_the_weights_in_training(run):
    checkpoint = run[1] / "checkpoints" / checkpoint_name(12)
    state = torch.load(checkpoint / "custom_checkpoint_1.pkl", weights_only=True)
    model, _ = hf_querydet.load_detector(run[1] / "last")
    trained = load_file(checkpoint / "model.safetensors")
    assert int(state["n_averaged"]) == 12
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f"module.{name}"]), name
    assert not torch.equal(trained["class_head.weight"], model.class_head.weight)


def test_model_card_is_complete(run):
    card = ModelCard.load(run[1] / "best" / "README.md", ignore_metadata_errors=False)
    result = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert result["map_50"] == round(read_metrics(run[1] / "best")["map_50"], 4)
    assert "accelerate launch train_detector.py --model detr" in card.text
    for name in ("detections_0.jpg", "detections_1.jpg", "detections_2.jpg"):
        assert f"({name})" in card.text
        with Image.open(run[1] / "best" / name) as picture:
            assert min(picture.size) >= 160


def test_a_part_of_one_split_is_evaluated_and_not_trained_on(scenes, tmp_path):
    pictures = sorted((scenes / "train").glob("*.png"))
    words = ("--eval-fraction", 0.3, "--batch-size", 1, "--epochs", 1, "--no-augment")
    output = run_script(arguments(scenes / "train", tmp_path, *words))

    num_held_out = round(0.3 * len(pictures))
    left = len(pictures) - num_held_out
    assert f"{left} pictures to train on, {num_held_out} to evaluate on." in output
    assert len(losses(output)) == left
    card = ModelCard.load(tmp_path / "best" / "README.md")
    assert "COCO metrics on the split `30% of train, held out` of" in card.text
    assert 0 <= read_metrics(tmp_path / "best")["map"] <= 1


def fine_tune(checkpoint, dataset, output_dir, *extra):
    """Start from a detector, for one step that changes no weight."""
    words = ["--model", checkpoint, "--dataset", dataset, "--output-dir", output_dir]
    words += ["--max-train-steps", 1, "--num-workers", 0, "--eval-split", "none"]
    words += ["--learning-rate", 0, *extra]
    return run_script([str(word) for word in words])


def with_names(scenes, folder, names):
    """The training scenes under other names."""
    split = folder / "train"
    split.mkdir(parents=True)
    for path in (scenes / "train").glob("*.png"):
        (split / path.name).symlink_to(path)
    rows = (scenes / "train" / "metadata.jsonl").read_text()
    for shape, name in zip(SHAPES, names, strict=True):
        rows = rows.replace(f'"{shape}"', json.dumps(name))
    (split / "metadata.jsonl").write_text(rows)
    return folder


@pytest.mark.parametrize("names", [["disc", "box", "wedge", "sun"], ["a", "b", "b", "a"]])
def test_other_names_get_a_new_class_head(run, scenes, tmp_path, names):
    dataset = with_names(scenes, tmp_path / "renamed", names)

    output = fine_tune(run[1] / "last", dataset, tmp_path)

    assert f"New class head for {len(set(names))} labels." in output
    model, _ = hf_querydet.load_detector(tmp_path / "last")
    assert set(model.config.id2label.values()) == set(names)
    weight = model.class_head.weight
    assert len(weight) == len(set(names)) + 1
    old, _ = hf_querydet.load_detector(run[1] / "last")
    rows = slice(len(weight))
    assert not torch.isclose(weight, old.class_head.weight[rows]).all(1).any()


def test_names_that_the_model_has_keep_its_class_head(run, scenes, tmp_path):
    shape = list(SHAPES)[2]
    dataset = with_names(scenes, tmp_path / "renamed", [shape] * len(SHAPES))

    output = fine_tune(run[1] / "last", dataset, tmp_path)

    assert "The model has the dataset's labels: its class head is kept." in output
    new, old = (hf_querydet.load_detector(path / "last")[0] for path in (tmp_path, run[1]))
    assert new.config.id2label == old.config.id2label
    assert torch.equal(new.class_head.weight, old.class_head.weight)


def test_numbers_are_named_by_label_names(scenes, tmp_path, run):
    dataset = with_names(scenes, tmp_path / "numbered", [0, 1, 2, 3])
    fine_tune(run[1] / "last", dataset, tmp_path, "--label-names", "disc,box,wedge,sun")
    model, _ = hf_querydet.load_detector(tmp_path / "last")
    assert set(model.config.id2label.values()) == {"disc", "box", "wedge", "sun"}


def test_names_that_are_given_rule_in_both_splits(tmp_path):
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.json"
        categories = [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}]
        objects = [[{"bbox": [5, 6, 20, 30], "category_id": 1 + number % 2}] for number in range(4)]
        write_coco(path, tmp_path, categories, objects)
    words = ("--label-names", "N/A,Katze,Hund", "--max-train-steps", 1)
    run_script(arguments(tmp_path / "{split}.json", tmp_path / "out", *words))
    model, _ = hf_querydet.load_detector(tmp_path / "out" / "last")
    assert model.config.id2label == {0: "Katze", 1: "Hund"}
    assert read_metrics(tmp_path / "out" / "last")["map"] >= 0


def saved_size(directory):
    return json.loads((directory / "preprocessor_config.json").read_text())["size"]


def test_longest_edge_of_a_checkpoint_is_changed_alone(run, scenes, tmp_path):
    fine_tune(run[1] / "last", scenes, tmp_path, "--longest-edge", 96)
    assert saved_size(tmp_path / "last") == {"shortest_edge": 64, "longest_edge": 96}


def test_longest_edge_of_a_new_detector_is_changed_alone(scenes, tmp_path):
    extra = ("--max-train-steps", 1, "--eval-split", "none", "--no-augment", "--longest-edge", 64)
    words = arguments(scenes, tmp_path, *extra)
    place = words.index("--shortest-edge")
    run_script(words[:place] + words[place + 2 :])
    assert saved_size(tmp_path / "last") == {"shortest_edge": 800, "longest_edge": 64}


def test_longest_edge_without_a_shortest_one_is_an_error(run, scenes, tmp_path):
    detector = tmp_path / "detector"
    shutil.copytree(run[1] / "last", detector)
    processor = hf_querydet.DETRImageProcessor(size={"height": 64, "width": 80})
    processor.save_pretrained(detector)
    with pytest.raises(ValueError, match=r"--longest-edge 96 limits .*give --shortest-edge as"):
        fine_tune(detector, scenes, tmp_path, "--longest-edge", 96)


def test_gradient_norm_of_0_clips_nothing(scenes, tmp_path):
    extra = ("--max-train-steps", 2, "--eval-split", "none", "--checkpoint-steps", 1)
    extra = (*extra, "--max-grad-norm", 0, "--weight-decay", 0)
    run_script(arguments(scenes, tmp_path, *extra))
    before, after = (
        load_file(tmp_path / "checkpoints" / checkpoint_name(step) / "model.safetensors")
        for step in (1, 2)
    )
    assert not torch.equal(before["class_head.weight"], after["class_head.weight"])


def test_two_splits_in_one_folder_are_an_error(scenes, tmp_path):
    with pytest.raises(ValueError, match="has one split: 'train' and 'validation' would both"):
        run_script(arguments(scenes / "train", tmp_path))
    run_script(
        arguments(scenes / "train", tmp_path, "--max-train-steps", 1, "--eval-split", "none")
    )


STREAM = ("--streaming", "--label-names", ",".join(sorted(SHAPES)), "--eval-split", "none")


def test_stream_without_a_whole_batch_is_an_error(scenes, tmp_path):
    extra = (*STREAM, "--max-train-steps", 2, "--batch-size", 17)
    with pytest.raises(ValueError, match="not one batch: a step of --batch-size 17 in 1 processes"):
        run_script(arguments(scenes, tmp_path, *extra))
    assert not (tmp_path / "last").exists()


def test_run_says_why_it_has_ended(run, scenes, tmp_path):
    assert "Done: 12 steps in 3 epochs." in run[0]
    extra = (*STREAM, "--max-train-steps", 100, "--batch-size", 8, "--epochs", 1)
    output = run_script(arguments(scenes, tmp_path, *extra))
    assert "Done: 1 epochs (--epochs), after 2 steps." in output


def test_tracker_gets_the_loss_of_every_logged_step(scenes, tmp_path):
    extra = ("--max-train-steps", 2, "--eval-split", "none", "--report-to", "tensorboard")
    run_script(arguments(scenes, tmp_path, *extra))
    (events,) = (tmp_path / "train_detector").glob("events.*")
    accumulator = EventAccumulator(str(events)).Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2]


def test_model_is_told_how_much_of_the_run_is_done(scenes, tmp_path, monkeypatch):
    told = []
    detector = hf_querydet.DETRForObjectDetection
    monkeypatch.setattr(detector, "set_training_progress", lambda _, share: told.append(share))
    extra = ("--max-train-steps", 4, "--eval-split", "none", "--batch-size", 2)
    extra = (*extra, "--gradient-accumulation", 2, "--checkpoint-steps", 3)
    words = arguments(scenes, tmp_path, *extra)

    run_script(words)

    # Before every batch, two of which make a step.
    assert told == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    told.clear()
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    run_script([*words, "--resume"])
    assert told == [0.75, 0.75]


def test_output_directory_with_a_run_is_not_overwritten(run, scenes):
    with pytest.raises(FileExistsError, match="holds a run already; continue it with --resume"):
        run_script(arguments(scenes, run[1]))


def test_run_ends_early_when_nothing_gets_better(scenes, tmp_path):
    extra = ("--epochs", 6, "--early-stopping", 2, "--max-train-samples", 6, "--batch-size", 2)
    extra = (*extra, "--max-eval-samples", 3, "--no-augment", "--card-pictures", 0)
    words = arguments(scenes, tmp_path, *extra, backbone_norm="frozen")
    words[words.index("3e-3")] = "0"  # so that every epoch has the same AP

    output = run_script(words)

    assert "Stopped: no better AP in 2 epochs." in output
    # Six pictures make three steps; the first epoch is the best.
    assert list(losses(output)) == list(range(1, 10))
    assert "step 1/18 " in output
    assert read_metrics(tmp_path / "best")["epoch"] == 1
    assert not list(tmp_path.rglob("*.jpg"))


def test_loss_that_is_not_a_number_ends_the_run(scenes, tmp_path):
    words = arguments(scenes, tmp_path, "--max-train-steps", 3, "--eval-split", "none")
    words[words.index("3e-3")] = "1e30"
    with pytest.raises(NonFiniteLossError, match=r"Stopped at step 2: .*loss_ce.* for image ids"):
        run_script(words)
    assert not list(tmp_path.rglob("*.safetensors"))


# The compiler itself looks at gradients that are not there.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_run_saves_the_names_of_a_plain_one(run, scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    extra = ("--max-train-steps", 1, "--max-eval-samples", 1, "--card-pictures", 0)
    run_script(arguments(scenes, tmp_path, *extra))
    compiled, plain = (
        load_file(path / "last" / "model.safetensors") for path in (tmp_path, run[1])
    )
    assert compiled.keys() == plain.keys()


def test_bf16_trains_and_evaluates(scenes, tmp_path):
    extra = ("--max-train-steps", 1, "--mixed-precision", "bf16", "--ema-decay", 0.9)
    run_script(arguments(scenes, tmp_path, *extra))
    assert read_metrics(tmp_path / "best")["map"] >= 0


def test_fp16_without_a_gpu_is_an_error(scenes, tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU; on a CPU use bf16 or no"):
        run_script(arguments(scenes, tmp_path, "--mixed-precision", "fp16"))


def test_precision_is_the_launchers_where_none_is_given(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run_script(arguments(scenes, tmp_path))
    extra = ("--max-train-steps", 1, "--eval-split", "none", "--mixed-precision", "no")
    run_script(arguments(scenes, tmp_path, *extra))


def test_average_of_divided_weights_is_an_error(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="--ema-decay needs all weights in each process"):
        run_script(arguments(scenes, tmp_path, "--ema-decay", "0.9"))


def test_failing_pushes_end_no_training(scenes, tmp_path, monkeypatch):
    pushed = []

    def push(repository, directory, message):
        pushed.append((message, sorted(path.name for path in directory.iterdir())))
        raise HubError(f"Not pushed to {repository.repo_id}: gone")

    monkeypatch.setattr(HubRepository, "prepare", lambda repository: "someone/it")
    monkeypatch.setattr(HubRepository, "push", push)
    extra = ("--epochs", 2, "--batch-size", 8, "--eval-split", "none")
    extra = (*extra, "--push-to-hub", "it", "--push-every-epoch", "--hub-token", "hf_secret")

    with pytest.raises(SystemExit, match=r"^Not pushed to someone/it: gone$"):
        run_script(arguments(scenes, tmp_path, *extra))

    # Every epoch is the best without evaluation; then once more at the end.
    assert [message for message, _ in pushed] == [f"After {step} steps" for step in (2, 4, 4)]
    expected = ["README.md", "config.json", "metrics.json"]
    assert pushed[-1][1] == [*expected, "model.safetensors", "preprocessor_config.json"]
    written = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".md")]
    assert "hf_secret" not in "".join(path.read_text() for path in written)


def test_missing_hub_is_noticed_before_anything_is_loaded(tmp_path):
    words = arguments(tmp_path / "no data", tmp_path / "run", "--push-to-hub", "it")
    with pytest.raises(HubError, match="Cannot push to it: HF_HUB_OFFLINE is set"):
        run_script(words)
    assert not (tmp_path / "run").exists()
