"""`astra sft`: supervised training on examples."""

from __future__ import annotations

from astracli.cli import options
from astracli.cli.train import FromOpt, KeepOptimizerOpt, start


def sft(
    recipe_name: options.RecipeArg = None,
    recipe: options.RecipeOpt = None,
    set_: options.SetOpt = None,
    dry_run: options.DryRunOpt = False,
    facts: options.FactsOpt = None,
    run_dir: options.RunDirOpt = None,
    resume: options.ResumeOpt = None,
    from_: FromOpt = None,
    keep_optimizer: KeepOptimizerOpt = False,
    json: options.JsonOpt = False,
) -> None:
    """Train on examples with known answers (supervised fine-tuning).

    For recipes with a table [sft]. Runs, checkpoints, evaluations and exports are those of `astra train`, and so is
    --resume. `astra train RECIPE --from RUN` goes on with reinforcement learning. --json and --facts need --dry-run.
    """
    start("sft", **locals())
