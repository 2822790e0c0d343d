"""fused.Adam and fused.AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as stock_adam
from torch.optim.optimizer import _device_dtype_check_for_fused, _get_scalar_dtype

from fused import _route
from fused.optim import _state
from fused.optim._registered import Group, lists_by_master, number_and_tensor
from fused.optim._step import FusedStep, NewStates, number

# Parameters, gradients, first and second moments, largest second moments, steps.
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]

CPU = torch.device("cpu")


class Adam(FusedStep, torch.optim.Adam):
    """`torch.optim.Adam` whose step is one C++ call, and one pass over memory, per group.

    Arguments, state and `state_dict` are those of the stock class, and `FusedStep` describes what
    there is beyond. `foreach` and `fused` are accepted and choose nothing but, as in stock, where
    `fused=True` keeps the step counts.
    """

    _op = "adam"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Stock loads a step count as it was saved: in any dtype, and from any device, which it then
        # waits for at every step. Kernels take a float on the parameter's device or the CPU.
        for p, entry in self.state.items():
            step = entry.get("step") if isinstance(entry, dict) and isinstance(p, Tensor) else None
            if not isinstance(step, Tensor):
                continue
            known = step.dtype in (torch.float32, torch.float64) and step.device in (CPU, p.device)
            if not known or self.extras.nonfinite == "skip":
                dtype = step.dtype if known else torch.float32
                entry["step"] = step.to(p.device, dtype)

    def _hyperparameters(self, group: Group) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": number(group["weight_decay"]),
            "eps": number(group["eps"]),
            "amsgrad": group["amsgrad"],
            "decoupled_weight_decay": group["decoupled_weight_decay"],
        }

    def _moments(self, group: Group) -> tuple[str, ...]:
        moments = ("exp_avg", "exp_avg_sq")
        return (*moments, "max_exp_avg_sq") if group["amsgrad"] else moments

    def _kernel_call(self, **arguments: Any) -> str | None:
        return _route.kernels().adam_group(**arguments)

    def _new_states(self, group: Group) -> NewStates:
        on_device = group["capturable"] or group["fused"] or self.extras.nonfinite == "skip"
        step_dtype = _get_scalar_dtype(is_fused=group["fused"])
        states: NewStates = []
        for p in group["params"]:
            if p.grad is None:
                continue
            entry = self.state.get(p, {})
            state: dict[str, Any] = {}
            if not entry:
                if group["fused"]:
                    _device_dtype_check_for_fused(p)
                # Elsewhere the count stays on the host, which knows it without asking the device.
                step_device = p.device if on_device else "cpu"
                state["step"] = torch.zeros((), dtype=step_dtype, device=step_device)
                for name in self._moments(group):
                    state |= _state.new_moment(p, name, self.extras.state_dtype_of(p))
            state |= _state.new_extras(p, self.extras, entry)
            if state:
                states.append((p, state))
        return states

    def _init_group(  # by this name the compiler knows it
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        scales: list[Tensor] | None = None,
        masters: list[Tensor | None] | None = None,
        emas: list[Tensor] | None = None,
    ) -> bool:
        """Fills the lists, with states made where there are none; whether any is complex."""
        lists = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
        if scales is None or masters is None or emas is None or self._is_composite(group):
            return super()._init_group(group, params, grads, *lists, steps)
        for p, state in self._new_states(group):
            _state.begin(self.state[p], state)
        self._fill(group, params, grads, lists, scales, masters, emas)
        steps += [self.state[p]["step"] for p in params]
        return False

    def _registered_step(self, group: Group, norm: Tensor | None) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        max_exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        scales: list[Tensor] = []
        masters: list[Tensor | None] = []
        emas: list[Tensor] = []
        stock = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        has_complex = self._init_group(group, *stock, scales, masters, emas)
        if not params:
            return
        if has_complex or group["differentiable"]:
            self._refuse_extras("complex parameters or differentiable=True")
            return self._stock_step(group, stock, has_complex)
        arguments = self._hyperparameters(group) | self._registered_arguments(group, norm)
        for name in ("lr", "beta1", "beta2"):
            arguments[name], arguments[f"tensor_{name}"] = number_and_tensor(
                arguments[name], params
            )
        # The compiler sets `capturable` for the time of the trace, on every device.
        if torch.compiler.is_compiling():
            arguments["capturable"] = params[0].is_cuda
        for lists in lists_by_master(*stock, scales, masters, emas):
            torch.ops.fused.adam_(*lists, **arguments)

    def _composite_step(self, group: Group) -> None:
        lists: Lists = ([], [], [], [], [], [])
        has_complex = self._init_group(group, *lists)
        self._stock_step(group, lists, has_complex)

    def _stock_step(self, group: Group, lists: Lists, has_complex: bool) -> None:
        beta1, beta2 = group["betas"]
        stock_adam(
            *lists,
            foreach=False,
            fused=False,
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            has_complex=has_complex,
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _refuse(self, reason: str) -> None:
        if reason == "sparse":
            raise RuntimeError(
                "Adam does not support sparse gradients, please consider SparseAdam instead"
            )


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW` whose step is one C++ call, and one pass over memory, per group.

    `fused.Adam` with decoupled weight decay; see there.
    """
