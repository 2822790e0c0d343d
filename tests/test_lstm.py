"""The LSTM kernels against the definition: every case, dtype and backend, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused import _route, reference
from fused._lstm import lstm_layer
from fused.functional import lstm_cell
from fused.testing import assert_as_accurate_as_stock
from fused.testing.cases.lstm import CASES, CELL_CASES, LSTMCase, LSTMCellCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CELL_NAMES = ("input", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")
LAYER_NAMES = (*CELL_NAMES, "w_hr")

each_dtype = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def leaves(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def stock_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def with_gradients(
    outputs: tuple[Tensor, ...], inputs: list[Tensor | None], grads: list[Tensor]
) -> list[Tensor]:
    """outputs and the gradients of all inputs."""
    wanted = [t for t in inputs if t is not None]
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


def draw_like(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator).to(out) for out in outputs]


def stock_layer(
    tensors: list[Tensor | None], batch_sizes: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of PyTorch's own LSTM; the reversed one as half of a bidirectional one.

    In float32 operator by operator, whose matrix products are those of our glue: oneDNN's kernel
    for a whole layer adds up in another order, with down to a quarter of their error.
    """
    input, h0, c0, *weights = tensors
    one_kernel = torch.backends.mkldnn.enabled and input.dtype != torch.float32
    given = [w for w in weights if w is not None]
    directions = 2 if reverse else 1
    hx = tuple(t.expand(directions, *t.shape) for t in (h0, c0))
    options = (weights[2] is not None, 1, 0.0, False, reverse)
    with torch.backends.mkldnn.flags(enabled=one_kernel):
        if batch_sizes is None:
            output, h_n, c_n = torch.lstm(input, hx, given * directions, *options, False)
        else:
            output, h_n, c_n = torch.lstm(input, batch_sizes, hx, given * directions, *options)
    return output[..., -h0.shape[1] :], h_n[-1], c_n[-1]


def compare(names: list[str], actual: list, expected: list, stock: list) -> None:
    for name, a, e, s in zip(names, actual, expected, stock, strict=True):
        assert_as_accurate_as_stock(a, e, s, name)


@each_dtype
@pytest.mark.parametrize("case", CELL_CASES, ids=lambda case: case.name)
def test_cell_forward_and_gradients(
    case: LSTMCellCase, dtype: torch.dtype, backend: torch.device
) -> None:
    tensors = case.make(dtype, backend)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = leaves(tensors, dtype)
        outputs = function(inputs[0], (inputs[1], inputs[2]), *inputs[3:])
        return with_gradients(outputs, inputs, grads)

    grads = draw_like((tensors[1], tensors[1]))
    names = ["h", "c", *(n for n, t in zip(CELL_NAMES, tensors, strict=True) if t is not None)]
    expected = run(reference.lstm_cell, torch.float64)
    compare(names, run(lstm_cell, dtype), expected, run(torch.lstm_cell, stock_dtype(dtype)))


