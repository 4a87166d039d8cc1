"""Published versions inside a real SGLang: staged, applied by our loader, read back, compared with the trainer.

    python bench/weights/into_sglang.py delta --shape 4b --running 64 --context 2048 --recovery --kept
        --modes retract in_place --limit-s 225 --out F [--ahead 60 --watch-every 5]
    python bench/weights/into_sglang.py full --shape 4b --running 64 --context 2048 --after-s 150 --out F [--ahead 4]
    python bench/weights/into_sglang.py delta [--model astra:tiny] [--versions 20] [--modes abort]

Starts one SGLang server on the first GPU with our custom weight loader, publishes version 0 in full and then versions
of an Adam-like update, and brings each into the server while `--running` streams decode. `delta`: at 3 % density,
diffed and coded on the GPU, in each of `--modes`. `full`: every version in full, which waits in each of `--places`: GPU
memory, pinned host memory, or (`file`) neither: copied from the file in the pause; the first of each place is not
counted, it makes the memory. One line of JSON for each version goes to stderr as soon as it is known, and everything so
far to --out; at the end medians and the 99th percentile (of fewer than a hundred versions the largest) of each mode.
A version whose digests are wrong, or whose read-back differs, ends the bench. Versions:

    density, changed, bytes, bytes_per_changed, full_bytes
    publish_s (digest_s, delta_s)           by the publisher: everything; digests; the delta, diff to last byte
    diff_s, encode_s                        in delta_s, by the clock: asking the GPU, and beside it the coding
    transfer_s, stage_s                     fetched and checked; until the server had it decoded and on the device
    decode_s, decode_gb_per_s               of the server's decoder; bytes of the full version over them
    abort_ms, pause_ms                      ending all requests (mode abort); pause sent to continue answered, split:
                                            pause, call, continue; inside the call: begin, record, apply,
                                            digest (tables, launch, device), end (begin and end: SGLang
                                            from 0.5.21 on)
    load_s                                  bringing the bits of a full version to the memory in which they wait
    readback_s                              every fourth delta, every full version, beside generation, split:
                                            wait (for the thread), place, tables, launch, device; readback_seen_s is
                                            from continue answered to the read-back
    again_s                                 until every stream has brought tokens again, from the moment when abort or
                                            pause was sent; null when not within 8 s
    tokens_per_s, staging_tokens_per_s      of the streams in a quiet second, and in the staging_s that a version is
                                            staged; staging_ratio is that of all versions of a mode together
    recovery_s                              until tokens/s is at 95 % of the quiet second again (--recovery), from the
                                            same moment; null when not within 8 s
    kept_*, fresh_*                         --kept, once a mode: |log-probability as drawn - by the new weights alone|
                                            of requests that lived through an update, and of others (streams.py)
    parity_*                                |server - transformers| log-probabilities (--parity, a small --model)

--limit-s bounds the whole run of `delta`, --after-s what follows in `full` once the server is up: each mode gets its
share of what is left, and does fewer versions when that is short. More fit with --ahead: versions that are published
while the server starts (their rows lack the seconds of publishing, which then went on beside no engine), and with
--watch-every K: the quiet second, the rate while staging and the recovery belong to every Kth version of a mode, and
those between follow as soon as every stream generates. Everything it starts, it stops. `--device cpu` is for trying it,
beside SGLang itself in the environment that `scripts/sglang_on_cpu.py DIR` makes, or beside a stand-in.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount

from astracli.engines.client import EngineClient
from astracli.engines.sglang.client import NO_TENSORS, SglangClient
from astracli.process import ports
from astracli.process.server import ServerThread
from astracli.weights.publish.server import weights_app
from astracli.weights.receive.subscriber import Subscriber

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import adapter_of, folder, more_options, show

from weights.sglang_run import BEGAN, Record, Run, Versions, summary, wait_ready
from weights.sglang_server import TOKEN, Server, Trainer, compare, model_directory
from weights.streams import Meter

LOADERS = "staging_loader"
PLACES = ("gpu", "host", "file")


async def drive(args: argparse.Namespace, folder: Path, record: Record) -> None:
    stage = folder / "stage"
    stage.mkdir()
    directory, draw = model_directory(args, folder)
    full, more = args.what == "full", {}
    if full:
        settings = {"ASTRA_VERIFY_INTERVAL": "1", "ASTRA_STAGING": args.places[0], "ASTRA_STAGING_KEPT": "1"}
        more = {"loaders": [f"{LOADERS}.{place}" for place in PLACES], "settings": settings}
    server = Server(args, directory, stage, folder / "sglang.log", **more)
    try:
        model = draw()
        adapter = adapter_of(directory)
        sent = {"transfer": "full", "keep": args.ahead + 2} if full else {}
        trainer = Trainer(args, model, adapter, folder / "weights", **sent)
        check = model.to(args.device) if args.parity else None
        del model
        app = Starlette(routes=[Mount("/weights", weights_app(folder / "weights"))])
        files = ServerThread(app, ports.bind("127.0.0.1")).start()
        subscriber = Subscriber(files.url, TOKEN, stage, directory)
        published = trainer.publish(0)
        record.note(version_0_publish=published)
        versions = Versions(trainer)
        async with SglangClient(server.url, TOKEN, stage_dir=stage) as client:
            patience = args.ready_s if full else min(args.ready_s, args.limit_s - (time.monotonic() - BEGAN))
            ready = asyncio.create_task(wait_ready(client, server, patience))
            if args.ahead:
                record.note(published_ahead=await versions.ahead(args.ahead, ready))
            await ready
            up = time.monotonic()
            record.note(sglang_ready_s=up - BEGAN)
            run = Run(args, versions, subscriber, client)
            record.row(published | await run.first())
            parity = functools.partial(compare, client, check, trainer, adapter) if args.parity else None
            end = up + args.after_s - 10.0 if full else BEGAN + args.limit_s - 15.0  # for stopping
            await (each_place(args, run, record, end) if full else modes(args, run, record, end, parity))
        subscriber.close()
        trainer.publisher.close()
        files.stop()
    except Exception as error:
        error.add_note(server.last_lines())
        raise
    finally:
        server.stop()
        if args.keep_log:
            shutil.copy(folder / "sglang.log", args.keep_log)


async def move(client: EngineClient, place: str) -> None:
    """Let versions wait in `place` from now on."""
    body = {"serialized_named_tensors": NO_TENSORS, "load_format": f"{LOADERS}.{place}", "flush_cache": False}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    await client.pause("in_place")
    async with httpx.AsyncClient(headers=headers, timeout=120, trust_env=False) as http:
        reply = await http.post(f"{client.url}/update_weights_from_tensor", json=body)
    await client.resume()
    if reply.status_code != 200 or not reply.json()["success"]:
        raise RuntimeError(f"staging in `{place}`: {reply.text[:300]}")


async def each_place(args: argparse.Namespace, run: Run, record: Record, end: float) -> None:
    """Versions that wait in one place after another, under one load that never stops."""
    async with Meter(run.client.url, TOKEN, args.running, args.context - 100) as meter:
        await asyncio.sleep(args.warm_s)
        for k, place in enumerate(args.places):
            deadline = time.monotonic() + (end - time.monotonic()) / (len(args.places) - k)
            await move(run.client, place)
            taken = 0.0
            for n in range(args.versions + 1):
                if time.monotonic() + 1.2 * taken > deadline:
                    record.note(**{f"{place}_cut": f"{n} versions: the time would not suffice for more"})
                    break
                row = await run.next("in_place", meter, watched=True)
                if row["staging"] != place:
                    raise RuntimeError(f"version {row['version']} waited in `{row['staging']}`, not `{place}`")
                record.row(row | {"mode": place, "counted": n > 0})
                taken = row["version_s"]


async def modes(args: argparse.Namespace, run: Run, record: Record, end: float, parity: Any) -> None:
    """Every mode's versions under one load that never stops. The first of all is not counted: it warms up both sides,
    and is compared with a version that is still on the host. `parity`: makes the comparison with transformers."""
    async with Meter(run.client.url, TOKEN, args.running, args.context - 100) as meter:
        await asyncio.sleep(args.warm_s)
        for k, mode in enumerate(args.modes):
            deadline = time.monotonic() + (end - time.monotonic()) / (len(args.modes) - k)
            taken: list[float] = []
            warm_up = int(k == 0)
            for n in range(args.versions + warm_up):
                if taken and time.monotonic() + 1.2 * max(taken[-max(3, args.watch_every) :]) > deadline:
                    record.note(**{f"{mode}_cut": f"{n} versions: {args.limit_s:.0f} s would not suffice for more"})
                    break
                if args.kept and mode != "abort" and n == warm_up:
                    record.row(await run.kept(mode, meter))
                    await asyncio.sleep(args.warm_s)
                row = await run.next(mode, meter, watched=(n - warm_up) % args.watch_every == 0)
                row["counted"] = n >= warm_up
                if parity is not None:
                    row |= await parity()
                record.row(row)
                taken.append(row["version_s"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    both = {
        "json": False, "model": "astra:tiny", "device": ("cuda", "cpu"), "running": 32,
        "versions": {20: "of each mode or place, at most"}, "context": {512: "context length of the server"},
        "ahead": {0: "versions published while the server starts, at most"},
        "warm_s": {4.0: "generating before the first update"}, "quiet_s": {1.0: "before each update, for its rate"},
        "lr": {9e-7: "of the made-up steps; 9e-7 changes 3 %% of bf16 weights of std 0.02"}, "ready_s": 400.0,
        "out": {Path: "JSON of all that is known, written after each version"},
        "keep_log": {Path: "copy the server's log here"}, "sglang_python": sys.executable,
    }  # fmt: skip
    for what in ("delta", "full"):
        command = more_options(commands.add_parser(what), **both)
        command.add_argument("--shape", choices=["4b"], help="random weights of this shape instead of --model")
        if what == "full":
            more_options(command, after_s={150.0: "of everything once the server is up"})
            command.add_argument("--places", nargs="+", choices=PLACES, default=["gpu", "host"])
            command.set_defaults(recovery=True, parity=False)
            continue
        command.add_argument("--modes", nargs="+", choices=["abort", "retract", "in_place"], default=["abort"])
        more_options(
            command, watch_every={1: "rates around every Kth version of a mode only"},
            recovery={False: "wait for full speed after each update"},
            kept={False: "log-probabilities of requests that live through an update"},
            parity={False: "compare log-probabilities after every version"},
            limit_s={300.0: "of the whole run, the server's start included"},
        )  # fmt: skip
    args = parser.parse_args()
    if args.ahead and args.parity:
        parser.error("--parity compares with the trainer's last version: none may be published ahead")
    return args


def main() -> None:
    args = arguments()
    record = Record(args.out)
    with folder(in_memory=True) as name:
        asyncio.run(drive(args, name, record))
    rows = [
        {"of": mode, "figure": key, **found}
        for mode, figures in summary(record.rows).items()
        for key, found in figures.items()
    ]
    show(args, record.doc | {"summary": summary(record.rows)} if args.json else {"summary": rows})


if __name__ == "__main__":
    main()
