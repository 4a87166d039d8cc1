"""A Gated DeltaNet of Qwen3.5 over a packed row in which a group's prompt stands once.

A sample goes on from what its prompt leaves behind: the convolution from the prompt's last inputs, the delta rule from
the state at its end. Both have a gradient back into the prompt. Everything else of the layer looks at one token alone.

Shape letters: T tokens of a row, C channels of the convolution, J its taps, H heads, K and V sizes of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from astracli.kernels import shared_ends
from astracli.kernels.cpu import delta_state
from astracli.kernels.cpu.delta_rule import conv_silu
from astracli.kernels.gpu import fused
from astracli.kernels.shared_rows import SharedRow


def convolution(
    mixed: Tensor, taps_CJ: Tensor, bias_C: Tensor | None, row: SharedRow, kernel: Callable[..., Any] | None
) -> Tensor:
    """[1, T, C] -> [1, T, C] after silu.

    The whole row goes through a kernel that does not know of prompts; the first J - 1 columns of each segment that
    stands behind another are then computed anew. `kernel`: fla's, which ends at every boundary; None on a CPU, where
    the row goes through as one segment.
    """
    window = taps_CJ.shape[1] - 1
    if kernel is not None:
        out = kernel(mixed, taps_CJ, bias_C, activation="silu")[0]
    else:
        out = conv_silu(mixed.transpose(1, 2), taps_CJ, bias_C).transpose(1, 2)
    ends = shared_ends.ends(row, window, kernel is None)
    if not window or not ends.segments:
        return out
    seen = ends.inputs(mixed[0], row).float()
    weights = taps_CJ.float().unbind(1)
    anew = torch.stack([seen[:, j : j + window] * weights[j] for j in range(window + 1)]).sum(0)
    if bias_C is not None:
        anew = anew + bias_C.float()
    columns, values = ends.placed(torch.nn.functional.silu(anew).to(out.dtype))
    return out.index_copy(1, columns, values[None])


def rule_by_torch(parts: Mapping[str, Tensor], row: SharedRow) -> Tensor:
    """q, k [1, T, H, K], v [1, T, H, V], g, beta [1, T, H] -> [1, T, H, V], on any device. Segments are padded."""
    end, prompts, rest = row.prompt_end, row.padded_prompts, row.padded_rest
    sides = [parts[name][0].split([end, row.tokens - end]) for name in ("q", "k", "v", "g", "beta")]
    begun = [delta_state.rule(*batch) for batch in zip(*(prompts.pad(x[0]) for x in sides), strict=True)]
    states = torch.cat([state for _, state in begun])[_inverse(prompts.order)]
    held = begin(states, row)[list(rest.order)].split([n for n, _ in rest.shapes])
    batches = zip(*(rest.pad(x[1]) for x in sides), held, strict=True)
    went = [delta_state.rule(*batch)[0] for batch in batches]
    return torch.cat([prompts.take_back([out for out, _ in begun]), rest.take_back(went)])[None]


def rule_by_fla(parts: Mapping[str, Tensor], row: SharedRow, kernels: Any) -> Tensor:
    """The same through fla's chunked kernels, once over the prompts and once over all that is behind them."""
    end, device = row.prompt_end, row.device
    sides = zip(*(x.split([end, row.tokens - end], dim=1) for x in parts.values()), strict=True)
    prompts, rest = (dict(zip(parts, side, strict=True)) for side in sides)

    def run(side: Mapping[str, Tensor], bounds: tuple[int, ...], boundaries: Tensor, **state: Any) -> Any:
        known = fused.chunks(bounds, device)
        options = {name: value for name, value in known.items() if name in kernels.rule_options}
        return kernels.rule(**side, use_qk_l2norm_in_kernel=True, cu_seqlens=boundaries, **options, **state)

    begun, states = run(prompts, row.prompt_bounds, row.on_device["prompts"], output_final_state=True)
    went = run(rest, row.rest_bounds, row.on_device["rest"], initial_state=begin(states, row))[0]
    return torch.cat([begun, went], dim=1)


def begin(states: Tensor, row: SharedRow) -> Tensor:
    """States at the end of the prompts -> at the beginning of every segment behind them; a whole sample's is empty."""
    held, whole = row.spread(states), len(row.rest_bounds) - 1 - len(row.parents)
    return torch.cat([held, held.new_zeros(whole, *held.shape[1:])]) if whole else held


def _inverse(order: tuple[int, ...]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
