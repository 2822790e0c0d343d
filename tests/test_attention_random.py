"""The options of attention in random combinations: dense, packed and over a cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused.testing import emulated_cuda
from fused.testing.attention import Judgement, Results, run_cache_case, run_case
from fused.testing.cases.attention import AttentionCase
from fused.testing.cases.attention_cache import CacheCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# FUSED_EXAMPLES=2000 for the long run, whose examples differ from run to run.
EXAMPLES = int(os.environ.get("FUSED_EXAMPLES", "0"))
MASKS = [
    None, None, "bool [S, T]", "bool [B, 1, 1, T]", "blind [B, H, S, T]", "additive [S, T]",
    "additive [B, H, S, T]", "additive [H, 1, T]", "additive [B, 1, S, T]", "-inf [S, T]",
    "float32 [1, H, S, T]",
]  # fmt: skip


@st.composite
def random_cases(
    draw: st.DrawFn, longest: int, widest: int = 24, packed: bool = False
) -> AttentionCase:
    heads_kv = draw(st.integers(1, 2))
    rows, keys = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    length = st.integers(0, longest)
    lengths = draw(st.lists(st.tuples(length, length), max_size=3)) if packed else []
    bound = st.one_of(st.just(-1), st.integers(0, longest))
    width = st.one_of(st.just(8), st.integers(1, widest))  # tensor cores take multiples of 8
    return AttentionCase(
        "random",
        batch=draw(st.integers(1, 2)),
        heads=heads_kv * draw(st.integers(1, 2)),
        heads_kv=heads_kv,
        rows=rows,
        keys=keys,
        head_dim=draw(width),
        head_dim_v=draw(width),
        mask=draw(st.sampled_from(MASKS)),
        is_causal=draw(st.booleans()),
        causal_alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        window=draw(st.one_of(st.none(), st.tuples(bound, bound))),
        softcap=draw(st.one_of(st.none(), st.floats(0.5, 20.0))),
        alibi=draw(st.booleans()),
        sink=draw(st.booleans()),
        return_lse=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "heads last", "odd strides"])),
        lengths=((rows, keys), *lengths) if packed else (),
        rest=draw(st.integers(0, 3)) if packed else 0,
    )


@st.composite
def random_cache_cases(draw: st.DrawFn, longest: int, widest: int = 24) -> CacheCase:
    """Up to a few new tokens, which have a path of their own, or many; any number of new keys."""
    # Drawn evenly: hypothesis likes to repeat what it drew, and then few windows hide anything.
    pick = draw(st.randoms(use_true_random=True))

    def count(most: int) -> int:
        return pick.randint(1, pick.choice([4, most]))

    def bound() -> int:
        return pick.choice([-1, pick.randint(0, longest // 2)])

    lengths = tuple(pick.randint(0, longest) for _ in range(count(3)))
    new = pick.choice([None, 0, count(longest // 2), count(longest // 2)])
    heads_kv = pick.randint(1, 2)
    extras: dict[str, Any] = {
        "is_causal": pick.random() < 0.7,
        "causal_alignment": pick.choice(["top_left", "bottom_right", "bottom_right"]),
        "return_lse": pick.random() < 0.5,
        "window": pick.choice([None, (bound(), bound())]),
        "softcap": pick.choice([None, pick.uniform(0.5, 20.0)]),
    }
    extras |= {name: True for name in ("alibi_slopes", "sink") if pick.random() < 0.5}
    return CacheCase(
        "random",
        lengths=lengths,
        capacity=max(1, max(lengths) + (new or 0) + pick.randint(0, 9)),
        new=new,
        rows=count(longest // 2),
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
    judge(150, random_cases(longest=140))


def test_random_combinations_emulated() -> None:
    with emulated_cuda():
        judge(150, random_cases(longest=36, widest=8))


def test_random_combinations_packed() -> None:
    judge(100, random_cases(longest=90, packed=True))


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
