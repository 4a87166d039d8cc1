"""The report page in headless Chromium: `python bench/loop/report_page.py [RUN ...] [--shots DIR]`.

Without RUN it makes up a run of 1,000 steps and 20,000 samples. Prints for each page its size, the time from navigation
to the last curve and the first samples, console errors, and whether every filter leaves what it should. With --shots it
writes PNGs at 1440 and 390 px, light and dark. Needs `chromium` (Debian: apt-get install chromium).
"""

from __future__ import annotations

import json
import math
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from astracli.config import recipe_io
from astracli.process import ports
from astracli.process.server import ServerThread
from astracli.report.page import html as report_html
from astracli.runs.run_dir import RunDir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, show

CHROMIUM = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
PROBE_HEAD = "<script>window.seen=[];addEventListener('error',e=>seen.push(e.message));"
PROBE_HEAD += "const say=console.error;console.error=(...a)=>{seen.push(a.join(' '));say(...a)};"
PROBE_HEAD += "addEventListener('unhandledrejection',e=>seen.push(String(e.reason)))</script>"
PROBE = """<script>(async () => {
  while (!document.documentElement.dataset.ready && !seen.length) await new Promise(done => setTimeout(done, 5));
  const ms = performance.now(), f = document.getElementById('filters').elements, checks = {};
  const names = {verdict: 'verdict', benchmark: 'benchmark', finish: 'finish_reason'};
  for (const name in names) for (const option of [...f[name].options].slice(1)) {
    f[name].value = option.value; apply();
    const real = view.s[names[name]].filter(p => (view.s.texts[p] || 'rollout') === option.value).length;
    checks[name + ' ' + option.value] = view.found.length === real && real > 0;
    f[name].value = ''; apply();
  }
  const middle = Math.max(...view.s.step) >> 1;
  f.low.value = f.high.value = middle; apply();
  checks['one step'] = view.found.every(i => view.s.step[i] === middle)
    && view.found.length === view.s.step.filter(s => s === middle).length;
  f.low.value = f.high.value = '';
  f.text.value = text('problem', 0).slice(0, 12); apply();
  checks['text'] = view.found.includes(0) && view.found.length < view.s.step.length;
  f.text.value = 'no such text anywhere'; apply();
  checks['text without a match'] = view.found.length === 0 && document.querySelectorAll('.sample').length === 0;
  f.text.value = ''; f.order.value = 'long'; apply();
  checks['longest first'] = view.s.length[view.found[0]] === Math.max(...view.s.length);
  f.order.value = 'none'; apply();
  const coloured = () => [...document.querySelectorAll('.completion span')].filter(s => s.style.background).length;
  const counts = ['logprob', 'advantage', 'none'].map(c => { f.colour.value = c; apply(); return coloured(); });
  checks['colours'] = counts[0] > 0 && counts[1] > 0 && counts[2] === 0;
  document.getElementById('after').click();
  checks['next page'] = view.page === 1 && document.querySelectorAll('.sample').length > 0;
  checks['no sideways scroll'] = document.documentElement.scrollWidth <= innerWidth;
  checks['curves'] = document.querySelectorAll('#curves svg').length === data.curves.length;
  await fetch('/probe', {method: 'POST', body: JSON.stringify({ms, checks, seen})});
})()</script>"""


