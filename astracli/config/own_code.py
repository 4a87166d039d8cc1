"""Code of the user's own that a recipe names as `pkg.module:attribute`. Light: a grading process imports it."""

from __future__ import annotations

import importlib

from astracli.errors import UserError


def imported(spec: str, named: str, form: str, hint: str | None = None) -> object:
    """What `spec` names. `named`: how messages call it, such as "reward `x:y`". Raises UserError.

    `form` and `hint` say how it should be written.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UserError(f"{named} is not of the form `{form}`", hint)
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{named}: importing `{module_name}` failed: {type(error).__name__}: {error}",
            "install the package into this environment, or run where the module lies",
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{named}: `{module_name}` has no `{attribute}`", hint)
        found = getattr(found, part)
    return found
