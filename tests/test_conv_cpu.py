"""The CPU kernels' own: panels, pairs of channels in bfloat16, and the memory they touch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fused import functional, reference
from fused.testing import assert_as_accurate_as_stock
from fused.testing.cases.conv import ConvCase

DTYPES = [torch.float32, torch.bfloat16]


def both_directions(function, tensors: list[Tensor], options: dict) -> dict[str, Tensor]:
    input, *rest = tensors
    input = input.detach().requires_grad_()
    out = function(input, *rest, **options)
    grad_out = torch.linspace(-1, 1, out.numel()).view(out.shape).bfloat16().to(out.dtype)
    return {"out": out, "grad_input": torch.autograd.grad(out, input, grad_out)[0]}


# Of registers of 16 lanes: 1, 2 and 3; 4; 3 + 2; 3 + 3; 4 + 3; and of eight lanes all of these too.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_channels", [15, 24, 47, 64, 65, 96, 97])
@pytest.mark.parametrize("in_channels", [1, 31, 192, 193])
def test_panels_of_each_width(in_channels: int, out_channels: int, dtype: torch.dtype) -> None:
    """Sums of an odd number of channels, and of more than one block, in both directions."""
    case = ConvCase(
        "panels", size=(3, 4), kernel=(1, 2), in_channels=in_channels, out_channels=out_channels
    )
    tensors, options = case.make(dtype, "cpu")
    options.pop("activation")
    expected = both_directions(reference.conv2d, [t.double() for t in tensors], options)
    stock = both_directions(torch.nn.functional.conv2d, tensors, options)
    for name, actual in both_directions(functional.conv2d, tensors, options).items():
        assert_as_accurate_as_stock(actual, expected[name], stock[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_nan_stays_out_of_the_groups_beside_it(layout: str, dtype: torch.dtype) -> None:
    """A group's last channel of an odd number has no partner in the next one's first."""
    case = ConvCase(
        "groups", size=(4, 5), in_channels=15, out_channels=60, groups=3, padding=1, layout=layout
    )
    (input, *rest), options = case.make(dtype, "cpu")
    input[:, 5], input[1, 9, 3, 4] = torch.nan, torch.inf  # the first and last of the middle group
    for function in (functional.conv2d, reference.conv2d):
        out = function(input, *rest, **options)
        assert out[:, :20].isfinite().all() and out[:, 40:].isfinite().all()
        assert out[:, 20:40].isnan().all()


GUARDED = """
import ctypes, mmap, torch
from fused import functional

page = mmap.PAGESIZE
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
maps = []

def guarded(tensor):
    "The same with nothing readable behind it."
    size = tensor.numel() * tensor.element_size()
    room = -(-size // page) * page
    maps.append(mmap.mmap(-1, room + page))
    begin = ctypes.addressof(ctypes.c_char.from_buffer(maps[-1]))
    assert libc.mprotect(begin + room, page, 0) == 0
    flat = torch.frombuffer(maps[-1], dtype=tensor.dtype, offset=room - size, count=tensor.numel())
    return flat.as_strided(tensor.size(), tensor.stride()).copy_(tensor)

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for layout in (torch.contiguous_format, torch.channels_last):
        for groups, rows, depth in ((1, 40, 65), (2, 40, 14), (1, 19, 3), (1, 4, 1), (4, 4, 4)):
            def draw(*shape):
                drawn = torch.randn(shape).to(dtype)
                return guarded(drawn.to(memory_format=layout) if len(shape) == 4 else drawn)

            inputs = [draw(2, depth, 9, 7), draw(rows, depth // groups, 3, 3), draw(rows)]
            inputs = [t.requires_grad_() for t in inputs]
            out = functional.conv2d(*inputs, padding=1, groups=groups)
            torch.autograd.grad(out, inputs, draw(*out.shape))
print("read nothing else")
"""


def test_nothing_is_read_behind_a_tensor() -> None:
    """In a process of its own, which ends where a page is touched that cannot be read."""
    answer = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert answer.stdout == "read nothing else\n", (answer.returncode, answer.stderr)
