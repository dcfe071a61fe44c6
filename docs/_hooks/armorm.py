"""Figures of the judge."""

from __future__ import annotations

import statistics

from drawing import Figure, bars, figure, results
from matplotlib.axes import Axes


def experiment(name: str, columns: list[str], shown: list[str], caption: str) -> Figure:
    """Accuracies of every scorer in one experiment, mean (standard deviation) over seeds."""
    found = results("judge_experiments")["mean_and_deviation"][name]
    rows = [[scorer, *(f"{entry[c][0]:.3f} ({entry[c][1]:.3f})" for c in columns)] for scorer, entry in found.items()]

    def plot(axes: Axes) -> None:
        series = {column: [entry[column][0] for entry in found.values()] for column in shown}
        bars(axes, list(found), series, unit="accuracy", reference=0.5)

    return Figure(caption, ("judge_experiments",), ["scorer", *columns], rows, plot, (7.2, 4.2))


@figure("judge-a")
def judge_a() -> Figure:
    """RM-Bench."""
    columns = ["all", "easy", "normal", "hard", "safety", "safety-refuse", "safety-response", "chat", "code"]
    return experiment("A", columns, ["all", "safety"], "RM-Bench, all nine style pairs: accuracy, five seeds")


@figure("judge-b")
def judge_b() -> Figure:
    """RM-Bench, confounded training."""
    caption = "The same, trained only on pairs whose right answer is the fancier one"
    return experiment("B", ["all", "easy", "normal", "hard", "safety"], ["all", "hard"], caption)


@figure("judge-c")
def judge_c() -> Figure:
    """AlpacaEval."""
    caption = "AlpacaEval's GPT-4 preferences, which favour the longer answer"
    return experiment("C", ["all", "chosen shorter"], ["all", "chosen shorter"], caption)


@figure("judge-llmbar")
def judge_llmbar() -> Figure:
    """LLMBar, out of domain."""
    found = results("judge_experiments")["mean_and_deviation"]["llmbar"]
    columns = list(next(iter(found.values())))
    rows = [[name, *(f"{entry[c][0]:.3f} ({entry[c][1]:.3f})" for c in columns)] for name, entry in found.items()]
    return Figure("The judges of the first experiment on LLMBar", ("judge_experiments",), ["scorer", *columns], rows)


@figure("judge-goals")
def judge_goals() -> Figure:
    """The goals of the experiments."""
    found = results("judge_experiments")["acceptance"]
    rows = [[name, f"{entry['value']:.3f}", "yes" if entry["passed"] else "no"] for name, entry in found.items()]
    caption = "Goals set before the experiments (differences in points of accuracy)"
    return Figure(caption, ("judge_experiments",), ["goal", "value", "reached"], rows)


@figure("judge-gate-less")
def judge_gate_less() -> Figure:
    """The gate less what it has to beat, with how many seeds are beyond doubt."""
    seeds = results("judge_experiments")["seeds"]
    rows = []
    for experiment in ("A", "B"):
        for scope in seeds[0]["gate_minus"][experiment]:
            for name in seeds[0]["gate_minus"][experiment][scope]:
                found = [seed["gate_minus"][experiment][scope][name] for seed in seeds]
                rows.append(
                    [
                        {"A": "all pairs", "B": "confounded"}[experiment],
                        scope,
                        name,
                        f"{statistics.mean(one['value'] for one in found):+.3f}",
                        f"{statistics.mean(one['high'] - one['low'] for one in found):.3f}",
                        f"{sum(one['low'] > 0 for one in found)} of {len(found)}",
                        f"{sum(one['high'] < 0 for one in found)} of {len(found)}",
                    ]
                )
    headers = ["trained on", "decorrelation", "gate less", "difference", "width", "above 0", "below 0"]
    caption = "Gate less each other model on RM-Bench's test prompts: mean over seeds, and whose 95% interval leaves 0"
    return Figure(caption, ("judge_experiments",), headers, rows)


@figure("judge-backbones")
def judge_backbones() -> Figure:
    """The experiments on the features of a language model."""
    found = results("judge_backbones")["backbones"]
    cells = (("A", "all"), ("A", "hard"), ("B", "hard"), ("C", "all"), ("llmbar", "all"))
    models = ("length only", "gate, raw", "gate, within-prompt", "global softmax, raw")
    rows = []
    for backbone, entry in found.items():
        for model in (*models, "Bradley-Terry linear", "Bradley-Terry MLP"):
            own = [entry["mean_and_deviation"][name][model][cell] for name, cell in cells]
            rows.append([backbone, model, *(f"{mean:.3f} ({deviation:.3f})" for mean, deviation in own)])
    headers = ["features", "scorer", "RM-Bench", "hard", "hard, confounded", "AlpacaEval", "LLMBar"]
    caption = "The same rows with other features: accuracy, mean (standard deviation) over three seeds"
    return Figure(caption, ("judge_backbones",), headers, rows)


