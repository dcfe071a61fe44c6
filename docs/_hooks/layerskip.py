"""Figures of LayerSkip and of plain decoding."""

from __future__ import annotations

from drawing import Figure, bars, figure, lines, quartiles, results
from matplotlib.axes import Axes

NAMES = {
    "transformers_plain": "Transformers generate",
    "transformers_early_exit": "Transformers assistant_early_exit",
    "best_prompt_lookup": "Transformers prompt lookup, best setting",
    "autoregressive": "telltale, plain",
    "self_speculative_fixed": "telltale, self-speculation, fixed",
    "self_speculative_auto": "telltale, self-speculation, auto",
    "ngram_auto": "telltale, n-gram drafts",
    "ngram_and_exit_auto": "telltale, n-gram + exit",
    "autoregressive_pytorch_only": "telltale, plain, PyTorch only",
    "self_speculative_fixed_pytorch_only": "telltale, self-speculation, PyTorch only",
}


@figure("plain-sizes")
def plain_sizes() -> Figure:
    """Plain decoding against Transformers by size."""
    runs = results("autoregressive_sizes")["runs"]
    sizes = list(dict.fromkeys(name.split()[0] for name in runs))

    def plot(axes: Axes) -> None:
        for method, label in (("autoregressive", "telltale"), ("transformers_plain", "Transformers")):
            for dtype, style in (("float32", "-"), ("bfloat16", "--")):
                speed = [runs[f"{size} {dtype}"]["timings"][method]["tokens_per_second"] for size in sizes]
                colour = "#2a6f97" if label == "telltale" else "#e07a2f"
                axes.plot(sizes, speed, style, marker="o", color=colour, label=f"{label}, {dtype}")
        axes.set_yscale("log")
        axes.set_xlabel("parameters")
        axes.set_ylabel("tokens per second")
        axes.legend()

    rows = []
    for name, run in runs.items():
        own, theirs = run["timings"]["autoregressive"], run["timings"]["transformers_plain"]
        floor = own["cpu_ms_per_token"] / run["read_once_floor_ms"]
        cells = [quartiles(one, "cpu_ms_per_token") for one in (own, theirs)]
        rows.append([name, *cells, quartiles(run["ratio"], digits=1) + "x", f"{floor:.2f}x"])
    headers = ["model", "telltale, ms/token", "Transformers, ms/token", "ratio", "over reading the weights once"]
    return Figure("Plain greedy decoding by size", ("autoregressive_sizes",), headers, rows, plot)


def speed(name: str, wanted: dict[str, str], caption: str) -> Figure:
    """Milliseconds per token by method; ``wanted`` maps a run's name to its label."""
    runs = {label: results(name)["runs"][run] for run, label in wanted.items()}

    def timing(run: dict, method: str) -> dict | None:
        return run["timings"].get(run["best_prompt_lookup"] if method == "best_prompt_lookup" else method)

    methods = [method for method in NAMES if any(timing(run, method) for run in runs.values())]
    rows = []
    for method in methods:
        timings = [timing(run, method) for run in runs.values()]
        rows.append([NAMES[method], *("-" if one is None else quartiles(one, "cpu_ms_per_token") for one in timings)])
    for ratio in next(iter(runs.values()))["ratios"]:
        names = " / ".join(NAMES.get(name, name) for name in ratio.split(" / "))
        rows.append([f"speed: {names}", *(quartiles(run["ratios"][ratio], digits=2) + "x" for run in runs.values())])
    headers = ["method, or ratio of two (paired rounds)", *(f"{label}, ms/token" for label in runs)]

    def plot(axes: Axes) -> None:
        shown = {
            label: [(timing(run, method) or {"cpu_ms_per_token": 0})["cpu_ms_per_token"] for method in methods]
            for label, run in runs.items()
        }
        bars(axes, [NAMES[method] for method in methods], shown, unit="CPU milliseconds per token")

    return Figure(caption, (name,), headers, rows, plot, (7.2, 4.0))


