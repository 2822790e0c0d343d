"""The reference models: both forms are the same model, and each does what its docstring says."""

import copy
import math

import pytest
import torch
from torch import nn

from fused.models import GPT, ConvNet, LSTMLanguageModel
from fused.models._layers import StockConv2d
from fused.testing import assert_as_accurate_as_stock

LAYERS = ("stock", "fused")

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name, layers, **options):
    torch.manual_seed(0)
    if name == "convnet":
        return ConvNet(3, 10, **{"channels": (8, 16), **options}, layers=layers)
    if name == "lstm":
        sizes = {"embedding_dim": 12, "hidden_size": 20, "num_layers": 2}
        return LSTMLanguageModel(61, **{**sizes, **options}, layers=layers)
    sizes = {"context_length": 16, "embed_dim": 32, "num_heads": 4, "num_layers": 2}
    return GPT(61, **{**sizes, **options}, layers=layers)


def example_input(name):
    generator = torch.Generator().manual_seed(1)
    if name == "convnet":
        return torch.randn(4, 3, 12, 9, generator=generator)
    return torch.randint(61, (3, 11), generator=generator)


def output(model, inputs):
    out = model(inputs)
    return out[0] if isinstance(out, tuple) else out


MODELS = ("convnet", "lstm", "gpt")
LANGUAGE_MODELS = ("lstm", "gpt")


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", MODELS)
def test_output_shape_and_gradients(name, layers):
    model, inputs = make(name, layers), example_input(name)
    out = output(model, inputs)
    assert out.shape == ((4, 10) if name == "convnet" else (3, 11, 61))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_one_seed_makes_the_same_model_of_both_forms(name):
    stock, twin = (make(name, layers) for layers in LAYERS)
    assert list(stock.state_dict()) == list(twin.state_dict())
    for key, parameter in stock.state_dict().items():
        assert torch.equal(parameter, twin.state_dict()[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_compute_the_same(name):
    stock, twin = (make(name, layers) for layers in LAYERS)
    exact = copy.deepcopy(stock).double()
    inputs = example_input(name)
    results = []
    for model in (twin, exact, stock):
        moved = inputs.to(next(model.parameters()).dtype) if name == "convnet" else inputs
        out = output(model, moved)
        out.square().mean().backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        results.append({"output": out, **gradients})
    for key in results[0]:
        assert_as_accurate_as_stock(*(result[key] for result in results), key)


@pytest.mark.parametrize("name", MODELS)
def test_first_outputs_are_nearly_uniform(name):
    # A fresh classifier that prefers a class has been badly initialised.
    probabilities = output(make(name, "stock"), example_input(name)).softmax(-1)
    uniform = 1 / probabilities.shape[-1]
    assert 0.5 * uniform < probabilities.min() and probabilities.max() < 2 * uniform


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", MODELS)
def test_copies_are_independent(name, layers):
    model, inputs = make(name, layers).eval(), example_input(name)
    twin = copy.deepcopy(model)
    before = output(model, inputs)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(output(model, inputs), before, rtol=0, atol=0)
    assert not torch.equal(output(twin, inputs), before)


@pytest.mark.parametrize("name", MODELS)
def test_unknown_layers(name):
    with pytest.raises(ValueError, match="models: layers must be 'stock' or 'fused', got 'other'"):
        make(name, "other")


# ConvNet


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("side", [8, 28, 32])
def test_convnet_takes_every_data_set_size(side, layers):
    model = ConvNet(1, layers=layers)
    assert model(torch.randn(2, 1, side, side)).shape == (2, 10)


def test_convnet_needs_a_stage():
    with pytest.raises(ValueError, match="ConvNet: channels must name at least one stage"):
        ConvNet(channels=(), layers="stock")


def test_stock_convolution_applies_its_activation():
    torch.manual_seed(0)
    layer = StockConv2d(2, 3, 3, activation="silu")
    image = torch.randn(1, 2, 5, 5)
    linear = nn.functional.conv2d(image, layer.weight, layer.bias)
    torch.testing.assert_close(layer(image), linear * linear.sigmoid())
    assert "activation='silu'" in repr(layer)
    assert layer.state_dict().keys() == nn.Conv2d(2, 3, 3).state_dict().keys()
    with pytest.raises(ValueError, match=r"activation must be None or one of relu, .*, got 'relv'"):
        StockConv2d(2, 3, 3, activation="relv")


# Language models


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_token_is_not_seen_before_its_time(name, layers):
    model, tokens = make(name, layers).eval(), example_input(name)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = output(model, tokens), output(model, changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("layers", LAYERS)
def test_lstm_state_goes_on(layers):
    model, tokens = make("lstm", layers), example_input("lstm")
    whole, last_state = model(tokens)
    first, state = model(tokens[:, :4])
    second, state = model(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state, last_state)


@pytest.mark.parametrize("layers", LAYERS)
def test_gpt_context_is_limited(layers):
    with pytest.raises(ValueError, match="GPT: tokens must be at most 16 per row, got 17"):
        make("gpt", layers)(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_tied_weights_are_one_parameter(name, layers):
    options = {"embedding_dim": 20} if name == "lstm" else {}
    tied = make(name, layers, tie_weights=True, **options)
    untied = make(name, layers, tie_weights=False, **options)
    count = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert count == 61 * (20 if name == "lstm" else 32)
    assert tied.state_dict().keys() == untied.state_dict().keys()


def test_lstm_cannot_tie_different_widths():
    with pytest.raises(ValueError, match=r"embedding_dim must equal hidden_size \(20\).*got 12"):
        make("lstm", "stock", tie_weights=True)


def test_lstm_initialisation():
    model = make("lstm", "stock")
    recurrent = model.lstm.weight_hh_l0.detach()
    for gate in recurrent.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(20))
    bias = (model.lstm.bias_ih_l0 + model.lstm.bias_hh_l0).detach()
    assert [gate.unique().tolist() for gate in bias.chunk(4)] == [[0.0], [1.0], [0.0], [0.0]]


def test_gpt_initialisation():
    model = GPT(layers="stock")
    assert math.isclose(model.token_embedding.weight.std().item(), 0.02, rel_tol=0.05)
    branch_end = model.blocks[0].mlp[2].weight.std().item()
    assert math.isclose(branch_end, 0.02 / math.sqrt(8), rel_tol=0.05)
    assert model.blocks[0].norm1.weight.eq(1).all()
    assert model.blocks[0].attention.in_proj_bias.eq(0).all()


# Generation


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_generate_takes_the_likeliest(name, layers):
    model, prompt = make(name, layers).train(), example_input(name)
    grown = model.generate(prompt, 9, temperature=0)  # for GPT past its context of 16
    assert model.training
    model.eval()
    expected = prompt
    for _ in range(9):
        window = expected[:, -16:] if name == "gpt" else expected
        expected = torch.cat([expected, output(model, window)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(grown, expected)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_generate_draws(name):
    model, prompt = make(name, "stock"), example_input(name)

    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 8, generator=generator, **options)

    assert draw(1).shape == (3, 19)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), draw(2, temperature=0))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_generate_refuses(name):
    model, prompt = make(name, "stock"), example_input(name)
    with pytest.raises(ValueError, match="generate: temperature must be at least 0, got -1"):
        model.generate(prompt, 1, temperature=-1)
    with pytest.raises(ValueError, match="generate: top_k must be at least 1, got 0"):
        model.generate(prompt, 1, top_k=0)
    with pytest.raises(
        ValueError, match=r"tokens must be \[B, T\] with T at least 1, got \[3, 0\]"
    ):
        model.generate(prompt[:, :0], 1)
