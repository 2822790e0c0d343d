"""The optimizers under torch.compile, dispatch modes, opcheck and fused.explain."""

from __future__ import annotations

import contextlib
import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused
from fused.testing.dispatch import OperatorLog

CLASSES = [fused.Adam, fused.AdamW, fused.SGD]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS: dict[type, list[dict[str, Any]]] = {
    fused.Adam: [
        {},
        {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.5), torch.tensor(0.75))},
        {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
        {"foreach": True},
        {"fused": True},
    ],
    fused.AdamW: [{}, {"amsgrad": True, "lr": torch.tensor(0.1), "maximize": True}],
    fused.SGD: [
        {},
        {"momentum": 0.9, "dampening": 0.1, "lr": torch.tensor(0.1)},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ],
}
CASES = [(cls, options) for cls in CLASSES for options in OPTIONS[cls]]


def make(cls: type, options: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Linear(4, 5)
    return network, cls(network.parameters(), **copy.deepcopy(options))


def set_gradients(network: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for p in network.parameters():
        p.grad = torch.randn_like(p)


def everything(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [value for p in network.parameters() for value in optimizer.state[p].values()]
    return [p.detach() for p in network.parameters()] + states


@pytest.mark.parametrize("cls", CLASSES)
def test_compiled_step(cls: type) -> None:
    options = OPTIONS[cls][1]
    eager, compiled = make(cls, options), make(cls, options)
    torch._dynamo.reset()
    step = torch.compile(compiled[1].step, fullgraph=True)
    for index in range(3):
        for network, optimizer in (eager, compiled):
            set_gradients(network, index)
            versions = [p._version for p in network.parameters()]
            step() if optimizer is compiled[1] else optimizer.step()
            assert all(p._version > v for p, v in zip(network.parameters(), versions, strict=True))
        if index == 1:
            compiled[1].param_groups[0]["lr"].fill_(0.5)  # read at run time, not compiled in
            eager[1].param_groups[0]["lr"].fill_(0.5)
    for a, b in zip(everything(*eager), everything(*compiled), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_schedule_of_numbers_is_compiled_twice(cls: type) -> None:
    """Once with the first one, once for all others: with its bits, and with the betas'."""
    momentum = {"momentum": 0.9} if cls is fused.SGD else {}
    eager, compiled = (make(cls, {"lr": 0.1, **momentum}) for _ in range(2))
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    step = torch.compile(compiled[1].step, fullgraph=True, backend=counting)
    for index in range(6):
        for network, optimizer in (eager, compiled):
            set_gradients(network, index)
            (group,) = optimizer.param_groups
            group["lr"] = 0.1 / (index + 1)
            if "betas" in group:
                group["betas"] = (0.9 - index / 100, 0.99 + index / 1000)
            # The first is an eager one: in it states begin, which is another graph.
            step() if optimizer is compiled[1] and index > 0 else optimizer.step()
    assert graphs == 2
    for a, b in zip(everything(*eager), everything(*compiled), strict=True):
        assert torch.equal(a, b)


class Arguments(TorchDispatchMode):
    """While it is entered, notes the keyword arguments of each of fused's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused":
            self.seen.append(kwargs)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_compiled_step_brings_its_numbers_to_the_device(cls: type) -> None:
    """What the host reads is no part of a CUDA graph: its replays would not see a change."""
    options = OPTIONS[cls][1]
    log, on_gpu = Arguments(), FakeTensorMode(allow_non_fake_inputs=True)
    with on_gpu:
        parameter = nn.Parameter(torch.empty(3, device="cuda"))
        parameter.grad = torch.empty_like(parameter)
    optimizer = cls([parameter], **options)
    with on_gpu, log, mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        optimizer.step()
    (arguments,) = log.seen
    numbers = [v for name, v in arguments.items() if name.startswith("tensor_") and v is not None]
    assert len(numbers) == (1 if cls is fused.SGD else 3)
    assert all(number.device == parameter.device for number in numbers)


@pytest.mark.parametrize("cls, options", CASES)
def test_a_dispatch_mode_sees_the_op(cls: type, options: dict[str, Any]) -> None:
    plain, watched = make(cls, options), make(cls, options)
    for index in range(2):
        for network, optimizer in (plain, watched):
            set_gradients(network, index)
            if optimizer is plain[1]:
                optimizer.step()
                continue
            with OperatorLog() as log:
                optimizer.step()
            op = "fused.sgd_.default" if cls is fused.SGD else "fused.adam_.default"
            assert log.names.count(op) == 1
    for a, b in zip(everything(*plain), everything(*watched), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["mode", "compiled"])
@pytest.mark.parametrize("master", ["float32", "remainder"])
@pytest.mark.parametrize("cls", CLASSES)
def test_masters_of_some_parameters(cls: type, master: str, way: str) -> None:
    """Those of 16 bits, in one group with others."""
    results = []
    for is_traced in (False, True):
        network, _ = make(cls, {})
        network.weight.data = network.weight.data.bfloat16()
        momentum = {"momentum": 0.9} if cls is fused.SGD else {}
        options = {"lr": 0.1, "master_weights": master, "state_dtype": "int8", "ema_decay": 0.9}
        optimizer = cls(network.parameters(), **options, **momentum)
        step = optimizer.step
        if is_traced and way == "compiled":
            torch._dynamo.reset()
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        for index in range(3):
            set_gradients(network, index)
            with OperatorLog() if is_traced and way == "mode" else contextlib.nullcontext():
                step()
        results.append(everything(network, optimizer))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("options", [{}, {"norm_scope": "group"}], ids=str)
def test_a_compiled_step_clips_where_gradients_are(options: dict[str, Any]) -> None:
    results = []
    for compiles in (False, True):
        network, _ = make(fused.SGD, {})
        groups = [{"params": [p]} for p in network.parameters()]
        optimizer = fused.SGD(groups, max_norm=0.1, **options)
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
        step = step if compiles else optimizer.step
        for with_gradients in (0, 1):
            set_gradients(network, 0)
            for p in list(network.parameters())[with_gradients:]:
                p.grad = None
            step()
        results.append(everything(network, optimizer))
    assert all(map(torch.equal, *results))


def tensors(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.rand(3 + i, 2, dtype=dtype) + 0.1 for i in range(count)]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck_adam(amsgrad: bool, scaled: bool) -> None:
    lists = [tensors(2) for _ in range(4)]
    steps = [torch.tensor(3.0), torch.tensor(1.0)]
    optional = {"tensor_lr": torch.tensor(0.1)}
    if scaled:
        optional |= {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)}
    torch.library.opcheck(
        torch.ops.fused.adam_.default,
        (*lists, tensors(2) if amsgrad else [], steps, [], [], []),
        {
            "lr": 0.1,
            "beta1": 0.9,
            "beta2": 0.99,
            "weight_decay": 0.1,
            "eps": 1e-8,
            "amsgrad": amsgrad,
            "maximize": False,
            "decoupled_weight_decay": True,
            "capturable": False,
            **optional,
        },
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck_sgd(momentum: float, scaled: bool) -> None:
    optional = {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)} if scaled else {}
    torch.library.opcheck(
        torch.ops.fused.sgd_.default,
        (tensors(2), tensors(2), tensors(2) if momentum else [], [], [], []),
        {
            "lr": 0.1,
            "weight_decay": 0.1,
            "momentum": momentum,
            "dampening": 0.1,
            "nesterov": False,
            "maximize": True,
            "first_step": False,
            "capturable": False,
            **optional,
        },
    )


# How the states beside bfloat16 parameters are stored, and what the lists of an op then hold.
STORED = ["remainder", "float32 master", "by chance"]


def stored_lists(stored: str, num_states: int) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """Lists of int8 states, scales, masters and averages, and the arguments that go with them."""
    params = tensors(2, torch.bfloat16)
    states = [
        [torch.randint(1, 100, p.shape).to(torch.uint8 if k else torch.int8) for p in params]
        for k in range(num_states)
    ]
    scales = [torch.rand(1) + 0.5 for _ in range(2 * num_states)]
    master = torch.int16 if stored == "remainder" else torch.float32
    masters = [] if stored == "by chance" else [p.detach().to(master) for p in params]
    arguments = {
        "norm": torch.tensor(2.0, dtype=torch.float64),
        "max_norm": 1.0,
        "skip_nonfinite": True,
        "zero_grad": True,
        "ema_decay": 0.9,
        "rng": torch.tensor([3, 5]) if stored == "by chance" else None,
    }
    return [*states, scales, masters, tensors(2)], arguments


@pytest.mark.parametrize("stored", STORED)
def test_opcheck_adam_with_everything(stored: str) -> None:
    (*moments, scales, masters, emas), arguments = stored_lists(stored, 3)
    params, grads = tensors(2, torch.bfloat16), tensors(2, torch.bfloat16)
    steps = [torch.tensor(3.0), torch.tensor(1.0)]
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-3}
    torch.library.opcheck(
        torch.ops.fused.adam_.default,
        (params, grads, *moments, steps, scales, masters, emas),
        {
            **numbers,
            **arguments,
            "amsgrad": True,
            "maximize": False,
            "decoupled_weight_decay": False,
            "capturable": False,
        },
    )


@pytest.mark.parametrize("stored", STORED)
def test_opcheck_sgd_with_everything(stored: str) -> None:
    (buffers, scales, masters, emas), arguments = stored_lists(stored, 1)
    params, grads = tensors(2, torch.bfloat16), tensors(2, torch.bfloat16)
    torch.library.opcheck(
        torch.ops.fused.sgd_.default,
        (params, grads, buffers, scales, masters, emas),
        {
            **arguments,
            "lr": 0.1,
            "weight_decay": 0.1,
            "momentum": 0.9,
            "dampening": 0.1,
            "nesterov": False,
            "maximize": True,
            "first_step": False,
            "capturable": False,
        },
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("cls, options", CASES)
def test_explain_never_says_composite_for_a_listed_option(
    cls: type, options: dict[str, Any], dtype: torch.dtype, backend: torch.device
) -> None:
    network, _ = make(cls, options)
    network.to(backend, dtype)
    optimizer = cls(network.parameters(), **copy.deepcopy(options))
    for _ in range(2):  # a first step and a later one
        set_gradients(network, 0)
        before = [p.detach().clone() for p in network.parameters()]
        paths = fused.explain(optimizer.step).paths
        assert len(paths) == 1
        assert "kernel" in paths[0]
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))
        optimizer.step()


def test_explain_says_why_composite() -> None:
    def reason(param: Tensor, **options: Any) -> str:
        param.grad = torch.ones_like(param)
        explanation = fused.explain(fused.Adam([param], **options).step)
        assert explanation.paths == ("composite",)
        return str(explanation)

    assert "not a floating-point tensor" in reason(torch.ones(2, dtype=torch.complex64))
    assert "differentiable=True" in reason(torch.ones(2), differentiable=True)
