"""The trainer's environment: the model class, packed rows, attention, and kernels of linear attention."""

from __future__ import annotations

from collections.abc import Iterator

from astracli.backends.delta_rule import SLOW, TILELANG_FFI, gated_backward, native, tilelang_flaw
from astracli.doctor.subject import Check, Subject, flaw, optional

GROUP, KERNELS = "trainer", "kernels"
LOUD_PACKING = (5, 23)
"""transformers from here on refuses boundaries that its kernels would ignore; before, state leaks silently."""
FLA, CONV = "flash-linear-attention", "causal-conv1d"


def checks(subject: Subject) -> Iterator[Check]:
    adapter, choice = subject.adapter, subject.choice
    if adapter is None:
        return
    yield _model(subject)
    if adapter.hybrid:
        yield _packing(subject)
    if choice is not None:
        yield Check("attention", GROUP, "ok", choice.trainer_attention)


def _model(subject: Subject) -> Check:
    """The installed transformers has the model's code."""
    adapter = subject.adapter
    assert adapter is not None
    package = subject.facts.package("transformers")
    if not adapter.model_types or package.models is None:
        return Check("model code", GROUP, "skip", "not in this document" if adapter.model_types else "any dense model")
    held = [name for name in adapter.model_types if name in package.models]
    if held:
        return Check("model code", GROUP, "ok", f"transformers {package.version} has `{held[0]}`")
    wanted = " or ".join(f"`{name}`" for name in adapter.model_types)
    why = f"it has no model code for {wanted}: too old, or too new and removed"
    fix = "`pip install -c constraints/cuda.txt transformers` (constraints/cpu.txt without a GPU)"
    return Check("model code", GROUP, "fail", f"transformers {package.version}", why, fix)


def _packing(subject: Subject) -> Check:
    """Samples of a hybrid side by side in one row. transformers' own way carries state over; astra has another."""
    adapter = subject.adapter
    assert adapter is not None
    version = subject.facts.version_of("transformers")
    shown = f"transformers {subject.facts.package('transformers').version}"
    silent = version < LOUD_PACKING
    leak = f"{shown} {'leaks state between packed samples silently' if silent else 'refuses most packed rows'}"
    if adapter.install_varlen is None:
        fix = "give the adapter `install_varlen`; until then train rows apart on `resources.device=cpu`"
        why = f"adapter `{adapter.name}` brings no varlen path of its own"
        return Check("packing", GROUP, subject.bad(subject.cuda), leak, why, fix)
    why = f"{leak}; the trainer proves rows == separate on its first batch"
    return Check("packing", GROUP, "ok", "astra's own varlen path resets convolution and delta rule", why)


def kernels(subject: Subject) -> Iterator[Check]:
    facts = subject.facts
    used = subject.cuda and subject.hybrid and bool(facts.gpus)  # on a machine without a GPU nothing would run them
    for name in (FLA, "triton"):
        check = optional(facts, name, KERNELS)
        if used and not facts.usable(name):
            value, why, fix = flaw(facts, name) or ("not installed", SLOW, f"`pip install {name}`")
            check = Check(name, KERNELS, "warn", value, why if why == SLOW else f"{why}; {SLOW}", fix)
        yield check
    yield from _backward(subject)
    yield from _tilelang(subject)
    yield _convolution(subject)
    yield optional(facts, "flash-attn", KERNELS)


def _backward(subject: Subject) -> Iterator[Check]:
    """The gated backward pass, where both packages are there."""
    facts = subject.facts
    if facts.capability is None or not facts.version_of(FLA) or not facts.version_of("triton"):
        return
    if subject.recipe is not None and not subject.hybrid:
        return
    kernel, reason, warning = gated_backward(facts, facts.capability)
    if warning is None:
        yield Check("gated backward", KERNELS, "ok", reason)
    else:
        fix = warning.rpartition("; ")[2]
        yield Check("gated backward", KERNELS, "warn", f"{kernel} instead of fla", f"{reason}: {SLOW}", fix)


def _tilelang(subject: Subject) -> Iterator[Check]:
    """TileLang compiles at run time: it needs an nvcc, and the CUDA C++ core headers that belong to it."""
    check = optional(subject.facts, "tilelang", KERNELS)
    tools = subject.facts.compilers
    used = subject.choice is not None and subject.choice.gdn_backward == "fla+tilelang"
    broken = tilelang_flaw(subject.facts)
    if check.status == "ok" and broken is not None:
        needed = TILELANG_FFI[subject.facts.version_of("tilelang")][-1]
        fix = f"`pip install apache-tvm-ffi=={'.'.join(map(str, needed))}`"
        yield Check("tilelang", KERNELS, "warn", f"{check.value} does not load", broken, fix)
    elif check.status == "ok" and not tools.nvcc:
        why = "it compiles kernels when they are first used; nothing here uses it"
        yield Check("tilelang", KERNELS, "ok", f"{check.value}, without nvcc", why)
    elif check.status == "ok" and used and not tools.cccl:
        why = "it compiles with nvcc and includes <cuda/std/...>, which a bare nvcc lacks"
        fix = f"{native(subject.facts)}, or install the CUDA toolkit with CCCL"
        yield Check("tilelang", KERNELS, "fail", f"{check.value}, nvcc without CCCL headers", why, fix)
    else:
        yield check


def _convolution(subject: Subject) -> Check:
    check = optional(subject.facts, CONV, KERNELS)
    if check.status == "skip" and subject.facts.package(FLA).version:
        why = "with fla alone transformers leaks state through the convolution of packed rows; astra packs otherwise"
        return Check(CONV, KERNELS, "skip", "not installed, not needed", why)
    return check
