"""Ends a run that has no signal any more, in the words of what was seen: the hub's counts, metrics, golds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from astracli.config import recipe_data
from astracli.errors import RunFailed, UserError
from astracli.launch.configs import RunContext
from astracli.launch.watch import unharmed
from astracli.process.atomic import write_atomic
from astracli.report import no_signal
from astracli.rl.sample_log import group_line
from astracli.runs import metrics

if TYPE_CHECKING:
    from astracli.hub.store import HubStore
    from astracli.hub.types import NoSignal

FILE = "without_signal.jsonl"
"""The newest dropped groups, in `samples/`: behind those of the steps, as they came after them."""


def failure(store: HubStore, context: RunContext) -> RunFailed | None:
    """Why the run is to end now; None while more groups may bring a batch."""
    seen = store.no_signal
    if seen is None:
        return None
    run = context.run_dir
    logs = f"{run.attempt_logs(context.attempt) / 'rollout.log'}"
    records = metrics.read(run.metrics_jsonl)
    dropped = store.dropped_groups()
    lines = [json.dumps(group_line(group, sample), ensure_ascii=False) for group in dropped for sample in group.samples]
    file = run.samples / FILE
    with unharmed(f"`{file}` was not written"):
        write_atomic(file, "".join(f"{line}\n" for line in lines))
    examples = [(group.problem, group.answer, group.samples[0].text) for group in dropped[-1:] if group.samples]
    message, hint = no_signal.explain(seen, context.recipe, records, golds(seen, context), logs, examples)
    return RunFailed(message, hint)


def golds(seen: NoSignal, context: RunContext) -> no_signal.Golds:
    """Whether the reward can read the right answers of the dropped prompts."""
    from astracli.data.prompts import PromptSource
    from astracli.rewards import gold

    data = context.recipe.data
    rewards = {name: no_signal.rewards_of(table)[0] for name, table in recipe_data.sets(data).items()}
    try:
        source = PromptSource(data, context.recipe.seed, context.inputs.data)
        problems = [source.problem(place) for place in seen.prompts]
    except UserError:  # the file has gone since: that is not what ends this run
        return no_signal.Golds()
    answers = sorted({(rewards[p.source], p.answer) for p in problems if rewards[p.source] in gold.COMPARED})
    unreadable = [answer for reward, answer in answers if not gold.readable(reward, answer)]
    return no_signal.Golds(len(answers), len(unreadable), unreadable[0] if unreadable else "")
