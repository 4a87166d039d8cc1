"""Full versions inside a real SGLang, staged beside it on the GPU and in pinned host memory: pause, rates, read-back.

    python bench/gpu_sglang_full.py --shape 4b --running 64 --context 2048 --after-s 150 --out F [--ahead 4]
    python bench/gpu_sglang_full.py --device cpu --sglang-python DIR/bin/python --running 4 --versions 2

Starts one SGLang server on the first GPU with our custom weight loader, publishes every version in full, and brings
each into the server while `--running` streams decode, first staged in GPU memory, then in pinned host memory
(`--places`; `file` is neither: copied from the file in the pause). One line of JSON for each version goes to stderr,
everything so far to --out; at the end, for each place, medians and the 99th percentile (of fewer than a hundred
versions the largest):

    pause_ms            pause sent to continue answered; split: pause, call, continue; in the call: apply (the copies),
                        digest
    load_s              bringing the bits from their file to the memory in which they wait, beside generation
    transfer_s, decode_s   before it: fetched and checked by the subscriber; read and checked by the server's decoder
    staging_ratio       tokens/s of the streams from the fetch to the pause over that of a quiet second before
    recovery_s, again_s until tokens/s is at 95 % of the quiet second; until every stream has brought tokens
    readback_s          every version, after the pause: digests of the parameters under HF names

The first version of each place is not counted: it makes the memory. A version whose digests are wrong, or whose
read-back differs, ends the bench. --after-s bounds what follows once the server is up. Everything it starts, it stops.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import httpx
from delta_rows import BEGAN, Record, summary
from gpu_sglang_delta import Run, Versions, wait_ready
from meter import Meter
from sglang_server import TOKEN, Server, Trainer, adapter_of, model_directory
from starlette.applications import Starlette

from astracli.engines.client import NO_TENSORS, EngineClient
from astracli.hub.server import ServerThread
from astracli.process import ports
from astracli.weights.publish.server import weights_routes
from astracli.weights.receive.subscriber import Subscriber

LOADERS = "staging_loader"
PLACES = ("gpu", "host", "file")


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


async def drive(args: argparse.Namespace, folder: Path, record: Record) -> None:
    stage = folder / "stage"
    stage.mkdir()
    directory, draw = model_directory(args, folder)
    settings = {"ASTRA_VERIFY_INTERVAL": "1", "ASTRA_STAGING": args.places[0], "ASTRA_STAGING_KEPT": "1"}
    loaders = [f"{LOADERS}.{place}" for place in PLACES]
    server = Server(args, directory, stage, folder / "sglang.log", loaders=loaders, settings=settings)
    try:
        model = draw()
        trainer = Trainer(args, model, adapter_of(directory), folder / "weights", transfer="full", keep=args.ahead + 2)
        del model
        files = ServerThread(Starlette(routes=weights_routes(folder / "weights")), ports.bind("127.0.0.1")).start()
        subscriber = Subscriber(files.url, TOKEN, stage, directory)
        published = trainer.publish(0)
        record.note(version_0_publish=published)
        versions = Versions(trainer)
        async with EngineClient(server.url, TOKEN, loader_dir=stage) as client:
            ready = asyncio.create_task(wait_ready(client, server, args.ready_s))
            record.note(published_ahead=await versions.ahead(args.ahead, ready))
            await ready
            up = time.monotonic()
            record.note(sglang_ready_s=up - BEGAN)
            run = Run(args, versions, subscriber, client)
            record.row(published | await run.first())
            await each_place(args, run, record, up + args.after_s - 10.0)  # for stopping
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="astra:tiny")
    parser.add_argument("--shape", choices=["4b"], help="random weights of this shape instead of --model")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=["gpu", "host"])
    parser.add_argument("--versions", type=int, default=20, help="of each place, at most")
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--context", type=int, default=512, help="context length of the server")
    parser.add_argument("--ahead", type=int, default=0, help="versions published while the server starts, at most")
    parser.add_argument("--warm-s", type=float, default=4.0, help="generating before the first update")
    parser.add_argument("--quiet-s", type=float, default=1.0, help="before each update, for the rate without it")
    parser.add_argument("--lr", type=float, default=9e-7, help="of the made-up steps between versions")
    parser.add_argument("--ready-s", type=float, default=400.0)
    parser.add_argument("--after-s", type=float, default=150.0, help="of everything once the server is up")
    parser.add_argument("--out", type=Path, help="JSON of all that is known, written after each version")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sglang-python", default=sys.executable)
    parser.add_argument("--keep-log", type=Path, help="copy the server's log here")
    args = parser.parse_args()
    args.recovery = True
    record = Record(args.out)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        asyncio.run(drive(args, Path(folder), record))
    print(json.dumps(record.doc))
    for place, figures in summary(record.rows).items():
        for key, found in figures.items():
            line = f"{place:9} {key:21} p50 {found['p50']:10.4f}  p99 {found['p99']:10.4f}  of {found['n']}"
            print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
