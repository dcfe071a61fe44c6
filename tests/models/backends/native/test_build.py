"""The native step is compiled once, and a machine that cannot have it says why and goes on without."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from models.tiny_models import tiny_model
from telltale.errors import UnsupportedModelError
from telltale.models import open_decoder
from telltale.models.backends.native import build
from telltale.models.backends.native.step import native_unavailable_reason

has_compiler = pytest.mark.skipif(
    "no C++ compiler" in (build.unavailable_reason() or ""),
    reason="no C++ compiler on this machine: nothing to compile",
)


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    folder = tmp_path / "telltale cache"
    monkeypatch.setenv("TELLTALE_CACHE", str(folder))
    return folder


def script(path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


def falls_to_fused(reason: str) -> None:
    model = tiny_model("llama")
    decoder = open_decoder(model)
    assert decoder.backend == "fused"
    assert reason in decoder.backend_reason
    with pytest.raises(UnsupportedModelError, match="native"):
        open_decoder(model, backend="native")


def test_the_environment_can_turn_it_off(monkeypatch):
    monkeypatch.setenv("TELLTALE_NATIVE", "0")
    falls_to_fused("TELLTALE_NATIVE=0")


def test_a_compiler_that_fails_is_reported_with_its_last_words(monkeypatch, fresh_cache, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo 'error: out of ink' >&2", "exit 3"))
    falls_to_fused("out of ink")
    assert list(fresh_cache.iterdir()) == []


def test_a_compiler_without_words_is_reported_with_its_status(monkeypatch, fresh_cache):
    monkeypatch.setenv("CXX", "/bin/false")
    falls_to_fused("exit status 1")


def test_a_compiler_that_is_not_there_is_reported(monkeypatch, fresh_cache):
    monkeypatch.setenv("CXX", "no-such-compiler-here")
    falls_to_fused("no-such-compiler-here")


def test_a_failed_compilation_is_not_tried_again(monkeypatch, fresh_cache, tmp_path):
    calls = tmp_path / "calls"
    monkeypatch.setenv("CXX", script(tmp_path / "counting", f"echo call >> '{calls}'", "exit 1"))
    first = build.unavailable_reason()
    count = len(calls.read_text().splitlines())
    assert build.unavailable_reason() == first
    assert len(calls.read_text().splitlines()) == count


def test_a_cache_folder_that_cannot_be_written_is_reported(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TELLTALE_CACHE", str(tmp_path / "file" / "folder"))
    falls_to_fused("cannot be written")


@has_compiler
def test_a_library_that_does_not_load_is_reported(monkeypatch, fresh_cache, tmp_path):
    lie = 'case "$last" in -*) ;; *) echo "not a library" > "$last" ;; esac'
    monkeypatch.setenv("CXX", script(tmp_path / "liar", "for last; do :; done", lie))
    falls_to_fused("cannot be loaded")


@pytest.fixture(scope="module")
def image() -> bytes:
    """The bytes of the library that this machine has, so that no test compiles it again."""
    if build.unavailable_reason() is not None:
        pytest.skip("no native library on this machine")
    for folder in build.cache_folders():
        for path in folder.glob(f"step-{build._key(build._compiler(os.environ.get('CXX', '')))}.so"):
            return path.read_bytes()
    pytest.skip("the library of this machine is not kept in a folder")


@pytest.fixture
def compilations(monkeypatch, image) -> list[int]:
    """A compiler that is quick; an entry for each time it was asked."""
    asked: list[int] = []
    monkeypatch.setattr(build, "_compiled", lambda compiler: asked.append(1) or image)
    return asked


def opened_anew() -> str | None:
    """What a new process would find."""
    build._library.cache_clear()
    return build.unavailable_reason()


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:20000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"#!/bin/sh\n"),
        lambda path: path.write_bytes(path.read_bytes().replace(b"telltale_run", b"telltale_rum")),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        lambda path: path.with_name(f"{path.name}.sha256").write_bytes(b"\xff" * 65),
        lambda path: path.with_name(f"{path.name}.sha256").unlink(),
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
    ],
    ids=["cut", "empty", "foreign", "flipped", "longer", "digest", "no digest", "dangling"],
)
def test_a_damaged_library_is_compiled_anew(harm, fresh_cache, compilations):
    assert opened_anew() is None
    assert opened_anew() is None
    assert len(compilations) == 1
    harm(next(fresh_cache.glob("*.so")))
    assert opened_anew() is None
    assert len(compilations) == 2
    assert build.library().telltale_probe() == 0
    assert opened_anew() is None
    assert len(compilations) == 2


def test_a_folder_in_the_place_of_the_library_is_no_obstacle(fresh_cache, compilations):
    opened_anew()
    library = next(fresh_cache.glob("*.so"))
    library.unlink()
    library.mkdir()
    assert opened_anew() is None


def test_what_is_loaded_outlives_its_file(fresh_cache, compilations):
    opened_anew()
    found = build.library()
    path = next(fresh_cache.glob("*.so"))
    os.truncate(path, 100)
    assert found.telltale_probe() == 0


@pytest.mark.parametrize(
    ("mask", "mode", "readers"), [(0o022, 0o755, 0o044), (0o077, 0o2770, 0o040), (0o077, 0o700, 0)]
)
def test_who_shares_the_folder_may_read_the_library(mask, mode, readers, fresh_cache, compilations):
    fresh_cache.mkdir()
    fresh_cache.chmod(mode)
    before = os.umask(mask)
    try:
        assert opened_anew() is None
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o044 for path in fresh_cache.iterdir()} == {readers}


def test_without_a_home_there_is_the_temporary_folder(monkeypatch, tmp_path, compilations):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    for name in ("TELLTALE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert opened_anew() is None
    [folder] = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert "is not a folder of this user alone" in (opened_anew() or "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    build._library.cache_clear()
    assert len(build.cache_folders()) == 1


def test_a_home_that_cannot_be_written_is_passed_over(monkeypatch, tmp_path, compilations):
    (tmp_path / "home").write_text("a file")
    (tmp_path / "temporary").mkdir()
    monkeypatch.delenv("TELLTALE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert opened_anew() is None
    assert list((tmp_path / "temporary").glob("*/*.so"))


@has_compiler
def test_a_library_that_kills_its_process_is_found_out(tmp_path):
    for body, reason in (("__builtin_trap();", "signal"), ("return 1;", "something else"), ("return 0;", None)):
        source = tmp_path / "trial.cpp"
        source.write_text(f'extern "C" long telltale_probe() {{ {body} return 0; }}')
        library = tmp_path / f"trial-{len(body)}.so"
        compiler = build._compiler(os.environ.get("CXX", ""))
        subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        if reason is None:
            build._probe(library)
        else:
            with pytest.raises(build.NativeBuildError, match=reason):
                build._probe(library)


def test_a_compiler_with_an_open_quote_is_reported(monkeypatch, fresh_cache):
    monkeypatch.setenv("CXX", "g++ '")
    assert "is no command" in (opened_anew() or "")


def test_anything_else_that_goes_wrong_is_a_reason_too(monkeypatch, fresh_cache):
    def broken() -> str:
        raise ValueError("no processor")

    monkeypatch.setattr(build, "_processor", broken)
    assert "no processor" in (opened_anew() or "")


@pytest.mark.slow
@has_compiler
def test_processes_that_start_together_share_one_library(fresh_cache):
    code = textwrap.dedent(f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("build", {build.__file__!r})
        alone = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(alone)
        assert alone.unavailable_reason() is None, alone.unavailable_reason()
    """)
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    assert sorted(path.suffix for path in fresh_cache.iterdir()) == [".sha256", ".so"]


