"""Fine-tune a query-based detector, or train one from scratch.

    accelerate launch examples/train_detector.py --model detr --dataset path/to/pictures \
        --output-dir outputs/detr

``--model`` is a variant's name (a new detector), a directory, or a Hub id. ``--dataset`` is a Hub
dataset, a picture folder with metadata.jsonl, or a COCO json; see
``hf_querydet.data.load_detection_dataset``. The run leaves ``best`` and ``last`` (model, image
processor, metrics.json) and ``checkpoints`` in the output directory; ``--push-to-hub`` uploads
``best``.
"""

import argparse
import json
import math
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from huggingface_hub import create_repo, upload_folder
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from hf_querydet import VARIANTS, load_detector, variant_of
from hf_querydet.data import DetectionAugmentation, DetectionCollator, load_detection_dataset
from hf_querydet.evaluation import CocoEvaluator, evaluate_detector, format_table
from hf_querydet.training import (
    PARTIAL_SUFFIX,
    TrainingProgress,
    checkpoint_name,
    finish_directory,
    learning_rate_schedule,
    list_checkpoints,
    parameter_groups,
    write_directory,
    write_json,
)

LOGGED_TERMS = ("loss", "loss_ce", "loss_bbox", "loss_giou")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction
    model = parser.add_argument_group("model").add_argument
    model("--model", required=True, help=f"{', '.join(VARIANTS)}; or a directory or Hub id")
    model(
        "--model-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="config field of a new detector, e.g. backbone=resnet18 or decoder_layers=3",
    )
    model(
        "--pretrained-backbone",
        action=flag,
        default=True,
        help="start a new detector from the published weights of its backbone",
    )
    model("--shortest-edge", type=int, help="picture size; unset: the model's own")
    model("--longest-edge", type=int, help="its limit for the longer side")
    data = parser.add_argument_group("data").add_argument
    data("--dataset", required=True, help="{split} in a path stands for the split")
    data("--train-split", default="train", help="split to train on")
    data("--eval-split", default="validation", help="'none' trains without evaluation")
    data("--picture-dir", help="pictures of a COCO json, if not beside it")
    data("--label-names", help="comma-separated names, where the dataset has only numbers")
    data("--streaming", action=flag, default=False, help="read a Hub dataset while training")
    data("--skip-bad-images", action=flag, default=False, help="leave out what cannot be read")
    data("--augment", action=flag, default=True, help="flip, scale and crop as in the papers")
    data("--num-workers", type=int, default=2, help="processes that prepare pictures")
    optim = parser.add_argument_group("optimisation (unset: the paper's value)").add_argument
    optim("--epochs", type=int, help="passes over the data")
    optim("--max-train-steps", type=int, help="ends the run earlier; needed when streaming")
    optim("--batch-size", type=int, default=4, help="pictures per process and step")
    optim("--gradient-accumulation", type=int, default=1, help="batches per optimizer step")
    optim("--learning-rate", type=float, help="of most parameters")
    optim("--backbone-factor", type=float, help="on its learning rate; 1 if it starts random")
    optim("--weight-decay", type=float, help="on all parameters")
    optim("--max-grad-norm", type=float, help="gradients are clipped to it")
    optim("--schedule", choices=["step", "cosine"], help="of the learning rate")
    optim("--warmup-steps", type=int, default=0, help="steps of linear warm-up")
    optim("--mixed-precision", choices=["no", "fp16", "bf16"], default="no", help="of the forward")
    add("--output-dir", type=Path, required=True, help="where everything is saved")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint")
    add("--checkpoint-steps", type=int, help="also save a checkpoint every so many steps")
    add("--log-steps", type=int, default=20, help="steps between lines of the log")
    add("--report-to", help="tracker of accelerate: tensorboard, wandb, ...")
    add("--push-to-hub", metavar="REPO_ID", help="where 'best' is uploaded after the run")
    add("--hub-private", action=flag, default=False, help="create that repository as a private one")
    add("--seed", type=int, default=42, help="of weights, order and augmentation")
    return parser.parse_args()


def model_options(pairs: list[str]) -> dict[str, Any]:
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


