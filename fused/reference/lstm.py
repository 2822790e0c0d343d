"""The definition of the LSTM: one cell, and one layer in one direction."""

from __future__ import annotations

import torch
from torch import Tensor


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(h, c) of the next step in float64.

    input ``[B, I]``, hx ``([B, P], [B, H])``, w_ih ``[4H, I]``, w_hh ``[4H, P]``, biases ``[4H]``,
    in the order of the gates i, f, g, o.
    """
    h, c = hx[0].double(), hx[1].double()
    gates = input.double() @ w_ih.double().T + h @ w_hh.double().T
    for bias in (b_ih, b_hh):
        gates = gates if bias is None else gates + bias.double()
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) of one layer in one direction in float64.

    input ``[T, B, I]``, or ``[N, I]`` with the ``batch_sizes`` of a PackedSequence; hx and weights
    as in a cell; ``w_hr [P, H]`` projects each h. A reversed layer begins at the last step.
    """
    steps = list(input.unbind(0) if batch_sizes is None else input.split(batch_sizes.tolist()))
    h, c = hx[0].double(), hx[1].double()
    outputs = []
    for x in reversed(steps) if reverse else steps:
        rows = x.shape[0]  # the sequences that have this step are the first ones
        h_next, c_next = lstm_cell(x, (h[:rows], c[:rows]), w_ih, w_hh, b_ih, b_hh)
        h_next = h_next if w_hr is None else h_next @ w_hr.double().T
        h, c = torch.cat([h_next, h[rows:]]), torch.cat([c_next, c[rows:]])
        outputs.append(h_next)
    outputs = outputs[::-1] if reverse else outputs
    return (torch.stack if batch_sizes is None else torch.cat)(outputs), h, c
