"""How a model of a family decodes on a CPU in an engine in plain torch, where transformers' own forward is slow
(`ModelAdapter.decoding`).

Shape letters: N rows, B prompts, L their padded length, V vocabulary, S slots, G key and value heads, D size of a head,
C channels of a convolution, J its taps, H heads, K and V sizes of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class KeysValues(NamedTuple):
    """What a layer of full attention keeps of prompts, [B, G, L, D] each; padding is on the right."""

    keys: Tensor
    values: Tensor


class States(NamedTuple):
    """What a recurrent layer keeps of prompts."""

    conv_states: Tensor
    """[B, C, J]: the last inputs of the convolution, zeros before a prompt's first"""
    recurrent_states: Tensor
    """[B, H, K, V]"""


Held = KeysValues | States


class Decoding(Protocol):
    """A loaded model in fp32, with its parameters as they are at each call."""

    def prompts(self, tokens_BL: Tensor, lengths_B: Tensor) -> tuple[Tensor, list[Held]]:
        """int64 prompts, padded on the right -> (logits behind each prompt [B, V], what each layer keeps)."""
        ...

    def step(self, tokens_N: Tensor, columns_N: Tensor, span: int, slots: Sequence[Any]) -> Tensor:
        """One more token for each row -> logits [N, V]. The tokens stand at columns int64 [N], all under `span`.

        slots: of each layer, its `keys` and `values` [S, G, L, D], or its `arrays` (`States` of S slots in the place of
        B prompts). Their first N rows get what the layer keeps of the new token, in place.
        """
        ...