@figure("speed-tiny")
def speed_tiny() -> Figure:
    """The 1.7M model."""
    wanted = {"float32 exit 4 draft 3": "float32", "bfloat16 exit 4 draft 3": "bfloat16"}
    return speed("layerskip_speed_tiny", wanted, "1.7M parameters, exit 4 of 8, draft length 3")


@figure("speed-tiny-exit-2")
def speed_tiny_two() -> Figure:
    """The 1.7M model at an earlier exit."""
    wanted = {"float32 exit 2 draft 3": "float32", "bfloat16 exit 2 draft 3": "bfloat16"}
    return speed("layerskip_speed_tiny", wanted, "The same model at exit 2")


@figure("speed-44m")
def speed_44m() -> Figure:
    """The fine-tuned 44M model."""
    wanted = {"bfloat16 exit 10 draft 4": "bfloat16"}
    return speed("layerskip_speed_narrow", wanted, "44M parameters, fine-tuned, exit 10 of 24, draft length 4")


@figure("speed-44m-before")
def speed_44m_before() -> Figure:
    """The 44M model before fine-tuning."""
    wanted = {"bfloat16 exit 10 draft 4": "bfloat16"}
    return speed("layerskip_speed_small", wanted, "The same 44M model before its fine-tuning")


@figure("recipe")
def recipe() -> Figure:
    """What each part of the recipe does at equal steps."""
    arms = results("layerskip_recipe")["arms"]
    labels = {"none": "none", "dropout": "layer dropout only", "exits": "exit loss only", "both": "both"}
    rows = []
    for arm, label in labels.items():
        losses, accepted = arms[arm]["losses"], arms[arm]["acceptance"]
        pick = [f"{losses['mean'][e - 1]:.2f} ± {losses['deviation'][e - 1]:.2f}" for e in (2, 4, 6, 8)]
        take = [f"{accepted['mean'][e - 1]:.2f} ± {accepted['deviation'][e - 1]:.2f}" for e in (2, 4, 6)]
        rows.append([label, *pick, *take])
    headers = ["recipe", *(f"loss, exit {e}" for e in (2, 4, 6, 8)), *(f"accepted, exit {e}" for e in (2, 4, 6))]

    def plot(axes: Axes) -> None:
        shown = {label: (range(1, 8), arms[arm]["acceptance"]["mean"]) for arm, label in labels.items()}
        lines(axes, shown, x="exit layer", y="share of drafts accepted", marker="o")

    caption = "The recipe at equal steps: mean of three seeds (± standard deviation), losses in nats"
    return Figure(caption, ("layerskip_recipe",), headers, rows, plot)


@figure("work")
def work() -> Figure:
    """Tokens that each layer executes."""
    found = results("work_conservation")
    layers = [f"layer {index}" for index in range(len(found["telltale_layer_tokens"]))]
    series = {"telltale": found["telltale_layer_tokens"], "Transformers": found["transformers_layer_tokens"]}
    rows = [[layer, *map(str, pair)] for layer, *pair in zip(layers, *series.values(), strict=True)]

    def plot(axes: Axes) -> None:
        bars(axes, layers, series, unit="tokens executed")

    caption = "Tokens per layer for 64 prompt and 96 new tokens at exit 4"
    return Figure(caption, ("work_conservation",), ["layer", *series], rows, plot)


@figure("losslessness")
def losslessness() -> Figure:
    """Sequences that differ from plain decoding."""
    rows = []
    for name, run in results("losslessness")["runs"].items():
        gaps = run["relative_top2_gaps"]
        rows.append([name, str(run["sequences"]), str(run["diverged"]), f"{max(gaps):.2%}" if gaps else "-"])
    headers = ["backend, dtype, exactness", "sequences", "differ", "largest gap of the two best logits there"]
    return Figure("Sequences that differ from plain greedy decoding", ("losslessness",), headers, rows)


