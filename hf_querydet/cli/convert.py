"""`hf-querydet convert`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="The authors' file, mostly .pth.", show_default=False)
    ],
    output_dir: Annotated[Path, typer.Argument(help="Directory to create.", show_default=False)],
    variant: Annotated[
        str,
        typer.Option(
            "--variant",
            help="detr, deformable_detr, conditional_detr, anchor_detr or sparse_rcnn.",
            show_default=False,
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

    conversion = convert_checkpoint(
        checkpoint,
        output_dir,
        variant,
        dilation=dc5,
        overrides={} if config is None else read_fields(config),
        labels=labels if labels in (None, COCO) else read_labels(labels),
    )
    typer.echo(f"{type(conversion.model).__name__}: {output_dir}")
    typer.echo(conversion.summary())
    if push_to_hub is not None:
        push(output_dir, push_to_hub)


def read_fields(path: Path) -> dict[str, Any]:
    """Fields of a configuration from a json file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no json file: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold an object with fields of the configuration.")
    return fields


def push(directory: Path, repo_id: str) -> None:
    """Upload a directory. If that fails, it is all on the disk, and one command away."""
    from hf_querydet.training import HubError, HubRepository

    repository = HubRepository(repo_id)
    try:
        repository.prepare()
    except HubError as error:
        raise OSError(
            f"{error}\nNothing is lost: the model is in {directory}. To push it:\n"
            f"{repository.push_command(directory)}"
        ) from error
    try:
        address = repository.push(directory, "Converted from the authors' checkpoint")
    except HubError as error:
        raise OSError(str(error)) from error
    typer.echo(f"pushed: {address}")
