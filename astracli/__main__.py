"""`python -m astracli`: the same as `astra`."""

from astracli.cli.main import main

main()
