"""The convolution kernels against the definition: every case, dtype and backend, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused import _route, functional, reference
from fused._conv import _ACTIVATIONS, ConvFunction, conv_composite
from fused.testing import assert_as_accurate_as_stock
from fused.testing.cases.conv import ACTIVATIONS, CASES, ConvCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = ("out", "grad_input", "grad_weight", "grad_bias")


def run(function, tensors: list[Tensor], options: dict, grad_out: Tensor) -> tuple[Tensor, ...]:
    inputs = [t.detach().requires_grad_() for t in tensors]
    out = function(*inputs, **options)
    return (out, *torch.autograd.grad(out, inputs, grad_out.to(out.dtype)))


def stock(case: ConvCase):
    """PyTorch's own operators, convolution and activation apart."""

    def function(*inputs: Tensor, activation: str | None = None, **options) -> Tensor:
        out = getattr(F, case.op)(*inputs, **options)
        return out if activation is None else _ACTIVATIONS[activation](out)

    return function


def draw_grad_out(case: ConvCase, tensors: list[Tensor], options: dict) -> Tensor:
    shape = getattr(reference, case.op)(*tensors, **options).shape
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(shape, generator=generator).to(tensors[0])
    # Laid out as the input is, which is how the layer behind would leave it.
    return drawn if case.layout == "expanded" else case._lay_out(drawn)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_forward_and_gradients(case: ConvCase, dtype: torch.dtype, backend: torch.device) -> None:
    tensors, options = case.make(dtype, backend)
    grad_out = draw_grad_out(case, tensors, options)
    expected = run(getattr(reference, case.op), [t.double() for t in tensors], options, grad_out)
    low = [t.float() if dtype == torch.float64 else t for t in tensors]
    yardstick = run(stock(case), low, options, grad_out)
    actual = run(getattr(functional, case.op), tensors, options, grad_out)
    for name, a, e, s in zip(NAMES, actual, expected, yardstick):
        assert a.dtype == dtype
        assert_as_accurate_as_stock(a, e, s, name)


LAYOUT_CASES = [c for c in CASES if "channels-last" in c.layout or c.name in ("padded", "3d")]


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=lambda c: c.name)
def test_results_lie_as_stock_lays_them(case: ConvCase, backend: torch.device) -> None:
    tensors, options = case.make(torch.float32, backend)
    grad_out = draw_grad_out(case, tensors, options)
    theirs = run(stock(case), tensors, options, grad_out)
    ours = run(getattr(functional, case.op), tensors, options, grad_out)
    for name, a, s in zip(NAMES, ours, theirs):
        if s.dim() < 4:
            assert a.stride() == s.stride(), name
            continue
        for layout in (torch.contiguous_format, case._channels_last()):
            if s.is_contiguous(memory_format=layout):
                assert a.is_contiguous(memory_format=layout), f"{name}: {a.stride()}"


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grad_out_of_any_strides(
    activation: str | None, layout: str, backend: torch.device
) -> None:
    case = ConvCase("strides", activation=activation, layout=layout, padding=1, out_channels=6)
    tensors, options = case.make(torch.float64, backend)
    shape = draw_grad_out(case, tensors, options).shape
    other = torch.randn(*reversed(shape), dtype=torch.float64, device=backend).permute(3, 2, 1, 0)
    for grad_out in (torch.ones((), dtype=torch.float64, device=backend).expand(shape), other):
        expected = run(reference.conv2d, tensors, options, grad_out)
        actual = run(functional.conv2d, tensors, options, grad_out)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_that_are_asked_for(
    wanted: tuple[int, ...], groups: int, backend: torch.device
) -> None:
    case = ConvCase("wanted", in_channels=4, groups=groups, activation="relu")
    tensors, options = case.make(torch.float64, backend)
    inputs = [t.requires_grad_(bool(w)) for t, w in zip(tensors, wanted, strict=True)]
    asked = [t for t in inputs if t.requires_grad]
    out, expected = (m.conv2d(*inputs, **options) for m in (functional, reference))
    ours, theirs = (torch.autograd.grad(o.square().sum(), asked) for o in (out, expected))
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)


