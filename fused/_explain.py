"""`fused.explain`: which path a call would take, and why each other one was refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fused import _load, _route
from fused._attention import is_causal_bias
from fused.optim._sharded import local_tensors
from fused.optim._step import FusedStep


@dataclass(frozen=True)
class Decision:
    """The path of one op, and the reason against each other path."""

    op: str
    path: str  # "CUDA kernel", "CPU kernel (avx512)", ... or "composite"
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.path}"]
        return "\n".join(lines + [f"  not {path}: {why}" for path, why in self.refused.items()])


@dataclass(frozen=True)
class Explanation:
    """The decisions of one call, in order. Prints as a readable list."""

    decisions: tuple[Decision, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(decision.path for decision in self.decisions)

    def __str__(self) -> str:
        return "\n".join(map(str, self.decisions)) or "no op of fused was called"


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which path each op of ``function(*args, **kwargs)`` would take.

    The paths are ``CUDA kernel``, ``CPU kernel`` with its instruction set, and ``composite``: plain
    PyTorch operators, which take what no kernel covers. Nothing is computed: the call is made with
    fake tensors, which have shapes and no data. An optimizer's ``step`` has a decision for each
    parameter group.

    >>> q = torch.randn(1, 8, 128, 64)
    >>> print(fused.explain(fused.functional.scaled_dot_product_attention, q, q, q))
    attention: CPU kernel (avx512)
      not CUDA kernel: the tensors are on cpu
      not composite: a kernel covers the call
    """
    if not callable(function):
        kind = type(function).__name__
        raise TypeError(f"explain: function must be one, such as an optimizer's step, got {kind}")
    decisions: list[Decision] = []

    def listener(op: str, device: torch.device, reason: str | None) -> None:
        decisions.append(_decide(op, device, reason))

    owner = getattr(function, "__self__", None)
    if isinstance(owner, FusedStep):
        name = type(owner).__name__
        with local_tensors(owner):
            for group in owner.param_groups:
                listener(name, group["params"][0].device, owner.composite_reason(group))
        return Explanation(tuple(decisions))

    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # slow to import

    # The shape environment lets a fake tensor answer item(), as packed sequences need.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or is_causal_bias(value):
            return value
        return mode.from_tensor(value, static_shapes=True)

    args, kwargs = pytree.tree_map(fake, (args, kwargs))
    with mode, _route.listen(listener):
        function(*args, **kwargs)
    return Explanation(tuple(decisions))


def _decide(op: str, device: torch.device, reason: str | None) -> Decision:
    cpu = f"CPU kernel ({_route.kernels().isa()})"
    kernel = "CUDA kernel" if device.type == "cuda" else cpu
    other = cpu if device.type == "cuda" else "CUDA kernel"
    refused = {other: f"the tensors are on {device.type}"}
    if device.type != "cuda" and _load.build_info().cuda is None:
        refused[other] += ", and this build has no CUDA kernels"
    if reason is None:
        return Decision(op, kernel, {**refused, "composite": "a kernel covers the call"})
    return Decision(op, "composite", {kernel: reason, **refused})
