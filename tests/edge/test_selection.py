import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from edge import naive
from telltale.edge.selection import register_selector, select, selectors
from telltale.errors import BudgetError, ConfigError

EXACT = ["topk", "random", "uniform", "sage", "fps", "mmr", "dpp", "facility", "sage_nested"]
CONTENT = ["topk", "sage", "fps", "mmr", "dpp", "facility", "sage_nested"]


def images(count=3, patches=36, width=24, seed=0):
    generator = np.random.default_rng(seed)
    return generator.random((count, patches)), generator.normal(size=(count, patches, width)).astype(np.float32)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("budget", [1, 7, 18, 36])
def test_exactly_the_budget_and_all_distinct(name, budget):
    a, z = images()
    chosen = select(name, a, z, budget)
    assert chosen.shape == (3, budget)
    assert chosen.dtype == np.int64
    for row in chosen:
        assert len(set(row.tolist())) == budget
        assert 0 <= row.min() <= row.max() < 36


@pytest.mark.parametrize("name", EXACT)
def test_alone_in_a_batch_and_in_torch_the_indices_are_the_same(name):
    a, z = images(count=5)
    batch = select(name, a, z, 11, generator=3)
    for row in range(5):
        assert (select(name, a[row : row + 1], z[row : row + 1], 11, generator=3)[0] == batch[row]).all()
        assert (select(name, a[row], z[row], 11, generator=3) == batch[row]).all()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    same = select(name, torch.from_numpy(a), torch.from_numpy(z), 11, generator=3)
    torch.set_num_threads(threads)
    assert isinstance(same, torch.Tensor)
    assert same.dtype == torch.int64
    assert (same.numpy() == batch).all()


@pytest.mark.parametrize("name", CONTENT)
def test_a_permutation_of_patches_permutes_the_selection(name):
    a, z = images(count=1)
    order = np.random.default_rng(1).permutation(36)
    there = select(name, a[:, order], z[:, order], 9)
    assert (order[there[0]] == select(name, a, z, 9)[0]).all()


@pytest.mark.parametrize("name", CONTENT)
def test_lengths_of_embeddings_do_not_matter(name):
    a, z = images(count=1)
    scaled = z * np.random.default_rng(2).uniform(0.1, 9.0, (1, 36, 1))
    assert (select(name, a, scaled, 12) == select(name, a, z, 12)).all()


@pytest.mark.parametrize("name", CONTENT)
def test_equal_embeddings_fall_to_importance_without_repeats(name):
    a, z = images(count=1)
    same = np.repeat(z[:, :1], 36, axis=1)
    chosen = select(name, a, same, 8)[0].tolist()
    assert chosen == np.argsort(-a[0], kind="stable")[:8].tolist()


@pytest.mark.parametrize("name", CONTENT)
def test_equal_importances_and_embeddings_fall_to_the_lower_index(name):
    assert select(name, np.ones(10), np.ones((10, 4)), 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["topk", "fps", "uniform", "sage_nested", "mmr", "dpp", "facility", "random"])
def test_prefixes_are_selections_of_smaller_budgets(name):
    a, z = images(count=1)
    long = select(name, a, z, 30)[0]
    for budget in (1, 5, 17):
        assert (select(name, a, z, budget)[0] == long[:budget]).all()


def test_sage_is_its_formula():
    for seed in range(4):
        a, z = images(count=1, seed=seed)
        for k in (1.0, 1.5, 2.0, 9.0):
            assert select("sage", a, z, 10, k=k)[0].tolist() == naive.sage(a[0], z[0], 10, k)


def test_sage_stays_in_its_pool_and_has_its_limits():
    a, z = images(count=1)
    top = np.argsort(-a[0])
    assert select("sage", a, z, 1)[0].tolist() == [top[0]]
    assert set(select("sage", a, z, 9)[0].tolist()) <= set(top[:18].tolist())
    assert set(select("sage", a, z, 9, k=1)[0].tolist()) == set(top[:9].tolist())
    assert (select("sage", a, z, 18) == select("fps", a, z, 18)).all()


