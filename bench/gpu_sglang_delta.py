"""A published version inside a real SGLang: staged, applied by our loader, read back, compared with the trainer.

    python bench/gpu_sglang_delta.py --shape 4b --running 64 --context 2048 --recovery --kept --modes retract in_place
                                     --limit-s 225 --out F [--ahead 60 --watch-every 5]
    python bench/gpu_sglang_delta.py [--model astra:tiny] [--versions 20] [--modes abort]
    python bench/gpu_sglang_delta.py --device cpu --sglang-python DIR/bin/python --running 4 ...

Starts one SGLang server on the first GPU with our custom weight loader, publishes version 0 in full and then deltas of
an Adam-like update (at 3 % density), diffed and coded on the GPU, and brings each into the server while `--running`
streams decode. One line of JSON for each version goes to stderr as soon as it is known, and everything so far to --out;
at the end medians and the 99th percentile of each mode. Versions:

    density, changed, bytes, bytes_per_changed, full_bytes
    publish_s (digest_s, delta_s)           by the publisher: everything; digests; the delta, diff to last byte
    diff_s, encode_s                        in delta_s, by the clock: asking the GPU, and beside it the coding
    transfer_s, stage_s                     fetched and checked; until the server had it decoded and on the device
    decode_s, decode_gb_per_s               of the server's decoder; bytes of the full version over them
    abort_ms, pause_ms                      ending all requests (mode abort); pause sent to continue answered, split:
                                            pause, call, continue; inside the call: begin, record, apply,
                                            digest (tables, launch, device), end (begin and end: SGLang
                                            from 0.5.21 on)
    readback_s                              every fourth version, after the pause, while the server generates, split:
                                            wait (for the thread), place, tables, launch, device; readback_seen_s is
                                            from continue answered to the read-back
    again_s                                 until every stream has brought tokens again, from the moment when abort or
                                            pause was sent; null when not within 8 s
    tokens_per_s, staging_tokens_per_s      of the streams in a quiet second, and in the staging_s that a version is
                                            staged; staging_ratio is that of all versions of a mode together
    recovery_s                              until tokens/s is at 95 % of the quiet second again (--recovery), from the
                                            same moment; null when not within 8 s
    kept_*, fresh_*                         --kept, once a mode: |log-probability as drawn - by the new weights alone|
                                            of requests that lived through an update, and of others (kept.py)
    parity_*                                |server - transformers| log-probabilities (--parity, a small --model)

--limit-s bounds the whole run: each mode gets its share of what is left after version 0, and does fewer versions when
that is short. More fit with --ahead: versions that are published while the server starts (their rows lack the seconds
of publishing, which then went on beside no engine), and with --watch-every K: the quiet second, the rate while staging
and the recovery belong to every Kth version of a mode, and those between follow as soon as every stream generates.
Everything it starts, it stops. `--device cpu` is for trying it, beside SGLang itself in the environment that
`scripts/sglang_on_cpu.py DIR` makes, or beside a stand-in.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

from delta_rows import BEGAN, Record, summary
from kept import MARGIN, Kept
from meter import Meter
from sglang_server import TOKEN, Server, Trainer, adapter_of, compare, model_directory

from astracli.engines.client import UNPROVEN, EngineClient, flushes
from astracli.hub.api import serve
from astracli.process import ports
from astracli.weights.publish.server import weights_routes
from astracli.weights.receive.subscriber import Subscriber

RECOVERY_S = 8.0


class Versions:
    """The trainer's versions in their order: some are published while the server starts, the others when asked for."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._published = 0
        self._ahead: deque[dict[str, Any]] = deque()

    async def ahead(self, most: int, ready: asyncio.Task[None]) -> int:
        """Publish up to `most` versions until the server is ready: how many."""
        while len(self._ahead) < most and not ready.done():
            found = await self._publish()
            unheard = {key: value for key, value in found.items() if not key.endswith("_s")}  # no engine ran beside it
            self._ahead.append(unheard | {"ahead": True})
        return len(self._ahead)

    async def take(self) -> dict[str, Any]:
        """The next version, and what publishing it beside the engine took."""
        return self._ahead.popleft() if self._ahead else await self._publish()

    async def _publish(self) -> dict[str, Any]:
        self._published += 1
        self._trainer.step()
        return {"version": self._published} | await asyncio.to_thread(self._trainer.publish, self._published)


