"""Compile the native step once per machine, compiler and source, and load it.

The library goes to ``$TELLTALE_CACHE``, ``$XDG_CACHE_HOME/telltale`` or ``~/.cache/telltale``. Set ``TELLTALE_NATIVE=0`` to do
without it. A machine without a C++ compiler uses the pure PyTorch backend; the reason is reported, never hidden.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("vectors.h", "products.h", "model.h", "attention.h", "sharing.h", "layer.h", "step.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast")
_NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
_ATTEMPTS = ((_NATIVE, "-fopenmp"), (_NATIVE,))
"""Flags to try in turn: without OpenMP there is one thread."""
_COMPILERS = ("c++", "g++", "clang++")
_TIME_LIMIT_SECONDS = 180


class NativeBuildError(RuntimeError):
    """Why there is no native step on this machine."""


def library() -> ctypes.CDLL:
    """The loaded library, compiled if need be. Raises :class:`NativeBuildError` with the reason if it cannot be had."""
    if os.environ.get("TELLTALE_NATIVE", "1") == "0":
        raise NativeBuildError("TELLTALE_NATIVE=0 turns it off")
    found = _library(os.environ.get("CXX", ""), str(cache_folder()))
    if isinstance(found, str):
        raise NativeBuildError(found)
    return found


def unavailable_reason() -> str | None:
    """Why the library cannot be had, or None if it can."""
    try:
        library()
    except NativeBuildError as error:
        return str(error)
    return None


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    if explicit := os.environ.get("TELLTALE_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "telltale"


@functools.cache
def _library(preferred: str, folder: str) -> ctypes.CDLL | str:
    """The library, or the reason why there is none; a failure is remembered, so that a process tries once."""
    try:
        target = _compiled(_compiler(preferred), Path(folder))
        return ctypes.CDLL(str(target))
    except NativeBuildError as error:
        return str(error)
    except OSError as error:
        return f"{target} cannot be loaded: {error}"


def _compiled(compiler: list[str], folder: Path) -> Path:
    """The path of the library of these sources, compiled by ``compiler`` for this processor if it was not there."""
    here = Path(__file__).parent
    parts = [(here / name).read_bytes() for name in SOURCES]
    parts += [_output([*compiler, "--version"]), repr((compiler, FLAGS, _ATTEMPTS)).encode(), _processor().encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    target = folder / f"step-{key}.so"
    if not target.exists():
        _compile(compiler, here / "step.cpp", target)
    return target


def _compiler(preferred: str) -> list[str]:
    for candidate in [preferred] if preferred else _COMPILERS:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise NativeBuildError(f"no C++ compiler was found ({preferred or ', '.join(_COMPILERS)})")


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    """Compile beside ``target`` and rename, so that processes that start together do not see half a library."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=".step-", suffix=".so", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise NativeBuildError(f"the cache folder {target.parent} cannot be written: {error.strerror}") from error
    try:
        for extra in _ATTEMPTS:
            command = [*compiler, *FLAGS, *extra, str(source), "-o", aside]
            result = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT_SECONDS)
            if result.returncode == 0:
                Path(aside).replace(target)
                return
        last = " / ".join(result.stderr.strip().splitlines()[-2:]) or f"exit status {result.returncode}"
        raise NativeBuildError(f"{compiler[0]} could not compile it: {last}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{compiler[0]} could not compile it: {error}") from error
    finally:
        Path(aside).unlink(missing_ok=True)


def _output(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]} does not run: {error}") from error


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(
            next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags", "Features")
        )
    except OSError:
        return platform.processor() + platform.machine()
