"""Malformed inputs from a seeded generator: recipes, --set, rows, benchmark files, models, checkpoints of a run.

Each is a good one with something wrong in it: bytes, a cut, lines in other places, a value that is odd. Either it is
taken, or it is refused as input is: exit 2, one message that is short and printable, in bounded time. Nothing is
started; each runs in this process, as a command does before it starts anything.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from astracli.cli import main
from astracli.cli.output import Output
from astracli.config import recipe_io
from astracli.data.fetch import BUNDLED_PREFIX, bundled
from astracli.errors import UserError
from astracli.launch.inputs import fetched
from astracli.models.adapter import SHARD_INDEX
from astracli.models.adapter_tools import checkpoint_tensors
from faults.world import Row

RECIPE = "qwen3.5-tiny-m2po-delta"
SHARD = "model.safetensors"
LIMIT_S, LIMIT_MIB = 20.0, 1024
"""CPU time of an input, and memory that it may add."""
LONGEST = 6000
"""Characters of a message."""
ODD = (
    "-1", "0", "1e308", "-0.0", "nan", "inf", "9" * 400, "0x" + "f" * 300, "true", "null", "''", '"\\u0000"', "[]",
    "{}", "[" * 300, '"' + "a" * 5000 + '"', '"\\u001b[2J"', '"../../../etc/passwd"', '"\U0001f600"', "1979-05-27",
    '["a", 1, {}]', "{a = 1}", '"-"', "18446744073709551616", '"math:"', '":"', '"."', '"/dev/null"',
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 10**9, 10**12, 2**63, 10**400, -(10**9), 0.5, -0.5, 1e308, 1e-320, math.nan,
    math.inf, "", "x", "x" * 100_000, "\x1b[2J\x07", "../../etc/passwd", "/dev/zero", "\ud800", [], {}, [[]], [{}],
    {"": None}, [None] * 9, [0] * 100_000, ["a", 1, {}], {"a": {"a": {"a": []}}}, json.loads("[" * 200 + "]" * 200),
)  # fmt: skip
"""Of a JSON document."""
EXTRA: dict[str, tuple[Any, ...]] = {
    "text_config": ([], [{}], "qwen", {}), "architectures": ([], None, [1], "x", [None]), "vocab_size": (10**12,),
    "num_hidden_layers": (10**9, 4000),
    "rope_parameters": ([], {"rope_type": "none"}, {"rope_type": [], "factor": "x"}),
    "rope_scaling": ({"type": "yarn", "factor": math.nan}, {"rope_type": "dynamic", "factor": 0}, "linear"),
    "layer_types": (["full_attention"] * 4001, ["x"], {}), "quantization_config": ([], 1, {"quant_method": []}),
    "sliding_window": ("x", -1), "tie_word_embeddings": ("no", []), "model_type": ([], {}, 1, "nobody"),
    "dtype": ("float1", 7, []), "auto_map": ({"AutoConfig": "evil.Config"},), "head_dim": (0, 10**9),
    "eos_token_id": ([], "x", -5, 10**12, [None]), "bos_token": ([], {"content": 5}, 7), "eos_token": ({}, [1]),
    "chat_template": (7, [], {}, "{{", "{% for i in x %}", [{"name": "default"}]),
    "tokenizer_class": ([], "Nobody", "../x"),
    "added_tokens_decoder": ([], {"x": 1}, {"5": {}}), "data_offsets": ([0], [0, 10**18]), "shape": ([-1], [10**9] * 9),
    "weight_map": ([], {"a": 1}, {"a": "../../etc/passwd"}, {"a": "\x00"}), "model_max_length": ("x", -1, math.nan),
    "logits_scaling": ("x", 0, math.nan), "num_experts": (10**9, "x"), "transformers_version": ([],),
}  # fmt: skip
"""Keys that a document may not have, or not on that level."""


def mangled(data: bytes, draw: Random) -> bytes:
    """One to three things wrong."""
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(data) + 1)
        lines = data.split(b"\n")
        kind = draw.randrange(8)
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data = data[:place] + draw.randbytes(draw.randint(1, 8)) + data[place:]
        elif kind == 2:
            data = data[:place] + data[place + draw.randint(1, 30) :]
        elif kind == 3:
            draw.shuffle(lines)
            data = b"\n".join(lines)
        elif kind == 4:
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
            data = b"\n".join(lines)
        elif kind == 5:
            data = draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\x1b[31m")) + data
        else:
            data = _odd_value(data, draw)
    return data


def _odd_value(data: bytes, draw: Random) -> bytes:
    """Something else behind a `=` or `:`."""
    places = [i for i, byte in enumerate(data) if byte in b"=:"]
    if not places:
        return data
    start = draw.choice(places) + 1
    ends = [i for i in (data.find(mark, start) for mark in (b"\n", b",", b"}")) if i >= 0]
    return data[:start] + b" " + draw.choice(ODD).encode() + data[min(ends, default=len(data)) :]


# ---- the inputs; each returns what it did and runs it


@dataclass
class Tried:
    what: str
    run: Callable[[], int]
    """The exit code; a UserError is one of 2."""


def command(*words: str) -> Callable[[], int]:
    return lambda: main.run(list(words))


def prepared(**changes: object) -> Callable[[], int]:
    """As a start looks at its inputs."""

    def run() -> int:
        sets = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        recipe = recipe_io.load(RECIPE, sets)
        fetched(recipe, data=True, benchmarks=recipe.eval.benchmarks)
        return 0

    return run


def recipe(folder: Path, draw: Random) -> Tried:
    file = folder / "recipe.toml"
    file.write_bytes(mangled(recipe_io.source_text(RECIPE).encode(), draw))
    return Tried("recipe", command("recipes", "check", str(file)))


def setting(folder: Path, draw: Random) -> Tried:
    document = json.loads(recipe_io.to_json(recipe_io.load(RECIPE, [])))
    tables = [key for key, value in document.items() if isinstance(value, dict)]
    table = draw.choice(tables)
    key = f"{table}.{draw.choice(list(document[table]) or ['x'])}" if draw.random() < 0.9 else draw.choice(ODD)
    value = draw.choice(ODD)
    return Tried(f"--set {key[:40]}={value[:30]}", command("recipes", "check", RECIPE, "--set", f"{key}={value}"))


def _rows(draw: Random) -> tuple[str, bytes]:
    """(suffix, a good file of problems)"""
    rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    suffix = draw.choice((".jsonl", ".json", ".csv"))
    if suffix == ".csv":
        return suffix, b"problem,answer\n" + b"".join(f"{r['problem']},{r['answer']}\n".encode() for r in rows)
    text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    return suffix, text.encode()


def rows(folder: Path, draw: Random) -> Tried:
    suffix, data = _rows(draw)
    (file := folder / f"rows{suffix}").write_bytes(mangled(data, draw))
    return Tried(f"rows {suffix}", prepared(data__source=str(file)))


def benchmark(folder: Path, draw: Random) -> Tried:
    suffix, data = _rows(draw)
    (file := folder / f"bench{suffix}").write_bytes(mangled(data, draw))
    return Tried(f"benchmark {suffix}", prepared(eval__benchmarks=[str(file)]))


def model(folder: Path, draw: Random) -> Tried:
    place = folder / "model"
    shutil.copytree(bundled(f"{BUNDLED_PREFIX}tiny"), place, copy_function=_link)
    file = draw.choice([file for file in sorted(place.iterdir()) if file.is_file()])
    data = file.read_bytes()
    file.unlink()
    head = min(len(data), 20_000)  # of a shard, its header
    file.write_bytes(mangled(data[:head], draw) + data[head:])
    return Tried(f"model {file.name}", prepared(model__path=str(place)))


def document(folder: Path, draw: Random) -> Tried:
    """One of a checkpoint's JSON files: still JSON, of another structure."""
    place = folder / "model"
    shutil.copytree(bundled(f"{BUNDLED_PREFIX}tiny"), place, copy_function=_link)
    beside = (SHARD, SHARD_INDEX, "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    name = draw.choice(("config.json",) * 3 + beside)
    file, rest = place / name, b""
    if name == SHARD_INDEX:
        found = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(checkpoint_tensors(place), SHARD)}
    elif name == SHARD:
        data = file.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        found, rest = json.loads(data[8:size]), data[size:]
    else:
        found = json.loads(file.read_bytes())
    text = json.dumps(restructured(found, draw)).encode()
    file.unlink(missing_ok=True)
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest if name == SHARD else text)
    words = draw.choices(
        (("train", "--dry-run"), ("eval", "--dry-run"), ("recipes", "check"), ("doctor",), ()), (6, 6, 4, 1, 6)
    )[0]
    sets = ("--set", f"model.path={place}")
    what = f"document {name} {' '.join(words)}"
    return Tried(what, command(*words, RECIPE, *sets) if words else prepared(model__path=str(place)))


