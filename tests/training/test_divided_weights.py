"""Weights divided over processes as by FSDP2: the losses of one process that has them all.

accelerate divides weights on GPUs only; here torch does it on the CPU, at the modules that
accelerate would take.
"""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState, debug_launcher
from tiny import tiny_batch, tiny_config, tiny_labels
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_querydet import VARIANTS

NO_DROPOUT = ("dropout", "attention_dropout", "activation_dropout")


def losses_of_training(model, batch, labels):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(**batch, labels=labels).loss
        losses.append(loss.detach().clone())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def compare_losses(folder):
    PartialState._reset_state()  # what the parent process had, inherited by forking
    rank = PartialState(cpu=True).process_index
    mesh = init_device_mesh("cpu", (2,))
    # That outputs are views matters to those who change them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    results = {}
    for name in VARIANTS:
        torch.manual_seed(0)
        config = tiny_config(VARIANTS, name, backbone_norm="frozen")
        for field in NO_DROPOUT:
            if hasattr(config, field):
                setattr(config, field, 0.0)
        divided = VARIANTS[name].detector(config).train()
        whole = copy.deepcopy(divided)
        for module in divided.modules():
            if type(module).__name__ in divided._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(divided, mesh=mesh)
        batch, labels = tiny_batch(), tiny_labels()
        own = {key: values[rank : rank + 1] for key, values in batch.items()}
        losses = losses_of_training(divided, own, labels[rank : rank + 1])
        dist.all_reduce(losses)
        # Both processes have the whole batch here, so that the mean over them is that of one.
        expected = losses_of_training(whole, batch, labels)
        results[name] = [(losses / 2).tolist(), expected.tolist()]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))


def test_divided_weights_have_the_losses_of_whole_ones(tmp_path):
    debug_launcher(compare_losses, args=(str(tmp_path),), num_processes=2)

    results = json.loads((tmp_path / "0.json").read_text())
    assert list(results) == list(VARIANTS)
    for name, (divided, whole) in results.items():
        assert divided == pytest.approx(whole, rel=1e-4), name
        assert whole[0] != whole[-1]
