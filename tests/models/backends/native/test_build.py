"""The native step is compiled once, and a machine that cannot have it says why and goes on without."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

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
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len(list(fresh_cache.iterdir())) == 1
    assert next(fresh_cache.iterdir()).suffix == ".so"


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.to(torch.float16), "float16"),
        (lambda m: m.model.norm.to(torch.bfloat16), "model.norm.weight"),
        (lambda m: setattr(m.config, "hidden_act", "gelu"), "gelu"),
    ],
)
def test_models_it_cannot_serve_are_refused_with_a_reason(change, reason):
    model = tiny_model("llama")
    change(model)
    assert reason in (native_unavailable_reason(model) or "")
