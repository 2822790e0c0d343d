"""The build's own decisions: which file is what, which nvcc, which architectures, which torch."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_support import cuda, sources, toolchain
from build_support.errors import BuildError
from build_support.fatbin import contents
from build_support.sources import Kind
from build_support.toolchain import Compiler, Torch

GCC = Compiler("g++", "g++ 12.2.0")


def torch_like(version: str, cuda_version: str | None = None, root: Path = ROOT) -> Torch:
    return Torch(version, cuda_version, root / "torch")


def fake_nvcc(folder: Path, version: str) -> Path:
    """A script that answers as nvcc does, in a folder laid out as PyPI's wheels are."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "lib").mkdir()
    path = folder / "bin" / "nvcc"
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;\n"
        "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;\n"
        "--dryrun)\n"
        f'  echo "#$ TOP={folder}/bin/.." >&2\n'
        f'  echo "#$ INCLUDES=\\"-I{folder}/bin/..//include\\" " >&2\n'
        f'  echo "#$ LIBRARIES= \\"-L{folder}/bin/..//lib64\\"" >&2 ;;\n'
        "esac\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def no_cuda_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No nvcc, no GPU, none of the variables; returns an empty folder that is all of PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH", "FUSED_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "path"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    return path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("csrc/bindings/module.cpp", Kind.BINDING),
        ("csrc/bindings/library.cpp", Kind.GLUE),
        ("csrc/attention/attention.cpp", Kind.GLUE),
        ("csrc/attention/attention_cpu.cpp", Kind.CPU),
        ("csrc/conv/conv_cpu_depthwise.cpp", Kind.CPU),
        ("csrc/attention/attention_forward.cu", Kind.CUDA),
        ("csrc/emulator/fiber.cpp", Kind.EMULATOR),
        ("csrc/emulator/bindings.cpp", Kind.BINDING),
    ],
)
def test_kind_of_a_source(path: str, kind: Kind) -> None:
    assert sources.classify(Path(path)) is kind


def test_no_kernel_includes_torch() -> None:
    """130 s against 1.7 s to compile: architecture note, section 1."""
    kernels = [s.path for s in sources.find_sources() if s.kind in (Kind.CPU, Kind.CUDA)]
    assert kernels
    for kernel in kernels:
        command = ["g++", "-std=c++17", "-xc++", "-DFUSED_EMULATED", "-MM", "-Icsrc", kernel]
        # -MM lists what is included, and fails on a header that -Icsrc does not hold.
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr


def test_architectures_of_a_list() -> None:
    found = cuda.parse_architectures("8.0;9.0a 12.0+PTX, 7.5-PTX")
    assert [str(a) for a in found] == ["8.0", "9.0a", "12.0+PTX", "7.5-PTX"]
    assert [flag for a in found for flag in a.gencode] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
        "-gencode=arch=compute_75,code=compute_75",
    ]


def test_architectures_by_name() -> None:
    assert [str(a) for a in cuda.parse_architectures("Ampere Turing")] == [
        "8.0",
        "8.6+PTX",
        "7.5+PTX",
    ]


@pytest.mark.parametrize("text", ["7.0", "sm_80", "8", "Volta", "9.0b"])
def test_architectures_that_are_none(text: str) -> None:
    with pytest.raises(BuildError, match=r"must list architectures from 7\.5 on, got"):
        cuda.parse_architectures(text)


def test_default_architectures_are_those_nvcc_knows(no_cuda_here: Path, tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path / "toolkit", "13.0")
    assert [str(a) for a in cuda.choose_architectures(str(nvcc))] == ["8.0", "9.0a", "7.5-PTX"]


def test_gpu_present_decides_the_architecture(no_cuda_here: Path) -> None:
    smi = no_cuda_here / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n9.0\\n8.6\\n'\n")
    smi.chmod(0o755)
    assert [str(a) for a in cuda.choose_architectures("nvcc")] == ["8.6", "9.0a"]


