"""What is in the distribution."""

import ast
import sys
from importlib import metadata
from pathlib import Path

import hf_querydet

ROOT = Path(hf_querydet.__file__).parents[1]


def test_setup_imports_torch_only_when_asked_to_build():
    tree = ast.parse((ROOT / "setup.py").read_text())
    at_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in at_top for alias in node.names}
    names |= {node.module for node in at_top if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("torch") for name in names)


def test_version_is_the_distribution_s():
    assert metadata.version("hf_querydet") == hf_querydet.__version__


def test_command_is_installed_beside_python():
    assert (Path(sys.executable).parent / "hf-querydet").exists()
