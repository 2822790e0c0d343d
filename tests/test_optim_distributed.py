"""The optimizers under torch's own engines, on several processes: DDP, FSDP2, ZeRO, checkpoints.

Every check runs on real ranks, with gloo on the CPU. The models are so small that shards are uneven
and some are empty.
"""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

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

# --- Ranks ----------------------------------------------------------------------------------------


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
    network(x).square().sum().backward()


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(network, step)
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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

    optimizer._composite_step = refuse  # type: ignore[attr-defined]


# --- DDP and FSDP2 --------------------------------------------------------------------------------


def check_ddp() -> None:
    for cls in CLASSES:
        results = []
        for kind in (cls, STOCK[cls]):
            network = DistributedDataParallel(model(), gradient_as_bucket_view=True)
            optimizer = kind(network.parameters(), **OPTIONS[cls])
            train(network, optimizer, range(STEPS))
            results.append(everything(network, optimizer))
        assert_same(*results)
        for value in results[0].values():
            others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(others, value)
            assert all(torch.equal(value, other) for other in others)


def test_ddp(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_ddp)


def sharded_model(shape: tuple[int, ...]) -> nn.Sequential:
    """On a mesh of the given shape; of two dimensions, the first one replicates."""
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    network = model()
    fully_shard(network[0], mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def check_fully_shard(shape: tuple[int, ...]) -> None:
    for cls in CLASSES:
        results = []
        for kind in (cls, STOCK[cls]):
            network = sharded_model(shape)
            optimizer = kind(network.parameters(), **OPTIONS[cls])
            if kind is cls:
                only_kernels(optimizer)
            train(network, optimizer, range(STEPS))
            results.append(everything(network, optimizer))
            for p in network.parameters():
                for name, value in optimizer.state[p].items():
                    assert isinstance(value, DTensor) == (name != "step"), name
                    assert name == "step" or value.placements == p.placements
        assert_same(*results)


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=str)
def test_fully_shard(shape: tuple[int, ...], tmp_path: Path) -> None:
    on_ranks(torch.Size(shape).numel(), tmp_path, check_fully_shard, shape)


# --- What a DTensor may be like -------------------------------------------------------------------


def check_placements() -> None:
    """A whole and a sharded parameter in one group, gradients and states placed in another way."""
    mesh = init_device_mesh("cpu", (2,))
    for cls in CLASSES:
        results = []
        for sharded in (True, False):
            torch.manual_seed(0)
            params = [torch.randn(5, 3), torch.randn(5, 3), torch.randn(()), torch.randn(4)]
            if sharded:
                placements = [Shard(0), Shard(1), Replicate()]
                params[:3] = [
                    distribute_tensor(p, mesh, [placement])
                    for p, placement in zip(params, placements, strict=False)
                ]
            params = [p.requires_grad_() for p in params]
            optimizer = cls(params, **OPTIONS[cls])
            if sharded:
                only_kernels(optimizer)
            for step in range(STEPS):
                for index, p in enumerate(params):
                    generator = torch.Generator().manual_seed(10 * step + index)
                    p.grad = torch.randn(p.shape, generator=generator)
                    if isinstance(p, DTensor):
                        elsewhere = [Replicate() if step == 1 else p.placements[0]]
                        p.grad = distribute_tensor(p.grad, mesh, elsewhere)
                        if step == 2:
                            scatter_states(optimizer, p, [Replicate()])
                versions = [p._version for p in params]
                optimizer.step()
                assert all(p._version > v for p, v in zip(params, versions, strict=True))
            results.append([(p, optimizer.state[p]) for p in params])
        for (p, entry), (expected, expected_entry) in zip(*results, strict=True):
            assert torch.equal(whole(p), expected.detach())
            for name, value in entry.items():
                assert torch.equal(whole(value), expected_entry[name]), name


def scatter_states(optimizer: torch.optim.Optimizer, p: DTensor, placements: list[Any]) -> None:
    entry = optimizer.state[p]
    for name, value in entry.items():
        if isinstance(value, DTensor):
            entry[name] = value.redistribute(p.device_mesh, placements)


def test_placements(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_placements)