def test_nvcc_of_the_matching_major_version_is_taken(
    no_cuda_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = fake_nvcc(tmp_path / "old", "12.8")
    right = fake_nvcc(tmp_path / "site-packages" / "nvidia" / "cu13", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(wrong.parent.parent))
    found, _ = cuda.find_nvcc(torch_like("2.14.1", "13.0"))
    assert found is not None
    assert (found.path, found.version) == (str(right), "13.2")
    assert found.library_dirs == (str(right.parent.parent / "lib"),)


def test_no_nvcc_builds_without_cuda_and_says_why(no_cuda_here: Path) -> None:
    toolkit, reason = cuda.choose_cuda(torch_like("2.14.1", "13.0"), GCC)
    assert toolkit is None
    assert "torch 2.14.1 needs nvcc of CUDA 13, but there is none" in reason
    assert "nvidia-cuda-nvcc==13.0.*" in reason


def test_fused_cuda_1_without_a_compiler_stops_with_what_to_type(
    no_cuda_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_CUDA", "1")
    with pytest.raises(BuildError) as error:
        cuda.choose_cuda(torch_like("2.14.1", "13.0"), GCC)
    assert "FUSED_CUDA=1, but torch 2.14.1 needs nvcc of CUDA 13" in str(error.value)
    assert 'pip install "nvidia-cuda-nvcc==13.0.*"' in str(error.value)
    with pytest.raises(BuildError, match=r"torch 2\.13\.0\+cpu .* has no CUDA"):
        cuda.choose_cuda(torch_like("2.13.0+cpu"), GCC)
    with pytest.raises(BuildError, match=r"PyPI has no nvcc for CUDA 12"):
        cuda.choose_cuda(torch_like("2.11.0", "12.8"), GCC)


@pytest.mark.parametrize("value", ["yes", "2"])
def test_fused_cuda_must_be_0_or_1(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CUDA", value)
    with pytest.raises(BuildError, match=f"FUSED_CUDA must be 0 or 1, got '{value}'"):
        cuda.choose_cuda(torch_like("2.14.1", "13.0"), GCC)


def test_compiler_is_a_build_requirement_only_where_it_is_missing(
    no_cuda_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cuda = torch_like("2.14.1", "13.0")
    assert cuda.compiler_requirements(on_cuda) == [f"{w}==13.0.*" for w in cuda.COMPILER_WHEELS]
    assert cuda.compiler_requirements(torch_like("2.13.0+cpu")) == []
    assert cuda.compiler_requirements(torch_like("2.11.0", "12.8")) == []
    assert cuda.compiler_requirements(None) == ["cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]"]
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "toolkit", "13.1").parent.parent))
    assert cuda.compiler_requirements(on_cuda) == []
    monkeypatch.setenv("FUSED_CUDA", "0")
    assert cuda.compiler_requirements(None) == []


def test_a_host_compiler_that_nvcc_refuses_is_one_line(
    no_cuda_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_nvcc(tmp_path / "toolkit", "13.0")
    text = nvcc.read_text().replace(
        "esac",
        "-ccbin*) echo 'host_config.h:1: error: unsupported GNU version' >&2; exit 1 ;;\nesac",
    )
    nvcc.write_text(text)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    with pytest.raises(BuildError, match=r"cannot compile with g.*: .*unsupported GNU version"):
        cuda.choose_cuda(torch_like("2.14.1", "13.0"), GCC)


@pytest.mark.parametrize(
    ("version", "requirement"),
    [
        ("2.13.0+cpu", "torch==2.13.*"),
        ("2.14.1", "torch==2.14.*"),
        ("2.15.0.dev20261101+cu130", "torch==2.15.0.dev20261101"),
    ],
)
def test_a_wheel_requires_the_minor_version_of_its_torch(version: str, requirement: str) -> None:
    assert toolchain.torch_requirement(torch_like(version)) == requirement


def test_an_sdist_requires_any_supported_torch() -> None:
    assert toolchain.torch_requirement(None) == "torch>=2.10"


def test_torch_of_the_target_is_found_from_isolation() -> None:
    """pip hides the target's packages from the build; a fresh interpreter sees them."""
    import torch

    code = (
        "import importlib.util as u, build_support.toolchain as t; "
        "print(u.find_spec('torch'), t.find_torch().version)"
    )
    # -S: no site-packages, as in isolation.
    command = [sys.executable, "-S", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["None", torch.__version__]


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_max_jobs_must_be_a_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(BuildError, match="MAX_JOBS must be a positive number, got"):
        toolchain.jobs()


def test_max_jobs_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "7")
    assert toolchain.jobs() == 7


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "riscv64")])
def test_other_platforms_get_one_error(
    system: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(BuildError, match=f"{system} on {machine} is not supported"):
        toolchain.require_platform()


def test_gpu_code_of_a_library_is_read(tmp_path: Path) -> None:
    """Two images as nvcc lays them out: PTX of 7.5 and machine code of 9.0."""
    import struct

    def image(kind: int, architecture: int) -> bytes:
        header = struct.pack("<HHIQIIHHI", kind, 0, 64, 16, 0, 0, 0, 0, architecture)
        return header.ljust(64, b"\0") + bytes(16)

    images = image(1, 75) + image(2, 90)
    library = tmp_path / "library.so"
    library.write_bytes(b"ELF" + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(images)) + images)
    assert contents(library) == {"compute_75": 1, "sm_90": 1}


@pytest.mark.parametrize("version", ["65.5.0", None])
def test_old_setuptools_is_one_error(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str) -> str:
        if version is None:
            raise toolchain.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(toolchain.metadata, "version", answer)
    with pytest.raises(BuildError, match=rf"found setuptools {version or 'none'}, need 77"):
        toolchain.require_setuptools()
