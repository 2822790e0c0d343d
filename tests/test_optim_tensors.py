"""What tensors a step takes: layouts, dtypes, which parameters, and what autograd knows of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused
from fused import _load, _route

CLASSES = [fused.Adam, fused.AdamW, fused.SGD]
OPTIONS: dict[type, dict[str, Any]] = {
    fused.Adam: {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True},
    fused.AdamW: {"lr": 0.05},
    fused.SGD: {"lr": 0.05, "momentum": 0.9, "dampening": 0.1},
}
STOCK = {fused.Adam: torch.optim.Adam, fused.AdamW: torch.optim.AdamW, fused.SGD: torch.optim.SGD}


def set_gradients(params: list[Tensor], step: int) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        # Under the parameter's own strides, as autograd leaves gradients.
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def step_both(
    cls: type, make: Callable[[], list[Tensor]], steps: int = 3, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that `make` gives, stepped by `cls` and by its stock twin."""
    results = []
    for kind, extra in ((cls, {}), (STOCK[cls], {"foreach": False})):
        torch.manual_seed(0)
        params = make()
        optimizer = kind(params, **{**OPTIONS[cls], **options, **extra})
        for step in range(steps):
            set_gradients(params, step)
            optimizer.step()
        results.append([p.detach() for p in params])
    return results[0], results[1]


def assert_all_close(pair: tuple[list[Tensor], list[Tensor]]) -> None:
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


# --- Layouts --------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[torch.device], Tensor]] = {
    "transposed": lambda d: torch.randn(9, 130, device=d).t(),
    "channels last": lambda d: torch.randn(2, 3, 5, 7, device=d).to(
        memory_format=torch.channels_last
    ),
    "strided view": lambda d: torch.randn(40, 6, device=d)[::2, 1:4],
    "misaligned": lambda d: torch.randn(1001, device=d)[1:],
    "misaligned and long": lambda d: torch.randn(3 * 8192 + 6, device=d)[3:],
    "size one with odd strides": lambda d: torch.randn(8, device=d).as_strided((1, 8), (99, 1)),
    "scalar": lambda d: torch.randn((), device=d),
    "empty": lambda d: torch.randn(0, 3, device=d),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", CLASSES)
def test_layouts(cls: type, layout: str, backend: torch.device) -> None:
    assert_all_close(step_both(cls, lambda: [leaf(LAYOUTS[layout](backend))]))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_view_changes_only_its_own_elements(cls: type, backend: torch.device) -> None:
    base = torch.randn(40, 6, device=backend)
    before = base.clone()
    param = leaf(base[::2, 1:4])
    optimizer = cls([param], **OPTIONS[cls])
    set_gradients([param], 0)
    optimizer.step()
    changed = base != before
    assert changed[::2, 1:4].all()
    changed[::2, 1:4] = False
    assert not changed.any()


# States of another size of element than the parameter's.
STORED: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32 beside bfloat16": {"state_dtype": torch.float32, "ema_decay": 0.9},
    "master": {"master_weights": "float32", "state_dtype": torch.bfloat16},
    "bfloat16 beside float32": {"state_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("where", ["grad", "state"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("cls", CLASSES)
def test_operands_in_another_layout(
    cls: type, stored: str, where: str, backend: torch.device
) -> None:
    dtype = torch.float32 if stored in ("float32", "bfloat16 beside float32") else torch.bfloat16
    results = []
    for turned in (False, True):
        torch.manual_seed(0)
        param = leaf(torch.randn(6, 11, device=backend).to(dtype))
        optimizer = cls([param], **OPTIONS[cls], **STORED[stored])
        for step in range(3):
            set_gradients([param], step)
            if turned and where == "grad":
                param.grad = param.grad.t().contiguous().t()
            if turned and where == "state":
                for name, value in optimizer.state[param].items():
                    if name != "step":
                        optimizer.state[param][name] = value.t().contiguous().t()
            optimizer.step()
        results.append([param.detach(), *optimizer.state[param].values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", CLASSES)
def test_mixed_dtypes_in_one_group(cls: type, backend: torch.device) -> None:
    def run(dtypes: list[torch.dtype]) -> list[Tensor]:
        params = [leaf(torch.linspace(-2, 2, 33, device=backend).to(dtype)) for dtype in dtypes]
        optimizer = cls(params, **OPTIONS[cls])
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.1 + step)
            optimizer.step()
        return params

    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    for dtype, param in zip(dtypes, run(dtypes), strict=True):
        assert param.dtype == dtype
        assert torch.equal(param, run([dtype])[0])


@pytest.mark.parametrize("cls", CLASSES)
def test_complex_parameters_take_the_composite_path(cls: type, backend: torch.device) -> None:
    def make() -> list[Tensor]:
        complex_param = torch.randn(5, dtype=torch.complex64, device=backend)
        return [leaf(torch.randn(4, device=backend)), leaf(complex_param)]

    assert_all_close(step_both(cls, make))


def test_sparse_gradients(backend: torch.device) -> None:
    results = []
    for cls in (fused.SGD, torch.optim.SGD):
        torch.manual_seed(0)
        table = torch.nn.Embedding(10, 3, sparse=True, device=backend)
        optimizer = cls(table.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 4, 4], device=backend)).square().sum().backward()
            optimizer.step()
        results.append(table.weight.detach())
    assert torch.equal(*results)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("cls", CLASSES)
