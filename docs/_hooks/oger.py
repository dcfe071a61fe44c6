"""Figures of OGER."""

from __future__ import annotations

import math
from typing import Any

from drawing import COLOURS, Figure, figure, results
from matplotlib.axes import Axes


def spread(values: list[float]) -> str:
    """Mean, and every seed's value behind it."""
    mean = sum(values) / len(values)
    return f"{mean:.2f}" + (f" ({', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else "")


@figure("oger-arms")
def oger_arms() -> Figure:
    """Learning curves and the last step of every arm."""
    found = results("oger_arms")
    arms = found["arms"]
    steps = found["setting"]["evaluate_at"]
    rows = []
    for arm in arms:
        cells = [spread(arm[f"hard@{step}_by_seed"]) for step in steps]
        cells += [spread(arm[f"{name}_by_seed"]) for name in ("easy", "hard_pass_at_n", "routes", "entropy")]
        share = arm["teacher_adv_neg_frac"]
        rows.append([arm["arm"], str(len(arm["seeds"])), *cells, "" if share is None else f"{share:.0%}"])
    headers = ["arm", "seeds", *(f"hard @ {step}" for step in steps)]
    headers += ["easy", "hard, any of 16", "routes", "entropy", "teacher pushed away"]

    def plot(axes: Axes) -> None:
        for index, arm in enumerate(arms):
            values = [arm[f"hard@{step}"] for step in steps]
            style = "-" if index < len(COLOURS) else "--"
            axes.plot(
                [0, *steps], [0.0, *values], style, color=COLOURS[index % len(COLOURS)], label=arm["arm"], marker="o"
            )
        axes.set_xlabel("policy update")
        axes.set_ylabel("hard answers right")
        axes.legend(ncols=3, fontsize=7)

    caption = "Held-out problems: share of sampled answers that are right, means over seeds (each seed in the table)"
    note = "Teacher pushed away: share of groups in which the teacher's advantage was below 0 before any clamp."
    return Figure(caption, ("oger_arms",), headers, rows, plot, (7.2, 4.0), note)


@figure("oger-cost")
def oger_cost() -> Figure:
    """Step times and the equations."""
    rows = []
    for name, policy in (("routes", "0.25M parameters, 128 rollouts"), ("smollm2", "SmolLM2-135M, 4 rollouts")):
        found: dict[str, Any] = results(f"oger_cost_{name}")
        seconds, ratios = found["cpu_seconds_quartiles"], found["ratio_of_round_sums_quartiles"]
        length = found["fields"]["max_completion_length"]
        cells = [_quartiles(seconds[kind], 3) for kind in ("grpo", "oger")]
        cells += [_quartiles(ratios[kind], 2) if kind in ratios else "-" for kind in ("oger", "oger_bonus")]
        rows.append([f"{policy} of at most {length} tokens", *cells, str(found["rounds"])])
    headers = [
        "policy",
        "GRPO, CPU s a step",
        "OGER, CPU s a step",
        "ratio of rounds",
        "ratio without traces",
        "rounds",
    ]
    caption = "A step of OGERTrainer beside one of TRL's: medians (quartiles)"
    return Figure(caption, ("oger_cost_routes", "oger_cost_smollm2"), headers, rows)


def _quartiles(values: list[float], digits: int) -> str:
    low, middle, high = values
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@figure("oger-rewards")
def oger_rewards() -> Figure:
    """The equations alone."""
    found = results("oger_rewards")
    low, middle, high = found["cpu_ms_quartiles"]
    rows = [["1,024 x 8 x 3, 384 dimensions", f"{low:.1f}", f"{middle:.1f}", f"{high:.1f}"]]
    headers = ["prompts x rollouts x teachers", "CPU ms, first quartile", "median", "third quartile"]
    return Figure("Divergences and rewards from embeddings, one thread", ("oger_rewards",), headers, rows)


def _interval(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['mean']:+.2f}" + ("" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]")


