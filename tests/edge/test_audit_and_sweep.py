import numpy as np
import pytest
import torch

from telltale.edge.audit import Audit, audit_importances, load_choice
from telltale.edge.evaluation import PAPER, Choice, answers, paired, view_of
from telltale.edge.gate import Gate
from telltale.edge.images import Images
from telltale.edge.page import pictures_of, write_page
from telltale.edge.profile import Profile
from telltale.edge.sweep import coverage_table, random_coverage, sweep_budgets
from telltale.errors import DataError
from telltale.models.vision import VisionModel, open_vision

CHOICES = (PAPER, Choice("topk", "cls_last", "last"), Choice("random", "cls_last", "last"))


@pytest.fixture(scope="module")
def swept(pair, scene_images):
    edge, server = pair
    return sweep_budgets(
        *(edge, server, scene_images),
        choices=CHOICES,
        budgets=(6, 26),
        gate=Gate(threshold=0.2),
        whole=("lowres",),
        swap=True,
        coverage=True,
    )


@pytest.mark.long
def test_the_embedded_pair_learns_its_question(pair, scene_images):
    edge, server = pair
    for vision, least in ((edge, 0.2), (server, 0.3)):
        right = answers(vision, scene_images.pixels).argmax(axis=1) == scene_images.labels
        assert right.mean() > least  # chance is 0.1


@pytest.mark.long
def test_rows_are_counts_of_the_same_images(swept, pair, scene_images):
    assert swept.images == 160
    assert len(swept.rows) == 2 * len(CHOICES) + 8
    for row in swept.rows:
        assert row.largest >= row.bytes > 0
        assert row.versus_edge[1] >= 0
        overall_by_hand = 0 <= row.overall <= 100
        assert overall_by_hand
    sage = [row for row in swept.rows if row.name == PAPER.name]
    assert [row.patches for row in sage] == [6.0, 26.0]
    assert sage[0].bytes < sage[1].bytes
    assert sage[0].versus_topk is not None
    edge, _ = pair
    alone = answers(edge, scene_images.pixels).argmax(axis=1) == scene_images.labels
    assert swept.edge_only == pytest.approx(100 * alone.mean())


def test_fusion_is_chosen_on_other_images_than_it_is_told_of(swept):
    for row in swept.rows:
        if row.weight == 0.0:
            assert row.fused_versus_edge == (0.0, 0.0)
    by_bytes = swept.weights_of_whole("lowres")
    assert len(by_bytes) > 1
    assert sorted(by_bytes.values()) == sorted(row.weight for row in swept.rows if "lowres" in row.name)
    arbiter = swept.arbiter(PAPER.name)
    assert set(arbiter.weights) == {6, 26}
    with pytest.raises(DataError, match="no contestant"):
        swept.arbiter("nobody")


def test_swap_and_coverage(swept):
    assert [entry["budget"] for entry in swept.swap] == [6, 26]
    assert all(entry["swapped"] > 0 and entry["attention_dropped_over_added"] > 0 for entry in swept.swap)
    for entry in swept.coverage:
        assert entry["random"] == pytest.approx(entry["random, closed form"], abs=3)


@pytest.mark.parametrize(
    ("budget", "share"), [(16, 29.06), (32, 51.28), (48, 67.82), (64, 79.74), (96, 93.42), (196, 100.0)]
)
def test_coverage_of_random_sets_has_a_closed_form(budget, share):
    assert 100 * random_coverage(196, 4, budget) == pytest.approx(share, abs=0.01)


def test_the_page_holds_pictures_and_no_links(swept, pair, scene_images, tmp_path):
    edge, server = pair
    pictures = pictures_of(
        edge, server, scene_images.take(np.arange(2)), PAPER, (6, 26), arbiter=swept.arbiter(PAPER.name)
    )
    assert len(pictures) == 2 * 3
    assert all(data.startswith(b"\x89PNG") for data, _ in pictures)
    assert "6 patches" in pictures[1][1]
    page = write_page(tmp_path / "page.html", swept, pictures=pictures).read_text()
    assert page.count("<figure><img") == 6
    assert "whole image, lowres" in page
    assert "http://" not in page.replace("http://www.w3.org", "")[:5000]


class Sighted(torch.nn.Module):
    """A judge that answers from patch 5 alone: right only if that patch is among those it sees."""

    def __init__(self):
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(1))


def scripted_answers(monkeypatch, useful):
    """Replace the server: the label is 0, and is found iff patch ``useful`` was sent."""

    def answer(vision, images, indices=None, *, batch=128):
        seen = np.ones(len(images), bool) if indices is None else (indices == useful).any(axis=1)
        logs = np.full((len(images), 2), np.log(0.5))
        logs[np.arange(len(images)), np.where(seen, 0, 1)] += 1
        return logs

    monkeypatch.setattr("telltale.edge.audit.answers", answer)


def scripted_view(monkeypatch, importances):
    from telltale.edge.evaluation import View

    def view(vision, images, *, importances, spaces, batch=64, known=importances):
        count = len(images)
        generator = np.random.default_rng(0)
        embeddings = {space: generator.normal(size=(count, 16, 8)) for space in spaces}
        return View(
            np.zeros((count, 2)), {name: np.repeat(known[name][None], count, 0) for name in importances}, embeddings
        )

    monkeypatch.setattr("telltale.edge.audit.view_of", view)