def test_threads_change_nothing(cls: type) -> None:
    """Tensors that several threads share, and threads that several tensors share, on the CPU."""
    shapes = [100_003, 5, 65_536, 0, 70_001, 8192]
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        params = [leaf(torch.randn(n)) for n in shapes]
        optimizer = cls(params, **OPTIONS[cls])
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        results.append(params)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    assert_all_close(step_both(cls, lambda: [leaf(torch.randn(n)) for n in shapes], steps=2))


# --- Which parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_without_a_gradient(cls: type, backend: torch.device) -> None:
    """None ever, none at first, none at times: as in stock, each counts its own steps."""
    results = []
    for kind in (cls, STOCK[cls]):
        torch.manual_seed(0)
        params = [leaf(torch.randn(7, device=backend)) for _ in range(3)]
        optimizer = kind(params, **OPTIONS[cls])
        for step in range(5):
            set_gradients(params, step)
            params[0].grad = None
            if step < 2:
                params[1].grad = None
            if step == 3:
                params[2].grad = None
            optimizer.step()
        assert params[0] not in optimizer.state or not optimizer.state[params[0]]
        results.append([*params, *(v for p in params[1:] for v in optimizer.state[p].values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cls", CLASSES)
def test_no_gradients_at_all(cls: type, backend: torch.device) -> None:
    param = leaf(torch.ones(3, device=backend))
    cls([param], **OPTIONS[cls]).step()
    assert torch.equal(param, torch.ones(3, device=backend))


@pytest.mark.filterwarnings("ignore:.*duplicate parameters.*")
@pytest.mark.parametrize("cls", CLASSES)
def test_tied_and_overlapping_parameters(cls: type, backend: torch.device) -> None:
    # Large enough that threads share the work: side by side, the two updates would race.
    def tied() -> list[Tensor]:
        param = leaf(torch.randn(40_000, device=backend))
        return [param, leaf(torch.randn(4, device=backend)), param]

    def overlapping() -> list[Tensor]:
        base = torch.randn(300, device=backend)
        return [leaf(base[:200]), leaf(base[100:])]

    assert_all_close(step_both(cls, tied))
    assert_all_close(step_both(cls, overlapping))


@pytest.mark.filterwarnings("ignore:.*duplicate parameters.*")
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.1}], ids=str)
def test_buffers_of_tied_parameters(options: dict[str, Any], backend: torch.device) -> None:
    """Both steps of the first one begin a buffer; under a GradScaler that skips it, the next."""

    def tied() -> list[Tensor]:
        return [leaf(torch.randn(4, device=backend))] * 2

    options = {"lr": 1.0, "dampening": 0.0, **options}
    assert_all_close(step_both(fused.SGD, tied, momentum=0.9, **options))
    results = []
    for is_skipped in (False, True):
        torch.manual_seed(0)
        params = tied()
        optimizer = fused.SGD(params, momentum=0.9, **options)
        for step in range(-1 if is_skipped else 0, 3):
            optimizer.found_inf = torch.tensor(float(step < 0), device=backend)
            set_gradients(params, max(step, 0))
            optimizer.step()
        results.append(params[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("cls", CLASSES)
def test_groups_added_and_edited(cls: type, backend: torch.device) -> None:
    results = []
    for kind in (cls, STOCK[cls]):
        torch.manual_seed(0)
        params = [leaf(torch.randn(n, device=backend)) for n in (5, 6, 7)]
        optimizer = kind([{"params": params[:1], "lr": 0.1}], **OPTIONS[cls])
        for step in range(6):
            if step == 1:
                optimizer.add_param_group({"params": params[1:2], "weight_decay": 0.3})
            if step == 3:
                optimizer.param_groups[0]["params"].append(params[2])
            if step == 4:
                optimizer.param_groups[1]["lr"] = 0.7
            if step == 5:
                del optimizer.state[params[0]]
            set_gradients(params, step)
            optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cls", CLASSES)
def test_replaced_data_and_state_are_found(cls: type, backend: torch.device) -> None:
    results = []
    for kind in (cls, STOCK[cls]):
        torch.manual_seed(0)
        param = leaf(torch.randn(50, device=backend))
        optimizer = kind([param], **OPTIONS[cls])
        for step in range(4):
            if step == 2:
                param.data = param.data.clone() * 2
                entry = optimizer.state[param]
                name = "exp_avg" if "exp_avg" in entry else "momentum_buffer"
                entry[name] = entry[name] + 1
            set_gradients([param], step)
            optimizer.step()
        results.append(param)
    torch.testing.assert_close(*results)


# --- Autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_backward_through_a_stale_graph_raises(cls: type, backend: torch.device) -> None:
    param = leaf(torch.randn(4, device=backend))
    optimizer = cls([param], **OPTIONS[cls])
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("cls", CLASSES)
def test_versions_of_all_that_is_written(cls: type, backend: torch.device) -> None:
    param = leaf(torch.randn(4, device=backend))
    optimizer = cls([param], **OPTIONS[cls])
    set_gradients([param], 0)
    optimizer.step()
    tensors = {"param": param, "grad": param.grad, **optimizer.state[param]}
    before = {name: tensor._version for name, tensor in tensors.items()}
    optimizer.step()
    for name, tensor in tensors.items():
        assert (tensor._version > before[name]) == (name != "grad"), name
    optimizer.grad_scale = torch.tensor(2.0, device=backend)
    optimizer.step()
    assert param.grad._version > before["grad"]


# --- GradScaler's tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("counts", ["host", "device"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", CLASSES)
def test_scale_and_skip(
    cls: type, dtype: torch.dtype, skip: bool, counts: str, backend: torch.device
) -> None:
    on_device = counts == "device" and cls is not fused.SGD
    if on_device and backend.type == "cpu" and _route.kernels() is _load.load():
        on_device = False  # counts are on the host's own memory either way
    options = {**OPTIONS[cls], **({"capturable": True} if on_device else {})}
    torch.manual_seed(0)
    start = torch.randn(9000, device=backend, dtype=dtype)
    results = []
    for scaled in (True, False):
        param = leaf(start.clone())
        optimizer = cls([param], **options)
        for step in range(4):
            set_gradients([param], step)
            expected_grad = param.grad.clone()
            if scaled:
                param.grad *= 8
                optimizer.grad_scale = torch.tensor(8.0, device=backend)
                optimizer.found_inf = torch.tensor(float(skip and step == 2), device=backend)
            if not scaled and skip and step == 2:
                continue
            optimizer.step()
            if not (skip and step == 2):
                assert torch.equal(param.grad, expected_grad)
        results.append([param.detach(), *optimizer.state[param].values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_gradient_that_parameters_share(
    cls: type, zero_grad: bool, backend: torch.device
) -> None:
    """Unscaling writes to it: every parameter reads it as it was, in a kept step too."""
    results = []
    for is_shared in (False, True):
        params = [leaf(torch.ones(300, device=backend)) for _ in range(2)]
        optimizer = cls(params, **OPTIONS[cls], zero_grad=zero_grad)
        optimizer.grad_scale = torch.tensor(4.0, device=backend)
        for step in range(4):
            grads = [torch.full_like(p, 2.0) for p in params]
            for i, p in enumerate(params):
                p.grad = grads[0 if is_shared and step > 1 else i]
            optimizer.step()
        results.append([*params, *(p.grad for p in params)])
    assert all(map(torch.equal, *results))
    assert torch.equal(params[0].grad, torch.full_like(params[0], 0.0 if zero_grad else 0.5))
