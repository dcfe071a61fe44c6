"""The house: which file may import which. Read from the source, so that an import inside a function counts as well.

Followed are ``import telltale.x``, ``from telltale.x import y``, imports in functions and under ``TYPE_CHECKING``, what an
``__init__`` passes on, and module names given to ``import_module`` as strings.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import telltale

ROOT = Path(telltale.__file__).parent
GROUND = ("config", "errors", "models", "runs", "signals", "tasks")
WINGS = ("align", "decode", "edge", "train", "world")
TOP = ("__main__", "cli", "serve", "tour")


def sources() -> dict[str, Path]:
    """Dotted module name -> file; a package stands for its ``__init__``."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ("telltale", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, modules) -> set[str]:
    """What one file imports of ``modules``; ``from a import b`` is the module ``a.b`` where there is one, else ``a``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    targets = set()
    by_name = any(isinstance(node, ast.Attribute) and node.attr == "import_module" for node in ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                targets.add(whole if whole in modules else node.module)
        elif by_name and isinstance(node, ast.Constant) and node.value in modules:
            targets.add(node.value)
    return targets & set(modules)


def graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    return {name: imported(path, modules) - {name} for name, path in modules.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another (the strongly connected components of more than one node)."""

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for target in edges.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return seen

    reach = {node: reached(node) for node in edges}
    groups = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in edges if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def folder_edges(edges: dict[str, set[str]], folders: set[str]) -> dict[str, set[str]]:
    """The imports between folders that lie side by side: each import counts where its two paths part."""
    found = defaultdict(set)
    for source, targets in edges.items():
        for target in targets:
            a, b = source.split("."), target.split(".")
            shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            if shared is not None:
                left, right = ".".join(a[: shared + 1]), ".".join(b[: shared + 1])
                if left in folders and right in folders:
                    found[left].add(right)
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


MODULES = sources()
EDGES = graph(MODULES)
FILES = {name: path for name, path in MODULES.items() if path.name != "__init__.py"}
FOLDERS = set(MODULES) - set(FILES)

SINGLE_IMPORTERS = {
    "align.judge.baselines": "what a fitted gate is compared with; no part of fitting",
    "align.judge.countable": "objectives counted in the text; knows no files and no fit",
    "align.judge.default_judge": "the judge that is made without any data of the user's",
    "align.judge.fit_files": "files and folders around a fit of tensors; only a command asks for it",
    "align.judge.fit_report": "what a fit is worth, for people and as JSON; fits nothing",
    "align.judge.trl": "the seam to TRL, imported on use",
    "align.oger.comparison_page": "HTML of a comparison whose records another file makes",
    "align.oger.entropy_capture": "reads a model while it generates; knows nothing of groups or TRL",
    "align.oger.hybrid": "one generation of the algorithm without the trainer around it",
    "align.oger.inspection": "looks at teachers before training; only a command asks for it",
    "align.oger.job": "files in, a run folder out; only a command asks for it",
    "align.oger.trl_hooks": "what is relied on of TRL, so that a new version is checked in one place",
    "decode.calibration.page": "HTML of a report whose JSON another file makes",
    "decode.calibration.calibration_report": "the evaluation protocol; only a command asks for it",
    "decode.calibration.signal_quality": "measures of a signal, tested against their definitions by themselves",
    "decode.diagnose": "a verdict in words, and what training would take; only a command asks for it",
    "decode.grammar": "a logits processor for users of the decoders too; brings llguidance on use",
    "decode.prefix_cache": "a bounded trie; knows no prompt's way through the engine, tested by itself",
    "decode.reading": "how prompts are read, and what is not read again; the engine decides whose turn it is",
    "decode.speculative": "draft, verify and accept as the paper has them; the engine only calls it",
    "edge.connection": "a socket with a thread of its own; the client above it is the policy",
    "models.weights": "where weights lie and whether they still do; no part of a pass",
    "models.gguf": "another format of checkpoint, read through an extra",
    "models.backends.native.pointers": "structures of the C side and what fills them; step.py calls it",
    "models.backends.module": "one of three backends; open.py is the only file that knows them",
    "models.backends.native.step": "one of three backends; open.py is the only file that knows them",
    "serve.constraints": "grammars, biases and tools made ready for rows; the service only asks for them",
    "serve.connections": "uvicorn's protocol with deadlines; the command starts servers, and the test's do as well",
    "serve.judge_app": "one of two applications; the command starts it",
    "serve.logprobs": "the two forms of OpenAI's, made of plain numbers; tested against Transformers by themselves",
    "serve.openai_app": "one of two applications; the command starts it",
    "serve.service": "what the application may ask of the scheduler's thread; tested without HTTP",
    "signals.diversity": "a signal; the ground floor holds all of them",
    "tasks.gsm8k_checker": "a task's checker; only a command asks for it",
    "tasks.verifiers": "verifiers by name; users import them too",
    "train.retrofit": "training beside a frozen model; only a command asks for it",
    "train.pipeline.causal_lm": "layers of a language model; split.py chooses between it and torch.export",
    "train.pipeline.export": "a checkpoint becomes a whole model; also called by users",
    "train.pipeline.exported_module": "layers of any module by torch.export; split.py chooses",
    "train.pipeline.planning.search": "proposals ranked by simulation; knows no choice of policy",
    "train.pipeline.planning.ordering": "the order of a graph's layers, before any plan",
    "tour.edge": "a chapter of the tour",
    "tour.oger": "a chapter of the tour",
    "tour.world": "a chapter of the tour",
    "train.pipeline.exported_graph": "graphs of torch.fx and where they can be cut; knows no minibatch and no chain",
    "train.sharpness.callbacks": "seams to training frameworks, imported on use",
    "cli.world_text": "where a text model meets the decoder and the training loop; imported on use",
    "world.card": "what people read of a bundle; the bundle's writer knows files and hashes only",
    "world.coherence": "error by horizon; level 3 diagnoses with it",
    "cli.world_evolve": "the commands of a life and its registry; the group of commands only adds them",
    "world.evolve.exploration": "spends a budget of probes; a benchmark measures it without a life around it",
    "world.evolve.hypotheses": "what evidence leaves open, equations and programs; revision chooses by the kind of model",
    "world.evolve.probes": "experiments chosen by information; exploration decides how many and when hypotheses are drawn anew",
    "world.evolve.revision": "operators from a model and evidence to candidates; knows no gate and no registry",
    "world.evolve.stream": "how a model acts where it may have no plan; the life around it decides and writes",
    "world.evolve.structure": "edits of equations and programs; a benchmark and the tests use them by themselves",
    "world.evolve.earlier_versions": "comparisons of versions on given errors; the life around them rolls back",
    "world.evolve.life_evidence": "which evidence a round may see; the life around it decides what to do with it",
    "world.failures": "the taxonomy's rules; a reader checks them by themselves",
    "world.laws.expressions": "arithmetic of law files and nothing else, tested against what it must refuse",
    "world.laws.units": "dimensions need Pint, imported on use",
    "world.models.ensemble_fitting": "the loop and the calibration; the network next to it is what is saved",
    "world.models.opponent": "one kind of model; saving.py is the only file that knows all kinds",
    "world.models.program": "one kind of model; saving.py is the only file that knows all kinds",
    "world.models.sindy": "one kind of model; saving.py is the only file that knows all kinds",
    "world.models.text": "takes any function from prompts to completions; the command line is where a decoder meets it",
    "world.models.tabular": "one kind of model; saving.py is the only file that knows all kinds",
    "world.planners.best_response": "one planner; planning.py is the only file that knows all planners",
    "world.planners.categorical": "one planner; planning.py is the only file that knows all planners",
    "world.planners.search": "one planner; planning.py is the only file that knows all planners",
    "world.worlds.games": "needs OpenSpiel, imported on use",
    "world.worlds.simulators": "the user's own function as a world, imported on use",
}
"""Files that one other file imports, and why they are files of their own."""


