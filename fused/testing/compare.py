"""The one rule by which a result is right, without a tolerance that someone picked."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate_as_stock(
    actual: Tensor, expected: Tensor, stock: Tensor, what: str = "result"
) -> None:
    """Asserts that `actual` is at most twice as far from the truth as stock PyTorch is.

    `expected` is the float64 definition, `stock` the same maths by PyTorch's own operators in the
    dtype of `actual`. Two units in the last place of the largest expected value are granted
    besides, because on tiny cases stock is often exact. NaN and infinities must stand where the
    definition has them.

    A float64 result has no truth above it. Pass stock's float32 result, whose error is scaled by
    the ratio of the two types' units in the last place; as the definition's own error, once stock's
    and two units in the last place are granted on top.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    stock_dtype = torch.float32 if actual.dtype == torch.float64 else actual.dtype
    assert stock.dtype == stock_dtype, f"{what}: dtype {stock.dtype}, not {stock_dtype}"
    if actual.numel() == 0:
        return
    truth, ours, theirs = (t.detach().double().cpu() for t in (expected, actual, stock))
    finite = truth.isfinite()
    special = torch.where(finite, 0.0, truth)
    assert torch.equal(
        torch.where(finite, 0.0, ours).nan_to_num(nan=7e77), special.nan_to_num(nan=7e77)
    ), f"{what}: NaN or infinity in other places than the definition has them"
    error, stock_error = ((t - truth)[finite].abs() for t in (ours, theirs))
    if error.numel() == 0:
        return
    assert error.isfinite().all(), f"{what}: not finite where the definition is"
    largest = truth[finite].abs().max().item()
    unit = torch.finfo(actual.dtype).eps
    scale = unit / torch.finfo(stock.dtype).eps
    stock_error_max = scale * stock_error.nan_to_num(0.0).max().item()
    allowed = 2 * stock_error_max + 2 * unit * largest
    if actual.dtype == torch.float64:
        allowed += stock_error_max + 2 * unit * largest
    assert error.max().item() <= allowed, (
        f"{what}: error {error.max().item():.3g} is above {allowed:.3g}; stock's is "
        f"{stock_error_max:.3g}, the largest expected value {largest:.3g}"
    )
