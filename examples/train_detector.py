"""Fine-tune a query-based detector, or train one from scratch.

    accelerate launch examples/train_detector.py --model detr --dataset path/to/pictures \
        --output-dir outputs/detr

``--model`` is a variant's name (a new detector), a directory, or a Hub id. ``--dataset`` is a Hub
dataset, a picture folder with metadata.jsonl, or a COCO json; see
``hf_querydet.data.load_detection_dataset``. The run leaves ``best`` and ``last`` (model, image
processor, metrics.json, model card) and ``checkpoints`` in the output directory; ``--push-to-hub``
uploads ``best``. docs/training.md describes all options.
"""

import argparse
import math
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, skip_first_batches
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    disable_fsdp_ram_efficient_loading,
    set_seed,
)
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from hf_querydet import VARIANTS, load_detector_for_labels, training, variant_of
from hf_querydet.data import (
    DetectionAugmentation,
    DetectionCollator,
    check_splits_differ,
    load_detection_dataset,
    parse_label_names,
)
from hf_querydet.evaluation import CocoEvaluator, evaluate_detector, format_table
from hf_querydet.model_card import CardFacts, write_model_card
from hf_querydet.recipe_utils import Recipe
from hf_querydet.registration import load_config

SHOWN_LABELS = 20
LOGGED_TERMS = ("loss", "loss_ce", "loss_bbox", "loss_giou")


@dataclass
class Run:
    """What training, evaluating and saving work with."""

    options: argparse.Namespace
    accelerator: Accelerator
    model: Any
    processor: Any
    average: Any  # of the weights, or None
    recipe: Recipe
    optimizer: Any
    train_loader: Any
    eval_loader: Any
    train_data: Any
    eval_data: Any
    progress: training.TrainingProgress
    # See plan.
    num_steps: int = 0
    scheduler: Any = None

    @property
    def detector(self) -> Any:
        """The model that is evaluated and saved."""
        return self.model if self.average is None else self.average.module

    @property
    def config(self) -> Any:
        """Of the detector; its labels are those of the run."""
        return self.accelerator.unwrap_model(self.model).config

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be continued."""
        options, held_out = self.options, None
        if options.eval_fraction is not None:  # another draw would be trained on
            num_pictures = len(self.train_data) + len(self.eval_data)
            held_out = {"of": num_pictures, "fraction": options.eval_fraction, "seed": options.seed}
        return training.run_facts(self.config, self.processor, held_out)


def build_accelerator(options: argparse.Namespace) -> Accelerator:
    # Meant for divided weights that one process reads for all; it fails at the statistics of norms,
    # which are not divided.
    disable_fsdp_ram_efficient_loading()
    accelerator = Accelerator(
        # Said in so many words, or several processes without a GPU would each train alone.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=options.gradient_accumulation,
        mixed_precision=options.mixed_precision,  # None: the launcher's
        log_with=options.report_to,
        project_config=ProjectConfiguration(project_dir=options.output_dir),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True,
            data_seed=options.seed,
            # Dispatching cuts every tensor in the labels of a stream to the length of the batch.
            dispatch_batches=False,
        ),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed-precision fp16 needs a GPU; on a CPU use bf16 or no.")
    if options.ema_decay and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("--ema-decay needs all weights in each process; FSDP divides them.")
    return accelerator


def load_data(options: argparse.Namespace) -> tuple[Any, Any]:
    """Training data, and evaluation data or None."""
    common = {
        "config_name": options.config_name,
        "picture_dir": options.picture_dir,
        "box_format": options.box_format,
        "streaming": options.streaming,
        "skip_bad_images": options.skip_bad_images,
    }
    has_eval_split = options.eval_fraction is None and options.eval_split != training.NO_SPLIT
    if has_eval_split:
        check_splits_differ(
            options.dataset, train_split=options.train_split, eval_split=options.eval_split
        )
    names = parse_label_names(options.label_names) if options.label_names else None
    train_data = load_detection_dataset(
        options.dataset, split=options.train_split, label_names=names, **common
    )
    eval_data = None
    if options.eval_fraction is not None:
        train_data, eval_data = train_data.hold_out(options.eval_fraction, seed=options.seed)
    elif has_eval_split:
        # Names that were given number the categories of any split alike. Other tables have the
        # dataset's own names, by which those of a split are found in them.
        labels = {"label_names": names} if names else {"label_table": train_data.label_table}
        eval_data = load_detection_dataset(
            options.dataset, split=options.eval_split, **labels, **common
        )
    if options.max_train_samples:
        train_data = train_data.sample(options.max_train_samples, seed=options.seed)
    if options.max_eval_samples and eval_data:
        eval_data = eval_data.sample(options.max_eval_samples, seed=options.seed)
    return train_data, eval_data


def build_model(options: argparse.Namespace, accelerator: Accelerator, id2label: dict[int, str]):
    """Model and image processor for the dataset's labels; whether the backbone is pretrained."""
    if options.model in VARIANTS:
        variant = VARIANTS[options.model]
        fields = {"use_pretrained_backbone": options.pretrained_backbone, **options.model_option}
        label2id = {name: label for label, name in id2label.items()}
        config = variant.config(id2label=id2label, label2id=label2id, **fields)
        say(
            accelerator,
            f"New {options.model}; the backbone starts from "
            f"{'published' if config.use_pretrained_backbone else 'random'} weights, its norms are "
            f"{config.backbone_norm}, {config.frozen_backbone_stages} of its stages are frozen.",
        )
        processor = variant.image_processor.for_config(config)
        model, pretrained = variant.detector(config), config.use_pretrained_backbone
    else:
        model, processor, keeps_head = load_detector_for_labels(
            options.model, id2label, **options.model_option
        )
        pretrained = True
        say(
            accelerator,
            "The model has the dataset's labels: its class head is kept."
            if keeps_head
            else f"New class head for {len(id2label)} labels.",
        )
    set_picture_size(options, processor)
    return model, processor, pretrained


