"""Errors that people read: what happened, with the value, and what to do next."""

from __future__ import annotations


class AstraError(Exception):
    """Base of every error that ends a command. `hint` names the next command; `exit_code` is the process's."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UserError(AstraError, ValueError):
    """Bad input: a recipe, an option or a file that the user can mend. Exit 2, before anything started."""

    exit_code = 2


class RunFailed(AstraError, RuntimeError):
    """A run or a check that failed after it had started. Exit 1."""

    exit_code = 1
