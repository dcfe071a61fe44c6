"""LayerSkip's self-speculative decoding: the early layers (or the text's own n-grams) draft, the whole model decides.

arXiv 2404.16710, section 4.3. Output is that of plain decoding: token-identical when greedy (bit for bit if ``exactness`` is
"exact", else up to rounding at near-ties), equal in law when sampling. The prompt goes through all layers first, so the
first token comes as soon as without drafting; every layer then executes ``prompt + sum(k_i + 1)`` tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from telltale.decode.costs import clock_of, costs_of
from telltale.decode.generation import Decoding, Rounds, Run, greedy_block, padded_prompts, plain_rounds
from telltale.decode.ngram import NgramIndex
from telltale.decode.planner import LONGEST, PLAIN, FixedPlan, OnlinePlan
from telltale.decode.request import whole_number
from telltale.decode.result import SelfSpeculativeStatistics
from telltale.decode.speculation import Round, exit_round, ngram_round
from telltale.errors import ConfigError
from telltale.models.decoder import Decoder

_PROMPT_SHADOWS = 32
"""Prompt tokens at which every exit is read before the first plan."""
_BLOCK = 16
"""Plain tokens between two looks at the plan."""


class SelfSpeculative(Decoding):
    """Draft with layers 0..E-1, verify with E..L-1 over one shared cache.

    ``exit_layer``: E in 1..L-1, or "auto". ``draft_length``: drafts per round (0 is plain decoding), or "auto". What is "auto"
    is chosen online from measured pass costs and running acceptance, which persist across calls on the same object;
    where no draft would pay it decodes plainly. ``drafter``: "exit", "ngram" (drafts copied from the text, no early exit),
    or "both". ``confidence``: stop a draft before a token whose exit probability is below this. Under sampling,
    "auto" draws depend on timing (their law does not); fixed numbers make them reproducible.
    """

    def __init__(
        self,
        model: nn.Module | Decoder,
        exit_layer: int | str = "auto",
        draft_length: int | str = "auto",
        *,
        drafter: Literal["exit", "ngram", "both"] = "exit",
        exactness: Literal["fast", "exact"] = "fast",
        confidence: float | None = None,
        backend: str = "auto",
    ) -> None:
        if drafter not in ("exit", "ngram", "both"):
            raise ConfigError(f"drafter={drafter!r}; expected 'exit', 'ngram' or 'both'.")
        if draft_length != "auto":
            whole_number("draft_length", draft_length, low=0)
        if exit_layer != "auto":
            whole_number("exit_layer", exit_layer, low=1)
        if confidence is not None and (isinstance(confidence, bool) or not 0 < confidence < 1):
            raise ConfigError(f"confidence={confidence!r}; expected a number between 0 and 1, or None.")
        super().__init__(model, backend=backend, exactness=exactness)
        self.largest_exit = self.decoder.layers - 1
        if exit_layer != "auto":
            whole_number("exit_layer", exit_layer, low=1, high=self.largest_exit)
        elif self.largest_exit < 1 and drafter != "ngram":
            raise ConfigError("the model has a single layer, so no layer can draft; use drafter='ngram'.")
        self.exit_layer = exit_layer
        self.draft_length = draft_length
        self.drafter = drafter
        self.confidence = confidence
        self._plans: dict[Any, FixedPlan | OnlinePlan] = {}

    def _statistics(self) -> SelfSpeculativeStatistics:
        return SelfSpeculativeStatistics(exit_layer=self.exit_layer, draft_length=self.draft_length)

    def _plan(self, run: Run) -> FixedPlan | OnlinePlan:
        """The plan for requests of this kind: pass costs depend on the batch, a round's cost also on the sampling."""
        exit_layer, length = self.exit_layer, self.draft_length
        chosen = exit_layer if isinstance(exit_layer, int) else 1
        fixed = isinstance(length, int) and (isinstance(exit_layer, int) or self.drafter == "ngram" or length == 0)
        batch = 1 << (len(run.rows) - 1).bit_length()
        key = None if fixed else (batch, run.request.sampling.plain_greedy, run.request.token_by_token)
        if key not in self._plans:
            if isinstance(length, int) and fixed:
                self._plans[key] = FixedPlan(chosen, length, self.drafter)
            else:
                exits = [exit_layer] if isinstance(exit_layer, int) else list(range(1, self.largest_exit + 1))
                self._plans[key] = OnlinePlan(
                    costs_of(self.decoder, batch),
                    exits=exits if self.drafter != "ngram" else [],
                    lengths=[length] if isinstance(length, int) else range(1, LONGEST + 1),
                    ngrams=self.drafter != "exit",
                )
        return self._plans[key]

    def _prefill(self, run: Run) -> Tensor:
        plan = self._plan(run)
        clock = clock_of(self.decoder)
        if not plan.wants_prompt or max(map(len, run.request.prompts)) < 2:
            return super()._prefill(run)
        ids, last = padded_prompts(run)
        first = [0] * len(last)
        hidden = run.decoder.embed(ids)
        states = []
        window = slice(max(0, len(run.request.prompts[0]) - _PROMPT_SHADOWS), len(run.request.prompts[0]))
        for layer in range(run.decoder.layers):
            hidden = run.decoder.run(hidden, layer, layer + 1, run.cache, first, prefill=True)
            states.append(hidden[0, window])
        started = clock()
        plan.shadow(_agreement(run.decoder, torch.stack(states)), 0.0)
        # Reading the exits here is an investment for the whole life of the object; half of it is charged to this run.
        plan.shadow([[] for _ in states], 0.5 * (clock() - started))
        return hidden[torch.arange(len(last), device=hidden.device), last]

    def _continue(self, run: Run, block: int) -> Rounds:
        if self.draft_length == 0:
            yield from plain_rounds(run, block)
            return
        stats: SelfSpeculativeStatistics = run.stats
        plan = self._plan(run)
        single = len(run.request.prompts) == 1
        indexes: list[NgramIndex] = []
        if self.drafter != "exit":
            indexes = [
                NgramIndex(prompt + tokens)
                for prompt, tokens in zip(run.request.prompts, run.outputs.tokens, strict=True)
            ]
        in_blocks = single and run.request.sampling.plain_greedy and not run.request.token_by_token
        clock = clock_of(self.decoder)
        while run.rows:
            started = clock()
            matches = [indexes[row].match for row in run.rows] if indexes else [0]
            if self.drafter == "ngram":
                match = max(matches)
            else:
                match = min(matches)
            choice = plan.next(match)
            longest = max(run.outputs.remaining(row) for row in run.rows) - 1
            source, exit_layer, length = choice
            length = min(length, longest, run.decoder.max_positions - 1 - max(run.positions()))
            if source == "shadow":
                emitted = self._shadow_step(run, plan)
                stats.plain_steps += len(emitted)
            elif length < 1:
                choice = PLAIN
                if in_blocks:
                    # Without exits to look for, a plain block goes on until an n-gram may match again.
                    count = min(1 if indexes else (block if block == 1 else _BLOCK), longest + 1)
                    emitted = [greedy_block(run, count)]
                else:
                    emitted = run.plain_step()
                stats.plain_steps += sum(map(len, emitted))
                plan.learn(choice, match, 0, 0, (clock() - started) / len(emitted[0]))
            else:
                if source == "ngram":
                    done = ngram_round(run, [indexes[row].draft(length) for row in run.rows])
                else:
                    done = exit_round(run, exit_layer, length, confidence=self.confidence)
                emitted = done.emitted
                seconds = (clock() - started) / len(emitted)
                for drafted, accepted in zip(done.drafted, done.accepted, strict=True):
                    plan.learn(choice, match, drafted, accepted, seconds * len(emitted))
                self._record(run, choice.source, exit_layer, done)
            rows = run.rows
            committed = run.commit(emitted)
            if indexes:
                for row in rows:
                    indexes[row].extend(committed[row])
            yield committed
        stats.planner = plan.describe()

    def _record(self, run: Run, source: str, exit_layer: int, done: Round) -> None:
        """Count a round; drafts confirmed behind an end-of-sequence token are not output and do not count."""
        eos = run.request.eos
        for drafted, accepted, emitted in zip(done.drafted, done.accepted, done.emitted, strict=True):
            if eos:
                for place, token in enumerate(emitted[:accepted]):
                    if token in eos:
                        accepted = place + 1
                        break
            if drafted:
                run.stats.record(source, exit_layer=exit_layer, drafted=drafted, accepted=accepted)
            else:
                run.stats.plain_steps += 1

    def _shadow_step(self, run: Run, plan: FixedPlan | OnlinePlan) -> list[list[int]]:
        """A plain step that also asks every exit what it would have said."""
        clock = clock_of(run.decoder)
        started = clock()
        decoder = run.decoder
        hidden = decoder.embed(torch.tensor(run.last_tokens(), device=decoder.device).view(-1, 1))
        positions = run.positions()
        states = []
        for layer in range(decoder.layers):
            hidden = decoder.run(hidden, layer, layer + 1, run.cache, positions)
            states.append(hidden[0])
        emitted = [[token] for token in run.choose(hidden[:, 0])]
        agreement = _agreement(decoder, torch.stack(states))
        plain = plan.costs.plain if isinstance(plan, OnlinePlan) else 0.0
        plan.shadow(agreement, max(clock() - started - plain, 0.0))
        return emitted


def _agreement(decoder: Decoder, states: Tensor) -> list[list[bool]]:
    """Whether each exit's greedy token is the last layer's, for states (layers, positions, hidden)."""
    tokens = decoder.greedy(states)
    return (tokens == tokens[-1]).tolist()
