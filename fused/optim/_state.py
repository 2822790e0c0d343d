"""The states of a parameter: how they begin, and how they change from one way of storing into
another when a state_dict is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fused.optim._options import INT8, MASTER_DTYPES, StepOptions

Entry = dict[str, Any]
StateDtype = torch.dtype | Literal["int8"]

QUANT_BLOCK = 256


def scale_name(name: str) -> str:
    return f"{name}_scale"


def is_unsigned(name: str) -> bool:
    """Second moments are not negative, and have all 256 codes for it."""
    return name.endswith("_sq")


def new_moment(param: Tensor, name: str, dtype: StateDtype) -> Entry:
    """A moment of zeros."""
    if isinstance(dtype, torch.dtype):
        return {name: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}
    code_dtype = torch.uint8 if is_unsigned(name) else torch.int8
    codes = torch.zeros_like(param, dtype=code_dtype, memory_format=torch.preserve_format)
    blocks = -(-param.numel() // QUANT_BLOCK)
    scale = torch.zeros(blocks, dtype=torch.float32, device=param.device)
    return {name: codes, scale_name(name): scale}


def new_extras(param: Tensor, options: StepOptions, entry: Entry) -> Entry:
    """The master and the moving average that an entry lacks, of the parameter as it is now."""
    new: Entry = {}
    master = options.master_of(param)
    if master is not None and master not in entry:
        new[master] = _new_master(param, master, entry)
    if options.ema_decay is not None and "ema" not in entry:
        new["ema"] = param.detach().to(options.ema_dtype_of(param), copy=True)
    return new


def _new_master(param: Tensor, name: str, entry: Entry) -> Tensor:
    """Of what was loaded in the other form, if anything was."""
    if "master" in entry:
        return split_remainder(param, entry["master"])
    if "remainder" in entry:
        return join_remainder(param, entry["remainder"])
    if name == "master":
        return param.detach().to(torch.float32)
    return torch.zeros_like(param, dtype=torch.int16)


def begin(entry: Entry, new: Entry) -> None:
    """Adds states to those of a parameter. A master takes the place of one in the other form."""
    if not MASTER_DTYPES.keys().isdisjoint(new):
        for name in MASTER_DTYPES:
            entry.pop(name, None)
    entry.update(new)


# --- int8 codes, as csrc/optim/quantize.h defines them --------------------------------------------


@cache
def levels(unsigned: bool) -> Tensor:
    """The values of the codes: of 0 ... 254, or of 0 ... 127 of both signs."""
    values = [0.0]
    for level in range(1, 256):
        decade = 8 - level.bit_length()
        count = 128 >> decade
        values.append(10.0**-decade * (0.1 + 0.9 * (level - count + 1) / count))
    chosen = [0.0, *values[2:]] if unsigned else [10 * value for value in values[:128]]
    return torch.tensor(chosen, dtype=torch.float32)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor's elements as they lie, which is how blocks are cut."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _per_element(scale: Tensor, numel: int) -> Tensor:
    return scale.repeat_interleave(QUANT_BLOCK)[:numel]


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of codes, in their shape and layout."""
    values = torch.empty_like(codes, dtype=torch.float32)
    flat = _in_memory_order(codes).to(torch.int64)
    known = levels(codes.dtype == torch.uint8).to(codes.device)
    signed = known[flat.abs()] * torch.where(flat < 0, -1.0, 1.0)
    _in_memory_order(values).copy_(signed * _per_element(scale, flat.numel()))
    return values