def check_failed_step() -> None:
    for cls in CLASSES:
        network = sharded_model((2,))
        optimizer = cls(network.parameters(), **OPTIONS[cls])
        train(network, optimizer, range(1))
        backward(network, 1)
        last = list(network.parameters())[-1]
        last.grad._local_tensor.data = last.grad._local_tensor.double()
        before = everything(network, optimizer)
        params = list(optimizer.param_groups[0]["params"])
        with pytest.raises(TypeError, match="grad must have the dtype of its parameter"):
            optimizer.step()
        after = everything(network, optimizer)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert all(a is b for a, b in zip(params, optimizer.param_groups[0]["params"]))


def test_a_failed_step_changes_nothing(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_failed_step)


def check_gradients_are_freed() -> None:
    network = sharded_model((2,))
    optimizer = fused.AdamW(network.parameters())
    backward(network, 0)
    gradients = [weakref.ref(p.grad._local_tensor) for p in network.parameters()]
    optimizer.step()
    assert all(gradient() is not None for gradient in gradients)
    optimizer.zero_grad()
    assert all(gradient() is None for gradient in gradients)
    assert "kernel" in str(fused.explain(optimizer.step)).splitlines()[0]


def test_gradients_are_freed(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_gradients_are_freed)


# --- The norm over ranks --------------------------------------------------------------------------


