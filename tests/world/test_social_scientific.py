"""Games: zero sums, best responses, an opponent that adapts. Equations: identified, and right outside the data."""

from __future__ import annotations

import pytest
import torch

from telltale.errors import DataError
from telltale.world import collect, evaluate, fit, load_model, make, save_model
from telltale.world.models.opponent import observe


class KuhnEquilibrium:
    """Player 1's equilibrium: bluff a jack a third of the time, call with a queen a third of the time."""

    BETS = {"0p": 1 / 3, "0b": 0.0, "1p": 0.0, "1b": 1 / 3, "2p": 1.0, "2b": 1.0}  # noqa: RUF012

    def policy(self, information_state, legal):
        bet = self.BETS[information_state]
        return [1 - bet, bet]


KUHN = make("social/kuhn_poker", adapts=0.0)


def test_the_value_of_kuhn_poker_against_its_equilibrium():
    answer = KUHN.best_response(KuhnEquilibrium())
    assert answer.value == pytest.approx(-1 / 18, abs=1e-12)
    assert KUHN.value_of(answer, KuhnEquilibrium()) == pytest.approx(-1 / 18, abs=1e-12)


def test_a_best_response_is_worth_at_least_any_other_policy():
    true = KUHN.oracle()
    best = KUHN.value_of(KUHN.best_response(true), true)
    others = [
        KUHN.value_of(None, true),
        *(KUHN.value_of(KUHN.best_response(observe("kuhn_poker", [], prior=p)), true) for p in (0.1, 5.0)),
    ]
    assert best >= max(others)
    assert best >= -1 / 18


def test_returns_sum_to_zero_exactly():
    data = collect(make("social/leduc_poker"), steps=300, seed=0)
    hands = [hand for receipt in data.receipts for hand in receipt.get("hands", ())]
    assert len(hands) > 50
    assert all(sum(hand["returns"]) == 0.0 for hand in hands)
    law = KUHN.laws[0]
    assert all(bool(law.holds(b, 0, a)) for b, a in zip(data.before, data.after, strict=True))


def test_an_opponent_model_counts_what_was_shown_and_survives_saving(tmp_path):
    data = collect(KUHN, steps=2000, seed=0)
    model = fit("opponent", data, world=KUHN)
    true = KUHN.oracle()
    for state in ("0p", "1b", "2p"):
        assert model.policy(state, [0, 1])[1] == pytest.approx(true.policy(state, [0, 1])[1], abs=0.08)
    gained = KUHN.value_of(KUHN.best_response(model), true)
    assert gained == pytest.approx(KUHN.value_of(KUHN.best_response(true), true), abs=0.05)
    save_model(model, tmp_path / "opponent")
    assert load_model(tmp_path / "opponent").policy("0p", [0, 1]) == model.policy("0p", [0, 1])


def test_the_opponent_adapts_to_folds_and_a_still_one_does_not():
    for adapts, expected in ((0.5, True), (0.0, False)):
        world = make("social/kuhn_poker", adapts=adapts)
        world.reset(0)
        for _ in range(20):
            world.step(world._state.legal_actions()[0])
        assert (world.opponent.tilt > 0) is expected


def test_playing_the_best_response_to_the_model_on_the_table():
    world = make("social/kuhn_poker")
    assert evaluate(fit("opponent", collect(world, steps=400, seed=1), world=world), world, episodes=5).asr >= 0.8


def test_illegal_moves_are_refused():
    world = make("social/leduc_poker")
    world.reset(0)
    with pytest.raises(DataError, match="legal"):
        world.step(0 if 0 not in world._state.legal_actions() else 9)


def test_the_auction_law_objects_to_bids_above_value():
    world = make("social/first_sealed_auction")
    observation = world.reset(0)
    law = world.laws[0]
    value = int(observation[0].rsplit(" ", 1)[-1]) if not observation[0].isdigit() else int(observation[0])
    assert bool(law.holds((str(value), 0.0, 0.0), value, None))
    assert not bool(law.holds((str(value), 0.0, 0.0), value + 1, None))


class TestSindy:
    @pytest.fixture(scope="class")
    def world(self):
        return make("scientific/lotka_volterra", dt=0.05)

    @pytest.fixture(scope="class")
    def model(self, world):
        return fit("sindy", collect(world, steps=900, hold=30, seed=0), world=world)

    def test_the_equations_are_found(self, model):
        found = dict(zip((tuple(p) for p in model.exponents.tolist()), model.coefficients.T.tolist(), strict=True))
        wanted = {(1, 0, 0): (1.0, 0.0), (1, 1, 0): (-0.4, 0.2), (1, 0, 1): (-1.0, 0.0), (0, 1, 0): (0.0, -0.8)}
        for powers, values in found.items():
            assert values == pytest.approx(wanted.get(powers, (0.0, 0.0)), abs=0.02)
        assert "prey' =" in model.explain()

    def test_out_of_distribution(self, world, model):
        start = torch.tensor([[9.0, 2.0]], dtype=torch.float64)
        engine, mine = world.spawn(), start
        engine.reset(0, state=(9.0, 2.0))
        errors = []
        for t in range(200):
            control = 0.3 if t % 60 < 30 else 0.0
            real = torch.as_tensor(engine.step([control]).observation)
            mine = model.step(mine, torch.tensor([[control]], dtype=torch.float64)).belief
            errors.append(float((mine[0] - real).norm() / real.norm()))
        assert max(errors) < 0.05

    def test_saving(self, model, tmp_path):
        save_model(model, tmp_path / "equations")
        again = load_model(tmp_path / "equations")
        state, action = torch.rand(4, 2), torch.rand(4, 1)
        assert torch.equal(again.step(state, action).belief, model.step(state, action).belief)

    def test_a_control_that_never_holds_still_is_refused_with_advice(self, world):
        with pytest.raises(DataError, match="hold="):
            fit("sindy", collect(world, steps=50, seed=0), world=world)
