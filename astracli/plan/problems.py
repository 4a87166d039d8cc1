"""What a machine lacks for a launch plan: GPUs, packages, room. Pure; `plan.refuse` says which of it ends a command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

from astracli.backends.choice import BackendChoice
from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.engines.contract import Case
from astracli.machine.facts import OLDEST, Machine
from astracli.machine.findings import PlanProblem
from astracli.machine.memory import words
from astracli.models import preflight
from astracli.models.adapter import MemoryShape, ModelAdapter
from astracli.plan.memory import on_gpu, solid, total
from astracli.plan.seats import Host, host_words
from astracli.plan.types import TRAINING, LaunchPlan
from astracli.process.config import Role

CPU_RECIPE = "qwen3.5-tiny-m2po-delta"


def gpu_problems(
    plan: LaunchPlan, recipe: Recipe, machines: Mapping[Host, Machine | None], way_out: Callable[[str], str]
) -> list[PlanProblem]:
    """GPUs that the hosts lack, as far as these are known."""
    if plan.choice.device != "cuda":
        return []
    known = {host: machine for host, machine in machines.items() if machine is not None}
    if len(machines) > 1 and (short := _short_hosts(plan, recipe, known, way_out)) is not None:
        return [short]
    gpus = [gpu for machine in known.values() for gpu in machine.visible_gpus]
    needed = sum(gpu.host in known for gpu in plan.gpu_map)
    if needed > len(gpus):
        train, resources = plan.command in TRAINING, recipe.resources
        parts = f"rollout {resources.rollout_gpus}" + (f", train {resources.train_gpus}" if train else "")
        shared = ", shared" if resources.share_gpus and train else ""
        noun = "GPU" if needed == 1 else "GPUs"
        there = str(len(gpus)) if gpus else "none"
        on_cpu = f"`astra {plan.command} --recipe {CPU_RECIPE}` runs on a CPU"
        elsewhere = f"`astra {plan.command} --recipe {recipe.name} --dry-run --facts 8xl40` plans for another machine"
        otherwise = f"no split of this recipe fits these GPUs; {on_cpu}" if gpus else f"{on_cpu}; {elsewhere}"
        what = f"{needed} {noun} (this machine has {there})"
        message = f"recipe `{recipe.name}` asks for {needed} {noun} ({parts}{shared}), this machine has {there}"
        return [PlanProblem("gpus", what, message, way_out(otherwise))]
    old = sorted({gpu.compute_capability for gpu in gpus if gpu.capability < OLDEST})
    if old:
        what = "GPUs of compute capability 8.0 or newer"
        there = "this machine has" if len(known) == 1 else "the hosts have"
        return [PlanProblem("gpus", what, f"bf16 needs {what}, {there} {', '.join(old)}", None)]
    return []


def _short_hosts(
    plan: LaunchPlan, recipe: Recipe, known: Mapping[Host, Machine], way_out: Callable[[str], str]
) -> PlanProblem | None:
    """The hosts of several that have fewer GPUs than the plan gives work to; None: none has."""
    wanted = Counter(gpu.host for gpu in plan.gpu_map)
    there = {host: len(machine.visible_gpus) for host, machine in known.items()}
    short = [host for host in known if wanted[host] > there[host]]
    if not short:
        return None
    resources = recipe.resources
    lacking = " and ".join(f"{host_words(host)} would need {wanted[host]}, it has {there[host]}" for host in short)
    over = f" over {resources.train_hosts} hosts" if resources.train_hosts > 1 else ""
    parts = f"rollout {resources.rollout_gpus}, train {resources.train_gpus}{over}"
    what = f"{len(plan.gpu_map)} GPUs (the hosts have {sum(there.values())})"
    message = f"recipe `{recipe.name}` asks for {len(plan.gpu_map)} GPUs ({parts}): {lacking}"
    return PlanProblem("gpus", what, message, way_out("name more hosts in launch.hosts, or ask for fewer GPUs"))


def software_problems(recipe: Recipe, choice: BackendChoice, facts: Machine) -> list[PlanProblem]:
    problems = list(engines.of(recipe).problems(Case(facts, choice.device, recipe)))
    if choice.device == "cuda" and facts.torch_cuda is None:
        message = f"recipe `{recipe.name}` trains on GPUs, torch here is built without CUDA"
        hint = "install a CUDA build of torch: `pip install -c constraints/cuda.txt 'astracli[gpu]'`"
        problems.append(PlanProblem("package", "a CUDA build of torch", message, hint))
    return problems


def checkpoint_problems(
    recipe: Recipe, choice: BackendChoice, facts: Machine, adapter: ModelAdapter, config: Mapping[str, Any] | None
) -> list[PlanProblem]:
    """What the checkpoint's config.json says that trainer or engine cannot do rightly."""
    if config is None:
        return []
    longest = recipe.rollout.context_length
    found = preflight.config_obstacles(config, recipe.model.path, longest, recipe.rollout.max_new_tokens)
    case = Case(facts, choice.device, recipe, adapter, config)
    found += engines.of(recipe).obstacles(case)
    return [PlanProblem("checkpoint", each.what, each.message, each.hint) for each in found]


