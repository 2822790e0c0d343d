"""fused.SGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.sgd import sgd as stock_sgd

from fused import _route
from fused.optim._step import FusedStep, Group, number, number_and_tensor


class SGD(FusedStep, torch.optim.SGD):
    """`torch.optim.SGD` whose step is one C++ call, and one pass over memory, per group.

    Arguments, state and `state_dict` are those of the stock class. `foreach` and `fused` are
    accepted and choose nothing.
    """

    def _kernel_step(self, group: Group, *, check_only: bool) -> str | None:
        grad_scale, found_inf = self._grad_scaler()
        return _route.kernels().sgd_group(
            group["params"],
            self.state,
            group["lr"],
            number(group["weight_decay"]),
            number(group["momentum"]),
            number(group["dampening"]),
            group["nesterov"],
            group["maximize"],
            False,
            grad_scale,
            found_inf,
            check_only,
        )

    def _lists(self, group: Group) -> tuple[list[Tensor], list[Tensor], list[Tensor | None], bool]:
        """Parameters, gradients and momentum buffers (empty without momentum); any sparse?"""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)
        return params, grads, buffers, has_sparse_grad

    def _first_step(self, group: Group) -> None:
        params, grads, buffers, _ = self._lists(group)
        self._begin(group, params, grads, buffers, self._kernel_call)

    def _registered_step(self, group: Group) -> None:
        params, grads, buffers, has_sparse_grad = self._lists(group)
        if has_sparse_grad or group["differentiable"] or any(p.is_complex() for p in params):
            self._stock_step(group, params, grads, buffers, has_sparse_grad)
        elif group["momentum"] == 0 or None not in buffers:
            begun = [buffer for buffer in buffers if buffer is not None]
            self._registered_call(group, params, grads, begun, first_step=False)
        else:
            self._begin(group, params, grads, buffers, self._registered_call)

    def _begin(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
        call: Callable[..., None],
    ) -> None:
        """Steps the parameters that have a buffer, and those whose buffer begins."""
        # A buffer that a skipped step left unset must not count as begun, and whether it is skipped
        # only the tensor knows: the one time that the host reads it, at a parameter's first step.
        found_inf = self._grad_scaler()[1]
        if found_inf is not None and found_inf.item() != 0:
            return
        triples = list(zip(params, grads, buffers, strict=True))
        for first_step in (False, True):
            chosen = [(p, g, b) for p, g, b in triples if (b is None) == first_step]
            some_params, some_grads = [p for p, _, _ in chosen], [g for _, g, _ in chosen]
            some_buffers = [torch.empty_like(p) if b is None else b for p, _, b in chosen]
            if chosen:
                call(group, some_params, some_grads, some_buffers, first_step=first_step)
            self._keep_buffers(some_params, some_buffers)

    def _kernel_call(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        *,
        first_step: bool,
    ) -> None:
        grad_scale, found_inf = self._grad_scaler()
        _route.kernels().sgd_lists(
            params,
            grads,
            buffers,
            group["lr"],
            number(group["weight_decay"]),
            number(group["momentum"]),
            number(group["dampening"]),
            group["nesterov"],
            group["maximize"],
            first_step,
            False,
            grad_scale,
            found_inf,
        )

    def _registered_call(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        *,
        first_step: bool,
    ) -> None:
        if not params:
            return
        lr, tensor_lr = number_and_tensor(group["lr"])
        grad_scale, found_inf = self._grad_scaler()
        torch.ops.fused.sgd_(
            params,
            grads,
            buffers,
            lr=lr,
            weight_decay=number(group["weight_decay"]),
            momentum=number(group["momentum"]),
            dampening=number(group["dampening"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first_step=first_step,
            capturable=False,
            tensor_lr=tensor_lr,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _composite_step(self, group: Group) -> None:
        self._stock_step(group, *self._lists(group))

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

    def _keep_buffers(self, params: list[Tensor], buffers: Sequence[Tensor | None]) -> None:
        for parameter, buffer in zip(params, buffers, strict=True):
            self.state[parameter]["momentum_buffer"] = buffer
