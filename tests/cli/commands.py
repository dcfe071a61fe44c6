"""One command line, called as a user would, and what it must say when it refuses."""

from __future__ import annotations

from telltale.cli import run


def called(arguments, capsys, code=0):
    found = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured


def refused(arguments, capsys, *words):
    message = called(arguments, capsys, code=2).err
    assert message.count("\n") == 1, message
    for word in ("error:", *words):
        assert word in message, message
