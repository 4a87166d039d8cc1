"""Small machines: little shared memory, few descriptors or processes, one core, a killer of processes that use too much
memory, rewards that fork or take all memory, other users, two runs in one place, locks that the file system refuses, a
package that changed under a resume."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import astracli
from faults.network import hooked
from faults.world import Row, World, attempted, victim

CGROUPS = Path("/sys/fs/cgroup")
STEPS = 6
NOBODY = 65534
EVIL = {
    "bomb": "    import os\n    while True:\n        try: os.fork()\n        except OSError: pass\n",
    "memory": "    kept = []\n    while True: kept.append(bytearray(b'1' * (1 << 26)))\n",
    "ten": "    return float(len(bytearray(b'1') * (10 << 30)))\n",
    "daemon": "    import os, time\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
    "            os.closerange(0, 64); time.sleep(600)\n        os._exit(0)\n",
}  # fmt: skip
"""What a reward does before it answers, once an answer's checksum ends in 0."""


def finishes(world: World, name: str, row: Row, *before: str, sets: tuple[str, ...] = (),
             causes: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Row:  # fmt: skip
    """A run under `before`, a command that becomes `astra`: to its end with whole books, or ended with a cause."""
    run = world.folder / name
    row = world.judge(row, world.start(run, STEPS, sets, before=before, env=env), causes)
    if row.outcome == "finished":
        row.problems += world.books(run)
    return row


def small_shm(world: World, row: Row) -> Row:
    words = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    two_ranks = ("resources.train_ranks=2",)
    return finishes(world, "shm", row, "unshare", "-m", "sh", "-c", words, "sh", sets=two_ranks)


# ---- control groups (version 1)


@contextmanager
def cgroup(kind: str, name: str, limit: str, value: int) -> Iterator[Path]:
    """A group under a limit. Raises OSError where there are none."""
    group = CGROUPS / kind / f"astra_faults_{name}"
    group.mkdir()
    try:
        (group / limit).write_text(str(value))
        yield group
    finally:
        for _ in range(100):
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def under(group: Path) -> tuple[str, ...]:
    return ("sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh")


def evil_reward(world: World, what: str) -> str:
    """The name of a reward that does harm at every eighth answer or so."""
    head = "import zlib\n\n\ndef harm(problem, answer, completion):\n"
    tail = "    return float(zlib.crc32(completion.encode()) & 1)\n"
    body = "".join(f"    {line}\n" for line in EVIL[what].rstrip().splitlines())
    test = "    if zlib.crc32(completion.encode()) % 8 == 0:\n"
    (world.folder / f"evil_{what}.py").write_text(head + test + body + tail)
    return f"data.reward=evil_{what}:harm"


def evil(world: World, what: str, row: Row) -> Row:
    """Its grader is killed or times out, and the run goes on: in a group of 400 processes or 4 GiB."""
    kind, limit, value = {
        "bomb": ("pids", "pids.max", 400),
        "memory": ("memory", "memory.limit_in_bytes", 4 << 30),
        "ten": ("memory", "memory.limit_in_bytes", 4 << 30),
        "daemon": ("pids", "pids.max", 400),
    }[what]
    with cgroup(kind, what, limit, value) as group:
        sets = (evil_reward(world, what), "data.reward_timeout_s=1", "eval.every=0")
        sets += ("data.reward_memory_gib=1",) if what == "ten" else ()
        run = world.folder / f"evil_{what}"
        attempt = world.start(run, 3, sets, before=under(group))
        row = world.judge(row, attempt, ())
    if what == "ten":  # told with the lines of the reward where it happened
        row.problems = [one for one in row.problems if not one.startswith("a traceback")]
        if "MemoryError: more than the 1 GiB that this process may take" not in attempt.log.read_text():
            row.problems.append("the limit is not said")
    return row


def evil_environment(world: World, row: Row) -> Row:
    """It leaves a daemon at each episode, in the rollout worker's own process."""
    head = "from astracli.envs.single_turn import SingleTurnEnv\n\n\nclass Harm(SingleTurnEnv):\n"
    body = "".join(f"    {line}\n" for line in EVIL["daemon"].rstrip().splitlines())
    run = "    async def run(self, problem, policy):\n"
    (world.folder / "evil_env.py").write_text(head + run + body + "        return await super().run(problem, policy)\n")
    return finishes(world, "evil_env", row, sets=("rollout.env=evil_env:Harm",))


def out_of_memory(world: World, name: str, row: Row) -> Row:
    """A worker is moved into a group whose limit it passes at once: the kernel kills it."""
    run = world.folder / f"oom_{name}"
    attempt = world.start(run, 12)
    with cgroup("memory", f"oom_{name}", "memory.limit_in_bytes", 1 << 20) as group:

        def strikes() -> bool:
            if not attempt.steps() or (found := victim(attempt, name)) is None:
                return False
            (group / "cgroup.procs").write_text(str(found.pid))
            return True

        attempt.wait(strikes)
        row = world.judge(row, attempt, (rf"`{name}`.*memory",))
    if name == "grader" and row.outcome != "finished":
        row.problems.append("another grader should have taken its place")
    return world.finish(run, row)


# ---- another user


def another_user(world: World, row: Row, *limits: str, home: str = "/nonexistent", causes: tuple[str, ...] = ()) -> Row:
    """As a user without a home, in a folder of his."""
    name = row.where.replace(" ", "_")[:20]
    place = world.folder / name
    place.mkdir()
    for path in (world.folder, *world.folder.parents[:2], place):
        with suppress(OSError):
            path.chmod(path.stat().st_mode | 0o055)
    for file in ("coin.py", "small.jsonl"):
        shutil.copy(world.folder / file, place / file)
    os.chown(place, NOBODY, NOBODY)
    world.tmp.chmod(0o777)
    inner = World(place)
    inner.tmp.chmod(0o777)
    caps = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    who = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *caps)
    attempt = inner.start(place / "run", STEPS, before=(*limits, *who), env={"HOME": home})
    row = inner.judge(row, attempt, causes)
    if row.outcome == "finished":
        row.problems += inner.books(place / "run")
    return row


