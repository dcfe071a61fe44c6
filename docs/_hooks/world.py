"""Figures of world models."""

from __future__ import annotations

from typing import Any

from drawing import RESULTS, Figure, figure, number, results


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
    return Figure("What planning, laws and engines cost, CPU time", ("world_speed",), ["", ""], rows)


if (RESULTS / "world_digital.json").exists():

    @figure("world-digital")
    def digital() -> Figure:
        """One-step accuracy against what can be planned."""
        found = results("world_digital")["summary"]
        rows = [
            [arm, *(_cell(row, name) for name in ("one_step_exact", "twelve_step_exact", "violations", "asr"))]
            for arm, row in found.items()
        ]
        headers = ["model", "one step exact", "twelve steps exact", "violations", "ASR"]
        return Figure("SQLite order system: prediction against planning", ("world_digital",), headers, rows)
