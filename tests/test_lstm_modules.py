"""fused.LSTM and fused.LSTMCell as drop-ins for their twins in torch.nn."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.utils import _pytree as pytree

import fused
from fused import _route
from fused.testing.dispatch import OperatorLog

OURS = {nn.LSTM: fused.LSTM, nn.LSTMCell: fused.LSTMCell}
SIZES = {"input_size": 3, "hidden_size": 5}
CONFIGURATIONS = [
    {**SIZES, "num_layers": layers, "bias": bias, "batch_first": batch_first,
     "bidirectional": bidirectional, "proj_size": proj_size}
    for layers, bias, batch_first, bidirectional, proj_size in itertools.product(
        (1, 2), (True, False), (False, True), (False, True), (0, 2)
    )
]  # fmt: skip


def configuration_id(configuration: dict[str, Any]) -> str:
    text = [f"{k}={v}" for k, v in configuration.items() if k not in SIZES and v not in (0, False)]
    return ",".join(text)


def pair(twin: type[nn.Module], *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Stock and fused module with the same parameters."""
    stock, module = twin(*args, **kwargs), OURS[twin](*args, **kwargs)
    module.load_state_dict(stock.state_dict())
    return stock, module


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def assert_same(ours: Any, stock: Any) -> None:
    actual, expected = tensors_of(ours), tensors_of(stock)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def assert_same_with_gradients(stock: nn.Module, module: nn.Module, *args: Any) -> None:
    """Outputs and the gradients of inputs and parameters, for a loss that weighs all outputs."""
    results = []
    for m in (module, stock):
        inputs = pytree.tree_map_only(
            Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), args
        )
        outputs = [t for t in tensors_of(m(*inputs)) if t.requires_grad]
        wanted = [t for t in tensors_of(inputs) if t.requires_grad] + list(m.parameters())
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in outputs)
        results.append((outputs, torch.autograd.grad(loss, wanted)))
    assert_same(*results)


def inputs_of(configuration: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[tuple]:
    """Padded, unbatched and packed input, each without and with a state."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape, dtype=dtype)  # noqa: E731
    padded = draw(4, 3, 3)
    batch = 4 if configuration["batch_first"] else 3
    count = configuration["num_layers"] * (2 if configuration["bidirectional"] else 1)
    h_size = configuration["proj_size"] or 5

    def state(*batch: int) -> tuple[Tensor, Tensor]:
        return draw(count, *batch, h_size), draw(count, *batch, 5)

    lengths = [2, 4, 1]
    packed = pack_sequence([draw(n, 3) for n in lengths], enforce_sorted=False)
    falling = pack_padded_sequence(draw(4, 3, 3), [4, 4, 2])
    return [
        (padded,), (padded, state(batch)), (padded[0],), (padded[0], state()),
        (packed,), (packed, state(3)), (falling,), (falling, state(3)),
    ]  # fmt: skip


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=configuration_id)
def test_lstm_is_its_twin(configuration: dict[str, Any], backend: torch.device) -> None:
    stock, module = pair(nn.LSTM, **configuration, dtype=torch.float64)
    for args in inputs_of(configuration):
        assert_same_with_gradients(stock, module, *args)


@pytest.mark.parametrize("bias", [True, False])
def test_lstm_cell_is_its_twin(bias: bool, backend: torch.device) -> None:
    stock, module = pair(nn.LSTMCell, 3, 5, bias=bias, dtype=torch.float64)
    for batch in ((), (1,), (4,)):
        input, *state = (torch.randn(*batch, n, dtype=torch.float64) for n in (3, 5, 5))
        assert_same_with_gradients(stock, module, input)
        assert_same_with_gradients(stock, module, input, tuple(state))


@pytest.mark.parametrize("twin", OURS)
def test_new_states_may_be_written_to(twin: type[nn.Module], backend: torch.device) -> None:
    """As loops of reinforcement learning do, where an episode ended."""
    kept = torch.tensor([[1.0], [0.0], [0.5]])
    modules = pair(twin, 3, 5)

    def run(module: nn.Module) -> list[Tensor]:
        state = None
        for x in torch.linspace(-1, 1, 18).view(2, 3, 3):
            h, c = state = tensors_of(module(x if twin is nn.LSTMCell else x[None], state))[-2:]
            h.mul_(kept), c.mul_(kept)
        return list(torch.autograd.grad((h * c).sum(), list(module.parameters())))

    expected, actual = map(run, modules)
    assert_same(actual, expected)
    with OperatorLog() as log:
        assert_same(run(modules[1]), expected)
    assert any(name.startswith("fused.lstm") for name in log.names)


@pytest.mark.parametrize("twin, count", [(nn.LSTM, 32), (nn.LSTMCell, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pytorchs_own_samples(
    twin: type[nn.Module], count: int, dtype: torch.dtype, backend: torch.device
) -> None:
    """The module samples of PyTorch's test suite, each in training and evaluation."""
    (info,) = [info for info in module_db if info.module_cls is twin]
    for training in (True, False):
        samples = list(
            info.module_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=False, training=training
            )
        )
        assert len(samples) >= count
        for sample in samples:
            constructor, forward = sample.constructor_input, sample.forward_input
            stock, module = pair(twin, *constructor.args, **constructor.kwargs, dtype=dtype)
            stock.train(training), module.train(training)
            assert_same_with_gradients(stock, module, *forward.args)
            if sample.reference_fn is not None:
                expected = sample.reference_fn(stock, *forward.args)
                assert_same(module(*forward.args), expected)


