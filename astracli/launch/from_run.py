"""`astra train --from RUN[@STEP]`: a new run that starts from the weights of another one.

The weights are those of an export where there is one of that step, else of the checkpoint. They come into the new run's
own directory, so that it can be resumed when the other run goes on or is removed:

    RUN_DIR/initial/                           a Hugging Face directory, the new run's `model.path`
    RUN_DIR/initial_checkpoint/step_000040/    with the optimizer kept: masters and moments of the other run
    RUN_DIR/from.json                          which run, which step, from what
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from astracli.config import reading, recipe_io
from astracli.config.recipe import Recipe
from astracli.data import fetch
from astracli.errors import RunFailed, UserError
from astracli.models import registry
from astracli.models.adapter import read_config
from astracli.models.checkpoint_files import TOKENIZER_FILES
from astracli.plan.types import TRAINING
from astracli.process.atomic import write_atomic
from astracli.runs import find as runs
from astracli.runs.run_dir import ORIGIN, RunDir
from astracli.training import best, checkpoint

BEST = "best"


@dataclass(frozen=True)
class Source:
    """Weights of a run."""

    text: str
    """As it was asked for."""
    run: RunDir
    recipe: Recipe
    """The run's own."""
    step: int
    """Steps that the weights were trained."""
    kind: Literal["export", "checkpoint"]
    path: Path
    """The export's directory, or the checkpoint's."""
    base: Path
    """A Hugging Face directory with the model's config and tokenizer; of a checkpoint also the layout."""


@dataclass(frozen=True)
class Origin:
    """What `from.json` says."""

    run: str
    step: int
    kind: str
    """`export` or `checkpoint`"""
    optimizer: bool
    """Whether the moments came along."""
    model: str
    """`model.path` of the other run."""


def find(text: str, *, keep_optimizer: bool = False) -> Source:
    """`RUN`, `RUN@STEP` or `RUN@best` -> its weights; without a step the newest that are whole. Raises UserError."""
    name, at, step = text.rpartition("@")
    if not at or not (step.isdigit() or step == BEST):
        name, step = text, ""
    run = runs.named(name)
    status = run.status()
    if status is not None and status.command not in TRAINING:
        raise UserError(f"`{run.path}` holds an `astra {status.command}`, which trains nothing", "name a training run")
    recipe = recipe_io.load(run.recipe_json)
    exports = {} if keep_optimizer else exported_steps(run)
    wanted = best.required(run, recipe).score.step if step == BEST else int(step) if step else None
    newest = checkpoint.latest(run.checkpoints) if wanted is None else None
    if wanted is None:
        wanted = max([*exports, *([newest.step] if newest else [])], default=None)
    if wanted in exports:
        return Source(text, run, recipe, wanted, "export", exports[wanted], exports[wanted])
    found = newest or (checkpoint.read(checkpoint.place(run.checkpoints, wanted)) if wanted is not None else None)
    if found is None:
        there = sorted({*exports, *(one.step for one in checkpoint.find(run.checkpoints))})
        what = "checkpoint" if keep_optimizer else "weights"
        raise UserError(
            f"run `{run.path}` has no {what}" + (f" of step {wanted}" if wanted is not None else " yet"),
            f"there are those of step {', '.join(map(str, there))}" if there else "its first checkpoint brings some",
        )
    base = fetch.local_path(recipe.model.path) or fetch.fetch_model(recipe.model.path, recipe.model.revision)
    return Source(text, run, recipe, found.step, "checkpoint", found.path, base)


def exported_steps(run: RunDir) -> dict[int, Path]:
    """Step -> a whole export in the layout of the source."""
    found: dict[int, Path] = {}
    for place in (run.export, *sorted(run.path.glob("export-*"))):
        try:
            origin = reading.document(place / ORIGIN)
        except (OSError, ValueError):
            continue
        if origin.get("layout") == "source":
            found.setdefault(int(origin["step"]), place)
    return found


def checked(recipe: Recipe, source: Source, *, keep_optimizer: bool = False) -> Recipe:
    """The new run's recipe on the model of `source`, for its plan. Raises UserError when it is for another model: one
    of another adapter, config or tokenizer; or when the optimizer's state is that of other parameters."""
    theirs = source.recipe.model
    if recipe.model.path not in (theirs.path, str(source.run.path / "initial")):
        _same_model(recipe, source)
    table = recipe.model.model_copy(update={"path": str(source.base), "revision": None, "made_by": None})
    recipe = recipe.model_copy(update={"model": table})
    config = read_config(source.base)
    own, other = registry.resolve(recipe, config), registry.resolve(source.recipe, config)
    _same_training(recipe, source, keep_optimizer)
    if own.name != other.name:
        raise UserError(
            f"`{source.run.path}` was trained with adapter `{other.name}`, this recipe takes `{own.name}`",
            f"`--set model.adapter={other.name}`",
        )
    return recipe


