"""Decoding with Qwen3.5 on a CPU: the layers of a loaded model, in the few operations of `kernels.cpu.one_token`.

It computes with the model's own parameters, so whatever is written into them holds from the next call on. Prompts are
padded on the right: causal layers do not see padding, and with beta = 0 and g = 0 it leaves a recurrent state alone.

Shape letters: N rows of a step, B prompts, L their padded length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention, silu, softplus

from astracli.adapters.qwen3_5_layers import torch_rule
from astracli.kernels.cpu import one_token
from astracli.kernels.cpu.delta_rule import conv_silu
from astracli.kernels.cpu.one_token import Angles, Step, add_times, joined, times, unit_rms
from astracli.models.decoding import Decoding, Held, KeysValues, States

Turns = tuple[Tensor, Tensor]
"""Cosines and sines of the positions, one row a token."""


def decoding(model: Any) -> Decoding | None:
    """None for a model that it does not compute."""
    parameters = list(model.parameters())
    if model.config.hidden_act != "silu" or any(p.dtype != torch.float32 or p.is_cuda for p in parameters):
        return None
    if any(getattr(module, "bias", None) is not None for module in model.modules()):
        return None
    return _Decoding(model)


class _Decoding:
    def __init__(self, model: Any):
        base = model.model
        self._embedding, self._head, self._norm = base.embed_tokens, model.get_output_embeddings(), base.norm
        self._layers = [_Layer(layer) for layer in base.layers]
        self._angles = Angles(base.rotary_emb)

    def step(self, tokens_N: Tensor, columns_N: Tensor, span: int, slots: Sequence[Any]) -> Tensor:
        step, turns = Step(columns_N, span), self._angles.at(columns_N, span)
        x = self._embedding.weight.index_select(0, tokens_N)
        for layer, held in zip(self._layers, slots, strict=True):
            x = layer.after(x, layer.mixer.step(layer.before(x), held, step, turns))
        return times(_normalised(self._norm, x), self._head.weight)

    def prompts(self, tokens_BL: Tensor, lengths_B: Tensor) -> tuple[Tensor, list[Held]]:
        count, longest = tokens_BL.shape
        cos, sin = self._angles.at(torch.arange(longest), longest)
        turns = cos.repeat(count, 1), sin.repeat(count, 1)
        x, held = self._embedding.weight.index_select(0, tokens_BL.flatten()), []
        for layer in self._layers:
            mixed, left = layer.mixer.prompts(layer.before(x), lengths_B, longest, turns)
            x = layer.after(x, mixed)
            held.append(left)
        last = x.index_select(0, torch.arange(0, count * longest, longest) + (lengths_B - 1))
        return times(_normalised(self._norm, last), self._head.weight), held


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """The weights of these norms are centred at zero."""
    unit = unit_rms(x, norm.eps)
    return unit.addcmul_(unit, norm.weight)


class _Layer:
    def __init__(self, layer: Any):
        recurrent = hasattr(layer, "linear_attn")
        self.mixer: _DeltaNet | _Attention = _DeltaNet(layer.linear_attn) if recurrent else _Attention(layer.self_attn)
        self._out = layer.linear_attn.out_proj if recurrent else layer.self_attn.o_proj
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._gate_up = joined([layer.mlp.gate_proj, layer.mlp.up_proj])
        self._down = layer.mlp.down_proj

    def before(self, x: Tensor) -> Tensor:
        """What the mixer gets."""
        return _normalised(self._norms[0], x)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output, from its input (which is changed) and what the mixer made."""
        x = add_times(x, mixed, self._out.weight)
        gate, up = times(_normalised(self._norms[1], x), self._gate_up).chunk(2, dim=-1)
        return add_times(x, silu(gate).mul_(up), self._down.weight)


