"""The data that training reads: digits, text, MNIST and CIFAR-10 in torchvision's formats."""

import gzip
import json
import pickle
import struct

import numpy as np
import pytest
import torch

from fused.train import data as data_module
from fused.train.data import TextData, load_digits, load_standard_library, load_text
from fused.train.readers import DataError, read_cifar10, read_idx


def test_digits_are_split_once():
    digits = load_digits()
    assert digits.train[0].shape == (1438, 1, 8, 8) and digits.held_out[0].shape == (359, 1, 8, 8)
    assert digits.num_classes == 10
    everything = torch.cat([digits.train[1], digits.held_out[1]])
    assert everything.bincount().min() > 150


def test_image_batches_are_epochs():
    digits = load_digits()
    size, steps = 64, 1438 // 64
    seen = torch.cat([digits.batch(step, size, seed=3)[0] for step in range(steps)])
    assert len(seen.flatten(1).unique(dim=0)) > 0.99 * len(seen)  # no image twice in an epoch
    images, labels = digits.batch(5, size, seed=3)
    again, _ = digits.batch(5, size, seed=3)
    assert torch.equal(images, again) and labels.dtype == torch.int64
    assert not torch.equal(images, digits.batch(5, size, seed=4)[0])
    assert not torch.equal(images, digits.batch(5 + steps, size, seed=3)[0])
    assert abs(seen.mean()) < 0.05 and abs(seen.std() - 1) < 0.05


def test_standard_library_is_split_by_file():
    first, second = load_standard_library(), load_standard_library()
    assert torch.equal(first.train, second.train) and torch.equal(first.held_out, second.held_out)
    assert len(first.train) > 1e6 and 0.02 < len(first.held_out) / len(first.train) < 0.2
    source = bytes(json.__spec__.loader.get_data(json.__file__))
    found = [bytes(part.numpy()).count(source) for part in (first.train, first.held_out)]
    assert sorted(found) == [0, 1]


def test_text_batches_are_windows():
    data = TextData("numbers", torch.arange(200, dtype=torch.uint8), torch.arange(50, 90))
    windows = data.batch(3, size=32, length=8, seed=0)
    assert windows.shape == (32, 9) and (windows.diff(dim=1) == 1).all()
    assert torch.equal(windows, data.batch(3, 32, 8, 0))
    assert not torch.equal(windows, data.batch(4, 32, 8, 0))
    assert data.held_out_windows(8, count=2)[:, 0].tolist() == [50, 77]
    assert TextData("short", windows[0], windows[0]).batch(0, 4, 8, 0).shape == (4, 9)


def test_bigram_loss_by_hand():
    data = TextData("ab", torch.tensor(list(b"ababac")), torch.tensor(list(b"aba")))
    windows = data.held_out_windows(2, 1)
    a_then_b = (2 + 0.1) / (3 + 25.6)
    b_then_a = (2 + 0.1) / (2 + 25.6)
    expected = -(np.log(a_then_b) + np.log(b_then_a)) / 2
    assert data.bigram_loss(windows) == pytest.approx(expected, rel=1e-12)


def test_text_holds_out_its_end(text):
    data = load_text(text)
    assert bytes(torch.cat([data.train, data.held_out]).numpy()) == text.read_bytes()
    assert len(data.held_out) == pytest.approx(0.1 * text.stat().st_size, abs=1)


# Data sets in torchvision's formats


def write_idx(path, array):
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    content += array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(root, suffix=""):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, size in (("train", 40), ("t10k", 12)):
        images = random.integers(0, 256, (size, 28, 28), np.uint8)
        write_idx(raw / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(size, dtype=np.uint8) % 10)
    return raw


def write_cifar10(root, protocol=2):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": random.integers(0, 256, (10, 3072), np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps({**batch, "batch_label": name}, protocol))
    return folder


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("named", ["root", "folder", "file"])
def test_reads_mnist(tmp_path, suffix, named):
    raw = write_mnist(tmp_path, suffix)
    file = raw / f"train-images-idx3-ubyte{suffix}"
    data = data_module.load_path({"root": tmp_path, "folder": raw, "file": file}[named])
    assert data.train[0].shape == (40, 1, 28, 28) and data.held_out[0].shape == (12, 1, 28, 28)
    expected = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    assert np.array_equal(data.train[0].squeeze(1).numpy(), expected)
    assert data.held_out[1].tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize("protocol", [2, 5])
def test_reads_cifar10(tmp_path, protocol):
    folder = write_cifar10(tmp_path, protocol)
    data = data_module.load_path(tmp_path)
    assert data.train[0].shape == (50, 3, 32, 32) and data.held_out[0].shape == (10, 3, 32, 32)
    expected = np.random.default_rng(0).integers(0, 256, (10, 3072), np.uint8)
    assert np.array_equal(data.train[0][:10].flatten(1).numpy(), expected)
    assert torch.equal(read_cifar10(folder)[0][1], torch.arange(10).repeat(5))


def test_cifar_pickles_run_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": Payload(), "labels": []}))
    with pytest.raises(DataError, match=r"test_batch: not a CIFAR batch \(it names builtins.exec"):
        read_cifar10(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"\0\0\x08\x01\0\0\0", "not an idx file"),
        (b"hello, world", "not an idx file"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "must hold bytes in 1 dimensions, got code 0d01"),
        (b"\0\0\x08\x01\0\0\0\x05abc", r"must be 13 bytes for shape \[5\], got 11"),
        (b"\0\0\x08\x01\xff\xff\xff\xffabc", "must be 4294967303 bytes"),
    ],
)
def test_broken_idx(tmp_path, content, message):
    path = tmp_path / "labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path, 1)


def test_broken_gzip(tmp_path):
    path = tmp_path / "labels-idx1-ubyte.gz"
    for content in (b"no gzip", gzip.compress(b"x" * 1000)[:-12]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            read_idx(path, 1)
