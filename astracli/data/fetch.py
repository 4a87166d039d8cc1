"""Models and data come to this machine once, before any child starts; children get local paths and run offline.

Honours HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and the token of `hf auth login`. Whatever cannot be had is the user's to
mend: UserError, exit 2.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from astracli.config.benchmarks import SUFFIXES
from astracli.errors import UserError
from astracli.process import console

BUNDLED_PREFIX = "astra:"
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
MODEL_IGNORED = ["original/*", "onnx/*", "openvino/*", "*/*.safetensors"]
DATA_FILES = [*(f"*{suffix}" for suffix in SUFFIXES), "README.md"]
"""README.md names the configurations of a data set and their files."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
Kind = Literal["model", "dataset"]
Say = Callable[[str], None]
INSTEAD: dict[Kind, str] = {
    "model": "give a local path as model.path (`astra eval`: --weights)",
    "dataset": "put a copy as NAME.jsonl into a directory and name that in data.path or ASTRA_DATA_DIR",
}
"""What a hint offers besides mending the download."""


class NotHere(UserError):
    """Not on this machine; a start downloads it."""


_only_here = False


@contextlib.contextmanager
def only_here() -> Iterator[None]:
    """Inside, nothing is downloaded: what is not on this machine, or in the Hub's cache here, raises NotHere."""
    global _only_here
    before, _only_here = _only_here, True
    try:
        yield
    finally:
        _only_here = before


def _silent(_message: str) -> None:
    """For downloads of a few kilobytes."""


def bundled(name: str) -> Path:
    """Directory of a model shipped with the package: `astra:tiny` -> astracli/assets/tiny. Raises UserError."""
    folder = Path(str(resources.files("astracli") / "assets"))
    found = sorted(p.parent.name for p in folder.glob("*/config.json"))
    short = name.removeprefix(BUNDLED_PREFIX)
    if short not in found:
        shipped = ", ".join(f"`{BUNDLED_PREFIX}{n}`" for n in found) or "none"
        raise UserError(
            f"model.path = `{name}`: no such model in this package (shipped: {shipped})",
            "set model.path to one of these",
        )
    return folder / short


def local_path(path: str, key: str = "model.path", made_by: str | None = None) -> Path | None:
    """`path`, the value of `key`, as something already on this machine, or None when it is a Hub id.

    Raises UserError when it is written like a path and nothing is there; `made_by` is the command that makes it.
    """
    if path.startswith(BUNDLED_PREFIX):
        return bundled(path)
    expanded = Path(path).expanduser()
    if expanded.exists():
        return expanded.resolve()
    if path.startswith(("/", "./", "../", "~")) or not _REPOSITORY.fullmatch(path):
        raise UserError(
            f"{key} = `{path}`: nothing at that path",
            f"make it: `{made_by}`" if made_by else "check it, or give a Hub id such as `Qwen/Qwen3.5-4B`",
        )
    return None


def fetch_model(path: str, revision: str | None = None, say: Say = console.say) -> Path:
    """Local directory of a checkpoint: shipped (`astra:NAME`), a directory, or a Hub id that is downloaded now."""
    found = local_path(path)
    if found is None:
        found = _snapshot(path, "model", revision, MODEL_FILES, MODEL_IGNORED, say)
    if not (found / "config.json").is_file():
        export = found / "export"
        hint = "give a checkpoint directory or a Hub id as model.path"
        if (export / "config.json").is_file():
            hint = f"what that run trained is `{export}`"
        elif (found / "adapter_config.json").is_file():
            hint = (
                "it holds an adapter (LoRA) alone: merge it into its base model (`merge_and_unload` of peft), save that"
            )
        raise UserError(f"no config.json in `{found}`", hint)
    if not any(found.glob("*.safetensors")):
        raise UserError(
            f"no *.safetensors in `{found}`", "convert the checkpoint to safetensors, or choose another one"
        )
    return found


