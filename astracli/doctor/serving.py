"""The engine's environment: SGLang, its pins, the model in it, its attention backends. It may have its own Python."""

from __future__ import annotations

import json
from collections.abc import Iterator

from astracli.backends.serving import SERVING, not_by_auto, serving_options
from astracli.doctor.subject import Check, Status, Subject, flaw
from astracli.machine.facts import Machine, version_tuple
from astracli.plan.problems import SGLANG_GLIBC

GROUP = "serving"
INSTALL = "`pip install 'astracli[sglang]'`, or name its environment in resources.engine.python"
LINKED = ("torch", "transformers")
"""Pins whose other minor versions break SGLang's import or its compiled kernels."""


def checks(subject: Subject) -> Iterator[Check]:
    if subject.recipe is not None and not subject.sglang:
        if subject.fit.choice is not None:
            yield Check("engine", GROUP, "ok", "embedded: ships with astra, nothing to install")
        return
    if subject.foreign_engine:
        yield _environment(subject)
    facts = subject.serving
    if facts is None:
        return
    if not facts.usable("sglang"):
        value, why, fix = flaw(facts, "sglang") or ("not installed", "the recipe generates with it", INSTALL)
        lying = facts.package("sglang").version or facts.package("sglang").importable_spec
        needed = subject.sglang and bool(subject.facts.gpus)  # it runs on GPUs only: first there must be one
        status: Status = "fail" if needed else "warn" if lying else "skip"
        yield Check("sglang", GROUP, status, value, why if status != "skip" else "", fix if status != "skip" else "")
    else:
        yield _build(subject, facts)
        yield _pins(subject, facts)
    yield from _glibc(subject)
    yield from _flashinfer(subject, facts)
    yield from _attention(subject)
    yield from _config(subject)


def _environment(subject: Subject) -> Check:
    assert subject.recipe is not None
    own, engine = subject.recipe.resources.engine, subject.facts.engine
    asked = own.python or f"PYTHONPATH={own.env['PYTHONPATH']}"
    if engine is None:
        return Check("engine python", GROUP, "warn", f"{asked}: not in this document", "its packages are not judged")
    if engine.error is not None:
        fix = "set resources.engine.python to the interpreter of the environment that holds sglang"
        return Check("engine python", GROUP, "fail", asked, engine.error, fix)
    return Check("engine python", GROUP, "ok", f"{engine.version} at {engine.executable}")


def _build(subject: Subject, facts: Machine) -> Check:
    """Judged by whether this build has a file for the model: development builds sort below releases that have it."""
    package, adapter = facts.package("sglang"), subject.fit.adapter
    version, models = str(package.version), package.models
    if adapter is None or not adapter.model_types or models is None:
        return Check("sglang", GROUP, "ok", version)
    held = [name for name in adapter.model_types if name in models]
    if held:
        return Check("sglang", GROUP, "ok", f"{version}, holds `{held[0]}`")
    why = f"this build has no file for {' or '.join(f'`{name}`' for name in adapter.model_types)}"
    return Check("sglang", GROUP, subject.bad(subject.sglang), version, why, "`pip install 'sglang>=0.5.17'`")


def _pins(subject: Subject, facts: Machine) -> Check:
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
    return Check("sglang pins", GROUP, subject.bad(subject.sglang and bool(broken)), shown, why, fix)


def _release(version: str) -> str:
    """Without the local part: `2.13.0+cu130` -> `2.13.0`."""
    return version.partition("+")[0]


def _minor(version: str) -> tuple[int, ...]:
    return version_tuple(version)[:2]


def _glibc(subject: Subject) -> Iterator[Check]:
    libc = subject.facts.system.libc or ""
    if not libc.startswith("glibc"):
        return
    if version_tuple(libc.removeprefix("glibc ")) < SGLANG_GLIBC:
        why = "sglang's wheels need glibc 2.34 or newer"
        fix = "use a newer operating system image"
        yield Check("glibc", GROUP, subject.bad(subject.sglang), libc, why, fix)
    else:
        yield Check("glibc", GROUP, "ok", libc)


def _flashinfer(subject: Subject, facts: Machine) -> Iterator[Check]:
    """The PyPI project `flashinfer` is an abandoned one of the same module name; `flashinfer-python` is meant."""
    choice, name = subject.fit.choice, "flashinfer-python"
    needs = choice is not None and SERVING.get(choice.serving_attention, (0, 0, None))[2] == name
    legacy, real = facts.package("flashinfer").version, facts.package(name).version
    fix = "`pip uninstall flashinfer && pip install --force-reinstall flashinfer-python`"
    if legacy and not real:
        why = "the legacy package under the same module name; sglang needs `flashinfer-python`"
        yield Check("flashinfer", GROUP, subject.bad(needs), f"flashinfer {legacy}", why, fix)
    elif legacy:
        why = "two packages write the same module: whichever was installed last is imported"
        yield Check("flashinfer", GROUP, "warn", f"flashinfer {legacy} beside {name} {real}", why, fix)
    elif facts.usable(name):
        yield Check("flashinfer", GROUP, "ok", str(real))
    else:
        value, why, cure = flaw(facts, name) or ("not installed", "", "")
        if needs and choice is not None:
            why = why or f"attention backend {choice.serving_attention} is made of it"
            fix = "`pip install flashinfer-python`, or `--set rollout.attention_backend=triton`"
            yield Check("flashinfer", GROUP, "fail", value, why, fix)
        else:
            yield Check("flashinfer", GROUP, "warn" if why else "skip", value, why, cure)


def _attention(subject: Subject) -> Iterator[Check]:
    """Which attention backends may serve this family here. A refused one that the recipe asks for is refused there."""
    adapter, capability = subject.fit.adapter, subject.facts.capability
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
    status: Status = "ok" if allowed else subject.bad(subject.sglang)
    yield Check("attention backends", GROUP, status, value, why, "" if allowed else "use other GPUs")


def _config(subject: Subject) -> Iterator[Check]:
    """Keys that sglang reads and this config.json lacks; a text config that transformers wrote has none of them."""
    if subject.config is None or subject.fit.adapter is None:
        return
    override = subject.fit.adapter.engine_flags(subject.config).get("json_model_override_args")
    if override is None:
        yield Check("config for the engine", GROUP, "ok", "config.json holds what sglang reads")
        return
    keys = json.loads(override)
    lacking = ", ".join(keys.get("text_config", keys))
    why = "sglang dies without it; astra passes it on the command line, an engine started by hand does not"
    fix = f"add it to config.json: `{override}`"
    yield Check("config for the engine", GROUP, "warn", f"config.json lacks {lacking}", why, fix)
