"""The training loop: a stock and a fused run of one task, side by side.

The runs take turns in short blocks of steps, each going first as often as the other, so that
whatever else the machine does meets both alike; and a block is long enough that each finds its own
data in the caches. Both see the same batches, which are made outside the timed part.
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fused._cli import CommandError
from fused.models._layers import LayerName
from fused.train.checkpoint import check_same_settings, load_checkpoint, save_checkpoint
from fused.train.tasks import Batch, Task

BLOCK_STEPS = 10
_SECONDS_BETWEEN_CHECKPOINTS = 30.0

# The precisions that parameters are kept in; the others run under autocast with float32 parameters.
_PARAMETER_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = (*_PARAMETER_DTYPES, *_AUTOCAST_DTYPES)


@dataclass(frozen=True)
class Settings:
    """What must be the same for a resumed run to continue bit for bit."""

    steps: int
    seed: int
    device: str
    dtype: str
    compile: bool
    dropout: float


class Interrupted(Exception):
    """The user asked to stop; the checkpoint is written."""


class Run:
    """One model in training, with everything that its next step depends on."""

    def __init__(self, task: Task, layers: LayerName, settings: Settings) -> None:
        self.task = task
        self.layers = layers
        self.dtype_name = settings.dtype
        self.device = torch.device(settings.device)
        self.dtype = _PARAMETER_DTYPES.get(settings.dtype, torch.float32)
        self._autocast = torch.autocast(
            self.device.type,
            dtype=_AUTOCAST_DTYPES.get(settings.dtype, torch.bfloat16),
            enabled=settings.dtype in _AUTOCAST_DTYPES,
        )
        torch.manual_seed(settings.seed)
        self.model = task.model(layers).to(self.device, self.dtype)
        self.forward = torch.compile(self.model) if settings.compile else self.model
        self.optimizer = task.optimizer(layers, self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: task.learning_rate_factor(step, settings.steps)
        )
        # float16 gradients underflow without it; disabled, it passes everything through.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.dtype == "float16")
        self.losses: list[float] = []
        self.block_seconds: list[tuple[int, float]] = []  # steps in the block, and how long it took
        self._random_state = self._capture_random_state()

    @property
    def step(self) -> int:
        return len(self.losses)

    def train_block(self, batches: list[Batch]) -> None:
        """One timed block of steps."""
        self._restore_random_state()
        on_device = [self._to_device(batch) for batch in batches]
        losses = []
        self._synchronize()
        start = time.perf_counter()
        try:
            for inputs, targets in on_device:
                losses.append(self._train_step(inputs, targets))
        except RuntimeError as error:
            if self.step > 0 or self.dtype_name not in _AUTOCAST_DTYPES:
                raise
            # Stock has no kernel for some layers in the low precisions on some devices.
            raise CommandError(
                f"{self.layers} cannot train {self.task.title} in {self.dtype_name} "
                f"on {self.device} ({str(error).splitlines()[0]})"
            ) from error
        self._synchronize()
        self.block_seconds.append((len(batches), time.perf_counter() - start))
        self.losses += torch.stack(losses).tolist()
        self._random_state = self._capture_random_state()

    def _train_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with self._autocast:
            loss = self.task.loss(self.forward, inputs, targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.task.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The task's metric over the held-out data."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in self.task.held_out_batches():
            inputs, targets = self._to_device(batch)
            with self._autocast:
                batch_total, batch_count = self.task.score(self.model, inputs, targets)
            total, count = total + batch_total, count + batch_count
        self.model.train()
        return total / count

    def seconds_per_step(self) -> float:
        """The median over blocks, the first left aside: it pays for warming up and compiling."""
        blocks = self.block_seconds[1:] or self.block_seconds
        return statistics.median(seconds / steps for steps, seconds in blocks)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_state": self._random_state,
            "losses": self.losses,
            "block_seconds": self.block_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self._random_state = state["random_state"]
        self.losses = list(state["losses"])
        self.block_seconds = [tuple(block) for block in state["block_seconds"]]

    def _to_device(self, batch: Batch) -> Batch:
        inputs, targets = batch
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        return inputs.to(self.device), targets.to(self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _capture_random_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _restore_random_state(self) -> None:
        torch.set_rng_state(self._random_state["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._random_state["cuda"], self.device)


class Training:
    """All runs of one task, their turns and their checkpoint."""

    def __init__(
        self, task: Task, layers: tuple[LayerName, ...], settings: Settings, checkpoint: Path
    ) -> None:
        self.task = task
        self.settings = settings
        self.checkpoint = checkpoint
        self.runs = {name: Run(task, name, settings) for name in layers}
        self._saved_settings = {
            **asdict(settings),
            "model": task.name,
            "layers": list(layers),
            "data": f"{task.data.name} ({task.data.digest()})",
        }

    @property
    def step(self) -> int:
        return min(run.step for run in self.runs.values())

    def resume(self) -> None:
        content = load_checkpoint(self.checkpoint)
        check_same_settings(self.checkpoint, content["settings"], self._saved_settings)
        for name, run in self.runs.items():
            run.load_state_dict(content["runs"][name])

    def save(self) -> None:
        runs = {name: run.state_dict() for name, run in self.runs.items()}
        save_checkpoint(self.checkpoint, {"settings": self._saved_settings, "runs": runs})

    def train(self, after_block: Callable[[Training], None]) -> None:
        """Trains to the last step and saves; on a first Ctrl-C saves and raises Interrupted."""
        saved_at = time.monotonic()
        with _deferred_interrupt() as interrupted:
            while self.step < self.settings.steps:
                self._train_turn()
                after_block(self)
                if interrupted():
                    self.save()
                    raise Interrupted
                if time.monotonic() - saved_at > _SECONDS_BETWEEN_CHECKPOINTS:
                    self.save()
                    saved_at = time.monotonic()
        self.save()

    def _train_turn(self) -> None:
        first = self.step
        last = min(first + BLOCK_STEPS, self.settings.steps)
        batches = [self.task.batch(step) for step in range(first, last)]
        turn = list(self.runs.values())
        if first // BLOCK_STEPS % 2:
            turn.reverse()
        for run in turn:
            run.train_block(batches)


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or a termination came; a second one stops at once.

    Between two blocks a checkpoint is whole, in the middle of a step it would not be.
    """
    received: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signal handlers belong to the main thread
        return
    previous = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
