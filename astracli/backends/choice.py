"""Which device, engine, attention and kernels a run gets on a machine, each with its reason.

`choose` reads tables: here, in `delta_rule` and of each engine. A combination that is known to fail is refused with the
reason and the ways out, before anything starts. What a machine lacks, the plan reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from astracli.backends import delta_rule
from astracli.config.recipe import Recipe
from astracli.config.recipe_train import SHARE_ABOVE
from astracli.engines import prefix_cache
from astracli.engines import registry as engines
from astracli.engines.contract import ASKED, Case, known
from astracli.errors import UserError
from astracli.machine.facts import Machine
from astracli.models.adapter import ModelAdapter
from astracli.models.preflight import text_config

TRAINER: dict[str, tuple[tuple[str, ...], str | None]] = {
    "sdpa": (("cpu", "cuda"), None),
    "eager": (("cpu", "cuda"), None),
    "flash_attention_2": (("cuda",), "flash-attn"),
}
"""Trainer attention -> (devices, package it needs)."""

PACKS = ("auto", "sdpa")
"""Values of train.attention under which a packed row gets its own attention function."""


@dataclass(frozen=True)
class Backend:
    """One decision, as `--dry-run` and `doctor` show it."""

    what: str
    choice: str
    reason: str


@dataclass(frozen=True)
class BackendChoice:
    device: Literal["cpu", "cuda"]
    engine: str
    serving_attention: str
    """`auto` = decided where the GPUs are."""
    linear_attention: str
    """Engine kernel of the linear-attention layers; `none` for a dense model."""
    prefix_cache: bool
    trainer_attention: str
    gdn_forward: str
    """`torch`, `fla`, `fla+tilelang`, `auto` (decided where the GPUs are) or `none` (dense)."""
    gdn_backward: str
    env: Mapping[str, str] = field(default_factory=dict)
    """Set for every process of the run."""
    reasons: tuple[Backend, ...] = ()
    warnings: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """The decisions as plain JSON; `attention` is what the trainer loads the model with."""
        names = ("serving_attention", "linear_attention", "gdn_forward", "gdn_backward")
        own = {name: getattr(self, name) for name in names}
        return {"device": self.device, "engine": self.engine, "attention": self.trainer_attention, **own}


def choose(
    adapter: ModelAdapter,
    facts: Machine,
    recipe: Recipe,
    config: Mapping[str, Any] | None = None,
    *,
    updated: bool = True,
) -> BackendChoice:
    """Decide for this machine. `updated`: the engines get new versions of the weights while they serve.

    Raises UserError for a combination that cannot work anywhere or fails on these GPUs.
    """
    device, why_device = _device(recipe)
    engine, why_engine = engines.chosen(recipe)
    case = Case(facts, device, recipe, adapter, config, updated=updated)
    serving, (cached, why_cached) = engine.choose(case), prefix_cache.decide(engine, case)
    if why_engine == ASKED and serving.reason:
        why_engine += f": {serving.reason}"
    trainer, why_trainer = _trainer(facts, recipe, device)
    gdn, why_gdn, warning = delta_rule.choose(adapter, facts, device, case.capability)
    layout, why_layout = packing(recipe, adapter, device)
    shared = sharing(recipe, adapter, device, None if config is None else text_config(config))
    env = {**({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}), **serving.env}
    why_env = ["no process looks for a GPU" if device == "cpu" else "", serving.env_reason]
    told = " ".join(f"{name}={value}" for name, value in env.items()) or "as it is"
    reasons = (
        Backend("device", device, why_device),
        Backend("engine", engine.name, why_engine),
        Backend("serving attention", *serving.attention),
        Backend("serving linear attention", *serving.linear_attention),
        Backend("prefix cache", "on" if cached else "off", why_cached),
        Backend("trainer attention", trainer, why_trainer),
        Backend("micro-batches", layout, why_layout),
        Backend("shared prompts", shared.words, shared.reason),
        Backend("delta rule, forward", gdn, why_gdn),
        Backend("delta rule, backward", gdn, why_gdn),
        Backend("environment", told, "; ".join(filter(None, why_env)) or "nothing has to be set"),
    )
    return BackendChoice(
        device=device,
        engine=engine.name,
        serving_attention=serving.attention[0],
        linear_attention=serving.linear_attention[0],
        prefix_cache=cached,
        trainer_attention=trainer,
        gdn_forward=gdn,
        gdn_backward=gdn,
        env=env,
        reasons=reasons,
        warnings=(warning,) if warning else (),
    )


def _device(recipe: Recipe) -> tuple[Literal["cpu", "cuda"], str]:
    asked = recipe.resources
    gpus = asked.rollout_gpus + asked.train_gpus
    if asked.device == "cpu" and gpus:
        key, count = next((k, n) for k in ("rollout_gpus", "train_gpus") if (n := getattr(asked, k)))
        raise UserError(
            f"resources.{key} = {count} asks for GPUs, but resources.device = cpu",
            "add `--set resources.device=cuda` to train on GPUs; on a CPU `resources.engines` and "
            "`resources.train_ranks` count processes",
        )
    if asked.device == "cpu":
        return "cpu", "the recipe says resources.device = cpu"
    if asked.device == "cuda" and gpus == 0:
        raise UserError(
            "resources.device = cuda, but resources.rollout_gpus and resources.train_gpus are both 0",
            "add `--set resources.rollout_gpus=1 --set resources.train_gpus=1`, or `--set resources.device=cpu`",
        )
    if gpus:
        return "cuda", f"the recipe asks for GPUs (rollout {asked.rollout_gpus}, train {asked.train_gpus})"
    return "cpu", "the recipe asks for no GPU"


def _trainer(facts: Machine, recipe: Recipe, device: str) -> tuple[str, str]:
    asked = recipe.train.attention
    if asked == "auto":
        return "sdpa", "torch's own attention: exact on both devices, nothing to install"
    known("train.attention", asked, ("auto", *TRAINER), "the trainer")
    devices, package = TRAINER[asked]
    if device not in devices:
        raise UserError(f"train.attention = {asked} does not run on a CPU", "use `--set train.attention=auto`")
    if package is not None and facts.visible_gpus and not facts.usable(package):
        stub = facts.package(package).importable_spec
        what = "is only an empty namespace folder" if stub else "is not installed"
        raise UserError(
            f"train.attention = {asked} needs {package}, which {what}",
            f"`pip install {package}`, or `--set train.attention=auto`",
        )
    return asked, ASKED


@dataclass(frozen=True)
class Sharing:
    """Whether samples of a group share its prompt in the trainer."""

    above: float | None
    """In batches where that leaves out more than this part of the tokens; None: never."""
    reason: str

    @property
    def words(self) -> str:
        return "no" if self.above is None else "yes" if self.above == 0.0 else f"where it saves over {self.above:.0%}"


def sharing(recipe: Recipe, adapter: ModelAdapter, device: str, config: Mapping[str, Any] | None = None) -> Sharing:
    """What `train.share_prompts` comes to. `config`: the text model's config.json, None where it is not known. Raises
    UserError when a recipe asks for what cannot be."""
    asked, obstacle, doubt = recipe.train.share_prompts, _unshareable(recipe, adapter), _doubt(recipe, adapter, config)
    if asked is False:
        return Sharing(None, "the recipe says train.share_prompts = false")
    if asked is True and obstacle is not None:
        raise UserError(f"train.share_prompts = true: {obstacle}", "use `--set train.share_prompts=auto`")
    if asked is True:
        return Sharing(0.0, "the recipe asks for it")
    if (why := obstacle or doubt) is not None:
        return Sharing(None, why)
    above = SHARE_ABOVE[device]
    words = f"a group's prompt is computed once in a batch where that leaves out over {above:.0%} of the tokens"
    return Sharing(above, f"{words}: it then saves more than a tenth of a step")


def _unshareable(recipe: Recipe, adapter: ModelAdapter) -> str | None:
    """Why no prompt can be shared; None when it can."""
    train = recipe.train
    if recipe.sft is not None:
        return "in supervised training every example has a prompt of its own"
    if recipe.rollout.group_size == 1:
        return "rollout.group_size = 1: a group has one sample"
    if train.packing == "padded":
        return "train.packing = padded gives every sample a row of its own"
    if train.row_boundaries == "ignored":
        return "train.row_boundaries = ignored lets state run over boundaries"
    if train.attention not in PACKS:
        return f"train.attention = {train.attention} does not know the boundaries of a packed row"
    if adapter.hybrid and not adapter.shares_prompts:
        return f"adapter `{adapter.name}` cannot take its recurrent state on from a prompt (shares_prompts)"
    return None


def _doubt(recipe: Recipe, adapter: ModelAdapter, config: Mapping[str, Any] | None) -> str | None:
    """Why `auto` shares no prompts although they could be; None when it does."""
    if not adapter.shares_prompts:
        return (
            f"adapter `{adapter.name}` does not say that its attention allows it (shares_prompts); "
            "`true` tries, and the check at the start proves it"
        )
    told = config or {}
    window = told.get("sliding_window") if told.get("use_sliding_window", True) else None
    if window is not None and window < recipe.rollout.context_length:
        return (
            f"the model's sliding window of {window} tokens is shorter than a row may be, and slow with shared prompts"
        )
    return None


def packing(recipe: Recipe, adapter: ModelAdapter, device: str) -> tuple[str, str]:
    """(`packed` or `padded`, the reason). Raises UserError when a recipe asks for packed rows that would leak."""
    asked, attention = recipe.train.packing, recipe.train.attention
    obstacle = None
    if adapter.hybrid and adapter.install_varlen is None:
        obstacle = f"adapter `{adapter.name}` cannot reset its recurrent state inside a row (install_varlen)"
    elif attention not in PACKS:
        obstacle = f"train.attention = {attention} does not know the boundaries of a packed row"
    if asked == "packed" and obstacle is not None:
        raise UserError(f"train.packing = packed: {obstacle}", "use `--set train.packing=padded`")
    if recipe.train.row_boundaries == "ignored":  # an ablation: it needs layers that carry state over boundaries
        if adapter.hybrid and asked != "padded" and obstacle is None:
            return "packed", "an ablation: train.row_boundaries = ignored lets state run from one sample into the next"
        why = "train.packing = padded joins no samples" if adapter.hybrid else f"adapter `{adapter.name}` is no hybrid"
        raise UserError(
            f"train.row_boundaries = ignored has nothing to leak through: {obstacle or why}",
            "leave it at `reset`, or pack a hybrid's rows with `--set train.packing=packed`",
        )
    if asked != "auto":
        return asked, "the recipe asks for it"
    if device == "cpu":
        return "padded", "right-padded rows are quicker than short segments on a CPU"
    return ("padded", obstacle) if obstacle is not None else ("packed", "one row a micro-batch, nothing is padded")
