"""Continuing a prompt: the loop over tokens, and choosing each from the model's logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def continue_prompt(
    model: nn.Module,
    tokens: torch.Tensor,
    num_tokens: int,
    next_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Adds ``num_tokens`` drawn tokens to every row of ``tokens``, with ``model`` in eval mode.

    ``next_logits(tokens, unread)`` gives the logits ``[B, V]`` of the token after ``tokens``, of
    which the last ones, ``unread``, are new since the call before.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"{type(model).__name__}: tokens must be [B, T] with T at least 1, "
            f"got {list(tokens.shape)}"
        )
    was_training = model.training
    model.eval()
    try:
        unread = tokens
        for _ in range(num_tokens):
            unread = choose(next_logits(tokens, unread), temperature, top_k, generator)
            tokens = torch.cat([tokens, unread], dim=1)
        return tokens
    finally:
        model.train(was_training)


def choose(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Draws one token per row.

    Args:
        logits: ``[B, V]``.
        temperature: divides the logits; 0 takes the likeliest token, without any randomness.
        top_k: draw only from the ``top_k`` likeliest tokens.
        generator: source of randomness, torch's default one if None.

    Returns:
        ``[B, 1]``, int64
    """
    if temperature < 0:
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
