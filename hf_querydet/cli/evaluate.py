"""`hf-querydet evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm.auto import tqdm

from hf_querydet.cli.options import (
    BatchSize,
    BoxFormat,
    MixedPrecision,
    Model,
    OnCPU,
    Precision,
    Revision,
    hide_bar,
    start_process,
)

if TYPE_CHECKING:
    from hf_querydet.data import DetectionDataset, IterableDetectionDataset


def evaluate(
    model: Model,
    dataset: Annotated[
        str,
        typer.Argument(
            help="Hub dataset, picture folder with metadata.jsonl, or COCO json; "
            "{split} in a path stands for the split.",
            show_default=False,
        ),
    ],
    split: Annotated[str, typer.Option("--split", help="Of the dataset.")] = "validation",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", dir_okay=False, help="Gets the predictions as a COCO result file."
        ),
    ] = None,
    metrics_output: Annotated[
        Path | None,
        typer.Option("--metrics-output", dir_okay=False, help="Gets all numbers as json."),
    ] = None,
    batch_size: BatchSize = 8,
    num_workers: Annotated[
        int, typer.Option("--num-workers", min=0, help="Processes that prepare pictures.")
    ] = 2,
    mixed_precision: Precision = MixedPrecision.NO,
    score_threshold: Annotated[
        float,
        typer.Option("--score-threshold", min=0.0, max=1.0, help="COCO counts all: 0."),
    ] = 0.0,
    picture_dir: Annotated[
        str | None, typer.Option("--picture-dir", help="Of a COCO json, if not beside it.")
    ] = None,
    box_format: Annotated[
        BoxFormat | None,
        typer.Option("--box-format", help="Left, top, and then width, height or right, bottom."),
    ] = None,
    label_names: Annotated[
        str | None,
        typer.Option("--label-names", help="Comma-separated, where the dataset has only numbers."),
    ] = None,
    config_name: Annotated[
        str | None, typer.Option("--config-name", help="Of a Hub dataset that has several.")
    ] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a Hub dataset meanwhile, not before.")
    ] = False,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out what cannot be read.")
    ] = False,
    revision: Revision = None,
    cpu: OnCPU = False,
) -> None:
    """Measure a detector on an annotated dataset: COCO's numbers, of each class too.

    The dataset's categories are joined to the model's labels by name. Runs on several GPUs or
    machines under `accelerate launch -m hf_querydet evaluate ...`.
    """
    from hf_querydet.data import has_one_split, load_detection_dataset, parse_label_names
    from hf_querydet.evaluation import (
        CocoEvaluator,
        evaluate_detector,
        evaluation_loader,
        format_table,
    )
    from hf_querydet.inference import autocast, load_for_inference
    from hf_querydet.training import write_json

    state = start_process(cpu)
    detector, processor = load_for_inference(model, device=state.device, revision=revision)
    id2label = detector.config.id2label
    with state.main_process_first():
        data = load_detection_dataset(
            dataset,
            split=split,
            label_names=parse_label_names(label_names) if label_names else None,
            picture_dir=picture_dir,
            box_format=box_format and box_format.value,
            streaming=streaming,
            skip_bad_images=skip_bad_images,
            config_name=config_name,
        ).with_labels(id2label)
    _check_ids(data, streaming, output)
    part = "all there are, in one split" if has_one_split(dataset) else split
    evaluator = CocoEvaluator(
        id2label,
        label_to_category=data.label_to_category,
        own_image_id=None if streaming else data.own_image_id,
    )
    loader = evaluation_loader(data, processor, batch_size=batch_size, num_workers=num_workers)
    batches = tqdm(loader, "evaluate", unit="batch", leave=False, disable=hide_bar(state))
    with autocast(state.device, mixed_precision):
        metrics = evaluate_detector(
            detector, processor, batches, evaluator, threshold=score_threshold
        )
    if len(evaluator) == 0:
        raise ValueError(f"There are no pictures in {dataset}, {split}.")
    if not state.is_main_process:
        return
    typer.echo(f"{len(evaluator)} pictures of {dataset}, {part}\n\n{format_table(metrics)}")
    if output is not None:
        evaluator.write_coco_results(output)
        typer.echo(f"\npredictions: {output}")
    if metrics_output is not None:
        write_json(metrics_output, metrics)


def _check_ids(
    data: "DetectionDataset | IterableDetectionDataset", streaming: bool, output: Path | None
) -> None:
    """Refuse a file of predictions whose pictures nobody could tell apart."""
    if streaming and output is not None and not data.reader.has_image_ids:
        raise typer.BadParameter(
            "a stream without whole numbers in a column image_id has no ids for a file of "
            "predictions; leave out --streaming or --output."
        )