def set_picture_size(options: argparse.Namespace, processor: Any) -> None:
    """Put the given edges in place of the processor's."""
    shortest_edge, longest_edge = options.shortest_edge, options.longest_edge
    if shortest_edge is None and longest_edge is None:
        return
    if shortest_edge is None:
        shortest_edge = processor.size.shortest_edge
        if shortest_edge is None:
            raise ValueError(
                f"--longest-edge {longest_edge} limits a shortest edge, but the size of "
                f"{options.model} is {dict(processor.size)}; give --shortest-edge as well."
            )
    size = {
        "shortest_edge": shortest_edge,
        "longest_edge": longest_edge or round(shortest_edge * 1333 / 800),
    }
    processor.size = processor.size.__class__(**size)


def build_dataloaders(
    options: argparse.Namespace,
    accelerator: Accelerator,
    train_data: Any,
    eval_data: Any,
    processor: Any,
):
    augmentation = None
    if options.augment:
        augmentation = DetectionAugmentation(
            processor,
            flip_probability=options.flip_probability,
            multi_scale=options.multi_scale,
            random_crop=options.random_crop,
        )
    # Seeded item by item, so that a resumed epoch goes on with the same pictures.
    train_data = train_data.with_processor(processor, augmentation, seed=options.seed)
    common = {
        "batch_size": options.batch_size,
        "collate_fn": DetectionCollator(processor),
        "num_workers": options.num_workers,
        # One of their own: a loader draws a number when its iteration starts, and a resumed run
        # starts once more often.
        "generator": torch.Generator(),
    }
    is_stream = isinstance(train_data, IterableDataset)
    if is_stream:
        train_data = train_data.shuffle(seed=options.seed)
    if is_stream and not options.skip_bad_images:
        # Each process goes through the whole stream, and prepares its own share.
        train_data, eval_data = train_data.deferred(), eval_data and eval_data.deferred()
    # What is left over is dropped, unless it is all there is.
    drop_last = is_stream or len(train_data) >= options.batch_size * accelerator.num_processes
    train_loader = DataLoader(
        train_data, shuffle=None if is_stream else True, drop_last=drop_last, **common
    )
    eval_loader = eval_data and DataLoader(eval_data.with_processor(processor), **common)
    return train_loader, eval_loader


def build_optimizer(
    options: argparse.Namespace, model: Any, recipe: Recipe, pretrained: bool
) -> Any:
    factor = options.backbone_factor
    if factor is None and not pretrained:
        factor = 1.0
    groups = training.parameter_groups(
        model,
        recipe,
        learning_rate=options.learning_rate,
        backbone_learning_rate_factor=factor,
    )
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay)


