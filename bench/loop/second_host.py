"""What a second host brings, when engines have a fixed rate: groups in a while with one host and with two.

    python bench/loop/second_host.py [--seconds 60] [--step-s 0.05] [--hosts 1 2 4]

Engines make up tokens, one every `--step-s` seconds for each of 8 requests, 40 a completion. Hub, engines and rollout
workers are those of the package (the engines those of its tests) in this process, and each host's worker asks the hub
through the relay of an agent, with that agent's token. Prints groups for each number of hosts and the ratio to one
host; exits 1 when two bring less than 1.95 times as many as one. A busy machine lowers the ratio once its cores are the
limit: `cores` is what this process used.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
import configs
from fake_engine import FakeEngine, FakeFetcher
from hub_tools import open_store
from rollout_world import Grader, Tokenizer, recipe
from shared import folder, options, show

from astracli.data.prompts import PromptSource
from astracli.engines.client import EngineClient
from astracli.envs import registry as envs
from astracli.envs.contract import EnvSetup
from astracli.envs.prompt_tokens import PromptTokens
from astracli.hub.agents import Agents
from astracli.hub.api import build_app
from astracli.hub.client import AsyncHubClient
from astracli.hub.store import HubStore
from astracli.launch.agent_relay import Beats, relay_app
from astracli.models.chat import ChatFormat
from astracli.process.config import EngineAddress
from astracli.process.ports import bind
from astracli.process.server import ServerThread
from astracli.process.worker import Reporter
from astracli.rollout.engine_worker import EngineWorker
from astracli.rollout.worker import Rollout
from astracli.weights.receive.host_cache import HostCache

TOKEN, VERSIONS, LENGTH = "run", {"astracli": "1"}, 40
ASKED = 1.95


def groups_of(store: HubStore) -> int:
    return store._leases.count("kept")


async def played(place: Path, hosts: int, args: Any) -> tuple[int, float]:
    """-> (groups, processor seconds in a second), after a completion's time."""
    store = open_store(
        place, batch_groups=10**5, max_staleness=1, steps=4, engines=tuple(f"engine{n}" for n in range(hosts))
    )
    names = [f"h{n}" for n in range(hosts)]
    agents = Agents(names, run="r", versions=VERSIONS, lease_s=600.0)
    hub = ServerThread(build_app(store, TOKEN, agents=agents), bind()).start()
    store.announce(0, 0)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(hub.stop)
        work = []
        for n, name in enumerate(names):
            joined = agents.join(name, agents.ticket(name), name, "127.0.0.1", [], dict(VERSIONS), {})
            cache = HostCache(hub.url, joined.token, place / name)
            stack.callback(cache.close)
            relay = ServerThread(relay_app(hub.url, joined.token, "host", cache, Beats()), bind()).start()
            stack.callback(relay.stop)
            engine = FakeEngine("host", length=LENGTH, step_s=args.step_s).start()
            stack.callback(engine.stop)
            work.append(await _worker(stack, place, n, relay.url, engine))
        tasks = [asyncio.ensure_future(worker.run()) for worker in work]
        await asyncio.sleep(2 * LENGTH * args.step_s)
        before, began, spent = groups_of(store), time.monotonic(), time.process_time()
        await asyncio.sleep(args.seconds)
        made, cores = groups_of(store) - before, (time.process_time() - spent) / (time.monotonic() - began)
        store.request_stop()
        await asyncio.wait(tasks, timeout=60)
    store.close()
    return made, cores


async def _worker(stack: contextlib.AsyncExitStack, place: Path, n: int, url: str, engine: FakeEngine) -> Rollout:
    name = f"rollout{n}"
    config = configs.rollout(
        name=name, run_dir=place, hub_url=url, token="host", recipe=recipe(), model_path=place, samples=None,
        engines=(EngineAddress(name=f"engine{n}", url=engine.url, stage_dir=place),),
    )  # fmt: skip
    hub = await stack.enter_async_context(AsyncHubClient(url, "host"))
    client = await stack.enter_async_context(EngineClient(engine.url, "host"))
    mode = config.recipe.weights.pause_mode
    worker = EngineWorker(f"engine{n}", client, hub, FakeFetcher(), process=name, mode=mode, ready_timeout_s=60.0)
    source, tokenizer = PromptSource(config.recipe.data, 5), Tokenizer()
    setup = EnvSetup(config.recipe, tokenizer, lambda problem: Grader(), PromptTokens(tokenizer, ChatFormat()))
    env = envs.find(config.recipe.rollout.env)(setup)
    return Rollout(config, Reporter(config), hub, [worker], source, env)


def main() -> None:
    args = options(__doc__, seconds=60.0, step_s=0.05, hosts=[1, 2]).parse_args()
    rows: list[dict[str, Any]] = []
    for hosts in args.hosts:
        with folder() as name:
            made, cores = asyncio.run(played(name, hosts, args))
        rows.append(
            {"hosts": hosts, "groups": made, "to_one": made / max(1, (rows or [{"groups": made}])[0]["groups"])}
        )
        rows[-1] |= {"cores": cores, "load": os.getloadavg()[0]}
    show(args, {"asked_of_two": ASKED, "rows": rows})
    sys.exit(any(row["hosts"] == 2 and row["to_one"] < ASKED for row in rows))


if __name__ == "__main__":
    main()
