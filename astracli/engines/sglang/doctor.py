"""What `astra doctor` and a plan say of SGLang's environment: its pins, the model in it, its attention backends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from astracli.engines.contract import Case
from astracli.engines.sglang.attention import SERVING, not_by_auto, serving_options
from astracli.machine.facts import Machine, version_tuple
from astracli.machine.findings import Check, PlanProblem, Status, flaw

GROUP = "serving"
GLIBC = (2, 34)
NEWER_SYSTEM = "use a newer operating system image"
INSTALL = "`pip install 'astracli[sglang]'`, or name its environment in resources.engine.python"
LINKED = ("torch", "transformers")
"""Pins whose other minor versions break SGLang's import or its compiled kernels."""


def problems(case: Case) -> Iterator[PlanProblem]:
    if case.foreign or case.recipe is None:
        return
    facts = case.facts
    if not facts.usable("sglang"):
        message = f"recipe `{case.recipe.name}` generates with sglang, which is not installed here"
        hint = INSTALL
        if case.device == "cpu":
            hint = "name the environment of SGLang's CPU build in resources.engine.python, or take `embedded`"
        yield PlanProblem("package", "package sglang", message, hint)
    libc = facts.system.libc or ""
    if libc.startswith("glibc") and version_tuple(libc.removeprefix("glibc ")) < GLIBC:
        what = "glibc 2.34 or newer (sglang's wheels)"
        yield PlanProblem("system", what, f"sglang needs {what}, this machine has {libc}", NEWER_SYSTEM)


def checks(case: Case) -> Iterator[Check]:
    if case.foreign:
        yield _environment(case)
    facts = case.environment
    if facts is None:
        return
    if not facts.usable("sglang"):
        value, why, fix = flaw(facts, "sglang") or ("not installed", "the recipe generates with it", INSTALL)
        lying = facts.package("sglang").version or facts.package("sglang").importable_spec
        needed = case.wanted and bool(case.facts.gpus)  # it runs on GPUs only: first there must be one
        status: Status = "fail" if needed else "warn" if lying else "skip"
        yield Check("sglang", GROUP, status, value, why if status != "skip" else "", fix if status != "skip" else "")
    else:
        yield _build(case, facts)
        yield _pins(case, facts)
    yield from _glibc(case)
    yield from _flashinfer(case, facts)
    yield from _attention(case)
    yield from _config(case)


def probes(case: Case) -> Iterator[Mapping[str, Any]]:
    """What its interpreter must import, and the attention that it serves with."""
    facts = case.environment
    if facts is None or not case.wanted:
        return
    wanted = {
        "sglang": "sglang.srt.server_args:ServerArgs",
        "flashinfer-python": "flashinfer:single_prefill_with_kv_cache",
    }
    there = {name: target for name, target in wanted.items() if facts.usable(name)}
    if there:
        why, fix = "the engine imports it when it starts", "`pip install --force-reinstall 'astracli[sglang]'` there"
        yield {"name": "engine imports", "kind": "imports", "arguments": {"wanted": there}, "timeout_s": 120,
               "why": why, "fix": fix}  # fmt: skip
    if case.config and case.attention and facts.usable("torch") and facts.visible_gpus:
        asked = {"config": dict(case.config), "device": "cuda", "chosen": [case.attention]}
        fix = "`--set rollout.sglang.attention_backend=triton`, or another version of it in the engine's environment"
        yield {"name": "serving attention", "kind": "attention", "arguments": asked, "fix": fix}


def _environment(case: Case) -> Check:
    assert case.recipe is not None
    own, engine = case.recipe.resources.engine, case.facts.engine
    asked = own.python or f"PYTHONPATH={own.env['PYTHONPATH']}"
    if engine is None:
        return Check("engine python", GROUP, "warn", f"{asked}: not in this document", "its packages are not judged")
    if engine.error is not None:
        fix = "set resources.engine.python to the interpreter of the environment that holds sglang"
        return Check("engine python", GROUP, "fail", asked, engine.error, fix)
    return Check("engine python", GROUP, "ok", f"{engine.version} at {engine.executable}")


def _build(case: Case, facts: Machine) -> Check:
    """Judged by whether this build has a file for the model: development builds sort below releases that have it."""
    package, adapter = facts.package("sglang"), case.adapter
    version, models = str(package.version), package.models
    if adapter is None or not adapter.model_types or models is None:
        return Check("sglang", GROUP, "ok", version)
    held = [name for name in adapter.model_types if name in models]
    if held:
        return Check("sglang", GROUP, "ok", f"{version}, holds `{held[0]}`")
    why = f"this build has no file for {' or '.join(f'`{name}`' for name in adapter.model_types)}"
    return Check("sglang", GROUP, case.bad(), version, why, "`pip install 'sglang>=0.5.17'`")