def prepare(options: argparse.Namespace, accelerator: Accelerator) -> Run:
    """Everything up to the first step of a new run."""
    variant = VARIANTS.get(options.model) or variant_of(load_config(options.model))
    recipe = training.fill_from_recipe(options, variant)
    set_seed(options.seed)
    with accelerator.main_process_first():
        train_data, eval_data = load_data(options)
    names = list(train_data.id2label.values())
    more = ", ..." if len(names) > SHOWN_LABELS else ""
    say(accelerator, f"{len(names)} labels: {', '.join(names[:SHOWN_LABELS])}{more}")
    model, processor, pretrained = build_model(options, accelerator, train_data.id2label)
    # The model's labels rule.
    train_data = train_data.with_labels(model.config.id2label)
    eval_data = eval_data and eval_data.with_labels(model.config.id2label)
    if not options.streaming:
        evaluated = len(eval_data) if eval_data else "none"
        say(accelerator, f"{len(train_data)} pictures to train on, {evaluated} to evaluate on.")
    train_loader, eval_loader = build_dataloaders(
        options, accelerator, train_data, eval_data, processor
    )
    optimizer = build_optimizer(options, model, recipe, pretrained)
    average = None
    if options.ema_decay:
        average = training.weight_average(model, decay=options.ema_decay, device=accelerator.device)
    if not model.config.auxiliary_loss:
        # Heads of earlier stages may get no gradient then.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(
        model, optimizer, train_loader, eval_loader
    )
    progress = training.TrainingProgress(
        pictures_per_batch=options.batch_size * accelerator.num_processes,
        batches_per_epoch=None if options.streaming else len(train_loader),
        batches_per_step=options.gradient_accumulation,
    )
    accelerator.register_for_checkpointing(*filter(None, (progress, average)))
    # From here on chance is dropout, another one in each process.
    set_seed(options.seed, device_specific=True)
    run = Run(
        options=options,
        accelerator=accelerator,
        model=model,
        processor=processor,
        average=average,
        recipe=recipe,
        optimizer=optimizer,
        train_loader=train_loader,
        eval_loader=eval_loader,
        train_data=train_data,
        eval_data=eval_data,
        progress=progress,
    )
    plan(run)
    return run


def plan(run: Run) -> None:
    """Set the length of the run and its learning rates, from the progress on."""
    options, progress = run.options, run.progress
    run.num_steps = options.max_train_steps
    if not options.streaming:
        run.num_steps = min(progress.steps_after(options.epochs), run.num_steps or math.inf)
    warmup_steps = options.warmup_steps
    if warmup_steps is None:
        warmup_steps = round(run.recipe.warmup_fraction * run.num_steps)
    run.scheduler = training.learning_rate_schedule(
        run.optimizer.optimizer,
        schedule=options.schedule,
        num_steps=run.num_steps,
        warmup_steps=warmup_steps,
        step_fraction=run.recipe.step_fraction,
    )


def resume(run: Run, checkpoint: Path) -> None:
    """Go on where a checkpoint was made, with the learning rates and weight decay of now."""
    training.check_facts(checkpoint, run.facts)
    peaks = run.scheduler.base_lrs  # loading brings those of the checkpoint
    run.accelerator.load_state(checkpoint)
    if run.progress.batch == 0:
        run.accelerator.step = 0  # its place in a window of batches, also of one that was cut off
    plan(run)
    run.scheduler.base_lrs = peaks
    training.continue_schedule(run.scheduler, run.progress.step)
    training.rename_checkpoint(run.accelerator, checkpoint, run.progress.step)
    say(run.accelerator, f"Resumed from {checkpoint.name}.")


def reason_to_end(run: Run) -> str | None:
    """Why the run is over, or None."""
    options, progress = run.options, run.progress
    if progress.batch:  # of an epoch that is not over until it is evaluated and saved
        return None
    if progress.epochs_since_best >= (options.early_stopping or math.inf):
        return f"Stopped: no better AP in {progress.epochs_since_best} epochs."
    if progress.step >= run.num_steps:
        return f"Done: {progress.step} steps in {progress.epoch} epochs."
    if progress.epoch >= (options.epochs or math.inf):
        return f"Done: {progress.epoch} epochs (--epochs), after {progress.step} steps."
    return None


