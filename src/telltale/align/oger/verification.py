"""Calling a verifier: a reward function as TRL has it, used for rollouts and teacher traces alike.

A verifier takes ``prompts`` and ``completions`` (texts, or lists of messages in a conversation) and the dataset's other columns as
keyword arguments, and returns one number or None per completion. What is above 0 counts as correct. Its verdict gates the
exploration bonus.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from telltale.errors import ConfigError, DataError

Verifier = Callable[..., Sequence[float | None]]
BATCH = 1024


def judge_texts(
    verifier: Verifier, prompts: Sequence[Any], texts: Sequence[str], columns: dict[str, list[Any]]
) -> list[float]:
    """The verifier's rewards of ``texts`` (NaN for None); a text becomes a message where its prompt is a conversation.

    Raises :class:`~telltale.errors.DataError` if the verifier fails, or returns another number of rewards.
    """
    rewards: list[float] = []
    for start in range(0, len(texts), BATCH):
        part = slice(start, start + BATCH)
        some = list(prompts[part])
        completions = [as_completion(prompt, text) for prompt, text in zip(some, texts[part], strict=True)]
        own = {key: values[part] for key, values in columns.items()}
        where = f"the texts {start} to {start + len(some) - 1}"
        rewards.extend(verdicts(verifier, some, completions, own, where=where))
    return rewards


def verdicts(
    verifier: Verifier,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    *,
    where: str = "a batch of completions",
) -> list[float]:
    """One call of the verifier: its rewards, NaN for None.

    Raises :class:`~telltale.errors.DataError` if it fails, returns another number of rewards, or one that is infinite.
    """
    name = getattr(verifier, "__name__", type(verifier).__name__)
    try:
        given = verifier(prompts=prompts, completions=completions, **columns)
        found = [math.nan if reward is None else float(reward) for reward in given]
    except Exception as error:
        raise DataError(
            f"the verifier {name} failed on {where}, {type(error).__name__}: {error}. It is called with prompts, completions "
            f"and the columns {', '.join(sorted(columns)) or '(none)'} as keyword arguments, and returns a number or None each."
        ) from error
    if len(found) != len(completions):
        raise DataError(
            f"the verifier {name} returned {len(found)} rewards for {len(completions)} texts; expected one each."
        )
    if any(math.isinf(reward) for reward in found):
        raise DataError(f"the verifier {name} returned an infinite reward on {where}; expected finite numbers or None.")
    return found


def as_completion(prompt: Any, text: str) -> Any:
    """``text`` as TRL would hand it to a reward function, after such a prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def text_of(value: Any) -> str:
    """The text of a prompt or completion, plain or conversational: the contents of its messages, line by line."""
    if isinstance(value, str):
        return value
    return "\n".join(str(message.get("content") or "") for message in value)


def load_verifier(name: str, known: Mapping[str, Verifier]) -> Verifier:
    """A verifier by its name in ``known``, or as ``file.py:function``.

    Raises :class:`~telltale.errors.ConfigError` if there is none, the file cannot be run, or what it names is no plain function.
    """
    if name in known:
        return known[name]
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ConfigError(f"verifier={name!r} is unknown; expected one of {', '.join(known)}, or file.py:function.")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"verifier={name!r}: there is no file {path}; expected file.py:function.")
    specification = importlib.util.spec_from_file_location(f"verifier_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"verifier={name!r}: {path} cannot be run, {type(error).__name__}: {error}.") from error
    found = getattr(module, function, None)
    if found is None:
        raise ConfigError(f"verifier={name!r}: {path} has no {function}; expected a function of that name.")
    return checked_verifier(found)


def checked_verifier(verifier: Any) -> Verifier:
    """``verifier`` itself. Raises :class:`~telltale.errors.ConfigError` unless it is a plain (not async) function."""
    if not callable(verifier) or isinstance(verifier, type):
        raise ConfigError(f"verifier={verifier!r} cannot be called; expected a function of prompts and completions.")
    if inspect.iscoroutinefunction(verifier) or inspect.iscoroutinefunction(type(verifier).__call__):
        raise ConfigError(
            "an async verifier is not supported; expected a plain function. Other async rewards go in reward_funcs."
        )
    if hasattr(verifier, "parameters"):
        raise ConfigError(
            "the verifier is a model; expected a function. A reward model goes in reward_funcs beside a verifier."
        )
    return verifier
