"""The step that Adam and SGD share: which way each group goes, and all checks before any change.

A group's tensors are gathered in C++, from its list of parameters and the optimizer's state, on
every step anew; nothing is cached that could go stale. Three ways lead through a step:

    kernel      adam_group / sgd_group of the extension: checks and launches
    registered  torch.ops.fused.adam_ / sgd_, where a tracer or a tensor subclass must see the op
    composite   stock PyTorch's own function, for what no kernel covers (`_REASONS`)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused.optim import _sharded

Group = dict[str, Any]

# What C++ answers in place of None when it has not made the step; anything else it answers is a
# reason for the composite path.
UNINITIALISED = "uninitialised"
MODE = "mode"
DIFFERENTIABLE = "differentiable"
SUBCLASS = "subclass"

_REASONS = {
    DIFFERENTIABLE: "differentiable=True needs operators that autograd knows",
    "sparse": "a gradient is sparse",
    "complex": "a parameter is not a floating-point tensor",
    SUBCLASS: "a tensor is of a subclass",
    "transform": "a functorch transform is active",
}


class FusedStep(Optimizer):
    """Mixed into a stock optimizer, ahead of it. Subclasses say what a group's step is."""

    # GradScaler leaves unscaling and skipping to the step itself.
    _step_supports_amp_scaling = True

    def _kernel_step(self, group: Group, *, check_only: bool) -> str | None:
        """The group's one C++ call; None when done, else why not."""
        raise NotImplementedError

    def _first_step(self, group: Group) -> None:
        """The same for a group in which a parameter's state begins."""
        self._kernel_step(group, check_only=False)

    def _registered_step(self, group: Group) -> None:
        """The same through torch.ops.fused."""
        raise NotImplementedError

    def _composite_step(self, group: Group) -> None:
        """The same by stock PyTorch's own function."""
        raise NotImplementedError

    def _new_states(self, group: Group) -> list[tuple[Tensor, dict[str, Any]]]:
        """States for the parameters that have a gradient and no state yet."""
        return []

    def _refuse(self, reason: str) -> None:
        """Raises what stock raises for gradients that the algorithm cannot take."""

    def composite_reason(self, group: Group) -> str | None:
        """Why stock PyTorch would step this group in place of a kernel, or None. For explain."""
        return _REASONS.get(self._check(group) or "")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._accelerator_graph_capture_health_check()
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if torch.compiler.is_compiling():
                for group in self.param_groups:
                    self._registered_step(group)
            else:
                self._eager_step()
        return loss

    def _eager_step(self) -> None:
        groups = self.param_groups
        # With one group the step's own checks suffice: it checks everything before it writes.
        if len(groups) == 1 and not groups[0]["differentiable"]:
            outcomes = [self._kernel_step(groups[0], check_only=False)]
            if outcomes[0] is None:
                return
        else:
            outcomes = [self._check(group) for group in groups]
        if SUBCLASS in outcomes and _sharded.any_sharded(
            p for group in groups for p in group["params"]
        ):
            with _sharded.local_tensors(self):
                return self._eager_step()
        new_states = []
        for group, outcome in zip(groups, outcomes, strict=True):
            if outcome == UNINITIALISED:
                new_states += self._new_states(group)
            elif outcome in _REASONS:
                self._refuse(outcome)
        for parameter, state in new_states:
            self.state[parameter] = state
        for group, outcome in zip(groups, outcomes, strict=True):
            if outcome is None:
                self._kernel_step(group, check_only=False)
            elif outcome == UNINITIALISED:
                self._first_step(group)
            elif outcome == MODE:
                self._registered_step(group)
            else:
                self._unscaled_composite_step(group)

    def _check(self, group: Group) -> str | None:
        return (
            DIFFERENTIABLE if group["differentiable"] else self._kernel_step(group, check_only=True)
        )

    def _unscaled_composite_step(self, group: Group) -> None:
        """Stock's functions know no GradScaler outside their fused form."""
        grad_scale, found_inf = self._grad_scaler()
        if found_inf is not None and found_inf.item() != 0:
            return
        if grad_scale is not None:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(grad_scale.to(parameter.grad.device))
        self._composite_step(group)

    def _grad_scaler(self) -> tuple[Tensor | None, Tensor | None]:
        """What torch.amp.GradScaler has set on this optimizer for the time of the step."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)


def number(value: float | Tensor) -> float:
    """A hyperparameter that kernels take by value only; stock reads its value too."""
    return float(value)


def number_and_tensor(value: float | Tensor) -> tuple[float, Tensor | None]:
    """A hyperparameter as the registered ops take it: the tensor goes before the number."""
    return (0.0, value) if isinstance(value, Tensor) else (float(value), None)


def _fake_step(*args: Any, **kwargs: Any) -> None:
    """The registered ops return nothing, and the schema says what they change."""


torch.library.register_fake("fused::adam_", _fake_step)
torch.library.register_fake("fused::sgd_", _fake_step)
torch.library.register_fake("fused::clip_by_norm_", _fake_step)


@torch.library.register_fake("fused::total_norm")
def _(tensors: list[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)
