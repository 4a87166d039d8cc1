"""Are the bytes of a deterministic run over hosts those of the same run on one host?

    python bench/loop/over_hosts.py [--ranks 1 2] [--steps 4] [--run-dir DIR]

Hosts are loopback addresses of this machine. With one rank, the engine is on the second host; with two, a rank of the
trainer is on each host and the engine on the second. Prints a row for each; exits 1 when anything differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults.agents import Hosts
from shared import folder, options, show

from loop.exactness import SMALL, difference, straight


def main() -> None:
    parser = options(__doc__, ranks=[1, 2], steps=4, run_dir=Path)
    args = parser.parse_args()
    rows = []
    with folder() as name:
        for ranks in args.ranks:
            place = (args.run_dir or name) / f"ranks{ranks}"
            sets = [*SMALL, f"train.steps={args.steps}", "eval.samples=1", "eval.pass_k=1"]
            sets += [f"resources.train_ranks={ranks}"]
            place.mkdir(parents=True, exist_ok=True)
            alone_s = straight(place / "one", sets)
            more = [f"resources.train_hosts={ranks}", 'launch.network="private"'] if ranks > 1 else []
            hosts = Hosts(place / "two", [*sets, *more], names=("b",))
            hosts.give("b")
            code, console, ends = hosts.end()
            if code or ends["b"]:
                log = next(place.glob("two-b*.log")).read_text()
                sys.exit(f"the run over two hosts ended with {code}, its agent with {ends['b']}:\n{console}\n{log}")
            there = sorted(path.stem for path in (place / "two-b0" / "logs" / "attempt_1").iterdir())
            odd = difference(place / "one", place / "two", whole=True)
            rows.append({
                "ranks": ranks, "on the second host": " ".join(there), "one_host_s": alone_s,
                "two_hosts_s": hosts.attempt.seconds, "differs": odd[:5] or "nothing",
            })  # fmt: skip
    show(args, {"steps": args.steps, "rows": rows})
    sys.exit(any(row["differs"] != "nothing" for row in rows))


if __name__ == "__main__":
    main()
