"""The tensor-core kernels of convolution: every instance of them, and which calls they take."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import on_gpus
from test_conv import (
    NAMES,
    assert_nan_and_infinity_go_as_in_the_reference,
    draw_grad_out,
    run,
    stock,
)
from torch import Tensor

from fused import functional, reference
from fused.testing import assert_as_accurate_as_stock, emulated_cuda
from fused.testing.cases.conv import CASES as ALL_CASES
from fused.testing.cases.conv import ConvCase
from fused.testing.tf32 import Tf32Products, tf32_allowed

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "tf32"}


def both_layouts(name: str, **options: Any) -> list[ConvCase]:
    case = ConvCase(name, **options)
    return [case, replace(case, name=f"{name}, channels-last", layout="channels-last")]


# Each instance in both passes, with more steps than there are places for in shared memory.
CASES = [
    *both_layouts("16", in_channels=16, out_channels=8, padding=1, activation="gelu"),
    *both_layouts("64", size=(11, 9), in_channels=40, out_channels=56, padding=1, stride=2),
    *both_layouts("128", size=(5, 9), in_channels=24, out_channels=200, kernel=(2, 3)),
    *both_layouts("128 and a rest", in_channels=24, out_channels=136, kernel=(2, 2), batch=1),
    *both_layouts("packed already", in_channels=32, out_channels=24, padding=1, bias=False),
    *both_layouts("packed already, 1x1", in_channels=64, out_channels=24, kernel=(1, 1), groups=2),
    *both_layouts("packed already, 4", size=(9, 9), in_channels=4, out_channels=8, kernel=(2, 4)),
    *both_layouts("odd channels", size=(7, 19), in_channels=19, out_channels=67, padding=2),
    *both_layouts("64, odd channels", in_channels=9, out_channels=40, kernel=(2, 2)),
    *both_layouts("four channels", in_channels=12, out_channels=20, kernel=(2, 2)),
    *both_layouts("1x1", size=(10, 30), in_channels=8, out_channels=72, kernel=(1, 1), bias=False),
    *both_layouts("groups of 8", in_channels=24, out_channels=48, groups=3, padding=1, stride=2),
    *both_layouts("groups of 3", in_channels=9, out_channels=12, groups=3, padding=1, dilation=2),
    *both_layouts("3d", size=(3, 4, 5), kernel=(2, 3, 2), in_channels=8, out_channels=16, batch=5),
    *both_layouts("one row", size=(1, 300), kernel=(1, 5), in_channels=8, out_channels=8, batch=1),
    *both_layouts("one column", size=(70, 1), kernel=(3, 1), in_channels=8, out_channels=8),
    ConvCase("1d", size=(150,), kernel=(7,), in_channels=3, out_channels=24, padding=3),
    ConvCase(
        "1d, channels-last", (150,), (3,), in_channels=8, out_channels=24, layout="channels-last"
    ),
    ConvCase("channels-last input", layout="channels-last input", in_channels=8, out_channels=24),
    ConvCase("channels-last weight", layout="channels-last weight", in_channels=8, out_channels=8),
    ConvCase("odd strides", layout="odd strides", in_channels=8, out_channels=24, padding=1),
]


@pytest.fixture(params=DTYPES, ids=DTYPES.get)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """What tensor cores multiply; float32 in tf32."""
    with tf32_allowed():
        yield request.param


def assert_case(case: ConvCase, dtype: torch.dtype, device: torch.device) -> None:
    tensors, options = case.make(dtype, device)
    grad_out = draw_grad_out(case, tensors, options)
    expected = run(getattr(reference, case.op), [t.double() for t in tensors], options, grad_out)
    with Tf32Products() if dtype == torch.float32 else contextlib.nullcontext():
        yardstick = run(stock(case), tensors, options, grad_out)
    actual = run(getattr(functional, case.op), tensors, options, grad_out)
    for name, a, e, s in zip(NAMES, actual, expected, yardstick):
        assert a.dtype == dtype
        assert_as_accurate_as_stock(a, e, s, name)


@on_gpus
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_forward_and_gradients(case: ConvCase, dtype: torch.dtype, backend: torch.device) -> None:
    assert_case(case, dtype, backend)


@pytest.mark.parametrize("case", [*CASES[:10], *ALL_CASES[::4]], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=DTYPES.get)
def test_what_an_older_device_computes_is_emulated_too(case: ConvCase, dtype: torch.dtype) -> None:
    with emulated_cuda(architecture=75) as launches:
        assert_case(case, dtype, torch.device("cpu"))
    assert not any("_mma_" in name for name in launches.counts())


ACCESS = ["copied", "in chunks", "singly"]


def launched(
    tensors: list[Tensor],
    *,
    grad_out_layout: torch.memory_format = torch.preserve_format,
    architecture: int = 80,
    **options: Any,
) -> list[str]:
    """The kernels of products that ran, and whether the weight was laid out anew."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with emulated_cuda(architecture=architecture) as launches:
        out = functional.conv2d(*leaves, **options)
        grad_out = torch.ones_like(out, memory_format=grad_out_layout)
        torch.autograd.grad(out, leaves, grad_out)
    found = set()
    for name in launches.counts():
        if "pack_weight" in name:
            found.add("packed")
        elif match := re.fullmatch(r"fused::conv_mma_correlate_kernel<.*, (\d+), .*(\d)>", name):
            found.add(f"{match[1]} rows, {ACCESS[int(match[2])]}")
        elif match := re.fullmatch(r"fused::conv_mma_backward_weight_kernel<.*, (\w+)>", name):
            found.add(f"weight, {ACCESS[0 if match[1] == 'true' else 2]}")
        elif match := re.fullmatch(r"fused::conv_(correlate|backward_weight)_kernel<.*>", name):
            found.add(f"portable {match[1]}")
    return sorted(found)


