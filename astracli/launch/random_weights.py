"""`model.weights = "random"`: a new run starts from a checkpoint of random weights in its own directory.

RUN_DIR/initial/      config, tokenizer and tensor names of `model.path`, weights drawn by the recipe's seed
"""

from __future__ import annotations

import subprocess
import sys

from astracli.config.recipe import Recipe
from astracli.data import fetch
from astracli.errors import RunFailed
from astracli.launch.from_run import initial_model
from astracli.models import registry
from astracli.runs.run_dir import RunDir


def take(recipe: Recipe, run: RunDir) -> Recipe:
    """Write the checkpoint, in a process of its own, so that the supervisor stays small. -> the recipe, whose model it
    is. Raises RunFailed."""
    source = fetch.fetch_model(recipe.model.path, recipe.model.revision)
    adapter, out = registry.resolve(recipe, source), initial_model(run).resolve()
    words = ("-m", "astracli.training.random_weights", source.resolve(), out, adapter.name, str(recipe.seed))
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise RunFailed(f"random weights for `{recipe.model.path}` could not be written: {said}")
    model = recipe.model.model_copy(update={"path": str(out), "revision": None, "weights": "checkpoint"})
    return recipe.model_copy(update={"model": model})
