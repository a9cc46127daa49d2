"""What docs/variants.md names exists, and the numbers in it are the code's."""

import ast
import re
from pathlib import Path

import pytest

import hf_querydet
from hf_querydet import VARIANTS
from hf_querydet.model_info import model_info

PAGE = Path(hf_querydet.__file__).parents[1] / "docs" / "variants.md"
TEXT = PAGE.read_text(encoding="utf-8")
PATHS = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", TEXT, re.MULTILINE))
LINKED_NAMES = sorted(set(re.findall(r"\[`([\w.]+)`\]\[([\w-]+)\]", TEXT)))
# What is left of the backticks once links and diagrams are gone.
OTHER_NAMES = sorted(
    set(re.findall(r"`([^`]+)`", re.sub(r"\[`[^]]*\]\[[\w-]+\]|```.*?```", "", TEXT, flags=re.S)))
)
COMMANDS = {
    "hf-querydet demo",
    "hf-querydet info",
    "hf-querydet explain demo scene.png",
    "python examples/app.py --model demo",
}


def defined_names(path):
    """Module, classes, methods, functions and constants of a file."""
    names = {path.stem}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names |= {node.name}
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    return names


def rows_below(header):
    """Cells of the table whose header line holds a text."""
    lines = iter(TEXT.splitlines())
    for line in lines:
        if line.startswith("|") and header in line:
            break
    columns = [cell.strip(" `") for cell in line.strip("|").split("|")]
    next(lines)  # the rule below the header
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.append(dict(zip(columns, cells, strict=True)))


def variant_name(title):
    """`Sparse R-CNN` -> `sparse_rcnn`."""
    return title.lower().replace("-", "").replace(" ", "_")


@pytest.mark.parametrize(("name", "reference"), LINKED_NAMES)
def test_named_code_is_in_the_linked_file(name, reference):
    assert name in defined_names(PAGE.parent / PATHS[reference])


def test_every_reference_is_used_and_every_use_has_one():
    assert {reference for _, reference in LINKED_NAMES} == set(PATHS)


def test_pictures_exist_and_are_small():
    pictures = re.findall(r"!\[[^]]+\]\((\S+)\)", TEXT)
    assert pictures
    for picture in pictures:
        assert 0 < (PAGE.parent / picture).stat().st_size < 80_000


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_name_without_a_link_is_a_command_or_a_configuration_field(name):
    assert name in COMMANDS or any(
        name in variant.config.__dataclass_fields__ for variant in VARIANTS.values()
    )


@pytest.mark.parametrize("column", ["class_cost", "cls_loss_coefficient"])
def test_weights_are_the_defaults_of_the_configurations(column):
    rows = rows_below(f"`{column}`")
    assert {variant_name(row[""]) for row in rows} == set(VARIANTS)
    fields = [name for name in rows[0] if name.endswith(("_cost", "_coefficient"))]
    assert len(fields) == 3
    for row in rows:
        config = VARIANTS[variant_name(row[""])].config()
        assert [float(row[name]) for name in fields] == [getattr(config, name) for name in fields]


def test_sizes_are_given_for_every_model_with_a_name():
    listed = [(row["variant"], row["name"]) for row in rows_below("multiply-adds")]
    assert listed == [
        (variant, name)
        for variant, classes in VARIANTS.items()
        for name in classes.config.named_configurations
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_size_of_the_first_model_is_what_is_measured(variant):
    row = next(row for row in rows_below("multiply-adds") if row["variant"] == variant)
    info = model_info(VARIANTS[variant].config.from_name(row["name"]))
    assert row["parameters"] == f"{info.parameters / 1e6:.2f}"
    assert row["multiply-adds"] == f"{info.multiply_adds / 1e9:.1f}"
