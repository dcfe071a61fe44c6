"""``compare``: arms x seeds on the embedded routes task, each through :class:`OGERTrainer` itself, and what came out.

Every (arm, seed) run leaves one JSON file, so that a killed comparison goes on where it stopped. The base policy is trained once by
its recipe and kept beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

from telltale.align.oger.config import OGERConfig
from telltale.align.oger.pass_at_k import pass_at_k
from telltale.align.oger.reward import token_entropies
from telltale.align.oger.teachers import TeacherStore
from telltale.align.oger.trainer import OGERTrainer
from telltale.config import check_choice, check_integer
from telltale.errors import CheckpointError, ConfigError
from telltale.models.loading import without_progress_bars
from telltale.runs.files import atomic_directory, write_atomically
from telltale.tasks import routes

NO_OGER: dict[str, Any] = {"oger_coef": 0.0, "oger_hybrid": 0}
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {**NO_OGER, "scale_rewards": "group"},
    "grpo_clip_high": {**NO_OGER, "scale_rewards": "group", "epsilon_high": 0.28, "num_iterations": 2},
    "sft_then_grpo": {**NO_OGER, "scale_rewards": "group"},
    "grpo_and_sft": {"oger_preset": "paper", "oger_coef": 0.0, "oger_offline_loss": "sft", "oger_replaced": "random"},
    "luffy": {
        "oger_preset": "paper",
        "oger_coef": 0.0,
        "oger_offline_loss": "shaped",
        "oger_replaced": "random",
        "scale_rewards": "none",
    },
    "hybrid": {"oger_preset": "paper", "oger_coef": 0.0},
    "paper": {"oger_preset": "paper"},
    "default": {},
    "group": {"oger_reference": "group"},
}
"""What each arm sets in :class:`OGERConfig`. ``grpo_clip_high`` makes two updates per generation: with one, nothing is clipped.
``sft_then_grpo`` first sees, supervised, as many teacher traces as a hybrid run does."""


@dataclass(frozen=True)
class Setting:
    """Size of every run: ``prompts`` groups of ``group`` rollouts a step; evaluations at the steps of ``evaluate_at``."""

    steps: int = 80
    prompts: int = 16
    group: int = 8
    learning_rate: float = 2e-4
    evaluate_at: tuple[int, ...] = (20, 40, 80)
    evaluated_problems: int = 150
    samples: int = 16
    teachers: tuple[str, ...] = ("S5", "S10", "D2")
    verifier: str = "steps"
    """"steps" checks every step, "answer" only the last number."""
    encoder: str = "hidden"
    base: routes.BaseRecipe = field(default_factory=routes.BaseRecipe)

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "group", "evaluated_problems", "samples"):
            check_integer(name, getattr(self, name), low=1)
        check_choice("verifier", self.verifier, ("steps", "answer"))

    @property
    def digest(self) -> str:
        """Names the results of this setting: a folder holds one setting only."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Measured:
    """One evaluation on held-out problems; shares of samples unless said otherwise."""

    step: int
    easy: float
    hard: float
    hard_pass_at_n: float
    """Share of hard problems that any of the samples solves."""
    routes: float
    """Different correct routes per hard problem among its samples."""
    entropy: float
    """Nats per sampled token."""
    unfaithful: float
    """Of the samples with the right last number, the share with a wrong step."""
    taken: dict[str, int]
    """Samples by correct route."""


