"""Ends a run that has no signal any more, in the words of what was seen: the hub's counts, metrics, golds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from astracli.errors import RunFailed, UserError
from astracli.launch.configs import RunContext
from astracli.report import no_signal
from astracli.runs import metrics

if TYPE_CHECKING:
    from astracli.hub.store import HubStore
    from astracli.hub.types import NoSignal


def failure(store: HubStore, context: RunContext) -> RunFailed | None:
    """Why the run is to end now; None while more groups may bring a batch."""
    seen = store.no_signal
    if seen is None:
        return None
    run = context.run_dir
    logs = f"{run.attempt_logs(context.attempt) / 'rollout.log'}"
    records = metrics.read(run.metrics_jsonl)
    return RunFailed(*no_signal.explain(seen, context.recipe, records, golds(seen, context), logs))


def golds(seen: NoSignal, context: RunContext) -> no_signal.Golds:
    """Whether the reward can read the right answers of the dropped prompts."""
    from astracli.data.prompts import PromptSource
    from astracli.rewards import gold

    data = context.recipe.data
    if data.reward not in gold.COMPARED:
        return no_signal.Golds()
    try:
        source = PromptSource(data, context.recipe.seed, context.inputs.data)
        answers = {source.problem(place).answer for place in seen.prompts}
    except UserError:  # the file has gone since: that is not what ends this run
        return no_signal.Golds()
    return no_signal.looked_at(sorted(answers), lambda answer: gold.readable(data.reward, answer))
