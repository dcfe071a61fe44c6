"""Figures of world models."""

from __future__ import annotations

from typing import Any

from drawing import RESULTS, Figure, bars, figure, lines, number, results
from matplotlib.axes import Axes


def _cell(arm: dict[str, Any], name: str, digits: int = 2) -> str:
    value = arm[name]
    return f"{value['iqm']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


@figure("world-social")
def social() -> Figure:
    """Leduc poker: values by observed hands."""
    found = results("world_social")["summary"]
    rows = [[arm, _cell(row, "value"), _cell(row, "value_after_shift")] for arm, row in found.items()]
    headers = ["policy", "chips per hand", "after the opponent changed"]
    return Figure("Leduc poker: interquartile mean over seeds, 95% interval", ("world_social",), headers, rows)


@figure("world-scientific")
def scientific() -> Figure:
    """Equations against a network outside the data."""
    found = results("world_scientific")["summary"]
    rows = [
        [arm, _cell(row, "one_step_nmse", 5), _cell(row, "error_outside", 3), _cell(row, "invariant_drift", 3)]
        for arm, row in found.items()
    ]
    headers = ["model", "one-step error", "error over 299 steps from x = 9", "drift of the invariant"]
    return Figure("Lotka-Volterra with harvest, outside the data", ("world_scientific",), headers, rows)


@figure("world-speed")
def speed() -> Figure:
    """Costs."""
    found = results("world_speed")
    many = found["planning"]["16 environments"]["ms_per_decision"]
    rows = [
        ["a decision, 16 environments, telltale", f"{number(many['telltale'])} ms"],
        ["a decision, 16 environments, stable-worldmodel", f"{number(many['stable-worldmodel'])} ms"],
        ["ratio (wanted: at most 0.7)", number(many["ratio"])],
        ["a decision alone over one of sixteen", f"{number(found['planning']['one_over_sixteen'], 1)}x"],
        ["laws, of a rollout of an ensemble", f"{100 * found['laws']['overhead']:.0f}%"],
        ["SQLite order system", f"{found['engines']['sqlite_steps_per_second']:,.0f} steps/s"],
        ["induced program", f"{found['engines']['program_steps_per_second']:,.0f} steps/s"],
    ]
    if "the network alone" in many:
        rows.insert(2, ["the network alone, as many steps of as many rows", f"{number(many['the network alone'])} ms"])
    return Figure("What planning, laws and engines cost, CPU time", ("world_speed",), ["", ""], rows)


@figure("world-digital")
def digital() -> Figure:
    """One-step accuracy against what can be planned."""
    found = results("world_digital")["summary"]
    rows = [
        [arm, *(_cell(row, name) for name in ("one_step_exact", "twelve_step_exact", "violations", "asr"))]
        for arm, row in found.items()
    ]

    def plot(axes: Axes) -> None:
        series = {
            "one step exact": [row["one_step_exact"]["iqm"] for row in found.values()],
            "success of its plans": [row["asr"]["iqm"] for row in found.values()],
        }
        bars(axes, list(found), series, unit="share")

    headers = ["model", "one step exact", "twelve steps exact", "violations", "ASR"]
    return Figure("SQLite order system: prediction against planning", ("world_digital",), headers, rows, plot)


@figure("world-pendulum")
def pendulum() -> Figure:
    """Pendulum from 1,200 steps: the ensemble, its deaf copy, and the arms that tell causes apart."""
    document = results("world_pendulum")
    found = document["summary"]
    rows = [
        [
            arm,
            str(row["seeds"]),
            ", ".join(f"{value:.1f}" for value in row["asr"]),
            _ends(row["return_iqm"], row["return_interval"], 0),
            _range(row["one_step_r_squared"], 4),
            _range(row["divergence"], 3),
            _range(row["direction"], 2),
        ]
        for arm, row in found.items()
    ]

    def plot(axes: Axes) -> None:
        series = {
            "one-step R2 of the next state": [sum(row["one_step_r_squared"]) / row["seeds"] for row in found.values()],
            "ASR": [sum(row["asr"]) / row["seeds"] for row in found.values()],
        }
        bars(axes, list(found), series)

    headers = ["model", "seeds", "ASR by seed", "return", "one-step R2", "divergence", "direction"]
    caption = f"Pendulum-v1 after {document['steps']:,} environment steps"
    return Figure(caption, ("world_pendulum",), headers, rows, plot)