def restructured(found: Any, draw: Random) -> Any:
    """One to three values of a JSON document become something else, wherever they stand."""
    for _ in range(draw.randint(1, 3)):
        places: list[tuple[Any, Any]] = list(_places(found))
        if not places or draw.random() < 0.02:
            return copy.deepcopy(draw.choice(VALUES))
        holder, key = draw.choice(places)
        value, kind = holder[key], draw.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = draw.choice(([value], {"x": value}, {str(value)[:20]: value}, [value] * 5000, str(value)))
        elif kind == 2 and isinstance(holder, dict):
            extra = draw.choice(list(EXTRA))
            holder[extra] = copy.deepcopy(draw.choice((*EXTRA[extra], *VALUES)))
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    return found


def _places(found: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key or index) of every value; of a long list the first few."""
    if isinstance(found, dict | list):
        for key in list(found) if isinstance(found, dict) else range(min(len(found), 4)):
            yield found, key
            yield from _places(found[key])


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(Path(source).resolve())


def checkpoint(folder: Path, draw: Random) -> Tried:
    """The small files of a run's directory."""
    from astracli.training import checkpoint as checkpoints

    run = folder / "run"
    place = checkpoints.place(run / "checkpoints", 2)
    place.mkdir(parents=True)
    (run / "recipe.json").write_text(recipe_io.to_json(recipe_io.load(RECIPE, [])))
    (run / "plan.json").write_text("{}")
    (place / "rank_0.bin").write_bytes(draw.randbytes(1000))
    (place / checkpoints.META).write_text(json.dumps({"format": checkpoints.FORMAT, "step": 2, "names": []}))
    files = {f.name: (f.stat().st_size, checkpoints.digest_of(f)) for f in place.iterdir()}
    (place / checkpoints.COMPLETE).write_text(json.dumps({"files": files}))
    file = draw.choice([run / "recipe.json", place / checkpoints.META, place / checkpoints.COMPLETE])
    file.write_bytes(mangled(file.read_bytes(), draw))
    words = draw.choice((("train", "--dry-run", "--resume", str(run)), ("runs", "status", str(run)),
                         ("runs", "export", str(run), "--out", str(folder / "out"))))  # fmt: skip
    return Tried(f"{' '.join(words[:2])}, {file.name}", command(*words))


