"""`hf-querydet info`."""

from typing import Annotated

import typer


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