@pytest.mark.parametrize("twin, count", [(nn.LSTM, 14), (nn.LSTMCell, 4)])
def test_pytorchs_own_error_samples(twin: type[nn.Module], count: int) -> None:
    (info,) = [info for info in module_db if info.module_cls is twin]
    samples = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
    )
    assert len(samples) >= count
    for sample in samples:
        given = sample.module_error_input
        constructor = given.constructor_input

        def make(constructor: Any = constructor) -> nn.Module:
            return OURS[twin](*constructor.args, **constructor.kwargs)

        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                make()
        else:
            module = make()
            with pytest.raises(sample.error_type, match=sample.error_regex):
                module(*given.forward_input.args)


def bad_calls() -> dict[str, tuple[type[nn.Module], Any, tuple]]:
    x, h, c = torch.randn(4, 2, 3), torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)
    packed = pack_padded_sequence(x, [4, 2])
    lstm, cell = nn.LSTM, nn.LSTMCell
    return {
        "4-D input": (lstm, {}, (x[None],)),
        "input size": (lstm, {}, (x[..., :2],)),
        "input dtype": (lstm, {}, (x.double(),)),
        "no steps": (lstm, {}, (x[:0],)),
        "h batch": (lstm, {}, (x, (h[:, :1], c))),
        "c size": (lstm, {}, (x, (h, c[..., :4]))),
        "h of a projection": (lstm, {"proj_size": 2}, (x, (h, c))),
        "2-D state": (lstm, {}, (x, (h[0], c[0]))),
        "three states": (lstm, {}, (x, (h, c, c))),
        "three states of a packed input": (lstm, {}, (packed, (h, c, c))),
        "3-D state of unbatched input": (lstm, {}, (x[:, 0], (h, c))),
        "cell 3-D input": (cell, {}, (x,)),
        "cell 3-D state": (cell, {}, (x[0], (h, c))),
        "cell input size": (cell, {}, (x[0, :, :2], (h[0], c[0]))),
        "cell input size without state": (cell, {}, (x[0, :, :2],)),
        "cell batch": (cell, {}, (x[0, :1], (h[0], c[0]))),
        "cell c size": (cell, {}, (x[0], (h[0], c[0, :, :4]))),
        "cell state of one row": (cell, {}, (x[0], (h[0, 0], c[0, 0]))),
        "cell without c": (cell, {}, (x[0], (h[0],))),
        "cell state as a tensor": (cell, {}, (x[0], h[0])),
        "cell three states": (cell, {}, (x[0], (h[0], c[0], c[0]))),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_errors_are_those_of_the_twin(name: str) -> None:
    twin, options, args = bad_calls()[name]
    stock, module = pair(twin, 3, 5, **options)
    with pytest.raises(Exception) as expected:
        stock(*args)
    with pytest.raises(type(expected.value)) as actual:
        module(*args)
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]


