"""Whether a host sees the run directory of the first: ranks of a trainer write checkpoints and weights there together.

The first host puts a random text into a file there, and tells both to the agent, which reads it and makes a file of its
own beside it.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from astracli.errors import RunFailed
from astracli.process.atomic import write_atomic

NAME = ".same_directory"


@dataclass(frozen=True)
class Proof:
    file: str
    nonce: str

    def document(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, host: str) -> None:
        """Raise RunFailed when this host does not see that file, or cannot write beside it."""
        file = Path(self.file)
        hint = (
            "processes of the trainer on several hosts need one run directory: mount a shared file system (NFS, "
            "Lustre) at the same path on all of them, and give `astra train` a `--run-dir` on it"
        )
        try:
            same = file.read_text() == self.nonce
        except OSError as error:
            said = (error.strerror or str(error)).lower()
            raise RunFailed(f"host `{host}` does not see the run directory `{file.parent}`: {said}", hint) from None
        if not same:
            raise RunFailed(f"host `{host}` has another directory at `{file.parent}` than the first host", hint)
        mine = file.with_name(f"{NAME}.{host}")
        try:
            write_atomic(mine, self.nonce)
            os.unlink(mine)
        except OSError as error:
            said = (error.strerror or str(error)).lower()
            raise RunFailed(f"host `{host}` cannot write to the run directory `{file.parent}`: {said}", hint) from None


def offer(directory: Path) -> Proof:
    """On the first host."""
    proof = Proof(str(directory.resolve() / NAME), secrets.token_hex(16))
    write_atomic(Path(proof.file), proof.nonce, mode=0o600)
    return proof
