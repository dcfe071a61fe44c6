"""Preference and rating files in the forms in which they are published, read into pairs with votes and rated responses.

A row is recognised by its fields, and all rows of a file have one form. Ties and several annotators become votes, which weigh a
pair in the loss. What a file says against itself (a prompt twice, the better response with the lower score, a pair with both
winners) is counted and told. ``FORMS`` says of each form whether real records of it were read when it was written; the others
are "untested".
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telltale.align.judge.data import Conversation, Pair, Ratings, Scale, label_matrix, read_rows
from telltale.errors import DataError
from telltale.models.conversations import Messages, json_kind, read_conversation, read_exchange, read_transcript

HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK = ("instruction_following", "honesty", "truthfulness", "helpfulness")
SIDES = (
    ("response_a", "response_b"),
    ("response_A", "response_B"),
    ("conversation_a", "conversation_b"),
    ("answer_a", "answer_b"),
    ("output_1", "output_2"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response 1", "response 2"),
)
"""Names of two responses that a winner is told of."""
PROMPTS = ("prompt", "question", "instruction", "context", "input")
_FIRST = {"a", "model_a", "response_a", "a>b", "a>>b", "first", "left", "1", "output_1", "response_1", "response1"}
_SECOND = {"b", "model_b", "response_b", "b>a", "b>>a", "second", "right", "2", "output_2", "response_2", "response2"}
_TIED = {"tie", "tie (bothbad)", "both", "both_bad", "bothbad", "neither", "equal", "same", "a=b", "draw"}
_ANNOTATOR = re.compile(r"annotator\d+")
AUTO_J = {0: (1.0, 0.0), 1: (0.0, 1.0), 2: (0.5, 0.5)}
MOST_VOTES = 10**9
Rated = tuple[Conversation, dict[str, Any]]


@dataclass
class Imported:
    """What a file holds: pairs, rated responses with the scales of its form, and what it says against itself."""

    form: str
    pairs: list[Pair] = field(default_factory=list)
    rated: list[Rated] = field(default_factory=list)
    scales: dict[str, Scale] | None = None
    same: int = 0
    """Pairs that were left out because both responses are the same text."""
    told: Counter[str] = field(default_factory=Counter)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the fit should know about the file, most frequent first."""
        found = [f"{count} of the rows: {what}." for what, count in self.told.most_common()]
        if not FORMS[self.form].seen:
            found.append(f"the form {self.form} is untested: no real record of it was at hand when it was written.")
        return tuple(found)

    def ratings(self, scales: dict[str, Scale] | None = None) -> Ratings:
        """The rated responses; ``scales`` None takes the form's own, or 0 to 1 for every objective that occurs."""
        scales = scales or self.scales or {name: Scale() for _, rated in self.rated for name in rated}
        conversations = [conversation for conversation, _ in self.rated]
        rows = [conversation.id for conversation in conversations]
        return Ratings(conversations, label_matrix([rated for _, rated in self.rated], scales, rows=rows), scales)


@dataclass(frozen=True)
class Form:
    """One published form. ``fields``: what a row must have; ``read`` adds a row to what was imported."""

    fields: tuple[str, ...]
    read: Callable[[dict[str, Any], str, Imported], None]
    seen: bool
    """Whether real records were read."""
    scales: Mapping[str, Scale] | None = None


def read_file(path: str | Path) -> Imported:
    """The pairs and ratings of a file in any of ``FORMS``.

    Raises :class:`~telltale.errors.DataError` naming the line for a row of another form, or one that is none.
    """
    found: Imported | None = None
    for where, row in read_rows(path):
        if found is None:
            form = _form_of(row, where)
            scales = FORMS[form].scales
            found = Imported(form, scales=None if scales is None else dict(scales))
        if not all(name in row for name in FORMS[found.form].fields):
            raise DataError(
                f"{where} has {', '.join(row) or 'nothing'}; expected the form {found.form} of the rows before it, with "
                f"{', '.join(FORMS[found.form].fields)}."
            )
        FORMS[found.form].read(row, where, found)
    assert found is not None  # read_rows raises for no rows
    if found.rated and not found.pairs and found.form == "helpsteer":
        found.pairs = _pairs_by(found, "helpfulness")
    _tell_contradictions(found)
    return found


