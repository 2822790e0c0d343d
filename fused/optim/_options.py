"""What the optimizers have beyond stock's constructors, and where a state's dtype is decided."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)
INT8 = "int8"
# By which name a state entry holds the master of its parameter, and in which dtype.
MASTER_NAMES = {"float32": "master", "remainder": "remainder"}
MASTER_DTYPES = {"master": torch.float32, "remainder": torch.int16}


@dataclass(frozen=True)
class StepOptions:
    """The keyword-only extras of `fused.Adam`, `fused.AdamW` and `fused.SGD`; see `FusedStep`."""

    max_norm: float | None = None
    norm_scope: Literal["global", "group"] = "global"
    nonfinite: Literal["propagate", "error", "skip"] = "propagate"
    zero_grad: bool = False
    ema_decay: float | None = None
    master_weights: Literal["float32", "remainder"] | None = None
    stochastic_rounding: bool = False
    state_dtype: torch.dtype | Literal["int8"] | None = None

    def check(self, op: str) -> None:
        """Raises ValueError for what is out of range or contradicts itself."""

        def must(condition: bool, rule: str, name: str) -> None:
            if not condition:
                raise ValueError(f"{op}: {name} must {rule}, got {getattr(self, name)!r}")

        finite = self.max_norm is None or (math.isfinite(self.max_norm) and self.max_norm >= 0)
        must(finite, "be a finite number of at least 0 or None", "max_norm")
        must(self.norm_scope in ("global", "group"), 'be "global" or "group"', "norm_scope")
        modes = ("propagate", "error", "skip")
        must(self.nonfinite in modes, 'be "propagate", "error" or "skip"', "nonfinite")
        within = self.ema_decay is None or 0 <= self.ema_decay <= 1
        must(within, "be None or between 0 and 1", "ema_decay")
        masters = (None, *MASTER_NAMES)
        must(self.master_weights in masters, 'be None, "float32" or "remainder"', "master_weights")
        must(
            not (self.stochastic_rounding and self.master_weights),
            "be False beside a master, which rounds nothing",
            "stochastic_rounding",
        )
        dtypes = (None, INT8, torch.float32, torch.bfloat16)
        must(
            self.state_dtype in dtypes,
            'be None, torch.float32, torch.bfloat16 or "int8"',
            "state_dtype",
        )

    def check_params(self, op: str, params: Iterable[Tensor]) -> None:
        for p in params:
            if self.master_weights == "remainder" and p.dtype == torch.float16:
                raise ValueError(
                    f'{op}: params must be bfloat16 for master_weights="remainder", got {p.dtype}'
                )

    @property
    def needs_norm(self) -> bool:
        return self.max_norm is not None or self.nonfinite != "propagate"

    @property
    def master_name(self) -> str | None:
        return MASTER_NAMES[self.master_weights] if self.master_weights else None

    def master_of(self, param: Tensor) -> str | None:
        """By which name the parameter has a master: those of 16 bits, where it was asked for."""
        return self.master_name if param.dtype in LOW_PRECISION else None

    def state_dtype_of(self, param: Tensor) -> torch.dtype | Literal["int8"]:
        """How the moments of a parameter are stored: as asked for, else float32 beside a master,
        else as the parameter is."""
        if self.state_dtype is not None:
            return self.state_dtype
        return torch.float32 if self.master_of(param) else param.dtype

    def ema_dtype_of(self, param: Tensor) -> torch.dtype:
        return torch.float64 if param.dtype == torch.float64 else torch.float32

    def given(self) -> dict[str, Any]:
        """The options that are not as they are by default."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}


OPTION_NAMES = tuple(field.name for field in fields(StepOptions))
