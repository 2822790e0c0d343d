"""Steps inside the backward pass, where one gradient is alive at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fused.optim._step import FusedStep

# What DistributedDataParallel looks for on a parameter: optimizers to step when it has reduced the
# gradient. It then takes away our hook, which would come before that.
_DDP_ATTRIBUTE = "_in_backward_optimizers"

# Optimizers leave it out when they are pickled or copied: the copy's parameters have no hooks.
_HOOKS_ATTRIBUTE = "_step_in_backward"

# What needs more than one parameter's gradient: option, the only value allowed, why.
_NEEDS_ALL_GRADIENTS = (
    ("max_norm", None, "a norm needs all gradients"),
    ("nonfinite", "propagate", "all gradients decide about the step"),
    ("differentiable", False, "gradients do not outlive the backward pass"),
)


def step_in_backward(
    model: nn.Module, optimizer: FusedStep | Callable[..., Any], **options: Any
) -> FusedStep:
    """Lets `backward()` update each parameter once its gradient is complete, and free the gradient.

    Gradients then take the memory of the largest parameter, instead of that of all parameters. ::

        optimizer = fused.optim.step_in_backward(model, fused.AdamW, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
        for x in data:
            model(x).backward()  # updates the parameters
            scheduler.step()

    What comes back is the one ordinary optimizer of all parameters: schedulers, groups,
    `state_dict` and checkpoints are as without. Its `step()` may still be called, and updates what
    has a gradient left: parameters that were frozen or not yet in a group at this call.

    Every backward pass is a step, so gradients cannot be accumulated over several, and
    `torch.amp.GradScaler`, which looks at gradients after the backward pass, finds none. Hooks of
    `register_step_pre_hook` and `register_step_post_hook` are not called: no `step()` runs.

    Args:
        model: wrapped by `fully_shard` before this call, or by DistributedDataParallel after it
            (whose own hook then makes the steps, and needs an accelerator).
        optimizer: a class such as `fused.AdamW`, or a function that makes one, called as
            `optimizer(model.parameters(), **options)`; or a fused optimizer made before.
        **options: for that call.

    Raises:
        ValueError: for what needs all gradients (`max_norm`, `nonfinite` other than "propagate") or
            their graph (`differentiable`), for an optimizer that steps in the backward pass
            already, and for a model inside DistributedDataParallel.
        TypeError: if `optimizer` is or makes something else than a fused optimizer.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "step_in_backward: model must be wrapped by DistributedDataParallel after this call, "
            "got one that is wrapped"
        )
    if isinstance(optimizer, Optimizer):
        if options:
            raise ValueError(
                "step_in_backward: options must be left out for an optimizer that is made, "
                f"got {', '.join(options)}"
            )
        made: Any = optimizer
    else:
        made = optimizer(model.parameters(), **options)
    if not isinstance(made, FusedStep):
        raise TypeError(
            "step_in_backward: optimizer must be a fused one, or make one, "
            f"got {type(made).__name__}"
        )
    _check(made)
    setattr(made, _HOOKS_ATTRIBUTE, _Hooks(made))
    return made


def step_after_backward(optimizer: FusedStep) -> None:
    """Undoes `step_in_backward`: gradients stay until `optimizer.step()` has used them."""
    hooks = vars(optimizer).pop(_HOOKS_ATTRIBUTE, None)
    if hooks is not None:
        hooks.remove()


def _check(optimizer: FusedStep) -> None:
    if hasattr(optimizer, _HOOKS_ATTRIBUTE):
        raise ValueError("step_in_backward: optimizer must not step in the backward pass already")
    for name, allowed, reason in _NEEDS_ALL_GRADIENTS:
        for options in (optimizer.defaults, *optimizer.param_groups, optimizer.extras.given()):
            value = options.get(name, allowed)
            if value != allowed:
                raise ValueError(
                    f"step_in_backward: {name} must be {allowed!r} ({reason}), got {value!r}"
                )


class _Hooks:
    """The hooks on an optimizer's parameters."""

    def __init__(self, optimizer: FusedStep) -> None:
        # With a model on several devices, several threads run a backward pass.
        lock = threading.Lock()
        self._params: list[Tensor] = []
        self._handles = []
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                step = _ParameterStep(optimizer, index, p, lock)
                setattr(p, _DDP_ATTRIBUTE, [step])  # which keeps it alive, see _hook
                handle = p.register_post_accumulate_grad_hook(_hook(step))
                self._params.append(p)
                self._handles.append(handle)
                _tell_ddp(p, handle)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for p in self._params:
            vars(p).pop(_DDP_ATTRIBUTE, None)


class _ParameterStep:
    """The optimizer's step for one parameter."""

    def __init__(
        self, optimizer: FusedStep, group_index: int, parameter: Tensor, lock: threading.Lock
    ) -> None:
        self._optimizer = optimizer
        self._group_index = group_index
        # One list for all steps, by which the extension finds what it has kept of the last. That
        # is kept here: an optimizer's own is for its groups, which are fewer.
        self._params = [parameter]
        self._kept: tuple[Any, Any] | None = None
        self._lock = lock

    @torch.no_grad()
    def step(self) -> None:
        optimizer = self._optimizer
        with self._lock:
            groups = optimizer.param_groups
            # Looked up now: options change, and load_state_dict replaces the groups.
            group = {**groups[self._group_index], "params": self._params}
            kept_of_groups = optimizer._kept
            optimizer.param_groups, optimizer._kept = [group], self._kept
            try:
                optimizer._eager_step()
            finally:
                self._kept = optimizer._kept
                optimizer.param_groups, optimizer._kept = groups, kept_of_groups
            # For schedulers, which warn where they see no step before theirs.
            optimizer._opt_called = True

    def __reduce__(self) -> tuple[type[_Lost], tuple[()]]:
        # As an attribute of the parameter it is pickled with a model; hooks are not.
        return _Lost, ()


class _Lost:
    """What a pickled `_ParameterStep` comes back as."""

    def step(self) -> None:
        raise RuntimeError(
            "step_in_backward: must be called again for a model that was pickled as a whole"
        )


def _hook(step: _ParameterStep) -> Callable[[Tensor], None]:
    # The garbage collector does not see what a hook refers to: with the step in it, and so the
    # optimizer and all parameters, none of them would ever be freed.
    reference = weakref.ref(step)

    def hook(parameter: Tensor) -> None:
        step = reference()
        if step is not None:
            step.step()
            parameter.grad = None

    return hook


def _tell_ddp(parameter: Tensor, handle: RemovableHandle) -> None:
    """What torch's own `_apply_optimizer_in_backward` does, for DDP to find the hook."""
    if torch.distributed.is_available():
        from torch.distributed.optim.apply_optimizer_in_backward import (
            param_to_optim_hook_handle_map as hooks,
        )

        hooks.setdefault(parameter, []).append(handle)
