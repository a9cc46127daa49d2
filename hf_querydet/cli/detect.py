"""`hf-querydet detect`."""

import sys
from collections import Counter, deque
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm.auto import tqdm

from hf_querydet.cli.options import (
    BatchSize,
    MixedPrecision,
    Model,
    OnCPU,
    Precision,
    Revision,
    start_process,
)

if TYPE_CHECKING:
    from hf_querydet.inference import FileDetections
    from hf_querydet.inference.result_files import ResultWriter


class OutputFormat(StrEnum):
    """Of the boxes, see :func:`hf_querydet.inference.result_writer`."""

    JSON = "json"
    COCO = "coco"


def detect(
    model: Model,
    pictures: Annotated[
        Path,
        typer.Argument(
            exists=True, help="A picture, or a folder with its subfolders.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", file_okay=False, help="Folder for the results.")
    ] = Path("detections"),
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.0, max=1.0, help="Boxes have a score above it.")
    ] = 0.5,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            min=1,
            help="Most boxes per picture; by default 100, of DETR and Sparse R-CNN all queries.",
        ),
    ] = None,
    output_format: Annotated[
        OutputFormat,
        typer.Option(
            "--format", help="json: detections.jsonl; coco: detections.json and images.json."
        ),
    ] = OutputFormat.JSON,
    draw: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Also draw the boxes.")
    ] = True,
    font: Annotated[
        Path | None,
        typer.Option(
            "--font",
            exists=True,
            dir_okay=False,
            help="TrueType file for the labels, if DejaVu Sans lacks their letters.",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also draw why the surest box was found.")
    ] = False,
    batch_size: BatchSize = 8,
    num_workers: Annotated[
        int, typer.Option("--num-workers", min=0, help="Threads that read pictures ahead.")
    ] = 2,
    mixed_precision: Precision = MixedPrecision.NO,
    revision: Revision = None,
    cpu: OnCPU = False,
) -> None:
    """Find objects in pictures: boxes in a file, and drawn on copies of the pictures.

    A copy has the name of its picture, below the folder of results; what is there is replaced.
    Files that cannot be read, and copies that cannot be written, are reported; the exit code is
    then 1. Runs on several GPUs or machines under `accelerate launch -m hf_querydet detect ...`.
    """
    from hf_querydet.inference import (
        autocast,
        detect_in_files,
        list_pictures,
        load_for_inference,
        picture_drawer,
        picture_explainer,
        result_writer,
    )

    if draw or explain:
        _keep_safe(pictures, output)
    num_files = sum(1 for _ in list_pictures(pictures, exclude=output))
    if num_files == 0:
        raise ValueError(f"{pictures} holds no pictures.")
    state = start_process(cpu)
    detector, processor = load_for_inference(model, device=state.device, revision=revision)
    id2label = detector.config.id2label
    on_detected = [picture_drawer(output, id2label, font=font)] if draw else []
    on_detected += [picture_explainer(output, detector, processor)] if explain else []
    results = detect_in_files(
        detector,
        processor,
        list_pictures(pictures, exclude=output),
        batch_size=batch_size,
        threshold=threshold,
        top_k=top_k,
        num_workers=num_workers,
        on_detected=on_detected,
    )
    with autocast(state.device, mixed_precision):
        if not state.is_main_process:
            deque(results, maxlen=0)  # takes part; the results are written once
            return
        with result_writer(output_format, output, id2label) as write:
            bar = tqdm(results, "detect", num_files, unit="picture", leave=False, disable=None)
            counts = _write(bar, write)
    typer.echo(f"{counts['objects']} objects in {counts['pictures']} pictures: see {output}")
    if counts["pictures"] and not counts["objects"]:
        typer.echo(f"No score is above {threshold}; --threshold lowers that.")
    if counts["unreadable"]:
        typer.echo(f"{counts['unreadable']} files could not be read.", err=True)
    if counts["not drawn"]:
        typer.echo(f"{counts['not drawn']} pictures could not be drawn.", err=True)
    if counts["unreadable"] or counts["not drawn"]:
        raise typer.Exit(1)


def _keep_safe(pictures: Path, output: Path) -> None:
    """Refuse a folder of results in which copies could take the place of pictures."""
    from hf_querydet.inference import has_others_pictures

    remedy = "copies with boxes would replace pictures. Choose another folder, or --no-pictures."
    folder = pictures if pictures.is_dir() else pictures.parent
    if folder.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"--output {output} holds {pictures}: {remedy}")
    if has_others_pictures(output):
        raise ValueError(
            f"--output {output} holds pictures that no earlier run has drawn: {remedy}"
        )


def _write(results: "Iterable[FileDetections]", write: "ResultWriter") -> Counter[str]:
    """Write the results as they come, report what could not be read, and count."""
    counts = Counter()
    for result in results:
        if result.error:
            tqdm.write(f"Not read: {result.name}: {result.error}", file=sys.stderr)
            counts["unreadable"] += 1
            continue
        if result.call_error:
            tqdm.write(f"Not drawn: {result.name}: {result.call_error}", file=sys.stderr)
            counts["not drawn"] += 1
        write(result)
        counts["pictures"] += 1
        counts["objects"] += len(result.scores)
    return counts
