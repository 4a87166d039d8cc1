"""What is checked of the examples of `astra sft` before a start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from astracli.config.recipe import Recipe
from astracli.config.recipe_data import sets
from astracli.data.examples import ExampleTokens, answer_of
from astracli.data.prompts import PromptSource, stop_token_ids
from astracli.errors import UserError
from astracli.launch import first_prompt
from astracli.models.adapter import load_tokenizer
from astracli.process.console import say

FIRST = 64
"""Examples that are tokenised: whether the chat template takes them, and whether any of them fits."""


def check(recipe: Recipe, folder: Path, paths: Mapping[str, str | Path | None]) -> first_prompt.FirstExample:
    """Every row has an answer, and the first examples can be tokenised and fit. Raises UserError.

    Returns the first that fits, in the order of training; rows that benchmarks hold are left out only later."""
    assert recipe.sft is not None
    source, tables = PromptSource(recipe.training_data, recipe.seed, paths), sets(recipe.training_data)
    for name, part in source.parts.items():
        for problem in part.rows if part.rows is not None else (part.problem(0),):
            answer_of(problem, recipe.sft, tables[name].question_field)
    tokenizer = load_tokenizer(folder)
    tokens, longest = ExampleTokens(recipe, tokenizer), recipe.rollout.context_length
    problems = [source.problem(place) for place in range(min(FIRST, len(source)))]
    made = [tokens(problem) for problem in problems]
    lengths = [len(example) for example in made]
    if min(lengths) > longest:
        raise UserError(
            f"none of the first {len(lengths)} examples fits into rollout.context_length = {longest} tokens, the "
            f"shortest has {min(lengths)}",
            "raise rollout.context_length, or train on shorter examples",
        )
    if tokens.end not in stop_token_ids(tokenizer, folder):
        name = tokenizer.convert_ids_to_tokens(tokens.end)
        say(
            f"warning: the chat template ends an answer with `{name}`, which is no end token of `{recipe.model.path}`: "
            "engines will generate on behind it; add its id to eos_token_id in generation_config.json"
        )
    first = next(place for place, length in enumerate(lengths) if length <= longest)
    return first_prompt.of_example(made[first], problems[first].source, tokenizer)