class Run:
    """One server, its subscriber, and the versions that go into it."""

    def __init__(self, args: argparse.Namespace, versions: Versions, subscriber: Subscriber, client: EngineClient):
        self.args, self.versions, self.subscriber, self.client = args, versions, subscriber, client

    async def first(self) -> dict[str, Any]:
        """Version 0, published already, into a server that makes its weights up; nothing runs."""
        began = time.monotonic()
        self.subscriber.wake(UNPROVEN)  # refused, since these weights are made up, but our loader runs now
        await self.client.pause("abort")
        await self.client.apply_staged(UNPROVEN)
        await self.client.resume()
        woken_s = time.monotonic() - began
        row = await self._bring(0, "abort", None)
        return row | {"wake_s": woken_s, "version_0_s": time.monotonic() - began}

    async def next(self, mode: str, meter: Meter, *, watched: bool) -> dict[str, Any]:
        """A delta, from the trainer's step to the last read-back; `watched`: with the streams' rates around it."""
        began = time.monotonic()
        published = await self.versions.take()
        row = {"mode": mode, **published, **await self._bring(published["version"], mode, meter, watched=watched)}
        row["bytes_per_changed"] = row["bytes"] / max(1, row["changed"])
        row["decode_gb_per_s"] = row["full_bytes"] / 1e9 / max(1e-9, row["decode_s"])
        row["version_s"] = time.monotonic() - began
        return row

    async def _bring(self, version: int, mode: str, meter: Meter | None, *, watched: bool = False) -> dict[str, Any]:
        quiet = time.monotonic()
        await asyncio.sleep(self.args.quiet_s if watched else 0.0)
        staging = time.monotonic()
        plan = await asyncio.to_thread(self.subscriber.fetch, version, version - 1 if version else None)
        times = [time.monotonic()]
        if mode == "abort" and meter:
            await meter.drain(self.client.abort_all)
        times.append(time.monotonic())
        await self.client.pause(mode)
        times.append(time.monotonic())
        answer = await self.client.apply_staged(version, flush=flushes(mode))
        times.append(time.monotonic())
        await self.client.resume()
        times.append(time.monotonic())
        if not answer.success:
            raise RuntimeError(f"version {version} was not applied: {answer.message}")
        result = answer.outcome
        abort_ms, pause_ms, call_ms, continue_ms = (1000 * (b - a) for a, b in itertools.pairwise(times))
        row: dict[str, Any] = {
            "version": version, "kind": plan.kind, "bytes": plan.bytes, "linked": plan.linked,
            "changed": result["changed"], "staging": result.get("staging"), "transfer_s": plan.transfer_s,
            "stage_s": plan.stage_s, "decode_s": result["decode_s"], "load_s": result["load_s"], "abort_ms": abort_ms,
            "pause_ms": pause_ms + call_ms + continue_ms,
            "split_ms": {
                "pause": pause_ms, "call": call_ms, "apply": 1000 * result["apply_s"],
                "digest": 1000 * result["verify_s"], "digest_tables": 1000 * result["digest_tables_s"],
                "digest_launch": 1000 * result["digest_launch_s"], "digest_device": 1000 * result["digest_device_s"],
                "record": 1000 * result["record_s"], "loader": 1000 * result["loader_s"], "continue": continue_ms,
                **{name[:-2]: 1000 * result[name] for name in ("begin_s", "end_s") if name in result},
            },
        }  # fmt: skip
        proven = asyncio.create_task(self._readback(version, times[-1])) if result["readback"] else None
        if meter:
            meter.mark()
            meter.resume()
            row |= await self._felt(meter, times, quiet, staging) if watched else {}
            row["again_s"] = await meter.again(times[0], RECOVERY_S)
            meter.check()
        if proven is not None:
            row |= await proven
        return row

    async def _felt(self, meter: Meter, times: list[float], quiet: float, staging: float) -> dict[str, float | None]:
        """What the streams felt of an update."""
        usual = meter.rate(quiet, staging)
        rates = {"tokens_per_s": usual, "staging_tokens_per_s": meter.rate(staging, times[0])}
        if self.args.recovery:
            rates["recovery_s"] = await meter.recovery(times[0], times[-1], usual, RECOVERY_S)
        return {**rates, "staging_s": times[0] - staging}

    async def _readback(self, version: int, continued: float) -> dict[str, float]:
        found = await asyncio.to_thread(self.subscriber.readback, version)
        return found | {"readback_seen_s": time.monotonic() - continued}

    async def kept(self, mode: str, meter: Meter) -> dict[str, Any]:
        """A version that requests live through, with nothing else running: what it does to their log-probabilities."""
        await meter.drain(self.client.abort_all)
        version = (await self.versions.take())["version"]
        third = (self.args.context - 100) // 3
        async with Kept(self.client.url, TOKEN, min(8, self.args.running), third, third) as kept:
            await kept.begin(least=MARGIN)
            row = await self._bring(version, mode, None)
            kept.updated()
            row |= await kept.compared()
        meter.resume()
        return {"mode": mode, "counted": False, **row}


