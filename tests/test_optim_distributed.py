"""The optimizers under torch's own engines, on several processes: DDP, FSDP2, ZeRO, checkpoints.

Every check runs on real ranks, with gloo on the CPU. The models are so small that shards are uneven
and some are empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optim_ranks import (
    CLASSES,
    OPTIONS,
    STEPS,
    STOCK,
    assert_same,
    backward,
    everything,
    model,
    on_ranks,
    only_kernels,
    sharded_model,
    train,
)
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fused

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


# --- ZeroRedundancyOptimizer ----------------------------------------------------------------------


def check_zero(as_views: bool) -> None:
    for cls in CLASSES:
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
    on_ranks(2, tmp_path, check_zero, as_views)


def check_zero_options() -> None:
    network = DistributedDataParallel(model())
    for option in ({"max_norm": 1.0}, {"nonfinite": "skip"}, {"zero_grad": True}):
        with pytest.raises(ValueError, match=r"must be left out inside ZeroRedundancyOptimizer"):
            ZeroRedundancyOptimizer(network.parameters(), optimizer_class=fused.AdamW, **option)
    options = {"lr": 0.05, "ema_decay": 0.9}
    optimizer = ZeroRedundancyOptimizer(
        network.parameters(), optimizer_class=fused.AdamW, **options
    )
    alone = model()
    expected = fused.AdamW(alone.parameters(), **options)
    for step in range(STEPS):
        for some_network, some_optimizer in ((network, optimizer), (alone, expected)):
            backward(some_network, step, per_rank=False)
            some_optimizer.step()
            some_optimizer.zero_grad()
    for p, q in zip(network.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        if p in optimizer.optim.state:
            torch.testing.assert_close(optimizer.optim.state[p]["ema"], expected.state[q]["ema"])


def test_options_inside_zero_redundancy_optimizer(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_zero_options)


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


def checkpointed() -> Iterator[tuple[str, nn.Module, torch.optim.Optimizer, dict[str, Any]]]:
    """Name, model, optimizer with other numbers than were saved, and those that were."""
    bfloat16 = {"master_weights": "remainder", "ema_decay": 0.9, "max_norm": 0.3}
    cases: list[tuple[type, torch.dtype, dict[str, Any]]] = [
        *((cls, torch.float32, {}) for cls in CLASSES),
        (fused.AdamW, torch.bfloat16, bfloat16),
        (fused.SGD, torch.float32, {"state_dtype": torch.bfloat16}),
    ]
    world = dist.get_world_size()
    for cls, dtype, extras in cases:
        # Sharded over all ranks; on one, an ordinary model.
        network = model().to(dtype) if world == 1 else sharded_model((world,), dtype)
        # Checkpoints are read into what the state has: what amsgrad adds must be there.
        options = {**OPTIONS[cls], **extras}
        optimizer = cls(network.parameters(), **{**options, "lr": 0.7, "weight_decay": 0.4})
        saved = cls([torch.zeros(1)], **options).defaults
        yield f"{cls.__name__}-{'-'.join(extras)}", network, optimizer, saved


def step_alike(network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A step that is the same on any number of ranks."""
    backward(network, step, per_rank=False)
    optimizer.step()
    optimizer.zero_grad()


def check_save(folder: Path) -> None:
    for name, network, optimizer, options in checkpointed():
        optimizer.param_groups[0].update(options)
        for step in range(2):
            step_alike(network, optimizer, step)
        model_state, optimizer_state = get_state_dict(network, optimizer)
        dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=folder / name)
        saved = everything(network, optimizer)
        step_alike(network, optimizer, 2)
        after = everything(network, optimizer)
        if dist.get_rank() == 0:
            torch.save((saved, after), folder / f"{name}.pt")


def check_load(folder: Path) -> None:
    for name, network, optimizer, options in checkpointed():
        model_state, optimizer_state = get_state_dict(network, optimizer)
        content = {"model": model_state, "optim": optimizer_state}
        dcp.load(content, checkpoint_id=folder / name)
        set_state_dict(
            network,
            optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optim"],
        )
        saved, after = torch.load(folder / f"{name}.pt")
        loaded = everything(network, optimizer)
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(value, saved[key]) for key, value in loaded.items())
        group = optimizer.param_groups[0]
        assert all(group[key] == value for key, value in options.items())
        step_alike(network, optimizer, 2)
        assert_same(everything(network, optimizer), after)


def check_one_file(folder: Path) -> None:
    """A checkpoint made whole without collectives, which know no int16."""
    name = "AdamW-master_weights-ema_decay-max_norm"
    dcp_to_torch_save(folder / name, folder / "whole.pt")
    states = torch.load(folder / "whole.pt", weights_only=False)["optim"]["state"]
    saved, _ = torch.load(folder / f"{name}.pt")
    remainders = [key for key in saved if key.endswith(".remainder")]
    assert len(remainders) == 6
    for key in remainders:
        parameter, entry = key.rsplit(".", 1)
        assert torch.equal(states[parameter][entry], saved[key]) and saved[key].any()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpoint_of_two_ranks_on_one_and_on_four(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_save, tmp_path)
    check_one_file(tmp_path)
    for world in (1, 4):
        on_ranks(world, tmp_path, check_load, tmp_path)