PORTABLE = ["portable backward_weight", "portable correlate"]


def draw(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype)


def draw_last(*shape: int) -> Tensor:
    return draw(*shape).to(memory_format=torch.channels_last)


def test_what_they_take_in_the_emulator() -> None:
    x, w = draw(2, 16, 5, 6), draw(72, 16, 3, 3)
    # The forward pass has 72 rows, the gradient of the input 16.
    contiguous = ["128 rows, in chunks", "16 rows, in chunks", "packed", "weight, singly"]
    assert launched([x, w]) == contiguous
    assert launched([x.bfloat16(), w.bfloat16()]) == contiguous
    copied = ["128 rows, copied", "16 rows, copied", "packed", "weight, copied"]
    last = draw_last(2, 16, 5, 6)
    assert launched([last, w]) == copied
    # float32 takes them by a setting, float64 and an older device never.
    assert launched([x.float(), w.float()]) == PORTABLE
    with tf32_allowed():
        assert launched([x.float(), w.float()]) == contiguous
        assert launched([last.float(), w.float()]) == [*copied[:3], "weight, singly"]
        assert launched([x.double(), w.double()]) == PORTABLE
    assert launched([x, w], architecture=75) == PORTABLE
    assert not launched([x, draw(16, 1, 3, 3)], groups=16)


def test_how_they_read_in_the_emulator() -> None:
    w = draw(40, 16, 3, 3)
    # Every access goes by the source alone, however the destination lies.
    grad_of = ["16 rows, copied", "64 rows, in chunks", "packed", "weight, singly"]
    assert launched([draw(2, 16, 5, 6), w], grad_out_layout=torch.channels_last) == grad_of
    # Channels of no whole eight, and channels side by side but off their 16 bytes.
    twelve = ["16 rows, in chunks", "32 rows, singly", "packed", "weight, singly"]
    assert launched([draw(2, 12, 5, 6), draw(24, 12, 3, 3)]) == twelve
    off = draw(2, 5, 6, 17).permute(0, 3, 1, 2)[:, 1:]
    assert "64 rows, in chunks" in launched([off, w])
    # The strides of an axis of one position are never used.
    pixel = draw(1, 16, 1, 1).as_strided((1, 16, 1, 1), (17, 1, 1, 1))
    assert "64 rows, copied" in launched([pixel, draw(40, 16, 1, 1)])
    # The smaller tile where the larger would be left empty by half.
    for rows, tile in ((17, 32), (64, 64), (65, 128), (136, 64), (193, 128)):
        assert f"{tile} rows, in chunks" in launched([draw(1, 8, 3, 3), draw(rows, 8, 1, 1)])


