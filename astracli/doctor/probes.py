"""Probes: things really imported and measured on this machine, in child processes with time limits.

One child runs the probes one after the other, so that torch is imported once. When it hangs or dies (a kernel that
crashes takes its process with it), that probe has failed, and a new child goes on with the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from astracli.backends.delta_rule import native
from astracli.doctor import probe_child
from astracli.doctor.probe_child import Row
from astracli.doctor.subject import Check, Status, Subject
from astracli.process.config import Role

GROUP = "numerics"
START_S = 60.0
"""Importing torch and transformers from a cold disk."""
KERNELS_S = 300.0
"""A probe on a GPU: the first time, its kernels are compiled and tuned."""
ATTENTION = "the chosen attention backend computes something else"
PINNED = "`pip install -c constraints/{}.txt astracli` installs versions that agree"


@dataclass(frozen=True)
class Probe:
    name: str
    kind: str
    arguments: dict[str, Any]
    timeout_s: float
    needed: bool
    """The recipe cannot do without it: a failure is `fail`, else `warn`."""
    why: str
    fix: str
    python: str | None = None
    """Interpreter; None = this one."""
    prefix: str = ""
    """Put before the names of its answers."""
    env: dict[str, str] = field(default_factory=dict)


def run(subject: Subject) -> list[Check]:
    """Every probe that fits the recipe and the machine. The only checks that look beyond the document."""
    found = []
    for probes in (engine_probes(subject), list(trainer_probes(subject))):
        for probe, rows in answers(probes):
            if probe.kind == "imports":
                rows = _joined(probe, rows)
            found += [check_of(subject, probe, row) for row in rows]
    adapter = subject.adapter
    if adapter is not None and adapter.tiny_config is None:
        found.append(Check(adapter.name, GROUP, "skip", "this adapter brings no tiny model to try"))
    engine = subject.engine
    if engine is not None and engine.sample is None:
        value = f"{engine.name} is compared with the trainer when a run starts, not here"
        found.append(Check("engine == trainer", GROUP, "skip", value))
    return found


def _joined(probe: Probe, rows: list[Row]) -> list[Row]:
    """All that could be imported as one row, each that could not as a row of its own."""
    failed = [row for row in rows if row["status"] == "fail"]
    failed = [row | {"name": f"import {row['name']}"} if row["name"] != probe.name else row for row in failed]
    good = ", ".join(row["name"] for row in rows if row["status"] == "ok")
    return [*failed, {"name": probe.name, "status": "ok", "value": good}] if good else failed


def check_of(subject: Subject, probe: Probe, row: Row) -> Check:
    status: Status = subject.bad(probe.needed) if row["status"] == "fail" else row["status"]
    notes = (probe.why, row.get("fix", probe.fix)) if status in ("fail", "warn") else ()
    return Check(f"{probe.prefix}{row['name']}", GROUP, status, row["value"], *notes)


# -- which probes ------------------------------------------------------------------------------------------------------


def engine_probes(subject: Subject) -> list[Probe]:
    """What the engine would have tried, in its own interpreter."""
    if subject.recipe is None or subject.engine is None:
        return []
    own = subject.recipe.resources.engine
    where = {"python": own.python or sys.executable, "env": dict(own.env)} if own.foreign else {}
    usual = {"timeout_s": KERNELS_S, "needed": True, "why": ATTENTION} | where
    case = replace(subject.case(subject.engine), config=subject.known_config)
    return [Probe(**{**usual, **asked}) for asked in subject.engine.probes(case)]


def trainer_probes(subject: Subject) -> Iterator[Probe]:
    """Imports, the adapter's promises, kernels against references, the engine against the trainer, links."""
    adapter, engine = subject.adapter, subject.engine
    if not subject.facts.usable("torch"):
        return
    there = bool(subject.facts.visible_gpus) and subject.facts.torch_cuda is not None
    device = "cuda" if there and (subject.cuda or subject.recipe is None) else "cpu"
    env = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    env |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    kernels_s = KERNELS_S if device == "cuda" else 120.0
    pinned = PINNED.format("cuda" if device == "cuda" else "cpu")
    why = "found on disk, and yet it cannot be used"
    wanted = {"wanted": _imports(subject, device)}
    yield Probe("imports", "imports", wanted, 60, True, why, pinned, env=env)
    if adapter is not None:
        name, settings = adapter.name, dict(subject.known_config or {})
        why = f"adapter `{name}` does not hold with these versions"
        if adapter.tiny_config is not None:
            yield Probe("adapter", "adapter", {"name": name, "device": device}, kernels_s, True, why,
                        pinned, prefix=f"{name}: ", env=env)  # fmt: skip
        if adapter.delta_rule is not None and settings:
            why = "the trainer would learn from wrong gradients without a word"
            fix = pinned if device == "cpu" else native(subject.facts)
            sizes = {"name": name, "config": settings, "device": device}
            yield Probe("delta rule", "delta_rule", sizes, kernels_s, True, why, fix, env=env)
        if settings and subject.choice is not None:
            chosen = [subject.choice.trainer_attention]
            if engine is None or engine.sample is not None:
                chosen.append(subject.choice.serving_attention)
            settings = {"config": settings, "device": device, "chosen": list(dict.fromkeys(chosen))}
            fix = "`--set train.attention=auto`, or another version of it"
            yield Probe("attention", "attention", settings, kernels_s, True, ATTENTION, fix, env=env)
        if adapter.tiny_config is not None and engine is not None and engine.sample is not None:
            why = "importance ratios would be wrong from the first step on"
            asked = {"name": name, "engine": engine.name}
            yield Probe("engine == trainer", "parity", asked, 60, True, why, pinned, env=env)
    yield from _links(subject, device, env)


