"""A reward for astra: how much of a completion is digits."""


def digits(problem: str, answer: str, completion: str) -> float:
    return sum(character.isdigit() for character in completion) / max(1, len(completion))
