"""Training of the reference models: its data, its checkpoints, its command."""

import json
import re
import signal

import pytest
import torch
from test_train_data import write_mnist

from fused.__main__ import main
from fused._cli import CommandError
from fused._version import __version__
from fused.train import data as data_module
from fused.train import load_checkpoint, loop
from fused.train.checkpoint import save_checkpoint
from fused.train.data import load_digits, load_text
from fused.train.loop import Interrupted, Settings, Training
from fused.train.tasks import ConvNetTask, GPTTask, LSTMTask

LAYERS = ("stock", "fused")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small_tasks(monkeypatch):
    """The tasks as they are, in shorter blocks and on less data per step."""
    monkeypatch.setattr(loop, "BLOCK_STEPS", 2)
    for task in (ConvNetTask, LSTMTask, GPTTask):
        monkeypatch.setattr(task, "batch_size", 4)
    for task in (LSTMTask, GPTTask):
        monkeypatch.setattr(task, "length", 16)
        monkeypatch.setattr(task, "held_out_rows", 8)


def make_training(task, text, folder, layers=LAYERS, **settings):
    chosen = {"steps": 8, "seed": 1, "device": "cpu", "dtype": "float32"}
    chosen |= {"compile": False, "dropout": 0.0, **settings}
    source = load_digits() if task is ConvNetTask else load_text(text)
    made = task(source, chosen["seed"], chosen["dropout"])
    return Training(made, layers, Settings(**chosen), folder / "run.pt")


def everything(training):
    """The state that a next step depends on, times left out."""
    states = {name: run.state_dict() for name, run in training.runs.items()}
    for state in states.values():
        del state["block_seconds"]
    return states


def assert_identical(actual, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_identical(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_identical(*pair)
    else:
        assert actual == expected


def interrupt_at(step):
    def after_block(training):
        if training.step == step:
            signal.raise_signal(signal.SIGINT)

    return after_block


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        (ConvNetTask, {}),
        (ConvNetTask, {"dropout": 0.3}),
        (ConvNetTask, {"dtype": "float16"}),
        (LSTMTask, {}),
        (LSTMTask, {"dropout": 0.3}),
        (LSTMTask, {"dtype": "float64"}),
        (GPTTask, {}),
        (GPTTask, {"dropout": 0.3}),
        (GPTTask, {"dtype": "bfloat16"}),
        (GPTTask, {"dtype": "float16"}),
    ],
)
def test_resume_continues_bit_for_bit(task, settings, small_tasks, text, tmp_path):
    straight = make_training(task, text, tmp_path / "straight", **settings)
    straight.train(lambda _: None)

    interrupted = make_training(task, text, tmp_path, **settings)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        interrupted.train(interrupt_at(4))
    assert signal.getsignal(signal.SIGINT) is handler
    torch.manual_seed(99)  # another process would not have this one's random state either

    resumed = make_training(task, text, tmp_path, **settings)
    resumed.resume()
    assert resumed.step == 4
    assert_identical(everything(resumed), everything(interrupted))
    resumed.train(lambda _: None)
    assert_identical(everything(resumed), everything(straight))
    assert_identical(load_checkpoint(tmp_path / "run.pt")["runs"].keys(), straight.runs.keys())


def test_training_learns(small_tasks, text, tmp_path):
    training = make_training(LSTMTask, text, tmp_path, steps=40)
    training.train(lambda _: None)
    for run in training.runs.values():
        assert run.losses[-1] < 0.6 * run.losses[0]
        assert run.evaluate() < 0.6 * run.losses[0]


@pytest.mark.parametrize("task", [ConvNetTask, LSTMTask, GPTTask])
def test_both_forms_learn_alike(task, small_tasks, text, tmp_path):
    # In float64, where rounding has no time to grow into a difference of its own.
    training = make_training(task, text, tmp_path, steps=12, dtype="float64")
    training.train(lambda _: None)
    stock, fused = training.runs["stock"].losses, training.runs["fused"].losses
    assert len(set(stock)) == 12
    assert fused == pytest.approx(stock, rel=1e-9)


def test_second_interrupt_stops_at_once(small_tasks, text, tmp_path):
    def after_block(training):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_training(LSTMTask, text, tmp_path).train(after_block)


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"step": 1})

    def crash(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "cut"])