@each_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layer_forward_and_gradients(
    case: LSTMCase, dtype: torch.dtype, backend: torch.device
) -> None:
    tensors, options = case.make(dtype, backend)

    def run_reference(*inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return reference.lstm(inputs[0], inputs[1:3], *inputs[3:], **options)

    def run_stock(*inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return stock_layer(list(inputs), **options)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = leaves(tensors, dtype)
        outputs = function(*inputs, **options)
        return with_gradients(outputs, inputs, draw_like(outputs))

    names = ["output", "h_n", "c_n"]
    names += [n for n, t in zip(LAYER_NAMES, tensors, strict=True) if t is not None]
    expected = run(run_reference, torch.float64)
    compare(names, run(lstm_layer, dtype), expected, run(run_stock, stock_dtype(dtype)))


@pytest.mark.parametrize("offset", [1, 2])
@each_dtype
def test_tensors_that_begin_between_packs(
    dtype: torch.dtype, offset: int, backend: torch.device
) -> None:
    """What the cell kernels read begins off the boundary of the accesses that they may make; what
    goes into matrix products stays, for a library may sum in another order then."""
    tensors = LSTMCellCase("plain").make(dtype, backend)
    grads = draw_like((tensors[1], tensors[1]))

    def run(place: Any) -> list[Tensor]:
        inputs = [
            place(t).requires_grad_() if name in ("c", "b_ih", "b_hh") else t
            for name, t in zip(CELL_NAMES, leaves(tensors, dtype), strict=True)
        ]
        outputs = lstm_cell(inputs[0], (inputs[1], inputs[2]), *inputs[3:])
        return with_gradients(outputs, inputs, [place(grad.to(dtype)) for grad in grads])

    def shifted(tensor: Tensor) -> Tensor:
        larger = tensor.new_zeros(tensor.numel() + offset)
        return larger[offset:].view(tensor.shape).copy_(tensor.detach()).detach()

    for aligned, other in zip(run(lambda t: t.detach().clone()), run(shifted), strict=True):
        assert torch.equal(aligned, other)


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_layer_with_some_gradients_missing(chosen: tuple[int, ...], backend: torch.device) -> None:
    """A loss on some outputs, and gradients of one input at a time."""
    tensors, options = LSTMCase("packed", lengths=(5, 4, 2), proj_size=2, reverse=True).make(
        torch.float64, backend
    )
    for index in range(len(tensors)):
        inputs = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        ours = lstm_layer(*inputs, **options)
        truth = reference.lstm(inputs[0], inputs[1:3], *inputs[3:], **options)
        pick = [sum((o[i] ** 2).sum() for i in chosen) for o in (ours, truth)]
        grads = [torch.autograd.grad(loss, inputs[index])[0] for loss in pick]
        torch.testing.assert_close(*grads, msg=lambda text, i=index: f"{LAYER_NAMES[i]}: {text}")


@pytest.mark.parametrize("chosen", [0, 1])
def test_cell_with_some_gradients_missing(chosen: int, backend: torch.device) -> None:
    tensors = LSTMCellCase("plain").make(torch.float64, backend)
    for index in range(len(tensors)):
        inputs = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        args = (inputs[0], (inputs[1], inputs[2]), *inputs[3:])
        losses = [f(*args)[chosen].square().sum() for f in (lstm_cell, reference.lstm_cell)]
        needed = [loss for loss in losses if loss.requires_grad]
        assert len(needed) == 2
        torch.testing.assert_close(*[torch.autograd.grad(x, inputs[index])[0] for x in losses])


def test_nan_stays_in_its_row_and_infinity_saturates(backend: torch.device) -> None:
    tensors, options = LSTMCase("plain", batch=4).make(torch.float32, backend)
    input, h0, c0 = tensors[:3]
    input[2, 1, 0] = torch.nan
    c0[3, 2] = torch.inf
    output, h_n, c_n = lstm_layer(*tensors, **options)
    truth = reference.lstm(input, (h0, c0), *tensors[3:], **options)
    assert torch.equal(output.isnan(), truth[0].isnan())
    assert output[2:, 1].isnan().all() and not output[:, 0].isnan().any()
    assert c_n[3, 2] == torch.inf and h_n.isfinite()[3].all()


def test_large_gates_saturate(backend: torch.device) -> None:
    tensors = LSTMCellCase("plain", input_size=1).make(torch.float32, backend)
    tensors[3] = torch.full_like(tensors[3], 1e30)
    tensors[0] = torch.tensor([[1e5], [-1e5], [0.0]], device=backend)
    h, c = lstm_cell(tensors[0], (tensors[1], tensors[2]), *tensors[3:])
    torch.testing.assert_close(c[0], tensors[2][0] + 1)
    assert torch.equal(c[1], torch.zeros_like(c[1])) and torch.equal(h[1], torch.zeros_like(h[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("many rows", "packed many", "packed projection reverse")],
    ids=lambda case: case.name,
)
def test_a_repeated_run_is_bitwise_equal(
    case: LSTMCase, dtype: torch.dtype, backend: torch.device
) -> None:
    tensors, options = case.make(dtype, backend)

    def run() -> list[Tensor]:
        inputs = leaves(tensors, dtype)
        outputs = lstm_layer(*inputs, **options)
        return with_gradients(outputs, inputs, draw_like(outputs))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# What is multiplied by our own products: few rows, and on older CPUs all but float16, go to the
# library, which promises nothing about threads. (Gates are the rows of the weights' gradients.)
OWN_ROWS = [
    c for c in CASES if (sum(c.lengths) or c.steps * c.batch) >= 32 and 4 * c.hidden_size >= 32
]
OWN_DTYPES = [torch.float16, torch.float32, torch.bfloat16]
OWN_DTYPES = OWN_DTYPES[: 1 if _route.kernels().isa() == "generic" else 3]


@pytest.mark.parametrize("dtype", OWN_DTYPES, ids=str)
@pytest.mark.parametrize("case", OWN_ROWS, ids=lambda case: case.name)
def test_the_number_of_threads_changes_nothing(
    case: LSTMCase, dtype: torch.dtype, threads: None
) -> None:
    """Threads go through rows or columns of a step together, or through rows of their own."""
    tensors, options = case.make(dtype, "cpu")
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        inputs = leaves(tensors, dtype)
        outputs = lstm_layer(*inputs, **options)
        results.append(with_gradients(outputs, inputs, draw_like(outputs)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("index", range(6))
def test_lazily_copied_tensors(index: int, threads: None) -> None:
    """Threads of a parallel region may only read them: inputs, and the gradient of the output."""
    torch.set_num_threads(2)
    tensors, options = LSTMCase("", batch=32, hidden_size=64).make(torch.float32, "cpu")
    tensors = [*tensors[:5], torch.ones(5, 32, 64)]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        *inputs, grad = tensors
        inputs = [t.detach().requires_grad_() for t in inputs]
        output = lstm_layer(*inputs, None, None, None, **options)[0]
        return list(torch.autograd.grad(output, inputs, grad))

    expected = run(tensors)
    tensors[index] = torch._lazy_clone(tensors[index])
    assert all(torch.equal(a, b) for a, b in zip(run(tensors), expected, strict=True))


def test_inputs_are_left_as_they_were(backend: torch.device) -> None:
    for case in (LSTMCase("plain"), LSTMCase("packed", lengths=(3, 2), proj_size=2)):
        tensors, options = case.make(torch.float32, backend)
        before = [None if t is None else t.clone() for t in tensors]
        inputs = leaves(tensors, torch.float32)
        outputs = lstm_layer(*inputs, **options)
        with_gradients(outputs, inputs, draw_like(outputs))
        for b, t in zip(before, inputs, strict=True):
            assert b is None or torch.equal(b, t)


def test_backward_through_a_stale_graph_raises(backend: torch.device) -> None:
    tensors, options = LSTMCase("plain").make(torch.float32, backend)
    inputs = leaves(tensors, torch.float32)
    output, _, _ = lstm_layer(*inputs, **options)
    with torch.no_grad():
        inputs[4].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


CELL_ERRORS = [
    (ValueError, "lstm_cell: input must have 2 dimensions, got [4]", "input", lambda t: t[0]),
    (ValueError, "lstm_cell: h must have the batch of input (2), got [3, 8]", "input",
     lambda t: t[:2]),
    (ValueError, "lstm_cell: h must have the shape [3, 8], got [3, 7]", "h", lambda t: t[:, :7]),
    (ValueError, "lstm_cell: w_ih must have the shape [32, 4], got [32, 3]", "w_ih",
     lambda t: t[:, :3]),
    (ValueError, "lstm_cell: w_hh must have the shape [32, 8], got [31, 8]", "w_hh",
     lambda t: t[:31]),
    (ValueError, "lstm_cell: b_hh must have the shape [32], got [1, 32]", "b_hh",
     lambda t: t[None]),
    (TypeError, "lstm_cell: w_hh must have the dtype of input (Float), got Double", "w_hh",
     Tensor.double),
    (TypeError, "lstm_cell: input must be float32, float64, float16 or bfloat16, got Int", "input",
     Tensor.int),
    (ValueError, "lstm_cell: b_ih must be on the device of input (cpu), got meta", "b_ih",
     lambda t: t.to("meta")),
]  # fmt: skip


@pytest.mark.parametrize("error, text, name, change", CELL_ERRORS, ids=[e[1] for e in CELL_ERRORS])
def test_cell_errors(error: type, text: str, name: str, change: Any, backend: torch.device) -> None:
    tensors = LSTMCellCase("plain").make(torch.float32, backend)
    index = CELL_NAMES.index(name)
    tensors[index] = change(tensors[index])
    check_error(_route.kernels().lstm_cell_forward, tensors, error, text)


LAYER_ERRORS = [
    (ValueError, "lstm: batch_sizes must add up to input's rows (9), got 8", [3, 3, 2]),
    (ValueError, "lstm: batch_sizes must fall from h0's batch (3), got 3 after 2", [2, 3, 4]),
    (ValueError, "lstm: batch_sizes must fall from h0's batch (3), got 4 after 3", [4, 3, 2]),
    (TypeError, "lstm: batch_sizes must be int64, got Int", torch.tensor([3, 3, 3]).int()),
]


@pytest.mark.parametrize("error, text, sizes", LAYER_ERRORS, ids=[e[1] for e in LAYER_ERRORS])
def test_layer_errors(
    error: type, text: str, sizes: list[int] | Tensor, backend: torch.device
) -> None:
    tensors, _ = LSTMCase("packed", lengths=(3, 3, 3)).make(torch.float32, backend)
    arguments = [*tensors, torch.as_tensor(sizes), False]
    check_error(_route.kernels().lstm_layer_forward, arguments, error, text)


def check_error(function: Any, arguments: list, error: type, text: str) -> None:
    with pytest.raises(error) as caught:
        function(*arguments)
    assert str(caught.value).splitlines()[0] == text
    assert type(caught.value) is error