def test_no_input_channels_give_the_bias(backend: torch.device) -> None:
    input = torch.randn(2, 0, 4, 5, device=backend, requires_grad=True)
    weight = torch.randn(3, 0, 2, 2, device=backend, requires_grad=True)
    bias = torch.randn(3, device=backend, requires_grad=True)
    out = functional.conv2d(input, weight, bias)
    assert torch.equal(out, bias.view(1, 3, 1, 1).expand(2, 3, 3, 4))
    grads = torch.autograd.grad(out.sum(), [input, weight, bias])
    assert [g.shape for g in grads] == [input.shape, weight.shape, bias.shape]
    assert torch.equal(grads[2], torch.full((3,), 24.0, device=backend))


@pytest.mark.parametrize("case", [CASES[0], *CASES[-2:]], ids=lambda c: c.name)
def test_unbatched_input(case: ConvCase, backend: torch.device) -> None:
    (input, *rest), options = case.make(torch.float32, backend)
    input = input[0].requires_grad_()
    out = functional.conv2d(input, *rest, **options)
    batched = functional.conv2d(input[None], *rest, **options)
    assert torch.equal(out, batched[0])
    ours, theirs = (torch.autograd.grad(o.sum(), input)[0] for o in (out, batched))
    assert torch.equal(ours, theirs)


REPEATED = ["beyond tiles", "many images", "depthwise", "groups", "stride 2, channels-last"]


@pytest.mark.parametrize("name", REPEATED)
def test_a_repeated_run_is_bitwise_equal(name: str, backend: torch.device) -> None:
    case = next(c for c in CASES if c.name == name)
    tensors, options = case.make(torch.float32, backend)
    grad_out = draw_grad_out(case, tensors, options)
    first, second = (run(functional.conv2d, tensors, options, grad_out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_number_of_threads_changes_nothing(
    case: ConvCase, dtype: torch.dtype, threads: None
) -> None:
    tensors, options = case.make(dtype, "cpu")
    grad_out = draw_grad_out(case, tensors, options)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(getattr(functional, case.op), tensors, options, grad_out))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def assert_nan_and_infinity_go_as_in_the_reference(
    case: ConvCase, dtype: torch.dtype, device: torch.device
) -> None:
    tensors, options = case.make(dtype, device)
    tensors[0][0, 1, 2, 3] = torch.nan
    tensors[0][1, 0, -1, -1] = torch.inf
    grad_out = draw_grad_out(case, tensors, options)
    grad_out[0, 3, 1, 1] = torch.inf
    expected = run(reference.conv2d, tensors, options, grad_out)
    actual = run(functional.conv2d, tensors, options, grad_out)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan()) and torch.equal(a.isinf(), e.isinf()), name


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("groups", [1, 12])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_and_infinity_go_where_the_sums_carry_them(
    stride: int, groups: int, layout: str, backend: torch.device
) -> None:
    case = ConvCase(
        "nan",
        in_channels=12,
        out_channels=12 if groups == 12 else 20,
        groups=groups,
        padding=1,
        stride=stride,
        layout=layout,
    )
    assert_nan_and_infinity_go_as_in_the_reference(case, torch.float32, backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str | None, backend: torch.device) -> None:
    case = ConvCase(
        "check",
        size=(4, 5),
        in_channels=2,
        out_channels=2,
        stride=(1, 2),
        activation=activation,
        padding="valid" if activation else (1, 0),
    )
    tensors, options = case.make(torch.float64, backend, seed=3)
    inputs = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: functional.conv2d(*t, **options), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: functional.conv2d(*t, **options), inputs)


