"""Choosing the next token from a language model's logits."""

from __future__ import annotations

import torch


def check_prompt(model: str, tokens: torch.Tensor) -> None:
    """A prompt is a batch of at least one token each; an empty one has nothing to continue."""
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"{model}: tokens must be [B, T] with T at least 1, got {list(tokens.shape)}"
        )


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
