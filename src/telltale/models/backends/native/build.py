"""Compile the native step once per machine, compiler and source, check it, and load it.

The library goes to ``$TELLTALE_CACHE`` if that is set, else to ``$XDG_CACHE_HOME/telltale`` or ``~/.cache/telltale``, and where
that cannot be written to a folder of the user's own below the system's temporary one. Set ``TELLTALE_NATIVE=0`` to do without it.
A machine without a C++ compiler uses the pure PyTorch backend; the reason is reported, never hidden.

What lies in a cache is not trusted blindly: power fails, disks fill up, and machines of many kinds share a home. A new library
proves itself in a process of its own before it is stored (a wrong instruction kills the process that executes it), and its SHA-256
is stored beside it. A stored one is read whole and compared, and what is loaded is a copy in memory of the bytes that were
compared, so that whatever happens to the file later cannot hurt a running process. A file that fails is compiled anew. Whoever may
write to the cache folder is trusted.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SOURCES = (
    "vectors.h",
    "products.h",
    "products_avx2.h",
    "model.h",
    "packed.h",
    "packed_avx2.h",
    "attention.h",
    "sharing.h",
    "tiles.h",
    "layer.h",
    "draft_exit.h",
    "probe.h",
    "step.cpp",
)
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast")
_NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
_ATTEMPTS = ((_NATIVE, "-fopenmp"), (_NATIVE,))
"""Flags to try in turn: without OpenMP there is one thread."""
_COMPILERS = ("c++", "g++", "clang++")
_TIME_LIMIT_SECONDS = 180
_PROBE = "import ctypes, sys; sys.exit(0 if ctypes.CDLL(sys.argv[1]).telltale_probe() == 0 else 3)"
_PROBE_SECONDS = 60
_MAGIC = {"linux": b"\x7fELF", "darwin": b"\xcf\xfa\xed\xfe"}
"""How a shared library begins, by ``sys.platform``."""


class NativeBuildError(RuntimeError):
    """Why there is no native step on this machine."""


def library() -> ctypes.CDLL:
    """The loaded library, compiled if need be. Raises :class:`NativeBuildError` with the reason if it cannot be had."""
    if os.environ.get("TELLTALE_NATIVE", "1") == "0":
        raise NativeBuildError("TELLTALE_NATIVE=0 turns it off")
    found = _library(os.environ.get("CXX", ""), tuple(map(str, cache_folders())))
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


def cache_folders() -> list[Path]:
    """Where compiled libraries may be kept, the best place first. A process without a home has the temporary folder only."""
    if explicit := os.environ.get("TELLTALE_CACHE"):
        return [Path(explicit)]
    found = []
    if base := os.environ.get("XDG_CACHE_HOME"):
        found.append(Path(base) / "telltale")
    else:
        with suppress(RuntimeError):  # no HOME, and the user is unknown to the system
            found.append(Path.home() / ".cache" / "telltale")
    with suppress(OSError):
        found.append(_temporary_folder())
    return found


def _temporary_folder() -> Path:
    """A folder of this user's own below the system's temporary one."""
    owner = str(os.getuid()) if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"telltale-{owner}"


@functools.cache
def _library(preferred: str, folders: tuple[str, ...]) -> ctypes.CDLL | str:
    """The library, or the reason why there is none; a failure is remembered, so that a process tries once."""
    try:
        compiler = _compiler(preferred)
        name = f"step-{_key(compiler)}.so"
        reasons = []
        for folder in map(Path, folders):
            try:
                image = _stored(folder / name)
            except NativeBuildError as error:
                reasons.append(str(error))
                continue
            if image is not None:
                return _loaded(image, folder / name)
        target = _writable([Path(folder) / name for folder in folders], reasons)
        image = _compiled(compiler)
        _store(image, target)
        return _loaded(image, target)
    except NativeBuildError as error:
        return str(error)
    except Exception as error:  # whatever a broken machine may raise, decoding goes on without the library
        return f"it could not be prepared: {type(error).__name__}: {error}"


def _key(compiler: list[str]) -> str:
    """A name for the library of these sources, compiled by ``compiler`` for this processor."""
    parts = [(Path(__file__).parent / name).read_bytes() for name in SOURCES]
    parts += [_output([*compiler, "--version"]), repr((compiler, FLAGS, _ATTEMPTS)).encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _stored(path: Path) -> bytes | None:
    """The bytes of a library in a cache, None if there is no whole one. Raises :class:`NativeBuildError` if none may be there."""
    _refuse_foreign_folder(path.parent)
    try:
        image, noted = path.read_bytes(), _digest_file(path).read_text(errors="replace")
    except OSError:
        return None
    whole = hashlib.sha256(image).hexdigest() == noted.strip() and _is_library(image)
    return image if whole else None


def _refuse_foreign_folder(folder: Path) -> None:
    """Anyone may make a folder in the temporary one, under our name as well: it has to be this user's alone."""
    if folder != _temporary_folder() or not folder.exists() or not hasattr(os, "getuid"):
        return
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise NativeBuildError(f"{folder} is not a folder of this user alone")