@figure("auto-planner")
def auto_planner() -> Figure:
    """The online planner against plain decoding and the best fixed choice, live."""
    runs = results("auto_planner")["runs"]
    keys = {
        "best fixed": "best_fixed / plain",
        "auto": "auto / plain",
        "auto, first call": "auto_fresh / plain",
        "n-grams, auto": "ngram_auto / plain",
        "both, auto": "both_auto / plain",
    }
    rows = [
        [
            name,
            run["best_fixed_point"],
            *(quartiles(run[key], digits=2) + "x" for key in keys.values()),
            quartiles(run["auto / best_fixed"], digits=2),
        ]
        for name, run in runs.items()
    ]

    def plot(axes: Axes) -> None:
        shown = {label: [run[key]["cpu"] for run in runs.values()] for label, key in keys.items()}
        bars(axes, list(runs), shown, unit="speed over plain decoding", reference=1.0)

    headers = ["model", "best fixed point", *keys, "auto over best fixed"]
    return Figure("The planner `auto` against plain decoding", ("auto_planner",), headers, rows, plot)


@figure("auto-planner-recordings")
def auto_planner_recordings() -> Figure:
    """The online planner played on recordings, by half."""
    keys = {
        "best fixed": "best_fixed / plain",
        "auto": "auto / plain",
        "auto, first call": "auto_fresh / plain",
        "best fixed n-grams": "best_fixed_ngram / plain",
        "n-grams, auto": "ngram_auto / plain",
        "both, auto": "both_auto / plain",
    }
    rows = []
    for name, halves in results("auto_planner")["replays"].items():
        for half, own in halves.items():
            point = own["best_fixed_point"]
            best = f"exit {point['exit_layer']} draft {point['draft_length']}" if point["draft_length"] else "plain"
            over = f"{own['auto / best_fixed']:.2f}"
            rows.append([name, half, best, *(f"{own[key]:.2f}x" for key in keys.values()), over])
    headers = ["recording", "half", "best fixed point", *keys, "auto over best fixed"]
    caption = "Plans played on recordings: speed over plain decoding"
    return Figure(caption, ("auto_planner",), headers, rows)


@figure("pass-costs")
def pass_costs() -> Figure:
    """The cost of a pass by its width."""
    runs = results("pass_costs")["runs"]
    widths = ["1", "2", "3", "5", "9", "17"]
    rows = [
        [name, f"{run['step_ms']:.2f}", *(f"{run['relative_cost'][width]:.2f}" for width in widths)]
        for name, run in runs.items()
    ]

    def plot(axes: Axes) -> None:
        shown = {
            name: ([int(width) for width in run["relative_cost"]], list(run["relative_cost"].values()))
            for name, run in runs.items()
            if "native" in name
        }
        lines(axes, shown, x="tokens in one pass", y="cost over one token", marker=".")

    headers = ["model, dtype, backend", "one token, ms", *(f"V({width})" for width in widths)]
    return Figure(
        "What a pass over n tokens costs relative to one, native backend", ("pass_costs",), headers, rows, plot
    )


def _cell(found: dict, column: str) -> str:
    if not found.get("configurations"):
        return "refused"
    if column not in found:
        return "none"
    return "yes" if found[column] else "**no**"


@figure("families")
def families() -> Figure:
    """Family by backend: what was token-identical to Transformers."""
    rows = []
    for name, found in results("families")["families"].items():
        speed = found.get("speed")
        for backend in ("native", "fused", "module"):
            own = found.get(backend)
            if own is None:
                continue
            fast = quartiles(speed, digits=1) + "x" if speed and speed["backend"] == backend else "-"
            columns = [_cell(own, column) for column in ("identical", "ragged", "boundary")]
            rows.append([name, backend, str(own["configurations"]), *columns, fast])
    headers = [
        "family",
        "backend",
        "configurations",
        "token-identical",
        "ragged",
        "boundary",
        "speed over Transformers",
    ]
    note = "Refused: the backend says why, and another serves. Boundary none: the family has neither window nor change."
    return Figure("Families by backend, float32, small random models", ("families",), headers, rows, note=note)


