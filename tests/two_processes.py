"""Jobs that one process does with all of the data, and each of two with half of it: see test_distributed.

As a program: ``python two_processes.py RANK STORE OUT``, twice; each writes what it found to ``OUT.RANK``.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F

import pared
from pared.pruning import ChangeRate, SparseGPT, Taylor, process_group

Batch = tuple[torch.Tensor, torch.Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


def everything() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 2, 5, 5, generator=generator)
    x[12:] *= 3.0  # halves that differ, and ranges that grow
    y = torch.randint(0, 4, (24,), generator=generator)
    return [(x[i : i + 6], y[i : i + 6]) for i in range(0, 24, 6)]


def share(rank: int) -> list[Batch]:
    """Three batches for one process and one for the other: loaders need not be equally long."""
    return everything()[:3] if rank == 0 else everything()[3:]


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def pruned(importance: Any, **options: Any) -> Callable[[list[Batch]], dict[str, torch.Tensor]]:
    def job(data: list[Batch]) -> dict[str, torch.Tensor]:
        model = network()
        pared.prune(model, 0.5, importance=importance, data=data, **{"loss_fn": loss_fn, **options})
        return dict(model.state_dict())

    return job


def blocks(data: list[Batch]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 8), *[nn.Linear(8, 8) for _ in range(4)])
    pared.prune_layers(model, everything()[0][:1], 2, data=data, include="re:^[2-5]$")
    return dict(model.state_dict())


def channels(data: list[Batch]) -> dict[str, torch.Tensor]:
    model = network()
    pared.prune_channels(
        model, everything()[0][0], 0.5, importance="fisher", data=data, loss_fn=loss_fn, round_to=1
    )
    return dict(model.state_dict())


def quantized(data: list[Batch]) -> dict[str, torch.Tensor]:
    model = network()
    pared.quantize(model, data, bits=4, activations="static", bias_correction=True)
    return dict(model.state_dict())


def trained(data: list[Batch]) -> dict[str, torch.Tensor]:
    model = network()
    pruner = pared.Pruner(
        model, pared.schedules.OneShot(0.5), importance=Taylor(), data=data, loss_fn=loss_fn
    )
    pruner.step()
    pruner.finalize()
    return dict(model.state_dict())


JOBS: dict[str, Callable[[list[Batch]], dict[str, torch.Tensor]]] = {
    name: pruned(name)
    for name in (
        "gradient",
        "taylor",
        "fisher",
        "woodfisher",
        "wanda",
        "activation",
        "apoz",
        "entropy",
        "mutual_information",
        "sparsegpt",
        "obc",
    )
}
JOBS |= {
    "change_rate": pruned(ChangeRate(), loss_fn=None),
    "change_rate of the loss": pruned(ChangeRate()),
    "blocks": blocks,
    "channels": channels,
    "GPTQ": quantized,
    "pruner": trained,
    "magnitude": pruned("magnitude"),
}


def failures(rank: int) -> dict[str, str]:
    """What one process does wrong, both have to say, and neither may wait for the other."""
    bad = [(torch.full((6, 2, 5, 5), torch.nan), torch.zeros(6, dtype=torch.int64))]

    def no_gradient(model: nn.Module, batch: Batch) -> torch.Tensor:
        return loss_fn(model, batch).detach() if rank else loss_fn(model, batch)

    attempts: dict[str, dict[str, Any]] = {
        "exhausted": {"importance": "wanda", "data": [] if rank else share(0)},
        "exhausted, in a walk": {"importance": SparseGPT(), "data": [] if rank else share(0)},
        "NaN": {"importance": "taylor", "data": bad if rank else share(0), "loss_fn": loss_fn},
        "NaN, in a walk": {"importance": "sparsegpt", "data": [*share(0), *bad] if rank else share(0)},
        "NaN, units": {"importance": "change_rate", "data": bad if rank else share(0)},
        "no gradient": {"importance": "fisher", "data": share(rank), "loss_fn": no_gradient},
    }
    found = {}
    for name, options in attempts.items():
        model = network()
        before = copy.deepcopy(model.state_dict())
        try:
            pared.prune(model, 0.5, **options)
        except ValueError as error:
            found[name] = str(error)
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert same, f"{name}: the model has changed"
    return found


def sharded() -> dict[str, Any]:
    """The Pruner in FullyShardedDataParallel: where it finds whole weights, and what it says elsewhere."""
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
    texts = []

    def refused(call: Callable[[], Any]) -> None:
        try:
            call()
        except ValueError as error:
            texts.append(str(error))

    refused(lambda: pared.prune(model, 0.5))
    refused(lambda: pared.accelerate(model, everything()[0][0]))
    refused(lambda: pared.save(model, io.BytesIO()))
    with FullyShardedDataParallel.summon_full_params(model):
        pruner = pared.Pruner(model, pared.schedules.OneShot(0.5))
        pruner.step()
    refused(pruner.step)
    with FullyShardedDataParallel.summon_full_params(model):
        pruner.finalize()
    with FullyShardedDataParallel.summon_full_params(model):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"texts": texts, "weights": weights}


def main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    states = {name: job(share(rank)) for name, job in JOBS.items()}
    if rank == 0:  # what needs no data waits for nobody
        states["by one"] = pruned("magnitude", loss_fn=None)(share(rank))
    with process_group(None):
        states["alone"] = pruned("wanda")(share(rank))
    found = {"states": states, "failures": failures(rank), "sharded": sharded()}
    torch.save(found, f"{out}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
