"""Gradients of the trained parameters between two updates, in fp32.

Sharded and fp32 parameters keep their own in `p.grad`, added up by autograd or FSDP. Parameters that are stored in bf16
cannot: 256 micro-batches added up in bf16 lose what is under 1/256 of the sum. A hook takes each gradient as soon as
autograd has it, adds it to an fp32 accumulator and frees the bf16 one. Matrix products add the gradients of their
weights to the accumulator themselves (`weight_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from astracli.kernels import weight_gradients


class Gradients:
    """What the backward passes since the last `clear` left. fp32 accumulators live from the first backward pass after
    it to the next: the passes without gradients have their memory."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, accumulate: bool):
        """`accumulate`: the parameters are stored in less than fp32, so `p.grad` is taken away at once."""
        self._parameters = parameters
        self._sums: dict[str, Tensor] | None = {} if accumulate else None
        if self._sums is not None:
            for name, parameter in parameters.items():
                parameter.register_post_accumulate_grad_hook(_taking(self._sums, name))

    def by_products(self, model: nn.Module) -> None:
        """Let the model's matrix products add the gradients of their weights themselves: hooks take the rest."""
        if self._sums is not None:
            weight_gradients.install(model, self._parameters, self._sums)

    def sums(self) -> dict[str, Tensor]:
        """The accumulators by name, of gradients that are accumulated."""
        assert self._sums is not None
        return self._sums

    def found(self) -> dict[str, Tensor]:
        """fp32 gradients by parameter name, where there is one; sharded like their parameters."""
        if self._sums is not None:
            return {name: self._sums[name] for name in self._parameters if name in self._sums}
        return {name: p.grad for name, p in self._parameters.items() if p.grad is not None}

    def of(self, name: str) -> Tensor | None:
        """One of `found`."""
        return self._sums.get(name) if self._sums is not None else self._parameters[name].grad

    def forget(self, name: str) -> None:
        """Free one that has been taken over."""
        if self._sums is not None:
            self._sums.pop(name, None)
        self._parameters[name].grad = None

    def clear(self) -> None:
        """Forget them and free their memory."""
        if self._sums is not None:
            self._sums.clear()
        for parameter in self._parameters.values():
            parameter.grad = None


def _taking(sums: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """A hook that holds on to nothing but the sums."""

    def take(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return  # every use was a product that added to the sum itself
        if name in sums:
            sums[name].add_(gradient)  # one kernel, in fp32: no copy of the gradient in fp32 is made
        else:
            sums[name] = gradient.float()

    return take