def made_up(path: Path, steps: int = 1000, samples: int = 20_000) -> RunDir:
    """A run directory of that size with curves that move and completions of 10 to 60 tokens of the tiny model."""
    draw = random.Random(0)
    (path / "samples").mkdir(parents=True)
    (path / "eval").mkdir()
    run = RunDir(path)
    run.recipe_json.write_text(recipe_io.to_json(recipe_io.load("qwen3.5-tiny-m2po-delta")))
    run.start(recipe="made-up", steps=steps)
    run.update(step=steps)
    run.end("done", exit_code=0)
    names = [
        "reward_mean", "arrived_reward_mean", "kl", "staleness_mean", "ratio_mean", "clip_fraction", "entropy", "loss",
    ]  # fmt: skip
    names += [
        "completion_tokens_mean", "grad_norm", "grad_norm_max", "lr", "wait_s", "forward_s", "backward_s", "step_s",
    ]  # fmt: skip
    rows = ["step,version,benchmark,items,n,avg_at_n,stderr,k,pass_at_k"]
    with run.metrics_jsonl.open("w") as file:
        for step in range(steps):
            level = 1 - math.exp(-step / 300)
            record = {name: level * (i + 1) + draw.gauss(0, 0.1) for i, name in enumerate(names)} | {"step_s": 60.0}
            file.write(json.dumps({"step": step, "process": "trainer"} | record) + "\n")
            update = {
                "engine": "engine0", "pause_s": draw.uniform(0.03, 0.09), "fetched_bytes": 447_000, "kind": "delta",
            }  # fmt: skip
            file.write(json.dumps({"step": step + 1, "process": "rollout", "kind": "delta"} | update) + "\n")
            if step % 10 == 0:
                rows += [
                    f"{step},{step},{name},256,8,{level * 0.9:.4f},0.012,4,{level:.4f}"
                    for name in ("a", "b", "overall")
                ]
    run.eval_csv.write_text("\n".join(rows) + "\n")
    for step in range(steps):
        with (path / "samples" / f"step_{step:06d}.jsonl").open("w") as file:
            for i in range(samples // steps):
                length, a, b = draw.randint(10, 60), draw.randint(10, 999), draw.randint(10, 999)
                line = {
                    "step": step, "version": step, "problem_id": f"add3:{a}+{b}",
                    "problem": f"{a}+{b}", "answer": str(a + b),
                    "sample": i % 8, "completion": "", "tokens": [draw.randint(2, 20) for _ in range(length)],
                    "logprobs": [-round(draw.expovariate(4), 6) for _ in range(length)], "advantage": draw.gauss(0, 1),
                    "reward": 1.0, "verdict": draw.choice(["right", "wrong", "no_answer"]),
                    "finish_reason": draw.choice(["stop", "stop", "length"]),
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
    return run


def probe(page: Path, folder: Path, width: int) -> dict[str, Any]:
    """What the probe saw at a window width; the page comes from a server here, which also takes the probe's word."""
    text = page.read_text().replace("<head>", "<head>" + PROBE_HEAD, 1).replace("</body>", PROBE + "</body>")
    answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    async def took(request: Request) -> Response:
        answers.put(await request.json())
        return Response()

    routes = [Route("/", lambda _: HTMLResponse(text)), Route("/probe", took, methods=["POST"])]
    server = ServerThread(Starlette(routes=routes), ports.bind("127.0.0.1")).start()
    options = [f"--user-data-dir={folder / f'profile{width}'}", f"--window-size={width},900", server.url]
    browser = subprocess.Popen(
        ["chromium", *CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return answers.get(timeout=90)
    except queue.Empty:
        sys.exit(f"the page never got ready at {width} px")
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
        server.stop()


def shoot(page: Path, folder: Path, profile: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for width, height in ((1440, 3800), (390, 6400)):
        for theme in ("light", "dark"):
            target = folder / f"{page.parent.name}-{width}-{theme}.png"
            options = [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={target}"]
            subprocess.run(
                ["chromium", *CHROMIUM, *options, "--virtual-time-budget=4000", f"file://{page}#{theme}"],
                capture_output=True, timeout=120, check=True,
            )  # fmt: skip
            print(f"wrote {target}")


def main() -> None:
    parser = options(__doc__, shots=Path)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    args = parser.parse_args()
    if shutil.which("chromium") is None:
        sys.exit("chromium is not installed: apt-get install chromium")
    rows: list[dict[str, Any]] = []
    with folder() as name:
        runs = [RunDir(path.resolve()) for path in args.runs] or [made_up(name / "made-up-1000-steps")]
        for run in runs:
            page = report_html.write(run).resolve()
            for width in (1440, 390):
                seen = probe(page, name, width)
                bad = [check for check, good in seen["checks"].items() if not good] + seen["seen"]
                row = {"run": run.name, "mb": page.stat().st_size / 1e6, "width_px": width, "open_s": seen["ms"] / 1e3}
                rows.append(row | {"checks": len(seen["checks"]), "failed": bad})
            if args.shots:
                shoot(page, args.shots, name / "profile")
    show(args, {"rows": rows})
    sys.exit(1 if any(row["failed"] for row in rows) else 0)


if __name__ == "__main__":
    main()
