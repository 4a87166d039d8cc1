"""Trainer kernels: linear attention on these GPUs, and packages that only look installed."""

from __future__ import annotations

from collections.abc import Iterator

from astracli.backends.delta_rule import HOPPER, SLOW, TILELANG_FFI, delta_rule_on_hopper, native, tilelang_flaw
from astracli.doctor.subject import Check, Subject, flaw, optional

GROUP = "kernels"
FLA, CONV = "flash-linear-attention", "causal-conv1d"


def checks(subject: Subject) -> Iterator[Check]:
    facts = subject.facts
    used = subject.cuda and subject.hybrid and bool(facts.gpus)  # on a machine without a GPU nothing would run them
    for name in (FLA, "triton"):
        check = optional(facts, name, GROUP)
        if used and not facts.usable(name):
            value, why, fix = flaw(facts, name) or ("not installed", SLOW, f"`pip install {name}`")
            check = Check(name, GROUP, "warn", value, why if why == SLOW else f"{why}; {SLOW}", fix)
        yield check
    yield from _backward(subject)
    yield from _tilelang(subject)
    yield _convolution(subject)
    yield optional(facts, "flash-attn", GROUP)


def _backward(subject: Subject) -> Iterator[Check]:
    """The gated backward, where the GPUs are Hopper and both packages are there; right everywhere else."""
    facts = subject.facts
    fla, triton = facts.version_of(FLA), facts.version_of("triton")
    capability = facts.capability
    if capability is None or not fla or not triton or (subject.recipe is not None and not subject.hybrid):
        return
    if capability[0] != HOPPER[0]:
        dotted = ".".join(map(str, capability))
        yield Check("gated backward", GROUP, "ok", f"right on compute capability {dotted} with every version")
        return
    kernel, reason, warning = delta_rule_on_hopper(facts, fla, triton)
    if warning is None:
        yield Check("gated backward", GROUP, "ok", reason)
        return
    fix = warning.rpartition("; ")[2]
    yield Check("gated backward", GROUP, "warn", f"{kernel} instead of fla", f"{reason}: {SLOW}", fix)


def _tilelang(subject: Subject) -> Iterator[Check]:
    """TileLang compiles at run time: it needs an nvcc, and the CUDA C++ core headers that belong to it."""
    check = optional(subject.facts, "tilelang", GROUP)
    tools = subject.facts.compilers
    used = subject.fit.choice is not None and subject.fit.choice.gdn_backward == "fla+tilelang"
    broken = tilelang_flaw(subject.facts)
    if check.status == "ok" and broken is not None:
        needed = TILELANG_FFI[subject.facts.version_of("tilelang")][-1]
        fix = f"`pip install apache-tvm-ffi=={'.'.join(map(str, needed))}`"
        yield Check("tilelang", GROUP, "warn", f"{check.value} does not load", broken, fix)
    elif check.status == "ok" and not tools.nvcc:
        why = "it compiles kernels when they are first used; nothing here uses it"
        yield Check("tilelang", GROUP, "ok", f"{check.value}, without nvcc", why)
    elif check.status == "ok" and used and not tools.cccl:
        why = "it compiles with nvcc and includes <cuda/std/...>, which a bare nvcc lacks"
        fix = f"{native(subject.facts)}, or install the CUDA toolkit with CCCL"
        yield Check("tilelang", GROUP, "fail", f"{check.value}, nvcc without CCCL headers", why, fix)
    else:
        yield check


def _convolution(subject: Subject) -> Check:
    check = optional(subject.facts, CONV, GROUP)
    if check.status == "skip" and subject.facts.package(FLA).version:
        why = "with fla alone transformers leaks state through the convolution of packed rows; astra packs otherwise"
        return Check(CONV, GROUP, "skip", "not installed, not needed", why)
    return check
