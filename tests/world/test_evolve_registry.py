"""The registry and the evidence store: hashes, receipts, one winner, rollback to the bit, and what a forger cannot do."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil

import pytest
import torch

from telltale import world
from telltale.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from telltale.world.evolve.chain import ChainedLog, ConflictError
from telltale.world.evolve.evidence import Evidence
from telltale.world.evolve.poison import poisoned
from telltale.world.evolve.receipts import REQUIRED, Check, PromotionRefused, Receipt
from telltale.world.evolve.version_registry import Registry
from telltale.world.models.program import Program, Rule


def program(shift):
    return Program({0: Rule({0: ("add", shift)})}, 2)


def receipt(candidate, incumbent, trial=1, **changed):
    checks = {name: Check("pass", "as it should be", {}) for name in REQUIRED}
    fields = {"alpha": 0.03, "checks": checks, "evidence": ["e" * 16], "batches": ["b"], "sources": ["gate"], **changed}
    return Receipt(candidate, incumbent, trial, **fields).sealed()


@pytest.fixture
def registry(tmp_path):
    found = Registry(tmp_path / "registry")
    found.add(program(1), evidence=["a" * 64])
    return found


def promoted(registry, shift, trial=1):
    version = registry.add(program(shift), evidence=[f"{shift:064d}"])
    registry.promote(version.id, registry.record(receipt(version.id, registry.active().id, trial)))
    return version


def test_an_id_covers_weights_config_parent_and_evidence(registry):
    first = registry.active()
    ids = {
        registry.add(program(1), evidence=evidence, parent=parent).id
        for parent in (first.id, None)
        for evidence in (["b" * 64], ["c" * 64])
    }
    other = registry.add(program(2), evidence=["b" * 64])
    assert len(ids | {other.id, first.id}) == 4
    assert registry.add(program(2), evidence=["b" * 64]).id == other.id
    assert registry.version(other.id[:10]).load().rules == program(2).rules
    assert [e["kind"] for e in registry.log()].count("add") == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"candidate": "x"}, "is for"),
        ({"checks": {"gain": Check("pass", "")}}, "lacks the checks"),
        ({"checks": {name: Check("fail", "no") for name in REQUIRED}}, "did not pass"),
        ({"checks": {name: Check("not run", "") for name in REQUIRED}}, "checks were not run"),
        ({"evidence": [f"{2:064d}"[:16]]}, "fitted on"),
    ],
)
def test_a_promotion_needs_a_receipt_that_carries_it(registry, change, words):
    version = registry.add(program(2), evidence=[f"{2:064d}"])
    with pytest.raises(PromotionRefused, match="no receipt"):
        registry.promote(version.id)
    good = receipt(version.id, registry.active().id)
    with pytest.raises(PromotionRefused, match="not in the log"):
        registry.promote(version.id, good)
    bad = registry.record(dataclasses.replace(good, **change, trial=7).sealed())
    with pytest.raises(PromotionRefused, match=words):
        registry.promote(version.id, bad)
    with pytest.raises(PromotionRefused, match="sealed"):
        registry.promote(version.id, dataclasses.replace(good, alpha=0.5))
    with pytest.raises(PromotionRefused, match="trial 7 was taken"):
        registry.record(dataclasses.replace(good, trial=7).sealed())
    registry.promote(version.id, registry.record(good))
    assert registry.active().id == version.id
    assert registry.verify().ok


def test_a_candidate_judged_against_another_incumbent_is_refused(registry):
    first = registry.active().id
    one, two = (registry.add(program(n), evidence=[]) for n in (2, 3))
    receipts = [registry.record(receipt(v.id, first, trial)) for trial, v in enumerate((one, two), start=1)]
    registry.promote(one.id, receipts[0])
    with pytest.raises(ConflictError, match="judge it again"):
        registry.promote(two.id, receipts[1])
    assert registry.promote(one.id, receipts[0]).id == one.id
    assert [e["kind"] for e in registry.log()].count("promote") == 1


def test_rollback_is_equal_to_the_bit_and_damage_is_noticed(tmp_path):
    registry = Registry(tmp_path / "r")
    place = world.make("physical/Pendulum-v1")
    data = world.collect(place, steps=60, seed=0)
    models = [world.fit("ensemble", data, world=place, seed=seed, epochs=2, members=2, hidden=8) for seed in (0, 1)]
    first = registry.add(models[0])
    raw = {f.name: f.read_bytes() for f in first.path.iterdir()}
    second = registry.add(models[1])
    registry.promote(second.id, registry.record(receipt(second.id, first.id)))
    back = registry.rollback(reason="worse", quarantine=["k"])
    assert back.id == first.id
    assert {f.name: f.read_bytes() for f in registry.active().path.iterdir()} == raw
    predicted = [m.step(data.before, data.actions).belief for m in (models[0], registry.active().load())]
    assert torch.equal(*predicted)
    assert registry.rollback(away_from=second.id).id == first.id
    with pytest.raises(ConfigError, match="no earlier"):
        registry.rollback()
    weights = second.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError):
        registry.rollback(to=second.id)
    assert registry.active().id == first.id
    assert "versions" in registry.verify().findings[0].file


def test_tampering_with_the_log_is_found(registry):
    promoted(registry, 2)
    promoted(registry, 3, trial=2)
    assert registry.verify().ok
    log = registry.path / "log"
    names = sorted(log.iterdir())
    for name in names[1:-1]:
        kept = name.read_text()
        name.write_text(kept.replace('"kind": "', '"kind": "x'))
        assert not Registry(registry.path).verify().ok, name
        name.unlink()
        assert not Registry(registry.path).verify().ok, name
        name.write_text(kept)
    # a promotion written by hand, chained as it should be, still has no receipt
    ChainedLog(log).append("promote", {"version": registry.versions()[0], "from": "?", "receipt": "?"})
    assert not Registry(registry.path).verify().ok


def test_a_person_has_the_last_word_where_that_is_asked_for(tmp_path):
    registry = Registry(tmp_path / "r", approval=True)
    registry.add(program(1))
    version = registry.add(program(2))
    passed = registry.record(receipt(version.id, registry.active().id))
    again = Registry(tmp_path / "r")
    with pytest.raises(PromotionRefused, match="waits for a person"):
        again.promote(version.id, passed)
    with pytest.raises(ConfigError, match="by is empty"):
        again.approve(version.id, by=" ")
    again.approve(version.id, by="R. Franklin")
    again.decline(version.id, by="R. Franklin")
    with pytest.raises(PromotionRefused, match="waits for a person"):
        again.promote(version.id, passed)
    # a promotion after the last word was no, written by hand
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "r", copy)
    body = {"version": version.id, "from": passed.incumbent, "receipt": passed.seal, "note": ""}
    ChainedLog(copy / "log").append("promote", body)
    assert "without the approval" in Registry(copy).verify().findings[0].problem
    again.approve(version.id, by="R. Franklin")
    assert again.promote(version.id).id == version.id
    assert again.word(version.id) is None


def test_a_word_is_for_the_case_that_it_was_given_on(tmp_path):
    registry = Registry(tmp_path / "r", approval=True)
    first = registry.add(program(1)).id
    version = registry.add(program(2)).id
    registry.approve(version, by="R. Franklin")
    registry.promote(version, registry.record(receipt(version, first)))
    registry.rollback()
    again = registry.record(receipt(version, first, 2))
    with pytest.raises(PromotionRefused, match="waits for a person"):
        registry.promote(version, again)
    usual = Registry(tmp_path / "without")
    usual.add(program(1))
    with pytest.raises(ConfigError, match="founded without approval"):
        Registry(usual.path, approval=True)
    # a promotion written by hand, with a receipt and without the word
    body = {"version": version, "from": first, "receipt": again.seal}
    ChainedLog(registry.path / "log").append("promote", body)
    assert "without the approval" in Registry(registry.path).verify().findings[0].problem


def test_a_receipt_serves_once_and_what_was_rolled_back_is_judged_again(registry):
    first = registry.active().id
    version = registry.add(program(2), evidence=[])
    passed = registry.record(receipt(version.id, first))
    registry.promote(version.id, passed)
    registry.rollback(reason="worse", quarantine=["fitted"])
    for given in (passed, None):
        with pytest.raises(PromotionRefused, match="older than the last promotion or rollback"):
            registry.promote(version.id, given)
    assert registry.verify().ok
    body = {"version": version.id, "from": first, "receipt": passed.seal}
    ChainedLog(registry.path / "log").append("promote", body)
    assert "without a receipt" in Registry(registry.path).verify().findings[0].problem


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("rollback", {"reason": "", "quarantine": []}, "by a rollback to what was not active before"),
        ("found", {"parent": None, "kind": "program", "approval": False}, "by a second founding"),
    ],
)
def test_an_activation_written_by_hand_is_found(registry, kind, more, words):
    version = registry.add(program(2), evidence=[])
    body = {"version": version.id, "from": registry.active().id, **more}
    ChainedLog(registry.path / "log").append(kind, body)
    assert words in Registry(registry.path).verify().findings[0].problem


def test_a_receipt_spends_what_its_trial_may(registry):
    version = registry.add(program(2), evidence=[])
    greedy = registry.record(receipt(version.id, registry.active().id, 5, settings={"alpha": 0.05}))
    with pytest.raises(PromotionRefused, match="more than trial 5 may"):
        registry.promote(version.id, greedy)
    assert "spends more" in registry.verify().findings[0].problem


def test_a_newer_registry_a_wild_name_and_a_model_that_cannot_be_read_back_are_refused(registry, tmp_path):
    class Mine:
        def describe(self):
            return {"kind": "mine", "config": {}}

        def step(self, belief, action):
            return belief

    for name in ("*", "/etc", "../versions", "?"):
        with pytest.raises(ConfigError, match="names 0 versions"):
            registry.version(name)
    for store in (registry, Registry(tmp_path / "new")):
        count = len(store.log())
        with pytest.raises(UnsupportedModelError, match="cannot be read back"):
            store.add(Mine())
        assert len(store.log()) == count
    old = ChainedLog(tmp_path / "old" / "log")
    old.append("found", {"version": "0" * 64, "parent": None, "kind": "program", "approval": False, "format": 1})
    for call in (Registry.active, Registry.verify, Registry.log):
        with pytest.raises(CheckpointError, match="was written by format 1; this version of telltale reads format 2"):
            call(Registry(tmp_path / "old"))
    ChainedLog(registry.path / "log").append("retire", {"version": registry.active().id})
    with pytest.raises(CheckpointError, match="newer telltale"):
        Registry(registry.path).active()


def _race(path, version, barrier, queue):
    registry = Registry(path)
    barrier.wait()
    try:
        registry.promote(version)
        queue.put((version, "won"))
    except (ConflictError, PromotionRefused) as error:
        queue.put((version, type(error).__name__))


def test_of_concurrent_promotions_one_wins(registry):
    context = multiprocessing.get_context("fork")
    first = registry.active().id
    for start in (2, 6):
        versions = [registry.add(program(start + n), evidence=[]).id for n in range(4)]
        for n, version in enumerate(versions):
            registry.record(receipt(version, registry.active().id, start * 10 + n))
        barrier, queue = context.Barrier(4), context.Queue()
        jobs = [context.Process(target=_race, args=(registry.path, v, barrier, queue)) for v in versions]
        for job in jobs:
            job.start()
        answers = dict(queue.get(timeout=30) for _ in jobs)
        for job in jobs:
            job.join()
        winners = [v for v, answer in answers.items() if answer == "won"]
        assert len(winners) == 1
        assert set(answers.values()) == {"won", "ConflictError"}
        assert registry.active().id == winners[0] != first
        assert registry.verify().ok


def test_diff_says_what_a_revision_changed(registry):
    version = promoted(registry, 2)
    found = registry.diff(registry.versions()[0], version.id)
    assert any("changes by 2" in text for text in found["added"])
    assert any("changes by 1" in text for text in found["removed"])
    assert found["evidence_added"] == 1
    with pytest.raises(ConfigError, match="names 0 versions"):
        registry.diff("nothing", version.id)


# evidence


@pytest.fixture(scope="module")
def orders():
    return world.make("digital/orders")


def test_evidence_is_kept_once_has_one_role_and_remembers_its_source(tmp_path, orders):
    store = Evidence(tmp_path / "e")
    data = world.collect(orders, steps=60, seed=1)
    first = store.add(data, source="stream", role="fit", note="round 1")
    assert first.count + first.duplicates == 60
    assert first.count == len(set(data.ids()))
    assert store.add(data, source="stream", role="fit", note="round 1") == first
    again = store.add(data, source="partner", role="gate")
    assert (again.count, again.corroborated) == (0, 60)
    assert store.total() == first.count
    more = store.add(world.collect(orders, steps=60, seed=2), source="gate", role="gate")
    sides = [set(store.transitions(store.chosen(role)).ids()) for role in ("fit", "gate")]
    assert not sides[0] & sides[1]
    assert store.verify().ok
    store.quarantine([more.key], reason="poisoned")
    assert store.chosen("gate") == []
    assert Evidence(tmp_path / "e").withdrawn() == {more.key}
    with pytest.raises(ConfigError, match="role"):
        store.add(data, source="x", role="test")
    with pytest.raises(DataError, match="no source"):
        store.add(data, source="", role="fit")


def test_changed_evidence_and_two_roles_are_found(tmp_path, orders):
    store = Evidence(tmp_path / "e")
    one = store.add(world.collect(orders, steps=30, seed=1), source="a", role="fit")
    two = store.add(world.collect(orders, steps=30, seed=2), source="b", role="gate")
    file = store.path / "batches" / one.key / "transitions.json"
    document = json.loads(file.read_text())
    document["after"][0][0] += 1
    kept = file.read_text()
    file.write_text(json.dumps(document))
    assert "other transitions" in Evidence(tmp_path / "e").verify().findings[0].problem
    file.write_text(kept)
    shutil.rmtree(store.path / "batches" / two.key)
    shutil.copytree(store.path / "batches" / one.key, store.path / "batches" / two.key)
    problems = " ".join(f.problem for f in Evidence(tmp_path / "e").verify().findings)
    assert "is fit evidence already" in problems


def rows(seed, steps=40):
    return world.collect(world.make("physical/Pendulum-v1"), steps=steps, seed=seed)


def test_evidence_of_another_zero_or_precision_is_a_duplicate_and_other_rewards_are_found(tmp_path):
    store, data = Evidence(tmp_path / "e"), rows(1)
    data = dataclasses.replace(data, actions=data.actions * (torch.arange(40) > 3).unsqueeze(1))
    batch = store.add(data, source="a", role="fit")
    signed = torch.where(data.actions == 0, -data.actions, data.actions)
    assert torch.signbit(signed).sum() != torch.signbit(data.actions).sum()
    for same in (dataclasses.replace(data, actions=signed), dataclasses.replace(data, before=data.before.double())):
        assert store.add(same, source="b", role="gate").count == 0
    folder = store.path / "batches" / batch.key
    dataclasses.replace(data, rewards=data.rewards + 1).save(folder)
    assert "other transitions" in Evidence(store.path).verify().findings[0].problem


def test_a_batch_that_was_not_logged_is_written_anew_and_of_two_writers_none_gives_a_row_two_roles(tmp_path):
    data = rows(1)
    store, other = Evidence(tmp_path / "e"), Evidence(tmp_path / "e")
    kept = Evidence._keep

    class Late(Evidence):
        def _keep(self, chosen, key):
            kept(self, chosen, key)  # and then another process is first; what is written here is what a kill leaves
            other.add(data.select(torch.arange(20)), source="b", role="gate")

    batch = Late(tmp_path / "e").add(data, source="a", role="fit")
    assert batch.count == 20
    assert store.verify().findings == []


def test_who_offers_the_true_with_the_false_takes_nothing_from_the_life(tmp_path):
    store, data = Evidence(tmp_path / "e"), rows(1)
    offered = store.add(data, source="partner", role="fit", note="1")
    mine = store.add(data.select(torch.arange(10)), source="stream", role="fit")
    assert mine.count == 10
    store.quarantine([offered.key], reason="poisoned")
    assert store.add(data, source="partner", role="fit", note="2").count == 0
    assert store.add(data, source="gate", role="gate").count == 30
    assert store.add(data, source="probe", role="fit").count == 0
    assert store.verify().findings == []


def test_poison_flips_the_share_that_is_asked_for(orders):
    data = world.collect(orders, steps=100, seed=1)
    assert int((poisoned(data, orders, share=0.25, seed=3).actions != data.actions).sum()) == 25
    place = world.make("physical/Pendulum-v1")
    rows = world.collect(place, steps=40, seed=1)
    flipped = poisoned(rows, place, share=1.0)
    assert torch.allclose(flipped.actions, -rows.actions)
