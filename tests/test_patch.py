"""fused.patch and fused.unpatch: what is swapped, what stays, and that kernels then run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fused
from fused import functional


class Subclass(nn.MultiheadAttention):
    pass


def encoder(**options: object) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def launches(function, *args, **kwargs) -> int:
    """How many attention kernels a call starts, by the profiler."""
    with torch.profiler.profile() as profile:
        function(*args, **kwargs)
    return sum(e.count for e in profile.key_averages() if e.key == "fused::attention_forward")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_patched_encoder_runs_kernels_in_eval_without_grad(padded: bool, activation: str) -> None:
    model = encoder(activation=activation).eval()
    x = torch.randn(3, 7, 16)
    mask = None
    if padded:
        mask = torch.zeros(3, 7, dtype=torch.bool)
        mask[1, 4:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)
        assert launches(model, x, src_key_padding_mask=mask) == 0
        fused.patch(model)
        actual = model(x, src_key_padding_mask=mask)
        assert launches(model, x, src_key_padding_mask=mask) == 2
        # A single layer, by itself.
        assert launches(model.layers[0], x, src_key_padding_mask=mask) == 1
        visible = torch.ones(3, 7, dtype=torch.bool) if mask is None else ~mask
        torch.testing.assert_close(actual[visible], expected[visible])
        assert (expected[~visible] == 0).all()
        assert (actual[~visible] != 0).all()  # as patch's docstring says
        fused.unpatch(model)
        assert launches(model, x, src_key_padding_mask=mask) == 0
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected)


def test_keeps_parameters_hooks_and_mode_and_undoes_itself() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": encoder()})
    model["a"].eval()
    calls: list[str] = []
    model["a"].register_forward_hook(lambda *_: calls.append("hook"))
    before = {name: id(p) for name, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    attributes = copy.deepcopy({k: v for k, v in model["b"].__dict__.items() if k[0] != "_"})

    report = fused.patch(model)
    assert report.replaced["a"] == "MultiheadAttention -> fused.Attention"
    assert set(report.replaced) == {"a", "b.layers.0.self_attn", "b.layers.1.self_attn"}
    assert report.left_alone == {}
    assert "a: MultiheadAttention -> fused.Attention" in str(report)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert type(model["a"]) is fused.Attention and not model["a"].training
    x = torch.randn(4, 2, 8)
    model["a"](x, x, x, need_weights=False)
    assert calls == ["hook"]
    assert fused.patch(model).replaced == {}

    fused.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert {k: v for k, v in model["b"].__dict__.items() if k[0] != "_"} == attributes
    assert not any(key.startswith("_fused") for m in model.modules() for key in m.__dict__)


def test_leaves_alone_what_it_must_and_says_why() -> None:
    parametrized = nn.MultiheadAttention(8, 2)
    parametrizations.weight_norm(parametrized, "in_proj_weight")
    model = nn.ModuleDict({"sub": Subclass(8, 2), "par": parametrized, "linear": nn.Linear(2, 2)})
    report = fused.patch(model)
    assert report.replaced == {}
    assert report.left_alone == {
        "sub": "Subclass is a subclass of MultiheadAttention",
        "par": "parametrized",
    }
    assert type(model["sub"]) is Subclass


def test_the_model_itself_and_a_copy_of_it() -> None:
    model = nn.MultiheadAttention(8, 2)
    fused.patch(model)
    assert type(model) is fused.Attention
    twin = copy.deepcopy(model)
    fused.unpatch(twin)
    assert type(twin) is nn.MultiheadAttention and type(model) is fused.Attention


class EncoderLayer(nn.TransformerEncoderLayer):
    pass


class Encoder(nn.TransformerEncoder):
    pass


def test_subclasses_of_the_encoder_run_kernels_too() -> None:
    layer = EncoderLayer(16, 4, 32, batch_first=True)
    model = Encoder(layer, 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    fused.patch(model)
    with torch.no_grad():
        assert launches(model, torch.randn(2, 5, 16), src_key_padding_mask=padding) == 2
    fused.unpatch(model)
    assert model.use_nested_tensor and model.layers[0].activation_relu_or_gelu == 1


def test_a_compiled_model_is_traced_again() -> None:
    model = encoder().layers[0].eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = compiled(x)
        fused.patch(compiled)
        torch.testing.assert_close(compiled(x), expected)
        assert launches(compiled, x) == 1
        fused.unpatch(compiled)
        compiled(x)
        assert launches(compiled, x) == 0


def test_unpatch_leaves_what_was_parametrized_since() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    fused.patch(model)
    parametrizations.weight_norm(model[0], "in_proj_weight")
    report = fused.unpatch(model)
    assert report.left_alone == {"0": "parametrized since"} and report.replaced == {}
    x = torch.randn(3, 1, 8)
    model[0](x, x, x, need_weights=False)
    parametrize.remove_parametrizations(model[0], "in_proj_weight")
    assert fused.unpatch(model).left_alone == {}
    assert type(model[0]) is nn.MultiheadAttention


def test_unpatch_leaves_modules_that_were_fused_from_the_start() -> None:
    model = nn.Sequential(fused.Attention(8, 2))
    fused.patch(model)
    fused.unpatch(model)
    assert type(model[0]) is fused.Attention


def test_every_stock_module_with_a_twin_gives_the_same_numbers_patched() -> None:
    cases = [
        (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), torch.randn(2, 4, 9, 9)),
        (nn.Conv3d(2, 3, 2, bias=False), torch.randn(1, 2, 4, 5, 6)),
        (nn.LSTM(4, 5, num_layers=2, bidirectional=True), torch.randn(3, 2, 4)),
        (nn.LSTMCell(4, 5), torch.randn(2, 4)),
    ]
    for module, x in cases:
        stock = type(module)
        expected, text, keys = module(x), repr(module), list(module.state_dict())
        report = fused.patch(module)
        assert report.replaced == {"": f"{stock.__name__} -> fused.{stock.__name__}"}
        torch.testing.assert_close(module(x), expected)
        assert repr(module) == text and list(module.state_dict()) == keys
        fused.unpatch(module)
        assert type(module) is stock


class Tracer(torch.fx.Tracer):
    """The README's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_ours = m.__module__.startswith("fused.modules")
        return is_ours or super().is_leaf_module(m, module_qualified_name)


def test_fx_records_patched_modules_as_it_does_stocks() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn = nn.Conv1d(4, 8, 3), nn.LSTM(6, 6)
            self.cell, self.attention = nn.LSTMCell(6, 6), nn.MultiheadAttention(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.rnn(self.conv(x))[0]
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.cell(x[0])[0]

    model, x = Tagger(), torch.randn(5, 4, 8)
    stock = [(node.op, node.target) for node in torch.fx.symbolic_trace(model).graph.nodes]
    fused.patch(model)
    graph = Tracer().trace(model)
    assert [(node.op, node.target) for node in graph.nodes] == stock
    assert torch.equal(torch.fx.GraphModule(model, graph)(x), model(x))


def test_fx_records_calls_of_functions() -> None:
    def function(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = functional.scaled_dot_product_attention(q, q, q, is_causal=True, softcap=2.0)
        return functional.conv2d(out, weight, activation="relu")

    graph = torch.fx.symbolic_trace(function)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == [functional.scaled_dot_product_attention, functional.conv2d]
    q, weight = torch.randn(2, 4, 5, 8), torch.randn(3, 4, 2, 2)
    assert torch.equal(graph(q, weight), function(q, weight))

    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), nn.ReLU())
    fused.patch(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(q), model(q))