@pytest.mark.parametrize(
    "args, options",
    [((0, 4), {}), ((3, 0), {}), ((3, 4), {"proj_size": 4}), ((3, 4), {"dropout": 1.5}),
     ((3, 4), {"num_layers": 0}), ((3, 4.0), {}), ((3, 4), {"bias": 1})],
)  # fmt: skip
def test_constructor_errors_are_those_of_the_twin(args: tuple, options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as expected:
        nn.LSTM(*args, **options)
    with pytest.raises(type(expected.value)) as actual:
        fused.LSTM(*args, **options)
    assert str(actual.value) == str(expected.value)


def test_signatures_are_those_of_the_twins() -> None:
    assert inspect.signature(fused.LSTMCell) == inspect.signature(nn.LSTMCell)
    for ours, twin in ((fused.LSTM, nn.LSTM), (fused.LSTMCell, nn.LSTMCell)):
        parameters = inspect.signature(ours.forward).parameters
        assert list(parameters) == list(inspect.signature(twin.forward).parameters)
        assert parameters["hx"].default is None
    assert issubclass(fused.LSTMCell, nn.LSTMCell) and issubclass(fused.LSTM, nn.RNNBase)


@pytest.mark.parametrize(
    "twin, options", [(nn.LSTM, c) for c in CONFIGURATIONS[::5]] + [(nn.LSTMCell, SIZES)]
)
def test_copies_and_state(twin: type[nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    stock = twin(**options)
    torch.manual_seed(1)
    module = OURS[twin](**options)
    assert_same(dict(module.named_parameters()), dict(stock.named_parameters()))  # initialisation
    assert list(module.state_dict()) == list(stock.state_dict())
    assert repr(module) == repr(stock)
    stock.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(module).to(torch.float64).to(torch.float32),
    ]
    args = (torch.randn(4, 3),)
    expected = stock(*args)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)  # a copy shares no memory with it
    for made in copies:
        assert type(made) is type(module) and repr(made) == repr(stock)
        assert_same(made(*args), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_moves_every_parameter(dtype: torch.dtype) -> None:
    module = fused.LSTM(3, 5, 2, bidirectional=True, proj_size=2).to(dtype)
    module.flatten_parameters()
    output, state = module(torch.randn(4, 2, 3, dtype=dtype))
    assert {t.dtype for t in (output, *state, *module.parameters())} == {dtype}


def test_parametrize_and_functional_call(backend: torch.device) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for twin, name in ((nn.LSTM, "weight_hh_l0"), (nn.LSTMCell, "weight_hh")):
        stock, module = pair(twin, 3, 5, dtype=torch.float64)
        x = torch.randn(2, 3, dtype=torch.float64)
        swapped = {k: v + 1 for k, v in stock.named_parameters()}
        results = [torch.func.functional_call(m, swapped, (x,)) for m in (module, stock)]
        assert_same(*results)
        for m in (stock, module):
            parametrize.register_parametrization(m, name, Twice())
        assert_same_with_gradients(stock, module, x)
        parametrize.remove_parametrizations(module, name)
        assert_same(module(x), stock(x))


def test_replaced_parameters_are_used() -> None:
    stock, module = pair(nn.LSTM, 3, 5)
    x = torch.randn(4, 2, 3)
    for m in (stock, module):
        m.weight_ih_l0 = nn.Parameter(torch.ones(20, 3))
    assert_same(module(x), stock(x))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_dropout_draws_as_the_twin(training: bool, packed: bool) -> None:
    stock, module = pair(nn.LSTM, 3, 5, num_layers=3, dropout=0.4, bidirectional=True)
    stock.train(training), module.train(training)
    x = torch.randn(6, 4, 3)
    x = pack_padded_sequence(x, [6, 5, 5, 2]) if packed else x
    results = []
    for m in (module, stock):
        torch.manual_seed(3)
        results.append(m(x))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, "low"], ids=str)
