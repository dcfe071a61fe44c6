"""``telltale edge``: serve a model to edges, send images, emulate a link, audit importances, sweep budgets (SAGE)."""

from __future__ import annotations

import asyncio
import json as json_module
import os
import ssl
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Device, Json, Seed, Threads, emit, set_threads
from telltale.config import check_integer, check_range, check_seed
from telltale.errors import ConfigError, DataError

EdgeOption = Annotated[Path | None, typer.Option(help="The edge's checkpoint: a local Hugging Face folder.")]
ServerOption = Annotated[Path | None, typer.Option(help="The server's checkpoint.")]
Data = Annotated[Path | None, typer.Option(help="A folder of images, one subfolder per class.")]
Limit = Annotated[int, typer.Option(help="At most so many images, drawn at random.")]
Token = Annotated[str | None, typer.Option(help="Bearer token. Better: the environment's TELLTALE_EDGE_TOKEN.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    edge = typer.Typer(help="Send the best evidence that fits into the uplink (SAGE).", no_args_is_help=True)
    for command in (serve, send, link, audit, sweep):
        edge.command(command.__name__)(command)
    app.add_typer(edge, name="edge")


def serve(
    model: Annotated[Path, typer.Option(help="The server's checkpoint: a local Hugging Face folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback a token is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8765,
    token: Token = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file with the certificate, for wss.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file with its key.")] = None,
    max_batch: Annotated[int, typer.Option(help="Requests that go through the model together.")] = 32,
    max_wait: Annotated[float, typer.Option(help="Milliseconds to wait for more requests.")] = 0.0,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are refused.")] = 128,
    grace: Annotated[float, typer.Option(help="Seconds for requests under way at the end.")] = 5.0,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Serve a model to edges over WebSocket; /health and /metrics are on the same port. Ctrl-C answers what is under way and ends.

    Example: `telltale edge serve --model runs/sweep/server --port 8765`
    """
    set_threads(threads)
    token = token or os.environ.get("TELLTALE_EDGE_TOKEN")
    if host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise ConfigError(f"host={host!r} is beyond loopback and no token was given; give --token.")
    tls = _server_tls(certificate, key)
    from telltale.edge.server import CloudServer, served_model
    from telltale.models.vision import load_vision

    vision = load_vision(model, device=device)
    server = CloudServer(
        served_model(vision),
        host=host,
        port=port,
        token=token,
        max_batch=max_batch,
        max_wait=max_wait / 1000,
        queue=queue,
        tls=tls,
        grace=grace,
    )

    async def run() -> None:
        await server.start()
        _tell({"url": server.url, "model": str(model)}, f"{model} at {server.url}; Ctrl-C ends it", json=json)
        await _until_interrupted()
        await server.close()

    asyncio.run(run())


def send(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    model: Annotated[Path, typer.Option(help="The edge's checkpoint.")],
    server: Annotated[str | None, typer.Option(help="ws:// or wss:// address. Default: stay at the edge.")] = None,
    profile: Annotated[Path | None, typer.Option(help="edge.json of a sweep: selector, importance, weights.")] = None,
    bytes: Annotated[
        int | None, typer.Option(help="Bytes per request. Default: what the measured uplink carries.")
    ] = None,
    deadline: Annotated[float, typer.Option(help="Milliseconds from image to answer.")] = 500.0,
    arbitration: Annotated[str, typer.Option(help="fused, edge, server or max_confidence.")] = "fused",
    gate: Annotated[
        float | None, typer.Option(help="Bits of min-entropy from which images are sent; 0 sends all.")
    ] = None,
    token: Token = None,
    ca: Annotated[Path | None, typer.Option(help="PEM file of the authority that signed a wss server.")] = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Answer images at the edge with the server's help, within bytes and deadline; a line each.

    Example: `telltale edge send cam/ --model ./edge --server ws://127.0.0.1:8765 --profile edge.json --bytes 600`
    """
    set_threads(threads)
    check_range("deadline", deadline, low=1.0)
    from telltale.edge.budget import OVERHEAD, ByteBudget, websocket_header
    from telltale.edge.client import EdgeClient, edge_model
    from telltale.edge.gate import Gate
    from telltale.edge.images import image_files, read_image
    from telltale.edge.profile import Profile
    from telltale.errors import BudgetError
    from telltale.models.vision import load_vision

    least = OVERHEAD + websocket_header(OVERHEAD)
    if bytes is not None and bytes <= least:
        raise BudgetError(f"bytes={bytes} is below the header of a request ({least} bytes); give more.")
    chosen = Profile() if profile is None else Profile.load(profile)
    if gate is not None:
        chosen = replace(chosen, gate=Gate(threshold=gate))
    policy = chosen.policy(deadline=deadline / 1000, arbitration=arbitration)
    vision = load_vision(model, device=device)
    names = [file for path in images for file in (image_files(path) if path.is_dir() else [path])]
    pixels = [read_image(file, vision.size) for file in names]
    edge = edge_model(vision, importance=chosen.choice.importance, space=chosen.choice.space)
    edge.look(pixels[0])
    token = token or os.environ.get("TELLTALE_EDGE_TOKEN")
    tls = None if ca is None else _client_tls(ca)
    answers = []
    with EdgeClient(edge, server, policy=policy, budget=ByteBudget(bytes), token=token, tls=tls) as client:
        if server is not None:
            _warn_of_misfit(client)
        for name, image in zip(names, pixels, strict=True):
            answer = client.predict(image)
            record = {"image": str(name), **asdict(answer)}
            del record["log_probabilities"]
            answers.append(record)
            if not json:
                told = f"{answer.label:<12} {answer.source:<7}{answer.bytes_up:>6} B {1000 * answer.seconds:7.1f} ms"
                typer.echo(f"{told}  {name}  ({answer.reason})")
    if json:
        emit({"answers": answers})


def link(
    to: Annotated[str, typer.Option(help="host:port of the server behind the link.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8766,
    kbps: Annotated[float | None, typer.Option(help="Kilobits per second up. Default: unlimited.")] = None,
    rtt: Annotated[float, typer.Option(help="Round trip, milliseconds.")] = 0.0,
    jitter: Annotated[float, typer.Option(help="Up to so many milliseconds more, at random.")] = 0.0,
    loss: Annotated[float, typer.Option(help="Share of segments that stall by a retransmission time-out.")] = 0.0,
    timeout: Annotated[float, typer.Option(help="That time-out, milliseconds.")] = 200.0,
    resets: Annotated[float, typer.Option(help="Share of segments that reset the connection.")] = 0.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Stand between edge and server as a thin uplink: rate, delay, jitter, stalls, resets; counts the bytes.

    Example: `telltale edge link --to 127.0.0.1:8765 --kbps 60 --rtt 200 --loss 0.02`
    """
    from telltale.edge.link import LinkConfig, LinkProxy

    name, separator, number = to.rpartition(":")
    if not separator or not name or not number.isdecimal() or not 0 < int(number) < 65_536:
        raise ConfigError(f"to={to!r} is not understood; expected host:port with a port from 1 to 65535.")
    if kbps is not None:
        check_range("kbps", kbps, low=0.008)
    check_integer("port", port, low=0, high=65_535)
    config = LinkConfig(
        rate=None if kbps is None else 125.0 * kbps,
        round_trip=rtt / 1000,
        jitter=jitter / 1000,
        loss=loss,
        timeout=timeout / 1000,
        resets=resets,
        seed=seed,
    )
    proxy = LinkProxy(name, int(number), config, listen=host, at=port)

    async def run() -> None:
        await proxy.start()
        told = f"ws://{host}:{proxy.port} leads to {to}; Ctrl-C ends it"
        _tell({"url": f"ws://{host}:{proxy.port}", "to": to, **asdict(config)}, told, json=json)
        await _until_interrupted()
        await proxy.close()
        counted = {"bytes_up": proxy.up, "bytes_down": proxy.down, "connections": proxy.connections}
        _tell(counted, f"{proxy.up} bytes up, {proxy.down} down, {proxy.connections} connections", json=json)

    asyncio.run(run())


def audit(
    edge: Annotated[Path, typer.Option(help="The edge's checkpoint.")],
    data: Annotated[Path, typer.Option(help="A folder of images, one subfolder per class.")],
    server: ServerOption = None,
    out: Annotated[Path | None, typer.Option(help="Where the audit goes, JSON.")] = None,
    share: Annotated[float, typer.Option(help="Share of the patches in the deletion test.")] = 0.3,
    limit: Limit = 500,
    device: Device = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Test whether the edge's importances are worth anything on your images, and choose a selector by it.

    Example: `telltale edge audit --edge ./edge --server ./server --data calibration/`
    """
    set_threads(threads)
    from telltale.edge.audit import audit_importances
    from telltale.edge.images import read_folder
    from telltale.models.vision import load_vision

    small = load_vision(edge, device=device)
    large = None if server is None else load_vision(server, device=device)
    images = read_folder(data, small.size, small.labels, limit=limit, seed=seed)
    result = audit_importances(small, images, server=large, share=share, seed=seed)
    if out is not None:
        result.save(out)
    if json:
        emit(result.document())
        return
    for row in result.deletions:
        typer.echo(
            f"{row.importance:<10} top {row.top:5.1f}%  random {row.random:5.1f}%  bottom {row.bottom:5.1f}%  "
            f"top - random {row.gain:+5.1f} ± {row.error:.1f}  {row.verdict}"
        )
    if result.warning:
        typer.echo(f"warning: {result.warning}", err=True)
    typer.echo(f"choice: {result.choice.name}")


def sweep(
    run_dir: Annotated[Path, typer.Option(help="Where models, figures, page and edge.json go.")] = Path("runs/sweep"),
    edge: EdgeOption = None,
    server: ServerOption = None,
    data: Data = None,
    selectors: Annotated[
        str, typer.Option(help="Selectors beside the audit's choice, with commas.")
    ] = "sage,topk,uniform,random",
    shares: Annotated[str, typer.Option(help="Shares of the patches, with commas.")] = "0.09,0.2,0.3,0.41",
    codec: Annotated[
        str, typer.Option(help="Codec of the patches; one of whole images: edge.json sends those.")
    ] = "mosaic_webp",
    gate: Annotated[float, typer.Option(help="Bits of min-entropy from which images are offloaded.")] = 1.0,
    swap: Annotated[bool, typer.Option("--swap", help="Add the swap test.")] = False,
    coverage: Annotated[bool, typer.Option("--coverage", help="Add the coverage of cells.")] = False,
    limit: Limit = 1000,
    device: Device = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Accuracy against bytes with whole-image baselines and paired errors, a page with pictures, and edge.json for `edge send`.

    Without --edge, --server and --data it trains a small pair on scenes of digits: at most 8 minutes on 2 cores. Two fifths of the
    images audit the importances. Example: `telltale edge sweep --edge ./edge --server ./server --data test/`
    """
    set_threads(threads)
    given = [edge is not None, server is not None, data is not None]
    if any(given) and not all(given):
        raise ConfigError(
            "some of --edge, --server and --data were given; expected all of them, or none for the digit scenes."
        )
    budgets_asked = _shares(shares)
    check_integer("limit", limit, low=1)
    check_seed(seed)
    from telltale.edge.audit import audit_importances
    from telltale.edge.codecs import codec_named
    from telltale.edge.evaluation import PAPER, Choice, budgets_of, check_pair, grid_options
    from telltale.edge.gate import Gate
    from telltale.edge.images import Images, read_folder
    from telltale.edge.importance import available
    from telltale.edge.page import pictures_of, write_page
    from telltale.edge.profile import Profile
    from telltale.edge.selection import selector_description
    from telltale.edge.sweep import sweep_budgets
    from telltale.models.vision import load_vision
    from telltale.runs.files import check_writable, write_atomically

    # All that can be wrong is told before minutes of training.
    gated, asked = Gate(threshold=gate), [name.strip() for name in selectors.split(",") if name.strip()]
    patch_codec = codec if codec_named(codec).uses_patches else "mosaic_webp"
    for name in asked:
        selector_description(name)
    check_writable(run_dir / "sweep.json")
    if edge is None or server is None:
        edge, server = _default_pair(run_dir, quiet=json)
    small, large = load_vision(edge, device=device), load_vision(server, device=device)
    check_pair(small, large)
    if data is None:
        from telltale.tasks.scenes import scenes

        pixels, labels = scenes(limit, split="test", seed=seed)
        images = Images(pixels, labels, tuple(Path(f"scene-{number}") for number in range(limit)))
    else:
        images = read_folder(data, small.size, small.labels, limit=limit, seed=seed)
    if images.labels is None:
        raise DataError(f"{data} has no class subfolders; a sweep needs the right answers.")
    calibration, rest = images.split(0.4, seed=seed)
    result = audit_importances(small, calibration, server=large, seed=seed)
    choices = [result.choice]
    # SigLIP has no class token: there the paper's selectors use the importance that the audit chose.
    preset = PAPER if PAPER.importance in available(small) else replace(PAPER, importance=result.choice.importance)
    for name in asked:
        choice = replace(preset, selector=name, options=grid_options(small) if name == "uniform" else ())
        if choice.name not in [known.name for known in choices]:
            choices.append(choice)
    own_topk = Choice("topk", result.choice.importance, result.choice.space)
    if own_topk.name not in [known.name for known in choices]:
        choices.append(own_topk)
    budgets = budgets_of(budgets_asked, small.patches)
    told = None if json else lambda text: typer.echo(text, err=True)
    found = sweep_budgets(
        *(small, large, rest),
        choices=choices,
        budgets=budgets,
        codec=patch_codec,
        gate=gated,
        swap=swap,
        coverage=coverage,
        seed=seed,
        tell=told,
    )
    if codec == patch_codec:
        profile = Profile(result.choice, dict(found.arbiter(result.choice.name).weights), codec, gated)
    else:
        profile = Profile(result.choice, found.weights_of_whole(codec), codec, gated, weigh="bytes")
    profile.save(run_dir / "edge.json")
    result.save(run_dir / "audit.json")
    document = {"edge": str(edge), "server": str(server), **found.document(), "choice": result.choice.name}
    write_atomically(run_dir / "sweep.json", json_module.dumps(document, indent=1) + "\n")
    shown = rest.take(_unsure(small, rest, gated)[:3])
    arbiter = found.arbiter(result.choice.name)
    pictures = pictures_of(small, large, shown, result.choice, budgets[:3], codec=patch_codec, arbiter=arbiter)
    page = write_page(run_dir / "sweep.html", found, audit=result, pictures=pictures)
    if not any(profile.weights.values()):
        typer.echo("warning: the server's answers did not help at any budget: this edge.json sends nothing.", err=True)
    if json:
        emit({**document, "page": str(page), "profile": str(run_dir / "edge.json")})
    else:
        typer.echo(f"{page}; send with --profile {run_dir / 'edge.json'}")


def _unsure(vision: Any, images: Any, gate: Any) -> Any:
    import numpy as np

    from telltale.edge.evaluation import answers

    return np.flatnonzero(gate.offloads(np.exp(answers(vision, images.pixels))))


def _default_pair(run_dir: Path, *, quiet: bool) -> tuple[Path, Path]:
    from telltale.edge.training import DEFAULT_EDGE, DEFAULT_SERVER, train_pair
    from telltale.runs.progress import ProgressBar

    total = DEFAULT_EDGE.steps + DEFAULT_SERVER.steps
    with ProgressBar("training edge and server", total) as bar:

        def tell(name: str, step: int, steps: int, loss: float) -> None:
            bar.update(step + (DEFAULT_EDGE.steps if name == "server" else 0), f"{name} loss {loss:.2f}")

        return train_pair(run_dir, tell=None if quiet else tell)


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"shares={text!r} is not understood; expected numbers with commas, such as 0.1,0.3."
        ) from None
    for share in found:
        check_range("shares", share, low=0.001, high=1.0)
    return found


def _server_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("only one of --certificate and --key was given; wss needs both.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{certificate} and {key} cannot be used for TLS: {error}.") from error
    return context


def _client_tls(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{ca} cannot be used as a certificate authority: {error.strerror or error}.") from error


def _warn_of_misfit(client: Any) -> None:
    """A server that does not fit is a mistake of the user's; one that is away may come back."""
    try:
        client.check_server(2.0)
    except DataError as error:
        if "do not fit" in str(error):
            raise
        typer.echo(f"warning: {error} Answers come from the edge.", err=True)


def _tell(document: dict[str, Any], sentence: str, *, json: bool) -> None:
    if json:
        emit(document)
    else:
        typer.echo(sentence, err=True)


async def _until_interrupted() -> None:
    import signal

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()
