"""The definition of rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Query and key with pairs of elements turned, in float64 or in another `dtype`.

    query ``[B, H, S, D]``, key ``[B, G, S, D]``, cos and sin ``[S, R]`` or ``[B, S, R]``. A pair is
    the two parts of a complex number, which is multiplied by cos + i sin.
    """
    cos, sin = (table.to(dtype).unsqueeze(-3) for table in (cos, sin))
    pairs = cos.shape[-1]

    def turn(x: Tensor) -> Tensor:
        x = x.to(dtype)
        places = torch.arange(2 * pairs, device=x.device)
        places = places.view(pairs, 2).T if interleaved else places.view(2, pairs)
        a, b = x[..., places[0]], x[..., places[1]]
        turned = x.clone()
        turned[..., places[0]] = a * cos - b * sin
        turned[..., places[1]] = b * cos + a * sin
        return turned

    return turn(query), turn(key)
