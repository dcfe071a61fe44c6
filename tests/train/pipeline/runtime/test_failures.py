"""A rank that dies, fails or hangs ends all others in time, and they say which one it was."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from telltale.train.pipeline import reference
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.failures import FlightRecord, attempt_prefix
from train.pipeline import fault_runs as runs
from train.pipeline.rank_runs import run_ranks, values

CASES = {
    # Those that sleep come first: all the others are through before they wake up.
    "hung": (runs.in_batches, 0, runs.sleep, 5, runs.STRAIGHT),
    "last hung": (runs.in_batches, 2, runs.sleep, 5, runs.STRAIGHT),
    "construction": (runs.at_construction,),
    "killed": (runs.in_batches, 1, runs.kill, 5, runs.STRAIGHT),
    "killed before the first header": (runs.in_batches, 1, runs.kill, 0, runs.STRAIGHT),
    "first killed": (runs.in_batches, 0, runs.kill, 5, runs.STRAIGHT),
    "replica killed": (runs.in_batches, 1, runs.kill, 5, runs.REPLICATED),
    "left": (runs.in_batches, 2, runs.leave, 5, runs.STRAIGHT),
    "failed": (runs.in_batches, 1, runs.fail, 5, runs.STRAIGHT),
    "nan": (runs.with_nan,),
    "evaluation": (runs.in_evaluation,),
    "losses": (runs.in_losses,),
    "clipping": (runs.in_clipping,),
}
MARGIN = 8.5
"""Seconds beyond the time-out, for the start, the failing rank's word and a busy machine; less than a hung rank sleeps."""


@pytest.fixture(scope="module")
def outcomes():
    """Case -> outcomes of three ranks. They mostly wait, so all run at once."""
    with ThreadPoolExecutor(6) as pool:
        jobs = {name: pool.submit(run_ranks, job[0], 3, *job[1:], limit=60.0) for name, job in CASES.items()}
        return {name: job.result() for name, job in jobs.items()}


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "culprit", "words"),
    [
        ("killed", 1, r"rank 1 is gone \(its connection closed\) \(its last operations: .*F\d"),
        ("killed before the first header", 1, r"rank 1 is gone"),
        ("first killed", 0, r"rank 0 is gone"),
        ("replica killed", 1, r"rank 1 is gone"),
        ("left", 2, r"rank 2 stopped: SystemExit: 3 \(its last operations: .*F\d \(version"),
        ("failed", 1, r"rank 1 stopped: ValueError: no such row \(its last operations: .*F\d \(version"),
        ("hung", 0, r"rank 0 did not answer within 4 s \(its last operations: .*F\d \(version"),
        ("last hung", 2, r"rank 2 did not answer within 4 s \(its last operations: .*F\d \(version"),
        (
            "nan",
            2,
            r"rank 2 stopped: NumericalError: the loss of minibatch 6 is nan \(weight version 6, policy stash\)",
        ),
        ("evaluation", 1, r"rank 1 is gone"),
        ("losses", 1, r"rank 1 is gone"),
        ("clipping", 1, r"rank 1 is gone"),
        ("construction", 2, r"rank 2 did not answer within 4 s"),
    ],
)
def test_the_others_end_in_time_and_name_the_rank(outcomes, case, culprit, words):
    """All end in time. Whoever was beside the culprit names it; on a busy machine a rank further off may meet the end of a
    rank in between first, and name that one."""
    others = [outcome.error or "" for rank, outcome in enumerate(outcomes[case]) if rank != culprit]
    assert any(re.search(words, error) for error in others), others
    for rank, outcome in enumerate(outcomes[case]):
        assert outcome.ended, f"rank {rank} did not end"
        if rank == culprit:
            continue
        assert outcome.error is not None, f"rank {rank} went on"
        assert outcome.error.startswith("RankFailure: ")
        assert re.search(words, outcome.error) or re.search(r"rank \d is gone", outcome.error), outcome.error
        assert f"Rank {rank} was waiting for" in outcome.error
        assert outcome.seconds < runs.TIMEOUT + MARGIN


def test_the_rank_itself_keeps_its_own_error(outcomes):
    assert outcomes["failed"][1].error == "ValueError: no such row"
    assert outcomes["left"][2].error == "SystemExit: 3"
    assert outcomes["nan"][2].error.startswith("NumericalError: the loss of minibatch 6 is nan (weight version 6")
    assert outcomes["killed"][1].error is None
    assert outcomes["hung"][0].error.startswith("RankFailure: rank 0 did not answer")


@pytest.mark.long
def test_an_error_that_is_caught_ends_the_other_rank_too_and_both_can_train_anew():
    """The last rank alone meets the loss that is no tensor, and lives on: the first is not left in its wait."""
    (first, losses, waited), (last, same, _) = values(run_ranks(runs.going_on, 2, limit=90.0))
    for refusals in (first, last):
        assert len(refusals) == 2
        assert "batches is DataLoader; expected a function of the minibatch number" in refusals[0]
        assert "the loss is a float; expected a scalar tensor" in refusals[1]
    assert first[1].startswith("RankFailure: rank 1 stopped: DataError")
    assert len(losses) == 3
    assert losses == same
    assert waited < 30, "it waited for the time-out"


def test_a_record_keeps_the_last_operations():
    record = FlightRecord(0, 5.0)
    assert record.last == "none yet"
    for number in range(20):
        record.note(f"F{number}")
    assert record.last.startswith("F8, F9")
    assert record.last.endswith("F19")


def test_an_attempt_gets_a_name_of_its_own_whatever_an_earlier_one_left():
    store = dist.HashStore()
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(attempt_prefix, store, rank, 3, 20.0) for rank in (2, 1, 0)]
            names.append({job.result() for job in jobs})
    assert len(names[0]) == len(names[1]) == 1
    assert names[0] != names[1]
    with pytest.raises(TimeoutError, match=r"2 processes were to join and not all of them came within 0\.2 s"):
        attempt_prefix(store, 1, 2, 0.2)


SCRIPT = """
import os, signal, sys
import torch
from pathlib import Path
from torch import nn
from telltale.train.pipeline.runtime.failures import attempt_prefix
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.trainer import PipelineTrainer

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.1), nn.Linear(8, 4))

def optimizer(named):
    return torch.optim.SGD(named, lr=0.05, momentum=0.9)

def batch(t):
    generator = torch.Generator().manual_seed(t)
    return torch.randn(4, 8, generator=generator), torch.randint(4, (4,), generator=generator)

def deadly(t):
    marker = folder / "died"
    if t == 11 and trainer.rank == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(t)

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    trainer = PipelineTrainer(model(), Plan.even(4, 2), optimizer=optimizer, loss=nn.CrossEntropyLoss(), timeout=20)
    trainer.fit(deadly, stop=16, directory=folder / "run", save_every=4)
    trainer.export(folder / "whole.safetensors")
"""


@pytest.mark.slow
def test_torchrun_goes_on_from_the_newest_step(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--monitor-interval=0.2", str(script), str(tmp_path)]
    job = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150, check=False
    )
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "died").exists()
    namespace = runpy.run_path(str(script), run_name="uninterrupted")
    net = namespace["model"]()
    wanted = reference.train(
        net, Plan.even(4, 2), namespace["batch"], optimizer=namespace["optimizer"], stop=16, loss=nn.CrossEntropyLoss()
    )
    whole = load_file(tmp_path / "whole.safetensors")
    for name, value in net.state_dict().items():
        assert torch.equal(whole[name], value), name
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, 12, 16]
    assert [loss for record in records for loss in record["losses"]] == wanted.losses
