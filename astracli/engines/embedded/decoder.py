"""Running the model: a batch of prompts into slots, and one more token for every active slot.

Shape letters: M prompts, N active rows, P longest prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from astracli.engines.embedded.slots import SlotCache
from astracli.models.decoding import Decoding


class Decoder:
    """A model with its slot cache. One thread calls it."""

    def __init__(self, model: Any, slots: int, *, prefill_tokens: int = 8192, decoding: Decoding | None = None):
        """`decoding`: the family's own (`ModelAdapter.decoding`); None: the model's forward."""
        self._own = decoding
        self.model = model.eval().requires_grad_(False)
        self.cache = SlotCache(slots)
        self.slots = slots
        self.prefill_tokens = prefill_tokens
        """Tokens, padding included, of one prefill forward; a single longer prompt is still one forward."""
        self.device = next(model.parameters()).device
        # transformers 5.24 has renamed it
        renamed = "cache" in inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if renamed else "past_key_values"

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[np.ndarray], first: int) -> Tensor:
        """Compute prompts (int64 [p] each, p >= 1) into slots first, first + 1, ... -> last-token logits [M, V].

        Equal prompts are computed once. Forwards are filled up by length, so that padding stays small.
        """
        unique: dict[bytes, int] = {}
        distinct: list[np.ndarray] = []
        row_of = np.empty(len(prompts), np.int64)
        for i, prompt in enumerate(prompts):
            key = prompt.tobytes()
            if key not in unique:
                unique[key] = len(distinct)
                distinct.append(prompt)
            row_of[i] = unique[key]
        # Slots follow the order of the prompts, forwards the order of lengths: place each forward's rows at the end of
        # what is there, then put the order right once.
        logits: list[Tensor] = []
        placed: list[np.ndarray] = []
        position = first
        for batch in self._forwards(distinct):
            members = np.flatnonzero(np.isin(row_of, batch))
            rank = {row: i for i, row in enumerate(batch)}
            copies = torch.tensor([rank[row] for row in row_of[members].tolist()], device=self.device)
            logits.append(self.prefill_rows([distinct[row] for row in batch], copies, position))
            placed.append(members)
            position += len(members)
        order = np.concatenate(placed)
        result = torch.cat(logits)
        if (order == np.arange(len(order))).all():
            return result
        back = torch.from_numpy(np.argsort(order)).to(self.device)
        longest = max(len(prompt) for prompt in distinct)
        self.cache.move(torch.arange(first, position, device=self.device), first + back, longest)
        return result[back]

    def _forwards(self, prompts: list[np.ndarray]) -> Iterator[list[int]]:
        """Indices of `prompts`, shortest first, cut into forwards of at most `prefill_tokens` padded tokens."""
        batch: list[int] = []
        for row in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            if batch and (len(batch) + 1) * len(prompts[row]) > self.prefill_tokens:
                yield batch
                batch = []
            batch.append(row)
        yield batch

    def prefill_rows(self, prompts: list[np.ndarray], copies: Tensor, first: int) -> Tensor:
        """One forward over distinct prompts, expanded into slots -> logits [len(copies), V]."""
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        if self._own is not None:
            tokens = np.zeros((len(prompts), longest), np.int64)
            for row, prompt in enumerate(prompts):
                tokens[row, : len(prompt)] = prompt
            logits, held = self._own.prompts(torch.from_numpy(tokens), torch.from_numpy(lengths))
            self.cache.insert(held, first, copies, None)
            return logits.index_select(0, copies)
        ids = np.zeros((len(prompts), longest), np.int64)  # padded on the left
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
        padding = longest - lengths
        mask = np.arange(longest)[None] >= padding[:, None]
        positions = np.maximum(np.arange(longest)[None] - padding[:, None], 0)
        cache = DynamicCache(config=self.model.config)
        padded = bool(padding.any())
        output = self.model(
            input_ids=torch.from_numpy(ids).to(self.device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(self.device) if padded else None,
            position_ids=torch.from_numpy(positions).to(self.device),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        self.cache.insert(cache.layers, first, copies, torch.from_numpy(padding).to(self.device) if padded else None)
        return output.logits[:, -1][copies]

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> Tensor:
        """One step: tokens int64 [N] at positions lengths int64 [N] of slots 0..N-1 -> next logits [N, V]."""
        span = int(lengths.max()) + 1
        columns = torch.from_numpy(lengths.copy()).to(self.device)
        self.cache.begin(columns, span)
        if self._own is not None:
            return self._own.step(torch.from_numpy(tokens.copy()), columns, span, self.cache.layers)
        # 4-D masks reach the attention layers as they are; linear layers see that a state exists and take none.
        mask = (torch.arange(span, device=self.device)[None] <= columns[:, None])[:, None, None, :]
        output = self.model(
            input_ids=torch.from_numpy(tokens[:, None].copy()).to(self.device),
            attention_mask=mask,
            position_ids=columns[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self.cache},
        )
        return output.logits[:, -1]

    @torch.inference_mode()
    def move(self, to: np.ndarray, origin: np.ndarray, span: int) -> None:
        """Slot origin[i] -> slot to[i] (int64 arrays), for sequences of at most `span` positions."""
        self.cache.move(torch.from_numpy(to).to(self.device), torch.from_numpy(origin).to(self.device), span)