def read_preferences(path: str | Path) -> tuple[list[Pair], int]:
    """Pairs of a file, and how many were left out because both responses are the same text.

    Raises :class:`~telltale.errors.DataError` naming the line for a row that is no pair.
    """
    return checked_pairs(read_file(path), path)


def checked_pairs(found: Imported, path: str | Path) -> tuple[list[Pair], int]:
    """The pairs of an imported file; raises :class:`~telltale.errors.DataError` if there are none."""
    if not found.pairs and found.same:
        raise DataError(f"{path}: both responses are the same in every pair; expected pairs that differ.")
    if not found.pairs:
        raise DataError(
            f"{path} holds no preferences; expected prompt, chosen and rejected, or another form with pairs."
        )
    return found.pairs, found.same


def read_ratings(path: str | Path, scales: dict[str, Scale] | None = None) -> Ratings:
    """Rated conversations of a file. ``scales`` None: the form's own, or 0 to 1 for every objective that occurs.

    Raises :class:`~telltale.errors.DataError` naming the line for a row that is none or a rating off its scale.
    """
    found = read_file(path)
    if not found.rated:
        raise DataError(f"{path} has no ratings; expected a mapping from objectives to numbers.")
    return found.ratings(scales)


def read_conversations(path: str | Path) -> list[Conversation]:
    """Conversations of a file, rated or not."""
    return [Conversation(str(row.get("id", where)), _conversation(row, where)) for where, row in read_rows(path)]


def _form_of(row: dict[str, Any], where: str) -> str:
    for name, form in FORMS.items():
        if all(field in row for field in form.fields):
            return name
    if "response" in row or "messages" in row:
        raise DataError(f"{where} has no ratings; expected a mapping from objectives to numbers.")
    raise DataError(
        f"{where} has {', '.join(row) or 'nothing'}; expected prompt, chosen and rejected; or prompt, response_a, response_b and "
        f"winner; or messages (or prompt and response) and ratings; or another of the forms {', '.join(FORMS)}."
    )


def _conversation(row: dict[str, Any], where: str) -> Messages:
    if "messages" in row:
        return read_conversation(row["messages"], name=f"{where}: messages")
    if "prompt" not in row or not isinstance(row.get("response"), str):
        raise DataError(f"{where} has {', '.join(row) or 'nothing'}; expected messages, or prompt and response.")
    return read_exchange(row["prompt"], row["response"], name=f"{where}: response", prompt_name=f"{where}: prompt")


def _read_rated(row: dict[str, Any], where: str, found: Imported) -> None:
    if not isinstance(row["ratings"], dict):
        raise DataError(f"{where} has no ratings; expected a mapping from objectives to numbers.")
    found.rated.append((Conversation(str(row.get("id", where)), _conversation(row, where)), row["ratings"]))


def _read_helpsteer(row: dict[str, Any], where: str, found: Imported) -> None:
    ratings = {name: row[name] for name in HELPSTEER if row.get(name) is not None}
    for name, value in ratings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 4:
            raise DataError(f"{where} rates {name!r} as {str(value)[:40]!r}; expected a number from 0 to 4.")
    found.rated.append((Conversation(str(row.get("id", where)), _conversation(row, where)), ratings))


def _read_ultrafeedback(row: dict[str, Any], where: str, found: Imported) -> None:
    """Four aspects from 1 to 5, "N/A" for missing. Pairs go by the mean of the aspects, not by ``overall_score``, which is known
    to be 10 for some responses that the critique calls poor."""
    whole: list[tuple[str, Messages, float | None]] = []
    if not isinstance(row["completions"], list):
        raise DataError(f"{where}: completions is {json_kind(row['completions'])}; expected an array of responses.")
    for number, completion in enumerate(row["completions"]):
        place = f"{where}: completions[{number}]"
        if not isinstance(completion, Mapping) or not isinstance(completion.get("response"), str):
            raise DataError(f"{place} has no response; expected a text.")
        chat = read_exchange(row["instruction"], completion["response"], name=f"{place}.response")
        ratings = _aspects(completion.get("annotations") or {}, place)
        found.rated.append((Conversation(place, chat), ratings))
        mean = sum(ratings.values()) / len(ratings) if ratings else None
        whole.append((place, chat, mean))
        overall = completion.get("overall_score")
        if mean is not None and isinstance(overall, (int, float)) and overall >= 9 and mean <= 2:
            found.told["overall_score is 9 or more where the aspects are 2 or less on average"] += 1
    for index, (place, chat, mean) in enumerate(whole):
        for _, other, rival in whole[index + 1 :]:
            if mean is not None and rival is not None:
                _add(found, f"{place} and after", chat[:-1], chat[-1]["content"], other[-1]["content"], mean - rival)


