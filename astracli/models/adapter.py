"""The model adapter: the only place where a model family is named. Core code asks it, and never the model's class.

An adapter is frozen data and small functions. Torch and transformers are imported inside the functions, so that
listing adapters costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from astracli.models.chat import ChatFormat
    from astracli.models.decoding import Decoding

T = TypeVar("T")
SHARD_INDEX = "model.safetensors.index.json"
"""The file of a checkpoint that says in which shard each tensor lies."""


@dataclass(frozen=True)
class WireTensor:
    """How one trained tensor travels: its HF name and its dtype *as the engine holds it*."""

    name: str
    dtype: str
    """`bfloat16` or `float32`."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Forbidden:
    """A backend that must not serve this family on some GPUs, and why."""

    backend: str
    compute_capabilities: tuple[str, ...]
    """`"8.9"` style; empty = everywhere."""
    reason: str
    refused: bool = True
    """False = only not known to work: `auto` takes another, a recipe may ask for it by name."""


@dataclass(frozen=True)
class DeltaRule:
    """A gated delta rule kernel and the head shapes that a model runs it at."""

    rule: Callable[..., Any]
    """`rule(q, k, v [B, T, H, D], g=, beta= [B, T, H], use_qk_l2norm_in_kernel=True) -> (out [B, T, H, D], state)`."""
    value_heads: int
    key_dim: int
    value_dim: int


ACTIVATION_UNITS = 80
"""Bytes a token and hidden unit of a block whose adapter says nothing: the most of the families that we know."""


@dataclass(frozen=True)
class MemoryShape:
    """What a plan needs to know of a model, read from its config alone. Bytes are derived from these."""

    parameters: int
    vocab_size: int
    hidden_size: int
    layers: int
    kv_bytes_per_token: int
    """KV cache of all full-attention layers, in bf16."""
    state_bytes_per_sequence: int
    """Recurrent and convolution state of all linear-attention layers; 0 without them."""
    flops_per_token: float
    """Training FLOPs per token (forward + backward GEMMs, no recomputation)."""
    outside_blocks: int = 0
    """Parameters in no block: embedding, output head, last norm. 0 = the embedding alone."""
    block_activations: tuple[int, ...] = ()
    """Per block, the bytes a token that autograd keeps in bf16, without recomputation and without the blocks' own
    inputs, as `prepare_gpu` leaves them. () = not known: estimated from the hidden size."""
    adapters: int = 0
    """Parameters of the LoRA adapters that a recipe asks for; 0 = all of the model's own are trained."""
    adapted: int = 0
    """Elements of the matrices with an adapter."""

    teacher: int = 0
    """Parameters of the teacher that a recipe's algorithm asks for; 0 = it has none."""

    @property
    def trained(self) -> int:
        """Parameters that the optimizer updates."""
        return self.adapters or self.parameters

    @property
    def kept_of_blocks(self) -> tuple[int, ...]:
        """`block_activations`, estimated where the adapter says nothing."""
        return self.block_activations or (ACTIVATION_UNITS * self.hidden_size,) * self.layers