def _pins(case: Case, facts: Machine) -> Check:
    pins = facts.package("sglang").pins
    if not pins:
        return Check("sglang pins", GROUP, "skip", "not in this document")
    off = {name: pin for name, pin in pins.items() if _release(pin.has or "") != _release(pin.wants)}
    if not off:
        return Check("sglang pins", GROUP, "ok", f"all {len(pins)} exact requirements are met")
    broken = [name for name, pin in off.items() if name in LINKED and _minor(pin.has or "") != _minor(pin.wants)]
    shown = ", ".join(f"{name} {off[name].has or 'absent'} for {off[name].wants}" for name in sorted(off)[:4])
    shown += f" and {len(off) - 4} more" if len(off) > 4 else ""
    why = "sglang is built and tested against exactly these"
    if broken:
        why = f"sglang does not import, or its kernels do not load, with another {' or '.join(broken)}"
    version = facts.package("sglang").version
    fix = f"`pip install sglang=={version}` in an environment of its own; name it in resources.engine.python"
    return Check("sglang pins", GROUP, case.bad(bool(broken)), shown, why, fix)


def _release(version: str) -> str:
    """Without the local part: `2.13.0+cu130` -> `2.13.0`."""
    return version.partition("+")[0]


def _minor(version: str) -> tuple[int, ...]:
    return version_tuple(version)[:2]


def _glibc(case: Case) -> Iterator[Check]:
    libc = case.facts.system.libc or ""
    if not libc.startswith("glibc"):
        return
    if version_tuple(libc.removeprefix("glibc ")) < GLIBC:
        why = "sglang's wheels need glibc 2.34 or newer"
        yield Check("glibc", GROUP, case.bad(), libc, why, NEWER_SYSTEM)
    else:
        yield Check("glibc", GROUP, "ok", libc)


def _flashinfer(case: Case, facts: Machine) -> Iterator[Check]:
    """The PyPI project `flashinfer` is an abandoned one of the same module name; `flashinfer-python` is meant."""
    name = "flashinfer-python"
    needs = case.attention is not None and SERVING.get(case.attention, (0, 0, None))[2] == name
    legacy, real = facts.package("flashinfer").version, facts.package(name).version
    fix = "`pip uninstall flashinfer && pip install --force-reinstall flashinfer-python`"
    if legacy and not real:
        why = "the legacy package under the same module name; sglang needs `flashinfer-python`"
        yield Check("flashinfer", GROUP, case.bad(needs), f"flashinfer {legacy}", why, fix)
    elif legacy:
        why = "two packages write the same module: whichever was installed last is imported"
        yield Check("flashinfer", GROUP, "warn", f"flashinfer {legacy} beside {name} {real}", why, fix)
    elif facts.usable(name):
        yield Check("flashinfer", GROUP, "ok", str(real))
    else:
        value, why, cure = flaw(facts, name) or ("not installed", "", "")
        if needs:
            why = why or f"attention backend {case.attention} is made of it"
            fix = "`pip install flashinfer-python`, or `--set rollout.sglang.attention_backend=triton`"
            yield Check("flashinfer", GROUP, "fail", value, why, fix)
        else:
            yield Check("flashinfer", GROUP, "warn" if why else "skip", value, why, cure)


def _attention(case: Case) -> Iterator[Check]:
    """Which attention backends may serve this family here. A refused one that the recipe asks for is refused there."""
    adapter, capability = case.adapter, case.facts.capability
    if adapter is None or capability is None:
        return
    allowed, refused = serving_options(adapter, capability)
    value = f"{', '.join(allowed)} allowed on {capability[0]}.{capability[1]}" if allowed else "none"
    if refused:
        value += f"; refused: {', '.join(refused)}"
    untried = {name: reason for name in allowed if (reason := not_by_auto(adapter, name, capability)) is not None}
    if untried:
        value += f"; not by `auto`: {', '.join(untried)}"
    why = "; ".join(f"{name}: {reason}" for name, reason in (refused | untried).items())
    status: Status = "ok" if allowed else case.bad()
    yield Check("attention backends", GROUP, status, value, why, "" if allowed else "use other GPUs")


def _config(case: Case) -> Iterator[Check]:
    """Keys that sglang reads and this config.json lacks; a text config that transformers wrote has none of them."""
    if case.config is None or case.adapter is None:
        return
    override = case.adapter.engine_flags(case.config).get("json_model_override_args")
    if override is None:
        yield Check("config for the engine", GROUP, "ok", "config.json holds what sglang reads")
        return
    keys = json.loads(override)
    lacking = ", ".join(keys.get("text_config", keys))
    why = "sglang dies without it; astra passes it on the command line, an engine started by hand does not"
    fix = f"add it to config.json: `{override}`"
    yield Check("config for the engine", GROUP, "warn", f"config.json lacks {lacking}", why, fix)
