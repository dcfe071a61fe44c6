"""A report in sentences: each states one figure with its interval and what it does or does not show."""

from __future__ import annotations

from typing import Any

from telltale.decode.step_verified.report.signals import LENGTH


def findings(document: dict[str, Any]) -> list[str]:
    """The sentences of a report, from its figures alone."""
    signals = {one["name"]: one for one in document["signals"]}
    found = [_length(signals[LENGTH])]
    found += [_signal(one) for name, one in signals.items() if name != LENGTH and _is_main(name)]
    found += [_increment(one) for one in document["increments"]]
    frontier = document["frontier"]
    found += [_score(name, points) for name, points in frontier["scores"].items() if points]
    oracle, target = frontier["oracle"], frontier["target"]
    found.append(
        f"An oracle that knows right steps from wrong ones would reach {_percent(oracle['accuracy'])} at a target share of "
        f"{oracle['target_share']:.2f}; the target alone reaches {_percent(target['accuracy'])}, the draft alone "
        f"{_percent(frontier['draft']['accuracy'])}."
    )
    calibration = document.get("calibration")
    if calibration is not None:
        found.append(_calibration(calibration))
    return found


def _is_main(name: str) -> bool:
    return name.endswith(("log-probability", "grounding")) or name in ("agreement", "likelihood ratio")


def _length(one: dict[str, Any]) -> str:
    raw = one["raw"]["value"]
    if raw is None:
        return "All recorded steps have the same label, so no signal can be judged on them."
    if abs(raw - 0.5) < 0.05:
        return f"Step length alone says little about correctness here (AUROC {raw:.2f})."
    side = "Shorter" if raw > 0.5 else "Longer"
    return (
        f"{side} steps are more often right here: length alone has an AUROC of {max(raw, 1 - raw):.2f}, which any signal "
        f"that follows length inherits. Read the fixed-length column."
    )


def _signal(one: dict[str, Any]) -> str:
    fixed, raw = one["fixed_length"], one["raw"]
    if fixed["value"] is None:
        return f"The {one['name']} could not be judged at fixed length: no two steps of one length differ in label."
    figures = f"AUROC {fixed['value']:.2f} at fixed step length{_interval(fixed)}, {raw['value']:.2f} over all lengths"
    if fixed["low"] is None:
        return f"The {one['name']}: {figures}; too few problems for an interval."
    if fixed["low"] > 0.5:
        return f"The {one['name']} tells right steps from wrong ones: {figures}."
    if fixed["high"] < 0.5:
        return f"The {one['name']} points the wrong way: {figures}."
    return f"The {one['name']} shows nothing: {figures}."


def _increment(one: dict[str, Any]) -> str:
    figures = (
        f"{one['without']:.3f} to {one['with_extra']:.3f}, a difference of {one['difference']:+.3f}{_interval(one)}"
    )
    if one["low"] is not None and one["low"] > 0:
        verdict = "adds to"
    elif one["high"] is not None and one["high"] < 0:
        verdict = "takes away from"
    else:
        verdict = "is not shown to add to"
    return f"At fixed length the {one['extra']} {verdict} the {one['base']}: AUROC {figures}."


def _score(name: str, points: list[dict[str, Any]]) -> str:
    best = max(points, key=lambda one: one["over_random"]["value"])
    gain, against = best["over_random"], best["over_target"]
    if gain["low"] > 0:
        verdict = "beats random acceptance at the same target share"
    elif gain["high"] < 0:
        verdict = "is worse than random acceptance at the same target share"
    else:
        verdict = "is not shown to beat random acceptance at the same target share"
    return (
        f"Accepting by {name} {verdict}: {100 * gain['value']:+.1f} points{_interval(gain, 100)} at a share of "
        f"{best['target_share']:.2f}, the best of {len(points)} thresholds, so read it with care; against the target alone "
        f"{100 * against['value']:+.1f} points{_interval(against, 100)}."
    )


def _calibration(one: dict[str, Any]) -> str:
    if one["threshold"] is None:
        return f"The calibration found no threshold for alpha = {one['alpha']}: the target writes every step."
    realised = one["realised"]
    held = realised["low"] <= one["alpha"]
    return (
        f"At the calibrated threshold {realised['rate']:.3f} of a problem's drafted steps were accepted and wrong "
        f"({realised['low']:.3f} to {realised['high']:.3f}, Clopper-Pearson on one step a problem), "
        + (
            f"which agrees with alpha = {one['alpha']}."
            if held and one["risk"] == "steps"
            else f"which exceeds alpha = {one['alpha']}: the promise did not carry over to these problems."
            if one["risk"] == "steps"
            else f"alpha = {one['alpha']} being about answers lost."
        )
    )


def _percent(one: dict[str, Any]) -> str:
    return f"{100 * one['value']:.1f}%"


def _interval(one: dict[str, Any], factor: float = 1.0) -> str:
    if one["low"] is None or one["high"] is None:
        return ""
    digits = 1 if factor == 100 else 2
    return f" (95% interval {factor * one['low']:.{digits}f} to {factor * one['high']:.{digits}f})"