def test_autocast_gives_the_twins_dtypes(dtype: torch.dtype, given: Any) -> None:
    given = dtype if given == "low" else given
    x = torch.randn(4, 3, 3).to(given)
    packed = pack_padded_sequence(x, [4, 2, 1])
    state = (torch.zeros(3, 5), torch.zeros(3, 5))
    calls: list[tuple[type[nn.Module], dict, tuple]] = [
        (nn.LSTMCell, {}, (x[0],)), (nn.LSTMCell, {}, (x[0], state)),
        (nn.LSTM, {"num_layers": 2}, (x,)), (nn.LSTM, {}, (packed,)),
        (nn.LSTM, {"proj_size": 2}, (x,)), (nn.LSTM, {"proj_size": 2}, (packed,)),
    ]  # fmt: skip
    for twin, options, args in calls:
        stock, module = pair(twin, 3, 5, **options)
        with torch.autocast("cpu", dtype=dtype):
            actual = tensors_of(module(*args))
            try:
                expected = tensors_of(stock(*args))
            except RuntimeError as error:  # oneDNN has no float16 LSTM for this CPU
                assert "primitive descriptor" in str(error)
                assert {t.dtype for t in actual} == {dtype}
                continue
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        bound = 4 * torch.finfo(torch.bfloat16).eps
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, atol=bound, rtol=bound)


def test_autocast_gives_every_packed_batch_the_same_dtypes() -> None:
    """PyTorch's own follow the lengths: oneDNN's kernel takes a batch of equal ones."""
    module = fused.LSTM(3, 5)
    batches = [pack_padded_sequence(torch.randn(4, 2, 3), n) for n in ([4, 2], [4, 4])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [t for batch in batches for t in tensors_of(module(batch))]
    assert {t.dtype for t in results if t.is_floating_point()} == {torch.float32}


def test_autocast_casts_a_repeated_cells_weights_once() -> None:
    module, x = fused.LSTMCell(3, 5), torch.randn(2, 3)
    with torch.profiler.profile() as profile, torch.autocast("cpu", dtype=torch.bfloat16):
        state = module(x)
        for _ in range(4):
            state = module(x, state)
    copies = [event for event in profile.events() if event.name == "aten::_to_copy"]
    # Four parameters once; input, h, c and the two results at each of five steps.
    assert 0 < len(copies) <= 4 + 5 * 5
    loss = state[0].sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_float64_under_autocast_stays() -> None:
    stock, module = pair(nn.LSTM, 3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(module(x), stock(x))


def test_what_no_kernel_covers_is_the_twins() -> None:
    stock, module = pair(nn.LSTM, 3, 5, dtype=torch.complex64)
    x = torch.randn(4, 2, 3, dtype=torch.complex64)
    assert_same(module(x), stock(x))
    stock, module = pair(nn.LSTMCell, 3, 5)
    x, h, c = torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 5).double()
    assert_same(module(x, (h, c)), stock(x, (h, c)))  # which promotes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_option_has_a_kernel(dtype: torch.dtype) -> None:
    decisions: set[tuple[str, str | None]] = set()
    with _route.listen(lambda op, device, reason: decisions.add((op, reason))):
        for configuration in CONFIGURATIONS:
            module = fused.LSTM(**configuration, dtype=dtype)
            for args in inputs_of(configuration, dtype):
                module(*args)
        cell = fused.LSTMCell(3, 5, dtype=dtype)
        cell(torch.randn(2, 3, dtype=dtype))
    assert decisions == {("lstm", None), ("lstm_cell", None)}


def test_explain_names_the_path_and_the_reason() -> None:
    x = torch.randn(4, 2, 3)
    explanation = fused.explain(fused.LSTM(3, 5, bidirectional=True), x)
    assert len(explanation.paths) == 2 and "composite" not in explanation.paths
    module = fused.LSTM(3, 5, dtype=torch.complex64)
    explanation = fused.explain(module, x.to(torch.complex64))
    assert explanation.paths == ("composite",) and "complex64" in str(explanation)


def test_a_cell_asks_for_each_weight_once() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return weight

    cell, counting = fused.LSTMCell(4, 5), Counting()
    parametrize.register_parametrization(cell, "weight_ih", counting)
    counting.calls = 0
    cell(torch.randn(2, 4))
    assert counting.calls == 1
