"""Do the sets of constraints/ install? Asks the package index for metadata: `python scripts/check_constraints.py`.

Each file is resolved by `uv pip compile` for every Python that it is meant for, with the extras that it is given with
or the packages that it is there for, and every package must exist as a wheel. Nothing is downloaded but metadata,
nothing is installed: about 20 s on two cores. The index is the one that pip is set to use (its default without a
setting); other indexes and local folders that pip may know are left out, because whoever installs has only the first.

Exit 0 when every set resolves to the versions that its file pins, 1 when one does not, 2 when uv is not there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "x86_64-manylinux_2_34"
"""glibc 2.34: what SGLang's wheels need."""
ELSEWHERE = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_CONSTRAINT", "UV_OVERRIDE", "UV_PRERELEASE")
"""Settings of uv's that would let a set resolve here alone."""


BESIDE_VLLM = "xxhash zstandard psutil"
"""What our server and weight loader import in vLLM's environment, besides what vLLM brings."""


@dataclass(frozen=True)
class Set:
    """A file of constraints/, and whom it is for."""

    file: str
    wanted: tuple[str, ...]
    """Each as README or a hint gives them to pip: `astracli[dev,gpu,sglang]`, or other packages."""
    pythons: tuple[str, ...]
    whole: bool = True
    """It pins every package that is installed with it."""
    platform: str = PLATFORM


SETS = (
    Set("cuda.txt", ("astracli[gpu,sglang]", "astracli[dev,gpu,sglang]"), ("3.11", "3.12")),
    Set("cuda-torch2.11.txt", ("astracli[gpu,sglang]", "astracli[dev,gpu,sglang]"), ("3.11", "3.12")),
    Set("vllm.txt", (f"vllm {BESIDE_VLLM}",), ("3.12",)),
    Set("vllm-torch2.11.txt", (f"vllm {BESIDE_VLLM}",), ("3.12",), platform="x86_64-manylinux_2_35"),
    # torch's CPU wheel needs none of the CUDA packages that the same version from PyPI would bring
    Set("cpu.txt", ("astracli[dev,sinks]",), ("3.11", "3.12"), whole=False),
)


def environment() -> dict[str, str]:
    """uv's environment: the index and the certificates that pip is set to use."""
    env = {key: value for key, value in os.environ.items() if key not in ELSEWHERE}
    env["UV_PYTHON_DOWNLOADS"] = "never"  # metadata is read for a Python, none is run
    for name, variable in (("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")):
        if variable not in env and (value := pip_setting(name)):
            env[variable] = value
    return env


def pip_setting(name: str) -> str | None:
    """A setting of pip's, from its environment variable or its files; None = pip's default."""
    if value := os.environ.get("PIP_" + name.upper().replace("-", "_")):
        return value
    for section in ("global", "install"):
        command = [sys.executable, "-m", "pip", "config", "get", f"{section}.{name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return None


def pins(text: str) -> dict[str, str]:
    """`{normalised name: version}` of a file of `name==version` lines."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith(("#", " ")):
            name, _, version = line.partition("==")
            found[re.sub(r"[-_.]+", "-", name).lower()] = version.split(" ")[0]
    return found


def resolve(found: Set, wanted: str, python: str, env: dict[str, str]) -> str | None:
    """What is wrong with a set; None when it resolves to what it pins."""
    file = ROOT / "constraints" / found.file
    name, _, extras = wanted.rstrip("]").partition("[")
    own = name == "astracli"
    command = ["uv", "pip", "compile", "pyproject.toml" if own else "-", "--constraint", str(file)]
    command += ["--python-version", python]
    for extra in extras.split(",") if own else ():
        command += ["--extra", extra]
    command += ["--python-platform", found.platform, "--only-binary", ":all:"]
    command += ["--no-config", "--no-progress", "--no-header", "--no-annotate"]
    told = None if own else wanted.replace(" ", "\n")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, input=told)
    if done.returncode != 0:
        return f"does not resolve\n{done.stderr.strip()}"
    pinned, has = pins(file.read_text()), pins(done.stdout)
    if not has:
        return "uv named no package"
    loose = [f"{name}=={version}" for name, version in has.items() if name not in pinned]
    return f"the file does not pin {', '.join(loose)}: add them" if found.whole and loose else None


def main() -> int:
    env, failed = environment(), 0
    try:
        subprocess.run(["uv", "--version"], check=True, capture_output=True)
    except OSError:
        print("error: uv is not there; hint: `pip install uv`, or the extra `dev`", file=sys.stderr)
        return 2
    for found in SETS:
        for python in found.pythons:
            for wanted in found.wanted:
                what = f"constraints/{found.file}: {wanted} on Python {python}"
                wrong = resolve(found, wanted, python, env)
                failed += wrong is not None
                print(f"{what}: {'resolves' if wrong is None else wrong}", flush=True)
    if failed:
        print(
            f"error: {failed} of the sets above would not install as they are pinned; hint: where the index answered, "
            "move the pins that uv names (each file's header says how it was made)",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
