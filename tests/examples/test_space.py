"""The files that make a Space of the page."""

import ast
from pathlib import Path

import yaml

import hf_querydet

ROOT = Path(hf_querydet.__file__).parents[1]
SPACE = ROOT / "examples" / "space"


def requirements_of_setup():
    """The lists of setup.py, which cannot be imported without being run."""
    values = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("REQUIREMENTS", "EXTRAS"):
                values[name] = ast.literal_eval(node.value)
    return values["REQUIREMENTS"], values["EXTRAS"]


def test_space_requires_what_the_library_and_the_page_require():
    required, extras = requirements_of_setup()
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    assert lines == [*required, *extras["demo"], *extras["plots"]]


def test_header_of_the_space_names_the_page_and_a_version_that_setup_allows():
    _, header, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(header)
    assert (fields["sdk"], fields["app_file"]) == ("gradio", "app.py")
    assert requirements_of_setup()[1]["demo"] == ["gradio>=6.0,<7"]
    assert str(fields["sdk_version"]).startswith("6.")
    # The Hub refuses longer ones.
    assert len(fields["short_description"]) <= 60
