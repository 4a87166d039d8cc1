"""The extension of vLLM's worker (`worker_extension_cls`): applies what is staged to the model that the worker holds.

vLLM mixes the class into its own worker and calls its methods through `collective_rpc`. It imports nothing of vLLM, so
that no release is bound to. (0.20.2 and 0.33.0: `init_worker` in `v1/worker/worker_base.py`.)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from astracli.engines import loader
from astracli.weights.receive.reading import RESULT


class AstraWorker:
    """Method names begin with `astra_`: vLLM refuses an extension that hides a name of its worker."""

    def astra_apply(self) -> dict[str, Any]:
        """Apply what is staged; what our loader found. Never raises: an exception here would end the engine."""
        with torch.inference_mode():
            loader.apply_staged(self._astra_model())
        try:
            found: dict[str, Any] = json.loads((Path(os.environ["ASTRA_STAGE_DIR"]) / RESULT).read_text())
        except (OSError, ValueError) as error:
            return {"ok": False, "version": None, "message": f"the weight loader left no result ({error})"}
        return found

    def astra_settle(self) -> None:
        """Wait until nothing of ours reads the weights, and give up what is decoded ahead on the GPU."""
        loader.settle(self._astra_model())

    def _astra_model(self) -> Any:
        return self.get_model()  # type: ignore[attr-defined]  # of vLLM's worker
