"""`astra`, and `python -m astracli`: Ctrl-C ends without a traceback, also while the command is being imported."""

import sys


def main() -> None:
    """The command line of this process; leaves it with its exit code."""
    try:
        from astracli.cli.main import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
