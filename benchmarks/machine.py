"""What a measured number depends on, for the head of a report."""

import platform
from pathlib import Path
from typing import Any

import torch
import transformers


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def describe_machine(note: str = "", device: str = "cpu") -> dict[str, Any]:
    """Hardware and versions; `note` says what else the machine did."""
    on_cpu = device == "cpu"
    return {
        "note": note,
        "processor": processor_name() if on_cpu else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "other_load_at_start": Path("/proc/loadavg").read_text().split()[0],
    }
