import logging

import pytest
import typer
from datasets.exceptions import DatasetsError
from typer.testing import CliRunner

from hf_querydet.cli.errors import logger, without_traceback


def run(error):
    app = typer.Typer()

    @app.command()
    @without_traceback
    def command(name: str) -> None:
        raise error(f"{name} is wrong")

    return CliRunner().invoke(app, ["this"])


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ImportError, DatasetsError])
def test_error_that_input_can_cause_is_one_line(error):
    result = run(error)

    assert (result.exit_code, result.output) == (1, "Error: this is wrong\n")


def test_error_of_the_program_keeps_its_traceback():
    result = run(ZeroDivisionError)

    assert isinstance(result.exception, ZeroDivisionError)


def test_traceback_can_be_asked_for(monkeypatch):
    records = []
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    monkeypatch.setattr(logger, "handle", records.append)
    logger._cache.clear()

    run(ValueError)

    assert isinstance(records[0].exc_info[1], ValueError)