class _DeltaNet:
    def __init__(self, module: Any):
        self._module = module
        parts = [module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a]
        self._weight = joined(parts)
        self._sizes = [part.weight.shape[0] for part in parts]
        self._rule = torch_rule()

    def step(self, x: Tensor, held: Any, step: Step, turns: Turns) -> Tensor:
        module, rows = self._module, len(x)
        window, state = (array[:rows] for array in held.arrays)
        mixed, gate, g, beta = self._parts(x)
        mixed = one_token.convolution(mixed, window, module.conv1d.weight.squeeze(1))
        query_key, value = mixed.split([2 * module.key_dim, module.value_dim], dim=-1)
        query_key = query_key.view(rows, 2, -1, module.head_k_dim)
        value = value.view(rows, -1, module.head_v_dim)
        return self._gated(one_token.delta_rule(query_key, value, g.exp_(), beta, state), gate)

    def prompts(self, x: Tensor, lengths_B: Tensor, longest: int, turns: Turns) -> tuple[Tensor, Held]:
        module, count = self._module, len(lengths_B)
        mixed, gate, g, beta = (part.view(count, longest, -1) for part in self._parts(x))
        there = (torch.arange(longest) < lengths_B[:, None])[..., None]
        g, beta = g * there, beta * there
        taps = module.conv1d.weight.squeeze(1)
        places = lengths_B[:, None, None] + torch.arange(
            taps.shape[1]
        )  # in a row with so many columns of zeros before it
        padded = pad(mixed.transpose(1, 2), (taps.shape[1], 0))
        window = padded.gather(2, places.expand(-1, padded.shape[1], -1))
        mixed = conv_silu(mixed.transpose(1, 2), taps, None).transpose(1, 2)
        query, key, value = mixed.split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
        query, key = (x.reshape(count, longest, -1, module.head_k_dim) for x in (query, key))
        if (times_ := module.num_v_heads // module.num_k_heads) > 1:
            query, key = (x.repeat_interleave(times_, dim=2) for x in (query, key))
        value = value.reshape(count, longest, -1, module.head_v_dim)
        options = {"use_qk_l2norm_in_kernel": True, "initial_state": None, "output_final_state": True}
        out, state = self._rule(query, key, value, g=g, beta=beta, **options)
        return self._gated(out.reshape(count * longest, -1, module.head_v_dim), gate), States(window, state)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input of the convolution, gate, g and beta, of each token."""
        module = self._module
        mixed, gate, b, a = times(x, self._weight).split(self._sizes, dim=-1)
        return mixed, gate, softplus(a + module.dt_bias).mul_(module.A_log.exp().neg_()), b.sigmoid()

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        """[tokens, H, V] -> [tokens, H * V]"""
        unit = unit_rms(out, self._module.layer_norm_epsilon).mul_(self._module.norm.weight)
        return unit.mul_(silu(gate).reshape(unit.shape)).reshape(len(unit), -1)


class _Attention:
    def __init__(self, module: Any):
        self._module = module
        parts = [module.q_proj, module.k_proj, module.v_proj]
        self._weight = joined(parts)
        self._sizes = [part.weight.shape[0] for part in parts]

    def step(self, x: Tensor, held: Any, step: Step, turns: Turns) -> Tensor:
        query, key, value, gate = self._parts(x, turns)
        out = one_token.attention(query, key, value, held.keys, held.values, step, self._module.scaling)
        return out.mul_(gate).view(len(x), -1)

    def prompts(self, x: Tensor, lengths_B: Tensor, longest: int, turns: Turns) -> tuple[Tensor, Held]:
        *parts, gate = self._parts(x, turns)
        query, key, value = (part.unflatten(0, (-1, longest)).transpose(1, 2) for part in parts)
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self._module.scaling, enable_gqa=grouped
        )
        return (out.transpose(1, 2).flatten(0, 1) * gate).view(len(x), -1), KeysValues(key, value)

    def _parts(self, x: Tensor, turns: Turns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query [tokens, H, D], key and value [tokens, G, D], what the output is multiplied with [tokens, H, D]."""
        module, rows, size = self._module, len(x), self._module.head_dim
        both, key, value = times(x, self._weight).split(self._sizes, dim=-1)
        query, gate = both.view(rows, -1, 2 * size).chunk(2, dim=-1)  # each head has its query and then its gate
        query = one_token.rotate(_normalised(module.q_norm, query), *turns)
        key = one_token.rotate(_normalised(module.k_norm, key.view(rows, -1, size)), *turns)
        return query, key, value.view(rows, -1, size), gate.sigmoid()
