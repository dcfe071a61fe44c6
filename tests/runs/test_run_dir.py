"""Run directories: whole or absent writes, readable after a kill, nothing half-written on a full disk."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from telltale.errors import CheckpointError, MissingExtraError
from telltale.runs import RunDir, atomic_directory, interruptible, write_atomically
from telltale.runs.html_report import Report, plotly_module


def test_a_run_keeps_its_config_and_refuses_a_second_one(tmp_path):
    run = RunDir.create(tmp_path / "run", {"steps": 3, "name": "a"})
    assert RunDir.open(run.path).config() == {"steps": 3, "name": "a"}
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunDir.create(run.path, {})
    with pytest.raises(CheckpointError, match="not a run directory"):
        RunDir.open(tmp_path / "elsewhere")


def test_two_jobs_do_not_work_in_one_folder(tmp_path):
    run = RunDir.create(tmp_path / "run", {})
    here = """
import sys
from telltale.runs import RunDir

with RunDir.open(sys.argv[1]).alone():
    print("alone", flush=True)
    input()
"""
    command, pipe = [sys.executable, "-c", here, str(run.path)], subprocess.PIPE
    other = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert other.stdout.readline() == "alone\n"
    with pytest.raises(CheckpointError, match="another process is at work on this run"), run.alone():
        pytest.fail("two jobs in one folder")
    assert [entry.name for entry in run.path.iterdir()] == ["config.yaml"]
    other.kill()
    other.wait()
    with run.alone():
        pass
    with run.alone():
        pass


def test_metrics_survive_a_line_that_was_cut_short(tmp_path):
    run = RunDir.create(tmp_path, {})
    for step in range(5):
        run.log({"step": step, "loss": 1.0 / (step + 1)})
    with run.metrics_path.open("a") as stream:
        stream.write('{"step": 5, "lo')
    assert [record["step"] for record in run.metrics()] == [0, 1, 2, 3, 4]
    run.truncate_metrics(2)
    assert [record["step"] for record in run.metrics()] == [0, 1, 2]


def test_checkpoints_are_whole_or_absent_and_old_ones_go(tmp_path):
    run = RunDir.create(tmp_path, {})
    assert run.latest_checkpoint() is None
    for step in (10, 20, 30):
        run.save_checkpoint(step, lambda folder, step=step: (folder / "w").write_text(str(step)))
    assert sorted(p.name for p in run.checkpoints_path.iterdir()) == ["step-000020", "step-000030"]

    def fails(folder):
        (folder / "w").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        run.save_checkpoint(40, fails)
    step, folder = run.latest_checkpoint()
    assert step == 30
    assert (folder / "w").read_text() == "30"
    assert len(list(run.checkpoints_path.iterdir())) == 2


def test_what_a_kill_left_is_ignored_and_cleared(tmp_path):
    run = RunDir.create(tmp_path, {})
    (run.checkpoints_path / ".partial-dead").mkdir(parents=True)
    assert run.latest_checkpoint() is None
    run.save_checkpoint(1, lambda folder: None)
    assert [p.name for p in run.checkpoints_path.iterdir()] == ["step-000001"]


def test_any_other_exception_passes_and_leaves_nothing(tmp_path):
    def fails_half_way() -> None:
        with atomic_directory(tmp_path / "out") as aside:
            (aside / "x").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_half_way()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are a Unix thing")
def test_a_full_disk_leaves_no_half_written_checkpoint(tmp_path):
    script = textwrap.dedent(
        """
        import resource, signal, sys, torch
        from telltale.errors import CheckpointError
        from telltale.models.presets import build
        from telltale.runs import RunDir
        from telltale.train.checkpoint import save
        from telltale.train.loop import _optimizer
        from telltale.train.run_config import TrainConfig
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run = RunDir.create(sys.argv[1], {})
        model = build("nano")
        optimizer = _optimizer(model, TrainConfig())
        save(run, 1, model, optimizer, None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            save(run, 2, model, optimizer, None)
        except CheckpointError as error:
            print("refused:", error)
        """
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert "refused:" in result.stdout, result.stderr
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


def test_a_file_that_cannot_be_written_is_told_by_name(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="below"):
        write_atomically(tmp_path / "file" / "below", "text")


@pytest.mark.parametrize(
    "before", [signal.default_int_handler, signal.SIG_IGN], ids=["usual", "ignored, as under nohup"]
)
def test_the_first_interrupt_is_a_request_and_the_second_an_exception(before, request):
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, before)))
    with interruptible() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    seen = []

    def elsewhere() -> None:
        with interruptible() as other:
            seen.append(other.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]


def test_report_is_self_contained_and_escapes(tmp_path):
    report = Report("A <title>", subtitle="of & things")
    report.text("see `code<x>`")
    report.table(["name", "value"], [["<b>", 1.5]])
    figure = plotly_module().Figure()
    figure.add_scatter(x=[1, 2], y=[3, 4])
    report.figure(figure, caption="a plot")
    page = report.save(tmp_path / "r.html").read_text()
    assert "A &lt;title&gt;" in page
    assert "<code>code&lt;x&gt;</code>" in page
    assert "&lt;b&gt;" in page
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page


def test_a_missing_plotly_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'telltale\[report\]'"):
        plotly_module()


def test_logging_after_a_cut_line_loses_nothing_but_the_cut_line(tmp_path):
    run = RunDir.create(tmp_path, {})
    run.log({"step": 1})
    with run.metrics_path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    run.log({"step": 3})
    assert [record["step"] for record in run.metrics()] == [1, 3]


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "out") as aside:
            (aside / text).write_text(text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