def train_one_epoch(run: Run, bar: Any) -> float:
    """Train until the epoch or the run ends; returns the mean loss over the epoch's batches."""
    options, accelerator, progress = run.options, run.accelerator, run.progress
    run.model.train()
    run.train_loader.set_epoch(progress.epoch)
    run.train_loader.dataset.set_epoch(progress.epoch)
    batches = run.train_loader
    if progress.batch:
        batches = skip_first_batches(batches, progress.batch)
    if progress.step >= run.num_steps:
        batches = []
    meter, recent = training.ThroughputMeter(), []
    for batch in meter.watch(batches):
        # For what changes during training, such as Efficient DETR's number of queries.
        accelerator.unwrap_model(run.model).set_training_progress(progress.step / run.num_steps)
        with accelerator.accumulate(run.model):
            outputs = run.model(**batch)
            terms = training.mean_loss_terms(
                accelerator, outputs, batch["labels"], progress.step + 1
            )
            # accelerate divides by the length of a whole window.
            window = progress.batches_in_window
            accelerator.backward(outputs.loss * (progress.batches_per_step / window))
            if accelerator.sync_gradients and options.max_grad_norm:
                accelerator.clip_grad_norm_(run.model.parameters(), options.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        progress.batch += 1
        progress.loss_sum += terms["loss"]
        recent.append(terms)
        meter.add(len(batch["labels"]) * accelerator.num_processes)
        if not accelerator.sync_gradients:
            continue
        run.scheduler.step()
        if run.average is not None:
            run.average.update_parameters(accelerator.unwrap_model(run.model))
        progress.step += 1
        bar.update()
        if progress.step % options.log_steps == 0:
            log(run, recent, meter)
            recent = []
        if options.checkpoint_steps and progress.step % options.checkpoint_steps == 0:
            training.average_statistics(accelerator, run.model, run.average)
            training.save_checkpoint(accelerator, options.output_dir, progress.step, run.facts)
            meter.restart()
        if progress.step >= run.num_steps:
            break
    if progress.batch == 0:
        raise ValueError(
            f"An epoch of the stream has not one batch: a step of --batch-size "
            f"{options.batch_size} in {accelerator.num_processes} processes needs "
            f"{progress.pictures_per_batch} pictures. Lower --batch-size."
        )
    return progress.loss_sum / progress.batch


def log(run: Run, recent: list[dict[str, float]], meter: training.ThroughputMeter) -> None:
    """One line, and the tracker: means over the batches since the last line."""
    means = {name: sum(terms[name] for terms in recent) / len(recent) for name in recent[0]}
    pictures_per_second, waiting_share = meter.read()
    final_layer = "  ".join(f"{name} {means[name]:.4f}" for name in LOGGED_TERMS)
    say(
        run.accelerator,
        f"step {run.progress.step}/{run.num_steps}  {final_layer}  "
        f"lr {run.scheduler.get_last_lr()[0]:.2e}  "
        f"{pictures_per_second:.1f} pictures/s, {waiting_share:.0%} waiting for them",
    )
    speed = {"pictures_per_second": pictures_per_second, "waiting_share": waiting_share}
    run.accelerator.log(means | speed, step=run.progress.step)


def say(accelerator: Accelerator, text: str) -> None:
    """Print once, above the progress bars."""
    if accelerator.is_main_process:
        tqdm.write(text)


def hide_bar(accelerator: Accelerator) -> bool | None:
    """Bars are for one process and for terminals, which None stands for."""
    return None if accelerator.is_main_process else True


def finish_epoch(run: Run, loss: float, facts: CardFacts) -> bool:
    """Evaluate and save; returns whether this is the best epoch so far."""
    result = {"epoch": run.progress.epoch + 1, "step": run.progress.step, "train_loss": loss}
    training.average_statistics(run.accelerator, run.model, run.average)
    evaluator = None
    if run.eval_loader is not None:
        if run.progress.epoch == 0:  # the first time that these pictures are read
            training.save_checkpoint(
                run.accelerator, run.options.output_dir, run.progress.step, run.facts
            )
        evaluator = CocoEvaluator(run.config.id2label)
        batches = tqdm(run.eval_loader, "evaluate", leave=False, disable=hide_bar(run.accelerator))
        with run.accelerator.autocast():
            result |= evaluate_detector(run.detector, run.processor, batches, evaluator)
        say(run.accelerator, f"\nepoch {result['epoch']}\n{format_table(result)}")
        if result["map"] < 0:
            say(run.accelerator, "No evaluated picture has a box: AP cannot tell what is best.")
        scores = {"map": result["map"], "map_50": result["map_50"]}
        run.accelerator.log(scores, step=run.progress.step)
    is_best = run.progress.finish_epoch(result)
    save_model(run, result, evaluator, facts)
    if is_best and run.accelerator.is_main_process:
        best, last = run.options.output_dir / "best", run.options.output_dir / "last"
        training.write_directory(best, partial(shutil.copytree, last, dirs_exist_ok=True))
    training.save_checkpoint(run.accelerator, run.options.output_dir, run.progress.step, run.facts)
    return is_best


def save_model(
    run: Run, result: dict[str, Any], evaluator: CocoEvaluator | None, facts: CardFacts
) -> None:
    """Save ``last``: model, image processor, metrics and model card."""
    state = run.accelerator.get_state_dict(run.detector)
    # Of a compiled model (accelerate's dynamo options) the names have the wrapper's in them.
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}

    def write(directory: Path) -> None:
        run.accelerator.unwrap_model(run.detector).save_pretrained(directory, state_dict=state)
        run.processor.save_pretrained(directory)
        training.write_json(directory / "metrics.json", {**result, "history": run.progress.history})
        write_model_card(
            directory,
            run.config,
            facts,
            metrics=None if evaluator is None else result,
            # The pictures of a stream are not there to be drawn.
            dataset=None if run.options.streaming else run.eval_data,
            evaluator=evaluator,
            num_pictures=run.options.card_pictures,
        )

    if run.accelerator.is_main_process:
        training.write_directory(run.options.output_dir / "last", write)


