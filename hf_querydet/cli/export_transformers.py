"""`hf-querydet export-transformers`."""

from pathlib import Path
from typing import Annotated

import typer

from hf_querydet.cli.options import Model


def export_transformers(
    model: Model,
    output_dir: Annotated[Path, typer.Argument(help="Directory to create.", show_default=False)],
) -> None:
    """Make a directory that transformers loads with its own class of the same detector."""
    from hf_querydet.conversion import export_transformers

    their_class = export_transformers(model, output_dir)
    typer.echo(f"transformers.{their_class.__name__}: {output_dir}")
