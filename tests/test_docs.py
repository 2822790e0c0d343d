"""The documents are true to the tree: their Python runs, their links and file names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fused
from fused import _load, _route

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]

# Names that stand for something: an op to be written, a file that the build generates.
_PLACEHOLDERS = re.compile(r"softplus|_sm80|<op>|_build_info")
_FILE = re.compile(
    r"(?<![\w./-])(?:csrc|fused|tests|build_support|docs|benchmarks|\.ci)/[\w./-]+\.\w+"
)


def blocks(path: Path, language: str) -> list[str]:
    """The text of every fenced block in that language ("" for none)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.M | re.S)
    return [text for name, text in fenced if name == language]


def test_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(ROOT / "README.md", "python")
    assert code, "the README has no Python in it"
    namespace: dict[str, object] = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "layers.0.self_attn: MultiheadAttention -> fused.Attention" in printed
    shown = next(text for text in blocks(ROOT / "README.md", "") if text.startswith("attention:"))
    expected = shown.replace("avx512", _route.kernels().isa())
    if _load.build_info().cuda is not None:
        expected = expected.replace(", and this build has no CUDA kernels", "")
    assert expected in printed


def test_the_table_names_everything_that_is_public() -> None:
    text = (ROOT / "README.md").read_text()
    names = {*fused.__all__, *fused.functional.__all__} - {"__version__", "functional"}
    assert {
        name for name in names if f"`{name}`" not in text and f"fused.{name}" not in text
    } == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    files = [name for name in _FILE.findall(text) if not _PLACEHOLDERS.search(name)]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document: Path) -> None:
    text = document.read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^(?:.*`)?make ([a-z][a-z-]*)", text, re.M)) <= targets
    commands = set(re.findall(r"python -m fused (\w+)", text))
    assert commands <= {"info", "bench", "train"}
    for module in re.findall(r"python -m (build_support[\w.]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
