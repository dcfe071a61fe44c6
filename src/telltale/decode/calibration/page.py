"""The report as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from telltale.runs.html_report import Report, plotly_module

COLOURS = ("#0b6e99", "#b3541e", "#2a8f5c", "#7a4fa3", "#d69a00", "#8a1538", "#4a6572", "#00838f")
GREY = "#9fb2c3"


def write_page(document: dict[str, Any], path: str | Path, *, title: str = "SpecGuard report") -> Path:
    """Draw what :func:`telltale.decode.calibration.calibration_report.measure` found.

    Raises :class:`~telltale.errors.MissingExtraError` without Plotly, :class:`~telltale.errors.CheckpointError` if the page
    cannot be written.
    """
    frontier = document["frontier"]
    page = Report(title, subtitle=_subtitle(document))
    page.cards(
        [
            (_percent(frontier["target"]["accuracy"]["value"]), "right answers, target alone"),
            (_percent(frontier["draft"]["accuracy"]["value"]), "draft alone"),
            (_percent(frontier["oracle"]["accuracy"]["value"]), f"accepting by the {frontier['oracle']['policy']}"),
            *_coverage_card(document["checker"]),
            (_percent(document["recorded"]["right"]), f"of {document['recorded']['steps']:,} drafted steps are right"),
        ]
    )
    page.heading("What was found")
    for sentence in document["findings"]:
        page.text(sentence)
    page.heading("Do the signals rank right steps above wrong ones?")
    if any(one["raw"]["value"] is not None for one in document["signals"]):
        page.figure(_auroc_figure(document["signals"]), caption=_AUROC_CAPTION)
        _signal_table(page, document["signals"])
    else:
        page.text(f"All recorded steps are {_only_label(document)}, so no signal can be judged on them.")
    page.heading("Does one signal add to another at fixed length?")
    _increment_table(page, document["increments"])
    page.heading("Acceptance")
    if _only_label(document):
        page.text(f"All recorded steps are {_only_label(document)}, at every threshold alike.")
    else:
        page.figure(_acceptance_figure(document["acceptance"]), caption=_ACCEPTANCE_CAPTION)
    page.heading("Accuracy against target tokens")
    reached = [one["accuracy"]["value"] for one in _policies(frontier)]
    if min(reached) < max(reached):
        page.figure(_frontier_figure(frontier), caption=_FRONTIER_CAPTION)
    else:
        page.text(
            f"Every policy answers {_percent(reached[0])} of the problems right, at whatever share of target tokens."
        )
    _frontier_table(page, frontier)
    if "calibration" in document:
        _calibration(page, document["calibration"])
    return page.save(path)


_AUROC_CAPTION = (
    "1 orders perfectly, 0.5 is chance, below 0.5 points the wrong way. At fixed length only steps of equal length are "
    "compared; what remains there is not a matter of length. Intervals: 95%, problems resampled."
)
_ACCEPTANCE_CAPTION = (
    "As the threshold falls, more recorded steps are accepted and more of these are wrong. Recorded prefixes do not change with "
    "the threshold; those of a policy do, which the frontier below shows."
)
_FRONTIER_CAPTION = (
    "Each point is a policy run at one threshold over the same problems. A score is worth what it lies above the grey line, random "
    "acceptance, at the same share. Error bars: 95%, problems resampled."
)


def _coverage_card(checker: dict[str, Any]) -> list[tuple[str, str]]:
    if not checker.get("wrong"):
        return []
    return [(_percent(checker["missed"]), f"of wrong answers without a step that the {checker['called']} flags")]


def _only_label(document: dict[str, Any]) -> str:
    """The label of all recorded steps; empty where they have both."""
    return {0.0: "wrong", 1.0: "right"}.get(document["recorded"]["right"], "")


def _subtitle(document: dict[str, Any]) -> str:
    sampling = document["sampling"]
    drafting = "the target's first layers" if document["fingerprints"]["draft"] is None else "a draft model"
    return (
        f"{document['problems']:,} problems, {len(document['seeds'])} sampling seed(s), temperature {sampling['temperature']}, "
        f"{drafting} drafting, fallback {document['fallback']}"
    )


def _signal_table(page: Report, signals: list[dict[str, Any]]) -> None:
    told = [error for one in signals for error, found in one["by_error"].items() if found["value"] is not None]
    errors = list(dict.fromkeys(told))
    page.table(
        ["signal", "all lengths", "fixed length", *(f"against {error}" for error in errors)],
        [
            [
                one["name"],
                _with_interval(one["raw"]),
                _with_interval(one["fixed_length"]),
                *(_with_interval(one["by_error"].get(error)) for error in errors),
            ]
            for one in signals
        ],
        caption="AUROC for right steps. The last columns compare right steps with the wrong ones of one kind, at fixed length.",
    )


def _increment_table(page: Report, increments: list[dict[str, Any]]) -> None:
    if not increments:
        page.text("There are too few right or wrong steps of one length to fit a regression and hold problems out.")
        return
    page.table(
        ["signal", "added", "alone", "together", "difference"],
        [
            [
                one["base"],
                one["extra"],
                f"{one['without']:.3f}",
                f"{one['with_extra']:.3f}",
                f"{one['difference']:+.3f} [{_figure(one['low'], '+.3f')}, {_figure(one['high'], '+.3f')}]",
            ]
            for one in increments
        ],
        caption="AUROC at fixed length of a logistic regression's predictions for held-out problems.",
    )


def _frontier_table(page: Report, frontier: dict[str, Any]) -> None:
    rows = [
        [
            one["policy"],
            "-" if one["threshold"] is None else f"{one['threshold']:.4g}",
            _with_interval(one["accuracy"]),
            f"{one['target_share']:.3f}",
            "-" if one["acceptance"] is None else f"{one['acceptance']:.3f}",
            _figure(one["wrong_among_accepted"], ".3f"),
            _with_interval(one["over_random"], "+.3f"),
            _with_interval(one["over_target"], "+.3f"),
            f"{one['mcnemar_target']['p_value']:.3f}",
            f"{one['compute']:.2f}",
            f"{one['cpu_milliseconds_per_token']:.2f}",
        ]
        for one in _policies(frontier)
    ]
    page.table(
        [
            "policy",
            "threshold",
            "accuracy",
            "target share",
            "accepted",
            "wrong among accepted",
            "over random",
            "over target",
            "McNemar p",
            "compute",
            "CPU ms/token",
        ],
        rows,
        caption="Compute: weights passed per token of the output, the target alone being 1; prompts and dropped candidates count. "
        "McNemar against the target under the first seed.",
    )


def _calibration(page: Report, one: dict[str, Any]) -> None:
    page.heading("The calibrated threshold")
    page.table(
        ["method", "risk", "alpha", "threshold", "problems", "realised here"],
        [
            [
                one["method"],
                one["risk"],
                one["alpha"],
                "none" if one["threshold"] is None else f"{one['threshold']:.4g}",
                one["n"],
                "-" if "realised" not in one else _realised(one["realised"]),
            ]
        ],
        caption="Realised: accepted and wrong, mean over problems, with the Clopper-Pearson interval over one step a problem.",
    )


def _realised(one: dict[str, Any]) -> str:
    return f"{one['rate']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def _policies(frontier: dict[str, Any]) -> Iterable[dict[str, Any]]:
    yield frontier["target"]
    yield frontier["draft"]
    yield frontier["oracle"]
    yield from frontier["random"]
    for points in frontier["scores"].values():
        yield from points
    if "calibrated" in frontier:
        yield frontier["calibrated"]


def _auroc_figure(signals: list[dict[str, Any]]) -> Any:
    plotly = plotly_module()
    figure = plotly.Figure()
    names = [one["name"] for one in signals][::-1]
    for key, label, colour in (("raw", "all lengths", GREY), ("fixed_length", "fixed length", COLOURS[0])):
        found = [one[key] for one in signals][::-1]
        values = [one["value"] for one in found]
        figure.add_bar(
            y=names,
            x=values,
            orientation="h",
            name=label,
            marker_color=colour,
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [_gap(one["high"], one["value"]) for one in found],
                "arrayminus": [_gap(one["value"], one["low"]) for one in found],
            },
        )
    figure.add_vline(x=0.5, line_dash="dot", line_color="#5b6b7b")
    figure.update_layout(
        barmode="group",
        template="plotly_white",
        height=120 + 46 * len(names),
        margin={"l": 200, "r": 20, "t": 20, "b": 50},
    )
    figure.update_xaxes(title="AUROC for right steps", range=[0, 1])
    return figure


def _acceptance_figure(curves: dict[str, list[dict[str, Any]]]) -> Any:
    plotly = plotly_module()
    figure = plotly.Figure()
    names: dict[str, list[str]] = {}
    for name, points in curves.items():
        names.setdefault(str([(one["accepted"], one["wrong_among_accepted"]) for one in points]), []).append(name)
    # Curves that are the same are one, under all their names.
    for index, together in enumerate(names.values()):
        name, points = ", ".join(together), curves[together[0]]
        figure.add_scatter(
            x=[one["accepted"] for one in points],
            y=[one["wrong_among_accepted"] for one in points],
            customdata=[[one["threshold"], one["accepted_and_wrong"]] for one in points],
            hovertemplate="accepted %{x:.2f}, wrong %{y:.3f}<br>"
            "threshold %{customdata[0]:.4g}, accepted and wrong %{customdata[1]:.3f}",
            mode="lines",
            name=name,
            line={"color": COLOURS[index % len(COLOURS)], "dash": "solid" if index < len(COLOURS) else "dot"},
        )
    figure.update_layout(template="plotly_white", height=440)
    figure.update_xaxes(title="share of drafted steps accepted", range=[0, 1])
    figure.update_yaxes(title="wrong among accepted", rangemode="tozero")
    return figure


def _frontier_figure(frontier: dict[str, Any]) -> Any:
    plotly = plotly_module()
    figure = plotly.Figure()
    random = sorted(frontier["random"], key=lambda one: one["target_share"])
    _add(figure, random, "random acceptance", GREY, mode="lines+markers")
    for index, (name, points) in enumerate(frontier["scores"].items()):
        ordered = sorted(points, key=lambda one: one["target_share"])
        _add(figure, ordered, name, COLOURS[index % len(COLOURS)], mode="lines+markers")
    for key, symbol in (("target", "square"), ("draft", "diamond"), ("oracle", "star"), ("calibrated", "x")):
        if key in frontier:
            _add(figure, [frontier[key]], frontier[key]["policy"], "#1b2733", mode="markers", symbol=symbol)
    figure.update_layout(template="plotly_white", height=480)
    figure.update_xaxes(title="share of the output's tokens that the target decoded", range=[-0.03, 1.03])
    figure.update_yaxes(title="right answers", rangemode="tozero")
    return figure


def _add(
    figure: Any, points: list[dict[str, Any]], name: str, colour: str, *, mode: str, symbol: str = "circle"
) -> None:
    figure.add_scatter(
        x=[one["target_share"] for one in points],
        y=[one["accuracy"]["value"] for one in points],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [_gap(one["accuracy"]["high"], one["accuracy"]["value"]) for one in points],
            "arrayminus": [_gap(one["accuracy"]["value"], one["accuracy"]["low"]) for one in points],
            "thickness": 1,
        },
        mode=mode,
        name=name,
        marker={"color": colour, "symbol": symbol, "size": 10 if mode == "markers" else 7},
        line={"color": colour},
    )


def _gap(high: float | None, low: float | None) -> float:
    return 0.0 if high is None or low is None else max(0.0, high - low)


def _with_interval(one: dict[str, Any] | None, form: str = ".3f") -> str:
    if one is None or one["value"] is None:
        return "-"
    if one["low"] is None:
        return f"{one['value']:{form}}"
    return f"{one['value']:{form}} [{one['low']:{form}}, {one['high']:{form}}]"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"
