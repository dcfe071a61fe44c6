"""A digital world: an order system in SQLite, with constraints, triggers and real errors.

Tables item, wallet, orders and line; the schema's CHECKs and triggers are the law, and the engine's error messages are the
receipts. A model sees eight integers and never the schema. An action that the database refuses changes nothing.
"""

from __future__ import annotations

import random
import sqlite3
from typing import Any

import torch
from torch import Tensor

from telltale.world.laws import contracts
from telltale.world.protocol import Transition
from telltale.world.worlds.base import Episode, Outcome, World

SCHEMA = """
CREATE TABLE item (id INTEGER PRIMARY KEY, price INTEGER NOT NULL CHECK (price > 0), stock INTEGER NOT NULL CHECK (stock >= 0));
CREATE TABLE wallet (id INTEGER PRIMARY KEY CHECK (id = 1), balance INTEGER NOT NULL CHECK (balance >= 0));
CREATE TABLE orders (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  stage INTEGER NOT NULL CHECK (stage BETWEEN 0 AND 4),
  total INTEGER NOT NULL CHECK (total >= 0),
  paid INTEGER NOT NULL CHECK (paid BETWEEN 0 AND total)
);
CREATE TABLE line (item INTEGER PRIMARY KEY REFERENCES item (id), quantity INTEGER NOT NULL CHECK (quantity BETWEEN 0 AND 3));
CREATE TRIGGER line_changes BEFORE UPDATE OF quantity ON line
WHEN (SELECT stage FROM orders) <> 0
BEGIN SELECT RAISE(ABORT, 'the order is no longer open'); END;
CREATE TRIGGER line_moves_stock AFTER UPDATE OF quantity ON line
BEGIN
  UPDATE item SET stock = stock - (new.quantity - old.quantity) WHERE id = new.item;
  UPDATE orders SET total = total + (new.quantity - old.quantity) * (SELECT price FROM item WHERE id = new.item);
END;
CREATE TRIGGER stage_order BEFORE UPDATE OF stage ON orders
WHEN new.stage <> old.stage + 1
BEGIN SELECT RAISE(ABORT, 'the order is not at that stage'); END;
CREATE TRIGGER place_needs_lines BEFORE UPDATE OF stage ON orders
WHEN new.stage = 1 AND old.total = 0
BEGIN SELECT RAISE(ABORT, 'the order is empty'); END;
CREATE TRIGGER payment AFTER UPDATE OF stage ON orders
WHEN new.stage = 2
BEGIN
  UPDATE wallet SET balance = balance - new.total;
  UPDATE orders SET paid = total;
END;
"""

MIGRATION = """
DROP TRIGGER stage_order;
CREATE TRIGGER stage_order BEFORE UPDATE OF stage ON orders
WHEN NOT ((old.stage = 0 AND new.stage = 1) OR (old.stage = 1 AND new.stage = 3) OR (old.stage = 3 AND new.stage = 2)
  OR (old.stage = 2 AND new.stage = 4))
BEGIN SELECT RAISE(ABORT, 'the order is not at that stage'); END;
CREATE TRIGGER short_lines BEFORE UPDATE OF quantity ON line
WHEN new.quantity > 2 AND new.quantity > old.quantity
BEGIN SELECT RAISE(ABORT, 'a line holds at most two'); END;
"""
"""A change of the constraints: orders are shipped before they are paid, and a line holds at most two."""

FIELDS = ("stock a", "stock b", "wallet", "line a", "line b", "total", "paid", "stage")
ACTIONS = ("add a", "add b", "remove a", "remove b", "place", "pay", "ship", "close")
STAGES = ("open", "placed", "paid", "shipped", "closed")
PRICES = (3, 5)
RANGES = ((0, 9), (0, 9), (0, 60), (0, 3), (0, 3), (0, 24), (0, 24), (0, 4))

_STATEMENTS = (
    "UPDATE line SET quantity = quantity + 1 WHERE item = 1",
    "UPDATE line SET quantity = quantity + 1 WHERE item = 2",
    "UPDATE line SET quantity = quantity - 1 WHERE item = 1",
    "UPDATE line SET quantity = quantity - 1 WHERE item = 2",
    "UPDATE orders SET stage = 1",
    "UPDATE orders SET stage = 2",
    "UPDATE orders SET stage = 3",
    "UPDATE orders SET stage = 4",
)
_READ = (
    "SELECT a.stock, b.stock, w.balance, la.quantity, lb.quantity, o.total, o.paid, o.stage FROM item a, item b, wallet w, "
    "line la, line lb, orders o WHERE a.id = 1 AND b.id = 2 AND la.item = 1 AND lb.item = 2 AND w.id = 1 AND o.id = 1"
)
_NOTHING: dict[str, Any] = {}


