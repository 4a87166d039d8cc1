"""The slot cache: KV, convolution and recurrent states of many sequences of different lengths, decoded together.

Every layer keeps one array with a row per slot. The sequences that run occupy the first `active` rows, so a step works
on narrow views and copies nothing. Column j of a KV row is position j of that sequence; what lies behind a row's
length is left over from earlier sequences, and the attention mask hides it.

Shape letters: S slots, N active rows, H heads, L columns, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from astracli.errors import UserError
from astracli.models.decoding import KeysValues, States

_FIRST_COLUMNS = 64
"""Columns that a KV layer starts with; it doubles when a sequence outgrows it."""


class _DecodeStep:
    """Where the layers read and write in this decode step; one object shared by all of them."""

    rows: Tensor
    """int64 [N]: 0..N-1"""
    columns: Tensor
    """int64 [N]: the position that each row writes"""
    span: int
    """columns that the longest row uses, the new one included"""


class KVSlots(CacheLayerMixin):
    """Keys and values of one full-attention layer, [S, H, L, D]."""

    def __init__(self, slots: int, step: _DecodeStep, window: int | None = None):
        """`window`: of a layer with a sliding window, which no row outgrows; within it the layer sees all of a row."""
        super().__init__()
        self.slots = slots
        self.step = step
        self._window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = _slot_array(key_states, self.slots, columns=_FIRST_COLUMNS)
        self.values = _slot_array(value_states, self.slots, columns=_FIRST_COLUMNS)
        self.is_initialized = True

    def reserve(self, columns: int) -> None:
        """Have room for `columns` positions a row."""
        assert self.keys is not None and self.values is not None
        have = self.keys.shape[2]
        if columns > have:
            grown = max(columns, 2 * have)
            self.keys = _slot_array(self.keys, self.slots, columns=grown, keep=True)
            self.values = _slot_array(self.values, self.slots, columns=grown, keep=True)

    def begin(self) -> None:
        """Make room for this step's new positions."""
        if self._window is not None and self.step.span > self._window:
            raise UserError(
                f"a row of {self.step.span} tokens in a layer that sees the last {self._window}: the embedded engine "
                "decodes full attention",
                f"lower rollout.context_length to {self._window}",
            )
        self.reserve(self.step.span)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one new position per row ([N, H, 1, D]) and return the rows' views [N, H, span, D]."""
        assert self.keys is not None and self.values is not None
        rows, columns = self.step.rows, self.step.columns
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        active = len(rows)
        return self.keys[:active, :, : self.step.span], self.values[:active, :, : self.step.span]

    def insert(self, source: Any, first: int, copies: Tensor, padding: Tensor | None) -> None:
        """Take prefilled rows: slot first + i gets source row copies[i], moved left by that row's padding."""
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        length = source.keys.shape[2]
        self.reserve(length)
        assert self.keys is not None and self.values is not None
        for array, new in ((self.keys, source.keys), (self.values, source.values)):
            if padding is not None:
                index = (torch.arange(length, device=new.device)[None] + padding[:, None]).clamp_(max=length - 1)
                new = new.gather(2, index[:, None, :, None].expand_as(new))
            array[first : first + len(copies), :, :length] = new[copies]

    def move(self, to: Tensor, origin: Tensor, span: int) -> None:
        """Row origin[i] -> row to[i], the first `span` columns."""
        assert self.keys is not None and self.values is not None
        for array in (self.keys, self.values):
            array[to, :, :span] = array[origin, :, :span]

    def get_seq_length(self) -> int:
        return self.step.span - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.step.span, 0

    def get_max_length(self) -> int:
        """No limit: rows grow."""
        return -1

    get_max_cache_shape = get_max_length