def test_no_circle_of_files():
    assert circles(EDGES) == []


def test_no_circle_of_sibling_folders():
    assert circles(folder_edges(EDGES, FOLDERS)) == []


def test_every_room_has_its_floor():
    assert {room(name) for name in MODULES} - {""} <= {*GROUND, *WINGS, *TOP}


@pytest.mark.parametrize("below", [*GROUND, *WINGS])
def test_nothing_is_imported_from_above_or_beside(below):
    forbidden = {*WINGS, *TOP} - {below}
    assert [(a, b) for a in EDGES if room(a) == below for b in sorted(EDGES[a]) if room(b) in forbidden] == []


def test_signals_are_pure_tensor_functions():
    for name, path in FILES.items():
        if room(name) == "signals":
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            text = [node.module or "" for node in tree if isinstance(node, ast.ImportFrom)]
            assert not [module for module in text if module.split(".")[0] == "transformers"], name


def test_no_file_name_stands_twice_in_a_room():
    names = Counter((room(m), path.name) for m, path in FILES.items())
    assert [key for key, count in names.items() if count > 1] == []


def single_importers() -> set[str]:
    """Files that exactly one other file imports. An ``__init__`` that passes a name on is no importer but a door."""
    importers = defaultdict(set)
    for source, targets in EDGES.items():
        for target in targets:
            importers[target].add(source)
    return {name for name in FILES if len(importers[name]) == 1 and not importers[name] & FOLDERS}


def test_a_file_with_one_importer_has_a_reason():
    singles = single_importers()
    new_wings = ("telltale.align.oger.", "telltale.edge.", "telltale.world.", "telltale.cli.world")
    assert len([name for name in singles if not name.startswith(new_wings)]) <= 31
    unexplained = {name.removeprefix("telltale.") for name in singles}
    assert unexplained - set(SINGLE_IMPORTERS) == set()
    assert {name for name in SINGLE_IMPORTERS if f"telltale.{name}" not in FILES} == set()


def test_a_circle_is_found(tmp_path, monkeypatch):
    for name, text in {
        "__init__.py": "",
        "a.py": "def f():\n    from telltale.b import g\n",
        "b.py": "import telltale.c",
        "c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from telltale import a\n",
        "one/__init__.py": "from telltale.two.y import z",
        "one/x.py": "",
        "two/__init__.py": "",
        "two/y.py": "from telltale.one import x",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    edges = graph(sources())
    assert circles(edges) == [["telltale.a", "telltale.b", "telltale.c"]]
    assert circles(folder_edges(edges, {"telltale", "telltale.one", "telltale.two"})) == [
        ["telltale.one", "telltale.two"]
    ]
