"""An induced program: per action, what changes (effects) and when (preconditions), read off transitions of plain states.

Effects are templates per field (unchanged, constant, shifted by a constant, shifted by or set to another field); the
precondition is a conjunction of comparisons that every successful transition meets and the refused ones break. Nothing of
the engine's source or schema is seen. The rules are kept as JSON and compiled into a Python function, so that a step costs
about a microsecond, and can be read, by people and by a later revision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from telltale.errors import DataError
from telltale.world.protocol import Transition
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World

State = tuple[int, ...]
Atom = tuple[int, str, Any]
"""A comparison: left field, operator, and right a constant or ("field", index)."""


@dataclass(frozen=True)
class Rule:
    """One action: ``effects`` {field: (template, argument)} where every comparison of ``conditions`` holds, else nothing.

    Templates: ``set`` to a constant, ``add`` a constant, ``copy`` a field, ``plus`` or ``minus`` a field. Comparisons are
    (left field, operator, right) with right a constant, or ("field", index). ``support``: successful and refused examples.
    """

    effects: dict[int, tuple[str, int]]
    conditions: list[Atom] = field(default_factory=list)
    support: tuple[int, int] = (0, 0)


class Program:
    """Rules by action over states of ``width`` integers; an action without a rule changes nothing."""

    stochastic = False

    def __init__(
        self, rules: dict[int, Rule], width: int, columns: Sequence[str] = (), actions: Sequence[str] = ()
    ) -> None:
        for action, rule in rules.items():
            _check_rule(action, rule, width)
        self.rules, self.width = rules, width
        self.columns = tuple(columns) or tuple(f"x{i}" for i in range(width))
        self.actions = tuple(actions)
        self.source = _source(rules, width)
        scope: dict[str, Any] = {}
        exec(
            compile(self.source, "<induced program>", "exec"), scope
        )  # the source is built from integers and known operators only, which _check_rule saw to
        self.next_state: Callable[[State, int], State] = scope["step"]

    def step(self, belief: State, action: int) -> Transition:
        """The next state."""
        return Transition(self.next_state(belief, int(action)))

    def explain(self) -> str:
        """The rules in words, one action a paragraph."""
        lines = []
        for action, rule in sorted(self.rules.items()):
            name = self.actions[action] if action < len(self.actions) else f"action {action}"
            lines.append(f"{name}   ({rule.support[0]} done, {rule.support[1]} refused)")
            conditions = [
                f"{self.columns[left]} {operator} {self._named(right)}" for left, operator, right in rule.conditions
            ]
            lines.append("  if    " + (" and ".join(conditions) or "always"))
            lines += [
                f"  then  {self.columns[i]} {_WORDS[how]} {self._argument(how, what)}"
                for i, (how, what) in rule.effects.items()
            ]
        return "\n".join(lines)

    def _named(self, right: Any) -> str:
        return self.columns[right[1]] if isinstance(right, (tuple, list)) else str(right)

    def _argument(self, how: str, what: int) -> str:
        return str(what) if how in ("set", "add") else self.columns[what]

    def describe(self) -> dict[str, Any]:
        """Kind and rules, as saved."""
        rules = {str(action): asdict(rule) for action, rule in self.rules.items()}
        return {
            "kind": "program",
            "config": {"rules": rules, "width": self.width, "columns": self.columns, "actions": self.actions},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Program:
        """The program of a saved config."""
        rules = {}
        for action, rule in config["rules"].items():
            effects = {int(i): (str(how), int(what)) for i, (how, what) in rule["effects"].items()}
            conditions = [
                (int(left), str(operator), ("field", int(right[1])) if isinstance(right, list) else int(right))
                for left, operator, right in rule["conditions"]
            ]
            rules[int(action)] = Rule(effects, conditions, tuple(rule["support"]))
        return cls(rules, int(config["width"]), config["columns"], config["actions"])


_WORDS = {"set": "becomes", "add": "changes by", "copy": "becomes", "plus": "grows by", "minus": "shrinks by"}
_OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "==": lambda a, b: a == b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
}


def _check_rule(action: Any, rule: Rule, width: int) -> None:
    """Raise :class:`~telltale.errors.DataError` for anything but known templates and operators over integers: a rule may come
    from a file, and becomes code."""
    numbers = [action, *rule.effects, *(what for _, what in rule.effects.values())]
    fields = [*rule.effects, *(what for how, what in rule.effects.values() if how not in ("set", "add"))]
    known = all(how in _WORDS for how, _ in rule.effects.values())
    for left, operator, right in rule.conditions:
        known = known and operator in _OPERATORS
        fields += [left, right[1]] if isinstance(right, tuple) else [left]
        numbers += [right[1] if isinstance(right, tuple) else right]
    whole = all(type(n) is int for n in (*numbers, *fields)) and all(0 <= field < width for field in fields)
    if not (known and whole):
        raise DataError(
            f"the rule of action {action} is none: {rule}; expected templates {', '.join(_WORDS)} and comparisons "
            f"{', '.join(_OPERATORS)} over fields 0 to {width - 1} and integers."
        )


def fit_program(transitions: Transitions, *, world: World | None = None, seed: int = 0) -> Program:
    """Induce a program. Deterministic: ``seed`` is not used.

    Raises :class:`~telltale.errors.DataError` unless the states are tuples of integers of one length.
    """
    if not transitions.plain or any(
        not isinstance(s, tuple) or len(s) != len(transitions.before[0]) or any(type(v) is not int for v in s)
        for s in (*transitions.before, *transitions.after)
    ):
        raise DataError(
            "a program is induced from states that are tuples of integers; for numeric states use kind ensemble or sindy."
        )
    width = len(transitions.before[0])
    rules = {}
    for action in sorted(set(transitions.actions.tolist())):
        pairs = [
            (before, after)
            for before, taken, after in zip(
                transitions.before, transitions.actions.tolist(), transitions.after, strict=True
            )
            if taken == action
        ]
        rule = _rule(pairs, width)
        if rule is not None:
            rules[int(action)] = rule
    return Program(rules, width, getattr(world, "columns", ()), getattr(world, "action_names", ()))


def _rule(pairs: list[tuple[State, State]], width: int) -> Rule | None:
    done = list({pair for pair in pairs if pair[0] != pair[1]})
    refused = list({before for before, after in pairs if before == after})
    if not done:
        return None
    effects = {i: effect for i in range(width) if (effect := _effect(done, i, width)) is not None}
    # a refused state in which the effects would change nothing says nothing about the precondition
    refused = [state for state in refused if applied(effects, state) != state]
    conditions = _conditions([before for before, _ in done], refused, effects, width)
    return Rule(effects, conditions, (len(done), len(refused)))


def _effect(done: list[tuple[State, State]], i: int, width: int) -> tuple[str, int] | None:
    """The simplest template that explains most of the examples of field ``i``; None where it does not change."""
    if all(before[i] == after[i] for before, after in done):
        return None
    candidates = _templates(done, i, width)
    scored = [
        (sum(_value(how, what, before, i) == after[i] for before, after in done), -rank, (how, what))
        for rank, (how, what) in enumerate(candidates)
    ]
    return max(scored)[2]


def _templates(done: list[tuple[State, State]], i: int, width: int) -> list[tuple[str, int]]:
    """Templates of field ``i`` with the arguments that the examples suggest, simple ones first."""
    shifts = Counter(after[i] - before[i] for before, after in done)
    values = Counter(after[i] for before, after in done)
    found: list[tuple[str, int]] = [("add", shifts.most_common(1)[0][0]), ("set", values.most_common(1)[0][0])]
    for j in range(width):
        if j != i:
            found += [("minus", j), ("plus", j), ("copy", j)]
    return found


def consistent_effects(done: list[tuple[State, State]], width: int) -> dict[int, list[tuple[str, int]]]:
    """By field that changes in an example: all templates that explain every example, or else the one that explains most."""
    found: dict[int, list[tuple[str, int]]] = {}
    for i in range(width):
        best = _effect(done, i, width)
        if best is not None:
            every = [
                effect
                for effect in _templates(done, i, width)
                if all(_value(*effect, before, i) == after[i] for before, after in done)
            ]
            found[i] = every or [best]
    return found


def _value(how: str, what: int, state: State, i: int) -> int:
    if how == "set":
        return what
    if how == "add":
        return state[i] + what
    if how == "copy":
        return state[what]
    return state[i] + state[what] if how == "plus" else state[i] - state[what]


def applied(effects: dict[int, tuple[str, int]], state: State) -> State:
    """The state after ``effects``, whatever the preconditions."""
    return tuple(_value(*effects[i], state, i) if i in effects else value for i, value in enumerate(state))


def _conditions(done: list[State], refused: list[State], effects: dict[int, tuple[str, int]], width: int) -> list[Atom]:
    """What is taken has to be there first (no field seen is negative); then a greedy cover of the refused states by
    comparisons that every done state meets."""
    chosen = [atom for atom in resources(effects) if all(meets(state, atom) for state in done)]
    atoms = atoms_met(done, width)
    left = [state for state in refused if all(meets(state, atom) for atom in chosen)]
    while left:
        counts = [sum(not meets(state, atom) for state in left) for atom in atoms]
        best = max(range(len(atoms)), key=lambda n: (counts[n], _preference(atoms[n], effects)))
        if counts[best] == 0:
            break  # what is left is refused for a reason that no single comparison expresses
        chosen.append(atoms[best])
        left = [state for state in left if meets(state, atoms[best])]
    return chosen


def atoms_met(done: list[State], width: int) -> list[Atom]:
    """Comparisons that every done state meets, as tight as they can be."""
    atoms: list[Atom] = []
    for i in range(width):
        values = {state[i] for state in done}
        if len(values) == 1:
            atoms.append((i, "==", next(iter(values))))
        atoms += [(i, ">=", 1)] if min(values) >= 1 else []
        atoms += [(i, ">=", min(values)), (i, "<=", max(values))]
        atoms += [
            (i, operator, ("field", j))
            for j in range(width)
            for operator in (">=", "<=")
            if j != i and all(_OPERATORS[operator](state[i], state[j]) for state in done)
        ]
    return atoms


def resources(effects: dict[int, tuple[str, int]]) -> list[Atom]:
    """Comparisons that keep a field which an action takes from at 0 or more."""
    found: list[Atom] = []
    for i, (how, what) in effects.items():
        if how == "minus":
            found.append((i, ">=", ("field", what)))
        elif how == "add" and what < 0:
            found.append((i, ">=", -what))
    return found


def _preference(atom: Atom, effects: dict[int, tuple[str, int]]) -> tuple[int, int, int]:
    """Between equally telling comparisons: equality first, then "not empty", then one about a field that the action changes."""
    left, operator, right = atom
    used = {left, right[1]} if isinstance(right, tuple) else {left}
    return (int(operator == "=="), int(operator == ">=" and right == 1), int(bool(used & set(effects))))


def meets(state: State, atom: Atom) -> bool:
    """Whether a comparison holds in a state."""
    left, operator, right = atom
    return _OPERATORS[operator](state[left], state[right[1]] if isinstance(right, tuple) else right)


def _source(rules: dict[int, Rule], width: int) -> str:
    names = ", ".join(f"x{i}" for i in range(width))
    lines = ["def step(state, action):", f"    {names}, = state" if width == 1 else f"    {names} = state"]
    for number, (action, rule) in enumerate(sorted(rules.items())):
        lines.append(f"    {'if' if number == 0 else 'elif'} action == {int(action)}:")
        tests = [
            f"x{left} {op} {f'x{right[1]}' if isinstance(right, tuple) else int(right)}"
            for left, op, right in rule.conditions
        ]
        values = ", ".join(_code(rule.effects[i], i) if i in rule.effects else f"x{i}" for i in range(width))
        lines.append(f"        if {' and '.join(tests) or 'True'}:")
        lines.append(f"            return ({values},)")
    lines.append("    return state")
    return "\n".join(lines) + "\n"


def _code(effect: tuple[str, int], i: int) -> str:
    how, what = effect
    return {
        "set": f"{what}",
        "add": f"x{i} + {what}",
        "copy": f"x{what}",
        "plus": f"x{i} + x{what}",
        "minus": f"x{i} - x{what}",
    }[how]
