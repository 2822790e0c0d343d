"""A recurrent language model: embedding, LSTM, linear."""

from __future__ import annotations

import math

import torch
from torch import nn

from fused.models._generate import continue_prompt
from fused.models._layers import LayerName, layer_set

# The hidden and the cell state of all layers, each [num_layers, B, hidden_size].
State = tuple[torch.Tensor, torch.Tensor]


class LSTMLanguageModel(nn.Module):
    """Language model over an LSTM.

    Args:
        vocab_size: number of tokens; 256 for bytes.
        embedding_dim: width of the token embedding.
        hidden_size: width of the LSTM.
        num_layers: stacked LSTM layers.
        dropout: probability of dropping an embedding, a feature between LSTM layers or an output.
        tie_weights: use the embedding as the output layer's weight; then ``embedding_dim`` must
            equal ``hidden_size``.
        layers: ``"stock"`` or ``"fused"``.

    Shape:
        - tokens: ``[B, T]``, int64
        - state: what an earlier call returned, or None for zeros
        - Output: logits ``[B, T, vocab_size]``, and the state after the last token, to go on from

    Example:
        >>> model = fused.models.LSTMLanguageModel(layers="fused")
        >>> logits, state = model(torch.randint(256, (4, 64)))
        >>> logits.shape
        torch.Size([4, 64, 256])
    """

    def __init__(
        self,
        vocab_size: int = 256,
        *,
        embedding_dim: int = 128,
        hidden_size: int = 256,
        num_layers: int = 1,
        dropout: float = 0.0,
        tie_weights: bool = False,
        layers: LayerName = "fused",
    ) -> None:
        super().__init__()
        if tie_weights and embedding_dim != hidden_size:
            raise ValueError(
                "LSTMLanguageModel: embedding_dim must equal hidden_size "
                f"({hidden_size}) when weights are tied, got {embedding_dim}"
            )
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.lstm = layer_set(layers).lstm(
            embedding_dim,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout
            if num_layers > 1
            else 0.0,  # between layers only: torch warns about one
        )
        self.head = nn.Linear(hidden_size, vocab_size)
        if tie_weights:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scaled-normal input weights, orthogonal recurrent ones, forget gates that start open."""
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("weight_ih"):
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
            elif name.startswith("weight_hh"):
                for gate in parameter.data.chunk(
                    4
                ):  # in torch's order: input, forget, cell, output
                    nn.init.orthogonal_(gate)
            else:
                nn.init.zeros_(parameter)
                if name.startswith("bias_ih"):
                    nn.init.ones_(parameter.data.chunk(4)[1])
        if self.head.weight is not self.embedding.weight:
            nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, tokens: torch.Tensor, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        hidden, state = self.lstm(self.dropout(self.embedding(tokens)), state)
        return self.head(self.dropout(hidden)), state

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

        Args:
            tokens: the prompt, ``[B, T]`` with T at least 1.
            num_tokens: how many tokens to add.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: draw only from the ``top_k`` likeliest tokens.
            generator: source of randomness, torch's default one if None.

        Returns:
            ``[B, T + num_tokens]``: the prompt and its continuation
        """
        state: State | None = None

        def next_logits(_: torch.Tensor, unread: torch.Tensor) -> torch.Tensor:
            nonlocal state
            logits, state = self(unread, state)
            return logits[:, -1]

        return continue_prompt(self, tokens, num_tokens, next_logits, temperature, top_k, generator)
