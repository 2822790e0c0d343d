"""What an installed fused says: of a torch it was not built for, of itself, and of errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # build_support

import fused
from fused import _info, _load
from fused._attention_composite import Options
from fused._load import Target

HERE = _load.found()


@pytest.fixture
def built_for(monkeypatch: pytest.MonkeyPatch):
    """Pretends that this copy was built for another target; undone after the test."""

    def pretend(**changes: object) -> None:
        info = SimpleNamespace(
            python=HERE.python, machine=HERE.machine, torch=HERE.torch, torch_cuda=HERE.cuda
        )
        vars(info).update(changes)
        monkeypatch.setattr(_load, "build_info", lambda: info)

    _load.load.cache_clear()
    yield pretend
    _load.load.cache_clear()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"torch": "2.9.1"}, "torch 2.9.1"),
        ({"torch_cuda": "12.6"}, "CUDA 12.6"),
        ({"python": "3.9"}, "Python 3.9"),
        ({"machine": "riscv64"}, "riscv64"),
        ({"torch": "2.15.0.dev20261101"}, "torch 2.15.0.dev20261101"),
    ],
)
def test_import_names_what_it_was_built_for_and_what_it_found(built_for, changes, named) -> None:
    built_for(**changes)
    with pytest.raises(ImportError) as error:
        _load.load()
    first, second, third = str(error.value).splitlines()
    assert first.startswith("fused: built for") and named in first
    assert second.strip() == f"but found {HERE}."
    assert "pip install --no-cache-dir --force-reinstall --no-deps" in third


@pytest.mark.parametrize(
    ("built", "found", "fit"),
    [
        ("2.13.0+cpu", "2.13.1+cpu", True),  # a patch release keeps the ABI
        ("2.13.0", "2.13.0+cu130", True),  # the local part names the build; CUDA has its own field
        ("2.13.0", "2.14.0", False),
        ("2.15.0.dev20261101", "2.15.0.dev20261102", False),
    ],
)
def test_which_torch_fits(built: str, found: str, fit: bool) -> None:
    target = Target("3.11", "x86_64", built, None)
    assert _load.fits(target, target._replace(torch=found)) is fit


def test_a_source_tree_that_was_not_built_says_so(tmp_path) -> None:
    package = tmp_path / "fused"
    package.mkdir()
    shutil.copy(_load.__file__, package)
    (package / "__init__.py").touch()
    code = "from fused import _load; _load.load()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert "ImportError: fused: the compiled part is missing in" in answer.stderr
    assert "Build it with: pip install" in answer.stderr


def test_exceptions_of_the_bindings_are_pythons_own() -> None:
    """With another pybind11 than torch's they would arrive as RuntimeError."""
    q = torch.zeros(1, 2, 3, 4)
    rng = torch.zeros(2, dtype=torch.int64)
    arguments = Options(rng=rng)
    kernels = _load.load()
    with pytest.raises(ValueError, match=r"^attention: "):
        kernels.attention_forward(q, torch.zeros(1, 2, 3, 5), q, *arguments)
    with pytest.raises(TypeError, match=r"^attention: "):
        kernels.attention_forward(q.int(), q.int(), q.int(), *arguments)


def test_an_unknown_instruction_set_is_an_error_at_import() -> None:
    environment = {**os.environ, "FUSED_ISA": "avx3"}
    command = [sys.executable, "-c", "import fused"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (
        "ValueError: FUSED_ISA must be generic, avx2, avx512 or avx512_bf16, got 'avx3'"
        in answer.stderr
    )
    environment["FUSED_ISA"] = "generic"
    command[-1] = "from fused import _load; print(_load.load().isa())"
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.stdout == "generic\n"


def test_stub_is_of_the_compiled_module() -> None:
    from build_support import stub

    assert stub.PATH.read_text() == stub.render(_load.load())


def test_libfused_needs_no_python() -> None:
    """A program exported by AOTInductor loads it without an interpreter."""
    library = os.path.join(os.path.dirname(_load.__file__), "libfused.so")
    symbols = subprocess.run(
        ["nm", "-D", "-u", library], capture_output=True, text=True, check=True
    )
    python = [s for line in symbols.stdout.splitlines() if (s := line.split()[-1]).startswith("Py")]
    assert python == []


def test_import_loads_nothing_heavy() -> None:
    """What training and reports need is imported when they run, not with the package."""
    heavy = ("matplotlib", "sklearn", "jinja2", "tqdm", "torch._dynamo", "torch._inductor")
    code = f"import sys, fused; print([m for m in {heavy!r} if m in sys.modules])"
    stock = f"import sys, torch; print([m for m in {heavy!r} if m in sys.modules])"
    ours, theirs = (
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, stock)
    )
    assert ours == theirs


def test_info_as_json() -> None:
    command = [sys.executable, "-m", "fused", "info", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    info = json.loads(answer.stdout)
    assert info["fused"] == fused.__version__
    assert info["torch"] == torch.__version__
    assert info["cpu_isa"] in ("generic", "avx2", "avx512", "avx512_bf16")
    assert info["built_for"]["torch"] == _load.build_info().torch
    assert isinstance(info["missing"], list)


def test_info_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert _info.main([]) == 0
    text = capsys.readouterr().out
    for word in ("fused:", "Python:", "torch:", "CPU:", "kernels:", "compiler:", "missing:"):
        assert word in text


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),  # a later minor version of the same major one
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("7.5-PTX", (7, 5), True),
        ("7.5-PTX", (12, 0), True),
        ("7.5-PTX", (7, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
    ],
)
def test_which_gpu_runs_which_kernels(architecture: str, capability: tuple, runs: bool) -> None:
    assert _info.runs_on(architecture, capability) is runs


def test_info_says_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"cuda": None, "without_cuda_because": "torch 9 needs nvcc", "cuda_architectures": []}
    info = {"built_for": built, "torch_cuda": "13.0", "gpus": []}
    monkeypatch.setattr(_info.importlib.util, "find_spec", lambda name: None)
    kernels, gpu, packages = _info._missing(info)
    assert kernels.startswith("CUDA kernels: torch 9 needs nvcc. Then: pip install ")
    assert gpu.startswith("a GPU: ")
    assert packages.endswith("pip install jinja2 matplotlib numpy scikit-learn tqdm")

    old_gpu = {"name": "T4", "architecture": "7.5", "has_kernels": False}
    built |= {"cuda": "13.0", "cuda_architectures": ["8.0"]}
    kernels, *_ = _info._missing({**info, "gpus": [old_gpu]})
    assert "CUDA kernels for T4 (7.5): built for 8.0 only." in kernels
    assert 'TORCH_CUDA_ARCH_LIST="7.5" pip install ' in kernels
