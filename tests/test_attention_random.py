"""The options of attention in random combinations: dense, packed and over a cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused.testing import emulated_cuda
from fused.testing.attention import Judgement, Results, run_cache_case, run_case
from fused.testing.cases.attention import AttentionCase
from fused.testing.cases.attention_cache import CacheCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# FUSED_EXAMPLES=2000 for the long run, whose examples differ from run to run.
EXAMPLES = int(os.environ.get("FUSED_EXAMPLES", "0"))
# Hypothesis itself likes to repeat what it drew: of 150 cases 57 had shapes of their own.
EVENLY = st.randoms(use_true_random=True)
MASKS = [
    None, None, "bool [S, T]", "bool [B, 1, 1, T]", "blind [B, H, S, T]", "additive [S, T]",
    "additive [B, H, S, T]", "additive [H, 1, T]", "additive [B, 1, S, T]", "-inf [S, T]",
    "float32 [1, H, S, T]",
]  # fmt: skip


def count(pick: Random, most: int, least: int = 1) -> int:
    """Of rows or keys: half of the time few, for which there are kernels of their own."""
    return pick.randint(least, pick.choice([4, most]))


def window(pick: Random, longest: int) -> tuple[int, int] | None:
    left, right = (pick.choice([-1, count(pick, longest // 2, 0)]) for _ in range(2))
    return pick.choice([None, (left, right), (left, right)])


def scale(pick: Random) -> float | None:
    return pick.choice([None, None, 0.0, pick.uniform(-1.0, 1.0)])


@dataclass(frozen=True)
class RandomCase(AttentionCase):
    """With dropout, which the cases that have names do without."""

    dropout_p: float = 0.0

    def make(
        self, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> tuple[list[Tensor], dict[str, Any]]:
        tensors, options = super().make(dtype, device, seed)
        return tensors, options | ({"dropout_p": self.dropout_p} if self.dropout_p else {})


@st.composite
def random_cases(
    draw: st.DrawFn,
    longest: int,
    widest: int = 24,
    packed: bool = False,
    beyond: tuple[int, int] | None = None,
) -> RandomCase:
    """`beyond`: one case in eight has so many keys, and few rows, as tensor cores take them."""
    pick = draw(EVENLY)
    heads_kv = pick.randint(1, 2)
    rows, keys = count(pick, longest), count(pick, longest)
    head_dims = [pick.choice([8, pick.randint(1, widest)]) for _ in range(2)]
    if beyond is not None and pick.randint(1, 8) == 1:
        rows, keys, head_dims = pick.randint(5, 12), pick.randint(*beyond), [8, 8]
    lengths = [
        (count(pick, longest, 0), count(pick, longest, 0)) for _ in range(pick.randint(0, 3))
    ]
    return RandomCase(
        "random",
        batch=pick.randint(1, 2),
        heads=heads_kv * pick.randint(1, 2),
        heads_kv=heads_kv,
        rows=rows,
        keys=keys,
        # Tensor cores take multiples of 8, and others padded.
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
        mask=pick.choice(MASKS),
        scale=scale(pick),
        dropout_p=pick.choice([0.0, 0.0, pick.random(), 1.0]),
        is_causal=pick.random() < 0.5,
        causal_alignment=pick.choice(["top_left", "bottom_right"]),
        window=window(pick, longest),
        softcap=pick.choice([None, pick.uniform(0.5, 20.0)]),
        alibi=pick.random() < 0.5,
        sink=pick.random() < 0.5,
        return_lse=pick.random() < 0.5,
        layout=pick.choice(["contiguous", "heads last", "odd strides"]),
        lengths=((rows, keys), *lengths) if packed else (),
        rest=pick.randint(0, 3) if packed else 0,
    )


@st.composite
def random_cache_cases(draw: st.DrawFn, longest: int, widest: int = 24) -> CacheCase:
    """Up to a few new tokens, which have a path of their own, or many; any number of new keys."""
    pick = draw(EVENLY)
    lengths = tuple(pick.randint(0, longest) for _ in range(pick.randint(1, 3)))
    new = pick.choice([None, 0, *[count(pick, longest // 2)] * 2])
    heads_kv = pick.randint(1, 2)
    extras: dict[str, Any] = {
        "is_causal": pick.random() < 0.7,
        "causal_alignment": pick.choice(["top_left", "bottom_right", "bottom_right"]),
        "return_lse": pick.random() < 0.5,
        "window": window(pick, longest),
        "softcap": pick.choice([None, pick.uniform(0.5, 20.0)]),
        "scale": scale(pick),
    }
    extras |= {name: True for name in ("alibi_slopes", "sink") if pick.random() < 0.5}
    return CacheCase(
        "random",
        lengths=lengths,
        capacity=max(1, max(lengths) + (new or 0) + pick.randint(0, 9)),
        new=new,
        rows=count(pick, longest // 2),
        heads=heads_kv * pick.randint(1, 4),
        heads_kv=heads_kv,
        head_dim=pick.choice([8, pick.randint(1, widest)]),
        head_dim_v=pick.choice([8, pick.randint(1, widest)]),
        page_size=pick.choice([None, pick.randint(1, 20)]),
        mask=pick.choice([None, None, "bool", "additive"]),
        odd_strides=pick.random() < 0.5,
        extras=tuple((name, value) for name, value in extras.items() if value is not None),
    )


def examples(number: int) -> settings:
    return settings(
        max_examples=EXAMPLES or number,
        derandomize=EXAMPLES == 0,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def test_random_combinations() -> None:
    judge(2000, random_cases(longest=140))


def test_random_combinations_emulated() -> None:
    with emulated_cuda():
        # The forward pass on tensor cores takes 64 keys at a time.
        judge(150, random_cases(longest=36, widest=8, beyond=(65, 80)))


def test_random_combinations_packed() -> None:
    judge(150, random_cases(longest=90, packed=True))


def test_random_combinations_packed_emulated() -> None:
    with emulated_cuda():
        judge(50, random_cases(longest=36, widest=8, packed=True))


def test_random_combinations_over_a_cache() -> None:
    judge(200, random_cache_cases(longest=90), run_cache_case)


def test_random_combinations_over_a_cache_emulated() -> None:
    with emulated_cuda():
        judge(40, random_cache_cases(longest=36, widest=8), run_cache_case)


def judge(
    number: int,
    cases: st.SearchStrategy[Any],
    run_one: Callable[[Any, torch.dtype, torch.device], Results] = run_case,
) -> None:
    judgement = Judgement()

    @examples(number)
    @given(case=cases, dtype=st.sampled_from(DTYPES))
    def run(case: Any, dtype: torch.dtype) -> None:
        judgement.add(run_one(case, dtype, torch.device("cpu")))

    run()
    judgement.assert_as_accurate_as_stock()
