"""What has been committed to each row so far, and whether the row is done: end-of-sequence, stop strings, length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from telltale.decode.request import Request


class Outputs:
    """New tokens per row of a request, and why each row ended (None while it goes on)."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: list[list[int]] = [[] for _ in request.prompts]
        self.reasons: list[str | None] = [None] * len(request.prompts)
        self._limit = request.max_new_tokens
        self._eos = request.eos
        self._watched = request.token_by_token
        # The token that completes a stop string ends within this many tokens of its start, one byte a token at worst.
        self._window = 8 + max((len(stop.encode()) for stop in request.stop_strings), default=0)

    def commit(self, row: int, new: Sequence[int]) -> list[int]:
        """Append what of ``new`` belongs to the row (nothing after its end) and return that."""
        if self._watched:
            return self._commit_watched(row, new)
        out = self.tokens[row]
        kept = list(new[: self._limit - len(out)])
        eos = self._eos
        if eos:
            for index, token in enumerate(kept):
                if token in eos:
                    del kept[index + 1 :]
                    self.reasons[row] = "eos"
                    break
        out.extend(kept)
        if len(out) >= self._limit and self.reasons[row] is None:
            self.reasons[row] = "length"
        return kept

    def remaining(self, row: int) -> int:
        """Tokens that the row may still get."""
        return self._limit - len(self.tokens[row])

    def padded(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens (batch, longest) with the request's padding, and lengths (batch,)."""
        lengths = [len(row) for row in self.tokens]
        longest = max(lengths)
        pad = self.request.pad_token_id
        rows = [row + [pad] * (longest - len(row)) for row in self.tokens]
        return torch.tensor(rows, dtype=torch.int64, device=device), torch.tensor(lengths, device=device)

    def _commit_watched(self, row: int, new: Sequence[int]) -> list[int]:
        out = self.tokens[row]
        kept = []
        for token in new:
            out.append(token)
            kept.append(token)
            self.reasons[row] = self._reason(row, out)
            if self.reasons[row] is not None:
                break
        return kept

    def _reason(self, row: int, out: list[int]) -> str | None:
        request = self.request
        if out[-1] in self._eos:
            return "eos"
        if request.stop_strings:
            text = request.tokenizer.decode(out[-self._window :])
            if any(stop in text for stop in request.stop_strings):
                return "stop_string"
        if len(out) >= self._limit:
            return "length"
        if request.ends is not None and request.ends(row, out):
            return "stop_string"
        return None
