"""`astra` with what `sitecustomize` beside it does, also where this process was forked and never read it."""

import runpy

import sitecustomize  # noqa: F401

if __name__ == "__main__":
    runpy.run_module("astracli", run_name="__main__", alter_sys=True)
