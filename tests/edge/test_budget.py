import time

import numpy as np
import pytest

from telltale.edge.budget import BudgetTooSmall, ByteBudget, Space, on_socket, pack
from telltale.edge.codecs import codec_named, codec_names, register_codec
from telltale.edge.wire import Frame
from telltale.errors import ConfigError, DataError

SPACE = Space(14, 14, 16)


@pytest.fixture(scope="module")
def photograph():
    from PIL import Image
    from sklearn.datasets import load_sample_images

    return np.asarray(Image.fromarray(load_sample_images().images[0]).resize((224, 224)))


@pytest.fixture(scope="module")
def order():
    return np.random.default_rng(0).permutation(196)


@pytest.mark.parametrize("codec", codec_names())
def test_a_frame_never_exceeds_its_budget_and_fills_it(codec, photograph, order):
    kind = codec_named(codec)
    for limit in (900, 2500, 9000):
        try:
            frame = pack(photograph, lambda n: order[:n], space=SPACE, codec=codec, limit=limit)
        except BudgetTooSmall:
            smallest = kind.encode(photograph, [0] if kind.uses_patches else [], 16, kind.settings - 1)
            assert len(smallest) + 34 > limit - 2
            continue
        data = frame.encode()
        assert on_socket(len(data)) <= limit
        assert Frame.decode(data) == frame
        if codec in ("mosaic_webp", "mosaic_jpeg", "raw8", "raw4") and len(frame.indices) < 196:
            more = kind.encode(photograph, sorted(order[: len(frame.indices) + 1].tolist()), 16, frame.setting)
            assert on_socket(len(data) - len(frame.payload) + len(more)) > limit - 2


def test_raw_patches_are_exact_and_sheets_are_close(photograph, order):
    chosen = sorted(order[:48].tolist())
    for codec, least in (("raw8", np.inf), ("raw4", 33), ("mosaic_webp", 30), ("mosaic_jpeg", 29)):
        setting = 3 if codec.startswith("mosaic") else 0
        frame = pack(
            photograph, lambda n: chosen[:n], space=SPACE, codec=codec, limit=1 << 17, count=48, setting=setting
        )
        assert frame.indices == tuple(chosen)
        image = frame.image()
        from telltale.edge.codecs import cut

        error = (cut(image, chosen, 16).astype(float) - cut(photograph, chosen, 16)) ** 2
        psnr = np.inf if error.max() == 0 else 10 * np.log10(255**2 / error.mean())
        assert psnr >= least, codec
        unsent = np.setdiff1d(np.arange(196), chosen)
        assert cut(image, unsent, 16).max() == 0


def test_a_sheet_takes_a_twentieth_of_raw_patches(photograph, order):
    raw, sheet = (
        len(pack(photograph, lambda n: order[:n], space=SPACE, codec=c, limit=1 << 17, count=48, setting=s).encode())
        for c, s in (("raw8", 0), ("mosaic_webp", 5))
    )
    assert sheet * 15 < raw


def test_whole_images_and_filled_images_have_no_holes(photograph, order):
    for codec in ("jpeg", "webp", "lowres", "filled"):
        frame = pack(photograph, lambda n: order[:n], space=SPACE, codec=codec, limit=3000)
        error = (frame.image().astype(float) - photograph) ** 2
        assert 10 * np.log10(255**2 / error.mean()) > 17, codec


def test_a_count_is_kept_at_the_best_quality_that_fits(photograph, order):
    small, large = (
        pack(photograph, lambda n: order[:n], space=SPACE, codec="mosaic_webp", limit=limit, count=32)
        for limit in (1200, 6000)
    )
    assert len(small.indices) == len(large.indices) == 32
    assert large.setting < small.setting
    fewer = pack(photograph, lambda n: order[:n], space=SPACE, codec="raw8", limit=5000, count=32)
    assert 1 <= len(fewer.indices) < 32


@pytest.mark.parametrize("codec", ["mosaic_webp", "jpeg"])
def test_the_search_ends_in_time_with_what_it_has(codec, photograph, order):
    def slowly(count):
        time.sleep(0.03)
        return order[:count]

    started = time.monotonic()
    frame = pack(photograph, slowly, space=SPACE, codec=codec, limit=6000, until=started + 0.2)
    assert time.monotonic() - started < 0.3
    assert on_socket(len(frame.encode())) <= 6000
    with pytest.raises(BudgetTooSmall, match="more time"):
        pack(photograph, slowly, space=SPACE, codec=codec, limit=6000, until=started)


def test_a_budget_below_the_header_is_refused(photograph):
    for limit in (0, 20, 34):
        with pytest.raises(BudgetTooSmall, match="header"):
            pack(photograph, lambda n: range(n), space=SPACE, codec="raw8", limit=limit)
    with pytest.raises(ConfigError, match="shape"):
        pack(photograph[:100], lambda n: range(n), space=SPACE, codec="raw8", limit=5000)
    with pytest.raises(ConfigError, match="codec 'png'"):
        pack(photograph, lambda n: range(n), space=SPACE, codec="png", limit=5000)


def test_pictures_of_another_size_are_not_unpacked(photograph):
    from telltale.edge.codecs import WholeImage

    payload = WholeImage("JPEG").encode(photograph, [], 16, 3)
    with pytest.raises(DataError, match="224 x 224"):
        WholeImage("JPEG").decode(payload, [], (32, 32), 4, 3)
    with pytest.raises(DataError, match="no readable"):
        WholeImage("WEBP").decode(payload, [], (224, 224), 16, 3)
    with pytest.raises(ConfigError, match="new name"):
        register_codec("raw8", 99, WholeImage("JPEG"))


def test_budgets_follow_the_uplink_and_the_deadline():
    budget = ByteBudget(guard=0.02, first_rate=1000.0)
    assert budget.bytes(0.52) == 500
    for _ in range(5):
        budget.observe(600, 0.1)
    assert budget.rate == pytest.approx(6000)
    assert budget.bytes(0.12) == pytest.approx(600, abs=1)
    budget.observe_round_trip(0.05)
    assert budget.bytes(0.12) == pytest.approx(300, abs=1)
    budget.observe_failure(600, 1.0)
    assert budget.rate < 2000  # one slow request in five pulls the harmonic mean down
    assert budget.bytes(0.08) == 0
    now = [0.0]
    stuck = ByteBudget(first_rate=10.0, clock=lambda: now[0])
    stuck.observe_failure(500, 30.0)
    assert stuck.bytes(0.5) == 0
    now[0] = 2.5
    assert stuck.bytes(0.5) == stuck.floor  # a probe: the link may have recovered
    for _ in range(5):
        stuck.observe(128, 0.01)
    assert stuck.bytes(0.5) > 5000
    assert ByteBudget(777).bytes(0.001) == 777
    stalled = ByteBudget(first_rate=1000.0)
    stalled.observe_round_trip(0.8)  # of the connection's one ping
    stalled.observe(600, 0.1)
    assert stalled.round_trip == pytest.approx(0.1)  # no round trip is longer than an answer took
    liar = ByteBudget(first_rate=1000.0)
    for _ in range(5):
        liar.observe(600, 0.1, server=6.5)
    assert liar.bytes(0.5) > 0  # no model ran for longer than the answer took
    assert ByteBudget(777, adaptive=True, first_rate=1e6).bytes(1.0) == 777
    with pytest.raises(ConfigError):
        ByteBudget(0)