def test_second_derivative_with_uneven_padding(backend: torch.device) -> None:
    case = ConvCase("same", size=(5,), kernel=(2,), padding="same", activation="tanh")
    tensors, options = case.make(torch.float64, backend)
    inputs = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(lambda *t: functional.conv1d(*t, **options), inputs)
    kernels = [[1], [0, 1], [1], 1, "tanh"]
    torch.testing.assert_close(
        ConvFunction.apply(*inputs, *kernels), conv_composite(*inputs, *kernels)
    )


def test_activations_far_out(backend: torch.device) -> None:
    x = torch.tensor([-1e4, -90.0, -20, -6, -1e-4, -0.0, 0.0, 1e-4, 6, 20, 90, 1e4], device=backend)
    x = torch.cat([x, x.new_tensor([torch.nan, torch.inf])])
    for activation in ACTIVATIONS[1:]:
        out, grad, expected, expected_grad = [], [], [], []
        for value in x.view(-1, 1, 1):  # apart: a NaN goes into every sum of its row
            ours = value.clone().requires_grad_()
            result = functional.conv1d(ours, x.new_ones(1, 1, 1), activation=activation)
            theirs = value.double().requires_grad_()
            wanted = _ACTIVATIONS[activation](theirs)
            out.append(result)
            expected.append(wanted)
            grad += torch.autograd.grad(result, ours)
            expected_grad += torch.autograd.grad(wanted, theirs)
        torch.testing.assert_close(
            torch.cat(out), torch.cat(expected).float(), equal_nan=True, msg=str(activation)
        )
        finite = torch.cat(grad)[:-2], torch.cat(expected_grad).float()[:-2]
        torch.testing.assert_close(*finite, msg=str(activation))


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (ValueError, "conv2d: input must have 4 dimensions, got [3, 7, 6]", {"input": (3, 7, 6)}),
        (ValueError, "conv2d: weight must have 4 dimensions, got [4, 3, 3]", {"weight": (4, 3, 3)}),
        (
            ValueError,
            "conv2d: weight must have input's channels / groups (3 / 1) in its second dimension, "
            "got [4, 2, 3, 3]",
            {"weight": (4, 2, 3, 3)},
        ),
        (
            ValueError,
            "conv2d: weight must have a positive multiple of groups (3) output channels, "
            "got [4, 1, 3, 3]",
            {"weight": (4, 1, 3, 3), "groups": 3},
        ),
        (
            ValueError,
            "conv2d: weight must have a dilated kernel no larger than the padded input (6), got 7 "
            "along axis 1",
            {"dilation": [1, 3]},
        ),
        (ValueError, "conv2d: bias must have the shape [4], got [5]", {"bias": (5,)}),
        (
            ValueError,
            "conv2d: stride must be at least 1 and less than 536870911, got [0, 1]",
            {"stride": [0, 1]},
        ),
        (
            ValueError,
            "conv2d: padding must be at least 0 and less than 536870911, got [0, 0, -1, 0]",
            {"padding": [0, 0, -1, 0]},
        ),
        (ValueError, "conv2d: padding must have 4 elements, got [1, 1]", {"padding": [1, 1]}),
        (ValueError, "conv2d: dilation must have 2 elements, got [1]", {"dilation": [1]}),
        (ValueError, "conv: stride must have 1, 2 or 3 elements, got []", {"stride": []}),
        (ValueError, "conv2d: groups must be positive, got 0", {"groups": 0}),
        (
            ValueError,
            "conv2d: activation must be None, 'relu', 'gelu', 'silu', 'leaky_relu', 'sigmoid' or "
            "'tanh', got 'elu'",
            {"activation": "elu"},
        ),
        (
            TypeError,
            "conv2d: weight must have the dtype of input (Float), got Double",
            {"weight_dtype": torch.float64},
        ),
        (
            TypeError,
            "conv2d: input must be float32, float64, float16 or bfloat16, got Int",
            {"input_dtype": torch.int32},
        ),
    ],
)
def test_errors(error: type, text: str, change: dict, backend: torch.device) -> None:
    def make(name: str, *shape: int) -> Tensor:
        dtype = change.get(f"{name}_dtype", torch.float32)
        return torch.ones(change.get(name, shape), dtype=dtype, device=backend)

    tensors = [make("input", 2, 3, 7, 6), make("weight", 4, 3, 3, 3), make("bias", 4)]
    defaults = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
    options = [change.get(key, value) for key, value in (defaults | {"activation": None}).items()]
    for call in (_route.kernels().conv_forward, torch.ops.fused.conv_forward):
        with pytest.raises(error) as caught:
            call(*tensors, *options, False)
        assert str(caught.value).splitlines()[0] == text
        assert type(caught.value) is error