def build_model(args: argparse.Namespace, accelerator: Accelerator, id2label: dict[int, str]):
    """Model and image processor for the dataset's labels; whether the backbone is pretrained."""
    label2id = {name: label for label, name in id2label.items()}
    size = {}
    if args.shortest_edge:
        longest_edge = args.longest_edge or round(args.shortest_edge * 1333 / 800)
        size = {"size": {"shortest_edge": args.shortest_edge, "longest_edge": longest_edge}}
    if args.model in VARIANTS:
        variant = VARIANTS[args.model]
        options = {
            "use_pretrained_backbone": args.pretrained_backbone,
            **model_options(args.model_option),
        }
        config = variant.config(id2label=id2label, label2id=label2id, **options)
        model = variant.detector(config)
        processor = variant.image_processor.for_config(config, **size)
        backbone = "published weights" if config.use_pretrained_backbone else "random weights"
        say(
            accelerator,
            f"New {args.model}; the backbone starts from {backbone}, its norms are "
            f"{config.backbone_norm}, {config.frozen_backbone_stages} of its stages are frozen.",
        )
        return model, processor, config.use_pretrained_backbone
    model, processor = load_detector(args.model, **model_options(args.model_option))
    if set(model.config.id2label.values()) == set(id2label.values()):
        say(accelerator, "The model has the dataset's labels: its class head is kept.")
    else:
        say(accelerator, f"New class head for {len(id2label)} labels.")
        model, processor = load_detector(
            args.model, id2label=id2label, **model_options(args.model_option)
        )
    if size:
        processor.size = processor.size.__class__(**size["size"])
    return model, processor, True


def build_dataloaders(args: argparse.Namespace, train_data: Any, eval_data: Any, processor: Any):
    augmentation = DetectionAugmentation(processor) if args.augment else None
    train_data = train_data.with_processor(processor, augmentation)
    options = {
        "batch_size": args.batch_size,
        "collate_fn": DetectionCollator(processor),
        "num_workers": args.num_workers,
        "persistent_workers": False,
    }
    is_stream = isinstance(train_data, IterableDataset)
    if is_stream:
        train_data = train_data.shuffle(seed=args.seed)
        drop_last = True
    else:
        drop_last = len(train_data) >= args.batch_size
    train_loader = DataLoader(
        train_data, shuffle=None if is_stream else True, drop_last=drop_last, **options
    )
    eval_loader = eval_data and DataLoader(eval_data.with_processor(processor), **options)
    return train_loader, eval_loader


def build_optimizer(args: argparse.Namespace, model: Any, pretrained: bool) -> Any:
    recipe = variant_of(model.config).recipe
    factor = args.backbone_factor
    if factor is None and not pretrained:
        factor = 1.0
    groups = parameter_groups(
        model, recipe, learning_rate=args.learning_rate, backbone_learning_rate_factor=factor
    )
    decay = recipe.weight_decay if args.weight_decay is None else args.weight_decay
    return torch.optim.AdamW(groups, weight_decay=decay)