async def wait_ready(client: EngineClient, server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not await client.health():
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("SGLang did not become ready")
        await asyncio.sleep(0.5)


async def drive(args: argparse.Namespace, folder: Path, record: Record) -> None:
    stage = folder / "stage"
    stage.mkdir()
    directory, draw = model_directory(args, folder)
    server = Server(args, directory, stage, folder / "sglang.log")
    try:
        model = draw()
        adapter = adapter_of(directory)
        trainer = Trainer(args, model, adapter, folder / "weights")
        check = model.to(args.device) if args.parity else None
        del model
        from starlette.applications import Starlette

        files = serve(Starlette(routes=weights_routes(folder / "weights")), ports.bind("127.0.0.1")).start()
        subscriber = Subscriber(files.url, TOKEN, stage, directory)
        published = trainer.publish(0)
        record.note(version_0_publish=published)
        versions = Versions(trainer)
        async with EngineClient(server.url, TOKEN, loader_dir=stage) as client:
            patience = min(args.ready_s, args.limit_s - (time.monotonic() - BEGAN))
            ready = asyncio.create_task(wait_ready(client, server, patience))
            if args.ahead:
                record.note(published_ahead=await versions.ahead(args.ahead, ready))
            await ready
            record.note(sglang_ready_s=time.monotonic() - BEGAN)
            run = Run(args, versions, subscriber, client)
            record.row(published | await run.first())
            parity = functools.partial(compare, client, check, trainer, adapter) if args.parity else None
            await modes(args, run, record, parity)
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


async def modes(args: argparse.Namespace, run: Run, record: Record, parity: Any) -> None:
    """Every mode's versions under one load that never stops. The first of all is not counted: it warms up both sides,
    and is compared with a version that is still on the host. `parity`: makes the comparison with transformers."""
    end = BEGAN + args.limit_s - 15.0  # for stopping
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="astra:tiny")
    parser.add_argument("--shape", choices=["4b"], help="random weights of this shape instead of --model")
    parser.add_argument("--versions", type=int, default=20, help="of each mode, at most")
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--context", type=int, default=512, help="context length of the server")
    parser.add_argument("--ahead", type=int, default=0, help="versions published while the server starts, at most")
    parser.add_argument("--watch-every", type=int, default=1, help="rates around every Kth version of a mode only")
    parser.add_argument("--modes", nargs="+", choices=["abort", "retract", "in_place"], default=["abort"])
    parser.add_argument("--recovery", action="store_true", help="wait for full speed after each update")
    parser.add_argument("--kept", action="store_true", help="log-probabilities of requests that live through an update")
    parser.add_argument("--parity", action="store_true", help="compare log-probabilities after every version")
    parser.add_argument("--warm-s", type=float, default=4.0, help="generating before the first update")
    parser.add_argument("--quiet-s", type=float, default=1.0, help="before each update, for the rate without it")
    parser.add_argument("--lr", type=float, default=9e-7, help="9e-7 changes 3 %% of bf16 weights of std 0.02")
    parser.add_argument("--ready-s", type=float, default=400.0)
    parser.add_argument("--limit-s", type=float, default=300.0, help="of the whole run, the server's start included")
    parser.add_argument("--out", type=Path, help="JSON of all that is known, written after each version")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sglang-python", default=sys.executable)
    parser.add_argument("--keep-log", type=Path, help="copy the server's log here")
    args = parser.parse_args()
    if args.ahead and args.parity:
        parser.error("--parity compares with the trainer's last version: none may be published ahead")
    record = Record(args.out)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        asyncio.run(drive(args, Path(folder), record))
    print(json.dumps(record.doc))
    for mode, figures in summary(record.rows).items():
        for key, found in figures.items():
            line = f"{mode:9} {key:21} p50 {found['p50']:10.4f}  p99 {found['p99']:10.4f}  of {found['n']}"
            print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
