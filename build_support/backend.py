"""The PEP 517 backend: setuptools', plus a torch to build against and, where needed, an nvcc.

A native extension must be compiled against the very torch that it will run with. pip builds in an
isolated environment where that torch is not importable, so `build_support.toolchain.find_torch`
looks it up in the environment that is being installed into; only where there is none is torch a
build requirement, and then pip installs the same release beside fused.
"""

from __future__ import annotations

from typing import Any

from build_support.cuda import compiler_requirements
from build_support.toolchain import (
    find_torch,
    require_platform,
    require_setuptools,
    torch_requirement,
)

require_setuptools()

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks that we do not change)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

Settings = dict[str, Any] | None


def _requirements() -> list[str]:
    require_platform()
    torch = find_torch()
    build_torch = [] if torch is not None else [torch_requirement(None)]
    return build_torch + compiler_requirements(torch)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()
