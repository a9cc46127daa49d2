"""Options that contradict each other, and what others may see of them."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from hf_querydet import VARIANTS
from hf_querydet.training import (
    fill_from_recipe,
    parse_options,
    shown_command,
    shown_options,
)

NEEDED = ["--model", "detr", "--dataset", "pictures", "--output-dir", "out"]


def parse(*words):
    return parse_options("Train.", [*NEEDED, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--streaming"], "--streaming needs --max-train-steps"),
        (["--early-stopping", "3", "--eval-split", "none"], "--early-stopping needs an --eval"),
        (["--eval-fraction", "0.2", "--eval-split", "test"], "not allowed with argument"),
        (["--eval-fraction", "20"], "--eval-fraction: must be above 0 and below 1, got 20"),
        (
            ["--eval-fraction", "0.2", "--streaming", "--max-train-steps", "9"],
            "--eval-fraction needs the number of pictures",
        ),
        (["--ema-decay", "1.0"], "--ema-decay must lie between 0 and 1, got 1.0"),
        (["--push-every-epoch"], "--push-every-epoch needs --push-to-hub REPO_ID"),
        (["--hub-token", "hf_secret"], "--hub-token needs --push-to-hub REPO_ID"),
        (["--recipe", "small", "--model", "me/it"], "--model must be one of detr, "),
        (["--max-grad-norm", "-1"], "--max-grad-norm: must be a finite number of at least 0"),
        (["--max-grad-norm", "nan"], "must be a finite number of at least 0, got nan"),
        (["--learning-rate", "-0.001"], "--learning-rate: must be a finite number of at least 0"),
        (["--weight-decay", "inf"], "--weight-decay: must be a finite number of at least 0"),
        (["--flip-probability", "3"], "--flip-probability: must be between 0 and 1, got 3"),
        (["--num-workers", "-2"], "--num-workers: must be at least 0, got -2"),
        (["--warmup-steps", "-1"], "--warmup-steps: must be at least 0, got -1"),
        (["--shortest-edge", "0"], "--shortest-edge: must be at least 1, got 0"),
        (["--model", "me/it", "--pretrained-backbone"], "backbone of 'me/it' is in its checkpoint"),
        (["--model", "me/it", "--no-pretrained-backbone"], "is in its checkpoint; leave the"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["--model-option", "d_model"], "--model-option needs NAME=VALUE, got 'd_model'"),
        # An abbreviation would bring the token past those who leave it out.
        (["--push-to-hub", "me/it", "--hub-tok", "hf_secret"], "unrecognized arguments: --hub-tok"),
    ],
)
def test_options_that_do_not_go_together(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err


def test_model_options_are_json_or_words():
    words = ["d_model=64", "backbone=resnet18", "with_box_refine=true", 'a={"b": [1]}']
    options = parse(*(each for word in words for each in ("--model-option", word)))
    assert options.model_option == {
        "d_model": 64,
        "backbone": "resnet18",
        "with_box_refine": True,
        "a": {"b": [1]},
    }


def test_options_that_were_not_given_are_the_papers():
    options = parse("--learning-rate", "0.5")
    recipe = VARIANTS["detr"].recipe
    assert fill_from_recipe(options, VARIANTS["detr"]) is recipe
    assert options.learning_rate == 0.5
    assert (options.epochs, options.max_grad_norm) == (recipe.num_epochs, recipe.max_grad_norm)
    assert (options.schedule, options.weight_decay) == (recipe.schedule, recipe.weight_decay)
    assert (options.batch_size, options.pretrained_backbone) == (4, True)
    assert (options.shortest_edge, options.longest_edge, options.model_option) == (None, None, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("num_querys", "DETRConfig has no fields 'num_querys'; do you mean 'num_queries'?"),
        ("xyz", "DETRConfig has no fields 'xyz'; see its docstring"),
    ],
)
def test_model_option_that_is_no_field_is_named(name, message):
    options = parse("--model-option", f"{name}=5", "--model-option", "backbone=resnet18")
    with pytest.raises(ValueError, match=f"--model-option: {re.escape(message)}"):
        fill_from_recipe(options, VARIANTS["detr"])


@pytest.mark.parametrize("words", [["--shortest-edge", "500"], ["--recipe", "small"]])
def test_longest_edge_below_the_shortest_is_an_error(words):
    options = parse(*words, "--longest-edge", "100")
    with pytest.raises(ValueError, match=r"--longest-edge 100 is below --shortest-edge (500|192)"):
        fill_from_recipe(options, VARIANTS["detr"])


def test_options_of_the_small_recipe():
    options = parse("--recipe", "small", "--batch-size", "2", "--model-option", "d_model=64")
    recipe = VARIANTS["detr"].small_recipe
    assert fill_from_recipe(options, VARIANTS["detr"]) is recipe
    assert (options.learning_rate, options.schedule) == (recipe.learning_rate, "cosine")
    assert (options.batch_size, options.pretrained_backbone) == (2, False)
    assert (options.shortest_edge, options.longest_edge) == (192, 256)
    assert options.model_option == {**recipe.model_fields, "d_model": 64}


def test_stream_has_no_number_of_epochs_unless_one_is_given():
    words = ("--streaming", "--max-train-steps", "9")
    for extra, epochs in (((), None), (("--epochs", "2"), 2)):
        options = parse(*words, *extra)
        fill_from_recipe(options, VARIANTS["detr"])
        assert options.epochs == epochs


def test_size_of_the_small_recipe_is_given_as_a_whole():
    options = parse("--recipe", "small", "--shortest-edge", "320")
    fill_from_recipe(options, VARIANTS["detr"])
    assert (options.shortest_edge, options.longest_edge) == (320, None)


@pytest.mark.parametrize("name", VARIANTS)
def test_small_recipes_are_of_their_variants(name):
    variant = VARIANTS[name]
    recipe = variant.small_recipe
    fields = {field.name for field in dataclasses.fields(variant.config)}
    # These two become the field backbone_config.
    assert set(recipe.model_fields) <= fields | {"backbone", "backbone_kwargs"}
    with torch.device("meta"):
        model = variant.detector(variant.config(num_labels=3, **recipe.model_fields))
    assert model.config.num_queries == 100


@pytest.mark.parametrize("token", [["--hub-token", "hf_secret"], ["--hub-token=hf_secret"]])
def test_token_is_shown_to_nobody(token):
    words = ["--push-to-hub", "me/it", *token, "--epochs", "3"]
    command = shown_command(["examples/train_detector.py", *NEEDED, *words])
    assert command == (
        "accelerate launch train_detector.py --model detr --dataset pictures --output-dir out "
        "--push-to-hub me/it --epochs 3"
    )
    shown = shown_options(parse(*words))
    assert shown["epochs"] == 3
    assert "hf_secret" not in str(shown)


def test_home_directory_is_shown_to_nobody():
    home = Path.home()
    words = ["--dataset", f"{home}/my pictures", f"--output-dir={home}/out", f"/mnt{home}/other"]
    command = shown_command(["train_detector.py", *words])
    assert command == (
        "accelerate launch train_detector.py --dataset ~/'my pictures' --output-dir=~/out "
        f"/mnt{home}/other"
    )
