"""Convolution where others look at it: opcheck, compiled graphs, transforms, autocast, modules."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile

import fused
from fused import functional
from fused.testing import assert_as_accurate_as_stock
from fused.testing.cases.conv import ACTIVATIONS, CASES, ConvCase
from fused.testing.dispatch import OperatorLog

MODULES = [
    (fused.Conv1d, nn.Conv1d, (9,)),
    (fused.Conv2d, nn.Conv2d, (9, 8)),
    (fused.Conv3d, nn.Conv3d, (5, 6, 7)),
]


def kernel_arguments(case: ConvCase) -> tuple[list[Tensor | None], list]:
    """(input, weight, bias), options, as the registered op takes them; ints in the case only."""
    tensors, options = case.make(torch.float32, "cpu")
    axes = len(case.size)
    values = [options["stride"], options["padding"], options["dilation"]]
    stride, padding, dilation = ([v] * axes if isinstance(v, int) else list(v) for v in values)
    return tensors, [stride, padding * 2, dilation, case.groups, case.activation]


@pytest.mark.parametrize(("ours", "stock", "size"), MODULES)
def test_meta_tensors(ours: type, stock: type, size: tuple[int, ...]) -> None:
    x = torch.empty(2, 4, *size, device="meta", requires_grad=True)
    options = {"stride": 2, "padding": 1, "device": "meta"}
    module = ours(4, 6, 3, activation="silu", **options)
    out = module(x)
    assert out.is_meta and out.shape == stock(4, 6, 3, **options)(x).shape
    out.sum().backward()
    assert x.grad is not None and x.grad.is_meta
    assert len(fused.explain(module, x).paths) == 1


@pytest.mark.parametrize(("ours", "stock", "size"), MODULES)
def test_the_signature_is_stocks_and_activation(ours: type, stock: type, size: object) -> None:
    names = list(inspect.signature(ours).parameters)
    assert names == [*inspect.signature(stock).parameters, "activation"]
    layer = nn.utils.skip_init(ours, 3, 4, 3, activation="relu")
    assert type(layer) is ours and layer.weight.device.type == "cpu"

    class Own(ours):
        def __init__(self, width: int) -> None:
            super().__init__(width, width, 3)

    assert list(inspect.signature(Own).parameters) == ["width"]


OPCHECK_CASES = [
    ConvCase("plain", padding=1),
    ConvCase("channels-last", layout="channels-last", out_channels=16, activation="relu"),
    ConvCase("depthwise", in_channels=4, groups=4, stride=2, activation="gelu"),
    ConvCase("1d", size=(9,), kernel=(3,), dilation=2, activation="silu"),
    ConvCase("3d", size=(3, 4, 5), kernel=(2, 2, 2), layout="channels-last"),
    ConvCase("no batch", batch=0),
]


@pytest.mark.parametrize("case", OPCHECK_CASES, ids=lambda c: c.name)
def test_opcheck(case: ConvCase) -> None:
    tensors, options = kernel_arguments(case)
    leaves = [t.detach().requires_grad_() for t in tensors]
    save_pre = case.activation in ("gelu", "silu")
    forward = torch.ops.fused.conv_forward
    torch.library.opcheck(forward.default, (*leaves, *options, save_pre))
    out, pre = forward(*tensors, *options, save_pre)
    for wanted in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            torch.ops.fused.conv_backward.default,
            (torch.ones_like(out), *tensors[:2], pre if save_pre else out, *options, *wanted),
        )


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_compiled_graph_with_dynamic_shapes(activation: str | None) -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.conv2d(x, w, b, 2, 1, activation=activation) * 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    w, b = draw(4, 3, 3, 3), draw(4)
    for size in (5, 9, 12):
        x = draw(2, 3, size, size + 1)
        expected = functional.conv2d(x, w, b, 2, 1, activation=activation) * 2
        out = compiled(x, w, b)
        torch.testing.assert_close(out, expected)
        grads = (torch.autograd.grad(o.square().sum(), (x, w, b)) for o in (out, expected))
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e)


class Parent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1


@pytest.mark.parametrize(("ours", "stock", "size"), MODULES)
@pytest.mark.parametrize("padding", ["same", 1])
def test_module_in_a_compiled_and_an_exported_parent(
    ours: type, stock: type, size: tuple[int, ...], padding: str | int
) -> None:
    parent = Parent(ours(3, 4, 3, padding=padding, padding_mode="reflect", activation="gelu"))
    compiled = torch.compile(parent, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(compiled(x), parent(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in parent.parameters())
    program = torch.export.export(parent, (x,))
    assert any("fused.conv_forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), parent(x))


def test_transforms_and_forward_mode_take_the_composite_path() -> None:
    (x, w, b), options = CASES[0].make(torch.float64, "cpu")
    options["activation"] = "tanh"

    def loss(x: Tensor) -> Tensor:
        return functional.conv2d(x, w, b, **options).square().sum()

    expected = torch.autograd.functional.jacobian(loss, x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(tangent, expected.sum())
    batched = torch.func.vmap(lambda x: functional.conv2d(x, w, b, **options))(x)
    torch.testing.assert_close(batched, functional.conv2d(x, w, b, **options))


def test_gradients_in_a_batch() -> None:
    tensors, options = CASES[0].make(torch.float64, "cpu")
    inputs = [t.requires_grad_() for t in tensors]
    out = functional.conv2d(*inputs, **options)
    grad_outs = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, inputs, grad_outs, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, inputs, g, retain_graph=True) for g in grad_outs]
    for a, b in zip(batched, map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        torch.testing.assert_close(a, b)


def test_dispatch_modes_see_the_registered_op() -> None:
    log = OperatorLog()
    x, w = torch.randn(1, 2, 6, requires_grad=True), torch.randn(3, 2, 3, requires_grad=True)
    with log:
        functional.conv1d(x, w, activation="gelu").sum().backward()
    assert "fused.conv_forward.default" in log.names and "fused.conv_backward.default" in log.names


def test_the_profiler_names_the_kernels() -> None:
    x, w = torch.randn(1, 2, 6), torch.randn(3, 2, 3, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        functional.conv1d(x, w).sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert {"fused::conv_forward", "fused::conv_backward"} <= names


@pytest.mark.parametrize("op", ["conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_explain_names_a_kernel_for_every_listed_option(
    op: str, activation: str | None, dtype: torch.dtype
) -> None:
    axes = int(op[4])
    x, b = torch.randn(2, 4, *[5] * axes, dtype=dtype), torch.randn(4, dtype=dtype)
    for groups in (1, 2, 4):
        w = torch.randn(4, 4 // groups, *[3] * axes, dtype=dtype)
        for padding in (0, 1, "same", "valid"):
            for stride, dilation in ((1, 1), (1, 2), (2, 1)):
                if padding == "same" and stride > 1:
                    continue
                explanation = fused.explain(
                    getattr(functional, op), x, w, b, stride, padding, dilation, groups,
                    activation=activation,
                )  # fmt: skip
                assert all("kernel" in path for path in explanation.paths), explanation
                assert explanation.decisions[0].op == op


def test_other_dtypes_take_the_composite_path() -> None:
    x, w = torch.randn(1, 2, 6, dtype=torch.complex64), torch.randn(3, 2, 3, dtype=torch.complex64)
    torch.testing.assert_close(functional.conv1d(x, w), F.conv1d(x, w))
    assert fused.explain(functional.conv1d, x, w).paths == ("composite",)
    x, w = torch.ones(1, 2, 6, dtype=torch.int64), torch.ones(3, 2, 3, dtype=torch.int64)
    assert torch.equal(functional.conv1d(x, w), F.conv1d(x, w))


@pytest.mark.parametrize("parameters", [torch.float32, torch.float64], ids=str)
def test_autocast_casts_as_stock(parameters: torch.dtype) -> None:
    layer = fused.Conv2d(3, 4, 3, dtype=parameters, activation=None)
    stock = nn.Conv2d(3, 4, 3, dtype=parameters)
    stock.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 6, dtype=parameters, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = layer(x), stock(x)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(o.sum(), x)[0] for o in (out, expected)]
    assert grads[0].dtype == grads[1].dtype == parameters
    exact, x64 = stock.double(), x.detach().double().requires_grad_()
    truth = torch.autograd.grad(exact(x64).sum(), x64)[0]
    # Both carry bfloat16's error, whatever dtype the gradient is returned in.
    low = [grad.bfloat16() for grad in grads]
    assert_as_accurate_as_stock(low[0], truth, low[1], "gradient")


@pytest.mark.parametrize(("ours", "stock", "size"), MODULES)
def test_a_true_drop_in(ours: type, stock: type, size: tuple[int, ...]) -> None:
    layer, twin = (
        ours(4, 6, 3, stride=2, padding=1, groups=2),
        stock(4, 6, 3, stride=2, padding=1, groups=2),
    )
    assert isinstance(layer, stock) and repr(layer) == repr(twin)
    assert layer.load_state_dict(twin.state_dict()).missing_keys == []
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, *size)
    torch.testing.assert_close(layer(x), twin(x))
    torch.testing.assert_close(layer(x[0]), twin(x[0]))
    active = ours(4, 6, 3, activation="relu")
    assert repr(active).endswith("activation='relu')")
    for other in (copy.deepcopy(active), pickle.loads(pickle.dumps(active))):
        assert other.activation == "relu" and torch.equal(other(x), active(x))
    assert active.double().weight.dtype == torch.float64
    with pytest.raises(ValueError, match=r"activation must be None, 'relu', .*, got 'elu'"):
        ours(4, 6, 3, activation="elu")


def test_parametrized_weight() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = fused.Conv1d(2, 3, 3, bias=False)
    x = torch.randn(1, 2, 8)
    before = layer(x)
    parametrize.register_parametrization(layer, "weight", Twice())
    torch.testing.assert_close(layer(x), 2 * before)


@pytest.mark.parametrize(("ours", "stock", "size"), MODULES)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_padding_modes(
    ours: type, stock: type, size: tuple[int, ...], mode: str, padding: int | str
) -> None:
    layer = ours(2, 3, 3, padding=padding, padding_mode=mode, dilation=2)
    twin = stock(2, 3, 3, padding=padding, padding_mode=mode, dilation=2)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 2, *size, requires_grad=True)
    out, expected = layer(x), twin(x)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected)]
    torch.testing.assert_close(*grads)


def test_patch_swaps_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3, padding="same"))
    x = torch.randn(1, 1, 9, 9)
    expected = model(x)
    weight = model[0].weight
    fused.patch(model)
    assert type(model[0]) is fused.Conv2d and model[0].weight is weight
    torch.testing.assert_close(model(x), expected)
    fused.unpatch(model)
    assert type(model[0]) is nn.Conv2d
