"""Tables of tensors in device memory: one launch for any number of tensors of a kept step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import on_gpus
from optim_states import assert_equal, everything
from torch import Tensor

import fused
from fused.testing import emulator
from fused.testing.emulator import ORDERS, emulated_cuda

COUNT = 160  # more than the arguments of any launch hold

Options = dict[str, Any]
CASES: dict[str, tuple[type, torch.dtype, Options]] = {
    "counts on the host": (fused.AdamW, torch.float32, {"max_norm": 1.0}),
    "counts on the device": (fused.Adam, torch.float32, {"capturable": True, "amsgrad": True}),
    "no counts": (fused.SGD, torch.float32, {"momentum": 0.9, "zero_grad": True}),
    "everything stored": (
        fused.AdamW,
        torch.bfloat16,
        {"master_weights": "remainder", "state_dtype": "int8", "ema_decay": 0.9},
    ),
    "rounded by chance": (fused.SGD, torch.bfloat16, {"stochastic_rounding": True}),
}


def make(case: str, device: str | torch.device = "cpu") -> tuple[list[Tensor], Any]:
    cls, dtype, options = CASES[case]
    torch.manual_seed(0)
    sizes = [1 + i % 5 for i in range(COUNT)]
    sizes[3], sizes[-1] = 8192 + 300, 0  # two chunks, and none
    params = [torch.randn(n).to(device, dtype).requires_grad_() for n in sizes]
    for p in params:
        p.grad = torch.empty_like(p)
    return params, cls(params, lr=0.05, **options)


def launched(counts: dict[str, int]) -> Counter[str]:
    """By the kernels' names alone."""
    names: Counter[str] = Counter()
    for name, count in counts.items():
        names[re.findall(r"(\w+_kernel)", name)[0]] += count
    return names


def six_gradients(params: list[Tensor]) -> Iterator[None]:
    """Gradients for six steps; they move before the fourth."""
    old = []
    for step in range(6):
        for i, p in enumerate(params):
            assert p.grad is not None
            if step == 3:
                old.append(p.grad)  # stays readable, with what it held
                p.grad = torch.empty_like(p)
            generator = torch.Generator().manual_seed(1000 * step + i)
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        yield


def run(case: str, order: str | int, *, keeps: bool) -> tuple[list[Tensor], list[Counter[str]]]:
    """What six steps leave, and what each one launched."""
    params, optimizer = make(case)
    steps = []
    for _ in six_gradients(params):
        if not keeps:
            optimizer._kept = None
        with emulated_cuda(order) as launches:
            optimizer.step()
            steps.append(launched(launches.counts()))
    return everything(params, optimizer), steps


@pytest.mark.parametrize("case", CASES)
def test_one_launch_whatever_the_number_in_the_emulator(case: str) -> None:
    expected, without = run(case, "forward", keeps=False)
    launches = emulator.Launches()
    for order in ORDERS if case == "everything stored" else ORDERS[:1]:
        result, steps = run(case, order, keeps=True)
        assert_equal(result, expected)
        write, update = "write_table_kernel", "optim_update_kernel"
        assert [bool(step[write]) for step in steps] == [False, True, False, False, True, False]
        assert [step[update] == 1 for step in steps] == [False, True, True, False, True, True]
        assert all(step[update] > 1 and not step[write] for step in without)
        if case == "counts on the host":
            norms = [step["norm_partials_kernel"] for step in steps]
            assert [n == 1 for n in norms] == [False, False, True, False, False, True]
        if case == "counts on the device":
            assert steps[2]["adam_advance_kernel"] == 1
    if case == "everything stored":
        # A call that is repeated, as others are for it, finds its table written.
        emulator.compared_in_every_order(launches)


@on_gpus
@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_without_a_table(backend: torch.device, case: str) -> None:
    results = []
    for keeps in (True, False):
        params, optimizer = make(case, backend)
        for _ in six_gradients(params):
            if not keeps:
                optimizer._kept = None
            optimizer.step()
        results.append(everything(params, optimizer))
    assert_equal(*results)


def test_counts_that_differ_do_without_in_the_emulator() -> None:
    results = []
    for keeps in (True, False):
        params, optimizer = make("counts on the host")
        for step in range(4):
            for i, p in enumerate(params):
                assert p.grad is not None
                p.grad.fill_(0.1 * i)
            if step == 2:
                optimizer.state[params[70]]["step"].add_(3)
            if not keeps:
                optimizer._kept = None
            with emulated_cuda("forward") as launches:
                optimizer.step()
                updates = launched(launches.counts())["optim_update_kernel"]
            assert (updates == 1) == (keeps and step == 1)
        results.append(everything(params, optimizer))
    assert_equal(*results)


def test_few_tensors_have_none_in_the_emulator() -> None:
    params = [torch.ones(3).requires_grad_() for _ in range(40)]
    optimizer = fused.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    with emulated_cuda("forward") as launches:
        for _ in range(3):
            optimizer.step()
        assert launched(launches.counts()) == {"optim_update_kernel": 3}


def test_states_of_two_dtypes_leave_the_norm_its_order_in_the_emulator() -> None:
    """The same bits whether gradients are read from a table or not: here there are two tables."""
    norms: list[list[Tensor]] = []
    for keeps in (True, False):
        params, optimizer = make("counts on the host")
        norms.append([])
        for step in range(6):
            for i, p in enumerate(params):
                assert p.grad is not None
                generator = torch.Generator().manual_seed(1000 * step + i)
                p.grad.copy_(10.0 ** (i % 8) * torch.rand(p.shape, generator=generator))
            if step == 1:
                for p in params[::2]:
                    entry = optimizer.state[p]
                    entry["exp_avg"] = entry["exp_avg"].bfloat16()
                    entry["exp_avg_sq"] = entry["exp_avg_sq"].bfloat16()
            if not keeps:
                optimizer._kept = None
            with emulated_cuda("forward"):
                optimizer.step()
            norms[-1].append(optimizer.grad_norm)
    assert_equal(*norms)
