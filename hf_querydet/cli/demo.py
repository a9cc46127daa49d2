"""`hf-querydet demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", help="Gets the model and a picture with boxes.")
    ] = Path("demo"),
) -> None:
    """Train a small detector on generated scenes, two to five minutes on two CPU cores."""
    from hf_querydet.demo import PICTURE_NAME, run_demo
    from hf_querydet.evaluation import format_table

    metrics = run_demo(output_dir)
    typer.echo(f"\n{format_table(metrics)}")
    typer.echo(f"\nmodel and image processor: {output_dir}")
    typer.echo(f"picture with boxes: {output_dir / PICTURE_NAME}")
