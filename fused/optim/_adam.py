"""fused.Adam and fused.AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as stock_adam
from torch.optim.optimizer import _device_dtype_check_for_fused, _get_scalar_dtype

from fused import _route
from fused.optim._step import FusedStep, Group, number, number_and_tensor

# Parameters, gradients, first and second moments, largest second moments, steps.
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]

CPU = torch.device("cpu")


class Adam(FusedStep, torch.optim.Adam):
    """`torch.optim.Adam` whose step is one C++ call, and one pass over memory, per group.

    Arguments, state and `state_dict` are those of the stock class. `foreach` and `fused` are
    accepted and choose nothing but, as in stock, where `fused=True` keeps the step counts.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Stock loads a step count as it was saved: in any dtype, and from any device, which it then
        # waits for at every step. Kernels take a float on the parameter's device or the CPU.
        for p, entry in self.state.items():
            step = entry.get("step") if isinstance(entry, dict) and isinstance(p, Tensor) else None
            if isinstance(step, Tensor) and not (
                step.dtype in (torch.float32, torch.float64) and step.device in (CPU, p.device)
            ):
                entry["step"] = step.to(p.device, torch.float32)

    def _kernel_step(self, group: Group, *, check_only: bool) -> str | None:
        grad_scale, found_inf = self._grad_scaler()
        beta1, beta2 = group["betas"]
        return _route.kernels().adam_group(
            group["params"],
            self.state,
            group["lr"],
            beta1,
            beta2,
            number(group["weight_decay"]),
            number(group["eps"]),
            group["amsgrad"],
            group["maximize"],
            group["decoupled_weight_decay"],
            group["capturable"],
            grad_scale,
            found_inf,
            check_only,
        )

    def _new_states(self, group: Group) -> list[tuple[Tensor, dict[str, Any]]]:
        on_device = group["capturable"] or group["fused"]
        step_dtype = _get_scalar_dtype(is_fused=group["fused"])
        states = []
        for p in group["params"]:
            if p.grad is None or self.state.get(p):
                continue
            if group["fused"]:
                _device_dtype_check_for_fused(p)
            # Without `capturable` or `fused` the count stays on the host, which then knows it
            # without asking the device.
            step_device = p.device if on_device else "cpu"
            state = {"step": torch.zeros((), dtype=step_dtype, device=step_device)}
            for name in self._moments(group):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            states.append((p, state))
        return states

    @staticmethod
    def _moments(group: Group) -> tuple[str, ...]:
        moments = ("exp_avg", "exp_avg_sq")
        return (*moments, "max_exp_avg_sq") if group["amsgrad"] else moments

    def _lists(self, group: Group) -> tuple[Lists, bool]:
        """The group's tensors, states made where there are none; and whether any is complex."""
        lists: Lists = ([], [], [], [], [], [])
        has_complex = self._init_group(group, *lists)  # by this name the compiler knows it
        return lists, has_complex

    def _registered_step(self, group: Group) -> None:
        lists, has_complex = self._lists(group)
        if not lists[0]:
            return
        if has_complex or group["differentiable"]:
            return self._stock_step(group, lists, has_complex)
        lr, tensor_lr = number_and_tensor(group["lr"])
        beta1, tensor_beta1 = number_and_tensor(group["betas"][0])
        beta2, tensor_beta2 = number_and_tensor(group["betas"][1])
        grad_scale, found_inf = self._grad_scaler()
        # The compiler sets `capturable` for the time of the trace, on every device.
        tracing = torch.compiler.is_compiling()
        capturable = lists[0][0].is_cuda if tracing else group["capturable"]
        torch.ops.fused.adam_(
            *lists,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=number(group["weight_decay"]),
            eps=number(group["eps"]),
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            capturable=capturable,
            tensor_lr=tensor_lr,
            tensor_beta1=tensor_beta1,
            tensor_beta2=tensor_beta2,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _composite_step(self, group: Group) -> None:
        self._stock_step(group, *self._lists(group))

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