@figure("gguf-files")
def gguf_files() -> Figure:
    """Real files: tokens beside llama.cpp, decoding beside Transformers, serving."""
    rows = []
    for name, found in results("gguf_files")["files"].items():
        for key, value in found.get("decoding", {}).items():
            if isinstance(value, list):
                rows.append([name, f"greedy tokens, {key}", f"{sum(value)} of {len(value)} prompts equal"])
        tokens, served = found["tokenisation"], found.get("served")
        rows.append([name, "strings tokenised as llama.cpp does", f"{tokens['equal']} of {tokens['strings']}"])
        if served is not None:
            rows.append([name, "completion over HTTP", "equal" if served["completion_equal"] else "**differs**"])
            chat = f"refused: {served['chat_refused']}" if "chat_refused" in served else None
            rows.append([name, "chat over HTTP", chat or ("equal" if served["chat_equal"] else "**differs**")])
        rows.append([name, "loading, CPU seconds", f"{found['loading_cpu_seconds']:.1f}"])
    return Figure("Two files from end to end, float32", ("gguf_files",), ["file", "what", "result"], rows)


@figure("int8-perplexity")
def int8_perplexity() -> Figure:
    """A real model by how its weights are read: perplexity of the native step."""
    found = results("decode_llamacpp_perplexity")["perplexity"]
    names = {
        "telltale float32": "float32",
        "telltale bfloat16": "bfloat16",
        "telltale int8": "int8, bfloat16 activations",
    }
    own = found["telltale bfloat16"]
    rows = [[words, f"{found[name]:.3f}", f"{found[name] / own:.4f}"] for name, words in names.items()]
    caption = f"SmolLM2-135M-Instruct on {found['tokens']:,} tokens of these pages, windows of {found['window']}"
    return Figure(caption, ("decode_llamacpp_perplexity",), ["weights", "perplexity", "over bfloat16"], rows)


@figure("decode-llamacpp")
def decode_llamacpp() -> Figure:
    """Plain decoding beside llama.cpp on the same weights, on a processor with matrix tiles."""
    return _beside_llamacpp("decode_llamacpp_speed")


@figure("decode-llamacpp-avx2")
def decode_llamacpp_avx2() -> Figure:
    """The same on a processor that has AVX2 only."""
    return _beside_llamacpp("decode_llamacpp_speed_avx2")


def _beside_llamacpp(source: str) -> Figure:
    found = results(source)
    runs = {f"{n} thread{'s' * (n > 1)}": found[f"threads_{n}"] for n in (1, 2)}
    rows = []
    for name in runs["1 thread"]["contestants"]:
        cells = []
        for run in runs.values():
            own = run["contestants"][name]
            floor = f"{own['floor_ms'][1]:.1f}" if "floor_ms" in own else "-"
            cells += [_of_three(own["decode_ms_per_token"]), floor, _of_three(own["prompt_ms_per_token"])]
        rows.append([name, *cells])
    for pair in runs["1 thread"]["speed_against"]:
        one, other = pair.split(" / ")
        if not other.startswith("llama.cpp"):
            continue
        cells = []
        for run in runs.values():
            prompts = [run["contestants"][name]["prompt_ms_per_token"][1] for name in (other, one)]
            cells += [_of_three(run["speed_against"][pair], 2) + "x", "-", f"{prompts[0] / prompts[1]:.2f}x"]
        rows.append([f"speed: {pair}", *cells])
    headers = ["reader"]
    for label in runs:
        headers += [f"decoding, {label}", "floor", f"prompt, {label}"]
    apart = [
        f"{pair}: equal"
        if own["equal"]
        else f"{pair}: they part at token {own['first_difference'] + 1}, where the two best logits are "
        f"{own['top_2_gap_of_range']:.2%} of the range apart"
        for pair, own in runs["1 thread"]["texts"].items()
    ]
    first = runs["1 thread"]
    caption = (
        f"SmolLM2-135M-Instruct, milliseconds a token: median (quartiles), a chat of {first['prompt_tokens']} tokens, "
        f"{first['new_tokens']} new ones"
    )
    note = f"{found['machine']['processor']}; texts: {'; '.join(apart)}."
    return Figure(caption, (source,), headers, rows, note=note)


@figure("speed-before-after")
def speed_before_after() -> Figure:
    """CPU time per token over that of the checkout before the native step's new products."""
    found = results("speed_before_after")
    rows = [
        [name, f"{case['median']:.3f}", f"{case['upper_95']:.3f}"]
        for name, case in found["cases"].items()
        if "engine" not in name
    ]
    caption = f"CPU time per token, new over old: {found['rounds']} rounds in turn, small models of random weights"
    return Figure(caption, ("speed_before_after",), ["case", "median", "95% bound above"], rows)


