"""What an optimizer keeps: moving averages, and states stored as its options say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused.optim import _state
from fused.optim._options import StepOptions

# In __dict__ alone, so that an optimizer that was pickled before has the defaults.
_EXTRAS, _CAPTURED = "extras", "_loading"

_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
_EXTRA_STATES = {*map(_state.scale_name, _MOMENTS), "master", "remainder", "ema"}
_STORED = _MOMENTS | _EXTRA_STATES


class KeptStates(Optimizer):
    """The part of `FusedStep` that steps know nothing of: averages, copies and checkpoints."""

    _op: ClassVar[str]
    extras: StepOptions
    # Of the gradients at the last step, before clipping; None before, and where none was needed.
    grad_norm: Tensor | None = None

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the moving averages (`ema_decay`) in the parameters' place, for evaluation.

        Parameters that no step has changed are their own average. On leaving, every parameter has
        its own value again, bit for bit; what was written to it meanwhile is lost.
        """
        if self.extras.ema_decay is None:
            raise ValueError(f"{self._op}: ema_decay must be given for averaged(), got None")
        averages = {
            p: self.state[p]["ema"]
            for group in self.param_groups
            for p in group["params"]
            if "ema" in self.state.get(p, {})
        }
        with torch.no_grad():
            kept = {p: p.detach().clone() for p in averages}
        try:
            with torch.no_grad():
                for p, average in averages.items():
                    p.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for p, value in kept.items():
                    p.copy_(value)

    @contextlib.contextmanager
    def _states_kept_by(self, params: list[Tensor]) -> Iterator[None]:
        """Gives parameters the states back that they had, where what is within fails."""
        before = [(p, dict(self.state[p]) if p in self.state else None) for p in params]
        try:
            yield
        except BaseException:
            for p, entry in before:
                if entry is None:
                    self.state.pop(p, None)
                else:
                    self.state[p].clear()
                    self.state[p].update(entry)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {_EXTRAS: self.extras, "grad_norm": self.grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault(_EXTRAS, StepOptions())
        super().__setstate__(state)
        if _CAPTURED in vars(self):
            self._restore_exactly(vars(self)[_CAPTURED])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of this class or of its stock twin has returned.

        The options beyond stock's stay those of this optimizer's constructor, and states are stored
        as they say: bit for bit where they were saved so, converted where they were not.

        Raises:
            ValueError: for int8 codes without their scales or scales without codes, with nothing
                loaded.
        """
        before = self.state, self.param_groups
        handle = self.register_load_state_dict_pre_hook(_capture)
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups = before
            raise
        finally:
            handle.remove()
            vars(self).pop(_CAPTURED, None)

    def _restore_exactly(self, saved: dict[str, Any]) -> None:
        """Stock has cast everything to the parameters' dtypes; here are the states as they were."""
        groups = zip(self.param_groups, saved["param_groups"], strict=True)
        for group, saved_group in groups:
            for p, index in zip(group["params"], saved_group["params"], strict=True):
                entry = saved["state"].get(index)
                if entry and p.is_floating_point():
                    own = self.state[p]
                    for name in _STORED & own.keys():
                        if own[name] is not None:
                            del own[name]
                    moments = [name for name in entry if name in _MOMENTS]
                    own.update(_state.loaded_entry(p, entry, moments, self.extras))


def _capture(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """The last of the hooks that may still replace what is loaded."""
    vars(optimizer)[_CAPTURED] = state_dict