class OrderDatabase:
    """One SQLite database in memory: act, read, set."""

    def __init__(self, *, migrated: bool = False) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=64)
        self.connection.executescript(SCHEMA + MIGRATION if migrated else SCHEMA)
        self._execute = self.connection.execute
        self._execute("PRAGMA synchronous = OFF")
        self._execute("BEGIN")
        self._execute("INSERT INTO item VALUES (1, ?, 0), (2, ?, 0)", PRICES)
        self._execute("INSERT INTO wallet VALUES (1, 0)")
        self._execute("INSERT INTO orders VALUES (1, 0, 0, 0)")
        self._execute("INSERT INTO line VALUES (1, 0), (2, 0)")

    def act(self, action: int) -> str | None:
        """Execute one action; None, or the error with which the database refused it (and undid the statement)."""
        try:
            self._execute(_STATEMENTS[action])
        except sqlite3.DatabaseError as error:
            return f"{getattr(error, 'sqlite_errorname', 'SQLITE_ERROR')}: {error}"
        return None

    def read(self) -> tuple[int, ...]:
        """The state."""
        return self._execute(_READ).fetchone()

    def set(self, state: tuple[int, ...]) -> None:
        """Put the database into ``state``, past the triggers: drop the rows and insert others."""
        stock_a, stock_b, wallet, line_a, line_b, total, paid, stage = state
        run = self._execute
        for table in ("line", "orders", "item", "wallet"):
            run(f"DELETE FROM {table}")
        run("INSERT INTO item VALUES (1, ?, ?), (2, ?, ?)", (PRICES[0], stock_a, PRICES[1], stock_b))
        run("INSERT INTO wallet VALUES (1, ?)", (wallet,))
        run("INSERT INTO orders VALUES (1, ?, ?, ?)", (stage, total, paid))
        run("INSERT INTO line VALUES (1, ?), (2, ?)", (line_a, line_b))

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class Orders(World):
    """Close an order with one of each item. States are tuples of eight integers (``FIELDS``), actions ``ACTIONS``.

    Starts differ in stock, wallet and what lies in the basket already. The reward is 1 when the order is closed as wanted.
    ``migrated`` runs :data:`MIGRATION` on the schema: payment on delivery, and at most two of an item.
    """

    id = "digital/orders"
    regime = "digital"
    plain = True
    columns = FIELDS
    ranges = RANGES
    action_names = ACTIONS
    max_steps = 24
    planner = "breadth_first"
    horizon = 12

    def __init__(self, *, migrated: bool = False) -> None:
        from gymnasium import spaces

        self.migrated = bool(migrated)
        self.action_space = spaces.Discrete(len(ACTIONS))
        self.database = OrderDatabase(migrated=self.migrated)
        self._state: tuple[int, ...] = self.database.read()
        self._steps = 0
        self.laws = order_laws(migrated=self.migrated)

    def reset(self, seed: int) -> Any:
        """Draw stock 1-4 and a basket of 0-2 per item, and a wallet that can pay what is wanted (8) or a little more."""
        rng = random.Random(seed)
        line_a, line_b = rng.randint(0, 2), rng.randint(0, 2)
        total = PRICES[0] * line_a + PRICES[1] * line_b
        self._state = (rng.randint(1, 4), rng.randint(1, 4), rng.randint(8, 30), line_a, line_b, total, 0, 0)
        self.database.set(self._state)
        self._steps = 0
        return self._state

    def step(self, action: Any) -> Outcome:
        """Execute; the receipt is the database's error, or empty."""
        refused = self.database.act(action if type(action) is int and 0 <= action < 8 else self.checked_action(action))
        state = self.database.read()
        self._state = state
        self._steps += 1
        closed = state[7] == 4
        won = closed and state[3] == 1 and state[4] == 1
        receipt = _NOTHING if refused is None else {"error": refused}
        return Outcome(state, float(won), closed, self._steps >= self.max_steps, receipt)

    def goal(self, state: Any) -> bool:
        """Closed with one of each."""
        return state[7] == 4 and state[3] == 1 and state[4] == 1

    def success(self, episode: Episode) -> bool:
        """The last state is the goal."""
        return self.goal(episode.observations[-1])

    def spawn(self) -> World:
        """A database of its own."""
        return Orders(migrated=self.migrated)

    def settings(self) -> dict[str, Any]:
        """Whether the schema is the migrated one."""
        return {"migrated": True} if self.migrated else {}

    def oracle(self) -> Any:
        """The database itself, set to any state."""
        return DatabaseModel(OrderDatabase(migrated=self.migrated))

    def embed(self, belief: Any) -> Tensor:
        """Fields as shares of their ranges, (8,)."""
        return torch.tensor(
            [value / high for value, (_, high) in zip(belief, RANGES, strict=True)], dtype=torch.float32
        )

    def versions(self) -> dict[str, str]:
        """The SQLite library."""
        return {"sqlite": sqlite3.sqlite_version}

    def close(self) -> None:
        """Close the database."""
        self.database.close()


class DatabaseModel:
    """A real database as a model: set the state, act, read."""

    stochastic = False

    def __init__(self, database: Any) -> None:
        self.database = database

    def step(self, belief: Any, action: Any) -> Transition:
        """One action from one state."""
        self.database.set(tuple(belief))
        self.database.act(int(action))
        return Transition(self.database.read())


def order_laws(*, migrated: bool = False) -> tuple[Any, ...]:
    """Schema, conserved stock and money, stages, and the total as the sum of the lines."""
    stages = {0: (1,), 1: (3,), 3: (2,), 2: (4,)} if migrated else {0: (1,), 1: (2,), 2: (3,), 3: (4,)}
    return (
        contracts.schema(RANGES),
        contracts.conserved_sum({0: 1, 3: 1}, name="item a: stock and basket"),
        contracts.conserved_sum({1: 1, 4: 1}, name="item b: stock and basket"),
        contracts.conserved_sum({2: 1, 6: 1}, name="wallet and paid"),
        contracts.stage_graph(7, stages),
        contracts.invariant(
            lambda s: s[5] == PRICES[0] * s[3] + PRICES[1] * s[4], name="total is the sum of the lines"
        ),
    )
