"""The norm of the gradients that a step reads: of all groups or of each, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused import _route
from fused.optim import _sharded
from fused.optim._kept import KeptStates

Group = dict[str, Any]
# The gradients' norm for each group, None where none is needed.
Norms = list[Tensor | None]


class GradientNorms(KeptStates):
    """The part of `FusedStep` that reads gradients, by what the last step has kept where it can."""

    # The extension and what it keeps; not part of a copy.
    _kept: tuple[Any, Any] | None = None

    def _grad_scaler(self) -> tuple[Tensor | None, Tensor | None]:
        """What torch.amp.GradScaler has set on this optimizer for the time of the step."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _found_inf(self) -> bool:
        """Whether a GradScaler has found what makes it skip this step. The host waits for it."""
        found_inf = self._grad_scaler()[1]
        return found_inf is not None and found_inf.item() != 0

    def _kept_groups(self) -> Any:
        """What the extension keeps of this optimizer's groups from one step to the next."""
        kernels = _route.kernels()
        if self._kept is None or self._kept[0] is not kernels:
            self._kept = (kernels, kernels.KeptGroups())
        return self._kept[1]

    def _norms(self) -> Norms:
        """The norm that each group's step reads. Sets `grad_norm`."""
        norms = self._norms_by(self._norm)
        assert norms is not None
        return norms

    def _norms_by(self, norm_of: Callable[[list[Group]], Tensor | None]) -> Norms | None:
        """The same, None where `norm_of` some groups is."""
        groups, extras = self.param_groups, self.extras
        if not extras.needs_norm:
            return [None] * len(groups)
        by_group = extras.norm_scope == "group"
        norms: list[Tensor] = []
        for scope in [[group] for group in groups] if by_group else [groups]:
            norm = norm_of(scope)
            if norm is None:
                return None
            norms.append(norm)
        if by_group:
            self.grad_norm = torch.stack([norm.to(norms[0].device) for norm in norms])
        else:
            self.grad_norm = norms[0]
            norms *= len(groups)
        is_error = extras.nonfinite == "error" and not self.grad_norm.isfinite().all()
        if is_error and not self._found_inf():
            raise RuntimeError(
                f'{self._op}: gradients must be finite with nonfinite="error", '
                f"got a norm of {self.grad_norm.tolist()}"
            )
        return [*norms]

    def _kept_norm(self, groups: list[Group]) -> Tensor | None:
        """By what the last step has kept; None where that is not what there is now."""
        params = [group["params"] for group in groups]
        return _route.kernels().kept_gradient_norm(
            self._kept_groups(), params, self._grad_scaler()[0]
        )

    def _norm(self, groups: list[Group]) -> Tensor:
        grad_scale = self._grad_scaler()[0]
        if not torch.compiler.is_compiling() and not _sharded.any_sharded(
            p for group in groups for p in group["params"]
        ):
            return _route.kernels().gradient_norm([g["params"] for g in groups], grad_scale)
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not grads:
            return torch.zeros((), dtype=torch.float64)
        if torch.compiler.is_compiling():
            return torch.ops.fused.total_norm(grads, grad_scale)
        norm = _sharded.total_norm(grads, _route.kernels().total_norm)
        return norm if grad_scale is None else norm / grad_scale