def check_clip(shape: tuple[int, ...]) -> None:
    for max_norm in (0.3, 1e6):
        results = []
        for module in (fused, torch.nn.utils):
            network = sharded_model(shape)
            backward(network, 0)
            params = list(network.parameters())
            total = module.get_total_norm([p.grad for p in params])
            versions = [p.grad._version for p in params]
            norm = module.clip_grad_norm_(params, max_norm)
            if module is fused:
                assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))
            assert isinstance(norm, DTensor) and isinstance(total, DTensor)
            results.append([whole(norm), whole(total), *(whole(p.grad) for p in params)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        # Every rank has the norm of all, without asking for it.
        local = fused.get_total_norm([p.grad for p in params]).to_local()
        assert torch.equal(local, whole(fused.get_total_norm([p.grad for p in params])))


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=str)
def test_clip_of_fully_sharded_gradients(shape: tuple[int, ...], tmp_path: Path) -> None:
    on_ranks(torch.Size(shape).numel(), tmp_path, check_clip, shape)


def check_norm_placements() -> None:
    """Of whole tensors: replicated ones count once, sums that are left to do are done."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    tensors = [torch.randn(5, 3) for _ in range(6)]
    placements = [
        [Shard(0), Replicate()],
        [Replicate(), Replicate()],
        [Shard(0), Shard(1)],
        [Shard(0), Shard(0)],
        [Replicate(), Shard(1)],
    ]
    sharded = [distribute_tensor(t, mesh, p) for t, p in zip(tensors[:5], placements, strict=True)]
    ones = DTensor.from_local(torch.ones(2), mesh, [Partial(), Shard(0)])  # of twos, in truth
    everything_local = [t.clone() for t in tensors] + [torch.full((4,), 2.0)]
    expected = torch.nn.utils.get_total_norm(everything_local)
    norm = fused.get_total_norm([*sharded, tensors[5], ones])
    torch.testing.assert_close(norm.to_local(), expected)
    params = [nn.Parameter(torch.zeros_like(t)) for t in (*sharded, tensors[5], ones)]
    for p, gradient in zip(params, (*sharded, tensors[5], ones), strict=True):
        p.grad = gradient
    fused.clip_grad_norm_(params, 1.0)
    for p, gradient in zip(params, everything_local, strict=True):
        torch.testing.assert_close(whole(p.grad), gradient / (expected + 1e-6))


def test_norm_of_tensors_in_all_placements(tmp_path: Path) -> None:
    on_ranks(4, tmp_path, check_norm_placements)


# --- ZeroRedundancyOptimizer ----------------------------------------------------------------------


def check_zero(cls: type, as_views: bool) -> None:
    results = []
    for kind in (cls, STOCK[cls]):
        network = DistributedDataParallel(model())
        optimizer = ZeroRedundancyOptimizer(
            network.parameters(),
            optimizer_class=kind,
            parameters_as_bucket_view=as_views,
            **OPTIONS[cls],
        )
        train(network, optimizer, range(STEPS))
        optimizer.consolidate_state_dict(to=0)
        results.append({name: p.detach().clone() for name, p in network.named_parameters()})
        if dist.get_rank() == 0:
            for index, entry in optimizer.state_dict()["state"].items():
                results[-1] |= {f"{index}.{name}": value for name, value in entry.items()}
    assert_same(*results)


@pytest.mark.parametrize("as_views", [False, True])
def test_zero_redundancy_optimizer(as_views: bool, tmp_path: Path) -> None:
    for cls in CLASSES:
        on_ranks(2, tmp_path, check_zero, cls, as_views)


# --- Steps in the backward pass -------------------------------------------------------------------


def check_step_in_backward(engine: str) -> None:
    results = []
    for inside in (True, False):
        network: nn.Module = sharded_model((2,)) if engine == "fsdp" else model()
        if inside:
            optimizer = fused.optim.step_in_backward(network, fused.AdamW, lr=0.05)
        else:
            optimizer = fused.AdamW(network.parameters(), lr=0.05)
        if engine != "fsdp":
            as_views = engine == "ddp with views"
            network = DistributedDataParallel(network, gradient_as_bucket_view=as_views)
        for step in range(STEPS):
            # DDP's hook waits for the stream of an accelerator, and a CPU has none.
            with mock.patch("torch.accelerator.current_stream"):
                backward(network, step)
            if inside:
                assert all(p.grad is None for p in network.parameters())
            else:
                optimizer.step()
                optimizer.zero_grad()
        results.append(everything(network, optimizer))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    if engine != "fsdp":
        with pytest.raises(ValueError, match=r"model must be wrapped by .* after this call"):
            fused.optim.step_in_backward(network, fused.AdamW)


@pytest.mark.parametrize("engine", ["fsdp", "ddp", "ddp with views"])
def test_step_in_backward(engine: str, tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_step_in_backward, engine)


# --- Checkpoints ----------------------------------------------------------------------------------


def checkpoint_model() -> nn.Module:
    """Sharded over all ranks; on one, an ordinary model."""
    return model() if dist.get_world_size() == 1 else sharded_model((dist.get_world_size(),))


def step_alike(network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A step that is the same on any number of ranks."""
    backward(network, step, per_rank=False)
    optimizer.step()
    optimizer.zero_grad()


def check_save(folder: Path) -> None:
    for cls in CLASSES:
        network = checkpoint_model()
        optimizer = cls(network.parameters(), **OPTIONS[cls])
        for step in range(2):
            step_alike(network, optimizer, step)
        model_state, optimizer_state = get_state_dict(network, optimizer)
        content = {"model": model_state, "optim": optimizer_state}
        dcp.save(content, checkpoint_id=folder / cls.__name__)
        saved = everything(network, optimizer)
        step_alike(network, optimizer, 2)
        after = everything(network, optimizer)
        if dist.get_rank() == 0:
            torch.save((saved, after), folder / f"{cls.__name__}.pt")


def check_load(folder: Path) -> None:
    for cls in CLASSES:
        network = checkpoint_model()
        # Checkpoints are read into what the state has: what amsgrad adds must be there.
        optimizer = cls(network.parameters(), **{**OPTIONS[cls], "lr": 0.7, "weight_decay": 0.4})
        model_state, optimizer_state = get_state_dict(network, optimizer)
        content = {"model": model_state, "optim": optimizer_state}
        dcp.load(content, checkpoint_id=folder / cls.__name__)
        set_state_dict(
            network,
            optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optim"],
        )
        saved, after = torch.load(folder / f"{cls.__name__}.pt")
        loaded = everything(network, optimizer)
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(value, saved[name]) for name, value in loaded.items())
        group = optimizer.param_groups[0]
        defaults = cls([torch.zeros(1)], **OPTIONS[cls]).defaults
        assert all(group[name] == value for name, value in defaults.items())
        step_alike(network, optimizer, 2)
        assert_same(everything(network, optimizer), after)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpoint_of_two_ranks_on_one_and_on_four(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_save, tmp_path)
    for world in (1, 4):
        on_ranks(world, tmp_path, check_load, tmp_path)
