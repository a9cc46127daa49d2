"""The command `hf-querydet`."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_querydet.ops import extension

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def hf_querydet() -> None:
    """Query-based object detectors for the Hugging Face ecosystem."""


@app.command()
def demo(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", help="Gets the model and a picture with boxes.")
    ] = Path("demo"),
) -> None:
    """Train a small detector on generated scenes, about two minutes on two CPU cores."""
    # Imported here, or every command would wait for it.
    from hf_querydet.demo import PICTURE_NAME, run_demo
    from hf_querydet.evaluation import format_table

    metrics = run_demo(output_dir)
    typer.echo(f"\n{format_table(metrics)}")
    typer.echo(f"\nmodel and image processor: {output_dir}")
    typer.echo(f"picture with boxes: {output_dir / PICTURE_NAME}")


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Argument(help="A variant, a model directory or a Hub id; all variants if not given."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="One of the variant's models, part by part.")
    ] = None,
    height: Annotated[int, typer.Option("--height", min=1, help="Of the picture, pixels.")] = 800,
    width: Annotated[int, typer.Option("--width", min=1, help="Of the picture, pixels.")] = 1066,
) -> None:
    """Parameters and multiply-adds of the papers' models, or of any other, part by part."""
    from hf_querydet import VARIANTS
    from hf_querydet.model_info import format_parts, format_sizes, model_info
    from hf_querydet.registration import load_config

    size = (height, width)
    if model is None or (model in VARIANTS and name is None):
        typer.echo(format_sizes(VARIANTS if model is None else [model], size=size))
        return
    try:
        config = VARIANTS[model].config.from_name(name) if model in VARIANTS else load_config(model)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(format_parts(model_info(config, size=size)))


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' file, mostly .pth.")],
    output_dir: Annotated[Path, typer.Argument(help="Directory to create.")],
    variant: Annotated[
        str,
        typer.Option(
            "--variant", help="detr, deformable_detr, conditional_detr, anchor_detr or sparse_rcnn."
        ),
    ],
    dc5: Annotated[
        bool | None,
        typer.Option("--dc5/--no-dc5", help="Whether the last backbone stage is dilated."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="json with configuration fields that are not inferred."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="'coco', or a file: a name per line, or json."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="Repository to upload the result to.")
    ] = None,
) -> None:
    """Make a model directory from a checkpoint of a detector's authors."""
    from hf_querydet.conversion import convert_checkpoint
    from hf_querydet.conversion.labels import COCO, read_labels

    with _plain_errors():
        overrides = {} if config is None else _read_fields(config)
        conversion = convert_checkpoint(
            checkpoint,
            output_dir,
            variant,
            dilation=dc5,
            overrides=overrides,
            labels=labels if labels in (None, COCO) else read_labels(labels),
        )
    typer.echo(f"{type(conversion.model).__name__}: {output_dir}")
    typer.echo(conversion.summary())
    if push_to_hub is not None:
        _push(output_dir, push_to_hub)


@app.command()
def export_transformers(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a detector.")],
    output_dir: Annotated[Path, typer.Argument(help="Directory to create.")],
) -> None:
    """Make a directory that transformers loads with its own class of the same detector."""
    from hf_querydet.conversion import export_transformers

    with _plain_errors():
        their_class = export_transformers(model, output_dir)
    typer.echo(f"transformers.{their_class.__name__}: {output_dir}")


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no json file: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold an object with fields of the configuration.")
    return fields


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What the user can put right is told without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _push(directory: Path, repo_id: str) -> None:
    """Upload a directory. If that fails, it is all on the disk, and one command away."""
    from huggingface_hub import create_repo, upload_folder

    try:
        url = create_repo(repo_id, exist_ok=True)
        upload_folder(repo_id=url.repo_id, folder_path=directory)
    except Exception as error:  # no network, no such token, no such name, no space left, ...
        command = shlex.join(["hf", "upload", repo_id, str(directory.resolve())])
        typer.echo(
            f"Not pushed to {repo_id}: {error}\nNothing is lost: the model is in {directory}. "
            f"To push it again:\n{command}",
            err=True,
        )
        raise typer.Exit(1) from error
    typer.echo(f"pushed: {url}")


@app.command()
def kernels(
    build: Annotated[bool, typer.Option("--build", help="Compile what is missing.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Delete all builds first.")] = False,
) -> None:
    """State of the compiled deformable attention: flags, files, and why a build failed."""
    typer.echo(f"mode: {extension.kernel_mode()} (HF_QUERYDET_KERNELS)")
    typer.echo(f"cache: {extension.cache_root()}")
    if clean:
        for directory in extension.clean():
            typer.echo(f"deleted: {directory}")
    # Kernels for GPUs are of interest where there is one, or one is named to build for.
    device_types = ["cpu", *(["cuda"] if extension.gpu_architectures() else [])]
    failed = False
    for device_type in device_types:
        if build:
            failed |= not extension.load(device_type)
        typer.echo(f"\n{device_type}")
        for name, text in extension.describe(device_type).items():
            typer.echo(f"  {name}: {text}")
    if failed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the installed command."""
    app()