@pytest.mark.slow
@has_compiler
@pytest.mark.parametrize("architecture", ["x86-64-v3", "x86-64-v2"])
def test_the_source_compiles_for_processors_without_avx512(architecture, tmp_path):
    compiler = build._compiler(os.environ.get("CXX", ""))
    source = build.__file__.replace("build.py", "step.cpp")
    flags = ["-O0", f"-march={architecture}", "-std=c++17", "-shared", "-fPIC"]
    if subprocess.run([*compiler, flags[1], "-xc++", "-E", os.devnull], capture_output=True).returncode:
        pytest.skip(f"the compiler does not know {architecture}: another kind of processor")
    target = tmp_path / "step.so"
    result = subprocess.run([*compiler, *flags, source, "-o", str(target)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
@has_compiler
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("products_avx2.h", "part.begins() ? f8{} : load8(part.kept + (n * M + m) * 8)", "f8{}"),
        ("packed_avx2.h", "1.0f + 0x1p-16f", "1.0f + 0x1p-15f"),
        ("packed_avx2.h", "values + step - 3", "values + step - 2"),
    ],
)
def test_wrong_products_of_avx2_are_found_out(file, right, wrong, tmp_path):
    if not build.library().telltale_has_wide_products():
        pytest.skip("these kernels are for other processors")
    for name in build.SOURCES:
        (tmp_path / name).write_text((Path(build.__file__).parent / name).read_text())
    source = (tmp_path / file).read_text()
    assert source.count(right) == 1
    (tmp_path / file).write_text(source.replace(right, wrong))
    library = tmp_path / "step.so"
    compiler = build._compiler(os.environ.get("CXX", ""))
    flags = [flag for flag in build.FLAGS if flag != "-O3"]
    subprocess.run([*compiler, *flags, "-O1", build._NATIVE, tmp_path / "step.cpp", "-o", library], check=True)
    with pytest.raises(build.NativeBuildError, match="something else than it should"):
        build._probe(library)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.to(torch.float16), "float16"),
        (lambda m: m.model.norm.to(torch.bfloat16), "model.norm.weight"),
        (lambda m: setattr(m.model.layers[2].mlp, "act_fn", torch.nn.Tanh()), "activation 'Tanh'"),
        (lambda m: setattr(m.model.layers[2].mlp, "act_fn", torch.nn.ReLU()), "several activations, ReLU, SiLU"),
    ],
)
def test_models_it_cannot_serve_are_refused_with_a_reason(change, reason):
    model = tiny_model("llama")
    change(model)
    assert reason in (native_unavailable_reason(model) or "")