def compare(
    folder: str | Path,
    *,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    setting: Setting | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run what is missing in ``folder`` and return the records of all (arm, seed) pairs, in order.

    overrides: further arms by name, as :data:`ARMS` has them. progress: told what runs, steps done and steps in all.
    Raises :class:`~telltale.errors.ConfigError` for an unknown arm and :class:`~telltale.errors.CheckpointError` if the folder
    holds a comparison of another setting.
    """
    setting, folder = setting or Setting(), Path(folder)
    known = ARMS | (overrides or {})
    arms = list(ARMS if arms is None else arms)
    for arm in arms:
        check_choice("arm", arm, known)
    for seed in seeds:
        check_integer("seed", seed, low=0, high=2**32 - 1)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds={list(seeds)} names a run twice, which an interval would count as two; expected each once."
        )
    _check_folder(folder, setting)
    base = base_policy(folder / "base", setting.base, progress=progress)
    records = []
    for arm in arms:
        for seed in seeds:
            file = folder / "results" / f"{arm}-{seed}.json"
            if not file.exists():
                record = run_arm(
                    base, known[arm], seed, setting, warm_start=arm == "sft_then_grpo", name=arm, progress=progress
                )
                write_atomically(file, json.dumps(record) + "\n")
            records.append(json.loads(file.read_text()))
    return records


def base_policy(
    folder: Path, recipe: routes.BaseRecipe, *, progress: Callable[[str, int, int], None] | None = None
) -> Path:
    """The folder of the recipe's base policy and tokenizer, trained there if it is not there."""
    if not folder.exists():
        model = routes.pretrain(
            recipe,
            progress=None if progress is None else lambda step, loss: progress("base policy", step, recipe.steps),
        )
        with atomic_directory(folder) as aside, without_progress_bars():
            model.save_pretrained(aside)
            routes.build_tokenizer().save_pretrained(aside)
    return folder


def run_arm(
    base: Path,
    fields: dict[str, Any],
    seed: int,
    setting: Setting,
    *,
    warm_start: bool = False,
    name: str = "arm",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """One run from ``base`` with the config ``fields``; its record has the evaluations and the trainer's metrics by step."""
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=torch.float32)
    tokenizer = routes.build_tokenizer()
    training, held_out = routes.split(seed=seed)
    teachers = task_store(training, setting)
    evaluation = _Evaluation(tokenizer, held_out[: setting.evaluated_problems], setting, seed, name, progress)
    if warm_start:
        _supervised(model, training[: setting.steps * setting.prompts], setting, seed)
    rows = setting.prompts * setting.group
    iterations = int(fields.get("num_iterations", 1))
    evaluation.every = iterations
    with tempfile.TemporaryDirectory() as scratch:
        arguments: dict[str, Any] = {
            "output_dir": scratch,
            "per_device_train_batch_size": rows,
            "num_generations": setting.group,
            "max_completion_length": routes.LONGEST,
            "max_steps": setting.steps * iterations,
            "learning_rate": setting.learning_rate,
            "lr_scheduler_type": "constant",
            "adam_beta2": 0.99,
            "max_grad_norm": 1.0,
            "seed": seed,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        }
        trainer = OGERTrainer(
            model,
            OGERConfig(**(arguments | fields)),
            teachers=teachers,
            encoder=setting.encoder,
            processing_class=tokenizer,
            callbacks=[evaluation],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = [
            {key: row[key] for key in row if key in ("step", "entropy", "reward") or key.startswith("oger/")}
            for row in trainer.state.log_history[:-1]
        ]
    return {
        "arm": name,
        "seed": seed,
        "fields": fields,
        "setting": setting.digest,
        "evaluations": [asdict(measured) for measured in evaluation.measured],
        "history": history,
        "teacher_encodes": trainer.teacher_encodes,
    }


def task_store(problems: Sequence[routes.Problem], setting: Setting) -> TeacherStore:
    """The setting's teachers, programs, on ``problems``, judged by its verifier."""
    return TeacherStore.from_rows(
        [("the task's prompts", row) for row in routes.prompt_rows(problems)],
        [("the task's teachers", row) for row in routes.teacher_rows(problems, setting.teachers)],
        verifier=routes.verify if setting.verifier == "steps" else routes.verify_answer_only,
    )


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: Any, problems: Sequence[routes.Problem], *, samples: int, seed: int, step: int
) -> Measured:
    """Sample every problem ``samples`` times at temperature 1. The global random state is left as it was."""
    rows = [problem for problem in problems for _ in range(samples)]
    encoded = tokenizer([problem.prompt for problem in rows], return_tensors="pt", padding=True)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=routes.LONGEST,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    model.train(was_training)
    written = output.sequences[:, encoded["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    entropies = token_entropies(torch.stack(output.logits, 1))
    before_end = (written == tokenizer.eos_token_id).cumsum(1) - (written == tokenizer.eos_token_id).long() == 0
    found = [routes.check(problem, text) for problem, text in zip(rows, texts, strict=True)]
    answered = [routes.answers_right(problem, text) for problem, text in zip(rows, texts, strict=True)]
    by_problem = {problem: found[index * samples : (index + 1) * samples] for index, problem in enumerate(problems)}
    hard = [names for problem, names in by_problem.items() if problem.hard]
    easy = [names for problem, names in by_problem.items() if not problem.hard]
    return Measured(
        step=step,
        easy=_solved(easy),
        hard=_solved(hard),
        hard_pass_at_n=_mean([pass_at_k(samples, sum(n is not None for n in names), samples) for names in hard]),
        routes=_mean([len({n for n in names if n is not None}) for names in hard]),
        entropy=float(entropies[before_end].mean()),
        unfaithful=sum(a and f is None for a, f in zip(answered, found, strict=True)) / max(sum(answered), 1),
        taken=dict(Counter(name for name in found if name is not None).most_common()),
    )


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per arm: means over seeds at every evaluated step, the last step's figures by seed, and 95% t intervals of the last step."""
    rows = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        own = [record for record in records if record["arm"] == arm]
        last = [record["evaluations"][-1] for record in own]
        row: dict[str, Any] = {"arm": arm, "seeds": [record["seed"] for record in own]}
        for index, evaluation in enumerate(own[0]["evaluations"]):
            row[f"hard@{evaluation['step']}"] = _mean([record["evaluations"][index]["hard"] for record in own])
            row[f"hard@{evaluation['step']}_by_seed"] = [record["evaluations"][index]["hard"] for record in own]
        for name in ("easy", "hard", "hard_pass_at_n", "routes", "entropy", "unfaithful"):
            values = [evaluation[name] for evaluation in last]
            row[name], row[f"{name}_by_seed"] = _mean(values), values
            row[f"{name}_interval"] = interval(values)
        shares = [step.get("oger/teacher_adv_neg_frac") for record in own for step in record["history"]]
        known = [share for share in shares if share is not None and not math.isnan(share)]
        row["teacher_adv_neg_frac"] = _mean(known) if known else None
        rows.append(row)
    return rows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% t interval of the mean of independent values; (nan, nan) for fewer than two."""
    from scipy.stats import t

    if len(values) < 2:
        return math.nan, math.nan
    tensor = torch.tensor(values, dtype=torch.float64)
    half = float(t.ppf(0.975, len(values) - 1) * tensor.std() / math.sqrt(len(values)))
    return float(tensor.mean()) - half, float(tensor.mean()) + half


class _Evaluation(TrainerCallback):
    """Evaluates at the setting's steps and tells the progress."""

    def __init__(
        self,
        tokenizer: Any,
        problems: Sequence[routes.Problem],
        setting: Setting,
        seed: int,
        name: str,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.tokenizer, self.problems, self.setting, self.seed = tokenizer, problems, setting, seed
        self.name, self.progress = f"{name}, seed {seed}", progress
        self.measured: list[Measured] = []
        self.every = 1
        """Updates per generation: steps are counted in generations."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Evaluate after the last update of a generation."""
        step, rest = divmod(state.global_step, self.every)
        if rest:
            return
        if self.progress is not None:
            self.progress(self.name, step, self.setting.steps)
        if step in self.setting.evaluate_at:
            samples = self.setting.samples
            self.measured.append(
                evaluate(model, self.tokenizer, self.problems, samples=samples, seed=10_000 + self.seed, step=step)
            )


def _supervised(model: Any, problems: Sequence[routes.Problem], setting: Setting, seed: int) -> None:
    """One pass over one teacher trace per problem, ``prompts`` traces an update."""
    generator = torch.Generator().manual_seed(seed)
    ids = routes.token_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    model.train()
    for start in range(0, len(problems), setting.prompts):
        some = problems[start : start + setting.prompts]
        drawn = torch.randint(len(setting.teachers), (len(some),), generator=generator).tolist()
        traces = [routes.solution(problem, setting.teachers[index]) for problem, index in zip(some, drawn, strict=True)]
        rows = [routes.encoded(problem.prompt, trace, ids) for problem, trace in zip(some, traces, strict=True)]
        loss = routes.supervised_loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _check_folder(folder: Path, setting: Setting) -> None:
    note = folder / "setting.json"
    if note.exists() and json.loads(note.read_text())["digest"] != setting.digest:
        raise CheckpointError(f"{folder} holds a comparison of another setting; give another folder, or delete it.")
    write_atomically(note, json.dumps({"digest": setting.digest, "setting": asdict(setting)}, indent=1) + "\n")


def _solved(groups: Sequence[Sequence[str | None]]) -> float:
    return _mean([name is not None for names in groups for name in names])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