def _aspects(annotations: Any, place: str) -> dict[str, float]:
    found = {}
    for name in ULTRAFEEDBACK:
        aspect = (annotations.get(name) or {}) if isinstance(annotations, Mapping) else annotations
        rating = aspect.get("Rating") if isinstance(aspect, Mapping) else aspect
        if rating in (None, "N/A", ""):
            continue
        try:
            found[name] = float(rating)
            if isinstance(rating, bool) or not 1 <= found[name] <= 5:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{place} rates {name!r} as {rating!r}; expected a number from 1 to 5, or N/A.") from None
    return found


def _read_transcripts(row: dict[str, Any], where: str, found: Imported) -> None:
    chosen, rejected = (read_transcript(row[name], name=f"{where}: {name}") for name in ("chosen", "rejected"))
    sides = [read_conversation(side, name=where) for side in (chosen, rejected)]
    if sides[0][:-1] != sides[1][:-1]:
        found.told["chosen and rejected follow different prompts, left out"] += 1
        return
    _add(found, str(row.get("id", where)), sides[0][:-1], sides[0][-1]["content"], sides[1][-1]["content"], 1.0)


def _read_chosen(row: dict[str, Any], where: str, found: Imported) -> None:
    if _is_transcript(row["chosen"]) and _is_transcript(row["rejected"]) and row.get("prompt") in (None, [], ""):
        _read_transcripts(row, where, found)
        return
    told: list[str] = []
    prompt = row.get("prompt")
    chosen, rejected = (
        read_exchange(prompt, row[name], name=f"{where}: {name}", prompt_name=f"{where}: prompt", told=told)
        for name in ("chosen", "rejected")
    )
    if chosen[:-1] != rejected[:-1]:
        raise DataError(f"{where}: chosen and rejected follow different prompts; expected one prompt for both.")
    for what in set(told):
        found.told[what] += 1
    _tell_unread(row, found)
    scores = [_score(row.get(name)) for name in ("score_chosen", "score_rejected")]
    if scores[0] is not None and scores[1] is not None:
        if scores[0] < scores[1]:
            found.told["the chosen response has the lower score"] += 1
        elif scores[0] == scores[1]:
            found.told["both responses have the same score, so the pair counts as a tie"] += 1
            _add(found, str(row.get("id", where)), chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], 0.0)
            return
    _add(found, str(row.get("id", where)), chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], 1.0)


def _score(value: Any) -> float | None:
    """A score, also one that a table wrote as text; None for anything else."""
    try:
        found = None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if found is None or math.isnan(found) else found


def _tell_unread(row: Mapping[str, Any], found: Imported) -> None:
    if any(isinstance(row.get(name), str) and row[name].strip() for name in ("system", "system_prompt")):
        found.told["a system text beside the prompt was not read; give it as the first message of the prompt"] += 1


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _read_sided(row: dict[str, Any], where: str, found: Imported) -> None:
    """Two responses, and a winner, votes, or a preference."""
    one, other = next(names for names in SIDES if all(name in row for name in names))
    asked = next((row[name] for name in PROMPTS if row.get(name) not in (None, "", [])), None)
    if row.get("instruction") and row.get("input"):
        asked = f"{row['instruction']}\n\n{row['input']}"
    told: list[str] = []
    if found.form == "pandalm" and any(isinstance(row[name], (bool, int, float)) for name in (one, other)):
        # Some of its responses ("false", "44") were published as JSON values.
        row = row | {name: row[name] if isinstance(row[name], str) else json.dumps(row[name]) for name in (one, other)}
        told.append("a response is a bare true, false or number, read as that text")
    first, second = (
        read_exchange(asked, row[name], name=f"{where}: {name}", prompt_name=f"{where}: prompt", told=told)
        for name in (one, other)
    )
    for what in set(told):
        found.told[what] += 1
    _tell_unread(row, found)
    votes = _votes(row, found.form, where)
    if first[:-1] != second[:-1]:
        # Arena's later turns answer different texts.
        found.told["the two responses follow different conversations, left out"] += 1
        return
    name = str(row.get("id", row.get("pair_id", where)))
    _add(found, name, first[:-1], first[-1]["content"], second[-1]["content"], votes[0] - votes[1], votes=votes)


