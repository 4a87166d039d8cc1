"""`astra`, and `python -m astracli`: Ctrl-C ends without a traceback, also while the command is being imported."""

import os
import sys


def main() -> None:
    """The command line of this process; leaves it with its exit code."""
    _open_streams()
    _speak_utf8()
    try:
        from astracli.cli.main import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)


def _open_streams() -> None:
    """A closed stdin, stdout or stderr (cron, some schedulers) becomes /dev/null: else a file of the run would get its
    number, and what is printed would land in that file."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _speak_utf8() -> None:
    """Recipes, data and paths are UTF-8, also where the locale is not (`LC_ALL=C` of an older cluster): the command
    starts again in Python's UTF-8 mode, and so do its children."""
    if sys.getfilesystemencoding().lower() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()
