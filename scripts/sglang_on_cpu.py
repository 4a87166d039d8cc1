"""An environment in which SGLang itself serves on a CPU, to try the whole GPU flow on a laptop.

    python scripts/sglang_on_cpu.py DIR
    astra train --recipe qwen3.5-tiny-m2po-delta --set rollout.engine=sglang \\
        --set resources.engine.python=DIR/bin/python --set launch.ready_timeout_s=300

SGLang's scheduler, memory pools, models, HTTP face and weight updates are its own (0.5.17, from PyPI, without its GPU
packages, 1.5 GB with torch); the compiled kernels that it would bring are plain torch (`sglang_cpu/`). It takes up to
a minute to start, and is slow. DIR must not exist.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = Path(__file__).parents[1] / "constraints" / "sglang-cpu.txt"
STAND_INS = Path(__file__).parent / "sglang_cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    args = parser.parse_args()
    if args.dir.exists():
        raise SystemExit(f"error: `{args.dir}` exists: name a new directory")
    venv.create(args.dir, with_pip=True)
    python = args.dir.absolute() / "bin" / "python"
    # without dependencies: SGLang's own would bring CUDA, and the list is whole
    if subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "-r", PACKAGES]
    ).returncode:
        shutil.rmtree(args.dir)
        raise SystemExit("error: pip failed, see above; nothing is left")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    shutil.copytree(STAND_INS, packages, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    probe = [str(python), "-c", "import sglang.launch_server, sgl_kernel.mamba; print('SGLang can be imported')"]
    if subprocess.run(probe, env={"SGLANG_USE_CPU_ENGINE": "1", "PATH": "/usr/bin:/bin"}).returncode:
        raise SystemExit(f"error: SGLang cannot be imported in `{args.dir}`, see above")
    print(f"serve with it: --set rollout.engine=sglang --set resources.engine.python={python}")


if __name__ == "__main__":
    sys.exit(main())
