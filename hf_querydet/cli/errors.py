"""What a command shows of an error."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer
from transformers.utils import logging

logger = logging.get_logger(__name__)


def without_traceback(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command end with one line and exit code 1 on the errors that input can cause.

    These are the kinds that the library raises on purpose, and those of `datasets`. Where the line
    is not enough, ``TRANSFORMERS_VERBOSITY=debug`` shows where it came from.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except _input_errors() as error:
            logger.debug("Traceback of the error", exc_info=error)
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error

    return wrapped


def _input_errors() -> tuple[type[Exception], ...]:
    kinds = (ValueError, OSError, ImportError)
    if "datasets" in sys.modules:  # where it is not loaded, it cannot have raised anything
        from datasets.exceptions import DatasetsError

        kinds += (DatasetsError,)
    return kinds