def test_broken_checkpoint(content, tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"tensor": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(CommandError, match=r"run.pt: not a readable checkpoint \(.+\)"):
        load_checkpoint(path)


def test_foreign_checkpoint(tmp_path):
    torch.save({"model": {}}, tmp_path / "run.pt")
    with pytest.raises(CommandError, match="not a checkpoint of this version"):
        load_checkpoint(tmp_path / "run.pt")


# The command


def test_what_stock_cannot_train_is_said(small_tasks, text, tmp_path, monkeypatch):
    # On CPUs whose oneDNN has no float16 LSTM this is what happens; elsewhere it is made to.
    def fail(*_):
        raise RuntimeError("could not create a primitive\ndetails")

    monkeypatch.setattr(LSTMTask, "loss", fail)
    training = make_training(LSTMTask, text, tmp_path, dtype="float16")
    message = (
        "stock cannot train LSTMLanguageModel in float16 on cpu (could not create a primitive)"
    )
    with pytest.raises(CommandError) as error:
        training.train(lambda _: None)
    assert str(error.value) == message


def train(*arguments):
    return main(["train", *map(str, arguments)])


def test_command_writes_report_and_results(small_tasks, text, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--layers", LAYERS[0]) if len(LAYERS) == 1 else ()
    assert train("--data", text, "--steps", 6, "--out", out, *options) == 0
    printed = capsys.readouterr().out
    assert re.search(r"LSTMLanguageModel +stock +\d\.\d{4} nats/byte +[\d.]+ .?s", printed)
    assert "bigram" in printed and "ConvNet" not in printed

    results = json.loads((out / "results.json").read_text())
    assert [model["model"] for model in results["models"]] == ["lstm", "gpt"]
    assert results["environment"]["torch"] == torch.__version__
    for model in results["models"]:
        assert model["runs"].keys() == set(LAYERS)
        assert all(len(run["losses"]) == 6 for run in model["runs"].values())

    page = (out / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2 * len(LAYERS)
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)""", page)
    assert all(source.startswith("data:") for source, _ in links)  # nothing is fetched
    assert "LSTMLanguageModel" in page and "nats/byte" in page


def test_command_resumes_what_was_interrupted(small_tasks, text, tmp_path, monkeypatch, capsys):
    options = ("--model", "lstm", "--data", text, "--steps", 6, "--layers", "stock")
    assert train(*options, "--out", tmp_path / "straight") == 0
    plain_train = Training.train
    with monkeypatch.context() as patched:
        patched.setattr(Training, "train", lambda self, _: plain_train(self, interrupt_at(2)))
        assert train(*options, "--out", tmp_path / "out") == 130
    assert "interrupted; go on with --resume" in capsys.readouterr().err
    assert train(*options, "--out", tmp_path / "out", "--resume") == 0
    losses = [
        json.loads((tmp_path / name / "results.json").read_text())["models"][0]["runs"]["stock"]
        for name in ("straight", "out")
    ]
    assert losses[0]["losses"] == losses[1]["losses"]
    assert losses[0]["held_out"] == losses[1]["held_out"]

    assert train(*options, "--out", tmp_path / "out", "--resume", "--seed", 5) == 2
    error = capsys.readouterr().err
    assert "cannot resume with another seed: was 0, now 5" in error and error.count("\n") == 1


def broken_cases(folder, text):
    write_mnist(folder)
    (folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    (folder / "empty.txt").touch()
    (folder / "nothing").mkdir()
    return {
        ("--data", folder / "missing.txt"): "missing.txt: no such file or directory",
        ("--data", folder / "nothing"): "neither MNIST .* nor CIFAR-10",
        ("--data", folder / "empty.txt"): r"empty.txt: too short for LSTM.*got 0 and 0",
        ("--data", folder): "t10k-labels-idx1-ubyte: no such file",
        ("--data", text, "--model", "convnet"): "convnet cannot be trained on rhyme.txt",
        ("--resume", "--out", folder / "nothing"): "--resume: no checkpoint of all in",
        ("--out", text / "below"): "--out .*below: cannot be made",
        ("--device", "tpu"): "--device must be auto, cpu or cuda",
        ("--dropout", "1"): "--dropout must be at least 0 and below 1, got 1.0",
    }


def test_mistakes_are_one_line(text, tmp_path, capsys):
    for arguments, message in broken_cases(tmp_path, text).items():
        assert train("--out", tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err
        assert re.match(f"fused train: .*{message}", error), error
        assert error.count("\n") == 1


def test_missing_package_is_named(monkeypatch, capsys):
    found = data_module.require.__globals__["importlib"].util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    assert train() == 2
    error = capsys.readouterr().err
    assert error == "fused train: matplotlib not installed: pip install 'fused-kernels[train]'\n"


def test_unknown_command_shows_usage(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["tarin"])
    assert exit_.value.code == 2
    assert "invalid choice: 'tarin'" in capsys.readouterr().err


def test_no_command_shows_the_commands_and_a_version_is_there(capsys):
    for arguments, text in (([], "commands:\n  info"), (["--version"], __version__)):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert text in capsys.readouterr().out