def test_the_audit_finds_informative_and_inverted_importances(monkeypatch):
    ramp = np.arange(16, dtype=float)
    scripted_view(monkeypatch, {"cls_last": ramp, "rollout": ramp[::-1].copy(), "gradient": np.roll(ramp, 8)})
    scripted_answers(monkeypatch, useful=0)
    images = Images(np.zeros((60, 8, 8, 3), np.uint8), np.zeros(60, np.int64), tuple(range(60)))
    vision = VisionModel(Sighted(), "vit", 4, 4, 2, 1, ("a", "b"))
    result = audit_importances(vision, images, importances=("cls_last", "rollout", "gradient"), share=0.25)
    verdicts = {row.importance: row.verdict for row in result.deletions}
    assert verdicts == {"cls_last": "inverted", "rollout": "informative", "gradient": "uninformative"}
    assert result.choice.importance == "rollout"
    assert "cls_last, the paper's importance, is inverted" in result.warning
    scripted_view(monkeypatch, {"cls_last": ramp})
    nothing = audit_importances(vision, images, importances=("cls_last",), share=0.25)
    assert nothing.choice.selector == "uniform"
    assert "of no importance beat random" in nothing.warning


def test_an_audit_on_real_models_is_saved_and_read(pair, scene_images, tmp_path):
    edge, server = pair
    few = scene_images.take(np.arange(60))
    result = audit_importances(
        edge, few, server=server, importances=("cls_last", "rollout"), selectors=("topk", "facility")
    )
    assert isinstance(result, Audit)
    assert load_choice(result.save(tmp_path / "audit.json")) == result.choice
    unlabelled = Images(few.pixels, None, few.files)
    assert not audit_importances(edge, unlabelled, importances=("rollout",), selectors=("topk",)).labelled
    with pytest.raises(DataError, match="too few"):
        audit_importances(edge, few.take(np.arange(5)))
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(DataError, match="no audit"):
        load_choice(tmp_path / "no.json")


def test_a_sweep_refuses_what_it_cannot_measure(pair, scene_images):
    edge, server = pair
    with pytest.raises(DataError, match="no labels"):
        sweep_budgets(
            edge, server, Images(scene_images.pixels, None, scene_images.files), choices=CHOICES, budgets=(6,)
        )
    with pytest.raises(DataError, match="lower its threshold"):
        sweep_budgets(edge, server, scene_images, choices=CHOICES, budgets=(6,), gate=Gate(threshold=50.0))
    other = VisionModel(server.model, "vit", 8, 8, 4, 1, ("x",) * 10)
    with pytest.raises(DataError, match="labels that differ"):
        sweep_budgets(edge, other, scene_images, choices=CHOICES, budgets=(6,))
    bigger = VisionModel(server.model, "vit", 4, 4, 8, 1, edge.labels)
    with pytest.raises(DataError, match="same grid"):
        sweep_budgets(edge, bigger, scene_images, choices=CHOICES, budgets=(6,))


def test_a_grid_that_is_no_square_has_an_even_grid():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(16, 32),
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    vision = open_vision(ViTForImageClassification(config).eval())
    images = Images(np.zeros((24, 16, 32, 3), np.uint8), np.zeros(24, np.int64), tuple(range(24)))
    result = audit_importances(vision, images, importances=("rollout",))
    assert result.choice == Choice("uniform", "rollout", "patch", (("grid", (2, 4)),))
    found = sweep_budgets(
        vision, vision, images, choices=[result.choice], budgets=(3,), gate=Gate(threshold=0.0), whole=()
    )
    assert found.rows[0].patches == 3


def test_hidden_pixels_are_poisoned_in_every_evaluation(pair, scene_images):
    _, server = pair
    chosen = np.tile(np.arange(9), (160, 1))
    blanked = scene_images.pixels.copy()
    rows = np.repeat(np.repeat(np.isin(np.arange(64), np.arange(9)).reshape(8, 8), 4, 0), 4, 1)
    blanked[:, ~rows] = 77
    assert (answers(server, scene_images.pixels, chosen) == answers(server, blanked, chosen)).all()


def test_selectors_that_choose_fewer_are_swept_and_audited(pair, scene_images):
    edge, server = pair
    few = scene_images.take(np.arange(40))
    fewer = Choice("attention_sum", "rollout", "patch", (("share", 0.3),))
    view = view_of(edge, few.pixels, importances=("rollout",), spaces=("patch",))
    indices = fewer.indices(view, 26)
    assert (indices < 0).any()
    logs = answers(server, few.pixels, indices)
    for row in range(4):
        alone = answers(server, few.pixels[row : row + 1], indices[row : row + 1][:, indices[row] >= 0])
        np.testing.assert_allclose(logs[row], alone[0], atol=1e-5)
    table = coverage_table(view, [fewer], [26], 8, 8)
    sent = [len({(i // 16, i % 8 // 2) for i in row if i >= 0}) for row in indices.tolist()]
    assert table[0][fewer.name] == pytest.approx(100 * np.mean(sent) / 16)
    result = audit_importances(edge, few, importances=("rollout",), selectors=("attention_sum",))
    assert result.choice.selector in ("attention_sum", "uniform")


def test_paired_differences_and_profiles(tmp_path):
    difference, error = paired([1, 1, 0, 1], [0, 1, 0, 0])
    assert difference == 50.0
    assert error == pytest.approx(100 * np.std([1, 0, 0, 1], ddof=1) / 2)
    profile = Profile(Choice("sage", "cls_last", "last", (("k", 3.0),)), {8: 0.5}, "raw8", Gate("margin", 0.3))
    assert Profile.load(profile.save(tmp_path / "edge.json")) == profile
    assert profile.policy(deadline=0.1).options == {"k": 3.0}
    whole = Profile(profile.choice, {900: 0.5}, "webp", weigh="bytes")
    assert Profile.load(whole.save(tmp_path / "whole.json")).policy(deadline=0.1).weigh == "bytes"
    (tmp_path / "bad.json").write_text('{"selector": "sage"}')
    with pytest.raises(DataError, match="no profile"):
        Profile.load(tmp_path / "bad.json")
