"""What pyproject.toml cannot say: the parts of the package that a compiler makes.

The cffi binding is an ordinary extension module (abi3: one file for every Python from 3.11 on).
The static programs and the seccomp filters are data files; `scripts/native` makes them, in place
for a checkout and here before a wheel is packed, so both ways use one recipe.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildPrograms(build_py):
    """Compile the static programs first: build_py then collects them as package data."""

    def run(self) -> None:
        subprocess.run(
            [HERE / "scripts" / "native", "keeper", "slot", "unpack", "seccomp", "probe"],
            env={**os.environ, "PYTHON": sys.executable},
            check=True,
        )
        super().run()


setup(
    cffi_modules=["native/build_syscalls.py:ffi"],
    cmdclass={"build_py": BuildPrograms},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
