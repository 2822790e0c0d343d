"""Where the training data comes from, and which part of it a step sees.

A batch is a pure function of (seed, step). So stock and fused see the same data, and a run that is
resumed needs to know nothing but its step.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from fused._cli import CommandError, require
from fused.train import readers
from fused.train.readers import DataError, Split

# Tests are left out: they are half of the library by size, and much of that is tables of numbers.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HELD_OUT_OF_256 = 13  # about one file in twenty
_TEXT_HELD_OUT = 0.1  # of a single file, its end


def _generator(*key: int) -> torch.Generator:
    """A generator whose stream depends on every number of the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _digest(*tensors: torch.Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(repr(tuple(tensor.shape)).encode())
        sha.update(tensor.contiguous().numpy().data)
    return sha.hexdigest()[:16]


@dataclass
class ImageData:
    """Labelled images, standardised by the training images' mean and deviation per channel."""

    name: str
    train: Split
    held_out: Split

    def __post_init__(self) -> None:
        images, labels = self.train
        self.in_channels = images.shape[1]
        self.num_classes = 1 + int(max(labels.max(), self.held_out[1].max()))
        pixels = images.double()
        self._mean = pixels.mean(dim=(0, 2, 3), keepdim=True)
        self._std = pixels.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)

    def _standardised(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.double() - self._mean) / self._std).float()

    def batch(self, step: int, size: int, seed: int) -> Split:
        """The images and labels of one step: every epoch a fresh permutation, cut into batches."""
        images, labels = self.train
        size = min(size, len(images))
        epoch, position = divmod(step, len(images) // size)
        order = torch.randperm(len(images), generator=_generator(seed, epoch))
        chosen = order[position * size : (position + 1) * size]
        return self._standardised(images[chosen]), labels[chosen]

    def held_out_batches(self, size: int) -> list[Split]:
        images, labels = self.held_out
        chunks = zip(images.split(size), labels.split(size), strict=True)
        return [(self._standardised(some), their_labels) for some, their_labels in chunks]

    def describe(self) -> str:
        shape = "x".join(str(extent) for extent in self.train[0].shape[1:])
        return (
            f"{self.name}: {len(self.train[0]):,} images of {shape}, "
            f"{len(self.held_out[0]):,} held out"
        )

    def digest(self) -> str:
        return _digest(*self.train, *self.held_out)


@dataclass
class TextData:
    """Bytes to predict one from another."""

    name: str
    train: torch.Tensor  # uint8, [bytes]
    held_out: torch.Tensor  # uint8, [bytes]

    def batch(self, step: int, size: int, length: int, seed: int) -> torch.Tensor:
        """``size`` random windows of ``length + 1`` bytes: inputs and, one further, targets."""
        starts = torch.randint(len(self.train) - length, (size,), generator=_generator(seed, step))
        windows = starts[:, None] + torch.arange(length + 1)
        return self.train[windows].long()

    def held_out_windows(self, length: int, count: int) -> torch.Tensor:
        """At most ``count`` windows, evenly spread: ``[windows, length + 1]``."""
        windows = self.held_out.unfold(0, length + 1, length + 1)
        chosen = torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()
        return windows[chosen].long()

    def bigram_loss(self, windows: torch.Tensor) -> float:
        """Mean loss in nats per byte of the bigram model, counted on the training part."""
        pairs = self.train[:-1].long() * 256 + self.train[1:].long()
        # A tenth of a count for every pair, so that one never seen keeps a probability.
        counts = torch.bincount(pairs, minlength=256 * 256).view(256, 256).double() + 0.1
        log_probability = (counts / counts.sum(dim=1, keepdim=True)).log()
        return -log_probability[windows[:, :-1], windows[:, 1:]].mean().item()

    def describe(self) -> str:
        return (
            f"{self.name}: {len(self.train) / 1e6:.1f} MB, "
            f"{len(self.held_out) / 1e6:.1f} MB held out"
        )

    def digest(self) -> str:
        return _digest(self.train, self.held_out)


def load_digits() -> ImageData:
    """scikit-learn's handwritten digits: 1,797 scans of 8x8, every fifth held out."""
    require("sklearn")
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    held_out = torch.arange(len(images)) % 5 == 4
    return ImageData(
        "scikit-learn digits",
        (images[~held_out], labels[~held_out]),
        (images[held_out], labels[held_out]),
    )


def load_standard_library() -> TextData:
    """The source text of this Python's standard library; whole files are held out, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if not _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            continue
        name_hash = hashlib.sha256(relative.as_posix().encode()).digest()
        parts[name_hash[0] < _HELD_OUT_OF_256].append(file.read_bytes())
    if not parts[False] or not parts[True]:
        raise CommandError(f"{root} holds no source files; name a text with --data PATH")
    train, held_out = (_bytes_tensor(b"".join(parts[key])) for key in (False, True))
    return TextData("Python standard library", train, held_out)


def load_text(path: Path) -> TextData:
    """Any file, read as bytes; the last tenth is held out."""
    content = _bytes_tensor(path.read_bytes())
    cut = int(len(content) * (1 - _TEXT_HELD_OUT))
    return TextData(path.name, content[:cut], content[cut:])


def _bytes_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)


def load_path(path: Path) -> ImageData | TextData:
    """What ``--data`` names: MNIST or CIFAR-10 as torchvision lays them out, or a text file."""
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file or directory")
        if path.is_file() and "-idx" not in path.name:
            return load_text(path)
        folder = path.parent if path.is_file() else path
        return _load_images(folder)
    except (DataError, OSError) as error:
        raise CommandError(f"--data {error}") from None


def _load_images(path: Path) -> ImageData:
    if (folder := readers.find_mnist(path)) is not None:
        name = folder.parent.name if folder.name == "raw" else "MNIST"
        return ImageData(name, *(_torchvision("MNIST", folder) or readers.read_mnist(folder)))
    if (folder := readers.find_cifar10(path)) is not None:
        return ImageData(
            "CIFAR-10", *(_torchvision("CIFAR10", folder) or readers.read_cifar10(folder))
        )
    raise DataError(
        f"{path}: neither MNIST (train-images-idx3-ubyte) nor CIFAR-10 (data_batch_1) is in it"
    )


def _torchvision(dataset: str, folder: Path) -> tuple[Split, Split] | None:
    """Both splits read by torchvision; None where it is not installed or does not take the files.

    It takes only the published files, in its own layout; our readers also take gzipped ones and
    other data in the same format, and say what is wrong with a file.
    """
    root = folder.parent if dataset == "CIFAR10" else folder.parent.parent
    if dataset == "MNIST" and folder.parent.name != "MNIST":
        return None
    try:
        import torchvision

        splits = []
        for train in (True, False):
            data = getattr(torchvision.datasets, dataset)(str(root), train=train, download=False)
            images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
            images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
            splits.append((images.contiguous(), labels.long()))
        return splits[0], splits[1]
    except (ImportError, RuntimeError, OSError, ValueError, AssertionError):
        return None  # no torchvision, or none for this torch; files that it refuses: ours says why
