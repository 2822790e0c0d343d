"""`fused.patch` and `fused.unpatch`: swap a model's stock modules for their twins, in place."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from fused import modules

# A twin holds just what its stock module holds, so that a swap is a change of class: parameters,
# buffers, hooks, training mode and every other reference to the module stay as they are.
TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: modules.Attention,
    nn.LSTM: modules.LSTM,
    nn.LSTMCell: modules.LSTMCell,
    nn.Conv1d: modules.Conv1d,
    nn.Conv2d: modules.Conv2d,
    nn.Conv3d: modules.Conv3d,
}

_STOCK = tuple(TWINS)

# In eval, under no_grad, these two and their subclasses would compute attention themselves and go
# around the module. An attribute of each, which its constructor set, lets them: unset, they call
# their submodules.
_FAST_PATH_SWITCHES: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}

_CLASS_BEFORE = "_fused_class_before_patch"
_SWITCH_BEFORE = "_fused_switch_before_patch"


@dataclass
class PatchReport:
    """What `patch` did, by the modules' names in the model."""

    replaced: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(model)'}: {what}" for name, what in self.replaced.items()]
        lines += [
            f"{name or '(model)'}: left alone, {why}" for name, why in self.left_alone.items()
        ]
        return "\n".join(lines) or "no module of a kind that fused replaces"


def patch(model: nn.Module) -> PatchReport:
    """Swaps every stock module that has a twin in `fused`, in place.

    Parameters stay the very same tensors, and hooks, training mode and references to the modules
    stay as well, so that an optimizer made before goes on. Subclasses of stock modules and
    parametrized modules are left alone. An `nn.TransformerEncoder` or `nn.TransformerEncoderLayer`
    calls its patched attention in evaluation too, where stock has a path of its own around it: of
    padded positions it then returns what the layers make of them, as in training, where stock's
    path returns zeros.

    Args:
        model: any module; it may itself be of a kind that has a twin.

    Returns:
        What was replaced, and what was left alone and why, by module name.
    """
    report = PatchReport()
    for name, module in model.named_modules():
        kind = type(module)
        if kind in TWINS:
            module.__dict__[_CLASS_BEFORE] = kind
            module.__class__ = TWINS[kind]
            report.replaced[name] = f"{kind.__name__} -> fused.{TWINS[kind].__name__}"
        elif isinstance(module, _STOCK) and kind not in TWINS.values():
            stock = next(base.__name__ for base in kind.__mro__ if base in TWINS)
            report.left_alone[name] = (
                "parametrized"
                if parametrize.is_parametrized(module)
                else f"{kind.__name__} is a subclass of {stock}"
            )
    for module in model.modules():
        switch = _fast_path_switch(module)
        if switch is not None and _holds_patched_attention(module):
            attribute, off = switch
            module.__dict__.setdefault(_SWITCH_BEFORE, getattr(module, attribute))
            setattr(module, attribute, off)
    return report


def unpatch(model: nn.Module) -> PatchReport:
    """Undoes `patch`: exactly the modules that it swapped become stock again.

    A module that was parametrized since is left alone: its class is no longer the twin, but one
    that holds the parametrizations.
    """
    report = PatchReport()
    for name, module in model.named_modules():
        before = module.__dict__.get(_CLASS_BEFORE)
        if before is not None and type(module) is not TWINS[before]:
            report.left_alone[name] = "parametrized since"
        elif before is not None:
            del module.__dict__[_CLASS_BEFORE]
            report.replaced[name] = f"fused.{type(module).__name__} -> {before.__name__}"
            module.__class__ = before
        switch = _fast_path_switch(module)
        if switch is not None and _SWITCH_BEFORE in module.__dict__:
            attribute, _ = switch
            setattr(module, attribute, module.__dict__.pop(_SWITCH_BEFORE))
    return report


def _fast_path_switch(module: nn.Module) -> tuple[str, object] | None:
    switches = (s for kind, s in _FAST_PATH_SWITCHES.items() if isinstance(module, kind))
    return next((s for s in switches if hasattr(module, s[0])), None)


def _holds_patched_attention(module: nn.Module) -> bool:
    return any(isinstance(m, modules.Attention) for m in module.modules())
