"""The LSTM ops and modules under derivatives of derivatives, torch.func, torch.compile, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils import _pytree as pytree

import fused
from fused import _lstm
from fused.functional import lstm_cell
from fused.testing.cases.lstm import LSTMCase, LSTMCellCase
from fused.testing.dispatch import OperatorLog

LAYERS = [
    LSTMCase("plain", steps=3, batch=2, input_size=2, hidden_size=3),
    LSTMCase("one", steps=1, batch=1, input_size=1, hidden_size=1),
    LSTMCase("no bias, reverse", steps=3, batch=2, hidden_size=3, bias=False, reverse=True),
    LSTMCase("packed projection", lengths=(3, 2, 1), input_size=2, hidden_size=3, proj_size=2),
    LSTMCase("packed reverse", lengths=(3, 1), input_size=2, hidden_size=3, reverse=True),
]
each_layer = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)


def as_function(function: Any, tensors: list[Tensor | None], options: dict[str, Any]) -> Any:
    """A function of the tensors that are not None, and those, with gradients wanted."""
    places = [i for i, t in enumerate(tensors) if t is not None]

    def call(*given: Tensor) -> Any:
        arguments: list[Tensor | None] = [None] * len(tensors)
        for place, tensor in zip(places, given, strict=True):
            arguments[place] = tensor
        return function(*arguments, **options)

    return call, [tensors[i].detach().requires_grad_() for i in places]


def cell(input: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    return lstm_cell(input, (h, c), *weights)


@each_layer
def test_layer_derivatives(case: LSTMCase, backend: torch.device) -> None:
    call, inputs = as_function(_lstm.lstm_layer, *case.make(torch.float64, backend))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=False)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("bias", ["ih hh", "", "hh"])
def test_cell_derivatives(bias: str, backend: torch.device) -> None:
    case = LSTMCellCase("", batch=2, input_size=3, hidden_size=3, bias=bias)
    call, inputs = as_function(cell, case.make(torch.float64, backend), {})
    assert torch.autograd.gradcheck(call, inputs, fast_mode=False)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=False)


@pytest.mark.parametrize("function", ["cell", "layer"])
def test_derivatives_under_a_dispatch_mode(function: str) -> None:
    """There the registered ops run, which have derivatives beyond the first too."""
    log = OperatorLog()
    device = torch.device("cpu")
    if function == "cell":
        case = LSTMCellCase("", batch=2, input_size=3, hidden_size=3)
        call, inputs = as_function(cell, case.make(torch.float64, device), {})
    else:
        call, inputs = as_function(_lstm.lstm_layer, *LAYERS[3].make(torch.float64, device))
    with log:
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    overload = "default" if function == "cell" else "packed"
    for op in ("forward", "backward"):
        assert f"fused.lstm_{function}_{op}.{overload}" in log.names


def test_gradients_with_create_graph_are_the_kernels(backend: torch.device) -> None:
    for make in (
        lambda: as_function(cell, LSTMCellCase("").make(torch.float64, backend), {}),
        lambda: as_function(_lstm.lstm_layer, *LAYERS[3].make(torch.float64, backend)),
    ):
        call, inputs = make()
        loss = sum(t.square().sum() for t in call(*inputs))
        plain = torch.autograd.grad(loss, inputs, retain_graph=True)
        graph = torch.autograd.grad(loss, inputs, create_graph=True)
        for a, b in zip(plain, graph, strict=True):
            torch.testing.assert_close(a, b)


@each_layer
def test_layer_transforms(case: LSTMCase) -> None:
    """torch.func and forward mode take the composite: equal to the kernels in value and slope."""
    call, inputs = as_function(_lstm.lstm_layer, *case.make(torch.float64, "cpu"))
    inputs = [t.detach() for t in inputs]
    tangents = [torch.randn_like(t) for t in inputs]
    outputs = call(*inputs)
    values, slopes = torch.func.jvp(call, tuple(inputs), tuple(tangents))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
        pairs = [forward_ad.unpack_dual(t) for t in call(*duals)]
    step = 1e-6
    ahead = call(*[t + step * d for t, d in zip(inputs, tangents, strict=True)])
    for out, value, slope, pair, moved in zip(outputs, values, slopes, pairs, ahead, strict=True):
        torch.testing.assert_close(value, out)
        torch.testing.assert_close(pair.primal, out)
        torch.testing.assert_close(pair.tangent, slope)
        torch.testing.assert_close(slope, (moved - out) / step, atol=1e-4, rtol=1e-4)


def test_vmap_over_models() -> None:
    modules = [fused.LSTM(3, 4, bidirectional=True).double() for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(modules)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    run = lambda p: torch.func.functional_call(modules[0], p, (x,))[0]  # noqa: E731
    together = torch.vmap(run)(parameters)
    for out, module in zip(together, modules, strict=True):
        torch.testing.assert_close(out, module(x)[0])


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_layer(case: LSTMCase, dtype: torch.dtype) -> None:
    tensors, options = case.make(dtype, "cpu")
    arguments = (*(None if t is None else t.requires_grad_() for t in tensors), *options.values())
    ops = torch.ops.fused.lstm_layer_forward, torch.ops.fused.lstm_layer_backward
    forward, backward = (op.packed if case.lengths else op.default for op in ops)
    torch.library.opcheck(forward, arguments)
    with torch.no_grad():
        output, h_n, c_n, *saved = forward(*arguments)
    tensors = [None if t is None else t.detach() for t in tensors]
    given = (*tensors[:5], tensors[7], *options.values(), output, *saved)
    for grads in ((output, h_n, c_n), (None, h_n, None), (output, None, c_n)):
        for needs in ([True] * 7, [False, True] * 3 + [False]):
            torch.library.opcheck(backward, (*grads, *given, needs))


@pytest.mark.parametrize("bias", ["ih hh", "", "ih"])
def test_opcheck_cell(bias: str) -> None:
    tensors = LSTMCellCase("", bias=bias).make(torch.float32, "cpu")
    arguments = tuple(None if t is None else t.requires_grad_() for t in tensors)
    torch.library.opcheck(torch.ops.fused.lstm_cell_forward, arguments)
    with torch.no_grad():
        h, c, gates = torch.ops.fused.lstm_cell_forward(*arguments)
    given = [t.detach() for t in tensors[:5]]
    for grads in ((h, c), (h, None), (None, c)):
        for needs in ([True] * 6, [True, False] * 3):
            torch.library.opcheck(
                torch.ops.fused.lstm_cell_backward, (*grads, *given, gates, needs)
            )


class Parent(nn.Module):
    """As modules stand in models: the compiler treats a submodule otherwise than a root."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, *args: Any) -> list[Tensor]:
        return [t * 2 for t in pytree.tree_leaves(self.child(*args)) if isinstance(t, Tensor)]