def test_backward_checks_what_it_gets(backend: torch.device) -> None:
    input, weight = torch.ones(2, 3, 7, device=backend), torch.ones(4, 3, 3, device=backend)
    options = ([1], [0, 0], [1], 1)
    backward = _route.kernels().conv_backward
    wanted = (True, True, True)
    with pytest.raises(
        ValueError, match=r"conv1d: grad_output must have the shape \[2, 4, 5\], got"
    ):
        backward(torch.ones(2, 4, 6, device=backend), input, weight, None, *options, None, *wanted)
    grad = torch.ones(2, 4, 5, device=backend)
    with pytest.raises(ValueError, match=r"conv1d: saved must be given with an activation"):
        backward(grad, input, weight, None, *options, "relu", *wanted)
    with pytest.raises(TypeError, match=r"conv1d: grad_output must have the dtype of input"):
        backward(grad.double(), input, weight, None, *options, None, *wanted)


def test_python_errors() -> None:
    input, weight = torch.ones(1, 1, 4), torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match=r"conv1d: activation must be None, 'relu', .*, got 'elu'"):
        functional.conv1d(input, weight, activation="elu")
    with pytest.raises(ValueError, match=r"conv1d: stride must be 1 with padding='same', got"):
        functional.conv1d(input, weight, stride=2, padding="same")
    with pytest.raises(ValueError, match=r"conv1d: padding must be numbers, .*, got 'full'"):
        functional.conv1d(input, weight, padding="full")
    for name, value in (("stride", 1.5), ("dilation", (1, 1, 1)), ("padding", (1, 2, 1, 2))):
        with pytest.raises(ValueError) as caught:
            functional.conv2d(input.unsqueeze(0), weight.unsqueeze(0), **{name: value})
        assert str(caught.value) == f"conv2d: {name} must be one int or 2, got {value}"
    with pytest.raises(ValueError, match=r"^conv2d: input must have 3 or 4 dimensions, got \[4\]"):
        functional.conv2d(input[0, 0], weight.unsqueeze(0))


def test_relu_stops_an_infinite_gradient(backend: torch.device) -> None:
    input = torch.tensor([[[-1.0, 2.0]]], device=backend, requires_grad=True)
    weight = torch.ones(1, 1, 1, device=backend)
    for grad_out in (
        torch.full((1, 1, 2), torch.inf, device=backend),
        torch.tensor(torch.inf, device=backend).expand(1, 1, 2),
    ):
        out = functional.conv1d(input, weight, activation="relu")
        (grad,) = torch.autograd.grad(out, input, grad_out)
        assert grad.tolist() == [[[0.0, torch.inf]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_grad_out_in_another_layout_than_the_result(
    dtype: torch.dtype, backend: torch.device
) -> None:
    case = ConvCase("layouts", activation="relu", layout="channels-last", out_channels=17)
    tensors, options = case.make(dtype, backend)
    grad_out = draw_grad_out(case, tensors, options)
    same, other = (
        run(functional.conv2d, tensors, options, g) for g in (grad_out, grad_out.contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(same, other, strict=True))
