"""The gradient of a broadcast mask where the CUDA kernels add it up in parts."""

from __future__ import annotations

import re

import pytest
import torch

from fused.functional import scaled_dot_product_attention
from fused.testing import emulated_cuda
from fused.testing.attention import assert_case, draw_grads, run_fused
from fused.testing.cases.attention import RAGGED, AttentionCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# With the parts of sequences, row tiles (of 64) and key tiles (of 32), of which most are uneven.
# Only by the log-sum-exp does the same bias for all of a row's keys have a gradient.
CASES = [
    AttentionCase("47 sequences in 5", batch=47, mask="additive [H, S, T]"),
    AttentionCase(
        "2, 2 rows in 2, 17 keys in 2",
        batch=2, heads=3, rows=70, keys=520, head_dim=4, mask="additive [H, 1, 1]",
        return_lse=True,
    ),
    AttentionCase(
        "17 rows in 2", batch=1, rows=1050, keys=20, mask="additive [1, T]", is_causal=True
    ),
    AttentionCase(
        "all in one", batch=5, rows=70, keys=40, mask="additive [1]", sink=True, alibi=True
    ),
    AttentionCase(
        "11 keys in 2, each sequence alone",
        batch=3, rows=30, keys=330, mask="additive [B, 1, S, 1]", return_lse=True,
    ),
    AttentionCase("packed, 24 in 3", lengths=RAGGED * 4, rest=3, mask="additive [H, S, T]"),
    AttentionCase(
        "packed, 2, rows in 3",
        heads=3, lengths=((330, 40), (5, 600)), mask="additive [H, 1, 1]", return_lse=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in CASES for d in DTYPES if d == torch.float32 or c in CASES[:1]],
    ids=lambda x: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x.name,
)
def test_gradients_in_parts(case: AttentionCase, dtype: torch.dtype, backend: torch.device) -> None:
    assert_case(case, dtype, backend)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=lambda c: c.name)
def test_the_same_bits_again(case: AttentionCase, backend: torch.device) -> None:
    tensors, options = case.make(torch.float32, backend)
    first, second = (run_fused(tensors, options, draw_grads(tensors)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [(3, 1, 30, 1), (3, 2, 1, 330), (3, 1, 1, 1), (3, 1, 30, 330)])
def test_a_mask_of_a_sequence_does_not_depend_on_the_batch(
    shape: tuple[int, ...], backend: torch.device
) -> None:
    tensors, options = CASES[4].make(torch.float32, backend)
    mask, grads_out = torch.randn(shape, device=backend), draw_grads(tensors)
    together, alone = (
        run_fused(
            [x[part] for x in tensors],
            options | {"attn_mask": mask[part]},
            [x[part] for x in grads_out],
        )["grad of attn_mask"]
        for part in (slice(None), slice(1, 2))
    )
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize(
    ("batch", "heads", "length", "shape", "in_parts"),
    [
        (15, 2, 5, (1, 2, 5, 5), False),  # short
        (16, 2, 5, (1, 2, 5, 5), True),
        (16, 2, 5, (16, 2, 5, 5), False),  # not broadcast
        (16, 4, 5, (16, 1, 5, 5), False),  # heads alone
        (2, 1, 257, (1, 1, 1, 1), True),
        (1, 16, 5, (1, 1, 5, 5), False),
    ],
)
def test_which_sums_are_cut_in_the_emulator(
    batch: int, heads: int, length: int, shape: tuple[int, ...], in_parts: bool
) -> None:
    q = torch.randn(batch, heads, length, 4)
    mask = torch.zeros(shape, requires_grad=True)
    with emulated_cuda() as launches:
        scaled_dot_product_attention(q, q, q, mask).sum().backward()
    kernels = {re.sub(r".*::(\w+)<.*", r"\1", name) for name in launches.counts()}
    assert "attention_backward_scores_kernel" in kernels
    assert ("attention_backward_parts_kernel" in kernels) == in_parts
