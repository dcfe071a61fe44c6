"""Figures of OGER."""

from __future__ import annotations

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
        cells += [_quartiles(ratios[kind], 2) for kind in ("oger", "oger_bonus")]
        rows.append([f"{policy} of at most {length} tokens", *cells, str(found["rounds"])])
    headers = ["policy", "GRPO, CPU s a step", "OGER, CPU s a step", "ratio of rounds", "ratio without traces", "rounds"]
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