@figure("judge-report")
def judge_report() -> Figure:
    """Coverage and decisions of a fit's report on seeds with a known truth."""
    rows = []
    for one in results("judge_report")["settings"]:
        noise = one["turned"] is None
        covered = (
            min(found["share"] for found in one["covers_half"].values())
            if noise
            else one["gap_covers_true_gain"]["share"]
        )
        rows.append(
            [
                "pure noise" if noise else f"planted gain of {one['true_gain']:.3f}",
                f"{one['prompts']} x {one['pairs_of_a_prompt']}",
                one["compared_prompts"],
                f"{covered:.3f}",
                f"{one['ships']['share']:.3f} [{one['ships']['low']:.3f}, {one['ships']['high']:.3f}]",
                f"{one['mean_width_of_accuracy']:.3f}",
                f"{one['mean_width_of_gap']:.3f}",
            ]
        )
    headers = ["labels", "prompts x pairs", "compared", "coverage", "ships", "width, accuracy", "width, difference"]
    return Figure("A fit's report where the truth is known, a thousand seeds each", ("judge_report",), headers, rows)


@figure("judge-calibration")
def judge_calibration() -> Figure:
    """Promises of the probability and of abstention."""
    rows = []
    for one in results("judge_calibration")["settings"]:
        broken, errors = one["promise_broken"], one["errors"]
        rows.append(
            [
                f"{one['slope']:g}",
                f"{one['prompts']} x {one['pairs_of_a_prompt']}",
                f"{broken['share']:.3f} [{broken['low']:.3f}, {broken['high']:.3f}]",
                f"{one['answers_anything']:.2f}",
                f"{one['answered']:.2f}",
                *(
                    f"{found['root_of_the_mean_square']:.3f} ({found['truth']:.3f}; {found['covered']:.3f})"
                    for found in errors.values()
                ),
            ]
        )
    headers = ["slope", "prompts x pairs", "promise broken", "judges that answer", "pairs answered", *errors]
    caption = "At most 10% of the answers wrong, promised at 90%; calibration error found (true; coverage)"
    return Figure(caption, ("judge_calibration",), headers, rows)


@figure("ridge")
def ridge() -> Figure:
    """CPU time of the ridge regressions."""
    sizes = results("judge_ridge")["sizes"]
    groups = [f"{size['rows']:,} rows, {size['features']:,} features" for size in sizes]
    ways = list(sizes[0]["cpu_seconds"])
    medians = {way: [statistics.median(size["cpu_seconds"][way]) for size in sizes] for way in ways}
    rows = []
    for index, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        for way in ways:
            ratio = size["ratios"].get(way)
            text = "-" if ratio is None else f"{ratio['times ours']:.1f}x ({ratio['q1']:.1f} to {ratio['q3']:.1f})"
            rows.append([group, way, f"{medians[way][index]:.2f}", text])

    def plot(axes: Axes) -> None:
        bars(axes, groups, medians, unit="CPU seconds", log=True)

    headers = ["size", "way", "CPU seconds, median", "times ours"]
    return Figure("Ridge of ten objectives, nine alphas", ("judge_ridge",), headers, rows, plot, (7.2, 2.8))


@figure("ridge-memory")
def ridge_memory() -> Figure:
    """Memory of the ridge regressions."""
    found = results("judge_ridge")["memory"]
    rows = [[f"{one['rows']:,}", str(one["features"]), f"{one['megabytes']:.0f}"] for one in found]
    caption = "Memory of the ridge regressions above the inputs' own"
    return Figure(caption, ("judge_ridge",), ["rows", "features", "MB"], rows)


@figure("decorrelation")
def decorrelation() -> Figure:
    """Cost and effect of decorrelation."""
    forms = results("judge_decorrelation")["forms"]
    rows = []
    for name, form in forms.items():
        left = [form[f"largest_rho_left_{where}"] for where in ("where_fitted", "held_out")]
        cells = [f"{one[kind]:.1e}" if one[kind] < 1e-3 else f"{one[kind]:.3f}" for one in left for kind in one]
        rows.append([name, f"{form['cpu_seconds']['median']:.2f}", *cells])

    def plot(axes: Axes) -> None:
        bars(
            axes, list(forms), {"CPU seconds": [f["cpu_seconds"]["median"] for f in forms.values()]}, unit="CPU seconds"
        )

    headers = ["method", "CPU seconds", "left, fitted", "fitted, ties", "left, held out", "held out, ties"]
    caption = "Decorrelating 18 objectives on 122,000 responses; largest |rho| that is left"
    return Figure(caption, ("judge_decorrelation",), headers, rows, plot, (7.2, 2.2))


@figure("best-of")
def best_of() -> Figure:
    """The best of eight with the prompt computed once."""
    settings = results("judge_best_of")["settings"]
    groups = [f"{one['prompt_words']} / {one['response_words'][-1]} words" for one in settings]
    peers = list(settings[0]["speed_over"])
    cells = [
        [
            f"{one['speed_over'][p]['cpu']:.2f} ({one['speed_over'][p]['cpu_q1']:.2f} to {one['speed_over'][p]['cpu_q3']:.2f})"
            for p in peers
        ]
        for one in settings
    ]
    labels = {"independent": "over one batch of eight", "one by one": "over one by one"}
    rows = [[group, *line] for group, line in zip(groups, cells, strict=True)]

    def plot(axes: Axes) -> None:
        shown = {labels[peer]: [one["speed_over"][peer]["cpu"] for one in settings] for peer in peers}
        bars(axes, groups, shown, unit="times as fast", reference=1.0)

    headers = ["prompt / response", *(labels[peer] for peer in peers)]
    return Figure("The best of eight responses, the prompt computed once", ("judge_best_of",), headers, rows, plot)