# ---- one place, two runs


def twice(world: World, row: Row) -> Row:
    """The same directory at once: one of them runs, the other is refused; the books are those of one run."""
    run = world.folder / "twice"
    first = world.start(run, STEPS)
    time.sleep(world.draw.uniform(0.0, 1.5))
    log = run.with_suffix(".second")
    words = [sys.executable, "-m", "astracli", "train", "--recipe", "qwen3.5-tiny-m2po-delta", "--run-dir", str(run)]
    with log.open("w") as said:
        code = subprocess.run(words, cwd=world.folder, stdout=said, stderr=said).returncode
    row = world.judge(row, first, ())
    if code != 2 or "error: " not in log.read_text():
        row.problems.append(f"the second: exit {code}, {log.read_text()[-300:]}")
    row.problems += world.books(run)
    return row


def beside(world: World, row: Row) -> Row:
    """Two runs of one folder, each with a directory of its own."""
    attempts = [world.start(world.folder / name, STEPS) for name in ("one", "two")]
    codes = [attempt.end()[0] for attempt in attempts]
    row.outcome = "finished" if codes == [0, 0] else f"exit codes {codes}"
    for attempt in attempts:
        row.problems += world.books(attempt.run)
    row.problems += world.left_behind(attempts[0].run)
    return row


def locks(world: World, row: Row, says: str) -> Row:
    env = hooked(ASTRA_FAULTS_LOCKS=says)
    return finishes(world, f"locks_{says}", row, env=env, causes=(r"lock",))


def changed_package(world: World, row: Row) -> Row:
    """A run from a copy of the package; one of its modules is broken before the resume, and mended after it."""
    package = world.folder / "site"
    shutil.copytree(Path(astracli.__file__).parent, package / "astracli", symlinks=False)
    run = world.folder / "changed"
    env = {"PYTHONPATH": f"{package}:{Path(__file__).parent / 'hook'}"}
    attempt = world.start(run, 1000, env=env)
    attempt.wait(lambda: len(attempt.steps()) >= 3 and attempt.kill("supervisor"))
    attempt.end()
    world.left_behind(run)
    module = package / "astracli" / "training" / "loop.py"
    whole = module.read_text()
    module.write_text(whole.replace("def ", "daf ", 1))
    row = world.judge(row, world.start(run, 2, env=env), (r"installed astracli is damaged",))
    module.write_text(whole)
    if row.outcome == "finished":
        row.problems.append("the broken module was not read: forked processes have it already, leave out --warm")
    return world.finish(run, row)


def under_limit(world: World, row: Row, *before: str, ranks: int = 1, causes: tuple[str, ...] = ()) -> Row:
    """The first word names the run, the others are the command in front."""
    name, *words = before
    return finishes(world, name, row, *words, sets=(f"resources.train_ranks={ranks}",), causes=causes)


FEW_PROCESSES = (r"no more processes", r"temporarily unavailable", r"can't start new thread")
Work = Callable[[World, Row], Row]
ROWS: dict[str, tuple[str, str, Work]] = {
    "shm": ("64 MB of shared memory", "two ranks", small_shm),
    "descriptors": (
        "64 descriptors", "",
        lambda w, r: under_limit(w, r, "nofile", "prlimit", "--nofile=64:64", causes=(r"open files",)),
    ),
    "core": ("one core", "two ranks", lambda w, r: under_limit(w, r, "core", "taskset", "-c", "0", ranks=2)),
    "processes": (
        "limit on processes", "another user, 20",
        lambda w, r: another_user(w, r, "prlimit", "--nproc=20:20", causes=FEW_PROCESSES),
    ),
    "home": ("home that cannot be written", "another user", another_user),
    "bomb": ("fork bomb in a reward", "400 processes", lambda w, r: evil(w, "bomb", r)),
    "memory": ("reward that takes all memory", "4 GiB", lambda w, r: evil(w, "memory", r)),
    "env-daemon": ("an environment leaves daemons", "one an episode", evil_environment),
    "ten": ("reward that takes 10 GB", "data.reward_memory_gib = 1", lambda w, r: evil(w, "ten", r)),
    "daemon": ("reward that leaves daemons", "", lambda w, r: evil(w, "daemon", r)),
    **{
        f"oom-{name}": ("killed for its memory", name, lambda w, r, n=name: out_of_memory(w, n, r))
        for name in ("engine0", "rollout", "trainer", "eval", "grader")
    },
    "twice": ("two runs", "in one directory", twice),
    "beside": ("two runs", "in one folder", beside),
    "nfs": ("locks refused", "ENOLCK", lambda w, r: locks(w, r, "ENOLCK")),
    "no-locks": ("locks refused", "EOPNOTSUPP", lambda w, r: locks(w, r, "EOPNOTSUPP")),
    "package": ("package broken under a resume", "training/loop.py", changed_package),
}  # fmt: skip


def rows(world: World, names: list[str]) -> list[Row]:
    return [attempted(Row(ROWS[name][0], ROWS[name][1]), lambda row, n=name: ROWS[n][2](world, row)) for name in names]
