"""The guard of a sandbox: `python -I -S sandbox_guard.py FD LIMITS COMMAND...` starts a command and outlives it.

It adopts whatever the command leaves behind (PR_SET_CHILD_SUBREAPER), daemons that forked twice included, and kills all
of it when the command ends, when a limit is passed, or when the socket FD closes, that is also when its owner dies.
LIMITS is JSON, see `sandbox.Limits`. On FD it writes {"pid"} once, and {"reason", "code"} at the end, a line each.

Only the standard library, and little of it: it starts in about ten milliseconds.
"""

import errno
import json
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
COUNT_S = 0.05
"""How often processes are counted where their number has a limit."""
KILL_S = 10.0
"""Patience with processes that do not die of SIGKILL (in a system call that cannot be interrupted)."""

FIRST_TO_GO = "1000"
"""When the machine, or its control group, has no memory left, the system ends what runs here before all else: not the
process that has most, which may be the trainer."""
RESOURCES = {
    "memory_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
    "open_files": resource.RLIMIT_NOFILE,
}


def prctl(option: int, value: int) -> bool:
    """False where there is no such call: not on Linux."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    return ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0


def descendants(pid: int) -> "list[int]":
    """Every process below `pid`; empty where there is no /proc."""
    found, todo = [], [pid]
    while todo:
        for child in children(todo.pop()):
            found.append(child)
            todo.append(child)
    return found


def children(pid: int) -> "list[int]":
    """The processes that `pid` is the parent of."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    except FileNotFoundError:
        return found if os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children") else _by_parent(pid)
    except OSError:
        pass
    return found


def _by_parent(parent: int) -> "list[int]":
    """The same from every process's `stat`, for kernels without `children` files."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        try:
            with open(f"/proc/{name}/stat") as file:
                if name.isdigit() and int(file.read().rsplit(")", 1)[1].split()[1]) == parent:
                    found.append(int(name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def send(pid: int, number: int) -> None:
    with suppress(OSError):
        os.kill(pid, number)


def kill_below(pid: int) -> None:
    """Stop every process below `pid` until no new one appears (a stopped one cannot fork), then kill all."""
    seen: set[int] = set()
    while new := set(descendants(pid)) - seen:
        for each in new:
            send(each, signal.SIGSTOP)
        seen |= new
    for each in seen:
        send(each, signal.SIGKILL)


class Guard:
    def __init__(self, control: int, limits: "dict[str, float | None]"):
        self.control, self.limits = control, limits
        self.command = 0
        self.status: int | None = None
        self.alone = False

    def start(self, command: "list[str]") -> None:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        reader, self.writer = os.pipe()
        self.wake = reader
        os.set_blocking(self.writer, False)
        os.set_blocking(reader, False)
        # before the fork: a command that ends at once must wake the guard too
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        guard = os.getpid()
        self.command = os.fork()
        if self.command == 0:
            self._become(command, guard)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        # its own copies of the command's streams would keep them open
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else map(str, range(3, 256)):
            if int(name) not in (0, 1, 2, self.control, self.wake, self.writer):
                with suppress(OSError):
                    os.close(int(name))

    def _become(self, command: "list[str]", guard: int) -> None:
        """In the child: limits, a session of its own, the command."""
        try:
            os.setsid()
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guard:
                os._exit(1)
            for name, kind in RESOURCES.items():
                if (most := self.limits.get(name)) is not None:
                    hard = resource.getrlimit(kind)[1]
                    most = int(most) if hard == resource.RLIM_INFINITY else min(int(most), hard)
                    resource.setrlimit(kind, (most, most))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with suppress(OSError), open("/proc/self/oom_score_adj", "w") as chosen:  # Linux alone
                chosen.write(FIRST_TO_GO)
            os.set_inheritable(self.control, False)
            os.execvpe(command[0], command, os.environ)
        except OSError as error:
            os.write(2, f"cannot start `{command[0]}`: {error}\n".encode())
        finally:
            os._exit(127)

    def watch(self) -> "tuple[str, int]":
        """Until the command ends or has to. -> why, and its exit code (negative: a signal)."""
        time_s, most = self.limits.get("time_s"), self.limits.get("processes")
        events = select.poll()  # unlike select.select it takes descriptors over 1023, of which its owner may have many
        events.register(self.control, select.POLLIN)
        events.register(self.wake, select.POLLIN)
        ends = None if time_s is None else time.monotonic() + time_s
        while True:
            now = time.monotonic()
            waits = [] if ends is None else [max(0.0, ends - now)]
            waits += [COUNT_S] if most is not None else []
            ready = {fd for fd, _ in events.poll(1000 * min(waits) if waits else None)}
            if self.wake in ready:
                os.read(self.wake, 4096)
                self.reap()
            if self.status is not None:
                return ("exited" if self.status >= 0 else "signal"), self.status
            if self.control in ready:
                return "killed", 0
            if ends is not None and time.monotonic() >= ends:
                return "time", 0
            if most is not None and len(descendants(os.getpid())) > most:
                return "processes", 0

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.alone = True
                return
            if not pid:
                return
            if pid == self.command:
                self.status = os.waitstatus_to_exitcode(status)

    def end(self) -> None:
        """Nothing is below this process when it returns."""
        deadline = time.monotonic() + KILL_S
        while time.monotonic() < deadline:
            if self.status is None:
                try:
                    os.killpg(self.command, signal.SIGKILL)
                except OSError:
                    send(self.command, signal.SIGKILL)
            kill_below(os.getpid())
            self.reap()
            if self.alone:
                return
            time.sleep(0.002)


def main() -> None:
    control = int(sys.argv[1])
    os.set_inheritable(control, False)
    guard = Guard(control, json.loads(sys.argv[2]))
    try:
        guard.start(sys.argv[3:])
    except OSError as error:
        sys.exit(f"error: {sys.argv[3]} could not be started: {error.strerror}")

    def say(**said: object) -> None:
        try:
            os.write(control, json.dumps(said).encode() + b"\n")
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise

    say(pid=guard.command)
    reason, code = guard.watch()
    guard.end()
    say(reason=reason, code=code)


if __name__ == "__main__":
    main()
