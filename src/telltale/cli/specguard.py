"""``telltale specguard``: choose a threshold for a pair of models, and measure how good their signals are and what a step costs.

Three commands share how they open the pair of models (:class:`PairOptions`) and its labelled problems
(:class:`ProblemOptions`). Ctrl-C ends a long one after the batch under way, which is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telltale.cli.options import Json, Seed, Threads, config_options, emit, set_threads
from telltale.config import check_choice, check_integer, parse_overrides
from telltale.errors import ConfigError, DataError
from telltale.runs.progress import Interruption, ProgressBar, interruptible

if TYPE_CHECKING:
    from telltale.decode.calibration.labelers import AnyLabeler
    from telltale.decode.step_verified import StepVerified

TASKS = ("chains", "gsm8k")
LABELERS = ("checker", "rollouts", "agreement")
LONGEST_OUTPUT = 512
INSTRUCTION = (
    "Solve the problem step by step, each step in a paragraph of its own. Write every calculation as <<48/2=24>>24. End with a "
    "last paragraph that is #### and the answer, a number."
)
"""Put behind a question of gsm8k for a model with a chat template."""


@dataclass
class Opened:
    """Models under a configuration, problems, and who labels their steps."""

    decoder: StepVerified
    problems: Sequence[Any]
    labeler: AnyLabeler
    encode: Callable[[Any, Any], list[int]]
    max_new_tokens: int


@dataclass(frozen=True)
class PairOptions:
    """Two models in their roles, and how steps are made."""

    draft: Path | None = None
    """The checkpoint that drafts; it has the target's tokenizer."""
    exit_layer: int | None = None
    """Instead of --draft: the target's first layers draft."""
    candidates: int | None = None
    """Candidates of a step. Default: 16, or 1 at temperature 0."""
    fallback: str | None = None
    """How the target redoes a step: k-sample, plain or spec."""
    overrides: list[str] | None = None
    """FIELD=VALUE of StepVerifiedConfig, such as max_step_tokens=64; repeatable."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: the checkpoint's own."""
    weights: str | None = None
    """int8: linear layers of both models in 8 bits, for the native step. Default: the dtype's own."""
    backend: str = "auto"
    """auto, native, fused or module."""

    def open(self, target: Path, **more: Any) -> StepVerified:
        """The pair. ``more``: fields of the configuration; those that are None are left to its defaults, --set comes last.

        Raises :class:`~telltale.errors.ConfigError` unless exactly one of ``draft`` and ``exit_layer`` is given, and
        :class:`~telltale.errors.DataError` for a draft with another vocabulary.
        """
        from telltale.config import from_mapping
        from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
        from telltale.models.loading import load, load_draft

        if (self.draft is None) == (self.exit_layer is None):
            raise ConfigError("expected either --draft, or --exit-layer to have the target's first layers draft.")
        given = {"candidates": self.candidates, "fallback": self.fallback} | more
        values = {name: value for name, value in given.items() if value is not None}
        values |= parse_overrides(self.overrides or ()) | {"exit_layer": self.exit_layer}
        config = from_mapping(StepVerifiedConfig, values)
        form: dict[str, Any] = {"dtype": self.dtype, "weights": self.weights}
        model, tokenizer = load(target, **form)
        drafting = None if self.draft is None else load_draft(self.draft, tokenizer, **form)
        return StepVerified(model, drafting, tokenizer, config, backend=self.backend)


@dataclass(frozen=True)
class ProblemOptions:
    """Problems, the labeler of their steps, and how answers are sampled."""

    data: Path | None = None
    """Problems, a local file. Without one: chains, generated from --seed."""
    task: str | None = None
    """chains or gsm8k. Default: gsm8k with --data, chains without."""
    problems: int | None = None
    """How many problems. Default: 300 chains, all of a file."""
    labeler: str = "checker"
    """Labeler of steps: checker, rollouts or agreement."""
    rollouts: int | None = None
    """Continuations for each step with --labeler rollouts. Default: 8."""
    prompt_form: str = "auto"
    """chat, plain, or auto: a chat if the tokenizer has a template."""
    shots: int | None = None
    """gsm8k: worked examples from the file's top. Default: 0 in a chat, else 4."""
    temperature: float = 0.7
    """0 takes the most likely token."""
    top_p: float = 0.8
    """Sample within this probability mass; 1 is all of it."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: 512, or what the positions allow."""
    batch: int = 32
    """Problems decoded together."""

    @property
    def mass(self) -> float | None:
        """``top_p`` as the decoders take it."""
        return None if self.top_p == 1 else self.top_p


