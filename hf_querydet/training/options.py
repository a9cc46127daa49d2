"""Options of the training script, and what of them may be shown to others."""

import argparse
import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_querydet.recipe_utils import Recipe
from hf_querydet.registration import VARIANTS, Variant

NO_SPLIT = "none"


def parse_options(description: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options of a training run, and check that they go together.

    Args:
        description: First lines of the help.
        words: Not given: those of the command line.

    Returns:
        One attribute per option. Those that stand for a recipe's value are None until
        :func:`fill_from_recipe`.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # so that a token is found whatever it was called
    )
    _add_model_options(parser.add_argument_group("model"))
    _add_data_options(parser.add_argument_group("data"))
    _add_optimization_options(parser.add_argument_group("optimisation (unset: as in the recipe)"))
    _add_run_options(parser.add_argument_group("run"))
    _add_hub_options(parser.add_argument_group("hub"))
    options = parser.parse_args(words)
    try:
        options.model_option = _model_options(options.model_option)
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    add, flag = group.add_argument, argparse.BooleanOptionalAction
    add("--model", required=True, help=f"{', '.join(VARIANTS)}; or a directory or Hub id")
    add(
        "--recipe",
        choices=["paper", "small"],
        default="paper",
        help="what other options default to; small: a small new detector, a few hundred pictures",
    )
    add(
        "--model-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="config field, e.g. dropout=0, or decoder_layers=3 of a new detector",
    )
    add(
        "--pretrained-backbone",
        action=flag,
        help="start a new detector from the published weights of its backbone, as in the papers",
    )
    add("--shortest-edge", type=_positive, help="picture size; unset: the model's or the recipe's")
    add("--longest-edge", type=_positive, help="limit of the longer side; unset: in proportion")


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    add, flag = group.add_argument, argparse.BooleanOptionalAction
    add("--dataset", required=True, help="{split} in a path stands for the split")
    add("--train-split", default="train", help="split to train on")
    evaluated = group.add_mutually_exclusive_group().add_argument
    evaluated("--eval-split", default="validation", help="'none' trains without evaluation")
    evaluated(
        "--eval-fraction",
        type=_fraction,
        help="evaluate on this share of the training split instead, drawn by --seed; it is not "
        "trained on",
    )
    add("--config-name", help="of a Hub dataset that has several")
    add("--picture-dir", help="pictures of a COCO json, if not beside it")
    add(
        "--box-format",
        choices=["xywh", "xyxy"],
        help="left, top, width, height as in COCO; or left, top, right, bottom; unset: the first, "
        "and an error if boxes look like the second",
    )
    add("--label-names", help="comma-separated names, where the dataset has only numbers")
    add("--max-train-samples", type=_positive, help="train on so many pictures, drawn by --seed")
    add("--max-eval-samples", type=_positive, help="evaluate on so many, drawn by --seed")
    add("--streaming", action=flag, default=False, help="read a Hub dataset while training")
    add("--skip-bad-images", action=flag, default=False, help="leave out what cannot be read")
    add("--augment", action=flag, default=True, help="flip, scale and crop as DETR's paper")
    add("--flip-probability", type=_probability, default=0.5, help="0 where left and right matter")
    add("--multi-scale", action=flag, default=True, help="scales from 0.6 to 1, when augmenting")
    add("--random-crop", action=flag, default=True, help="of half of the pictures, as above")
    add("--num-workers", type=_count, default=2, help="processes that prepare pictures")


def _add_optimization_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=_positive, help="passes over the data; unset when streaming: no limit")
    add("--max-train-steps", type=_positive, help="ends the run earlier; needed when streaming")
    add("--batch-size", type=_positive, help="pictures per process and step; 4 with --recipe paper")
    add("--gradient-accumulation", type=_positive, default=1, help="batches per optimizer step")
    add("--learning-rate", type=_not_negative, help="of most parameters")
    add("--backbone-factor", type=_not_negative, help="on its learning rate; 1 if it starts random")
    add("--weight-decay", type=_not_negative, help="on all parameters")
    add("--max-grad-norm", type=_not_negative, help="gradients are clipped to it; 0: they are not")
    add("--schedule", choices=["step", "cosine"], help="of the learning rate")
    add("--warmup-steps", type=_count, help="steps of linear warm-up")
    add("--ema-decay", type=float, help="evaluate and save a moving average of the weights")
    add("--early-stopping", type=_positive, metavar="EPOCHS", help="end after so many without gain")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="unset: the launcher's, or no")


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    add, flag = group.add_argument, argparse.BooleanOptionalAction
    add("--output-dir", type=Path, required=True, help="where everything is saved")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint")
    add("--checkpoint-steps", type=_positive, help="also save a checkpoint every so many steps")
    add("--log-steps", type=_positive, default=20, help="steps between lines of the log")
    add("--report-to", help="tracker of accelerate: tensorboard, wandb, ...")
    add("--seed", type=int, default=42, help="of weights, order and augmentation")


def _add_hub_options(group: argparse._ArgumentGroup) -> None:
    add, flag = group.add_argument, argparse.BooleanOptionalAction
    add("--push-to-hub", metavar="REPO_ID", help="where 'best' is uploaded after the run")
    add("--push-every-epoch", action=flag, default=False, help="also after each better epoch")
    add("--hub-private", action=flag, default=False, help="create that repository as a private one")
    add("--hub-revision", help="branch to upload to")
    add("--hub-token", help="unset: HF_TOKEN, or that of `hf auth login`, which are better places")
    add("--license", help="licence of the model in its card, e.g. apache-2.0")
    add(
        "--card-pictures",
        type=_count,
        default=3,
        help="evaluation pictures shown in the model card",
    )