def _writable(targets: Sequence[Path], reasons: list[str]) -> Path:
    """The first of ``targets`` that can be written. Raises :class:`NativeBuildError` with all reasons if none can."""
    for target in targets:
        folder = target.parent
        try:
            _refuse_foreign_folder(folder)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700 if folder == _temporary_folder() else 0o777)
            handle, name = tempfile.mkstemp(prefix=".step-", dir=folder)
            os.close(handle)
            os.unlink(name)
            return target
        except NativeBuildError as error:
            reasons.append(str(error))
        except OSError as error:
            reasons.append(f"the cache folder {folder} cannot be written: {error.strerror}")
    raise NativeBuildError("; ".join(dict.fromkeys(reasons)) or "there is no folder to compile it in")


def _compiler(preferred: str) -> list[str]:
    for candidate in [preferred] if preferred else _COMPILERS:
        try:
            command = shlex.split(candidate)
        except ValueError as error:
            raise NativeBuildError(f"CXX={candidate!r} is no command: {error}") from error
        if command and shutil.which(command[0]):
            return command
    raise NativeBuildError(f"no C++ compiler was found ({preferred or ', '.join(_COMPILERS)})")


def _compiled(compiler: list[str]) -> bytes:
    """A new library that has shown in a process of its own that it runs here."""
    source = Path(__file__).parent / "step.cpp"
    try:
        with tempfile.TemporaryDirectory(prefix="telltale-", ignore_cleanup_errors=True) as scratch:
            target = Path(scratch) / "step.so"
            for extra in _ATTEMPTS:
                command = [*compiler, *FLAGS, *extra, str(source), "-o", str(target)]
                result = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT_SECONDS)
                if result.returncode == 0:
                    image = target.read_bytes()
                    if not _is_library(image):
                        raise NativeBuildError(f"what {compiler[0]} made cannot be loaded: it is no library")
                    _probe(target)
                    return image
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{compiler[0]} could not compile it: {error}") from error
    last = " / ".join(result.stderr.strip().splitlines()[-2:]) or f"exit status {result.returncode}"
    raise NativeBuildError(f"{compiler[0]} could not compile it: {last}")


def _probe(path: Path) -> None:
    """Run every kernel once in a process of its own. Raises :class:`NativeBuildError` if that dies, hangs or computes nonsense."""
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROBE, str(path)], capture_output=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise NativeBuildError(f"the compiled step did not end within {_PROBE_SECONDS} seconds") from error
    except OSError:  # no interpreter that could be started: nothing is known against the library
        return
    if result.returncode < 0:
        raise NativeBuildError(f"the compiled step ended a trial process with signal {-result.returncode}")
    if result.returncode == 3:
        raise NativeBuildError("the compiled step computes something else than it should")


def _is_library(image: bytes) -> bool:
    """Whether ``image`` is as long as its own header says, and begins as this system's libraries do."""
    if not image.startswith(_MAGIC.get(sys.platform, b"")):
        return False
    if sys.platform == "linux" and len(image) >= 64 and image[4] == 2:
        order = "little" if image[5] == 1 else "big"
        table = int.from_bytes(image[40:48], order)  # type: ignore[arg-type]
        size, count = (int.from_bytes(image[first : first + 2], order) for first in (58, 60))  # type: ignore[arg-type]
        return len(image) >= table + size * count
    return len(image) >= 64


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _store(image: bytes, target: Path) -> None:
    """Put a library and its digest into a cache. If that fails the library is used all the same, and compiled again next time."""
    with suppress(OSError):
        _write(target, image)
        _write(_digest_file(target), hashlib.sha256(image).hexdigest().encode() + b"\n")
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    """Write aside, flush to disk and rename: processes that start together never see half a file.

    The file may be read by whom the umask lets, and by whom the folder is shared with.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        folder = path.parent.stat()
        if hasattr(os, "chown"):
            with suppress(OSError):  # not a member of the folder's group
                os.chown(aside, -1, folder.st_gid)
        aside.chmod(stat.S_IMODE(aside.stat().st_mode) | folder.st_mode & 0o044)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _loaded(image: bytes, path: Path) -> ctypes.CDLL:
    """The library of these bytes: from a copy in memory where the system has that, else from ``path``."""
    found = None
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # a system may forbid to execute what lies in memory only
            # It stays open: the loader knows libraries by their names, and would take another one of this number for it.
            descriptor = os.memfd_create("telltale-step")
            with os.fdopen(os.dup(descriptor), "wb") as stream:
                stream.write(image)
            found = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    try:
        found = ctypes.CDLL(str(path)) if found is None else found
        found.telltale_probe  # noqa: B018 - a library without our functions has no such attribute
    except (OSError, AttributeError) as error:
        raise NativeBuildError(f"{path} cannot be loaded: {error}") from error
    return found


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
