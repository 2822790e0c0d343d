"""The norm of many tensors and clipping by it, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused import _route

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Scalar, empty, ragged, whole chunks, and a chunk with a tail.
SHAPES = [(), (0,), (1,), (3, 5), (8192,), (2, 8192 + 37)]


def draw(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in SHAPES]


def definition(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_norm(dtype: torch.dtype, backend: torch.device) -> None:
    tensors = draw(backend, dtype)
    norm = _route.kernels().total_norm(tensors)
    assert norm.shape == () and norm.dtype == torch.float64 and norm.device.type == backend.type
    # What comes of the squares is rounded in the elements' accumulator, the sum is not.
    precision = 1e-14 if dtype == torch.float64 else 1e-7
    assert norm.item() == pytest.approx(definition(tensors), rel=precision)


def test_norm_of_mixed_dtypes_and_layouts(backend: torch.device) -> None:
    torch.manual_seed(0)
    tensors = [t for dtype in DTYPES for t in draw(backend, dtype)]
    tensors.append(torch.randn(40, 6, device=backend)[::2, 1:4])
    tensors.append(torch.randn(1001, device=backend)[1:])
    tensors.append(torch.randn(6, 7, device=backend).t())
    tensors.append(torch.randn(5, device=backend).expand(3, 5))
    tensors += [torch.full((1 + i % 7,), 0.1 * i, device=backend) for i in range(300)]
    norm = _route.kernels().total_norm(tensors)
    assert norm.item() == pytest.approx(definition(tensors), rel=1e-7)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 5000, -1])
def test_norm_of_what_is_not_finite(value: float, place: int, backend: torch.device) -> None:
    tensors = draw(backend)
    tensors[-1].view(-1)[place] = value
    norm = _route.kernels().total_norm(tensors).item()
    assert math.isnan(norm) if math.isnan(value) else norm == math.inf


def test_norm_of_nothing() -> None:
    assert _route.kernels().total_norm([]).item() == 0.0


def test_norm_under_a_gradient_scale(backend: torch.device) -> None:
    tensors = draw(backend)
    scale = torch.tensor(8.0, device=backend)
    kernels = _route.kernels()
    assert kernels.total_norm(tensors, scale).item() == kernels.total_norm(tensors).item() / 8


@pytest.mark.usefixtures("threads")
def test_norm_does_not_depend_on_threads() -> None:
    tensors = [*draw(torch.device("cpu")), torch.randn(300_001)]
    norms = set()
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        norms.add(_route.kernels().total_norm(tensors).item())
    assert len(norms) == 1


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_clipping(dtype: torch.dtype, max_norm: float, backend: torch.device) -> None:
    tensors = [*draw(backend, dtype), torch.randn(40, 6).to(backend, dtype)[::2, 1:4]]
    before = [t.double().clone() for t in tensors]
    versions = [t._version for t in tensors]
    norm = torch.tensor(3.0, device=backend, dtype=torch.float64)
    _route.kernels().clip_by_norm_(tensors, norm, max_norm)
    factor = min(1.0, max_norm / (3.0 + 1e-6))
    for tensor, old, version in zip(tensors, before, versions, strict=True):
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(tensor.double(), old * factor, rtol=rounding, atol=1e-7)
        assert tensor._version > version


@pytest.mark.parametrize("norm, expected", [(math.nan, math.nan), (math.inf, 0.0)])
def test_clipping_by_what_is_not_finite(
    norm: float, expected: float, backend: torch.device
) -> None:
    """As torch.nn.utils.clip_grad_norm_ has it."""
    tensor = torch.ones(9000, device=backend)
    _route.kernels().clip_by_norm_([tensor], torch.tensor(norm, device=backend), 1.0)
    assert torch.equal(tensor.nan_to_num(7.0), torch.full_like(tensor, expected).nan_to_num(7.0))


def test_refusals(backend: torch.device) -> None:
    kernels, ones = _route.kernels(), torch.ones(3, device=backend)
    with pytest.raises(TypeError, match="total_norm: tensors must be float32, float64, float16 or"):
        kernels.total_norm([ones, ones.to(torch.int32)])
    with pytest.raises(ValueError, match="total_norm: tensors must be dense, got Sparse"):
        kernels.total_norm([ones.to_sparse()])
    with pytest.raises(ValueError, match="total_norm: grad_scale must have one element"):
        kernels.total_norm([ones], ones)
    with pytest.raises(ValueError, match="clip_by_norm_: norm must have one element"):
        kernels.clip_by_norm_([ones], ones, 1.0)
    with pytest.raises(ValueError, match="clip_by_norm_: tensors must not hold one memory"):
        kernels.clip_by_norm_([ones, ones[:1].expand(5)], ones[0], 0.5)
    assert torch.equal(ones, torch.ones(3, device=backend))


def test_negative_views(backend: torch.device) -> None:
    """Their memory holds the negative of what they say."""
    tensor = torch.view_as_complex(torch.ones(4, 2, device=backend)).conj().imag
    assert tensor.is_neg()
    assert _route.kernels().total_norm([tensor]).item() == 2.0
    _route.kernels().clip_by_norm_([tensor], torch.tensor(2.0, device=backend), 1.0)
    torch.testing.assert_close(tensor.clone(), torch.full((4,), -0.5, device=backend))


@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck(scaled: bool) -> None:
    tensors, scale = draw(torch.device("cpu")), torch.tensor(4.0) if scaled else None
    torch.library.opcheck(torch.ops.fused.total_norm.default, (tensors,), {"grad_scale": scale})
    torch.library.opcheck(torch.ops.fused.clip_by_norm_.default, (tensors, torch.tensor(3.0), 1.0))