def _of_three(values: list[float], digits: int = 1) -> str:
    """A median with its quartiles, from (first quartile, median, third quartile)."""
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


@figure("retrofit")
def retrofit() -> Figure:
    """A real model with draft exits: speeds over plain decoding by kind of text."""
    runs = results("layerskip_retrofit")["runs"]
    names = {
        "exit_fixed": "exit alone, best fixed",
        "exit_auto": "exit alone, auto",
        "ngram": "n-grams alone",
        "ngram_and_exit": "n-grams + exit",
    }
    rows = [
        [
            kind,
            f"exit {run['best_fixed']['exit_layer']}, {run['best_fixed']['draft_length']}",
            f"{run['best_fixed']['acceptance']:.2f}",
            *(quartiles(run["over_plain"][name], digits=2) + "x" for name in names),
            quartiles(run["ngram_and_exit / ngram"], digits=2) + "x",
        ]
        for kind, run in runs.items()
    ]

    def plot(axes: Axes) -> None:
        shown = {label: [run["over_plain"][name]["cpu"] for run in runs.values()] for name, label in names.items()}
        bars(axes, list(runs), shown, unit="speed over plain decoding", reference=1.0)

    headers = ["text", "best fixed point", "accepted there", *names.values(), "n-grams + exit over n-grams"]
    return Figure("SmolLM2-135M-Instruct with draft exits", ("layerskip_retrofit",), headers, rows, plot)


@figure("retrofit-exits")
def retrofit_exits() -> Figure:
    """What a draft costs before training, what acceptance it needs, and what the retrofit reached."""
    found = results("layerskip_retrofit")
    trained = {one["exit_layer"]: one for one in (found["training"] or {}).get("exits", [])}
    rows = []
    for bound in found["bounds"]:
        own = trained.get(bound["exit_layer"])
        needed = "out of reach" if bound["needed"] is None else f"{bound['needed']:.2f}"
        reached = ["whole head, untrained", "-", "-"] if own is None else ["draft exit", f"{own['before']:.2f}"]
        if own is not None:
            reached.append("  ".join(f"{share:.2f}" for share in own["acceptance"]))
        rows.append(
            [f"{bound['exit_layer']} of {found['layers']}", reached[0], f"{bound['cost']:.2f}", needed, *reached[1:]]
        )
    headers = [
        "exit layer",
        "read by",
        "cost of a draft, in tokens",
        "acceptance that 1.3x needs",
        "first draft right before",
        "after, by draft position",
    ]
    return Figure("Exits: the bound, and what training reached", ("layerskip_retrofit",), headers, rows)


@figure("retrofit-recipe")
def retrofit_recipe() -> Figure:
    """A retrofit beside the full recipe at equal CPU time."""
    found = results("layerskip_retrofit_recipe")
    layers = found["layers"]
    shown = sorted({max(1, layers * part // 4) for part in (1, 2, 3)})
    own = found["retrofit"]["acceptance_by_draft"]
    rows = []
    for arm, label in (("untouched", "untouched"), ("retrofit", "retrofit"), ("recipe", "full recipe")):
        run, best = found[arm], found[arm]["best"]
        exits = {str(layer): [share] for layer, share in enumerate(run.get("acceptance_by_exit", []), 1)} or own
        point = f"exit {best['exit_layer']} draft {best['draft_length']}: {best['predicted_speedup']:.2f}x"
        first = "  ".join(
            f"{layer}: {share[0]:.2f}" for layer, share in exits.items() if exits is own or int(layer) in shown
        )
        rows.append([label, f"{run.get('cpu_seconds', 0):.0f}", first, f"{run['perplexity']:.2f}", point])
    headers = [
        "arm",
        "CPU seconds",
        "first draft right, by exit",
        "perplexity on people's text",
        "best point, predicted",
    ]
    caption = f"Retrofit and recipe at equal CPU time: {found['about']}"
    return Figure(caption, ("layerskip_retrofit_recipe",), headers, rows)
