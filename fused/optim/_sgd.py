"""fused.SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as stock_sgd

from fused import _route
from fused.optim import _state
from fused.optim._registered import Group, lists_by_master, number_and_tensor
from fused.optim._step import SKIPPED, UNINITIALISED, FusedStep, NewStates, number

BUFFER = "momentum_buffer"


class SGD(FusedStep, torch.optim.SGD):
    """`torch.optim.SGD` whose step is one C++ call, and one pass over memory, per group.

    Arguments, state and `state_dict` are those of the stock class, and `FusedStep` describes what
    there is beyond. `foreach` and `fused` are accepted and choose nothing.
    """

    _op = "sgd"

    def _hyperparameters(self, group: Group) -> dict[str, Any]:
        return {
            "lr": group["lr"],
            "weight_decay": number(group["weight_decay"]),
            "momentum": number(group["momentum"]),
            "dampening": number(group["dampening"]),
            "nesterov": group["nesterov"],
            "first_step": False,
        }

    def _moments(self, group: Group) -> tuple[str, ...]:
        return (BUFFER,) if group["momentum"] != 0 else ()

    def _kernel_call(self, **arguments: Any) -> str | None:
        return _route.kernels().sgd_group(**arguments)

    def _lacks_buffer(self, parameter: Tensor) -> bool:
        return self.state.get(parameter, {}).get(BUFFER) is None

    def _new_states(self, group: Group) -> NewStates:
        """Buffers begin as zeros, which the first step makes the first gradient."""
        states: NewStates = []
        for p in group["params"]:
            if p.grad is None:
                continue
            state: dict[str, Any] = {}
            if group["momentum"] != 0 and self._lacks_buffer(p):
                state |= _state.new_moment(p, BUFFER, self.extras.state_dtype_of(p))
            state |= _state.new_extras(p, self.extras, self.state.get(p, {}))
            if state:
                states.append((p, state))
        return states

    def _first_outcome(self, group: Group, norm: Tensor | None) -> str:
        # A buffer that begins apart and that a skipped step left unset must not count as begun, and
        # whether it is skipped only the tensor knows: the one time that the host reads it.
        return SKIPPED if self._begins_apart(group) and self._is_skipped(norm) else UNINITIALISED

    def _first_step(self, group: Group, norm: Tensor | None, new: NewStates, plan: Any) -> None:
        if not self._begins_apart(group):
            self._kernel_step(group, norm, plan=plan)  # zero times the momentum, plus the gradient
            return
        begun_now = {id(p) for p, state in new if BUFFER in state}
        for first in (False, True):
            params = [p for p in group["params"] if (id(p) in begun_now) == first]
            self._kernel_step(group, norm, params=params, plan=plan, first_step=first)

    @staticmethod
    def _begins_apart(group: Group) -> bool:
        """Whether a first step is not that of a buffer of zeros: where it is dampened, or a
        parameter that is there twice begins its buffer twice."""
        params = group["params"]
        return group["momentum"] != 0 and (
            group["dampening"] != 0 or len(set(params)) < len(params)
        )

    def _is_skipped(self, norm: Tensor | None) -> bool:
        if self._found_inf():
            return True
        return self.extras.nonfinite == "skip" and norm is not None and not norm.isfinite().item()

    def _init_group(  # by this name the compiler knows it
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
        scales: list[Tensor] | None = None,
        masters: list[Tensor | None] | None = None,
        emas: list[Tensor] | None = None,
    ) -> bool:
        """Fills the lists, with states made where there are none; whether a gradient is sparse.

        With dampening, the buffers of a first step are None: it is no step of a buffer of zeros.
        """
        begins = group["dampening"] != 0 and self._any_begins(group)
        if scales is None or masters is None or emas is None:
            return super()._init_group(group, params, grads, buffers)
        if begins or self._is_composite(group):
            return super()._init_group(group, params, grads, buffers)
        for p, state in self._new_states(group):
            _state.begin(self.state[p], state)
        self._fill(group, params, grads, (buffers,), scales, masters, emas)
        return False

    def _any_begins(self, group: Group) -> bool:
        params = [p for p in group["params"] if p.grad is not None]
        return group["momentum"] != 0 and any(self._lacks_buffer(p) for p in params)

    def _registered_step(self, group: Group, norm: Tensor | None) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        scales: list[Tensor] = []
        masters: list[Tensor | None] = []
        emas: list[Tensor] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers, scales, masters, emas)
        if has_sparse_grad or group["differentiable"] or any(p.is_complex() for p in params):
            self._refuse_extras("sparse gradients, complex parameters or differentiable=True")
            return self._stock_step(group, params, grads, buffers, has_sparse_grad)
        if group["momentum"] != 0 and None in buffers:
            return self._begin(group, norm, params, grads, buffers)
        self._registered_call(group, norm, params, grads, buffers, scales, masters, emas)

    def _begin(
        self,
        group: Group,
        norm: Tensor | None,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
    ) -> None:
        """Steps the parameters that have a buffer, and those whose dampened buffer begins."""
        if {"ema_decay", "master_weights", "state_dtype"} & self.extras.given().keys():
            raise NotImplementedError(
                "sgd: dampening must be 0 where states other than the momentum buffer begin in a "
                f"traced step, got {group['dampening']} (let the first step be an eager one)"
            )
        if self._is_skipped(norm):
            return self._clear_gradients(group)
        triples = list(zip(params, grads, buffers, strict=True))
        for first_step in (False, True):
            chosen = [(p, g, b) for p, g, b in triples if (b is None) == first_step]
            some_params, some_grads = [p for p, _, _ in chosen], [g for _, g, _ in chosen]
            some_buffers = [torch.zeros_like(p) if b is None else b for p, _, b in chosen]
            if chosen:
                lists: list[list[Any]] = [some_params, some_grads, some_buffers, [], [], []]
                self._registered_call(group, norm, *lists, first_step=first_step)
            self._keep_buffers(some_params, some_buffers)

    def _registered_call(
        self, group: Group, norm: Tensor | None, *lists: list[Any], first_step: bool = False
    ) -> None:
        if not lists[0]:
            return
        arguments = self._hyperparameters(group) | self._registered_arguments(group, norm)
        arguments["first_step"] = first_step
        arguments["lr"], arguments["tensor_lr"] = number_and_tensor(arguments["lr"], lists[0])
        for lists_of_call in lists_by_master(*lists):
            torch.ops.fused.sgd_(*lists_of_call, **arguments)

    def _composite_step(self, group: Group) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)
        self._stock_step(group, params, grads, buffers, has_sparse_grad)

    def _stock_step(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
        has_sparse_grad: bool,
    ) -> None:
        stock_sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=has_sparse_grad,
            foreach=False,
            fused=False,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"] != 0:
            self._keep_buffers(params, buffers)

    def _keep_buffers(self, params: list[Tensor], buffers: list[Any]) -> None:
        for parameter, buffer in zip(params, buffers, strict=True):
            self.state[parameter][BUFFER] = buffer
