"""The three reference trainings: which model, on which data, how it is trained and judged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from fused._cli import CommandError
from fused.models import GPT, ConvNet, LSTMLanguageModel
from fused.models._layers import LayerName
from fused.train.data import ImageData, TextData

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets
Optimizer = torch.optim.Optimizer


def _optimizer(
    layers: LayerName, name: str, parameters: Iterable[Any], **options: Any
) -> Optimizer:
    """``torch.optim.<name>`` in its own fastest form, or ``fused.<name>``."""
    if layers == "stock":
        return getattr(torch.optim, name)(parameters, fused=True, **options)
    import fused

    return getattr(fused, name)(parameters, **options)


class Task(ABC):
    """One reference training. Subclasses say what; ``fused.train.loop`` says how."""

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str]  # what a batch is counted in
    metric: ClassVar[str]
    steps: ClassVar[int]
    warmup: ClassVar[int]  # steps over which the learning rate rises
    batch_size: ClassVar[int]
    max_grad_norm: ClassVar[float] = 1.0

    def __init__(self, seed: int, dropout: float) -> None:
        self.seed = seed
        self.dropout = dropout

    @property
    @abstractmethod
    def data(self) -> ImageData | TextData: ...

    @property
    @abstractmethod
    def items_per_step(self) -> int:
        """How many of ``unit`` one step sees."""

    @abstractmethod
    def model(self, layers: LayerName) -> nn.Module: ...

    @abstractmethod
    def optimizer(self, layers: LayerName, model: nn.Module) -> Optimizer: ...

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """What step number ``step`` trains on, on the CPU."""

    @abstractmethod
    def loss(self, model: Callable[..., Any], inputs: Any, targets: Any) -> torch.Tensor:
        """Mean cross-entropy, in nats."""

    @abstractmethod
    def held_out_batches(self) -> Iterable[Batch]: ...

    @abstractmethod
    def score(self, model: Callable[..., Any], inputs: Any, targets: Any) -> tuple[float, int]:
        """The sum of the metric over one held-out batch, and over how many items it is."""

    @abstractmethod
    def format_score(self, score: float) -> str: ...

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Linear warm-up, then half a cosine down to a twentieth."""
        rise = min(1.0, (step + 1) / max(1, min(self.warmup, steps // 5)))
        return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    def baseline(self) -> tuple[str, float] | None:
        """The name and the score of something simple to compare with."""
        return None

    def goal(self, score: float) -> tuple[str, bool]:
        """What the score must reach when nothing was changed, and whether it does."""
        raise NotImplementedError

    def sample(self, model: nn.Module, device: torch.device) -> str | None:
        """Something that the trained model makes, to look at."""
        return None


class ConvNetTask(Task):
    """Image classification, with SGD and Nesterov momentum."""

    name = "convnet"
    title = "ConvNet"
    unit = "images"
    metric = "accuracy"
    steps = 300
    warmup = 30
    batch_size = 64

    def __init__(self, data: ImageData, seed: int, dropout: float = 0.0) -> None:
        super().__init__(seed, dropout)
        smallest = min(data.train[0].shape[2:])
        if smallest < 8:
            raise CommandError(
                f"{data.name}: images must be at least 8x8, got a side of {smallest}"
            )
        self._data = data

    @property
    def data(self) -> ImageData:
        return self._data

    @property
    def items_per_step(self) -> int:
        return min(self.batch_size, len(self._data.train[0]))

    def model(self, layers: LayerName) -> nn.Module:
        return ConvNet(
            self._data.in_channels, self._data.num_classes, dropout=self.dropout, layers=layers
        )

    def optimizer(self, layers: LayerName, model: nn.Module) -> Optimizer:
        options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
        return _optimizer(layers, "SGD", model.parameters(), **options)

    def batch(self, step: int) -> Batch:
        return self._data.batch(step, self.batch_size, self.seed)

    def loss(self, model: Callable[..., Any], inputs: Any, targets: Any) -> torch.Tensor:
        return F.cross_entropy(model(inputs), targets)

    def held_out_batches(self) -> Iterable[Batch]:
        return self._data.held_out_batches(256)

    def score(self, model: Callable[..., Any], inputs: Any, targets: Any) -> tuple[float, int]:
        return (model(inputs).argmax(dim=1) == targets).sum().item(), len(targets)

    def format_score(self, score: float) -> str:
        return f"{100 * score:.2f} % right"

    def goal(self, score: float) -> tuple[str, bool]:
        return "over 97 % of the held-out images right", score > 0.97


class LanguageTask(Task):
    """Predicting the next byte, with AdamW."""

    unit = "tokens"
    metric = "loss"
    length: ClassVar[int]  # bytes per row of a batch
    held_out_rows: ClassVar[int] = 512

    def __init__(self, data: TextData, seed: int, dropout: float = 0.0) -> None:
        super().__init__(seed, dropout)
        shortest = min(len(data.train), len(data.held_out))
        if shortest <= self.length:
            raise CommandError(
                f"{data.name}: too short for {self.title}: the training part and the held-out part "
                f"need {self.length + 1} bytes each, got {len(data.train)} and {len(data.held_out)}"
            )
        self._data = data
        self._windows = data.held_out_windows(self.length, self.held_out_rows)
        self._bigram = data.bigram_loss(self._windows)

    @property
    def data(self) -> TextData:
        return self._data

    @property
    def items_per_step(self) -> int:
        return self.batch_size * self.length

    def batch(self, step: int) -> Batch:
        windows = self._data.batch(step, self.batch_size, self.length, self.seed)
        return windows[:, :-1], windows[:, 1:]

    def _logits(self, model: Callable[..., Any], inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs)

    def loss(self, model: Callable[..., Any], inputs: Any, targets: Any) -> torch.Tensor:
        return F.cross_entropy(self._logits(model, inputs).flatten(0, 1), targets.flatten())

    def held_out_batches(self) -> Iterable[Batch]:
        return [(rows[:, :-1], rows[:, 1:]) for rows in self._windows.split(64)]

    def score(self, model: Callable[..., Any], inputs: Any, targets: Any) -> tuple[float, int]:
        return self.loss(model, inputs, targets).item() * targets.numel(), targets.numel()

    def format_score(self, score: float) -> str:
        return f"{score:.4f} nats/byte"

    def baseline(self) -> tuple[str, float]:
        return "bigram", self._bigram

    def goal(self, score: float) -> tuple[str, bool]:
        bound = 0.8 * self._bigram
        return f"at least 20 % below the bigram model's loss, so under {bound:.3f}", score < bound

    def sample(self, model: nn.Module, device: torch.device) -> str:
        prompt = torch.tensor([list(b"def ")], device=device)
        generator = torch.Generator(device=device).manual_seed(self.seed)
        # A language model, maybe in torch.compile's wrapper, whose class does not show the method.
        drawn = model.generate(prompt, 240, temperature=0.7, generator=generator)[0]  # type: ignore[operator]
        return bytes(drawn.tolist()).decode("utf-8", errors="replace")


class LSTMTask(LanguageTask):
    name = "lstm"
    title = "LSTMLanguageModel"
    steps = 1200
    warmup = 30
    batch_size = 16
    length = 96

    def model(self, layers: LayerName) -> nn.Module:
        return LSTMLanguageModel(
            embedding_dim=64, hidden_size=256, dropout=self.dropout, layers=layers
        )

    def optimizer(self, layers: LayerName, model: nn.Module) -> Optimizer:
        options = {"lr": 8e-3, "betas": (0.9, 0.99), "weight_decay": 0.01}
        return _optimizer(layers, "AdamW", model.parameters(), **options)

    def _logits(self, model: Callable[..., Any], inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs)[0]


class GPTTask(LanguageTask):
    name = "gpt"
    title = "GPT"
    steps = 900
    warmup = 100
    batch_size = 16
    length = 96

    def model(self, layers: LayerName) -> nn.Module:
        return GPT(
            context_length=self.length,
            embed_dim=128,
            num_heads=4,
            num_layers=3,
            dropout=self.dropout,
            layers=layers,
        )

    def optimizer(self, layers: LayerName, model: nn.Module) -> Optimizer:
        # As GPT-2 and its descendants: matrices decay, biases and norms do not.
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return _optimizer(layers, "AdamW", groups, lr=3e-3, betas=(0.9, 0.95))


IMAGE_TASKS: dict[str, type[ConvNetTask]] = {"convnet": ConvNetTask}
LANGUAGE_TASKS: dict[str, type[LanguageTask]] = {"lstm": LSTMTask, "gpt": GPTTask}
TASK_NAMES = (*IMAGE_TASKS, *LANGUAGE_TASKS)