def named(folder: Path, draw: Random) -> Tried:
    """Names and texts that would command a terminal, wherever a message shows them."""
    evil = "".join(draw.choices(("\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\u202e", "\r", "=1+1|A1"), k=3))
    place = folder / "model"
    shutil.copytree(bundled(f"{BUNDLED_PREFIX}tiny"), place, copy_function=_link)
    what = draw.choice(
        ("shard", "template", "folder", "run", "rollout.env", "data.reward", "launch.hosts", "benchmark")
    )
    dry = ("train", RECIPE, "--dry-run", "--set")
    if what == "run":
        (folder / f"run{evil}").mkdir()
        (folder / f"run{evil}" / "recipe.json").write_text("{}")
        return Tried("named run", command("runs", draw.choice(("list", "clean")), "--root", str(folder)))
    if what == "benchmark":
        (file := folder / f"{evil}.jsonl").write_text('{"problem": "1+1"}\n')
        return Tried("named benchmark", command(*dry, f"eval.benchmarks={json.dumps([str(file)])}"))
    if what in ("rollout.env", "data.reward", "launch.hosts"):
        value = json.dumps([evil, "b"] if what == "launch.hosts" else f"{evil}x:y")
        return Tried(f"named {what}", command(*dry, f"{what}={value}", "--set", 'launch.network="private"'))
    if what == "shard":
        (place / f"{evil}.safetensors").write_text("x")
    elif what == "template":
        (place / "chat_template.jinja").unlink()
        (place / "chat_template.jinja").write_text(f"{evil}{{{{ raise_exception({json.dumps(evil)}) }}}}")
    else:
        place = place.rename(folder / f"model{evil}")
        (place / "config.json").unlink()
    return Tried(f"named {what}", command(*dry, f"model.path={json.dumps(str(place))}"))


KINDS = (recipe, setting, rows, benchmark, model, document, checkpoint, document, named)


def tried(folder: Path, seed: int, count: int) -> list[Row]:
    """`count` inputs, the kinds in turn; each from a seed of its own, so that one can be repeated alone."""
    found = []
    for number in range(count):
        draw = Random(f"{seed}/{number}")
        place = folder / str(number)
        place.mkdir(parents=True)
        found.append(_look(KINDS[number % len(KINDS)](place, draw), f"{seed}/{number}"))
        shutil.rmtree(place)
    return found


def _look(each: Tried, name: str) -> Row:
    row = Row("malformed", f"{name}: {each.what}")
    out, err = io.StringIO(), io.StringIO()
    began, memory = time.process_time(), _memory()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = each.run()
        except UserError as error:
            code = 2
            Output().error(error.message, error.hint)
        except Exception as error:  # what a command would call unexpected
            code = 1
            print(f"unexpected {type(error).__name__}: {error}", file=err)
    row.seconds = time.process_time() - began
    said = err.getvalue()
    row.said = said.partition("\n")[0]
    row.outcome = {0: "taken", 2: "refused"}.get(code, f"exit {code}")
    failed = code == 1 and (said.startswith("error: ") or each.what.endswith("doctor"))  # an export; a failed check
    if code not in (0, 2) and not failed:
        row.problems.append(f"exit {code}: {said[-300:]}")
    if "unexpected" in said or "Traceback" in said:
        row.problems.append(said[-600:])
    if any(sign not in "\n\t" and not sign.isprintable() for sign in said + out.getvalue()):
        row.problems.append("it prints control characters")
    more = _memory() - memory
    if len(said) > LONGEST or row.seconds > LIMIT_S or more > LIMIT_MIB:
        row.problems.append(f"{len(said)} characters, {row.seconds:.1f} s of CPU, {more} MiB")
    return row


def _memory() -> int:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def summed(rows: list[Row]) -> list[Row]:
    """A row for each kind of input and end, and each row that has a problem."""
    kinds: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row.where.split(": ")[1].split(" ")[0], row.outcome)
        kinds[key] = kinds.get(key, 0) + 1
    sums = [Row("malformed", f"{kind}: {count}", outcome) for (kind, outcome), count in sorted(kinds.items())]
    return [*sums, *(row for row in rows if row.problems)]