def _same_training(recipe: Recipe, source: Source, keep_optimizer: bool) -> None:
    """Raise UserError when the optimizer is to be kept, and would train other parameters: other adapters, or none."""
    if not keep_optimizer or recipe.lora == source.recipe.lora:
        return
    said = [f"[lora] of rank {each.rank}" if each else "all weights" for each in (source.recipe.lora, recipe.lora)]
    words = " and ".join(said) if said[0] != said[1] else f"{said[0]} of another kind"
    raise UserError(
        f"the optimizer of `{source.run.path}` cannot be kept: that run and this recipe train {words}",
        "leave out the option: the new run then starts from the weights, adapters merged",
    )


def _same_model(recipe: Recipe, source: Source) -> None:
    """Raise UserError unless the recipe's own model has the config and the tokenizer of the weights."""
    hint = f"`--set model.path={source.recipe.model.path}` says that this recipe is meant for that model"
    between = f"recipe `{recipe.name}` is for `{recipe.model.path}`, the weights of `{source.run.path}` are of"
    between += f" `{source.recipe.model.path}`"
    place = fetch.local_path(recipe.model.path)
    if place is None:
        raise UserError(f"{between}, and the first is not on this machine to be compared", hint)
    ours, theirs = read_config(place), read_config(source.base)
    changed = sorted(key for key in {*ours, *theirs} - NO_SHAPE if ours.get(key) != theirs.get(key))
    if changed:
        raise UserError(f"{between}: their config.json differ in {', '.join(changed[:5])}", hint)
    if tokenizer_files(place) != tokenizer_files(source.base):
        raise UserError(f"{between}: their tokenizers differ", hint)


NO_SHAPE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
"""Keys of a config.json that say nothing about the model's shape or function."""


def tokenizer_files(folder: Path) -> dict[str, str]:
    """Name -> digest of what the tokenizer is made from."""
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def take(recipe: Recipe, source: Source, run: RunDir, *, keep_optimizer: bool) -> Recipe:
    """Bring the weights into the new run. -> its recipe, whose model they are."""
    initial = initial_model(run)
    if source.kind == "export":
        shutil.copytree(source.path, initial, copy_function=_link)
    elif keep_optimizer and recipe.lora is not None:  # the same adapters go on, and belong to the weights without them
        shutil.copytree(source.base, initial, copy_function=_link, ignore=_folders)
    else:
        _export(source, initial)
    if keep_optimizer:
        place = checkpoint.place(run.path / "initial_checkpoint", source.step)
        shutil.copytree(source.path, place, copy_function=_link)
    origin = Origin(str(source.run.path), source.step, source.kind, keep_optimizer, source.recipe.model.path)
    write_atomic(run.path / "from.json", json.dumps(asdict(origin), indent=2) + "\n")
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"path": str(initial.resolve()), "revision": None})}
    )


def _export(source: Source, out: Path) -> None:
    """The checkpoint as a Hugging Face directory; in a process of its own, so that the supervisor stays small."""
    words = ("runs", "export", str(source.run.path.resolve()), "--step", str(source.step), "--out", str(out.resolve()))
    done = subprocess.run([sys.executable, "-m", "astracli", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.startswith("error: ")), done.stderr[-500:])
        raise RunFailed(
            f"step {source.step} of `{source.run.path}` could not be exported: {said.removeprefix('error: ')}",
            f"`astra {' '.join(words[:-2])}` shows more",
        )


def _folders(folder: str, names: list[str]) -> list[str]:
    """What of a model's directory is no part of the model."""
    return [name for name in names if os.path.isdir(os.path.join(folder, name))]


def _link(source: str, target: str) -> None:
    """Weights get a second name, for their files are replaced and never changed in place; what a user may edit, and
    anything where the file system has no such names, is copied."""
    if source.endswith((".safetensors", ".bin")):
        with contextlib.suppress(OSError):
            os.link(os.path.realpath(source), target)  # a download may be a link itself
            return
    shutil.copy2(source, target)


def initial_model(run: RunDir) -> Path:
    """Where a run keeps the weights that it started from, when they are another run's."""
    return run.path / "initial"


def initial_checkpoint(run: RunDir) -> Path | None:
    """The checkpoint whose masters and moments the run starts with; None when it starts with weights alone."""
    folder = run.path / "initial_checkpoint"
    return next((path.resolve() for path in folder.glob("step_*")), None)


def origin(run: RunDir) -> Origin | None:
    """Which run's weights a run started from; None when it started from a model."""
    try:
        return Origin(**reading.document(run.path / "from.json"))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"`{run.path / 'from.json'}` is damaged: {error}") from None


def forget(run: RunDir) -> None:
    """Take back what `take` brought into a run that does not start."""
    for folder in (initial_model(run), run.path / "initial_checkpoint"):
        shutil.rmtree(folder, ignore_errors=True)
    (run.path / "from.json").unlink(missing_ok=True)
