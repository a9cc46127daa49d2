"""`hf-querydet explain`."""

from pathlib import Path
from typing import Annotated

import typer

from hf_querydet.cli.options import Model, OnCPU, Revision


def explain(
    model: Model,
    image: Annotated[str, typer.Argument(help="A file or a URL.", show_default=False)],
    query: Annotated[
        str,
        typer.Option("--query", help="Index of a query, or 'best': that of the surest detection."),
    ] = "best",
    head: Annotated[
        int | None, typer.Option("--head", help="Show this attention head only.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", file_okay=False, help="Folder for the picture.")
    ] = Path("explanations"),
    revision: Revision = None,
    cpu: OnCPU = False,
) -> None:
    """Show why a query fired: its boxes and where it looked, layer by layer, as a PNG.

    The picture's name is that of the image with the query's index: cat.jpg becomes
    cat_query_17.png.
    """
    from hf_querydet.inference import load_for_inference
    from hf_querydet.visualization import explain

    if query != "best":
        try:
            query = int(query)
        except ValueError as error:
            raise typer.BadParameter(
                f"--query must be 'best' or a whole number, got {query!r}."
            ) from error
    detector, processor = load_for_inference(
        model, device="cpu" if cpu else None, revision=revision
    )
    explanation = explain(detector, processor, image, query)
    path = output / f"{Path(image).stem}_query_{explanation.query}.png"
    explanation.save(path, head=head)
    for number, layer in enumerate(explanation.layers, start=1):
        left, top, right, bottom = (round(side, 1) for side in layer.box.tolist())
        typer.echo(
            f"layer {number}: {layer.label} {layer.score:.3f}, box {left} {top} {right} {bottom}"
        )
    typer.echo(f"query {explanation.query}: {path}")
