"""A full disk, quota or file-size limit ends a command or a process with one line, however deep it was met."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from astracli.errors import disk_full


def test_the_cause_is_found_in_the_chain_and_in_words() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("saving failed") from error
    except RuntimeError as error:
        found = disk_full(error)
    assert found is not None and "No space left on device" in found.message and "--resume" in str(found.hint)
    assert found.exit_code == 1
    wrapped = "CheckpointException ranks:[0]\nRuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos"
    torch_save = disk_full(RuntimeError(wrapped))
    assert torch_save is not None and torch_save.message.endswith("unexpected pos")
    assert disk_full(RuntimeError("Error while serializing: I/O error: File too large (os error 27)"))
    for other in (OSError(errno.ENOENT, "No such file"), ValueError("x"), RuntimeError("")):
        assert disk_full(other) is None


@pytest.mark.skipif(sys.platform == "win32", reason="file-size limits are POSIX")
def test_a_command_says_it_in_one_line(tmp_path: Path) -> None:
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "from astracli.cli.main import main; main(['recipes', 'copy', 'qwen3.5-tiny-m2po-full', 'mine.toml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert "file too large" in done.stderr.lower() and "hint:" in done.stderr