def lstm_args(length: int, batch: int, layers: int, h_size: int = 4) -> tuple:
    state = (torch.randn(layers, batch, h_size), torch.randn(layers, batch, 4))
    return torch.randn(length, batch, 3), state


MODULES: dict[str, tuple[Any, Any]] = {
    "cell": (lambda: fused.LSTMCell(3, 4), lambda n: (torch.randn(n, 3),)),
    "cell with state": (
        lambda: fused.LSTMCell(3, 4, bias=False),
        lambda n: (torch.randn(n, 3), (torch.randn(n, 4), torch.randn(n, 4))),
    ),
    "unbatched cell": (lambda: fused.LSTMCell(3, 4), lambda n: (torch.randn(3),)),
    "lstm": (lambda: fused.LSTM(3, 4), lambda n: (torch.randn(n + 2, n, 3),)),
    "lstm with state": (lambda: fused.LSTM(3, 4, 2), lambda n: lstm_args(n + 1, n, 2)),
    "batch first": (lambda: fused.LSTM(3, 4, batch_first=True), lambda n: (torch.randn(n, 7, 3),)),
    "all options": (
        lambda: fused.LSTM(3, 4, 2, bidirectional=True, proj_size=2, bias=False),
        lambda n: lstm_args(n + 3, n, 4, 2),
    ),
    "unbatched": (lambda: fused.LSTM(3, 4, bidirectional=True), lambda n: (torch.randn(n, 3),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_compile_whole_with_dynamic_shapes(name: str) -> None:
    make, draw = MODULES[name]
    parent = Parent(make())
    torch.compiler.reset()
    compiled = torch.compile(parent, fullgraph=True, dynamic=True, backend="aot_eager")
    check_compiled(parent, compiled, [draw(n) for n in (2, 3, 5)])


def test_the_inductor_takes_a_module() -> None:
    make, draw = MODULES["all options"]
    parent = Parent(make())
    torch.compiler.reset()
    check_compiled(parent, torch.compile(parent, fullgraph=True, dynamic=True), [draw(2), draw(3)])


def check_compiled(parent: nn.Module, compiled: Any, calls: list[tuple]) -> None:
    for args in calls:
        results = []
        for run in (compiled, parent):
            outputs = run(*args)
            loss = sum(t.square().sum() for t in outputs)
            results.append((*outputs, *torch.autograd.grad(loss, list(parent.parameters()))))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_a_compiled_module_under_autocast() -> None:
    parent = Parent(fused.LSTM(3, 4, 2))
    torch.compiler.reset()
    compiled = torch.compile(parent, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for actual, expected in zip(compiled(x), parent(x), strict=True):
            assert actual.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(actual, expected)


def test_a_compiled_module_with_a_packed_sequence() -> None:
    """Through the data and batch sizes, as a graph sees them; with the state given."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fused.LSTM(3, 4, bidirectional=True)

        def forward(self, data: Tensor, batch_sizes: Tensor, h: Tensor, c: Tensor) -> Tensor:
            output, (h_n, c_n) = self.lstm(PackedSequence(data, batch_sizes), (h, c))
            return output.data.sum() + h_n.sum() + c_n.sum()

    module = Packed()
    state = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for sizes in ([3, 3, 1], [3, 2, 2, 1]):
        args = (torch.randn(sum(sizes), 3), torch.tensor(sizes), *state)
        torch.testing.assert_close(compiled(*args), module(*args))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_compiled_module_with_a_packed_sequence_and_no_state(ordered: bool) -> None:
    """A sequence whose order is known tells the batch's size by it, and asks for no data."""
    module = fused.LSTM(3, 4)

    def run(data: Tensor, *rest: Tensor) -> Tensor:
        output, (h_n, c_n) = module(PackedSequence(data, *rest))
        return output.data.sum() + h_n.sum() + c_n.sum()

    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=ordered):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for lengths in ([4, 2, 1], [5, 5, 3]):
            batch = [torch.randn(n, 3) for n in (lengths if ordered else lengths[::-1])]
            packed = pack_sequence(batch, enforce_sorted=ordered)
            args = [t for t in packed if t is not None]
            torch.testing.assert_close(compiled(*args), run(*args))


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_cuda_graph_leaves_packed_sequences_out(is_packed: bool) -> None:
    """A replay would go through the lengths of the batch that it was recorded with.

    Inductor asks this of the nodes of both passes.
    """
    unsafe = []

    def note(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        node = get_first_incompatible_cudagraph_node(graph)
        unsafe.append(None if node is None else str(node.target))
        return make_boxed_func(graph)

    call, inputs = as_function(_lstm.lstm_layer, *LAYERS[3 * is_packed].make(torch.float32, "cpu"))
    torch.compiler.reset()
    compiled = torch.compile(call, backend=aot_autograd(fw_compiler=note, bw_compiler=note))
    compiled(*inputs)[0].sum().backward()
    ops = [f"fused.lstm_layer_{direction}.packed" for direction in ("forward", "backward")]
    assert unsafe == (ops if is_packed else [None, None])


@pytest.mark.parametrize("name", ["cell", "lstm with state", "all options"])
def test_modules_export(name: str) -> None:
    make, draw = MODULES[name]
    parent = Parent(make()).eval()
    args = draw(3)
    exported = torch.export.export(parent, args)
    ops = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any(op.startswith("fused.lstm") for op in ops)
    for actual, expected in zip(exported.module()(*args), parent(*args), strict=True):
        torch.testing.assert_close(actual, expected)


def test_fake_tensors_and_dispatch_modes_see_the_op() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    log = OperatorLog()
    module, x = fused.LSTM(3, 4), torch.randn(5, 2, 3)
    with log:
        module(x)[0].sum().backward()
    assert "fused.lstm_layer_forward.default" in log.names
    assert "fused.lstm_layer_backward.default" in log.names
    with FakeTensorMode():
        module = fused.LSTM(3, 4, batch_first=True)
        output, (h_n, _) = module(torch.empty(2, 5, 3))
        assert output.shape == (2, 5, 4) and h_n.shape == (1, 2, 4)
