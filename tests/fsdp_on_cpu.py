"""Run a script with FSDP2 on CPU processes, where accelerate would divide no weights.

accelerate launch --use_fsdp --fsdp_version 2 ... fsdp_on_cpu.py SCRIPT OPTIONS...
"""

import runpy
import sys
import warnings

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

# That outputs are views matters to those who change them in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