def test_a_weight_that_lies_right_is_not_laid_out_anew_in_the_emulator() -> None:
    def packed(x: Tensor, w: Tensor, **options: Any) -> bool:
        with emulated_cuda() as launches:
            (functional.conv2d if x.dim() == 4 else functional.conv3d)(x, w, **options)
        return any("pack_weight" in name for name in launches.counts())

    x, last, w = draw(1, 32, 5, 6), draw_last(1, 32, 5, 6), draw(24, 32, 3, 3)
    w_last = draw_last(24, 32, 3, 3)
    assert not packed(last, w_last)
    assert not packed(draw_last(1, 64, 5, 6), w_last, groups=2)
    assert packed(last, w) and packed(x, w) and packed(x, w_last)
    assert not packed(x, draw(24, 32, 1, 1)) and not packed(last, draw(24, 32, 1, 1))
    assert not packed(draw(1, 4, 5, 6), draw(24, 4, 2, 4))
    # Rows of no whole steps, rows that lie apart, and a weight off its 16 bytes.
    assert packed(draw_last(1, 24, 5, 6), draw_last(24, 24, 3, 3))
    assert packed(last, draw(24, 3, 3, 33)[..., :32].permute(0, 3, 1, 2))
    off = draw(24 * 288 + 1)[1:].view(24, 3, 3, 32).permute(0, 3, 1, 2)
    assert packed(last, off)
    # Along any axis, also the depth that images do not have.
    volume = draw(1, 32, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    for axis in range(3):
        taps, stride = [1, 1, 1], [32, 32, 32]
        taps[axis] = 3
        assert not packed(volume, draw(10 * 96).as_strided((8, 32, *taps), (96, 1, *stride)))
        stride[axis] = 64
        assert packed(volume, draw(10 * 96).as_strided((8, 32, *taps), (96, 1, *stride)))


@on_gpus
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("channels", [8, 12])
def test_nan_and_infinity_go_where_the_sums_carry_them(
    channels: int, layout: str, dtype: torch.dtype, backend: torch.device
) -> None:
    case = ConvCase(
        "nan", in_channels=channels, out_channels=24, padding=1, layout=layout, size=(9, 8)
    )
    assert_nan_and_infinity_go_as_in_the_reference(case, dtype, backend)


@on_gpus
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("channels", [16, 13])
def test_nothing_is_read_beyond_the_ends(
    channels: int, layout: str, dtype: torch.dtype, backend: torch.device
) -> None:
    def inside_nan(tensor: Tensor) -> Tensor:
        """The same numbers in a window of a larger tensor, with NaN around it."""
        last = layout == "channels-last"
        shape = [tensor.shape[i] for i in ((0, 2, 3, 1) if last else (0, 1, 2, 3))]
        room = tensor.new_full([shape[0], *(n + 16 for n in shape[1:])], torch.nan)
        window = room[:, 8 : 8 + shape[1], 8 : 8 + shape[2], 8 : 8 + shape[3]]
        return (window.permute(0, 3, 1, 2) if last else window).copy_(tensor)

    case = ConvCase("ends", in_channels=channels, out_channels=24, padding=1, layout=layout)
    tensors, options = case.make(dtype, backend)
    grad_out = draw_grad_out(case, tensors, options)
    expected = run(functional.conv2d, tensors, options, grad_out)
    surrounded = [*map(inside_nan, tensors[:2]), tensors[2]]
    inputs = [t.requires_grad_() for t in surrounded]
    out = functional.conv2d(*inputs, **options)
    actual = (out, *torch.autograd.grad(out, inputs, inside_nan(grad_out)))
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(a, e), name


@on_gpus
@pytest.mark.parametrize("case", CASES[:8], ids=lambda c: c.name)
def test_an_image_has_one_result_in_any_batch(
    case: ConvCase, dtype: torch.dtype, backend: torch.device
) -> None:
    (input, *rest), options = case.make(dtype, backend)
    both = functional.conv2d(input, *rest, **options)
    for i in range(2):
        assert torch.equal(functional.conv2d(input[i : i + 1], *rest, **options), both[i : i + 1])