def _number(
    kind: type[int] | type[float], is_allowed: Callable[[float], bool], allowed: str
) -> Callable[[str], float]:
    """The type of an option whose numbers have limits; ``allowed`` says them after "must be"."""

    def parse(text: str) -> float:
        number = kind(text)
        if not is_allowed(number):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text}")
        return number

    parse.__name__ = kind.__name__  # in argparse's message for what is no number
    return parse


_count = _number(int, lambda number: number >= 0, "at least 0")
_positive = _number(int, lambda number: number >= 1, "at least 1")
_fraction = _number(float, lambda number: 0 < number < 1, "above 0 and below 1")
_probability = _number(float, lambda number: 0 <= number <= 1, "between 0 and 1")
_not_negative = _number(
    float, lambda number: 0 <= number < math.inf, "a finite number of at least 0"
)


def _check(options: argparse.Namespace) -> None:
    """Raise for options that contradict each other."""
    if options.recipe == "small" and options.model not in VARIANTS:
        raise ValueError(
            "--recipe small is for a new detector: --model must be one of "
            f"{', '.join(VARIANTS)}, got {options.model!r}."
        )
    if options.pretrained_backbone is not None and options.model not in VARIANTS:
        raise ValueError(
            "--pretrained-backbone and --no-pretrained-backbone are for a new detector, and the "
            f"backbone of {options.model!r} is in its checkpoint; leave the option out."
        )
    if options.streaming and options.max_train_steps is None:
        raise ValueError("--streaming needs --max-train-steps: a stream has no length.")
    if options.streaming and options.eval_fraction:
        raise ValueError(
            "--eval-fraction needs the number of pictures, which a stream does not tell; name an "
            "--eval-split, or leave out --streaming."
        )
    if options.early_stopping and options.eval_split == NO_SPLIT:
        raise ValueError("--early-stopping needs an --eval-split to tell what is better.")
    if options.ema_decay is not None and not 0 < options.ema_decay < 1:
        raise ValueError(f"--ema-decay must lie between 0 and 1, got {options.ema_decay}.")
    hub_options = ("push_every_epoch", "hub_private", "hub_revision", "hub_token")
    given = [name for name in hub_options if getattr(options, name)]
    if given and options.push_to_hub is None:
        raise ValueError(f"--{given[0].replace('_', '-')} needs --push-to-hub REPO_ID.")


def _model_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Config fields from words NAME=VALUE; values are json or plain words."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--model-option needs NAME=VALUE, got {pair!r}.")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value  # a plain word
    return options


def fill_from_recipe(options: argparse.Namespace, variant: Variant) -> Recipe:
    """Put the recipe's value in place of options that were not given.

    Args:
        options: Of :func:`parse_options`; changed.
        variant: Of the model that is trained.

    Returns:
        The recipe that ``options.recipe`` names, for what no option stands for.

    Raises:
        ValueError: If a model option is no field of the variant's configuration, or the longest
            edge is below the shortest.
    """
    recipe = variant.recipe
    given = {name: value for name, value in vars(options).items() if value is not None}
    values = {"batch_size": 4, "pretrained_backbone": True}
    if options.recipe == "small":
        recipe = variant.small_recipe
        values = {
            "batch_size": recipe.batch_size,
            "pretrained_backbone": False,
            "shortest_edge": recipe.shortest_edge,
        }
        if options.shortest_edge is None:
            values["longest_edge"] = recipe.longest_edge
        given["model_option"] = {**recipe.model_fields, **options.model_option}
    values |= {
        # A recipe's epochs are those of its paper's data; a stream ends by its number of steps.
        "epochs": None if options.streaming else recipe.num_epochs,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "schedule": recipe.schedule,
    }
    vars(options).update(values | given)
    try:
        variant.config.check_names(options.model_option)
    except ValueError as error:
        raise ValueError(f"--model-option: {error}") from error
    if options.longest_edge and options.longest_edge < (options.shortest_edge or 0):
        raise ValueError(
            f"--longest-edge {options.longest_edge} is below --shortest-edge "
            f"{options.shortest_edge}."
        )
    return recipe


def shown_options(options: argparse.Namespace) -> dict[str, int | float | str]:
    """Options for a tracker: plain values, without the token."""
    return {
        name: value
        for name, value in vars(options).items()
        if isinstance(value, (int, float, str)) and name != "hub_token"
    }


def shown_command(words: Sequence[str]) -> str:
    """Command line of a run as others may see it: without the token and the home directory.

    Args:
        words: ``sys.argv``.
    """
    shown, rest = [Path(words[0]).name], iter(words[1:])
    for word in rest:
        if word == "--hub-token":
            next(rest, None)
        elif not word.startswith("--hub-token="):
            shown.append(word)
    return " ".join(["accelerate launch", *map(_quote_from_home, shown)])


def _quote_from_home(word: str) -> str:
    """A word for the shell, which puts its own home directory where ~/ stands unquoted."""
    home = f"{Path.home()}/"
    option, equals, value = word.partition("=")
    if value.startswith(home):
        return f"{shlex.quote(option)}{equals}~/{shlex.quote(value.removeprefix(home))}"
    if word.startswith(home):
        return f"~/{shlex.quote(word.removeprefix(home))}"
    return shlex.quote(word)
