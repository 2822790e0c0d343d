"""Readers for image data sets in the formats in which torchvision keeps them on disk.

Each returns ``(train, test)``, each a pair of images (uint8 ``[N, C, H, W]``) and labels (int64
``[N]``), or raises DataError with one line that names the file and what is wrong with it.
"""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

Split = tuple[torch.Tensor, torch.Tensor]

_IDX_UINT8 = 0x08
_CIFAR_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))


class DataError(Exception):
    """Data that is not there or cannot be read."""


def find_mnist(path: Path) -> Path | None:
    """The folder under ``path`` that holds MNIST's idx files, as torchvision lays them out."""
    for folder in (path, path / "raw", path / "MNIST" / "raw", path / "FashionMNIST" / "raw"):
        if _idx_file(folder, "train-images-idx3-ubyte") is not None:
            return folder
    return None


def find_cifar10(path: Path) -> Path | None:
    """The folder under ``path`` that holds CIFAR-10's batches, as torchvision lays them out."""
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / _CIFAR_TRAIN[0]).is_file():
            return folder
    return None


def read_mnist(folder: Path) -> tuple[Split, Split]:
    """MNIST or a data set in its format (Fashion-MNIST, KMNIST), gzipped or not."""
    return _read_mnist_split(folder, "train"), _read_mnist_split(folder, "t10k")


def _read_mnist_split(folder: Path, prefix: str) -> Split:
    arrays = []
    for name, dims in ((f"{prefix}-images-idx3-ubyte", 3), (f"{prefix}-labels-idx1-ubyte", 1)):
        file = _idx_file(folder, name)
        if file is None:
            raise DataError(f"{folder / name}: no such file (nor {name}.gz)")
        arrays.append(read_idx(file, dims))
    images, labels = arrays
    return _checked(folder / f"{prefix}-*", images.unsqueeze(1), labels.long())


def _idx_file(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def read_idx(path: Path, dims: int) -> torch.Tensor:
    """One idx file of bytes: two zeros, a type code, how many dimensions, their sizes, the data."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    header = 4 + 4 * dims
    if len(content) < header or content[:2] != b"\0\0":
        raise DataError(f"{path}: not an idx file")
    if content[2] != _IDX_UINT8 or content[3] != dims:
        raise DataError(
            f"{path}: must hold bytes in {dims} dimensions, got code {content[2:4].hex()}"
        )
    shape = struct.unpack(f">{dims}I", content[4:header])
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise DataError(
            f"{path}: must be {expected} bytes for shape {list(shape)}, got {len(content)}"
        )
    data = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    return torch.from_numpy(data.copy())


def read_cifar10(folder: Path) -> tuple[Split, Split]:
    """CIFAR-10's python version: pickled batches."""
    train = [_read_cifar_batch(folder / name) for name in _CIFAR_TRAIN]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return (images, labels), _read_cifar_batch(folder / "test_batch")


def _read_cifar_batch(path: Path) -> Split:
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # a broken pickle can raise nearly anything
        raise DataError(f"{path}: not a CIFAR batch ({error})") from None
    if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
        raise DataError(f"{path}: not a CIFAR batch (no data and labels in it)")
    data = batch["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise DataError(f"{path}: data must be bytes [N, 3072]")
    try:
        labels = torch.tensor(batch["labels"], dtype=torch.int64)
    except (TypeError, ValueError):
        raise DataError(f"{path}: labels must be whole numbers") from None
    return _checked(path, torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), labels)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists and arrays, and nothing else: a pickle can name any function."""

    _ALLOWED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("_codecs", "encode"),  # how Python 3 writes bytes in the protocol that CIFAR uses
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR batch does")
        return super().find_class(module, name)


def _checked(source: Path, images: torch.Tensor, labels: torch.Tensor) -> Split:
    if labels.dim() != 1 or len(images) != len(labels):
        raise DataError(
            f"{source}: must have one label per image, got {len(labels)} for {len(images)}"
        )
    if len(images) == 0:
        raise DataError(f"{source}: holds no images")
    if labels.min() < 0:
        raise DataError(f"{source}: labels must be at least 0, got {int(labels.min())}")
    return images, labels