def open_task(decoder: StepVerified, options: ProblemOptions, *, seed: int) -> Opened:
    """The problems and their labeler. Raises :class:`~telltale.errors.TelltaleError` for what does not fit together."""
    from telltale.decode.calibration.labelers import AgreementLabeler, RolloutLabeler
    from telltale.decode.calibration.prompts import FORMS, Prompts

    task = options.task or ("chains" if options.data is None else "gsm8k")
    check_choice("task", task, TASKS)
    check_choice("labeler", options.labeler, LABELERS)
    if options.problems is not None:
        check_integer("problems", options.problems, low=1)
    check_choice("prompt_form", options.prompt_form, FORMS)
    if options.rollouts is not None and options.labeler != "rollouts":
        raise ConfigError(f"--rollouts does nothing with --labeler {options.labeler}; leave it out.")
    if task == "gsm8k":
        shots = options.shots
        if shots is None:
            # A model without a chat template learns the form from worked examples.
            shots = 0 if Prompts(options.prompt_form).chats(decoder.tokenizer) else 4
        problems, checker, encode = _gsm8k(options.data, options.problems, seed, shots, options.prompt_form)
    else:
        problems, checker, encode = _chains(options.data, options.problems, seed, options.shots, options.prompt_form)
    longest = max(len(encode(decoder.tokenizer, problem)) for problem in problems)
    room = min(model.max_positions for model in (decoder.target, decoder.draft) if model is not None) - longest
    if room < 1:
        raise DataError(f"the longest prompt has {longest} tokens, which leaves no room for an answer.")
    limit = min(LONGEST_OUTPUT, room) if options.max_new_tokens is None else options.max_new_tokens
    found: AnyLabeler = checker
    if options.labeler == "agreement":
        found = AgreementLabeler(
            decoder.target,
            decoder.tokenizer,
            answer_right=checker.answer_right,
            max_step_tokens=decoder.config.max_step_tokens,
            delimiter=decoder.config.delimiter,
        )
    elif options.labeler == "rollouts":
        found = RolloutLabeler(
            decoder.target,
            decoder.tokenizer,
            checker.answer_right,
            rollouts=8 if options.rollouts is None else options.rollouts,
            max_new_tokens=limit,
            seed=seed,
            delimiter=decoder.config.delimiter,
            temperature=options.temperature,
            top_p=options.mass,
        )
    return Opened(decoder, problems, found, encode, limit)


def _chains(
    data: Path | None, count: int | None, seed: int, shots: int | None, form: str = "auto"
) -> tuple[Sequence[Any], Any, Any]:
    from telltale.decode.calibration.prompts import Prompts
    from telltale.tasks import chains
    from telltale.tasks.chain_checker import ChainLabeler

    if data is not None:
        raise ConfigError("--data was given with --task chains, which makes its problems from --seed; leave it out.")
    if shots is not None:
        raise ConfigError("--shots is for --task gsm8k; leave it out.")
    return chains.generate(count or 300, seed=seed), ChainLabeler(), Prompts(form)


def _gsm8k(
    data: Path | None, count: int | None, seed: int, shots: int | None, form: str = "auto"
) -> tuple[Sequence[Any], Any, Any]:
    from telltale.decode.calibration.prompts import Prompts
    from telltale.tasks import gsm8k
    from telltale.tasks.gsm8k_checker import Gsm8kLabeler

    if data is None:
        raise ConfigError("--task gsm8k needs --data, a local file such as test.jsonl of openai/grade-school-math.")
    problems = gsm8k.read(data)
    number = check_integer("shots", 0 if shots is None else shots, low=0)
    # What is shown as a worked example is no problem any more.
    rest = problems[number:][: count or None]
    if not rest:
        raise DataError(f"{data} has {len(problems)} problems, of which {number} are examples; expected more.")
    return rest, Gsm8kLabeler(), Prompts(form, tuple(problems[:number]), INSTRUCTION)


