"""Arithmetic over named columns, as a law file writes it: ``0.5*m*v**2 + k*x``. Nothing but arithmetic is understood."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from telltale.errors import ConfigError

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sin": torch.sin,
    "cos": torch.cos,
    "log": torch.log,
    "exp": torch.exp,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
}


def parse(expression: str, names: Iterable[str] | None = None) -> ast.expr:
    """The tree of ``expression``. Raises :class:`~telltale.errors.ConfigError` for anything but arithmetic over ``names``."""
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"expression {expression!r} is no arithmetic: {error.msg}.") from error
    known = None if names is None else set(names)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and id(node) not in called and known is not None and node.id not in known:
            raise ConfigError(
                f"expression {expression!r} names {node.id!r}; known are {', '.join(sorted(known)) or 'none'}."
            )
        if not _allowed(node):
            raise ConfigError(
                f"expression {expression!r} has {type(node).__name__}; only + - * / ** and {', '.join(_FUNCTIONS)} are understood."
            )
    return tree


def evaluate(tree: ast.expr, values: Mapping[str, Any]) -> Any:
    """The value of a parsed expression."""
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.Name):
        return values[tree.id]
    if isinstance(tree, ast.UnaryOp):
        inner = evaluate(tree.operand, values)
        return -inner if isinstance(tree.op, ast.USub) else inner
    if isinstance(tree, ast.BinOp):
        return _BINARY[type(tree.op)](evaluate(tree.left, values), evaluate(tree.right, values))
    assert isinstance(tree, ast.Call)
    assert isinstance(tree.func, ast.Name)
    argument = evaluate(tree.args[0], values)
    if not isinstance(argument, torch.Tensor):  # a Pint quantity: its own arithmetic checks the dimensions
        import numpy

        return getattr(numpy, tree.func.id)(argument)
    return _FUNCTIONS[tree.func.id](argument)


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    if isinstance(node, ast.BinOp):
        return type(node.op) in _BINARY
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, (ast.USub, ast.UAdd))
    if isinstance(node, ast.Call):
        return (
            isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and len(node.args) == 1 and not node.keywords
        )
    return isinstance(node, (ast.Name, ast.Load, ast.operator, ast.unaryop))
