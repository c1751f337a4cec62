"""Builds moshi_c._core. What is declared stands in pyproject.toml; here only how C is compiled.

Environment:
  MOSHI_C_SANITIZE   address,undefined or thread: the compiler's sanitizers
  MOSHI_C_DEBUG=1    no optimisation, assertions on
  MOSHI_C_WERROR=1   warnings are errors
  MOSHI_C_CORE       a libmoshi.a to link instead of compiling the core again
  MOSHI_C_CUDA       1: the CUDA library for every card, an error without nvcc; 0: none. Without it,
                     for the cards of this machine, where nvcc and a driver are installed
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# One binary for all versions from 3.11 on. The buffer protocol joined the stable interface there,
# and builds without the GIL have none yet.
ABI3 = sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED")

COMPILE = [
    "-std=gnu11",
    "-O3",
    "-g0",  # Python's own flags would make the binary six times as large
    "-ffp-contract=off",  # the same bits from every build of the same kernels
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wshadow",
]
COMPILE += ["-Werror=implicit-function-declaration"]
# -Bsymbolic: our calls stay ours when a program links libmoshi, too.
LINK = ["-pthread", "-lm", "-ldl", "-Wl,-Bsymbolic"]
LIBRARIES = ["opus", "ogg"]
NO_HEADERS = (
    "moshi_c needs libopus and libogg with their headers, which are not here; "
    "on Debian: apt-get install libopus-dev libogg-dev"
)


def switched_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def flags() -> tuple[list[str], list[str]]:
    compile_flags, link_flags = list(COMPILE), list(LINK)
    if switched_on("MOSHI_C_DEBUG"):
        compile_flags += ["-O0", "-g", "-UNDEBUG"]
    if sanitize := os.environ.get("MOSHI_C_SANITIZE"):
        sanitizers = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
        compile_flags += [*sanitizers, "-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer"]
        link_flags += sanitizers
    if switched_on("MOSHI_C_WERROR"):
        compile_flags.append("-Werror")
    # Their headers are not ours to warn about.
    for path in (numpy.get_include(), sysconfig.get_path("include")):
        compile_flags += ["-isystem", path]
    return compile_flags, link_flags


def cuda_architectures() -> str | None:
    """What scripts/build_cuda.py is to compile for, or None."""
    wanted = os.environ.get("MOSHI_C_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MOSHI_C_CUDA is {wanted!r}; expected 0 or 1")
    if wanted == "1":
        if not shutil.which("nvcc"):
            raise SystemExit("MOSHI_C_CUDA is 1, but nvcc is not on the path")
        return "80 86 89 90a 100 120"
    driver = Path("/proc/driver/nvidia/version").exists()
    return "native" if wanted == "" and driver and shutil.which("nvcc") else None


class BuildExt(build_ext):
    """Compiles the files of an extension side by side, and tells them the version. The CUDA library
    goes beside it."""

    def run(self) -> None:
        super().run()
        architectures = cuda_architectures()
        if architectures:
            beside = Path(self.get_ext_fullpath("moshi_c._core")).parent
            script = str(Path("scripts") / "build_cuda.py")
            out = str(beside / "lib" / "libmoshi_cuda.so")
            work = str(Path(self.build_temp) / "cuda")
            subprocess.run(
                [sys.executable, script, out, "--architectures", architectures, "--work", work],
                check=True,
            )

    def check_headers(self) -> None:
        with TemporaryDirectory() as folder:
            source = Path(folder) / "headers.c"
            source.write_text("#include <ogg/ogg.h>\n#include <opus/opus.h>\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder)
            except CompileError as error:
                raise SystemExit(NO_HEADERS) from error

    def build_extension(self, ext: Extension) -> None:
        version = self.distribution.get_version()
        ext.define_macros.append(("MOSHI_VERSION", f'"{version}"'))
        self.check_headers()
        compile_some = self.compiler.compile

        def compile_all(sources: list[str], **kwargs: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                parts = pool.map(lambda source: compile_some([source], **kwargs), sources)
                return [name for part in parts for name in part]

        self.compiler.compile = compile_all  # type: ignore[method-assign]
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_some  # type: ignore[method-assign]


def files(suffix: str, folders: tuple[str, ...] = ("csrc", "csrc/cpu", "csrc/py")) -> list[str]:
    return [str(path) for folder in folders for path in sorted(Path(folder).glob(f"*.{suffix}"))]


def core() -> Extension:
    compile_flags, link_flags = flags()
    compiled = os.environ.get("MOSHI_C_CORE")
    return Extension(
        "moshi_c._core",
        sources=files("c", ("csrc/py",)) if compiled else files("c"),
        extra_objects=[compiled] if compiled else [],
        depends=files("h") + ([compiled] if compiled else []),
        define_macros=[("Py_LIMITED_API", "0x030b0000")] if ABI3 else [],
        py_limited_api=ABI3,
        libraries=LIBRARIES,
        extra_compile_args=compile_flags,
        extra_link_args=link_flags,
    )


setup(
    ext_modules=[core()],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