def quantize(values: Tensor, *, unsigned: bool) -> tuple[Tensor, Tensor]:
    """The codes nearest to float32 values, in their layout, and a scale for each block."""
    flat = _in_memory_order(values)
    count = flat.numel()
    blocks = -(-count // QUANT_BLOCK)
    padded = torch.nn.functional.pad(flat.abs(), (0, blocks * QUANT_BLOCK - count))
    scale = padded.view(blocks, QUANT_BLOCK).amax(1) if count else padded
    known = levels(unsigned).to(values.device)
    ratio = (flat / _per_element(scale, count)).nan_to_num(0.0)
    code = torch.bucketize(ratio.abs(), (known[1:] + known[:-1]) / 2)
    if unsigned:
        code = torch.where(ratio > 0, code.clamp(min=1), code)  # a step divides by its root
    code = torch.where(ratio < 0, -code, code)
    codes = torch.empty_like(values, dtype=torch.uint8 if unsigned else torch.int8)
    _in_memory_order(codes).copy_(code)
    return codes, scale


# --- Loading --------------------------------------------------------------------------------------


def loaded_entry(
    param: Tensor, entry: Entry, moments: Iterable[str], options: StepOptions
) -> Entry:
    """The states of a saved entry as this optimizer stores them: what is stored alike stays bit for
    bit. Without what no kernel reads, such as a step count.

    What needs the parameter's value waits for the next step: a model may be loaded after its
    optimizer. A master then stays in the form it was saved in, and what is missing begins."""
    loaded: Entry = {}
    for name in moments:
        value = entry.get(name)
        if isinstance(value, Tensor):
            dtype = options.state_dtype_of(param)
            loaded |= _loaded_moment(param, name, value, entry.get(scale_name(name)), dtype)
    if options.master_of(param) is not None:
        loaded |= _loaded_master(param, entry)
    if options.ema_decay is not None and "ema" in entry:
        loaded["ema"] = entry["ema"].to(param.device, options.ema_dtype_of(param))
    return loaded


def _loaded_moment(
    param: Tensor, name: str, value: Tensor, scale: Tensor | None, dtype: StateDtype
) -> Entry:
    if (scale is not None) != (value.dtype in (torch.int8, torch.uint8)):
        beside = "without" if scale is None else "beside"
        rule = "be floating-point" if scale is None else "be int8 or uint8"
        raise ValueError(
            f"load_state_dict: {name} must {rule} {beside} {scale_name(name)}, got {value.dtype} "
            "(PyTorch's own optimizers take codes for numbers)"
        )
    value = value.to(param.device)
    if scale is None and isinstance(dtype, torch.dtype):
        return {name: value.to(dtype)}
    scale = None if scale is None else scale.to(param.device)
    layout = torch.empty_like(param, dtype=torch.float32)
    if scale is not None and dtype == INT8 and value.stride() == layout.stride():
        return {name: value, scale_name(name): scale}
    values = value.to(torch.float32) if scale is None else dequantize(value, scale)
    if isinstance(dtype, torch.dtype):
        return {name: values.to(dtype)}
    codes, scale = quantize(layout.copy_(values), unsigned=is_unsigned(name))
    return {name: codes, scale_name(name): scale}


def _loaded_master(param: Tensor, entry: Entry) -> Entry:
    """In whichever form it was saved. Of another dtype it is one that stock has cast, and left
    behind as it changed the parameter."""
    for name, dtype in MASTER_DTYPES.items():
        value = entry.get(name)
        fits = name == "master" or param.dtype == torch.bfloat16
        if fits and isinstance(value, Tensor) and value.dtype == dtype:
            return {name: value.to(param.device)}
    return {}


def join_remainder(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 parameter and its remainder, as csrc/optim/rounding.h."""
    bits = param.detach().view(torch.int16).to(torch.int32) << 16
    stray = ((param == 0) & (remainder < 0)) | (param.isinf() & (remainder > 0))
    return (bits + remainder.to(torch.int32).masked_fill(stray, 0)).view(torch.float32)


def split_remainder(param: Tensor, master: Tensor) -> Tensor:
    """What is beside a bfloat16 parameter for this float32 master; nothing where the parameter is
    not the rounded master, which then counts as it stands."""
    bits = param.detach().view(torch.int16).to(torch.int32) << 16
    rest = master.to(torch.float32).view(torch.int32) - bits
    near = (rest >= -0x8000) & (rest <= 0x8000)
    return torch.where(near, rest.clamp(max=0x7FFF), 0).to(torch.int16)