def push(run: Run, repository: training.HubRepository, *, is_last: bool) -> None:
    """Upload ``best``. A failure ends no training, and loses nothing: all is on the disk."""
    if not run.accelerator.is_main_process:
        return
    best = run.options.output_dir / "best"
    try:
        address = repository.push(best, f"After {run.progress.step} steps")
    except training.HubError as error:
        if is_last:
            raise SystemExit(str(error)) from error
        say(run.accelerator, str(error))
    else:
        say(run.accelerator, f"Pushed {best} to {address}.")


def main() -> None:
    options = training.parse_options(__doc__.split("\n\n")[0])
    accelerator = build_accelerator(options)
    checkpoint = training.open_run_directory(options.output_dir, resume=options.resume)
    repository = None
    if options.push_to_hub:
        repository = training.HubRepository(
            options.push_to_hub, options.hub_private, options.hub_revision, options.hub_token
        )
        repository = training.prepare_repository(accelerator, repository)
    eval_split = options.eval_split
    if options.eval_fraction is not None:
        eval_split = f"{options.eval_fraction:.0%} of {options.train_split}, held out"
    facts = CardFacts(
        dataset=options.dataset,
        eval_split=eval_split,
        repo_id=repository and repository.repo_id,
        base_model=None if options.model in VARIANTS else options.model,
        command=training.shown_command(sys.argv),
        license=options.license,
    )

    run = prepare(options, accelerator)
    progress = run.progress
    if checkpoint is not None:
        resume(run, checkpoint)
    if options.report_to:
        accelerator.init_trackers("train_detector", training.shown_options(options))
    bar = tqdm(total=run.num_steps, initial=progress.step, disable=hide_bar(accelerator))
    disable_progress_bar()  # transformers shows one for every file it writes
    while (reason := reason_to_end(run)) is None:
        loss = train_one_epoch(run, bar)
        is_best = finish_epoch(run, loss, facts)
        if repository is not None and options.push_every_epoch and is_best:
            push(run, repository, is_last=False)
    bar.close()
    say(accelerator, reason)

    parts = [data for data in (run.train_data, run.eval_data) if data is not None]
    skipped = [problem for data in parts for problem in data.skipped]
    if options.streaming and skipped:  # without streaming, loading has said so already
        say(accelerator, f"Skipped {len(skipped)} pictures:\n" + "\n".join(skipped))
    saved = [options.output_dir / name for name in ("best", "last")]
    saved = [str(directory) for directory in saved if directory.is_dir()]
    say(accelerator, f"Saved {' and '.join(saved)}.")
    accelerator.end_training()
    if repository is not None:
        push(run, repository, is_last=True)


if __name__ == "__main__":
    main()
