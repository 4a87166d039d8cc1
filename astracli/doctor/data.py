"""Checkpoint, tokenizer, training problems and benchmarks: on this machine, whole, and as the adapter expects them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from astracli.config.recipe_data import sets
from astracli.data import benchmarks
from astracli.doctor.gather import offline
from astracli.doctor.subject import Check, Status, Subject
from astracli.machine.facts import CheckpointFacts, Tensor
from astracli.models import checkpoint_files
from astracli.models.adapter_tools import is_buffer
from astracli.models.checkpoint_files import TRAINABLE
from astracli.models.preflight import UNQUANTIZED

GROUP = "data"
GENERATED = {"arithmetic", *benchmarks.GENERATED}
"""Problems that need no file."""


def checks(subject: Subject) -> Iterator[Check]:
    if subject.recipe is None:
        return
    yield from _checkpoint(subject)
    yield from _sets(subject)
    home = subject.facts.env.get("HF_HOME") or "~/.cache/huggingface"
    mode = ", offline" if offline(subject.facts.env) else ""
    yield Check("hub cache", GROUP, "ok", f"{home}{mode}")


def _absent(subject: Subject) -> tuple[Status, str]:
    """(status, why) of something on the Hub that is not here."""
    network = subject.facts.network
    if offline(subject.facts.env):
        return "fail", "it cannot be downloaded: HF_HUB_OFFLINE is set"
    if network is not None and network.hub_asked and network.hub_error:
        return "fail", f"it cannot be downloaded: {network.hub} cannot be reached ({network.hub_error})"
    return "warn", "it is downloaded when a run starts"


def _checkpoint(subject: Subject) -> Iterator[Check]:
    assert subject.recipe is not None
    model, known = subject.recipe.model, subject.facts.checkpoint
    path = model.path
    if known is None or known.path != path:
        if subject.config is not None:
            yield Check("checkpoint", GROUP, "ok", f"{path} ships with astra")
            return
        why = "whether it is there, and whole, cannot be judged"
        fix = f"record it there: `astra doctor {subject.recipe.name} --facts-out FILE`"
        yield Check("checkpoint", GROUP, "warn", f"{path} is not in this document", why, fix)
        return
    fix = f"`hf download {path}` where the Hub answers, copy it here, `--set model.path=DIRECTORY`"
    if known.problem is not None:
        cure = "check model.path; copy or download the checkpoint again"
        if known.place is None and model.made_by:
            cure = f"make it: `{model.made_by}`"
        yield Check("checkpoint", GROUP, "fail", path, known.problem, cure)
    elif known.place is None:
        status, why = _absent(subject)
        yield Check("checkpoint", GROUP, status, f"{path} is not on this machine", why, fix)
    elif lost := known.missing_files:
        value = f"{len(lost)} weight files missing: {', '.join(lost[:2])}{' ...' if len(lost) > 2 else ''}"
        from_hub = "/snapshots/" in known.place
        status, why = _absent(subject) if from_hub else ("fail", f"`{known.place}` is not whole")
        yield Check("checkpoint", GROUP, status, value, why, fix)
    else:
        yield Check("checkpoint", GROUP, "ok", f"{path}, {len(known.tensors)} tensors")
        yield from _tensors(subject, known.tensors)
        yield from _tokenizer(known)


def _tensors(subject: Subject, tensors: Mapping[str, Tensor]) -> Iterator[Check]:
    """Names, shapes and dtypes of the files against what the adapter computes from config.json."""
    adapter, config, recipe = subject.adapter, subject.config, subject.recipe
    if adapter is None or config is None or recipe is None:
        return
    dtypes = sorted({t.dtype for name, t in tensors.items() if not is_buffer(name)} - set(TRAINABLE))
    if dtypes:
        yield Check("dtypes", GROUP, "fail", ", ".join(dtypes), "quantized weights cannot be trained", UNQUANTIZED)
    else:
        yield _kept(subject, tensors)
    if adapter.shapes is None:
        yield Check("tensor names", GROUP, "skip", f"adapter `{adapter.name}` knows them only after loading")
        return
    held = [name for name in tensors if adapter.wire_name(name)]
    shapes = {name: t.shape for name, t in tensors.items()}
    wrong = list(checkpoint_files.name_obstacles(adapter, config, shapes, recipe.model.path))
    if wrong:
        what, why, fix = wrong[0]
        yield Check("tensor names", GROUP, "fail", what, why, fix)
    else:
        beside = len(tensors) - len(held)
        more = f", {beside} beside them never trained" if beside else ""
        yield Check("tensor names", GROUP, "ok", f"{len(held)} trained tensors as the adapter expects{more}")


def _kept(subject: Subject, tensors: Mapping[str, Tensor]) -> Check:
    adapter = subject.adapter
    assert adapter is not None
    rounded = sorted(n for n, t in tensors.items() if any(k in n for k in adapter.keep_fp32) and t.dtype != "F32")
    shown = ", ".join(sorted({t.dtype for t in tensors.values()}))
    if rounded:
        why = "engines hold them in fp32; whoever saved this checkpoint rounded them"
        fix = "nothing to do for a checkpoint of your own making; else download the original again"
        return Check("dtypes", GROUP, "warn", f"{len(rounded)} tensors not in F32: {rounded[0]}", why, fix)
    return Check("dtypes", GROUP, "ok", shown)


def _tokenizer(known: CheckpointFacts) -> Iterator[Check]:
    if not [name for name in known.tokenizer if name != "tokenizer_config.json"]:
        why = "prompts cannot be turned into tokens"
        fix = f"copy tokenizer.json and tokenizer_config.json into `{known.place}`"
        yield Check("tokenizer", GROUP, "fail", "no tokenizer files", why, fix)
        return
    yield Check("tokenizer", GROUP, "ok", ", ".join(known.tokenizer))
    if known.chat_template:
        yield Check("chat template", GROUP, "ok", "there")
    else:
        why = "prompts go to the model as bare text: right for a base model, wrong for a chat model"
        yield Check("chat template", GROUP, "warn", "none", why, "copy chat_template.jinja beside tokenizer.json")


def _sets(subject: Subject) -> Iterator[Check]:
    """Training problems and benchmarks, one check each kind, the missing ones by name."""
    assert subject.recipe is not None
    table = subject.recipe
    wanted = {
        "train": [one.source for one in sets(table.data).values()],
        "eval": table.eval.benchmarks if table.eval.every else [],
    }
    for use, title in (("train", "training data"), ("eval", "benchmarks")):
        there = [s for s in subject.facts.data if s.use == use and s.name in wanted[use]]
        if not there and set(wanted[use]) - GENERATED:
            yield Check(title, GROUP, "skip", "not in this document")
        broken = {s.name: s.problem for s in there if s.problem is not None}
        absent = [s for s in there if s.place is None and s.problem is None]
        if not there:
            continue
        if broken:
            fix = "`astra recipes show` prints data.source and eval.benchmarks; both take local files"
            yield Check(title, GROUP, "fail", ", ".join(broken), next(iter(broken.values())), fix)
        elif absent:
            status, why = _absent(subject)
            names = ", ".join(s.name for s in absent)
            folder = "train" if use == "train" else "eval"
            fix = f"put {absent[0].name}.jsonl into DIR/{folder} and `--set data.path=DIR` (or ASTRA_DATA_DIR=DIR)"
            fix += f", or `hf download --repo-type dataset {absent[0].hub_id}`"
            yield Check(title, GROUP, status, f"not on this machine: {names}", why, fix)
        else:
            shown = ", ".join(f"{s.name}{' (generated)' if s.place == 'generated' else ''}" for s in there)
            yield Check(title, GROUP, "ok", shown)
