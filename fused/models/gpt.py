"""A small decoder-only transformer, as GPT-2: learned positions, pre-norm blocks, GELU."""

from __future__ import annotations

import math

import torch
from torch import nn

from fused.models._generate import continue_prompt
from fused.models._layers import LayerName, Layers, layer_set


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a norm and added to its input.

    Shape:
        - hidden: ``[B, T, E]``
        - mask: ``[T, T]``, True where a query must not see a key
        - Output: ``[B, T, E]``
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float, layers: Layers) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = layers.attention(embed_dim, num_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norm1(hidden)
        # `is_causal` is a hint that the mask is the causal one; nn.MultiheadAttention wants both.
        attended, _ = self.attention(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)
        hidden = hidden + self.dropout(attended)
        return hidden + self.dropout(self.mlp(self.norm2(hidden)))


class GPT(nn.Module):
    """Decoder-only transformer language model.

    Args:
        vocab_size: number of tokens; 256 for bytes.
        context_length: the longest sequence that it reads.
        embed_dim: width of the model.
        num_heads: attention heads; must divide ``embed_dim``.
        num_layers: blocks.
        dropout: probability of dropping an embedding, an attention weight or a residual branch.
        tie_weights: use the token embedding as the output layer's weight.
        layers: ``"stock"`` or ``"fused"``.

    Shape:
        - tokens: ``[B, T]``, int64, with T at most ``context_length``
        - Output: logits ``[B, T, vocab_size]``

    Example:
        >>> model = fused.models.GPT(layers="fused")
        >>> model(torch.randint(256, (4, 128))).shape
        torch.Size([4, 128, 256])
    """

    mask: torch.Tensor  # bool, [context_length, context_length], True above the diagonal

    def __init__(
        self,
        vocab_size: int = 256,
        *,
        context_length: int = 128,
        embed_dim: int = 128,
        num_heads: int = 4,
        num_layers: int = 4,
        dropout: float = 0.0,
        tie_weights: bool = True,
        layers: LayerName = "fused",
    ) -> None:
        super().__init__()
        chosen = layer_set(layers)
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.position_embedding = nn.Embedding(context_length, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, dropout, chosen) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)
        if tie_weights:
            self.head.weight = self.token_embedding.weight
        mask = torch.ones(context_length, context_length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As GPT-2: std 0.02, smaller where a residual branch ends; zero biases; plain norms."""
        residual_std = 0.02 / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            elif name.endswith(("out_proj.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=residual_std)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"GPT: tokens must be at most {self.context_length} per row, got {length}"
            )
        mask = self.mask[:length, :length]
        positions = torch.arange(length, device=tokens.device)
        hidden = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.head(self.norm(hidden))

    @torch.no_grad()
    def generate(
        self,
        tokens: torch.Tensor,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continues every row of ``tokens`` by ``num_tokens`` drawn tokens.

        Each token is drawn from what the model says after the last ``context_length`` tokens.

        Args:
            tokens: the prompt, ``[B, T]`` with T at least 1; it may be longer than the context.
            num_tokens: how many tokens to add.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: draw only from the ``top_k`` likeliest tokens.
            generator: source of randomness, torch's default one if None.

        Returns:
            ``[B, T + num_tokens]``: the prompt and its continuation
        """

        def next_logits(tokens: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return self(tokens[:, -self.context_length :])[:, -1]

        return continue_prompt(self, tokens, num_tokens, next_logits, temperature, top_k, generator)