def _votes(row: dict[str, Any], form: str, where: str) -> tuple[float, float]:
    """Votes for the first and for the second response; a tie is half a vote for each. Only the fields of ``form`` are read: an
    annotator's id or the strength of a preference beside a winner is no vote."""
    if form == "auto-j":  # counts from 0, and 2 is a tie
        told = row["label"]
        if isinstance(told, bool) or not isinstance(told, int) or told not in AUTO_J:
            raise DataError(f"{where} has the label {told!r}; expected 0 (the first), 1 (the second) or 2 (a tie).")
        return AUTO_J[told]
    if form.startswith("helpsteer"):  # below 0: the first is better
        scores = row.get("individual_preference")
        if isinstance(scores, list) and scores:
            return _summed(
                [_by_strength(one.get("score") if isinstance(one, Mapping) else one, where) for one in scores]
            )
        return _by_strength(row["overall_preference" if "3" in form else "preference_strength"], where)
    if form == "preference of b":
        share = _share(row["preference_for_b"], where, "preference_for_b", 0.0)
        return (1.0 - share, share)
    if form == "votes":
        counts = [_count(row, name, where) for name in ("votes_a", "votes_b")]
        ties = _count(row, "votes_tie", where) if "votes_tie" in row else 0.0
        return (counts[0] + ties / 2, counts[1] + ties / 2)
    if form == "pandalm":
        names = [name for name in sorted(row) if _ANNOTATOR.fullmatch(name) and row[name] is not None]
        if names:
            return _summed([(0.5, 0.5) if str(row[one]) == "0" else _won(row[one], where) for one in names])
    if form == "alpacaeval" and isinstance(row["preference"], float):  # 1 is the first output, 2 the second
        share = _share(row["preference"], where, "preference", 1.0)
        return (1.0 - share, share)
    own = {"judgebench": "label", "llmbar": "label", "alpacaeval": "preference"}.get(form, "winner")
    told = next((row[name] for name in (own, "label", "preferred", "preference") if row.get(name) is not None), None)
    if isinstance(told, list) and told:
        return _summed([_won(one, where) for one in told])
    return _won(told, where)