@figure("oger-further")
def oger_further() -> Figure:
    """Arms beside hybrid groups, by pairs of runs of one seed."""
    found = results("oger_further")
    arms, against = found["arms"], found["against_hybrid"]
    rows = []
    for arm in arms:
        cells = [spread(arm[f"{name}_by_seed"]) for name in ("routes", "hard")]
        differences = against.get(arm["arm"])
        names = ("routes", "hard", "easy", "hard_pass_at_n")
        cells += ["" if differences is None else _interval(differences[name]) for name in names]
        rows.append([arm["arm"], str(len(arm["seeds"])), *cells])
    headers = ["arm", "seeds", "routes", "hard"]
    headers += [f"{name}, less hybrid's" for name in ("routes", "hard", "easy", "hard, any of 16")]

    def plot(axes: Axes) -> None:
        for index, arm in enumerate(arms):
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(arm["routes_by_seed"], arm["hard_by_seed"], "o", color=colour, label=arm["arm"], alpha=0.7)
        axes.set_xlabel("different correct routes per hard problem in 16 samples")
        axes.set_ylabel("hard answers right")
        axes.legend(ncols=2, fontsize=7)

    caption = "After 80 updates, one point a seed; in the table differences to hybrid with 95% t intervals over seeds"
    return Figure(caption, ("oger_further",), headers, rows, plot, (7.2, 3.6))


@figure("oger-hacking")
def oger_hacking() -> Figure:
    """What a verifier of the last number alone pays for."""
    found = results("oger_hacking")
    arms = found["arms"]
    rows = [
        [
            arm["arm"],
            str(len(arm["seeds"])),
            *(spread(arm[f"{name}_by_seed"]) for name in ("unfaithful", "hard", "easy")),
        ]
        for arm in arms
    ]
    headers = ["arm", "seeds", "right answers with a wrong step", "hard, every step right", "easy, every step right"]

    def plot(axes: Axes) -> None:
        for index, arm in enumerate(arms):
            axes.plot([index] * len(arm["seeds"]), arm["unfaithful_by_seed"], "o", color=COLOURS[0])
        axes.set_xticks(range(len(arms)), [arm["arm"] for arm in arms])
        axes.set_ylabel("wrong step, of right answers")
        axes.set_ylim(0, 1)

    return Figure(
        "A verifier that reads the last number only, one point a seed",
        ("oger_hacking",),
        headers,
        rows,
        plot,
        (7.2, 2.6),
    )


@figure("oger-gsm8k")
def oger_gsm8k() -> Figure:
    """A real checkpoint through the command line."""
    found = results("oger_gsm8k")
    history = found["history"]

    def mean(name: str) -> float:
        values = [row[name] for row in history if row.get(name) is not None]
        return sum(values) / len(values)

    times = sorted(row["step_time"] for row in history)
    size = (
        f"{found['steps']} steps of {found['rollouts_a_step']} rollouts of at most {found['longest_completion']} tokens"
    )
    rows = [
        ["run", size],
        [
            "seconds a step, median (least, most)",
            f"{found['seconds_a_step_median']:.0f} ({times[0]:.0f}, {times[-1]:.0f})",
        ],
        ["CPU seconds of the command, by step", f"{found['cpu_seconds_of_this_call'] / found['steps']:.0f}"],
        ["most memory", f"{found['peak_resident_bytes'] / 2**30:.1f} GiB"],
        ["rollouts solved", f"{mean('oger/online_solved'):.1%}"],
        ["rows that are teachers' traces", f"{mean('oger/teacher_share'):.1%}"],
        [
            "divergence from teachers, spread in a group",
            f"{mean('oger/divergence'):.2f}, {mean('oger/divergence_std'):.2f}",
        ],
    ]
    return Figure("SmolLM2-135M-Instruct on GSM8K, one CPU thread", ("oger_gsm8k",), ["figure", "value"], rows)