class Stages:
    """A progress bar for each stage of a job. ``tell`` raises KeyboardInterrupt after Ctrl-C."""

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption
        self._stage = ""
        self._bar: ProgressBar | None = None
        self._done = 0

    def tell(self, stage: str, done: int, of: int) -> None:
        """``done`` of a stage's problems are finished."""
        if stage != self._stage or self._bar is None or done < self._done:
            self._close()
            self._stage, self._bar = stage, ProgressBar(stage, of, unit="problem").__enter__()
        self._done = done
        self._bar.update(done)
        if self._interruption.requested:
            raise KeyboardInterrupt

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


@contextmanager
def stoppable() -> Iterator[Stages]:
    """Progress in the block; Ctrl-C ends it after the batch under way, which is kept."""
    from telltale.cli.options import INTERRUPTED

    with interruptible() as interruption, Stages(interruption) as stages:
        try:
            yield stages
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


Target = Annotated[Path, typer.Option(help="The checkpoint that verifies and redoes steps.")]
_PAIR = config_options(PairOptions, into="pair", flags={"overrides": "--set"}, panel="The pair of models")
_PROBLEMS = config_options(ProblemOptions, into="questions", panel="Problems and sampling")


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(
        help="Step-verified decoding: what it costs, a calibrated threshold, what its signals are worth.",
        no_args_is_help=True,
    )
    group.command("calibrate")(calibrate)
    group.command("report")(report)
    group.command("costs")(costs)
    app.add_typer(group, name="specguard")


