"""`hf-querydet kernels`."""

from typing import Annotated

import typer

from hf_querydet.ops import extension


def kernels(
    build: Annotated[bool, typer.Option("--build", help="Compile what is missing.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Delete all builds first.")] = False,
) -> None:
    """State of the compiled deformable attention: flags, files, and why a build failed."""
    typer.echo(f"mode: {extension.kernel_mode()} (HF_QUERYDET_KERNELS)")
    try:
        typer.echo(f"cache: {extension.cache_root()}")
    except RuntimeError as error:  # a user without a home directory
        typer.echo(f"cache: none ({error}); set HF_QUERYDET_CACHE to a directory of your own")
    if clean:
        for directory in extension.clean():
            typer.echo(f"deleted: {directory}")
    # Kernels for GPUs are of interest where there is one, or one is named to build for.
    device_types = ["cpu", *(["cuda"] if extension.gpu_codes() else [])]
    failed = False
    for device_type in device_types:
        if build:
            failed |= not extension.load(device_type)
        typer.echo(f"\n{device_type}")
        for name, text in extension.describe(device_type).items():
            typer.echo(f"  {name}: {text}")
    if failed:
        raise typer.Exit(1)
