"""The yardstick runs as a table and as a picture of their curves.

    python benchmarks/bccd_table.py [--results benchmarks/results] [--figure FILE.png] [--gpu]

Reads what `bccd.py` wrote about whole runs (`bccd_VARIANT.json`, `bccd_VARIANT_transformers.json`;
with `--gpu` those of `bccd_gpu.sh`, `bccd_VARIANT_gpu.json`), prints a table in Markdown, best
first, and draws AP50 against minutes of training; dashed lines are detectors of transformers. Needs
the extra `plots`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measuring import markdown_table

from hf_querydet import VARIANTS

YARDSTICK_SUFFIXES = ("", "_transformers")
GPU_SUFFIXES = ("_gpu",)
HEAD = ["detector", "parameters", "steps", "minutes", "AP", "AP50", "AP75"]


def read_runs(results: Path, suffixes: tuple[str, ...]) -> list[dict[str, Any]]:
    """All runs there are, the best AP first."""
    paths = [
        results / f"bccd_{variant}{suffix}.json" for variant in VARIANTS for suffix in suffixes
    ]
    runs = [json.loads(path.read_text()) for path in paths if path.exists()]
    return sorted(runs, key=lambda run: -run["metrics"]["map"])


def title(run: dict[str, Any]) -> str:
    name = run["variant"]
    return name if run["library"] == "hf_querydet" else f"{name} of transformers"


def table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        metrics = (f"{run['metrics'][name]:.3f}" for name in ("map", "map_50", "map_75"))
        numbers = [f"{run['parameters'] / 1e6:.1f} M", run["steps"], round(run["seconds"] / 60)]
        rows.append([title(run), *map(str, numbers), *metrics])
    return markdown_table(HEAD, rows)


def draw(runs: list[dict[str, Any]], machine: str) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = {variant: f"C{index}" for index, variant in enumerate(VARIANTS)}
    for run in runs:
        points = [{"seconds": 0, "map_50": 0}, *run["ap_curve"]]
        axes.plot(
            [point["seconds"] / 60 for point in points],
            [point["map_50"] for point in points],
            color=colors[run["variant"]],
            linestyle="-" if run["library"] == "hf_querydet" else "--",
            label=title(run),
        )
    axes.set(xlabel=f"minutes of training, {machine}", ylabel="AP50", ylim=(0, 1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--figure", type=Path, help="PNG of the curves")
    parser.add_argument("--gpu", action="store_true", help="the runs of bccd_gpu.sh")
    options = parser.parse_args()
    runs = read_runs(options.results, GPU_SUFFIXES if options.gpu else YARDSTICK_SUFFIXES)
    print(table(runs))
    if options.figure:
        draw(runs, "a shared GPU" if options.gpu else "two cores").savefig(options.figure, dpi=100)


if __name__ == "__main__":
    main()