class StateSlots(LinearAttentionCacheLayerMixin):
    """Convolution and recurrent state of one linear-attention layer, each [S, ...].

    `conv_states` and `recurrent_states` are what the model sees: views of the active rows. Newer transformers keep
    several states a layer, in dicts by number; ours is number 0 there.
    """

    def __init__(self, slots: int, step: _DecodeStep):
        super().__init__()
        self.slots = slots
        self.step = step
        self.arrays: tuple[Tensor, Tensor] | None = None
        self.conv_states: Any
        self.recurrent_states: Any
        self._numbered = isinstance(self.conv_states, dict)
        initialized: Any = {0: True} if self._numbered else True
        self.has_previous_state = initialized
        self.is_conv_states_initialized = self.is_recurrent_states_initialized = initialized

    def lazy_initialization(self, conv_states: Any = None, recurrent_states: Any = None, state_idx: int = 0) -> None:
        # a window's columns are contiguous: a step reads and moves whole columns
        window = _slot_array(conv_states.transpose(1, 2), self.slots).transpose(1, 2)
        self.arrays = (window, _slot_array(recurrent_states, self.slots))

    def begin(self) -> None:
        """Show the model this step's rows."""
        assert self.arrays is not None
        active = len(self.step.rows)
        conv, recurrent = (array[:active] for array in self.arrays)
        self.conv_states, self.recurrent_states = ({0: conv}, {0: recurrent}) if self._numbered else (conv, recurrent)

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Decoding shifts the state in place and never comes here."""
        raise AssertionError("a slot cache takes one token a step")

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """[N, H, K, V]; a kernel that already worked in place hands the view itself back."""
        view = _only(self.recurrent_states)
        if recurrent_states is not view:
            view.copy_(recurrent_states)
        return view

    def insert(self, source: Any, first: int, copies: Tensor, padding: Tensor | None) -> None:
        """Take prefilled rows: slot first + i gets source row copies[i]. A state has no positions, so no padding."""
        states = (_only(source.conv_states), _only(source.recurrent_states))
        if self.arrays is None:
            self.lazy_initialization(*states)
        assert self.arrays is not None
        for array, new in zip(self.arrays, states, strict=True):
            array[first : first + len(copies)] = new[copies]

    def move(self, to: Tensor, origin: Tensor, span: int) -> None:
        """Row origin[i] -> row to[i]."""
        assert self.arrays is not None
        for array in self.arrays:
            array[to] = array[origin]


class SlotCache(Cache):
    """All layers' slots. What kind of state a layer keeps is read off the first prefilled cache."""

    def __init__(self, slots: int):
        super().__init__(layers=[])
        self.slots = slots
        self.step = _DecodeStep()
        self._slot_layers: list[KVSlots | StateSlots] = []

    def insert(self, source: Sequence[Any], first: int, copies: Tensor, padding: Tensor | None) -> None:
        """Copy prefilled sequences into slots `first`, `first` + 1, ...

        source: of each layer, what transformers' cache keeps, or `Held`.
        copies: int64 [M], which row of `source` each new slot gets (a prompt that occurs twice was computed once).
        padding: int64 [rows of source], left padding to strip; None when no row has any.
        """
        if not self._slot_layers:
            self._slot_layers = [_slots_like(layer, self.slots, self.step) for layer in source]
            self.layers = list(self._slot_layers)
        for layer, new in zip(self._slot_layers, source, strict=True):
            layer.insert(new, first, copies, padding)

    def begin(self, columns: Tensor, span: int) -> None:
        """Set up a decode step: row i writes position columns[i]; no row is longer than `span` afterwards."""
        self.step.rows = torch.arange(len(columns), device=columns.device)
        self.step.columns = columns
        self.step.span = span
        for layer in self._slot_layers:
            layer.begin()

    def move(self, to: Tensor, origin: Tensor, span: int) -> None:
        """Fill holes: row origin[i] -> row to[i], for sequences of at most `span` positions."""
        for layer in self._slot_layers:
            layer.move(to, origin, span)

    def clear(self) -> None:
        """Forget everything, shapes included. Only with nothing running."""
        self._slot_layers, self.layers = [], []

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """True: decoding always continues a state. (The base class raises for a model without linear layers.)"""
        return True


def _slots_like(layer: Any, slots: int, step: _DecodeStep) -> KVSlots | StateSlots:
    if type(layer) in (LinearAttentionLayer, States):
        return StateSlots(slots, step)
    if type(layer) in (DynamicLayer, KeysValues):
        return KVSlots(slots, step)
    if type(layer) is DynamicSlidingWindowLayer:
        return KVSlots(slots, step, layer.sliding_window)
    raise UserError(
        f"the embedded engine cannot decode a model with a `{type(layer).__name__}` cache",
        'it knows full attention and linear attention; use `rollout.engine = "sglang"` for this model',
    )


def _only(states: Any) -> Tensor:
    """The state of a layer that keeps one. Raises UserError for a layer with several."""
    if not isinstance(states, dict):
        return states
    if len(states) != 1:
        raise UserError(f"the embedded engine cannot decode layers with {len(states)} recurrent states")
    return states[0]


def _slot_array(like: Tensor, slots: int, *, columns: int | None = None, keep: bool = False) -> Tensor:
    """Zeros [S, ...] shaped like `like` [rows, ...] past the first dimension; `columns` replaces dimension 2."""
    shape = [slots, *like.shape[1:]]
    if columns is not None:
        shape[2] = max(columns, like.shape[2])
    # Zeros, not empty: a NaN behind a row's length would survive the mask (0 x NaN).
    array = torch.zeros(shape, dtype=like.dtype, device=like.device)
    if keep:
        array[:, :, : like.shape[2]] = like
    return array