def test_the_greedy_certificate_of_sage():
    a, z = images(count=1, patches=64)
    similar = naive.cosine_matrix(z[0])
    chosen = select("sage", a, z, 20)[0].tolist()
    pool = np.argsort(-a[0])[:40]
    found = []
    for step in range(1, 20):
        nearest = {i: similar[i, chosen[:step]].max() for i in pool if i not in chosen[:step]}
        assert nearest[chosen[step]] <= min(nearest.values()) + 1e-6
        found.append(nearest[chosen[step]])
    assert all(low <= high + 1e-6 for low, high in pairwise(found))


@pytest.mark.parametrize("name", ["mmr", "facility", "dpp"])
def test_the_other_greedy_selectors_are_their_formulas(name):
    for seed in range(3):
        a, z = images(count=1, patches=25, seed=seed)
        assert select(name, a, z, 9)[0].tolist() == getattr(naive, name)(a[0], z[0], 9)


def test_a_kernel_without_enough_rank_still_fills_the_budget():
    a, z = images(count=1, width=3)
    chosen = select("dpp", a, z, 12)[0]
    assert len(set(chosen.tolist())) == 12


def test_a_zero_embedding_is_similar_to_nothing():
    a = np.array([3.0, 2.0, 1.0])
    z = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 0.0]])
    assert select("fps", a, z, 2).tolist() == [0, 2]


