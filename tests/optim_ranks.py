"""What the tests of optimizers on several ranks share: processes, a model, comparisons."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fused

STOCK = {fused.Adam: torch.optim.Adam, fused.AdamW: torch.optim.AdamW, fused.SGD: torch.optim.SGD}
CLASSES = list(STOCK)
OPTIONS: dict[type, dict[str, Any]] = {
    fused.Adam: {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True},
    fused.AdamW: {"lr": 0.05},
    fused.SGD: {"lr": 0.05, "momentum": 0.9, "dampening": 0.1},
}
STEPS = 3
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor",
]


def on_ranks(world: int, folder: Path, check: Callable[..., None], *args: Any) -> None:
    """Runs `check(*args)` on `world` processes; what one of them raises is raised here."""
    # The server has no threads that a fork could lose, and has imported what takes longest.
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    store = folder / f"store-{check.__name__}-{world}"
    mp.start_processes(
        _rank, (world, str(store), check, args), nprocs=world, start_method="forkserver"
    )


def _rank(rank: int, world: int, store: str, check: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", f"file://{store}", timeout, world, rank)
    try:
        torch.manual_seed(0)
        check(*args)
    finally:
        dist.destroy_process_group()


def model() -> nn.Sequential:
    torch.manual_seed(3)
    # On four ranks: shards of 2, 2, 2 and 1 rows, and of 1, 1, 1 and none.
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3))


def backward(network: nn.Module, step: int, *, per_rank: bool = True) -> None:
    seed = 1000 * step + (dist.get_rank() if per_rank else 0)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    x = x.to(next(network.parameters()).dtype)
    network(x).square().sum().backward()


def sharded_model(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """On a mesh of the given shape; of two dimensions, the first one replicates."""
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    network = model().to(dtype)
    fully_shard(network[0], mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(network, step)
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype == torch.int16:  # which gloo does not know
        return tensor.to(torch.int32).full_tensor().to(torch.int16)
    return tensor.full_tensor()


def everything(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and states, whole, under names that do not depend on the engine."""
    result = {}
    for name, p in network.named_parameters():
        result[name] = whole(p)
        for key, value in optimizer.state[p].items():
            result[f"{name}.{key}"] = whole(value)
    return result


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def only_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Lets the optimizer's composite path fail, so that nothing takes it unseen."""

    def refuse(group: Any) -> None:
        raise AssertionError("the step took the composite path")

    optimizer._composite_step = refuse
