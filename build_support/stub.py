"""Writes fused/_C.pyi from the compiled module: `python -m build_support.stub` after a new op.

Types come from pybind11's docstrings, argument names from the op's schema where it has one. A test
compares the file with what is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType

import torch

from build_support.sources import ROOT

PATH = ROOT / "fused" / "_C.pyi"
HEADER = '''"""The compiled kernels. Written by `python -m build_support.stub`."""

from collections.abc import Sequence

from torch import Tensor, dtype

'''
# What pybind11 says of a type, and what a reader wants to see.
SHORTER = {
    r"torch\.Tensor": "Tensor",
    r"torch\.dtype": "dtype",
    r"typing\.SupportsFloat( \| typing\.SupportsIndex)?": "float",  # torch 2.10 has it shorter
    r"typing\.SupportsInt( \| typing\.SupportsIndex)?": "int",
    r"typing\.Annotated\[(.*?), \"FixedSize\(\d+\)\"\]": r"\1",
    r"collections\.abc\.Sequence": "Sequence",
    r"fused\._C\.": "",
    r"Tuple\[int, \.\.\.\]": "Sequence[int]",  # what torch's caster calls an IntArrayRef
}


def _names(function: str) -> list[str]:
    packet = getattr(torch.ops.fused, function, None)
    return [argument.name for argument in packet.default._schema.arguments] if packet else []


def _signature(name: str, docstring: str) -> str:
    line = docstring.splitlines()[0]
    for pattern, replacement in SHORTER.items():
        line = re.sub(pattern, replacement, line)
    for index, argument in enumerate(_names(name)):
        line = re.sub(rf"\barg{index}:", f"{argument}:", line)
    return line


def _definition(signature: str) -> str:
    """One line if it fits, else one argument a line, as ruff formats it."""
    if len(signature) + len("def : ...") <= 100:
        return f"def {signature}: ...\n"
    head, rest = signature.split("(", 1)
    arguments, result = rest.rsplit(") -> ", 1)
    lines = "".join(f"    {argument},\n" for argument in re.split(r", (?=\w+: )", arguments))
    return f"def {head}(\n{lines}) -> {result}: ...\n"


def _class(name: str, members: Mapping[str, object]) -> str:
    """An object that Python holds for the extension: what can be read of it, and done with it."""
    lines = [f"class {name}:\n", "    def __init__(self) -> None: ...\n"]
    for member, value in sorted(members.items()):
        if isinstance(value, property):
            result = str(value.fget.__doc__).splitlines()[0].rsplit(" -> ", 1)[1]
            lines += ["    @property\n", f"    def {member}(self) -> {result}: ...\n"]
        elif callable(value) and not member.startswith("_"):
            signature = _signature(member, str(value.__doc__))
            lines.append(f"    def {signature.replace(f'self: {name}', 'self')}: ...\n")
    return "".join([*lines, "\n"])


def render(module: ModuleType) -> str:
    found = {name: value for name, value in vars(module).items() if callable(value)}
    classes = {name: value for name, value in found.items() if isinstance(value, type)}
    functions = {name: value for name, value in found.items() if name not in classes}
    signatures = [_signature(name, functions[name].__doc__) for name in sorted(functions)]
    held = [_class(name, vars(value)) for name, value in sorted(classes.items())]
    return HEADER + "".join([*held, *map(_definition, signatures)])


if __name__ == "__main__":
    from fused import _load

    PATH.write_text(render(_load.load()))
    print(PATH)
