"""What torch.utils.flop_counter counts for fused's ops: as much as for stock's in their place.

Products alone count, whatever causality or a window leaves out. The counter's module imports
triton, where there is one, which takes longer than fused itself: the formulas are registered when
somebody else imports it.
"""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Shape = Sequence[int]

_COUNTER = "torch.utils.flop_counter"


def register_formulas() -> None:
    """Now, or as soon as the counter is imported."""
    module = sys.modules.get(_COUNTER)
    if module is None:
        sys.meta_path.insert(0, _Finder())
    else:
        _register(module)


class _Finder:
    """Finds the counter's module, once, as one that registers the formulas when it has run."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        return spec_from_file_location(name, spec.origin, loader=_Loader(name, spec.origin))


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register(module)


def _register(counter: ModuleType) -> None:
    ops = torch.ops.fused
    for op, formula in (
        (ops.conv_forward, _conv_forward),
        (ops.conv_backward, _conv_backward),
        (ops.lstm_cell_forward, _lstm_cell_forward),
        (ops.lstm_cell_backward, _lstm_cell_backward),
        (ops.lstm_layer_forward, _lstm_layer_forward),
        (ops.lstm_layer_backward, _lstm_layer_backward),
    ):
        counter.register_flop_formula(op)(formula)
    counter.register_flop_formula(ops.attention_forward, get_raw=True)(_attention_forward)
    counter.register_flop_formula(ops.attention_backward, get_raw=True)(_attention_backward)


def _conv_forward(_: Shape, weight: Shape, *_options: Any, out_shape: Any, **_kwargs: Any) -> int:
    return 2 * prod(out_shape[0]) * prod(weight[1:])


def _conv_backward(
    grad_out: Shape, input: Shape, weight: Shape, *options: Any, **_kwargs: Any
) -> int:
    want_input, want_weight, _ = options[-3:]
    taps = prod(weight[2:])
    # For the weight stock counts all channels of the input, groups or not.
    channels = weight[1] * want_input + input[1] * want_weight
    return 2 * prod(grad_out) * taps * channels


def _lstm_cell_forward(
    input: Shape, _h: Shape, _c: Shape, w_ih: Shape, w_hh: Shape, *_bias: Any, **_kwargs: Any
) -> int:
    return 2 * input[0] * (prod(w_ih) + prod(w_hh))


def _lstm_cell_backward(*arguments: Any, **_kwargs: Any) -> int:
    _, _, input, _, _, w_ih, w_hh, *_, needs = arguments
    products = prod(w_ih) * (needs[0] + needs[3]) + prod(w_hh) * (needs[1] + needs[4])
    return 2 * input[0] * products


def _lstm_layer_forward(
    input: Shape, _h0: Shape, _c0: Shape, w_ih: Shape, w_hh: Shape,
    _b_ih: Any, _b_hh: Any, w_hr: Shape | None, *_options: Any, **_kwargs: Any,
) -> int:  # fmt: skip
    return 2 * prod(input[:-1]) * (prod(w_ih) + prod(w_hh) + prod(w_hr or (0,)))


def _lstm_layer_backward(*arguments: Any, **_kwargs: Any) -> int:
    _, _, _, input, _, c0, w_ih, w_hh, w_hr, *_, needs = arguments
    rows = prod(input[:-1])
    rows_with_state = rows if needs[1] else rows - c0[0]  # the first step's came from nobody
    products = rows * prod(w_ih) * (needs[0] + needs[3])
    products += prod(w_hh) * (rows_with_state + rows * needs[4])
    products += rows * prod(w_hr or (0,)) * (1 + needs[6])
    return int(2 * products)


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any, **_kwargs: Any) -> int:
    return 2 * _num_scores(q, k, *options[4:6]) * (q.shape[-1] + v.shape[-1])


def _attention_backward(_: Tensor, _lse: Any, *inputs: Any, **_kwargs: Any) -> int:
    q, k, v, *others = inputs
    # The scores again, and two products more for each of the forward pass's.
    return 2 * _num_scores(q, k, *others[6:8]) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _num_scores(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Any) -> int:
    if cu_seqlens_q is None:
        return q[..., 0].numel() * k.shape[-2]
    heads = q.shape[1]
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.is_meta:  # as if all were as long
        return heads * q.shape[0] * k.shape[0] // max(cu_seqlens_q.shape[0] - 1, 1)
    return heads * int((cu_seqlens_q.long().diff() * cu_seqlens_k.long().diff()).sum())
