"""SmolLM2-135M watched by the edge-of-stability monitor: CPU seconds of its looks, and the peak of memory.

The GGUF file of the instruct model is read by Transformers (with the package gguf) into float32, and trained for a few AdamW
steps on a text of the project's own. ``--budget 1`` lets the monitor look at every second step; the default budget of 5% allows
the first look alone in so short a run. The peak is the process's largest resident set, of training alone and with the monitor,
each in a process of its own (``--plain``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from measurement import write_result
from telltale.train.sharpness import SharpnessMonitor, language_model_loss

EVERY = 2


def text() -> str:
    """The project's own documentation."""
    return "\n".join(path.read_text() for path in sorted(Path(__file__).parents[1].glob("docs/sharpness/*.md")))


def watched(file: Path, steps: int, length: int, rows: int, plain: bool) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = torch.tensor(tokenizer(text())["input_ids"])
    batches = ids[: len(ids) // (rows * length) * rows * length].view(-1, rows, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loaded = peak()
    monitor, readings, seconds = None, [], []
    began = time.process_time()
    if not plain:
        monitor = SharpnessMonitor(model, None, [batches[-1]], optimizer=optimizer, budget=1.0, every=EVERY)
    opening = time.process_time() - began
    for step in range(steps):
        began = time.process_time()
        optimizer.zero_grad()
        language_model_loss(model, batches[step]).backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
        began = time.process_time()
        reading = None if monitor is None else monitor.step()
        if reading is not None:
            readings.append(dataclasses.asdict(reading) | {"cpu_seconds": time.process_time() - began})
            print(f"step {reading.step}: {reading.ratio:.3f} of the edge, {reading.leading}", flush=True)
    found = {
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "peak_bytes_loaded": loaded,
        "peak_bytes": peak(),
        "step_cpu_seconds": seconds,
    }
    if monitor is not None:
        found |= {
            "opening_cpu_seconds": opening,
            "tracker_bytes": list(monitor.tracker.memory(monitor.probe.size)),
            "readings": readings,
        }
    return found


def peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="smollm2-135m-instruct-q4_1.gguf")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="train without a monitor and print the figures")
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = {name: getattr(arguments, name) for name in ("steps", "length", "rows", "threads")}
    if arguments.plain:
        print(json.dumps(watched(arguments.file, arguments.steps, arguments.length, arguments.rows, True)))
        return
    command = [sys.executable, *sys.argv, "--plain"]
    without = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    found = watched(arguments.file, arguments.steps, arguments.length, arguments.rows, False)
    print(f"peak {found['peak_bytes'] / 2**30:.2f} GiB with the monitor, {without['peak_bytes'] / 2**30:.2f} without")
    if not arguments.trial:
        write_result("sharpness_smollm2", settings=settings, watched=found, plain=without)


if __name__ == "__main__":
    main()
