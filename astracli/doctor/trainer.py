"""The trainer's environment: the model class, rows that must not see each other, attention."""

from __future__ import annotations

from collections.abc import Iterator

from astracli.doctor.subject import Check, Subject

GROUP = "trainer"
LOUD_PACKING = (5, 23)
"""transformers from here on refuses boundaries that its kernels would ignore; before, state leaks without a word."""


def checks(subject: Subject) -> Iterator[Check]:
    adapter, choice = subject.fit.adapter, subject.fit.choice
    if adapter is None:
        return
    yield _model(subject)
    if adapter.hybrid:
        yield _packing(subject)
    if choice is not None:
        yield Check("attention", GROUP, "ok", choice.trainer_attention)


def _model(subject: Subject) -> Check:
    """The installed transformers has the model's code."""
    adapter = subject.fit.adapter
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
    adapter = subject.fit.adapter
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
