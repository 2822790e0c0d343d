"""What pyproject.toml cannot say: the native build, and the torch that a wheel is bound to."""

import sys
from pathlib import Path

# A front end may run this file with the project's folder off sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from setuptools import Extension, setup

from build_support.commands import Build, BuildExt
from build_support.toolchain import find_torch, torch_requirement

# A wheel runs with the torch it was compiled against, up to its patch releases; an sdist with any.
built_for = None if "sdist" in sys.argv else find_torch()

setup(
    cmdclass={"build": Build, "build_ext": BuildExt},
    # Named for setuptools' sake (wheel tag, editable installs); BuildExt reads csrc by itself.
    ext_modules=[Extension("fused._C", sources=[])],
    install_requires=[torch_requirement(built_for)],
)