def _range(values: list[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _ends(middle: float, ends: list[float] | None, digits: int) -> str:
    text = f"{middle:.{digits}f}"
    return text if ends is None else f"{text} ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"


@figure("world-control")
def control() -> Figure:
    """CartPole and Reacher: learned against oracle dynamics."""
    document = results("world_control")
    rows = []
    for name, row in document["summary"].items():
        world, arm = name.rsplit(" ", 1)
        steps = document["steps"][world] if arm != "oracle" else 0
        cells = [f"{row[key][0]:.{d}f} ({row[key][1]:.{d}f} to {row[key][2]:.{d}f})" for key, d in _CONTROL]
        length = sum(row["length"]) / len(row["length"])
        rows.append([world, arm, f"{steps:,}", str(len(row["asr"])), *cells, number(length, 0)])
    headers = ["world", "dynamics", "steps learned from", "seeds", "ASR", "planner's return", "mean length"]
    return Figure("CartPole and Reacher beside oracle dynamics", ("world_control",), headers, rows)


_CONTROL = (("asr_iqm", 2), ("return_iqm", 1))


@figure("world-certificate")
def certificate() -> Figure:
    """What certificates of Pendulum say, and what they cost."""
    rows = [
        [f"{run['arm']}, seed {run['seed']}", *_certified(run), f"{run['cpu_seconds']:.0f} s"]
        for run in results("world_certificate")["runs"]
    ]
    return Figure(
        "Level 2 on Pendulum-v1, 30 paired starts, horizon 20", ("world_certificate",), [*_CONDITIONS, "CPU"], rows
    )


@figure("world-torchrl")
def torchrl() -> Figure:
    """A world model of TorchRL under the certificate."""
    document = results("world_torchrl")
    rows = [[run["arm"], *_certified(run), number(run["return_mean"], 0)] for run in document["runs"]]
    caption = f"TorchRL {document['torchrl']}: a WorldModel from {document['steps']:,} random steps of Pendulum-v1"
    return Figure(caption, ("world_torchrl",), [*_CONDITIONS, "return"], rows)


_CONDITIONS = [
    "model",
    "likelihood",
    "calibration",
    "robustness",
    "coherence",
    "sensitivity",
    "consistency",
    "level",
    "ASR",
]


def _certified(run: dict[str, Any]) -> list[str]:
    statuses = [run["conditions"][name]["status"] for name in _CONDITIONS[1:7]]
    return [*statuses, str(run["level"]), f"{run['asr']:.2f} (oracle {run['oracle_asr']:.2f})"]


@figure("world-model-free")
def model_free() -> Figure:
    """Steps and CPU to a return, beside SAC, PPO and DQN."""
    document = results("world_model_free")
    rows = []
    for name, row in document["summary"].items():
        steps = [f"{value:,}" if value is not None else "not reached" for value in row["to_threshold"]]
        cpu = [f"{value:.0f}" if value is not None else "-" for value in row["cpu_to_threshold"]]
        rows.append([name.replace("/", ", "), ", ".join(steps), ", ".join(cpu)])

    def plot(axes: Axes) -> None:
        _curves(axes, document, "CartPole-v1", 450.0)

    headers = ["task and algorithm", "steps to the threshold, by seed", "CPU-seconds to it"]
    caption = "Environment steps to a mean return of -150 (Pendulum) and 450 (CartPole)"
    return Figure(caption, ("world_model_free",), headers, rows, plot)


@figure("world-model-free-pendulum")
def model_free_pendulum() -> Figure:
    """Learning curves on Pendulum."""
    document = results("world_model_free")
    runs = [run for run in document["runs"] if run["environment"] == "Pendulum-v1"]
    rows = [
        [run["algorithm"], str(run["seed"]), f"{run['curve'][-1][1]:.0f}", f"{run['cpu_seconds']:.0f}"] for run in runs
    ]

    def plot(axes: Axes) -> None:
        _curves(axes, document, "Pendulum-v1", -150.0)

    headers = ["algorithm", "seed", "return at the end", "CPU-seconds of the whole run"]
    return Figure("Pendulum: mean return by environment steps", ("world_model_free",), headers, rows, plot)


def _curves(axes: Axes, document: dict[str, Any], environment: str, threshold: float) -> None:
    """Mean learning curve of each algorithm."""
    series = {}
    for algorithm in dict.fromkeys(run["algorithm"] for run in document["runs"] if run["environment"] == environment):
        curves = [
            run["curve"]
            for run in document["runs"]
            if (run["environment"], run["algorithm"]) == (environment, algorithm)
        ]
        points = min(map(len, curves))
        middle = [sum(curve[place][1] for curve in curves) / len(curves) for place in range(points)]
        series[algorithm] = ([point[0] for point in curves[0]][:points], middle)
    lines(axes, series, x="environment steps", y="mean return", reference=threshold)


@figure("world-evolve-poison")
def evolve_poison() -> Figure:
    """What a gate lets through of poisoned candidates, beside a split by hash."""
    found = [run for run in results("world_evolve_gates")["runs"] if "share" in run]
    rows = [
        [
            f"{run['regime']}, {'changed' if run['changed'] else 'unchanged'}", f"{100 * run['share']:.0f}%",
            str(run["truly_better"]), f"{run['gate_passes']} of {run['candidates']}", f"{run['gate_harmful']}",
            f"{run['split_by_hash_passes']} of {run['candidates']}", f"{run['split_by_hash_harmful']}",
        ]
        for run in found
    ]  # fmt: skip
    headers = [
        "world",
        "actions false",
        "truly better by 5%",
        "the gate passes",
        "no better by 5%",
        "a split by hash passes",
        "no better by 5%",
    ]
    return Figure("Candidates made of poisoned evidence", ("world_evolve_gates",), headers, rows)


@figure("world-evolve-type-one")
def evolve_type_one() -> Figure:
    """Familywise error of the gain."""
    found = next(run for run in results("world_evolve_gates")["runs"] if run["part"] == "type I")
    arms = {
        "as they were fitted": "as_fitted",
        "scaled to be equal in truth": "equal_in_truth",
        "scaled to the edge of what counts as no gain": "edge_of_no_gain",
    }
    rows = [
        [name, f"{100 * found[key]['familywise_error']:.1f}%", f"{100 * found[key]['true_promotions']:.0f}%"]
        for name, key in arms.items()
    ]
    headers = ["candidates", "registries with a promotion that gains nothing", "with one that truly gains"]
    caption = f"Networks refitted with another seed: {found['simulations']:,} registries of 20 candidates each"
    return Figure(caption, ("world_evolve_gates",), headers, rows)


@figure("world-evolve-bound")
def evolve_bound() -> Figure:
    """How often the bound of the gain errs, by the shape of what episodes say."""
    found = next(run for run in results("world_evolve_gates")["runs"] if run["part"] == "bound")
    rows = [[name, f"{share:.1%}"] for name, share in found["rows"].items()]
    caption = f"The bound of the gain on {found['episodes']} episodes, {found['asked']:.1%} asked for"
    return Figure(caption, ("world_evolve_gates",), ["what episodes say", "errs"], rows)


@figure("world-evolve-quorum")
def evolve_quorum() -> Figure:
    """One of two sources of the gate's evidence is poisoned."""
    found = [run for run in results("world_evolve_gates")["runs"] if run["part"].endswith("quorum")]
    rows = [
        [run["regime"], str(run["candidates"]), *(str(run[f"{side} candidate {what}"]) for side, what in _QUORUM)]
        for run in found
    ]
    headers = ["world", "candidates each", "poisoned: gains on the poisoned source", "poisoned: passes", "good: passes"]
    return Figure("Two sources of gate evidence, one of them poisoned", ("world_evolve_gates",), headers, rows)


_QUORUM = (
    ("poisoned", "gains on the poisoned source"),
    ("poisoned", "passes, one of two poisoned"),
    ("good", "passes, one of two poisoned"),
)


@figure("world-evolve-flip")
def evolve_flip() -> Figure:
    """A flipped actuator, and drag that no hypothesis holds."""
    document = results("world_evolve_flip")
    found = document["summary"]
    rows: list[list[str]] = []
    for order, words in (("random", "blocks of a round in random order"), ("time", "in the order of time")):
        delays = [d for d in found["delays"][order] if d is not None]
        quiet, watches = found["quiet"][order], found["watches"][order]
        noticed = f"after {min(delays)} to {max(delays)} steps"
        rows += [
            [f"in-law watches of 1,200 steps without a false alarm, {words}", f"{quiet} of {watches}"],
            [f"flips noticed after a quiet watch, {words}", f"{found['detected'][order]} of {quiet}, {noticed}"],
        ]
    for row in document["alike"]:
        name = (
            f"simulated false alarms of such a watch, episodes differ {row['spread']:g} times as much as their blocks"
        )
        rows.append([name, f"{row['random']:.1%} in random order, {row['time']:.1%} in the order of time"])
    rows += [
        ["ASR after the flip: stale model", _each(found["stale_asr"])],
        ["ASR after the flip: parameters from 10 transitions", _each(found["structural_asr"])],
        ["ASR after the flip: network from 1,000 transitions", _each(found["network_asr"])],
        ["ASR after the flip: oracle", _each(found["oracle_asr"])],
        *([f"ASR with drag: {arm}", _each([run[arm] for run in found["drag_asr"]])] for arm in found["drag_asr"][0]),
    ]
    return Figure("Pendulum", ("world_evolve_flip",), ["", "by seed"], rows)


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


_LIVES = [
    name for name in ("digital", "physical", "drag", "scientific") if (RESULTS / f"world_evolve_{name}.json").exists()
]


@figure("world-evolve-lives")
def evolve_lives() -> Figure:
    """Lives from a change to its end: what the model was worth, and whether the old one came back."""
    rows = []
    for name in _LIVES:
        for run in results(f"world_evolve_{name}")["runs"]:
            asr = run.get("asr", {})
            rates = [number(asr.get(side)) for side in ("before", "revised", "oracle")]
            same = run["rollback_bytes_equal"] and run["rollback_predictions_equal"]
            rejected = f"{run['offered_candidates_rejected']} of {run['offered_candidates']}"
            rows.append([
                name, str(run["seed"]), str(run["false_alarms"]), rejected,
                str(run["promoted"]), *rates, str(run["rollbacks"]), "yes" if same else "no",
            ])  # fmt: skip
    headers = [
        "life",
        "seed",
        "false alarms",
        "poisoned rejected",
        "promotions",
        "ASR before",
        "revised",
        "oracle",
        "rollbacks",
        "founding version bit for bit",
    ]
    sources = tuple(f"world_evolve_{name}" for name in _LIVES)
    return Figure("Unattended lives; ASR in the changed world", sources, headers, rows)


_SIX = ("diagnosis", "asset", "validation", "expansion", "autonomy", "revision")


@figure("world-evolve-certificates")
def evolve_certificates() -> Figure:
    """The six conditions of level 3, life by life."""
    rows = []
    for name in _LIVES:
        for run in results(f"world_evolve_{name}")["runs"]:
            found = run["certificate"]
            lower = {c["status"] for c in found["conditions"].values() if c["level"] < 3}
            below = "pass" if lower == {"pass"} else ", ".join(sorted(lower - {"pass"}))
            statuses = [found["conditions"][six]["status"] for six in _SIX]
            rows.append([name, str(run["seed"]), below, *statuses, str(found["level"])])
    sources = tuple(f"world_evolve_{name}" for name in _LIVES)
    return Figure("Certificates of lives", sources, ["life", "seed", "levels 1 and 2", *_SIX, "level"], rows)


_ARMS = ("probes", "random", "restarted", "corners")


@figure("world-evolve-probes")
def evolve_probes() -> Figure:
    """Probes against random steps, by the error where decisions are made and by that on random steps."""
    found = results("world_evolve_probes")["summary"]
    rows = []
    for name, row in found.items():
        cells = [name, "{} and {}".format(*row["evidence_and_steps"])]
        for measure in ("decisions", "random steps"):
            arms, bound = row[measure], row[measure]["over random"]
            each = " / ".join(f"{arms[arm]:.2g}" if arm in arms else "–" for arm in _ARMS)
            cells += [each, f"{bound['gain']:+.2g} (at least {bound['low']:+.2g})"]
        against = (row["decisions"].get(f"over {arm}") for arm in ("random", "corners"))
        rows.append([*cells, *("–" if b is None else f"{b['wins']} to {b['losses']}" for b in against)])
    headers = [
        "world",
        "evidence and budget, steps",
        "decisions: error of probes / random / random, restarted / corners, held",
        "gain over random",
        "random steps: error",
        "gain",
        "decisions: trials won and lost",
        "against corners",
    ]
    trials = max(row["trials"] for row in found.values())
    caption = (
        f"Probes against as many random steps: up to {trials} trials, ten a seed; lower 95% bounds clustered by seed"
    )
    return Figure(caption, ("world_evolve_probes",), headers, rows)


@figure("world-evolve-success")
def evolve_success() -> Figure:
    """The success check with paired starts and as if they were not."""
    found = next(run for run in results("world_evolve_gates")["runs"] if run["part"] == "success")
    rows = [
        [
            f"{row['incumbent']:.2f}", f"{row['difference']:+.1f}", f"{100 * row['discordant']:.0f}%",
            f"{100 * row['paired']:.1f}%", f"{100 * row['unpaired']:.1f}%",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    headers = [
        "incumbent's success",
        "candidate's, less that",
        "starts that only one masters",
        "passes, paired",
        "unpaired",
    ]
    return Figure(f"The success check on {found['starts']} starts", ("world_evolve_gates",), headers, rows)


@figure("world-evolve-diagnosis")
def evolve_diagnosis() -> Figure:
    """What is said of injected faults."""
    found = results("world_evolve_diagnosis")["summary"]
    rows = [
        [fault, str(row["trials"]), str(row["right"]), str(row["cannot_tell"]), _wrong(fault, row)]
        for fault, row in found["by_fault"].items()
        if row["trials"]
    ]
    either = f"{100 * found['right_or_cannot_tell']:.1f}%"
    rows.append(["right or cannot tell (wanted: at least 90%)", str(found["trials"]), either, "", ""])
    confident = f"{100 * found['confident_errors']:.1f}%"
    rows.append(["another component named (wanted: at most 5%)", str(found["trials"]), confident, "", ""])
    headers = ["fault", "trials", "right", "cannot tell", "another component"]
    return Figure("Injected faults of CartPole and Pendulum", ("world_evolve_diagnosis",), headers, rows)


def _wrong(fault: str, row: dict[str, Any]) -> str:
    said = {name: count for name, count in row["said"].items() if name not in (fault, "cannot tell")}
    return ", ".join(f"{name} ({count})" for name, count in said.items()) or "0"


@figure("world-evolve-kill")
def evolve_kill() -> Figure:
    """Lives that were killed and taken up again."""
    found = results("world_evolve_kill")
    lives = found["lives"]
    rows = [
        ["kills (SIGKILL)", str(found["kills"])],
        ["in rounds of", ", ".join(f"{phase} ({count})" for phase, count in found["phases"].items())],
        ["lives", str(len(lives))],
        ["equal to the undisturbed one in every file", str(found["lives_equal_to_the_undisturbed"])],
        ["rounds lost or doubled", str(sum(not life["contiguous"] for life in lives))],
        ["transitions doubled", str(sum(life["evidence_doubled"] for life in lives))],
        ["a life undisturbed", f"{found['life_seconds']['wall']:.0f} s, {found['rounds']} rounds"],
    ]
    return Figure("A digital life with a promotion and a rollback", ("world_evolve_kill",), ["", ""], rows)
