"""Builds the optional extension `mtu_fast._C`; without torch or a compiler the package is pure Python and complete.

How it is compiled is said in `mtu_fast/_build.py`, everything else in pyproject.toml. What is
installed has the C++ sources with it, so that `python -m mtu_fast build` can compile them later.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import setuptools
from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
OLDEST_SETUPTOOLS = 77  # reads the licence in pyproject.toml


def load_build() -> ModuleType:
    """`mtu_fast/_build.py` by itself: the package needs torch, which may not be there."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / "mtu_fast" / "_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_build = load_build()


def absent() -> str:
    """Why no extension is going to be built; "" where one is tried."""
    try:
        _build.find_torch()
    except _build.BuildError as error:
        return str(error)
    return ""


class Package(Distribution):
    """What pyproject.toml says; to build the extension alone nothing of it is needed, and older setuptools serve."""

    def parse_config_files(self, *arguments, **options) -> None:
        """Read pyproject.toml.

        Raises:
            SystemExit: setuptools is too old to; it would speak of a "data.license" that is not
                valid.
        """
        if int(setuptools.__version__.partition(".")[0]) >= OLDEST_SETUPTOOLS:
            super().parse_config_files(*arguments, **options)
        elif sys.argv[1:2] != ["build_ext"]:
            found, needed = setuptools.__version__, f"setuptools>={OLDEST_SETUPTOOLS}"
            raise SystemExit(
                f"mtu_fast: setuptools {found} cannot read pyproject.toml: `pip install '{needed}'`. Without network, "
                "`python setup.py build_ext --inplace` builds the extension in the source tree"
            )


class BuildPython(build_py):
    """Copies the package and the C++ sources, with the note when no extension is going to be built."""

    def run(self) -> None:
        """Build, copy the sources, leave the note."""
        super().run()
        package = ROOT / "mtu_fast"
        if not self.editable_mode:
            package = Path(self.build_lib) / "mtu_fast"
            shutil.copytree(ROOT / "csrc", package / "_csrc", dirs_exist_ok=True)
        _build.leave_note(package, absent())


class BuildExtension(build_ext):
    """Builds the extension, or goes on without it and says why."""

    def run(self) -> None:
        """Build; a failure costs the CUDA part, then the extension, not the installation."""
        for each in list(self.extensions):
            target = Path(self.get_ext_fullpath(each.name))
            reason = ""
            try:
                _build.build(target)
            except _build.BuildError as error:
                reason = str(error)
                self.extensions = []  # nothing to be installed
            _build.leave_note(target.parent, reason)


if __name__ == "__main__":  # pip runs it so, too
    os.chdir(ROOT)
    setup(
        distclass=Package,
        packages=find_packages(include=["mtu_fast", "mtu_fast.*"]),
        package_dir={
            "": "."
        },  # an editable install is then a plain path, which type checkers follow
        ext_modules=[] if absent() else [Extension("mtu_fast._C", sources=[])],
        cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
    )