@_PAIR
@_PROBLEMS
def calibrate(
    target: Target,
    alpha: Annotated[float, typer.Option(help="Bound of the risk, in 0..1.")] = 0.05,
    method: Annotated[str, typer.Option(help="crc bounds the expected risk, ltt the risk with --confidence.")] = "crc",
    risk: Annotated[
        str | None, typer.Option(help="steps: accepted and wrong. accuracy-drop: answers lost (ltt, its default).")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of ltt. Default: 0.9.")] = None,
    loss: Annotated[str, typer.Option(help="Of a problem: mean over its steps, or any.")] = "mean",
    unknown: Annotated[str, typer.Option(help="Steps that cannot be labelled: skip, wrong or right.")] = "skip",
    score: Annotated[str | None, typer.Option(help="ensemble (default), log-probability, grounding, ...")] = None,
    signal_model: Annotated[
        str, typer.Option(help="Whose signals are read: target (recommended) or draft.")
    ] = "target",
    beta: Annotated[str, typer.Option(help="Weight of log-probability in the ensemble, or choose.")] = "choose",
    normaliser: Annotated[str | None, typer.Option(help="Of the ensemble: minmax (default) or ecdf.")] = None,
    extremes: Annotated[str | None, typer.Option(help="Of minmax: robust (1% and 99%, default) or exact.")] = None,
    debias: Annotated[str | None, typer.Option(help="position-ecdf: groundings as ranks at their place.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the calibration goes.")] = Path("guard.json"),
    run_dir: Annotated[
        Path, typer.Option(help="Where finished problems are kept; an interrupted calibration goes on from there.")
    ] = Path("runs/specguard"),
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
    *,
    pair: PairOptions,
    questions: ProblemOptions,
) -> None:
    """Fit a pair's normaliser and choose its threshold, so that accepted steps are wrong no more often than --alpha.

    Example: `telltale specguard calibrate --target big --draft small --data test.jsonl --alpha 0.05 -o guard.json`
    """
    set_threads(threads)
    from telltale.decode.calibration.calibrate import calibrate as choose
    from telltale.decode.calibration.trials import SamplingSettings, TrialStore
    from telltale.runs.files import check_writable

    check_writable(out)  # before the work, not an hour later
    weight = _beta(beta, score)
    fitted = _fitted(score, method, confidence=confidence, normaliser=normaliser, extremes=extremes, debias=debias)
    with stoppable() as stages:
        decoder = pair.open(
            target, score=score, signal_model=signal_model, beta=weight if isinstance(weight, float) else None
        )
        opened = open_task(decoder, questions, seed=seed)
        found = choose(
            opened.decoder,
            opened.problems,
            opened.labeler,
            alpha=alpha,
            method=method,
            risk=risk,
            loss=loss,
            unknown=unknown,
            beta=weight,
            **fitted,
            sampling=SamplingSettings(opened.max_new_tokens, questions.temperature, questions.mass),
            seed=seed,
            batch=questions.batch,
            encode=opened.encode,
            store=TrialStore(run_dir / "trials"),
            on_problems=stages.tell,
        )
    found.save(out)
    if json:
        emit(found.to_dict() | {"written": str(out)})
    else:
        _print_calibration(found, out)


@_PAIR
@_PROBLEMS
def report(
    target: Target,
    guard: Annotated[Path | None, typer.Option(help="A calibration of this pair: adds the calibrated policy.")] = None,
    scores: Annotated[str, typer.Option(help="Scores on the frontier, comma-separated. Default: three.")] = "",
    acceptances: Annotated[
        str, typer.Option(help="Shares of steps that each score's thresholds accept, comma-separated.")
    ] = "0.9,0.75,0.6,0.4",
    seeds: Annotated[int, typer.Option(help="Sampling seeds for each policy.")] = 1,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for report.json, report.html and finished problems.")
    ] = Path("runs/specguard-report"),
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
    *,
    pair: PairOptions,
    questions: ProblemOptions,
) -> None:
    """Does each signal predict correct steps in this pair, at fixed step length, and does accepting by it pay?

    Example: `telltale specguard report --target big --draft small --data test.jsonl --problems 200 -o report`
    """
    set_threads(threads)
    from telltale.config import check_integer
    from telltale.decode.calibration.calibration import Calibration
    from telltale.decode.calibration.calibration_report import DEFAULT_SCORES, Protocol, measure
    from telltale.decode.calibration.page import write_page
    from telltale.decode.calibration.trials import SamplingSettings, TrialStore
    from telltale.runs.files import write_json
    from telltale.runs.html_report import plotly_module

    plotly_module()  # before the work, not an hour later
    check_integer("seeds", seeds, low=1)
    names = tuple(part.strip() for part in scores.split(",") if part.strip()) or DEFAULT_SCORES
    shares = _shares(acceptances)
    calibration = None if guard is None else Calibration.load(guard)
    if calibration is not None and pair.exit_layer is None and pair.draft is None:
        pair = replace(pair, exit_layer=calibration.config.exit_layer)
    with stoppable() as stages:
        decoder = pair.open(target)
        if calibration is not None:
            calibration.check(decoder)
        opened = open_task(decoder, questions, seed=seed)
        protocol = Protocol(
            scores=names,
            acceptances=shares,
            seeds=tuple(range(seed, seed + seeds)),
            batch=questions.batch,
            sampling=SamplingSettings(opened.max_new_tokens, questions.temperature, questions.mass),
        )
        document = measure(
            opened.decoder,
            opened.problems,
            opened.labeler,
            protocol,
            calibration=calibration,
            encode=opened.encode,
            store=TrialStore(out / "trials"),
            on_problems=stages.tell,
        )
    document["models"] = {"target": target.name, "draft": None if pair.draft is None else pair.draft.name}
    write_json(out / "report.json", document)
    write_page(document, out / "report.html")
    if json:
        emit(document | {"written": str(out)})
        return
    for sentence in document["findings"]:
        typer.echo(f"- {sentence}", err=sentence.startswith("Alarm"))
    typer.echo(f"written: {out / 'report.html'}, {out / 'report.json'}")


def _fitted(score: str | None, method: str, **given: Any) -> dict[str, Any]:
    """What of ``given`` is not None, with the defaults.

    Raises :class:`~telltale.errors.ConfigError` for an option that would do nothing.
    """
    scaled = score in (None, "ensemble")
    for name, acts, why in (
        ("confidence", method == "ltt", f"--method {method}"),
        ("normaliser", scaled, f"--score {score}"),
        ("extremes", scaled, f"--score {score}"),
        ("extremes", given["normaliser"] in (None, "minmax"), f"--normaliser {given['normaliser']}"),
        ("debias", score in (None, "ensemble", "grounding"), f"--score {score}"),
    ):
        if given[name] is not None and not acts:
            raise ConfigError(f"--{name} does nothing with {why}; leave it out.")
    defaults = {"confidence": 0.9, "normaliser": "minmax", "extremes": "robust"}
    return {name: defaults.get(name) if value is None else value for name, value in given.items()}


