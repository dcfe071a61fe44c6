"""What an image costs on the uplink: bytes against distortion on photographs, and 10,000 requests counted by a proxy.

Photographs: scikit-learn's two, and with ``--photos`` a local folder. 224 x 224, patches of 16, 48 of 196: random ones and those
that farthest-point sampling of pixels chooses; whole JPEG and WebP beside them. Distortion is PSNR over the pixels that were sent.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from measurement import write_result
from telltale.edge.arbitration import Arbiter, CircuitBreaker
from telltale.edge.budget import ByteBudget, Space, on_socket, pack
from telltale.edge.client import EdgeClient, EdgeModel, Policy
from telltale.edge.codecs import QUALITIES, codec_named, cut
from telltale.edge.gate import Gate
from telltale.edge.link import LinkProxy
from telltale.edge.selection import select
from telltale.edge.server import CloudServer, Served
from telltale.edge.wire import OVERHEAD, Frame, websocket_header

SIDE, PATCH, COUNT = 224, 16, 48
SPACE = Space(SIDE // PATCH, SIDE // PATCH, PATCH)
SHOWN = (90, 70, 50, 30, 10)


def photographs(folder: Path | None) -> dict[str, np.ndarray]:
    """Square crops of the middle, resized: scikit-learn's two by name, and the folder's."""
    bundle = load_sample_images()
    pictures = {
        Path(name).stem: Image.fromarray(image) for name, image in zip(bundle.filenames, bundle.images, strict=True)
    }
    for file in sorted(folder.rglob("*.*")) if folder else []:
        if file.suffix.lower() in (".jpg", ".jpeg", ".png"):
            pictures[file.stem] = Image.open(file).convert("RGB")
    found = {}
    for name, picture in pictures.items():
        side = min(picture.size)
        left, top = (picture.size[0] - side) // 2, (picture.size[1] - side) // 2
        found[name] = np.asarray(
            picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        )
    return found


def psnr(image: np.ndarray, frame: Frame) -> float:
    """Over the pixels that were sent, dB."""
    received = frame.image()
    if frame.indices and not codec_named(frame.codec).whole:
        received, image = cut(received, frame.indices, PATCH), cut(image, frame.indices, PATCH)
    error = ((received.astype(float) - image) ** 2).mean()
    return float(10 * np.log10(255**2 / error)) if error else 99.0


def distortion(pictures: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row per codec, setting and way to choose: mean bytes on the socket and PSNR over the pictures."""
    rows = []
    for codec in ("raw8", "raw4", "mosaic_webp", "mosaic_jpeg", "filled", "jpeg", "webp", "lowres"):
        kind = codec_named(codec)
        settings = [QUALITIES.index(q) for q in SHOWN] if kind.settings == len(QUALITIES) else range(kind.settings)
        for setting in settings:
            for way in ("random", "fps") if kind.uses_patches else ("whole",):
                sizes, quality, framing = [], [], []
                for number, image in enumerate(pictures.values()):
                    pixels = cut(image, range(196), PATCH).reshape(196, -1).astype(np.float32)
                    spread = pixels.std(axis=1)
                    chosen = (
                        select(way, spread, pixels - pixels.mean(), COUNT, generator=number) if way != "whole" else None
                    )
                    if way == "fps":
                        chosen = select("fps", spread, pixels - pixels.mean(), COUNT)
                    frame = pack(
                        image,
                        lambda count, chosen=chosen: chosen[:count] if chosen is not None else [],
                        space=SPACE,
                        codec=codec,
                        limit=1 << 20,
                        count=COUNT if chosen is not None else None,
                        setting=setting,
                    )
                    message = frame.encode()
                    sizes.append(on_socket(len(message)))
                    framing.append(OVERHEAD + websocket_header(len(message)))
                    quality.append(psnr(image, frame))
                rows.append(
                    {
                        "codec": codec,
                        "setting": QUALITIES[setting] if kind.settings == len(QUALITIES) else setting,
                        "patches": way,
                        "bytes": float(np.mean(sizes)),
                        "psnr": float(np.mean(quality)),
                        "largest_framing": max(framing),
                    }
                )
                print(
                    f"{codec:<12} {rows[-1]['setting']:>4} {way:<7} {np.mean(sizes):8.0f} B  {np.mean(quality):5.1f} dB",
                    flush=True,
                )
    return rows


def counted_requests(pictures: dict[str, np.ndarray], requests: int) -> dict[str, Any]:
    """Requests of random budgets and codecs through the counting proxy: bytes from client to server, WebSocket headers included."""
    generator = np.random.default_rng(0)
    small = [np.asarray(Image.fromarray(image).resize((64, 64))) for image in pictures.values()]
    logs = np.log(np.full(2, 0.5))
    embeddings = generator.normal(size=(64, 16)).astype(np.float32)

    def look(image: np.ndarray) -> Any:
        return logs, generator.random(64), embeddings

    served = Served(8, 8, 8, ("a", "b"), lambda frames: np.tile(logs, (len(frames), 1)))
    worst, total, fill, answered = 0.0, 0, [], 0
    server = CloudServer(served)
    with server.background():
        proxy = LinkProxy("127.0.0.1", server.port)
        with proxy.background() as port:
            budget = ByteBudget(1000)
            clients = [
                EdgeClient(
                    EdgeModel(8, 8, 8, ("a", "b"), look),
                    f"ws://127.0.0.1:{port}",
                    policy=Policy(
                        "sage", codec=codec, gate=Gate(threshold=0.0), arbiter=Arbiter("server"), deadline=30.0
                    ),
                    budget=budget,
                    breaker=CircuitBreaker(failures=10**9),
                )
                for codec in ("mosaic_webp", "mosaic_jpeg", "raw8", "raw4", "filled", "jpeg")
            ]
            for client in clients:
                client.check_server(10)
            for number in range(requests):
                client = clients[int(generator.integers(len(clients)))]
                budget.ceiling = int(
                    np.exp(generator.uniform(np.log(300), np.log(70_000 if number % 50 == 0 else 4000)))
                )
                before = proxy.up
                answer = client.predict(small[number % len(small)])
                counted = proxy.up - before
                assert counted == answer.bytes_up, (counted, answer)
                answered += answer.source == "server"
                worst = max(worst, counted / budget.ceiling)
                total += counted
                fill.append(counted / budget.ceiling if counted else np.nan)
            for client in clients:
                client.close()
    return {
        "requests": requests,
        "answered_by_server": answered,
        "largest_share_of_budget": worst,
        "median_share_of_budget": float(np.nanmedian(fill)),
        "refused_as_too_small": int(np.isnan(fill).sum()),
        "bytes": total,
        "every_request_within_budget": bool(worst <= 1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="a local folder of photographs, beside scikit-learn's two")
    parser.add_argument("--requests", type=int, default=10_000)
    arguments = parser.parse_args()
    pictures = photographs(arguments.photos)
    rows = distortion(pictures)
    counted = counted_requests(pictures, arguments.requests)
    print(counted)
    write_result("edge_bytes", photographs=sorted(pictures), patches=COUNT, of=196, distortion=rows, proxy=counted)


if __name__ == "__main__":
    main()
