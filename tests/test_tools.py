"""Tools: what a model is told of a function, how it calls it, and calls that hang, crash or leave processes behind."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import tool_functions
from chat_models import tokenizer

from astracli.config.recipe_env import EnvTable
from astracli.envs.tools import formats, functions
from astracli.envs.tools.calls import Result, ToolCalls
from astracli.envs.tools.formats import FORMATS, Call, Malformed
from astracli.errors import UserError
from astracli.models.chat import ChatFormat

# ---- functions -------------------------------------------------------------------------------------------------------


def test_what_a_model_is_told_of_a_function() -> None:
    told = functions.of_function(tool_functions.weather).schema
    assert told == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Looks up the weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "where, in words"},
                    "days": {"type": "integer", "description": "how many", "default": 1},
                    "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                    "tags": {
                        "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                        "default": None,
                    },
                },
                "required": ["city"],
            },
        },
    }


def test_arguments_are_checked_in_words_for_the_model() -> None:
    tool = functions.of_function(tool_functions.weather)
    assert tool.checked({"city": "Oslo", "days": 2}) == {"city": "Oslo", "days": 2}
    written = {"city": "7", "days": "3", "tags": '["a"]'}
    assert tool.checked(written, written=True) == {"city": "7", "days": 3, "tags": ["a"]}, "text stays text"
    for given, words in {
        '{"days": 1}': "`city`: Field required",
        '{"city": "a", "days": "two"}': "`days`: Input should be a valid integer",
        '{"city": "a", "town": "b"}': "`town`: Extra inputs are not permitted",
    }.items():
        with pytest.raises(functions.BadCall) as bad:
            tool.checked(json.loads(given))
        assert words in str(bad.value) and str(bad.value).endswith("(weather takes: city, days, unit, tags)")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("calculater", "there is no tool `calculater`"),
        ("no_such_module:f", "importing `no_such_module` failed"),
        ("tool_functions:calls", "is a int, not a function"),
        ("tool_functions:untyped", "its parameter `a` has no type"),
        ("tool_functions:silent", "has no docstring"),
        ("tool_functions:many", "its parameter `numbers` cannot be given by name"),
    ],
)
def test_a_function_that_says_too_little_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        functions.loaded([name])
    assert refused.value.hint
    with pytest.raises(UserError, match="two tools called `python`"):
        functions.loaded(["python", "python"])


# ---- formats ---------------------------------------------------------------------------------------------------------

BAD_JSON = "the call is no JSON: "
HERMES = {
    'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>': [Call("f", {"a": [1]})],
    '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g"}</tool_call>': [Call("f"), Call("g")],
    '<think><tool_call>{"name": "f"}</tool_call></think>no': [],
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>': [BAD_JSON],
    '<tool_call>\n{"name": "f"}': ["`<tool_call>` is not closed by `</tool_call>`"],
    '<tool_call>{"tool": "f"}</tool_call>': ['a call is {"name": ..., "arguments": {...}}'],
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>': ["`arguments` is no JSON object"],
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>': [Call("f", {"a": 1})],
    "The answer is 4.": [],
}
GIVEN = "<parameter=a>\n1\n2\n</parameter>\n<parameter=b>\n{}\n</parameter>\n"
XML = {
    f"<tool_call>\n<function=f>\n{GIVEN}</function>\n</tool_call>": [Call("f", {"a": "1\n2", "b": "{}"}, written=True)],
    "<tool_call>\n<function=f>\n</function>\n</tool_call>": [Call("f", {}, written=True)],
    "<tool_call>\nf(1)\n</tool_call>": ["a call is `<function=NAME>`, parameters, `</function>`"],
    "<tool_call><function=f><parameter=a>1</function></tool_call>": [
        "a parameter is `<parameter=KEY>`, its value, `</parameter>`"
    ],
    "<function=f></function>": [],
}
LLAMA = {
    '{"name": "f", "parameters": {"a": 1}}': [Call("f", {"a": 1})],
    '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}': [
        Call("f", {"a": 1}),
        Call("g"),
    ],
    '{"name": "f", "parameters": {"a": 1}': [BAD_JSON],
    '{"answer": 4}': [],
    'I would call {"name": "f", "parameters": {}}': [],
    '{"name": "f", "parameters": 3}': ["`parameters` is no JSON object"],
}
CODE = {
    "So:\n```python\nprint(1)\n```\nand\n```py\n2\n```": [
        Call("python", {"code": "print(1)\n"}),
        Call("python", {"code": "2\n"}),
    ],
    "```\nno language\n```": [],
    "```python\nprint(1)\n": ["the block of Python is not closed by a line of three backticks"],
}


@pytest.mark.parametrize(
    ("name", "cases"), [("hermes", HERMES), ("qwen_xml", XML), ("llama_json", LLAMA), ("code", CODE)]
)
def test_calls_and_what_was_meant_as_one(name: Any, cases: dict[str, list[Any]]) -> None:
    for text, wanted in cases.items():
        found = FORMATS[name].parse(text)
        assert len(found) == len(wanted), text
        for one, other in zip(found, wanted, strict=True):
            if isinstance(other, str):
                assert isinstance(one, Malformed) and one.reason.startswith(other), text
            else:
                assert one == other, text


def test_the_format_is_the_one_in_which_the_template_writes_calls() -> None:
    for name, wanted in {"qwen3_5": "qwen_xml", "qwen2_5": "hermes", "llama3": "llama_json"}.items():
        assert formats.of_template(tokenizer(name), ChatFormat()) == wanted
    with pytest.raises(UserError, match="auto: the model's chat template writes no calls"):
        formats.of_template(tokenizer("smollm"), ChatFormat())


# ---- calls -----------------------------------------------------------------------------------------------------------

HERE = "tool_functions"


@pytest.fixture
def calls() -> Iterator[ToolCalls]:
    names = ["slow", "sleeps", "counts", "raises", "weather"]
    table = EnvTable(tool_timeout_s=1.5, tool_concurrency=6, tool_memory_gib=0.5, tool_processes=5)
    made = ToolCalls([*functions.BUILT_IN.values(), *(f"{HERE}:{name}" for name in names)], table)
    yield made
    made.close()


def below(calls: ToolCalls) -> list[psutil.Process]:
    (host,) = psutil.Process(calls.pid).children()
    return host.children(recursive=True)


def test_functions_answer_and_what_they_raise_is_an_answer(calls: ToolCalls) -> None:
    async def scenario() -> None:
        given = {"city": "Oslo", "tags": ["a"]}
        result = await calls.call(f"{HERE}:weather", given)
        assert json.loads(result.text) == {"city": "Oslo", "days": 1, "unit": "C", "tags": ["a"]}
        assert await calls.call(f"{HERE}:raises", {"words": "x"}) == Result("LookupError: x", failed=True)
        began = time.monotonic()
        waited = await asyncio.gather(*(calls.call(f"{HERE}:slow", {"seconds": 0.5}) for _ in range(6)))
        assert {each.text for each in waited} == {"waited"} and time.monotonic() - began < 6 * 0.5
        assert [(await calls.call(f"{HERE}:counts", {})).text for _ in range(2)] == ["1", "2"], "a process serves on"

    asyncio.run(scenario())


def test_a_call_that_hangs_is_ended_with_all_that_it_started(calls: ToolCalls) -> None:
    async def scenario() -> None:
        hung, other = await asyncio.gather(
            calls.call(f"{HERE}:sleeps", {"seconds": 60}), calls.call(f"{HERE}:slow", {"seconds": 0.1})
        )
        assert hung == Result("it was ended: it took more than 1.5 s", failed=True) and other.text == "waited"
        assert len(below(calls)) <= 1, "only the process that served the other call is left, no daemon of the first"

    asyncio.run(scenario())


PROGRAMS = {
    "print(6 * 7)\n'done'": (False, "42\ndone\n"),
    "x = [1, 2]\nx": (False, "[1, 2]\n"),
    "def f():\n    return 1 / 0\nf()": (
        False,
        "line 3: f()\nline 2: return 1 / 0\nZeroDivisionError: division by zero\n",
    ),
    "a = 'x' * (1 << 30)": (False, "line 1: a = 'x' * (1 << 30)\nMemoryError\n"),
    "import os\nwhile True: os.fork()": (True, "it was ended: it had more than 5 processes"),
    "import os; os.kill(os.getpid(), 9)": (True, "its process ended (killed by SIGKILL)"),
    "import os; os._exit(7)": (True, "its process ended (exit code 7)"),
    "import sys; sys.exit(2)": (False, "exit code 2\n"),
    "while True: pass": (True, "it was ended: it took more than 1.5 s"),
    "import os; open('f', 'w').close(); os.listdir('.')": (False, "['f']\n"),
    "import os; os.kill(os.getppid(), 9)": (True, "the process of the tools ended; call again"),
    "'and goes on'": (False, "and goes on\n"),
}


def test_programs_under_limits(calls: ToolCalls) -> None:
    async def scenario() -> None:
        for code, (failed, text) in PROGRAMS.items():
            assert await calls.call(functions.BUILT_IN["python"], {"code": code}) == Result(text, failed), code
        assert below(calls) == [], "a program's process ends with it"

    asyncio.run(scenario())


def test_the_calculator_computes_and_nothing_else() -> None:
    from astracli.envs.tools.builtin import calculator

    wanted = {"347*682": "236654", "2^10": "1024", "(1 + 2) × 3": "9", "7/2": "3.5", "6/2": "3", "1,000-1": "999"}
    assert {given: calculator(given) for given in wanted} == wanted
    for bad in ("__import__('os')", "9**9**9", "1 +", "a", "'a'*9", "True"):
        with pytest.raises(ValueError):
            calculator(bad)
