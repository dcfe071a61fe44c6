"""What the docs and the README tell a person to type is understood, and every option of the fit is told."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import telltale.cli

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "armorm.md").read_text()
README = (ROOT / "README.md").read_text()


def command(*names: str):
    if not telltale.cli.app.registered_commands:
        telltale.cli._register()
    found = get_command(telltale.cli.app)
    for name in names:
        found = found.commands[name]
    return found


def lines(text: str) -> list[list[str]]:
    """Every command of telltale's judge in the shell blocks of a page, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    typed = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in typed]
    return [line for line in words if line[:2] in (["telltale", "judge"], ["telltale", "serve"])]


@pytest.mark.parametrize("words", [*lines(GUIDE), *lines(README)], ids=" ".join)
def test_a_command_that_is_told_is_understood(words: list[str]) -> None:
    names = words[1:3] if words[1] == "judge" else words[1:2]
    context = command(*names).make_context(" ".join(names), words[1 + len(names) :])
    assert context.params


def test_the_guide_has_its_commands() -> None:
    told = {tuple(words[1:3]) for words in lines(GUIDE)}
    assert told >= {("judge", name) for name in ("features", "fit", "explain", "audit", "score", "evaluate")}
    assert any(words[1] == "serve" for words in lines(GUIDE))


@pytest.mark.parametrize("names", [("judge", "features"), ("judge", "fit"), ("judge", "explain"), ("judge", "audit")])
def test_every_option_is_told(names: tuple[str, ...]) -> None:
    for parameter in command(*names).params:
        for option in parameter.opts:
            assert not option.startswith("--") or option in ("--help",) or option in GUIDE, option


def test_the_gates_options_are_told() -> None:
    from telltale.align.judge.head import GateConfig

    for name in GateConfig.__dataclass_fields__:
        assert f"`{name}`" in GUIDE, name