def _links(subject: Subject, device: str, env: dict[str, str]) -> Iterator[Probe]:
    """Ranks that exchange gradients, and the copies that a run makes all the time."""
    chosen = _rank_gpus(subject) if device == "cuda" else []
    ranks = len(chosen)
    if device == "cpu" and subject.recipe is not None and not subject.cuda:
        ranks = subject.recipe.resources.train_ranks
    if ranks > 1:
        why = "trainer ranks would hang at their first step"
        fix = "look at `nvidia-smi topo -m` and the log of NCCL_DEBUG=INFO"
        more = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, chosen))} if chosen else {}
        asked = {"ranks": ranks, "device": device}
        yield Probe("all-reduce", "all_reduce", asked, 200, True, why, fix, env=env | more)
    why = "copies take longer than computing"
    fix = "look for other load on this machine, or another PCIe slot or driver"
    yield Probe("bandwidth", "bandwidth", {"device": device}, 60, False, why, fix, env=env)


def _rank_gpus(subject: Subject) -> list[int]:
    """Indexes of the GPUs that the trainer's ranks would run on, as far as they are there; without a recipe, of all."""
    there = [gpu.index for gpu in subject.facts.visible_gpus]
    if subject.recipe is None:
        return there
    processes = subject.plan.processes if subject.plan is not None else ()
    mine = [process for process in processes if process.role is Role.TRAINER and process.host is None]
    return [gpu for process in mine for gpu in process.gpus if gpu in there]


def _imports(subject: Subject, device: str) -> dict[str, str]:
    wanted = {
        "torch": "torch:tensor",
        "transformers": "transformers:AutoModelForCausalLM",
        "math-verify": "math_verify:verify",
    }
    if device == "cuda":
        wanted |= {
            "triton": "triton:jit",
            "flash-linear-attention": "fla.ops.gated_delta_rule:chunk_gated_delta_rule",
            "causal-conv1d": "causal_conv1d:causal_conv1d_fn",
            "flash-attn": "flash_attn:flash_attn_func",
        }
    return {name: target for name, target in wanted.items() if subject.facts.usable(name)}


# -- running them ------------------------------------------------------------------------------------------------------


def answers(probes: list[Probe], start_s: float = START_S) -> Iterator[tuple[Probe, list[Row]]]:
    """(probe, rows) in order; a probe whose child hangs or dies answers with one failed row."""
    todo = list(probes)
    while todo:
        _, batch = next(groupby(todo, lambda probe: (probe.python, probe.env)))
        for probe, rows in _child(list(batch), start_s):
            todo.remove(probe)
            yield probe, rows


def _child(probes: list[Probe], start_s: float) -> Iterator[tuple[Probe, list[Row]]]:
    """One child for these probes; ends early after a probe that hung or died."""
    first = probes[0]
    module = ["-P", "-m", "astracli.doctor.probe_child"] if first.python is None else [probe_child.__file__]
    with tempfile.TemporaryFile("w+") as errors:
        try:
            child = subprocess.Popen(
                [first.python or sys.executable, *module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, start_new_session=True, env=os.environ | first.env,
            )  # fmt: skip
        except OSError as error:
            yield first, [_failed(first, (error.strerror or str(error)).lower())]
            return
        try:
            lines = _reader(child, probes)
            limit = start_s
            for probe in probes:
                try:
                    line = lines.get(timeout=limit + probe.timeout_s)
                except queue.Empty:
                    yield probe, [_failed(probe, f"no answer in {limit + probe.timeout_s:.0f} s")]
                    return
                if line is None:
                    code = child.wait()
                    errors.seek(0)
                    last = (errors.read().strip().splitlines() or [""])[-1]
                    said = f": {last[:200]}" if last else ""
                    yield probe, [_failed(probe, f"its process ended with code {code}{said}")]
                    return
                yield probe, json.loads(line)
                limit = 0.0
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # it leads its own session; ranks that it started are in it
            child.wait()


def _reader(child: subprocess.Popen[str], probes: list[Probe]) -> queue.Queue[str | None]:
    """Lines of the child as they come; None at its end."""
    lines: queue.Queue[str | None] = queue.Queue()
    assert child.stdin is not None and child.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        json.dump([{"name": p.name, "kind": p.kind, "arguments": p.arguments} for p in probes], child.stdin)
        child.stdin.close()
    stream = child.stdout

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _failed(probe: Probe, value: str) -> Row:
    return {"name": probe.name, "status": "fail", "value": value}