def train_one_epoch(
    args, accelerator, model, optimizer, scheduler, loader, progress, num_steps, bar
) -> float:
    """Train until the epoch or the run ends; returns the mean loss over the steps."""
    model.train()
    loader.set_epoch(progress.epoch)
    batches = skip_first_batches(loader, progress.batch) if progress.batch else loader
    batches.set_epoch(progress.epoch)
    losses, started = [], time.perf_counter()
    for batch in batches:
        progress.batch += 1
        # For what changes during training, such as Efficient DETR's number of queries.
        accelerator.unwrap_model(model).set_training_progress(progress.step / num_steps)
        with accelerator.accumulate(model):
            outputs = model(**batch)
            check_finite(outputs, batch, progress.step)
            accelerator.backward(outputs.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
        terms = torch.stack([outputs.loss, *outputs.loss_dict.values()]).detach()
        losses.append(accelerator.reduce(terms, reduction="mean").tolist())
        if not accelerator.sync_gradients:
            continue
        progress.step += 1
        bar.update()
        if progress.step % args.log_steps == 0:
            recent = torch.tensor(losses[-args.log_steps :]).mean(0).tolist()
            terms = dict(zip(["loss", *outputs.loss_dict], recent, strict=True))
            final_layer = "  ".join(f"{name} {terms[name]:.4f}" for name in LOGGED_TERMS)
            seconds = (time.perf_counter() - started) / len(losses)
            say(
                accelerator,
                f"step {progress.step}/{num_steps}  {final_layer}  "
                f"lr {scheduler.get_last_lr()[0]:.2e}  {seconds:.2f} s/batch",
            )
            accelerator.log(terms, step=progress.step)
        if args.checkpoint_steps and progress.step % args.checkpoint_steps == 0:
            save_checkpoint(args, accelerator, progress)
        if progress.step >= num_steps:
            break
    return sum(loss[0] for loss in losses) / max(len(losses), 1)


def say(accelerator: Accelerator, text: str) -> None:
    """Print once, above the progress bars."""
    if accelerator.is_main_process:
        tqdm.write(text)


def hide_bar(accelerator: Accelerator) -> bool | None:
    """Bars are for one process and for terminals, which None stands for."""
    return None if accelerator.is_main_process else True


def check_finite(outputs: Any, batch: dict[str, Any], step: int) -> None:
    if torch.isfinite(outputs.loss):
        return
    terms = [name for name, value in outputs.loss_dict.items() if not torch.isfinite(value)]
    pictures = [label["image_id"].item() for label in batch["labels"]]
    raise RuntimeError(
        f"The loss is {outputs.loss.item()} at step {step} ({', '.join(terms)}), image ids "
        f"{pictures}. Lower the learning rate, or look at these pictures."
    )


def evaluate(accelerator, model, processor, loader, id2label) -> dict[str, float]:
    batches = tqdm(loader, "evaluate", leave=False, disable=hide_bar(accelerator))
    return evaluate_detector(model, processor, batches, CocoEvaluator(id2label))


def save_model(accelerator, model, processor, directory: Path, metrics: dict[str, Any]) -> None:
    accelerator.wait_for_everyone()
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:

        def write(partial: Path) -> None:
            accelerator.unwrap_model(model).save_pretrained(partial, state_dict=state)
            processor.save_pretrained(partial)
            write_json(partial / "metrics.json", metrics)

        write_directory(directory, write)
    accelerator.wait_for_everyone()


def save_checkpoint(args, accelerator, progress: TrainingProgress) -> None:
    """All that resuming needs. It gets its name when it is complete."""
    directory = args.output_dir / "checkpoints" / checkpoint_name(progress.step)
    partial = directory.with_name(directory.name + PARTIAL_SUFFIX)
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_directory(partial, directory)
        for old in list_checkpoints(directory.parent)[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def push(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Upload ``best``. If that fails, it is all on the disk, and can be pushed by one command."""
    if not accelerator.is_main_process:
        return
    directory = (args.output_dir / "best").resolve()
    try:
        url = create_repo(args.push_to_hub, private=args.hub_private or None, exist_ok=True)
        upload_folder(repo_id=url.repo_id, folder_path=directory)
    except Exception as error:  # no network, no such token, no such name, no space left, ...
        command = ["hf", "upload", args.push_to_hub, str(directory)]
        command += ["--private"] if args.hub_private else []
        raise SystemExit(
            f"Not pushed to {args.push_to_hub}: {error}\n"
            f"Nothing is lost: model, image processor and metrics are in {directory}. "
            f"To push them again:\n{shlex.join(command)}"
        ) from error
    say(accelerator, f"Pushed {args.output_dir / 'best'} to {url}.")


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        # Said in so many words, or several processes without a GPU would each train alone.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=args.gradient_accumulation,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True,
            data_seed=args.seed,
            # Dispatching cuts every tensor in the labels of a stream to the length of the batch.
            dispatch_batches=False,
        ),
        step_scheduler_with_optimizer=False,
    )
    set_seed(args.seed)
    checkpoints = list_checkpoints(args.output_dir / "checkpoints")
    if checkpoints and not args.resume:
        raise FileExistsError(
            f"--output-dir {args.output_dir} holds a run already; continue it with --resume, or "
            "choose another directory."
        )

    # Data
    with accelerator.main_process_first():
        options = {
            "picture_dir": args.picture_dir,
            "streaming": args.streaming,
            "skip_bad_images": args.skip_bad_images,
        }
        names = args.label_names.split(",") if args.label_names else None
        train_data = load_detection_dataset(
            args.dataset, split=args.train_split, label_names=names, **options
        )
        eval_data = None
        if args.eval_split != "none":
            eval_data = load_detection_dataset(
                args.dataset, split=args.eval_split, label_table=train_data.label_table, **options
            )

    # Model; its labels rule
    model, processor, pretrained = build_model(args, accelerator, train_data.id2label)
    id2label = model.config.id2label
    train_data = train_data.with_labels(id2label)
    eval_data = eval_data and eval_data.with_labels(id2label)
    train_loader, eval_loader = build_dataloaders(args, train_data, eval_data, processor)

    # Optimisation
    recipe = variant_of(model.config).recipe
    for name, default in (
        ("epochs", recipe.num_epochs),
        ("max_grad_norm", recipe.max_grad_norm),
        ("schedule", recipe.schedule),
    ):
        if getattr(args, name) is None:
            setattr(args, name, default)
    optimizer = build_optimizer(args, model, pretrained)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(
        model, optimizer, train_loader, eval_loader
    )
    if not args.streaming:
        steps_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation)
        num_steps = min(args.epochs * steps_per_epoch, args.max_train_steps or math.inf)
    elif args.max_train_steps is None:
        raise ValueError("--streaming needs --max-train-steps: a stream has no length.")
    else:
        num_steps = args.max_train_steps
    scheduler = learning_rate_schedule(
        optimizer.optimizer,
        schedule=args.schedule,
        num_steps=num_steps,
        warmup_steps=args.warmup_steps,
        step_fraction=recipe.step_fraction,
    )
    progress = TrainingProgress()
    accelerator.register_for_checkpointing(scheduler, progress)
    if args.resume and checkpoints:
        accelerator.load_state(checkpoints[-1])
        say(accelerator, f"Resumed from {checkpoints[-1].name}.")
    if args.report_to:
        accelerator.init_trackers(
            "train_detector",
            {
                name: value
                for name, value in vars(args).items()
                if isinstance(value, (int, float, str))
            },
        )

    # Train
    bar = tqdm(total=num_steps, initial=progress.step, disable=hide_bar(accelerator))
    disable_progress_bar()  # transformers shows one for every file it writes
    while progress.step < num_steps and progress.epoch < args.epochs:
        loss = train_one_epoch(
            args, accelerator, model, optimizer, scheduler, train_loader, progress, num_steps, bar
        )
        result = {"epoch": progress.epoch + 1, "step": progress.step, "train_loss": loss}
        if eval_loader is not None:
            result |= evaluate(accelerator, model, processor, eval_loader, id2label)
            say(accelerator, f"\nepoch {progress.epoch + 1}\n{format_table(result)}")
            accelerator.log({"map": result["map"], "map_50": result["map_50"]}, step=progress.step)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.history.append(result)
        metrics = {**result, "history": progress.history}
        save_model(accelerator, model, processor, args.output_dir / "last", metrics)
        if eval_loader is None or result["map"] > progress.best_map:
            progress.best_map = result.get("map", -1.0)
            save_model(accelerator, model, processor, args.output_dir / "best", metrics)
        save_checkpoint(args, accelerator, progress)
    bar.close()
    # Without streaming, loading has said so already.
    skipped = [problem for data in (train_data, eval_data) if data for problem in data.skipped]
    if args.streaming and skipped:
        say(accelerator, f"Skipped {len(skipped)} pictures:\n" + "\n".join(skipped))
    say(accelerator, f"Saved {args.output_dir / 'best'} and {args.output_dir / 'last'}.")
    accelerator.end_training()
    if args.push_to_hub:
        push(args, accelerator)


if __name__ == "__main__":
    main()
