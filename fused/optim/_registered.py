"""What a step reads, and how torch.ops.fused.adam_ and sgd_ take it where a tracer or a dispatch
mode must see the op: as lists of tensors and plain arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused.optim import _state
from fused.optim._norms import GradientNorms, Group
from fused.optim._options import INT8


class RegisteredStep(GradientNorms):
    """The part of `FusedStep` that makes arguments of what a step reads."""

    # What a subclass says -------------------------------------------------------------------------

    def _moments(self, group: Group) -> tuple[str, ...]:
        """By which names a parameter's state holds its moments."""
        raise NotImplementedError

    def _registered_step(self, group: Group, norm: Tensor | None) -> None:
        """A group's step through torch.ops.fused."""
        raise NotImplementedError

    # Whichever way the step goes ------------------------------------------------------------------

    def _common(self, group: Group, norm: Tensor | None) -> dict[str, Any]:
        """What a group's step reads, beyond its rule's own hyperparameters and its tensors."""
        grad_scale, found_inf = self._grad_scaler()
        extras = self.extras
        return {
            "maximize": group["maximize"],
            "capturable": group.get("capturable", False),
            "grad_scale": grad_scale,
            "found_inf": found_inf,
            "norm": norm,
            "max_norm": extras.max_norm,
            "skip_nonfinite": extras.nonfinite == "skip",
            "zero_grad": extras.zero_grad,
        }

    def _draw_rng(self, group: Group) -> Tensor | None:
        """(seed, offset) of a step's stochastic rounding, drawn on the device as dropout's is."""
        if not self.extras.stochastic_rounding or not group["params"]:
            return None
        device = group["params"][0].device
        return torch.randint(torch.iinfo(torch.int64).max, (2,), dtype=torch.int64, device=device)

    # Through torch.ops.fused ----------------------------------------------------------------------

    def _registered_arguments(self, group: Group, norm: Tensor | None) -> dict[str, Any]:
        """The same and more, as the registered ops take it."""
        extras = self.extras
        return self._common(group, norm) | {
            "ema_decay": 0.0 if extras.ema_decay is None else extras.ema_decay,
            "rng": self._draw_rng(group),
        }

    @staticmethod
    def _is_composite(group: Group) -> bool:
        """Whether stock's function makes the group's step under a tracer or a mode too."""
        return group["differentiable"] or any(
            p.is_complex() or p.grad.layout != torch.strided
            for p in group["params"]
            if p.grad is not None
        )

    def _fill(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        moments: Sequence[list[Any]],
        scales: list[Tensor],
        masters: list[Tensor | None],
        emas: list[Tensor],
    ) -> None:
        """Fills the lists of a registered op with the tensors of the parameters with a gradient."""
        params += [p for p in group["params"] if p.grad is not None]
        grads += [p.grad for p in params if p.grad is not None]
        entries = [self.state[p] for p in params] if params else []
        for name, moment_list in zip(self._moments(group), moments, strict=False):
            moment_list += [entry[name] for entry in entries]
            if self.extras.state_dtype == INT8:
                scales += [entry[_state.scale_name(name)] for entry in entries]
        names = [self.extras.master_of(p) for p in params]
        if any(names):
            masters += [
                None if name is None else entry[name]
                for name, entry in zip(names, entries, strict=True)
            ]
        if self.extras.ema_decay is not None:
            emas += [entry["ema"] for entry in entries]


def lists_by_master(*lists: list[Any]) -> list[list[list[Any]]]:
    """The lists of a registered op, the last but one its masters, as those of one call or of two:
    for the parameters that have a master and for the others."""
    masters = lists[-2]
    if None not in masters:
        return [[*lists]]
    count = len(masters)  # `scales` is of one such length or of several
    with_master, without = (
        [
            [v for i, v in enumerate(values) if (masters[i % count] is None) == lacks]
            for values in lists
        ]
        for lacks in (False, True)
    )
    without[-2] = []
    return [with_master, without]


def number_and_tensor(value: float | Tensor, params: list[Tensor]) -> tuple[float, Tensor | None]:
    """A hyperparameter as the registered ops take it: the tensor goes before the number.

    In a compiled step it is always a tensor, on the device. A number would be compiled in, and the
    next of a schedule would be compiled anew: a product is among the few things that the compiler
    makes of a number without fixing it. And the step may become a CUDA graph, whose replays know
    nothing of what the host reads: a tensor goes there by a copy that Inductor keeps out of the
    graph.
    """
    if not torch.compiler.is_compiling():
        return (0.0, value) if isinstance(value, Tensor) else (float(value), None)
    device = params[0].device
    if isinstance(value, Tensor):
        return 0.0, value.to(device)
    return 0.0, torch.ones((), dtype=torch.float64, device=device) * value


def _fake_step(*args: Any, **kwargs: Any) -> None:
    """The registered ops return nothing, and the schema says what they change."""


torch.library.register_fake("fused::adam_", _fake_step)
torch.library.register_fake("fused::sgd_", _fake_step)
torch.library.register_fake("fused::clip_by_norm_", _fake_step)


@torch.library.register_fake("fused::total_norm")
def _(tensors: list[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)
