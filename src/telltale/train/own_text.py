"""Text that a model writes itself, from prompts that the user's files give, and what the frozen model makes of it: what draft exits
are trained and judged on.

Acceptance counts on the model's own output. A chat's prompt goes through the checkpoint's chat template; other files give
beginnings, which the model carries on. Everything is a function of the seed. One pass over the texts leaves a record for every
token, in a file that is mapped: the states after the exits and after the last layer, and the late layers' values. It takes
(exits + 1) x hidden + late layers x kv heads x head dim numbers of the model's dtype: 5 KB for SmolLM2-135M with two exits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from telltale.errors import CheckpointError, DataError
from telltale.models.conversations import ConversationError, read_messages, read_prompt
from telltale.models.decoder import Decoder
from telltale.tasks.code import read_texts

HELD_OUT = 0.1
"""Part of the sources (chats, files, or the end of a single file) that prompts are held out from."""
TEXTS_PER_PASS = 16
"""Texts that the trunk reads together."""
_CHARACTERS = 8
"""Of a file, for each token of a beginning that is wanted: more than any tokenizer needs."""
_TRIES = 64
"""Prompts of a source that may be too long."""
_CHOICES = 64
"""Most likely tokens that a sampled one is drawn from."""


@dataclass(frozen=True)
class Prompt:
    """``tokens`` of a prompt, and the file it is from."""

    tokens: list[int]
    source: str


@dataclass(frozen=True)
class Written:
    """A prompt with what the model wrote behind it: ``tokens``, of which the first ``prompt`` were given."""

    tokens: list[int]
    prompt: int
    source: str


class Prompts:
    """Prompts of at most ``longest`` tokens, drawn from the files at ``paths``, each path as often as any other.

    A ``.jsonl`` file holds chats, one a line, as ``messages``, or as a ``prompt``; other files are text; a folder is all of both.
    Raises :class:`~telltale.errors.DataError` naming what cannot be used.
    """

    def __init__(self, paths: Sequence[str | Path], tokenizer: Any, *, longest: int, seed: int) -> None:
        self.names = [Path(path).name for path in paths]
        self._tokenizer, self._longest, self._seed = tokenizer, longest, seed
        read = [self._read(Path(path)) for path in paths]
        self.digest = hashlib.blake2b(json.dumps(read).encode(), digest_size=16).hexdigest()
        """32 hexadecimal digits for what was read: a run goes on with the same texts alone."""
        self._sources = [self._split(sources, str(path)) for sources, path in zip(read, paths, strict=True)]

    def draw(self, count: int, *, held_out: bool = False) -> list[Prompt]:
        """``count`` prompts, of the sources for training or of the held-out ones; the first stay the same as ``count`` grows."""
        generator = torch.Generator().manual_seed(2 * self._seed + held_out)
        found: list[Prompt] = []
        for index in range(count):
            sources = self._sources[index % len(self._sources)][held_out]
            tried = (sources[int(torch.randint(len(sources), (), generator=generator))] for _ in range(_TRIES))
            prompts = (self._prompt(source, generator) for source in tried)
            fitting = next((one for one in prompts if 0 < len(one.tokens) <= self._longest), None)
            if fitting is None:
                raise DataError(
                    f"none of {_TRIES} prompts of {sources[0][0]} has 1 to {self._longest} tokens; raise new_tokens, or "
                    f"give longer texts."
                )
            found.append(fitting)
        return found

    def _read(self, path: Path) -> list[tuple[str, Any]]:
        """The sources at ``path``: (name, a text, or the messages of a chat)."""
        texts = read_texts(path, also=(".jsonl",))
        found: list[tuple[str, Any]] = []
        for file, text in texts.items():
            if file.suffix == ".jsonl":
                found += [(file.name, chat) for chat in self._chats(file, text)]
            else:
                found.append((file.name, text))
        return found

    def _chats(self, file: Path, text: str) -> Iterator[list[dict[str, str]]]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise DataError(
                f"{file} holds chats, and the checkpoint has no chat template; expected files of plain text."
            )
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not ("messages" in record or "prompt" in record):
                    raise DataError(f"{file}, line {number}: expected an object with messages, or with a prompt.")
                chat = read_messages(record["messages"]) if "messages" in record else read_prompt(record["prompt"])
            except (json.JSONDecodeError, ConversationError) as error:
                raise DataError(f"{file}, line {number}: {error}") from error
            while chat and chat[-1]["role"] == "assistant":
                chat = chat[:-1]
            if chat:
                yield chat

    def _split(self, sources: list[tuple[str, Any]], path: str) -> tuple[list[Any], list[Any]]:
        """Sources to train on, and those held out; a single text is cut."""
        if len(sources) == 1 and isinstance(sources[0][1], str):
            name, text = sources[0]
            cut = int(len(text) * (1 - HELD_OUT))
            sources = [(name, text[:cut]), (name, text[cut:])]
        if len(sources) < 2:
            raise DataError(
                f"{path} holds {'a single chat' if sources else 'no chat with a prompt'}; expected several, some of which are held "
                "out."
            )
        order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(self._seed)).tolist()
        held = max(1, round(len(sources) * HELD_OUT))
        if len(sources) == 2:
            order = [1, 0]
        return [sources[place] for place in order[held:]], [sources[place] for place in order[:held]]

    def _prompt(self, source: tuple[str, Any], generator: torch.Generator) -> Prompt:
        name, content = source
        if not isinstance(content, str):
            try:
                text = self._tokenizer.apply_chat_template(content, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # templates raise errors of their own
                raise DataError(
                    f"the checkpoint's chat template does not take a chat of {name} with the roles "
                    f"{', '.join(one['role'] for one in content)}: {error}"
                ) from error
            return Prompt(self._tokenizer(text, add_special_tokens=False)["input_ids"], name)
        length = int(torch.randint(max(1, self._longest // 4), self._longest + 1, (), generator=generator))
        room = max(1, len(content) - _CHARACTERS * length)
        start = int(torch.randint(room, (), generator=generator))
        start = content.find("\n", start, start + _CHARACTERS * length // 2) + 1 if start else 0
        tokens = self._tokenizer(content[start : start + _CHARACTERS * length])["input_ids"][:length]
        return Prompt(tokens, name)


def write(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    temperatures: Sequence[float],
    end_tokens: Sequence[int],
    generator: torch.Generator,
    report: Callable[[int], bool] = lambda _: True,
) -> list[Written] | None:
    """Have the model carry on all ``prompts`` together, each at its own temperature (0 takes the most likely token).

    ``report`` is told how many tokens there are behind each, and says whether to go on; None if not.
    """
    count, longest = len(prompts), max(len(one.tokens) for one in prompts)
    cache = decoder.new_cache(count, longest + new_tokens)
    ids = torch.tensor([one.tokens + [0] * (longest - len(one.tokens)) for one in prompts], device=decoder.device)
    hidden = decoder.forward(ids, cache, [0] * count, prefill=True)
    lengths = [len(one.tokens) for one in prompts]
    last = hidden[torch.arange(count), torch.tensor(lengths) - 1]
    heat = torch.tensor(temperatures).view(-1, 1)
    rows = [list(one.tokens) for one in prompts]
    going = list(range(count))
    for index in range(new_tokens):
        if not report(index):
            return None
        chosen = _chosen(decoder.logits(last).cpu(), heat[going], generator)
        for row, token in zip(going, chosen, strict=True):
            rows[row].append(token)
        kept = [place for place, token in enumerate(chosen) if token not in end_tokens]
        going = [going[place] for place in kept]
        if not going or index == new_tokens - 1:
            break
        newest = torch.tensor([[chosen[place]] for place in kept], device=decoder.device)
        last = decoder.forward(newest, cache.select(going), [lengths[row] + index for row in going])[:, 0]
    return [Written(tokens, len(one.tokens), one.source) for one, tokens in zip(prompts, rows, strict=True)]


def _chosen(logits: Tensor, heat: Tensor, generator: torch.Generator) -> list[int]:
    """A token for each row of ``logits``: the largest of its logits plus ``heat`` times Gumbel noise."""
    values, tokens = logits.topk(min(_CHOICES, logits.shape[-1]))
    noise = -torch.empty_like(values).exponential_(generator=generator).log()
    return tokens.gather(1, (values + heat * noise).argmax(-1, keepdim=True)).view(-1).tolist()


class TrunkStates:
    """Records of ``tokens`` tokens, text after text. ``written`` (tokens,): whether the model's prediction behind a token is of its
    own text; ``since`` (tokens,): tokens of the same text before it."""

    def __init__(
        self, path: Path, records: Tensor, texts: Sequence[Written], exits: Sequence[int], decoder: Decoder
    ) -> None:
        self._path, self._records, self._hidden, self._device = path, records, decoder.hidden_size, decoder.device
        self._place = {layer: place for place, layer in enumerate(exits)}
        lengths = [len(one.tokens) for one in texts]
        self.tokens = sum(lengths)
        self.before = torch.cat([torch.arange(length) for length in lengths])
        self.written = torch.cat([torch.arange(len(one.tokens)) >= one.prompt - 1 for one in texts])
        # The last token's prediction is of a text that goes on or is over.
        self.written[torch.tensor(lengths).cumsum(0) - 1] = False

    def exit(self, layer: int, rows: Tensor) -> Tensor:
        """States (n, hidden) after an exit's layer."""
        first = self._place[layer] * self._hidden
        return self._records[rows, first : first + self._hidden].to(self._device)

    def last(self, rows: Tensor) -> Tensor:
        """States (n, hidden) after the last layer, before the final norm."""
        first = len(self._place) * self._hidden
        return self._records[rows, first : first + self._hidden].to(self._device)

    def values(self, rows: Tensor, step: int) -> Tensor:
        """The late layers' values at the token that is verified when these are drafted in ``step``: ``step`` + 1 before them, zero
        where the text does not reach back that far."""
        back = step + 1
        there = self.before[rows] >= back
        found = self._records[(rows - back).clamp(min=0), (len(self._place) + 1) * self._hidden :]
        return (found * there.unsqueeze(-1)).to(self._device)

    def close(self) -> None:
        """Remove the file."""
        self._records = torch.empty(0)
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> TrunkStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def collect(
    decoder: Decoder,
    texts: Sequence[Written],
    *,
    exits: Sequence[int],
    late_layers: Sequence[int],
    path: Path,
    report: Callable[[int, int], bool],
) -> TrunkStates:
    """Read ``texts`` once and keep what :class:`TrunkStates` holds in the file ``path``.

    ``report`` is told how many texts are done of how many, and says whether to go on.
    """
    late_size = len(late_layers) * decoder.kv_heads * decoder.head_dim
    size = (len(exits) + 1) * decoder.hidden_size + late_size
    tokens = sum(len(one.tokens) for one in texts)
    path.unlink(missing_ok=True)
    _set_aside(path, tokens * size * decoder.dtype.itemsize)
    records = torch.from_file(str(path), shared=True, size=tokens * size, dtype=decoder.dtype).view(tokens, size)
    starts = torch.tensor([0, *[len(one.tokens) for one in texts]]).cumsum(0).tolist()
    # Texts of like lengths share a pass, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place].tokens))
    for first in range(0, len(texts), TEXTS_PER_PASS):
        if not report(first, len(texts)):
            break
        places = order[first : first + TEXTS_PER_PASS]
        whole = _records(decoder, [texts[place].tokens for place in places], exits, late_layers)
        for row, place in enumerate(places):
            count = len(texts[place].tokens)
            records[starts[place] : starts[place] + count] = whole[row, :count]
    report(len(texts), len(texts))
    return TrunkStates(path, records, texts, exits, decoder)


def _set_aside(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes: to write to a mapping of a file with holes kills the process on a full disk."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}, which takes {size / 1e6:.0f} MB: {error}") from error


def _records(
    decoder: Decoder, rows: Sequence[Sequence[int]], exits: Sequence[int], late_layers: Sequence[int]
) -> Tensor:
    """The records (rows, longest, size) of some texts, filled up on the right."""
    count, longest = len(rows), max(map(len, rows))
    ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in rows], device=decoder.device)
    cache = decoder.new_cache(count, longest)
    hidden, found = decoder.embed(ids), []
    edges = [0, *exits, decoder.layers]
    for start, stop in itertools.pairwise(edges):
        hidden = decoder.run(hidden, start, stop, cache, [0] * count, prefill=True)
        found.append(hidden)
    found += [cache.read(layer, longest)[1].transpose(1, 2).flatten(2) for layer in late_layers]
    return torch.cat(found, -1).cpu()
