"""Where metrics go besides the file: TensorBoard, Weights & Biases, Trackio. `metrics.sinks = ["tensorboard"]`.

Each is an extra (`pip install "astracli[tensorboard]"`) and a factory `(run_dir: Path) -> Sink` behind the entry-point
group `astra.sinks`; a package of one's own comes in by the same door. A figure is called PROCESS/NAME, and of an
evaluation eval/BENCHMARK/NAME.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from astracli.errors import UserError

_KEYS = ("step", "time", "version")


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of every number in a record, without those that say when it was."""
    group = "/".join(str(record[key]) for key in ("process", "benchmark") if record.get(key) is not None)
    for key, value in record.items():
        if key not in _KEYS and isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{group}/{key}" if group else key, float(value)


class TensorBoard:
    """Event files in RUN_DIR/tensorboard; wall times are those of the records."""

    needs = "tensorboard"

    def __init__(self, run_dir: Path):
        module = _needed("torch.utils.tensorboard", "tensorboard")
        self._writer: Any = module.SummaryWriter(str(run_dir / "tensorboard"), flush_secs=10)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            for name, value in scalars(record):
                self._writer.add_scalar(name, value, record.get("step", 0), walltime=record.get("time"))

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One W&B run of the run's name, files in RUN_DIR/wandb. Offline unless WANDB_API_KEY or WANDB_MODE say otherwise.

    `step` is a metric of its own: records of the workers come in another order than that of steps. W&B neither captures
    nor writes to the terminal, which belongs to the run's own view; where the figures went is said at the end.
    """

    needs = "wandb"

    def __init__(self, run_dir: Path):
        wandb = self._wandb = _needed("wandb", "wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        project = os.environ.get("WANDB_PROJECT", "astra")
        self._run: Any = wandb.init(
            project=project,
            name=run_dir.resolve().name,
            dir=str(run_dir),
            config=_recipe(run_dir),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            when = {"_timestamp": record["time"]} if "time" in record else {}
            self._run.log({"step": record.get("step", 0), **when, **dict(scalars(record))})

    def close(self) -> None:
        run = self._run
        where = f"offline; send it with `wandb sync {Path(run.dir).parent}`" if run.offline else run.url
        run.finish()
        self._wandb.teardown()  # ends W&B's service, which writes the file: only then is everything in it
        print(f"wandb: {where}", file=sys.stderr)


class Trackio:
    """One Trackio run of the run's name in project `astra`, in Trackio's own place (TRACKIO_DIR).

    What Trackio prints when it begins and ends is held back: stdout is for results, the terminal for the run's view.
    """

    needs = "trackio"

    def __init__(self, run_dir: Path):
        self._trackio: Any = _needed("trackio", "trackio")
        self._project = os.environ.get("TRACKIO_PROJECT", "astra")
        with redirect_stdout(io.StringIO()):
            self._trackio.init(project=self._project, name=run_dir.resolve().name, config=_recipe(run_dir))

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            self._trackio.log(dict(scalars(record)), step=record.get("step", 0))

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()
        print(f"trackio: look at it with `trackio show --project {self._project}`", file=sys.stderr)


def _needed(module: str, extra: str) -> Any:
    """A module of an extra. Raises UserError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"metrics.sinks: `{extra}` is not usable: {error}", f'pip install "astracli[{extra}]"'
        ) from None


def _recipe(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / "recipe.json").read_text()))
    except FileNotFoundError:
        return {}
