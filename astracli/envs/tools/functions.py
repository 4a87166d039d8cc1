"""A typed Python function as a tool: what the model is told of it, and what it may be called with."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model

from astracli.config.own_code import imported
from astracli.errors import UserError

BUILT_IN = {name: f"astracli.envs.tools.builtin:{name}" for name in ("calculator", "python")}
_ARGUMENT = re.compile(r"^[ \t]+(\w+)[ \t]*(?:\([^)]*\))?:[ \t]*(.*)$")
_HINT = "every parameter has a type, and the docstring says what the function does (and, under `Args:`, what each is)"


class BadCall(ValueError):
    """What is wrong with a call, in words for the model."""


@dataclass(frozen=True)
class Tool:
    name: str
    spec: str
    """`pkg.mod:function`"""
    function: Callable[..., Any]
    schema: Mapping[str, Any]
    """As chat templates take it: {"type": "function", "function": {name, description, parameters}}."""
    arguments: type[BaseModel]

    @property
    def fresh(self) -> bool:
        """Whether each call gets a process of its own: the function has an attribute `fresh` that is true."""
        return bool(getattr(self.function, "fresh", False))

    def checked(self, given: Mapping[str, Any], *, written: bool = False) -> dict[str, Any]:
        """The arguments of a call, as JSON. `written`: all of them came as text. Raises BadCall."""
        if written:
            given = {key: self._read(key, value) for key, value in given.items()}
        try:
            found = self.arguments.model_validate(given)
        except ValidationError as error:
            wrong = [f"`{'.'.join(map(str, each['loc']))}`: {each['msg']}" for each in error.errors()]
            takes = ", ".join(self.schema["function"]["parameters"]["properties"]) or "nothing"
            raise BadCall(f"{'; '.join(wrong)} ({self.name} takes: {takes})") from None
        return found.model_dump(mode="json", exclude_unset=True)

    def _read(self, key: str, value: Any) -> Any:
        """A value that was written as text: JSON, where the parameter is no text."""
        field = self.arguments.model_fields.get(key)
        if field is None or field.annotation is str or not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            return value

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """The function's own result; a coroutine when it is `async def`."""
        found = self.arguments.model_validate(arguments)
        return self.function(**{name: getattr(found, name) for name in found.model_fields_set})


def loaded(names: Iterable[str | Callable[..., Any]]) -> dict[str, Tool]:
    """The tools of `env.tools`, or functions, by name. Raises UserError."""
    found: dict[str, Tool] = {}
    for name in names:
        tool = of_function(name) if callable(name) else named(name)
        if tool.name in found:
            raise UserError(f"env.tools has two tools called `{tool.name}`", "give one of the functions another name")
        found[tool.name] = tool
    return found


def named(name: str) -> Tool:
    """A built-in tool, or `pkg.mod:function`. Raises UserError."""
    spec = BUILT_IN.get(name, name)
    if ":" not in spec:
        known = ", ".join(f"`{each}`" for each in BUILT_IN)
        raise UserError(
            f"env.tools: there is no tool `{name}`", f"built in are {known}; your own is `pkg.mod:function`"
        )
    function = imported(spec, f"env.tools: `{name}`", "pkg.mod:function")
    if not callable(function):
        raise UserError(f"env.tools: `{name}` is a {type(function).__name__}, not a function", _HINT)
    return of_function(function, spec)


def of_function(function: Callable[..., Any], spec: str = "") -> Tool:
    """Raises UserError when the function says too little of itself."""
    name = str(getattr(function, "__name__", type(function).__name__))
    spec = spec or f"{function.__module__}:{function.__qualname__}"
    if "<" in spec or spec.startswith("__main__"):
        raise UserError(f"tool `{name}`: another process cannot import `{spec}`", "define it in a module of its own")
    try:
        types = typing.get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"tool `{name}`: its signature cannot be read: {error}", _HINT) from None
    about, each = _documented(function)
    if not about:
        raise UserError(f"tool `{name}` (`{spec}`) has no docstring", _HINT)
    fields: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UserError(f"tool `{name}`: its parameter `{key}` cannot be given by name", _HINT)
        if key not in types:
            raise UserError(f"tool `{name}`: its parameter `{key}` has no type", _HINT)
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[key] = (types[key], Field(default=default, description=each.get(key)))
    try:
        arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        parameters_schema = _plain(arguments.model_json_schema())
    except (PydanticUserError, TypeError) as error:
        raise UserError(f"tool `{name}`: {' '.join(str(error).split())[:200]}", _HINT) from None
    described = {"name": name, "description": about, "parameters": parameters_schema}
    return Tool(name, spec, function, {"type": "function", "function": described}, arguments)


def _documented(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """(what a docstring says before `Args:`, what it says there of each parameter)"""
    text = inspect.getdoc(function) or ""
    about, _, rest = text.partition("\nArgs:\n")
    each: dict[str, str] = {}
    last = ""
    for line in rest.splitlines():
        if line and not line[0].isspace():
            break
        if found := _ARGUMENT.match(line):
            last = found[1]
            each[last] = found[2].strip()
        elif last and line.strip():
            each[last] = f"{each[last]} {line.strip()}"
    for heading in ("\nReturns:\n", "\nRaises:\n"):
        about = about.partition(heading)[0]
    return about.strip(), each


def _plain(schema: Any) -> Any:
    """Without what pydantic adds for people: titles, and that nothing else may be given."""
    if isinstance(schema, dict):
        return {
            key: {name: _plain(one) for name, one in value.items()} if key == "properties" else _plain(value)
            for key, value in schema.items()
            if key not in ("title", "additionalProperties")
        }
    return [_plain(one) for one in schema] if isinstance(schema, list) else schema


def schemas(tools: Mapping[str, Tool]) -> Sequence[Mapping[str, Any]]:
    return [tool.schema for tool in tools.values()]
