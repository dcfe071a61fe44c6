"""Keys and values of texts that were read before, for rows that begin with the same tokens: a trie of pieces, of bounded size.

Only what is exact is served. A prompt is read in pieces that end at multiples of ``piece``. Where a pass rounds by its width, a
piece is served to a prompt that has exactly this piece, which is what its own reading would have computed. Where rounding does not
depend on the width (``exact``: the native backend), any common beginning is served, token by token, and outputs are kept as well.
The least recently used pieces leave first; a piece never leaves before those behind it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from telltale.config import check_integer
from telltale.decode.model_state import Part


@dataclass(eq=False)
class _Node:
    """A piece behind its parent's, and what each of the engine's states has made of it."""

    tokens: tuple[int, ...] = ()
    parent: _Node | None = None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    parts: dict[int, Part] = field(default_factory=dict)


class PrefixCache:
    """Parts of rows by the tokens that lead to them. One thread at a time.

    ``limit``: bytes that are kept at most. ``piece``: tokens of a whole piece. ``exact``: see above.
    Raises :class:`~telltale.errors.ConfigError` for numbers below 1.
    """

    def __init__(self, limit: int, *, piece: int, exact: bool) -> None:
        self.limit = check_integer("prefix_cache", limit, low=1)
        self.piece = check_integer("piece", piece, low=1)
        self.exact = exact
        self.nbytes = 0
        """Bytes held now."""
        self.evicted = 0
        """Pieces that had to leave so far."""
        self._root = _Node()
        self._nodes: OrderedDict[int, _Node] = OrderedDict()
        """The least recently used first."""

    def __len__(self) -> int:
        return len(self._nodes)

    def clear(self) -> None:
        """Forget everything."""
        self._root, self.nbytes = _Node(), 0
        self._nodes.clear()

    def find(
        self, state: int, tokens: Sequence[int], start: int, most: int, *, pending: bool = False
    ) -> tuple[Part, int] | None:
        """What ``state`` (its place in the engine) has made of ``tokens`` from ``start`` on, and how many of them it is good for.

        Up to the position ``most`` at the most; ``start`` is where a piece begins. ``pending``: it must have the states that the
        layers above have not seen. None if there is nothing.
        """
        node = self._at(tokens, start)
        if node is None or start % self.piece or start >= most:
            return None
        wanted = tuple(tokens[start : start + self.piece])

        def has(one: _Node | None) -> bool:
            part = None if one is None else one.parts.get(state)
            return part is not None and (not pending or part.pending is not None)

        child = node.children.get(wanted)
        count = len(wanted)
        if not has(child):
            child = None
        if self.exact:
            if child is None:
                count, child = max(
                    ((_common(one.tokens, wanted), one) for one in node.children.values() if has(one)),
                    key=lambda found: found[0],
                    default=(0, None),
                )
            count = min(count, most - start)
        elif start + count > most:
            return None
        if child is None or count < 1:
            return None
        self._touch(child)
        return child.parts[state], count

    def wants(self, state: int, tokens: Sequence[int], start: int, stop: int) -> bool:
        """Whether :meth:`put` would keep this part: the pieces before it are here, and it is not."""
        node = self._at(tokens, start)
        if node is None or start % self.piece:
            return False
        known = node.children.get(tuple(tokens[start:stop]))
        return known is None or state not in known.parts

    def put(self, state: int, tokens: Sequence[int], part: Part) -> None:
        """Keep what ``state`` has made of a piece of ``tokens``, if it fits and the pieces before it are here."""
        node, size = self._at(tokens, part.start), part.nbytes
        if node is None or size > self.limit:
            return
        key = tuple(tokens[part.start : part.stop])
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = _Node(key, node)
            self._nodes[id(child)] = child
        before = child.parts.get(state)
        if before is not None:
            self.nbytes -= before.nbytes
        child.parts[state] = part
        self.nbytes += size
        self._touch(child)
        if self.exact:
            for other in [one for one in node.children.values() if self._shorter(one, child)]:
                self._remove(other)
        while self.nbytes > self.limit:
            self._remove(next(iter(self._nodes.values())))
            self.evicted += 1

    def _at(self, tokens: Sequence[int], start: int) -> _Node | None:
        node: _Node | None = self._root
        for place in range(0, start, self.piece):
            if node is None:
                return None
            node = node.children.get(tuple(tokens[place : place + self.piece]))
        return node

    def _touch(self, node: _Node | None) -> None:
        """Its pieces are the newest, the first one most of all: so the oldest of all never has one behind it."""
        while node is not None and node.parent is not None:
            self._nodes.move_to_end(id(node))
            node = node.parent

    def _shorter(self, one: _Node, than: _Node) -> bool:
        """Whether a piece is the beginning of another that has all of it."""
        shorter = len(one.tokens) < len(than.tokens) and than.tokens[: len(one.tokens)] == one.tokens
        return shorter and not one.children and set(one.parts) <= set(than.parts)

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None
        assert not node.children
        del node.parent.children[node.tokens], self._nodes[id(node)]
        self.nbytes -= sum(part.nbytes for part in node.parts.values())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