@dataclass(frozen=True)
class ModelAdapter:
    name: str
    model_types: tuple[str, ...]
    """`model_type` values of config.json that this adapter claims; `()` claims nothing by itself."""
    summary: str
    load_for_training: Callable[..., Any]
    """`(path, *, attention) -> nn.Module` in fp32, text-only even from a multimodal checkpoint, in eval-independent
    (no dropout) form."""
    load_for_serving: Callable[..., Any]
    """`(path, *, attention) -> nn.Module` for an engine in plain torch; same module class as training."""
    memory_shape: Callable[[Mapping[str, Any]], MemoryShape]
    """config.json (a dict) -> MemoryShape."""
    wire_tensors: Callable[[Any], dict[str, WireTensor]]
    """model -> {training parameter name: WireTensor}. Tied and frozen tensors are absent. Strict: every other
    parameter is present."""
    engine_flags: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    """config.json -> settings that a served model of this family needs (command line names, without dashes), of an
    engine that takes any."""
    attention_mask: Callable[[Any], Any] = lambda mask: mask
    """2-D 0/1 mask of a right-padded batch -> what the model's forward gets; None where its causal form is exact for
    right-padded rows and anything else leaks or breaks."""
    position_ids: Callable[[Any], Any] | None = None
    """2-D mask -> `position_ids`, or None to let the model count."""
    install_varlen: Callable[[Any], None] | None = None
    """Make a loaded model's recurrent layers exact on packed rows: they get `cu_seqlens` (int32 [segments + 1], on the
    device), `max_seqlen` (int) and `cu_seqlens_host` (`cu_seqlens` as ints) and reset every state at a boundary;
    attention does so by itself (`kernels/varlen.py`). None = not needed; a hybrid without it trains on padded rows."""
    shares_prompts: bool = False
    """In a packed row, samples of a group can go on from its prompt: the layers also take `shared_prompts`
    (`kernels/shared_rows.py`). Attention does so by itself; recurrent layers begin with the state at the end of the
    prompt. False: a hybrid never shares, another model only when the recipe asks for it."""
    prepare_cpu: Callable[[Any], None] | None = None
    """Make a loaded model safe and quick on a CPU (for example: never pick a GPU kernel); None = nothing to do."""
    decoding: Callable[[Any], Decoding | None] | None = None
    """A loaded model -> how it decodes on a CPU in fp32, for an engine in plain torch; None for a model that it does
    not compute, or for every one: transformers' own forward decodes."""
    prepare_gpu: Callable[[Any], None] | None = None
    """Make a loaded model quick to train on a GPU (fused kernels, the same function); None = nothing to do."""
    keep_fp32: tuple[str, ...] = ()
    """Substrings of parameter names that the engine holds in fp32."""
    frozen: tuple[str, ...] = ()
    """Prefixes of checkpoint names that are never trained (vision tower, mtp head); exported untouched."""
    forbidden: tuple[Forbidden, ...] = ()
    hybrid: bool = False
    """True when some layers keep a recurrent state."""
    parity_tolerance: Mapping[str, float] = field(default_factory=lambda: {"cpu": 1e-4, "cuda": 1e-2})
    """Largest mean |trainer - engine| log-probability at staleness 0, by device; `cuda` wherever the engine computes in
    bf16."""
    known_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Hub id -> the part of its config.json that `memory_shape` reads, so that a plan can be made before a download."""
    wire_name: Callable[[str], str | None] = lambda name: name
    """Tensor name in the checkpoint's files -> its wire name; None for a tensor that is never trained."""
    text_only_config: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """config.json of the checkpoint -> config.json of an export that holds the trained text tensors only."""
    shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]] | None = None
    """config.json -> `{wire name: shape}` of every trained tensor, without a model; None = not known before loading."""
    delta_rule: Callable[[Mapping[str, Any], str], DeltaRule] | None = None
    """(config.json, device) -> the recurrent kernel that the trainer runs there; None without one."""
    lora_targets: tuple[str, ...] = ()
    """Last names of the linear layers that `lora.targets = "auto"` gives an adapter; () = every one in the blocks."""
    tiny_config: Callable[[], dict[str, Any]] | None = None
    """A config.json of a model of this family small enough for tests."""

    def asked(self, question: Callable[[Mapping[str, Any]], T], config: Mapping[str, Any], path: object) -> T:
        """What the adapter makes of the config.json of `path`. Raises UserError where a key of its family lacks."""
        from astracli.errors import UserError

        try:
            return question(config)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            said = f"{type(error).__name__}: {error}"[:200]
            raise UserError(
                f"the config.json of `{path}` is none that adapter `{self.name}` reads: {said}",
                "download the checkpoint again, or name another with `--set model.adapter=NAME`",
            ) from None

    def block_classes(self, model: Any) -> frozenset[str]:
        """Class names that FSDP wraps and checkpointing recomputes.

        `_no_split_modules` is a list on some classes, a tuple on others and a *set* on instances, and may name classes
        that this model does not hold; only those present count. Raises ValueError when none is.
        """
        declared = _as_names(getattr(model, "_no_split_modules", None))
        present = {type(module).__name__ for module in model.modules()}
        found = declared & present
        if not found:
            raise ValueError(f"none of the block classes {sorted(declared)} occurs in {type(model).__name__}")
        return frozenset(found)

    def blocks(self, model: Any) -> list[Any]:
        """The modules of `block_classes`, first to last, also where FSDP has made a class of its own out of theirs."""
        declared = _as_names(getattr(model, "_no_split_modules", None))
        return [module for module in model.modules() if declared & {kind.__name__ for kind in type(module).__mro__}]


def _as_names(value: str | Iterable[str] | None) -> frozenset[str]:
    if value is None:
        return frozenset()
    return frozenset([value]) if isinstance(value, str) else frozenset(value)


PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names of the class that reads a tokenizer.json and adds nothing of a family's own."""


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint directory, as `AutoTokenizer` gives it.

    `AutoTokenizer` imports all of transformers' model code; a process that has no model need not pay those 2 s of CPU
    when the checkpoint names the plain class. Raises UserError.
    """
    from astracli.errors import UserError
    from astracli.models import documents

    settings = documents.check_beside(path)
    try:
        if settings.get("tokenizer_class") in PLAIN_TOKENIZERS and "auto_map" not in settings:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(path))
        from transformers import AutoTokenizer

        # left out, transformers asks at the terminal whether it may run code of the files
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # whatever transformers raises of what the files say
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot load the tokenizer of `{path}`: {reason}", documents.AGAIN) from error


def chat_prompt_tokens(
    tokenizer: Any, messages: str | Sequence[Mapping[str, Any]], chat: ChatFormat | None = None
) -> list[int]:
    """Token ids of chat turns (a text is one user turn) up to where the answer begins; thinking is off by default.

    A tokenizer without a chat template gets the bare text.
    """
    from astracli.models.chat import ChatFormat

    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return (chat or ChatFormat()).tokens(tokenizer, turns)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory. Raises UserError when it is missing, no JSON object, or says what no model
    has."""
    from astracli.config import reading
    from astracli.errors import UserError
    from astracli.models import documents

    file = path / "config.json"
    try:
        document = reading.document(file)
    except FileNotFoundError:
        hint = "give a checkpoint directory or a Hub id as model.path"
        raise UserError(f"no config.json in `{path}`", hint) from None
    except ValueError as error:
        raise UserError(f"`{file}` is not JSON: {error}", "download the checkpoint again") from None
    except OSError as error:
        raise UserError(f"cannot read `{file}`: {(error.strerror or str(error)).lower()}") from None
    if not isinstance(document, dict) or "model_type" not in document:
        raise UserError(f"`{file}` has no `model_type`", "give a transformers checkpoint as model.path")
    documents.check_config(file, document)
    return document