def size_problems(
    plan: LaunchPlan, recipe: Recipe, shape: MemoryShape | None, facts: Machine, way_out: Callable[[str], str]
) -> list[PlanProblem]:
    """What cannot fit whatever the load: fixed rows against each GPU, the host and the disk."""
    problems, sizes = [], plan.gpu_sizes
    fraction, engine_memory = plan.placement.mem_fraction_static or 0.0, engines.of(recipe).memory
    otherwise = "no setting of this recipe fits these GPUs: take more or larger ones, or a smaller model"
    for gpu, names in plan.gpu_map.items():
        if (size := sizes.get(gpu)) is None:
            continue
        need = on_gpu(plan.memory, names, fixed=True)
        serves = any(p.role is Role.ENGINE and gpu in p.gpu_ids for p in plan.processes)
        static = engine_memory.reserved(shape, recipe) if fraction and shape and serves else 0
        if need > size:
            what = f"{words(need)} of GPU memory for {' and '.join(names)}"
            message = f"GPU {gpu} needs at least {what}, it has {words(size)}"
        elif static > fraction * size:
            what = f"{words(static)} for the engine's weights, states and one request"
            reserved = words(int(fraction * size))
            message = f"the engine reserves {fraction:.0%} of GPU {gpu} ({reserved}), it needs {what}"
        else:
            continue
        problems.append(PlanProblem("memory", what, message, way_out(otherwise)))
        break
    system = facts.system
    host = total(plan.memory, where="host", fixed=True)
    if host > system.memory_total:
        what = f"{words(host)} of memory"
        message = f"recipe `{plan.recipe}` needs at least {what}, this machine has {words(system.memory_total)}"
        otherwise = "choose a smaller model, or a machine with more memory"
        problems.append(PlanProblem("memory", what, message, way_out(otherwise)))
    disk = total(plan.disk, where="disk")
    if disk > system.disk_free:
        what = f"{words(disk)} of disk"
        free = words(system.disk_free)
        message = f"recipe `{plan.recipe}` may fill {what}, `{system.disk_path}` has {free} free"
        hint = "point --run-dir at a larger disk, or `--set checkpoint.keep=1 --set weights.keep=2`"
        problems.append(PlanProblem("disk", what, message, hint, blocking=False))
    return problems


def warnings(plan: LaunchPlan, recipe: Recipe, facts: Machine) -> list[str]:
    """What may go wrong under load but need not, and what is wrong by the recipe's own wish."""
    result, top_p, training = [], recipe.rollout.top_p, plan.command == "train"
    roles = {process.role for process in plan.processes}
    if top_p != 1.0 and training:
        result.append(
            f"rollout.top_p = {top_p:g}: the loss computes with the probabilities of the whole vocabulary, "
            "so the gradient is biased towards what these draws prefer"
        )
    if Role.EVAL in roles and training:
        result += _evaluations(recipe)
        most = recipe.eval.max_concurrency
        if most != "auto" and most < plan.running_requests:
            result.append(
                f"evaluations leave slots empty: an engine runs {plan.running_requests} requests at once, and gets "
                f"{most} of an evaluation; try eval.max_concurrency=auto"
            )
    for gpu, names in plan.gpu_map.items():
        need, size = on_gpu(solid(plan.memory), names), plan.gpu_sizes.get(gpu)
        if size is not None and need > size >= on_gpu(plan.memory, names, fixed=True):
            result.append(f"GPU {gpu} may need {words(need)} under full load, it has {words(size)}: requests will wait")
    here = [process for process in plan.processes if process.host is None]
    busy = sum(process.threads for process in here if process.role in (Role.ENGINE, Role.TRAINER))
    cores = facts.system.cores_usable
    if plan.choice.device == "cpu" and busy > cores:
        result.append(f"engines and trainer want {busy} threads of {cores:g} usable cores: they will starve each other")
    host, available = total(plan.memory, where="host"), facts.system.memory_available
    if available < host:
        result.append(f"about {words(host)} of memory are needed under full load, {words(available)} are available now")
    if plan.choice.device == "cuda" and plan.choice.gdn_backward == "torch" and Role.TRAINER in roles:
        result.append("the delta rule in plain torch keeps more activations than this plan counts")
    if Role.TRAINER in roles and engines.of(recipe).package is not None:
        result += _borrowed(facts)
    if not plan.model:
        result.append("memory and disk are not planned: the model's config.json is not on this machine")
    return result


def _evaluations(recipe: Recipe) -> list[str]:
    """When evaluations generate more than the rollouts between two of them; benchmarks of unknown size left out."""
    from astracli.config.benchmarks import get
    from astracli.data import benchmarks

    table = recipe.eval
    specs = [get(name, recipe) for name in table.benchmarks]
    items = [benchmarks.count_items(spec) or 0 for spec in specs]
    asked = sum(
        n * (table.samples_of(spec.name, spec.samples) + table.greedy) for n, spec in zip(items, specs, strict=True)
    )
    a_step = recipe.batch_sequences / (1 + recipe.train.replay_ratio)
    between = int(a_step * min(table.every, recipe.train.steps))
    if asked <= between:
        return []
    ways = [f"eval.every={ceil(asked / a_step)}"]
    if fewer := between // sum(items):
        ways.append(f"eval.samples={fewer}" + (f" with eval.pass_k={fewer}" if fewer < table.pass_k else ""))
    counts = f"one is {asked:,} completions, between two of them {between:,} rollouts are made"
    return [f"evaluations generate more than training: {counts}; try {', or '.join(ways)}"]


def _borrowed(facts: Machine) -> list[str]:
    """What a PYTHONPATH that was set for an engine changes in the trainer without a word."""
    places = [place for place in (facts.env.get("PYTHONPATH") or "").split(":") if place]
    result = []
    for name in ("torch", "transformers"):
        package = facts.package(name)
        origin = package.origin or ""
        if place := next((place for place in places if origin.startswith(place.rstrip("/") + "/")), None):
            result.append(
                f"the trainer computes with {name} {package.version} of PYTHONPATH (`{place}`), not with its own "
                "environment's: what is meant for the engine alone belongs in resources.engine.env.PYTHONPATH"
            )
    return result