def test_uniform_covers_cells_better_than_random():
    a = np.ones((1, 196))
    cells = (np.arange(196) // 14 // 2) * 7 + np.arange(196) % 14 // 2
    even = select("uniform", a, None, 48)[0]
    assert even[0] in (6 * 14 + 6, 6 * 14 + 7, 7 * 14 + 6, 7 * 14 + 7)
    drawn = np.mean([len(set(cells[select("random", a, None, 48, generator=s)[0]])) for s in range(200)]) / 49
    assert len(set(cells[even])) / 49 > drawn + 0.1
    assert drawn == pytest.approx(0.6782, abs=0.015)  # the closed form 1 - C(192, 48) / C(196, 48)


def test_selectors_that_choose_fewer_pad():
    a = np.array([[0.5, 0.3, 0.1, 0.06, 0.04]])
    assert select("attention_sum", a, None, 4, share=0.8).tolist() == [[0, 1, -1, -1]]
    assert select("attention_sum", a, None, 4, share=0.3).tolist() == [[0, -1, -1, -1]]
    assert select("attention_sum", a, None, 2).tolist() == [[0, 1]]
    assert select("threshold", a, None, 4).tolist() == [[0, 1, -1, -1]]
    assert select("threshold", a, None, 4, level=0.9).tolist() == [[0, -1, -1, -1]]


def test_random_moves_with_its_generator():
    a, _ = images(count=2)
    generator = np.random.default_rng(0)
    first, second = (select("random", a, None, 9, generator=generator) for _ in range(2))
    assert (first != second).any()
    assert (select("random", a, None, 9, generator=torch.Generator().manual_seed(1)) >= 0).all()


def test_users_add_selectors():
    if "last_ones" not in selectors():

        @register_selector("last_ones")
        def last_ones(importance, embeddings, budget, *, skip=0):
            """The highest indices."""
            return np.arange(len(importance))[::-1][skip : skip + budget]

    assert select("last_ones", np.ones((1, 5)), None, 2, skip=1).tolist() == [[3, 2]]
    with pytest.raises(ConfigError, match="registered already"):
        register_selector("last_ones")(lambda importance, embeddings, budget: [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sagee", np.ones((1, 4)), np.ones((1, 4, 2)), 2), "Did you mean 'sage'"),
        (("sage", np.array([[1.0, np.nan]]), np.ones((1, 2, 2)), 1), "NaN"),
        (("sage", np.ones((1, 4)), np.full((1, 4, 2), np.inf), 1), "infinite"),
        (("sage", np.ones((1, 4)), None, 2), "none were given"),
        (("sage", np.ones((1, 4)), np.ones((1, 5, 2)), 2), "same"),
        (("topk", np.ones((1, 4)), None, 0), "1 to 4"),
        (("topk", np.ones((1, 4)), None, -1), "1 to 4"),
        (("topk", np.ones((1, 4)), None, 5), "clamp"),
        (("topk", np.ones((1, 4)), None, 2.0), "integer"),
        (("uniform", np.ones((1, 5)), None, 2), "grid="),
        (("topk", [["a", "b"]], None, 1), "real numbers"),
        (("topk", [[1, 2], [1]], None, 1), "different lengths"),
        (("topk", np.array([[1j, 1]]), None, 1), "real numbers"),
        (("topk", np.array([[None, 1]]), None, 1), "real numbers"),
    ],
)
def test_bad_input_is_told(arguments, words):
    with pytest.raises(ValueError, match=words):
        select(*arguments)


def test_options_are_checked_and_budgets_clamped():
    with pytest.raises(ConfigError, match="its options: k"):
        select("sage", np.ones((1, 4)), np.ones((1, 4, 2)), 2, kk=3)
    with pytest.raises(ConfigError, match=r"k=0\.5"):
        select("sage", np.ones((1, 4)), np.ones((1, 4, 2)), 2, k=0.5)
    with pytest.raises(ConfigError, match="grid=5"):
        select("uniform", np.ones((1, 4)), None, 2, grid=5)
    with pytest.raises(ConfigError, match="level=nan"):
        select("threshold", np.ones((1, 4)), None, 2, level=np.nan)
    assert select("topk", np.ones((1, 4)), None, 9, clamp=True).shape == (1, 4)
    with pytest.raises(BudgetError):
        select("topk", np.ones((1, 4)), None, True)


def test_a_selector_of_a_user_returns_distinct_integers():
    wrong = {
        "halves": [0.5, 1.5],
        "nothing": None,
        "nested": [[0, 1]],
        "twice": [1, 1],
        "beyond": [4],
        "many": [0, 1, 2],
    }
    for name, returned in wrong.items():
        if name not in selectors():
            register_selector(name)(lambda importance, embeddings, budget, returned=returned: returned)
        with pytest.raises(ConfigError, match="expected at most 2 distinct indices"):
            select(name, np.ones((1, 4)), None, 2)


@pytest.mark.parametrize("name", CONTENT)
def test_the_scale_of_the_importance_does_not_matter(name):
    a, z = images(count=1, width=3)
    expected = np.argsort(-a[0], kind="stable")[:1].tolist()
    for scale in (5e-324, 1e-300, 1e300):
        chosen = select(name, np.floor(9 * a) * scale, z, 36)[0].tolist()
        assert sorted(chosen) == list(range(36))
    assert select(name, a * 1e300, z, 1)[0].tolist() == select(name, a, z, 1)[0].tolist()
    assert name == "facility" or select(name, a, z, 1)[0].tolist() == expected


def test_an_infinite_pool_is_everything():
    a, z = images(count=1)
    assert (select("sage", a, z, 7, k=float("inf")) == select("fps", a, z, 7)).all()
    assert (select("sage_nested", a, z, 7, k=1e308) == select("fps", a, z, 7)).all()


def test_selection_and_wire_run_without_torch():
    script = """
import sys
from itertools import pairwise
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import numpy as np
import telltale.edge as edge
from telltale.edge.budget import Space, pack
generator = np.random.default_rng(0)
a, z = generator.random((2, 64)), generator.normal(size=(2, 64, 16)).astype(np.float32)
image = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
for name in ("topk", "random", "uniform", "sage", "fps", "mmr", "dpp", "facility", "sage_nested"):
    print(name, edge.select(name, a, z, 9).tolist())
frame = pack(image, lambda n: edge.select("sage", a[0], z[0], n), space=Space(8, 8, 4), codec="mosaic_webp", limit=400)
assert edge.Frame.decode(frame.encode()).image().shape == (32, 32, 3)
edge.Gate().offloads(np.array([[0.5, 0.5]]))
edge.Arbiter("fused", {4: 1.0})
model = edge.EdgeModel(8, 8, 4, ("a", "b"), lambda image: (np.log([0.5, 0.5]), a[0], z[0]))
with edge.EdgeClient(model, None) as client:
    assert client.predict(image).source == "edge"
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    generator = np.random.default_rng(0)
    a, z = generator.random((2, 64)), generator.normal(size=(2, 64, 16)).astype(np.float32)
    for line in done.stdout.splitlines():
        name, _, found = line.partition(" ")
        assert found == str(select(name, torch.from_numpy(a), torch.from_numpy(z), 9).tolist())
