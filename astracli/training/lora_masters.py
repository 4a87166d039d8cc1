"""Master weights of a run that trains LoRA adapters: the optimizer, its memory and a checkpoint hold adapters alone.
What is published and exported is the whole model, with the adapters merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from astracli.config.recipe_train import TrainTable
from astracli.models.adapter import WireTensor
from astracli.training.fsdp import Ranks, local
from astracli.training.gradients import Gradients
from astracli.training.lora import Adapters
from astracli.training.optimizer import Masters


class LoraMasters(Masters):
    """`Masters` of the factors, which every rank holds whole; all parameters of the model itself are frozen."""

    def __init__(
        self,
        model: nn.Module,
        adapters: Adapters,
        wire: Mapping[str, WireTensor],
        table: TrainTable,
        ranks: Ranks,
        *,
        exact: Collection[nn.Parameter] = (),
        base_on_host: bool = False,
        moments_on_host: float = 0.0,
    ):
        """`wire`: of the model, whose parameters are on their device. `exact`: those that the engine holds in fp32.
        `base_on_host`: matrices without their adapters wait in host memory."""
        self.adapters = adapters
        self._model_wire = dict(wire)
        self._base_on_host = base_on_host
        super().__init__(model, adapters.wire, table, ranks, exact=exact, moments_on_host=moments_on_host)

    @property
    def travels(self) -> Mapping[str, WireTensor]:
        return self._model_wire

    @property
    def origin(self) -> Mapping[str, Any]:
        return {"base": self.adapters.origin}

    def _gradients(self, model: nn.Module) -> Gradients:
        grads = Gradients(self.parameters, accumulate=True)
        self.adapters.attach(grads.sums(), self.ranks, base_on_host=self._base_on_host)
        return grads

    def factors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        return self.adapters.factors_to_send()

    def publish_to_parameters(self) -> None:
        super().publish_to_parameters()
        self.adapters.merge()

    def updated(self) -> None:
        self.adapters.merge()

    def held(self) -> list[Tensor]:
        return [*super().held(), *self.adapters.on_device()]

    def sources(self) -> dict[str, Tensor]:
        return {name: local(self.every[name].detach()) for name in self._model_wire}