def fetch_dataset(source: str, revision: str | None = None, say: Say = console.say) -> Path:
    """Local file or directory of a data set: a path, or a Hub data set id that is downloaded now."""
    found = local_path(source, "data.source")
    return found or _snapshot(source, "dataset", revision, DATA_FILES, [], say)


def fetch_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a checkpoint, without its weights: what a plan needs. Raises UserError when it cannot be had."""
    from astracli.models.adapter import read_config

    found = local_path(path) or _snapshot(path, "model", revision, ["config.json"], [], _silent)
    return read_config(found)


def cached_config(path: str, revision: str | None = None) -> dict[str, Any] | None:
    """config.json of a Hub id as far as it is in the local cache; asks no network."""
    import huggingface_hub

    from astracli.models.adapter import read_config

    file = huggingface_hub.try_to_load_from_cache(path, "config.json", revision=revision)
    return read_config(Path(file).parent) if isinstance(file, str) else None


def _snapshot(name: str, kind: Kind, revision: str | None, allow: list[str], ignore: list[str], say: Say) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if _only_here:
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    name, repo_type=kind, revision=revision, allow_patterns=allow, local_files_only=True
                )
            )
        except (LocalEntryNotFoundError, ValueError, OSError):
            raise NotHere(f"{kind} `{name}` is not on this machine", "it is downloaded when a run starts") from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    started = time.monotonic()
    say(f"fetching {kind} {name}" + (f" at {revision}" if revision else ""))
    with _explained(name, kind, revision):
        folder = huggingface_hub.snapshot_download(
            name, repo_type=kind, revision=revision, allow_patterns=allow, ignore_patterns=ignore or None
        )
    say(f"fetched {kind} {name} in {time.monotonic() - started:.1f} s: {folder}")
    return Path(folder)


@contextlib.contextmanager
def _explained(name: str, kind: Kind, revision: str | None) -> Iterator[None]:
    """Everything that the Hub, the network or the disk answers, in one sentence and one hint."""
    import httpx
    from huggingface_hub import constants, errors

    instead = INSTEAD[kind]
    place = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{kind} `{name}` is gated and this account may not read it",
            f"accept its licence at {place}, then `hf auth login` (or set HF_TOKEN), or {instead}",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{kind} `{name}` has no revision `{revision}`", f"see the branches and tags at {place}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"no {kind} `{name}` at {constants.ENDPOINT} that this account can see",
            f"check the name, `hf auth login` if it is private, or {instead}",
        ) from None
    except errors.RemoteEntryNotFoundError as error:
        raise UserError(f"{kind} `{name}` lacks a file: {_first_line(error)}", "choose another repository") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(*_unreachable(name, kind, instead, error)) from None
    except (httpx.TransportError, errors.HfHubHTTPError) as error:
        raise UserError(
            f"{constants.ENDPOINT} failed while sending {kind} `{name}`: {_first_line(error)}",
            f"run the command again (finished files are kept), or {instead}",
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"`{name}` is no name of a {kind}: {_first_line(error)}") from None
    except OSError as error:
        raise UserError(
            f"cannot store {kind} `{name}`: {_first_line(error)}", "free disk space, or set HF_HOME to another disk"
        ) from None


def _unreachable(name: str, kind: Kind, instead: str, error: Exception) -> tuple[str, str]:
    """Not in the cache, and the Hub does not answer (or was not asked)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"{kind} `{name}` is not in the local cache and HF_HUB_OFFLINE is set",
            f"unset HF_HUB_OFFLINE to download it, or {instead}",
        )
    cause = error.__cause__ or error
    return (
        f"{kind} `{name}` is not on this machine, and {constants.ENDPOINT} cannot be reached: {_first_line(cause)}",
        f"check the network (HF_ENDPOINT names a mirror), or {instead}",
    )


def _first_line(error: BaseException) -> str:
    """What an error says, without the number that the system gives it."""
    return re.sub(r"^\[Errno -?\d+\] ", "", (str(error).strip().splitlines() or [type(error).__name__])[0])
