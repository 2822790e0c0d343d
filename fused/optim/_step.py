"""The step that Adam and SGD share: which way each group goes, and all checks before any change.

A group's tensors are gathered in C++, from its list of parameters and the optimizer's state. What
was gathered is kept for the next step, which looks whether every tensor is still what it was
(csrc/optim/kept_step.h). Three ways lead through a step:

    kernel      adam_group / sgd_group of the extension: checks and launches
    registered  torch.ops.fused.adam_ / sgd_, where a tracer or a tensor subclass must see the op
    composite   stock PyTorch's own function, for what no kernel covers (`_REASONS`)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused import _route
from fused.optim import _sharded, _state
from fused.optim._norms import Norms
from fused.optim._options import INT8, OPTION_NAMES, StepOptions
from fused.optim._registered import Group, RegisteredStep

# States that begin, with their parameters.
NewStates = list[tuple[Tensor, dict[str, Any]]]

# What C++ answers in place of None when it has not made the step; anything else it answers is a
# reason for the composite path.
UNINITIALISED = "uninitialised"
MODE = "mode"
SKIPPED = "skipped"
DIFFERENTIABLE = "differentiable"
SUBCLASS = "subclass"
SPARSE = "sparse"
COMPLEX = "complex"
DEVICE = "device"

# What torch's own steps begin with; torch 2.10 has it under an older name.
_NEW, _OLD = "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"
_check_graph_capture = getattr(Optimizer, _NEW if hasattr(Optimizer, _NEW) else _OLD)

_REASONS = {
    DIFFERENTIABLE: "differentiable=True needs operators that autograd knows",
    SPARSE: "a gradient is sparse",
    COMPLEX: "a parameter is not a floating-point tensor",
    DEVICE: "a tensor is on a device other than CPU and CUDA",
    SUBCLASS: "a tensor is of a subclass",
    "transform": "a functorch transform is active",
}


class FusedStep(RegisteredStep):
    """Mixed into a stock optimizer, ahead of it. Subclasses say what a group's step is.

    Beyond the stock constructor, keyword-only and free to combine:

    Args:
        max_norm: clips the gradients to this Euclidean norm inside the step, as
            `torch.nn.utils.clip_grad_norm_` would; they are left as they are. `grad_norm` then
            holds the norm as it was: a float64 scalar that the host has not waited for (a compiled
            step clips, and leaves `grad_norm` as it was).
        norm_scope: "global" for the norm over all groups, "group" for each group by itself
            (`grad_norm` has one element for each group).
        nonfinite: what a norm that is NaN or infinite does. "propagate": what the maths gives.
            "error": RuntimeError, with nothing changed; the host waits for the norm. What a
            GradScaler has found is not one, but skipped as ever. "skip": parameters, states, step
            counts and averages stay as they are. On CUDA this keeps the step counts on the device,
            so that the host need not know.
        zero_grad: gradients are set to 0 in the same pass, in a skipped step too.
        ema_decay: keeps a moving average of the parameters in the same pass, `ema = decay * ema +
            (1 - decay) * p` after each step that changes p, from p as it was before the first. It
            follows the master where there is one. In float32, float64 beside float64; see
            `averaged`.
        master_weights: 16-bit parameters are the rounded copies of float32 masters, and moments are
            float32. "float32" keeps the master whole. "remainder" keeps, beside bfloat16
            parameters, the 16 bits by which they differ from it. Parameters written to from outside
            are overwritten from a float32 master at the next step.
        stochastic_rounding: 16-bit parameters are rounded up or down by chance, right on average,
            drawn from the device's torch generator.
        state_dtype: how moments are stored: None for the parameter's dtype (float32 beside a
            master), torch.float32, torch.bfloat16, or "int8" for block-wise dynamic quantisation
            (csrc/optim/quantize.h).

    Raises:
        NotImplementedError: at the step, where one of these is set and no kernel covers the group
            (complex parameters, sparse gradients, other devices, `differentiable`).
    """

    # GradScaler leaves unscaling and skipping to the step itself.
    _step_supports_amp_scaling = True
    # What learning-rate schedulers look at, to warn where no step came before theirs.
    _opt_called: bool
    # What help() and inspect show: stock's parameters and ours.
    __signature__: inspect.Signature

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim."))
        of_stock = inspect.signature(stock)
        defaults = inspect.signature(StepOptions).parameters.values()
        extras = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in defaults]
        parameters = [*of_stock.parameters.values(), *extras]
        cls.__signature__ = of_stock.replace(parameters=parameters)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in OPTION_NAMES if name in kwargs}
        self.extras = StepOptions(**given)
        self.extras.check(self._op)
        _sharded.check_zero_redundancy_optimizer(self._op, self.extras)
        super().__init__(*args, **kwargs)

    def add_param_group(self, param_group: Group) -> None:
        for name in OPTION_NAMES:
            own = getattr(self.extras, name)
            if param_group.get(name, own) != own:
                raise ValueError(
                    f"{self._op}: {name} must be given to the constructor, for all groups, "
                    f"got a group with {param_group[name]!r}"
                )
            param_group.pop(name, None)  # ZeroRedundancyOptimizer repeats the options in its groups
        super().add_param_group(param_group)
        try:
            self.extras.check_params(self._op, self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    # What a subclass says -------------------------------------------------------------------------

    def _hyperparameters(self, group: Group) -> dict[str, Any]:
        """The rule's own arguments of the C++ call: numbers, or tensors that kernels read."""
        raise NotImplementedError

    def _kernel_call(self, **arguments: Any) -> str | None:
        """The group's one C++ call; None when done, else why not."""
        raise NotImplementedError

    def _first_outcome(self, group: Group, norm: Tensor | None) -> str:
        """UNINITIALISED; or SKIPPED, where a step that would begin states must leave them unset."""
        return UNINITIALISED

    def _first_step(self, group: Group, norm: Tensor | None, new: NewStates, plan: Any) -> None:
        """Plans the step of a group in which states begin, which `self.state` holds already."""
        self._kernel_step(group, norm, plan=plan)

    def _composite_step(self, group: Group) -> None:
        """The same by stock PyTorch's own function."""
        raise NotImplementedError

    def _new_states(self, group: Group) -> NewStates:
        """What is missing in the states of the parameters that have a gradient."""
        raise NotImplementedError

    def _refuse(self, reason: str) -> None:
        """Raises what stock raises for gradients that the algorithm cannot take."""

    # The step -------------------------------------------------------------------------------------

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
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if torch.compiler.is_compiling():
                self._traced_step()
            else:
                self._eager_step()
        return loss

    def _eager_step(self, norms: Norms | None = None) -> None:
        """Every step that is not traced: those in the backward pass too."""
        if "capturable" in self.defaults:
            _check_graph_capture(self)
        groups = self.param_groups
        if norms is None:
            norms = self._norms_by(self._kept_norm)
        if norms is None:
            outcomes = [self._check(group) for group in groups]
        else:
            outcomes = self._step_kernels(norms)
            if not any(outcomes):
                return
        params = (p for group in groups for p in group["params"])
        if SUBCLASS in outcomes and _sharded.any_sharded(params):
            return self._sharded_step()
        for outcome in outcomes:
            if outcome in _REASONS:
                self._refuse(outcome)
                self._refuse_extras(_REASONS[outcome])
        if norms is None:
            norms = self._norms()
        if any(outcomes):
            self._step_by_outcomes(norms, outcomes)
        else:
            self._step_kernels(norms)

    def _step_kernels(self, norms: Norms) -> list[str | None]:
        """Makes the steps of all groups, if kernels can and their states have begun; else none of
        them, and says why."""
        groups = self.param_groups
        if len(groups) == 1:
            return [self._kernel_step(groups[0], norms[0])]
        plan = _route.kernels().StepPlan()
        pairs = zip(groups, norms, strict=True)
        outcomes = [self._kernel_step(group, norm, plan=plan) for group, norm in pairs]
        if not any(outcomes):
            plan.make()
        return outcomes

    def _step_by_outcomes(self, norms: Norms, outcomes: list[str | None]) -> None:
        """Makes the step of each group in its own way: what may fail before what changes anything.

        Kernels' steps are made ready, then stock's are made, which may still fail, then the rest.
        """
        steps = [
            (group, norm, self._first_outcome(group, norm) if outcome == UNINITIALISED else outcome)
            for group, norm, outcome in zip(self.param_groups, norms, outcomes, strict=True)
        ]
        new = [
            s
            for group, _, outcome in steps
            if outcome == UNINITIALISED
            for s in self._new_states(group)
        ]
        plan = _route.kernels().StepPlan()
        with self._states_kept_by([p for p, _ in new]):
            for p, state in new:
                _state.begin(self.state[p], state)
            for group, norm, outcome in steps:
                if outcome is None:
                    self._kernel_step(group, norm, plan=plan)
                elif outcome == UNINITIALISED:
                    self._first_step(group, norm, new, plan)
            for group, norm, outcome in steps:
                if outcome == MODE:
                    with self._states_kept_by(group["params"]):
                        self._registered_step(group, norm)
                elif outcome in _REASONS:
                    self._unscaled_composite_step(group)
        plan.make()
        for group, _, outcome in steps:
            if outcome == SKIPPED:
                self._clear_gradients(group)

    def _traced_step(self) -> None:
        for group, norm in zip(self.param_groups, self._norms(), strict=True):
            self._registered_step(group, norm)

    def _sharded_step(self) -> None:
        if self.extras.state_dtype == INT8:
            raise NotImplementedError(
                f'{self._op}: state_dtype must not be "int8" for DTensor parameters, whose shards '
                "would cut its blocks, got int8"
            )
        norms = self._norms()  # over all ranks, which the local tensors know nothing of
        with _sharded.local_tensors(self):
            self._eager_step(norms)

    def _check(self, group: Group) -> str | None:
        return self._kernel_step(group, None, check_only=True)

    def _kernel_step(
        self,
        group: Group,
        norm: Tensor | None,
        *,
        params: list[Tensor] | None = None,
        check_only: bool = False,
        plan: Any = None,
        **changes: Any,
    ) -> str | None:
        """Makes a group's step, or adds it to a plan, ready to be made; None, or why it did not."""
        if group["differentiable"]:
            return DIFFERENTIABLE
        extras = self.extras
        return self._kernel_call(
            kept=self._kept_groups(),
            params=group["params"] if params is None else params,
            state=self.state,
            **self._hyperparameters(group) | changes,
            **self._common(group, norm),
            ema_decay=extras.ema_decay,
            master=extras.master_name,
            rng=None if check_only else self._draw_rng(group),
            check_only=check_only,
            plan=plan,
        )

    def _clear_gradients(self, group: Group) -> None:
        for p in group["params"]:
            if self.extras.zero_grad and p.grad is not None:
                p.grad.zero_()

    def _refuse_extras(self, reason: str) -> None:
        for name, value in self.extras.given().items():
            raise NotImplementedError(
                f"{self._op}: {name} must be left out where stock PyTorch makes the step "
                f"({reason}), got {value!r}"
            )

    def _unscaled_composite_step(self, group: Group) -> None:
        """Stock's functions know no GradScaler outside their fused form."""
        grad_scale = self._grad_scaler()[0]
        if self._found_inf():
            return
        if grad_scale is not None:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(grad_scale.to(parameter.grad.device))
        self._composite_step(group)


def number(value: float | Tensor) -> float:
    """A hyperparameter that kernels take by value only; stock reads its value too."""
    return float(value)
