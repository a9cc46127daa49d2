"""What `end_to_end.py` measured as tables in Markdown.

    python benchmarks/end_to_end_table.py benchmarks/results/end_to_end_cpu.json [MORE.json ...]

The first table compares: whole times beside transformers', the share of its memory, and how many
times faster than our plain mode the other modes are. The second has the parts of our plain mode.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from end_to_end import INFERENCE, KINDS, MODES, TRAINING
from measuring import markdown_table

HEAD = ["detector", "pictures", "", "hf_querydet", "transformers", "times faster", "memory", *MODES]
PARTS = {
    INFERENCE: ["processor", "backbone", "rest of the model", "post-processing"],
    TRAINING: ["forward", "matching", "loss", "backward", "optimizer"],
}


def title(case: dict[str, Any]) -> list[str]:
    return [f"`{case['variant']}`", f"{case['batch_size']} of {case['size']}"]


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.0f} ms"


def comparison(cases: list[dict[str, Any]]) -> Iterable[list[str]]:
    """A row per case and kind; empty cells where there is nothing to compare with."""
    for case in cases:
        for kind in KINDS:
            if kind not in case:
                continue
            result = case[kind]
            seconds, ratios = result["seconds"], result["times_faster_than"]
            row = [milliseconds(seconds.get(name)) for name in ("hf_querydet", "transformers")]
            if "transformers" in ratios:
                row += [
                    f"{ratios['transformers']:.2f}",
                    f"{100 * result['memory_of']['transformers']:.0f}%",
                ]
            else:
                row += ["", ""]
            row += [f"{1 / ratios[mode]:.2f}" if mode in ratios else "" for mode in MODES]
            yield [*title(case), kind, *row]


def parts(cases: list[dict[str, Any]]) -> Iterable[list[str]]:
    for case in cases:
        values = (
            case[kind]["parts"][name] if kind in case else None
            for kind in KINDS
            for name in PARTS[kind]
        )
        yield [*title(case), *map(milliseconds, values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="json files of end_to_end.py")
    options = parser.parse_args()
    cases = [case for path in options.results for case in json.loads(path.read_text())["cases"]]
    print(markdown_table(HEAD, comparison(cases)))
    print()
    all_parts = [*PARTS[INFERENCE], *PARTS[TRAINING]]
    print(markdown_table(["detector", "pictures", *all_parts], parts(cases)))


if __name__ == "__main__":
    main()