def _beta(beta: str, score: str | None) -> float | str | None:
    if beta == "choose":
        return "choose" if score in (None, "ensemble") else None
    try:
        return float(beta)
    except ValueError:
        raise ConfigError(f"beta={beta!r} is not understood; expected a number in 0..1, or choose.") from None


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"acceptances={text!r} is not understood; expected numbers separated by commas.") from None
    if not found:
        raise ConfigError("acceptances is empty; expected at least one share.")
    return found


def _print_calibration(found: Any, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.method}, {found.risk}: alpha {found.alpha} on {found.n} problems")
    for name in ("threshold", "accepted", "risk", "bound" if found.method == "crc" else "p-value", ""):
        table.add_column(name, justify="right")
    for one in found.tried:
        shown = one.bound if one.p_value is None else one.p_value
        table.add_row(
            f"{one.threshold:.4g}",
            f"{one.acceptance:.1%}",
            f"{one.risk:.3f}",
            f"{shown:.3f}",
            "passed" if one.passed else "failed",
        )
    console = Console()
    console.print(table)
    if not found.feasible:
        console.print("No threshold: the target writes every step.")
    elif found.realised is not None:
        risk = found.realised
        console.print(
            f"threshold {found.threshold:.4g}, beta {found.config.beta}. On {risk.problems} other problems, accepted and wrong: "
            f"{risk.rate:.3f} ({risk.low:.3f} to {risk.high:.3f}).",
            highlight=False,
        )
    typer.echo(f"written: {out}")


ACCEPTANCE_RATES = (0.5, 0.7, 0.8, 0.9, 1.0)


@_PAIR
def costs(
    target: Target,
    guard: Annotated[Path | None, typer.Option(help="A calibration of this pair: its settings are timed.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens before the step.")] = 256,
    step_tokens: Annotated[int, typer.Option(help="Tokens of the step.")] = 24,
    threads: Threads = None,
    json: Json = False,
    *,
    pair: PairOptions,
) -> None:
    """Time a step's parts with this pair on this machine: from which share of accepted steps does verification pay?

    Example: `telltale specguard costs --target big --draft small --candidates 8 --set signal_model=target`
    """
    set_threads(threads)
    from telltale.decode.calibration.calibration import Calibration
    from telltale.decode.costs_report import measure_costs

    calibration = None if guard is None else Calibration.load(guard)
    if calibration is not None:
        if pair.overrides or pair.candidates is not None or pair.fallback is not None:
            raise ConfigError("--guard has settings of its own; leave out --candidates, --fallback and --set.")
        if pair.draft is None and pair.exit_layer is None:
            pair = replace(pair, exit_layer=calibration.config.exit_layer)
    decoder = pair.open(target)
    if calibration is not None:
        decoder = calibration.guard(decoder.target, decoder.draft, decoder.tokenizer)
    found = measure_costs(decoder, prompt_tokens=prompt_tokens, step_tokens=step_tokens)
    speedups = {rate: found.speedup(rate) for rate in ACCEPTANCE_RATES}
    if json:
        parts = asdict(found) | {"break_even": found.break_even}
        emit(parts | {"speedups": {f"{rate:g}": speedup for rate, speedup in speedups.items()}})
        return
    unit = f"{1e3 * found.target_seconds:.1f} ms"
    typer.echo(f"a step of {step_tokens} tokens after {prompt_tokens}; 1 is the target writing it alone, {unit}")
    for words, value in (
        ("draft, one candidate (rho)", found.draft),
        ("all candidates over one (sigma_D)", found.draft_inflation),
        ("the target's scoring pass (v)", found.verify),
        ("the target's redoing over one (sigma_T)", found.fallback_inflation),
    ):
        typer.echo(f"  {words:<42}{value:.3f}")
    listed = ", ".join(f"{speedup:.2f}x at {rate:.0%}" for rate, speedup in speedups.items())
    typer.echo(f"speed-up by share of accepted steps: {listed}")
    pays = found.break_even
    typer.echo(f"pays from {max(0.0, pays):.0%} accepted on" if pays < 1 else "it does not pay at any share")
