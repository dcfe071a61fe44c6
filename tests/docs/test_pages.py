"""The README and the pages of the docs: links, figures, commands and snippets are what they say."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import telltale.cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
HOOKS = ROOT / "docs" / "_hooks"


def fenced(page: Path, *languages: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Every ``telltale ...`` that a page tells a reader to type, as words, with what starts it taken off."""
    found = []
    for block in fenced(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["torchrun"]:
                words = words[words.index("-m") + 1 :]
            if words[:1] == ["telltale"]:
                found.append(words)
    return found


def exists(module: str, name: str) -> bool:
    """Whether ``from module import name`` works: an attribute, or a module of its own."""
    return hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.fixture(scope="module")
def app():
    if not telltale.cli.app.registered_commands:
        telltale.cli._register()
    return get_command(telltale.cli.app)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_documented_commands_parse(page: Path, app) -> None:
    for words in commands(page):
        command, names, rest = app, ["telltale"], words[1:]
        while hasattr(command, "commands"):
            names.append(rest[0])
            command, rest = command.commands[rest[0]], rest[1:]
        assert command.make_context(" ".join(names), list(rest)).params is not None


def test_every_command_is_documented() -> None:
    typed = {tuple(words[1:3]) for page in PAGES for words in commands(page)}
    groups = {
        "pipeline": ("probe", "simulate"),
        "layerskip": ("diagnose",),
        "sharpness": ("measure", "report", "compare"),
    }
    groups |= {"judge": ("features", "fit", "explain", "audit", "score", "evaluate")}
    groups |= {"specguard": ("calibrate", "report", "costs")}
    for group, names in groups.items():
        assert {(group, name) for name in names} <= typed, group
    assert {"train", "plan", "generate", "serve"} <= {words[0] for words in typed}


def test_no_link_is_broken() -> None:
    links = runpy.run_path(str(HOOKS / "check_links.py"))
    assert [line for page in links["pages"]() for line in links["broken"](page)] == []


def test_the_link_checker_finds_a_wrong_file_and_a_wrong_heading(tmp_path: Path) -> None:
    links = runpy.run_path(str(HOOKS / "check_links.py"))
    links["broken"].__globals__["ROOT"] = tmp_path
    (tmp_path / "there.md").write_text("# A heading, `code` and (more)\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md#a-heading-code-and-more) [b](gone.md) [c](there.md#no-heading) `[d](gone.md)`\n")
    assert links["broken"](page) == ["page.md: gone.md is not there.", "page.md: there.md has no heading #no-heading."]


def test_every_figure_is_drawn_and_shown_once() -> None:
    drawn = re.findall(
        r'^@figure\("([\w-]+)"\)$', "".join(path.read_text() for path in HOOKS.glob("*.py")), re.MULTILINE
    )
    shown = re.findall(r"^<!-- figure: ([\w-]+) -->$", "".join(page.read_text() for page in PAGES), re.MULTILINE)
    assert sorted(drawn) == sorted(shown)


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]} <= listed


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_snippets_are_python_and_import_what_there_is(page: Path) -> None:
    for snippet in fenced(page, "python", "py"):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("telltale"):
                for name in node.names:
                    assert exists(node.module, name.name), f"{node.module} has no {name.name}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_prose_is_at_most_100_columns_wide(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "!", "    ", "<!--"))]
    assert [line for line in prose if len(line) > 100] == []


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    words = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    numbers = re.findall(r"(?<![\w.-])\d+(?:[.,]\d+)*", re.sub(r"\]\([^)]*\)", "]", words))
    assert len(text.split()) <= 600
    assert len(numbers) <= 10, numbers