def _summed(votes: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return (sum(one for one, _ in votes), sum(other for _, other in votes))


def _by_strength(strength: Any, where: str) -> tuple[float, float]:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or strength != strength:
        raise DataError(f"{where} has the preference {strength!r}; expected a number below, at or above 0.")
    return (1.0, 0.0) if strength < 0 else (0.0, 1.0) if strength > 0 else (0.5, 0.5)


def _share(value: Any, where: str, name: str, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= least + 1:
        raise DataError(f"{where}: {name} is {value!r}; expected a number from {least:g} to {least + 1:g}.")
    return float(value) - least


def _count(row: Mapping[str, Any], name: str, where: str) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST_VOTES:
        raise DataError(f"{where}: {name} is {value!r}; expected a number of votes.")
    return float(value)


def _won(told: Any, where: str) -> tuple[float, float]:
    word = str(told).strip().lower().strip("[]")
    for words, votes in ((_FIRST, (1.0, 0.0)), (_SECOND, (0.0, 1.0)), (_TIED, (0.5, 0.5))):
        if told is not None and not isinstance(told, bool) and word in words:
            return votes
    raise DataError(f"{where} names the winner {told!r}; expected a, b or tie (or A>B, model_a, 1, 2 and the like).")


def _add(
    found: Imported,
    name: str,
    prompt: Messages,
    first: str,
    second: str,
    margin: float,
    *,
    votes: tuple[float, float] | None = None,
) -> None:
    """One pair, the better response first; by ``votes``, or one vote in the direction of ``margin`` (0: half each)."""
    if first == second:
        found.same += 1
        return
    if votes is None:
        votes = (0.5, 0.5) if margin == 0 else (1.0, 0.0) if margin > 0 else (0.0, 1.0)
    if sum(votes) <= 0:
        found.told["nobody voted, left out"] += 1
        return
    if votes[0] < votes[1]:
        first, second, votes = second, first, (votes[1], votes[0])
    found.pairs.append(Pair(name, prompt, first, second, votes))


def _pairs_by(found: Imported, objective: str) -> list[Pair]:
    """Pairs of responses to one prompt by one of their ratings; equal ratings are ties."""
    by_prompt: dict[str, list[Rated]] = {}
    for conversation, rated in found.rated:
        if rated.get(objective) is not None:
            by_prompt.setdefault(json.dumps(conversation.messages[:-1]), []).append((conversation, rated))
    made = Imported(found.form)
    for group in by_prompt.values():
        for index, (one, rated) in enumerate(group):
            for other, rival in group[index + 1 :]:
                texts = one.messages[-1]["content"], other.messages[-1]["content"]
                margin = float(rated[objective]) - float(rival[objective])
                _add(made, f"{one.id} and {other.id}", one.messages[:-1], *texts, margin)
    found.same += made.same
    return made.pairs


def _tell_contradictions(found: Imported) -> None:
    """Count pairs that occur with either winner, and those that are repeated with the same one."""
    winners: dict[str, set[str]] = {}
    again = 0
    for pair in found.pairs:
        if pair.votes[0] > pair.votes[1]:
            key = json.dumps([pair.prompt, *sorted((pair.chosen, pair.rejected))])
            known = winners.setdefault(key, set())
            again += pair.chosen in known
            known.add(pair.chosen)
    if again:
        found.told["a pair that was there already, with the same winner; it counts again"] += again
    both = sum(len(texts) > 1 for texts in winners.values())
    if both:
        found.told["the same pair is decided in both ways; every row counts as a vote"] += both


_ASPECTS = {name: Scale(1, 5, bins=5) for name in ULTRAFEEDBACK}
FORMS: dict[str, Form] = {
    "rated": Form(("ratings",), _read_rated, seen=True),
    "ultrafeedback": Form(("instruction", "completions"), _read_ultrafeedback, seen=True, scales=_ASPECTS),
    "chosen and rejected": Form(("chosen", "rejected"), _read_chosen, seen=True),
    "judgebench": Form(("question", "response_A", "response_B", "label"), _read_sided, seen=True),
    "helpsteer2 preferences": Form(("response_1", "response_2", "preference_strength"), _read_sided, seen=False),
    "helpsteer3 preferences": Form(
        ("context", "response1", "response2", "overall_preference"), _read_sided, seen=False
    ),
    "pandalm": Form(("instruction", "response1", "response2", "annotator1"), _read_sided, seen=True),
    "auto-j": Form(("prompt", "response 1", "response 2", "label"), _read_sided, seen=True),
    "chatbot arena": Form(("conversation_a", "conversation_b", "winner"), _read_sided, seen=False),
    "llmbar": Form(("input", "output_1", "output_2", "label"), _read_sided, seen=True),
    "alpacaeval": Form(("instruction", "output_1", "output_2", "preference"), _read_sided, seen=False),
    "preference of b": Form(("response_a", "response_b", "preference_for_b"), _read_sided, seen=True),
    "votes": Form(("response_a", "response_b", "votes_a", "votes_b"), _read_sided, seen=True),
    "winner": Form(("response_a", "response_b", "winner"), _read_sided, seen=True),
    "helpsteer": Form(
        ("prompt", "response", "helpfulness"),
        _read_helpsteer,
        seen=False,
        scales={name: Scale(0, 4, bins=5) for name in HELPSTEER},
    ),
}
"""By name, the most particular first."""
