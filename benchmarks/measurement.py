"""How every benchmark here measures: contestants interleaved in one process, wall and CPU time, medians and spread.

A shared machine drifts, so a contestant is never timed in a block of its own: each round runs all of them once, in
an order that rotates, and a ratio is the median over rounds of the two times of the same round. Results are JSON
files under ``benchmarks/results`` that name the machine, the versions and the command.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """One contestant over all rounds. Times in seconds per round; ``tokens`` is what one round produced."""

    wall: list[float]
    cpu: list[float]
    tokens: list[int]

    def summary(self) -> dict[str, float]:
        """Median and quartiles of milliseconds per token (CPU and wall), and tokens per second of wall time."""
        cpu = [1e3 * seconds / count for seconds, count in zip(self.cpu, self.tokens, strict=True)]
        wall = [1e3 * seconds / count for seconds, count in zip(self.wall, self.tokens, strict=True)]
        low, middle, high = quartiles(cpu)
        wall_low, wall_middle, wall_high = quartiles(wall)
        return {
            "cpu_ms_per_token": middle,
            "cpu_ms_per_token_q1": low,
            "cpu_ms_per_token_q3": high,
            "wall_ms_per_token": wall_middle,
            "wall_ms_per_token_q1": wall_low,
            "wall_ms_per_token_q3": wall_high,
            "tokens_per_second": 1e3 / wall_middle,
        }


def interleave(contestants: Mapping[str, Callable[[], int]], *, rounds: int, warm_up: int = 1) -> dict[str, Timing]:
    """Run every contestant once per round, rotating the order; a contestant returns how many tokens it produced."""
    names = list(contestants)
    timings = {name: Timing([], [], []) for name in names}
    for _ in range(warm_up):
        for name in names:
            contestants[name]()
    for round_index in range(rounds):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            gc.disable()
            cpu, wall = time.process_time(), time.perf_counter()
            tokens = contestants[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            gc.enable()
            timings[name].wall.append(wall)
            timings[name].cpu.append(cpu)
            timings[name].tokens.append(tokens)
    return timings


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """Tokens per second of ``fast`` over those of ``slow``: the median of per-round ratios, with quartiles."""
    result = {}
    for kind in ("cpu", "wall"):
        pairs = zip(getattr(slow, kind), slow.tokens, getattr(fast, kind), fast.tokens, strict=True)
        low, middle, high = quartiles([(s / ns) / (f / nf) for s, ns, f, nf in pairs])
        result |= {kind: middle, f"{kind}_q1": low, f"{kind}_q3": high}
    return result


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, versions, threads, commit."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "vector_extensions": _vector_extensions(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def write_result(name: str, **payload: Any) -> Path:
    """Write ``benchmarks/results/<name>.json`` (aside, then renamed) with the machine and the command."""
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_public, sys.argv[1:])])
    document = {"benchmark": name, "command": command, "machine": machine(), **payload}
    target = RESULTS / f"{name}.json"
    aside = target.with_suffix(".json.partial")
    aside.write_text(json.dumps(document, indent=1, default=_plain) + "\n")
    aside.replace(target)
    print(f"wrote {target}")
    return target


def _public(argument: str) -> str:
    """An argument, or NAME=PATH, without where things lie on this machine."""
    head, _, tail = argument.rpartition("=")
    return f"{head}={Path(tail).name}".removeprefix("=") if Path(tail).is_absolute() else argument


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return value.summary()
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if isinstance(value, torch.Tensor):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _vector_extensions() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return []
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return sorted({"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"} & set(flags.split()))


def _commit() -> str:
    root = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True)
    return (head.stdout.strip() or "none") + ("+changes" if dirty.stdout.strip() else "")
