"""The command `hf-querydet`: one file per subcommand.

What a subcommand needs is imported inside its function, or every other one would wait for it.
"""

import typer

from hf_querydet.cli import (
    convert,
    demo,
    detect,
    evaluate,
    explain,
    export_transformers,
    info,
    kernels,
)
from hf_querydet.cli.errors import without_traceback

# In the order of the help; a command is called like its function.
COMMANDS = (
    demo.demo,
    detect.detect,
    evaluate.evaluate,
    explain.explain,
    convert.convert,
    export_transformers.export_transformers,
    info.info,
    kernels.kernels,
)

# In Markdown, so that paragraphs are wrapped to the terminal.
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


@app.callback()
def hf_querydet() -> None:
    """Query-based object detectors for the Hugging Face ecosystem."""


for command in COMMANDS:
    app.command()(without_traceback(command))


def main() -> None:
    """Entry point of the installed command."""
    app()
