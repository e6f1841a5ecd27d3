"""An endpoint process: `python -m coordinator.endpoint.serve RUN_DIR INDEX`.

Prints lines of JSON about its start: {"event": "endpoint", ...}, then {"event": "ready", "url": ...} once it
takes requests, or {"event": "failed", "error": ...}.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import uuid
from argparse import Namespace
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import zmq.asyncio

from coordinator.config import ClusterConfig
from engine.cost import StepCost
from engine.dtype import dtype_here
from engine.errors import SlosserveError

READY_POLL_S = 0.2
KEEP_ALIVE_S = 75  # longer than clients do: one that sends as we hang up sees a broken connection


def front_arguments(config: ClusterConfig, model: str, port: int) -> list[str]:
    """Arguments for vLLM's own front; the engine's are those of the nodes, so that both check alike."""
    engine = config.engine
    arguments = [
        f"--model={model}",
        f"--served-model-name={config.served_model_name or config.model}",
        f"--dtype={dtype_here(config.dtype, on_cpu=engine.num_gpus == 0)}",
        f"--host={config.endpoint.host}",
        f"--port={port}",
        f"--max-num-seqs={engine.max_num_seqs}",
        f"--max-num-batched-tokens={engine.max_batch_tokens}",
        "--generation-config=vllm",
        '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
        "--enable-prompt-tokens-details",
    ]
    if engine.max_model_len is not None:
        arguments.append(f"--max-model-len={engine.max_model_len}")
    if config.endpoint.tool_call_parser:
        arguments += ["--enable-auto-tool-choice", f"--tool-call-parser={config.endpoint.tool_call_parser}"]
    if config.endpoint.reasoning_parser:
        arguments.append(f"--reasoning-parser={config.endpoint.reasoning_parser}")
    if config.endpoint.api_key:
        arguments.append(f"--api-key={config.endpoint.api_key}")
    return arguments


def say(event: str, **details: Any) -> None:
    """One line of progress for the parent."""
    print(json.dumps({"event": event, **details}), flush=True)


async def serve(run_dir: Path, index: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = ClusterConfig.read(run_dir)
    say("endpoint", index=index, state="loading")
    args, vllm_config = _front(config, config.endpoint.port + index)

    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    from coordinator.endpoint.context import RequestContextMiddleware
    from coordinator.endpoint.engine import ClusterEngine
    from coordinator.endpoint.links import CoordinatorLink, NodeLinks
    from coordinator.endpoint.routes import add_routes

    context = zmq.asyncio.Context()
    identity = f"endpoint-{index}-{uuid.uuid4().hex[:8]}"
    coordinator = CoordinatorLink(context, identity, run_dir, wait_s=config.timeouts.place_s)
    engine = ClusterEngine(config, vllm_config, coordinator)
    app = build_app(args, ("generate",), engine.model_config)
    await init_app_state(engine, app.state, args, ("generate",))
    add_routes(app, engine, coordinator, config.endpoint.admin_key)
    say("endpoint", index=index, state="waiting for nodes")
    await coordinator.connect()
    links = NodeLinks(
        context,
        identity,
        engine,
        silent_s=config.timeouts.node_silent_s,
        stuck_limit_s=config.timeouts.stuck_step_s,
    )
    engine.connect(links, await _idle_cost(coordinator))
    most_open = config.endpoint.max_waiting
    at_door = engine.turned_away_at_door
    front = RequestContextMiddleware(app, config.slo_classes, config.endpoint.api_key, most_open, at_door)
    await _listen(front, config, index)
    engine.shutdown()
    coordinator.close()
    context.destroy(linger=0)


def _front(config: ClusterConfig, port: int) -> tuple[Namespace, Any]:
    """vLLM's own arguments and configuration, as its server would make them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from engine.models import resolve_model

    parser = make_arg_parser(FlexibleArgumentParser())
    # No engine is here: what one would compile need not be worked out.
    args = parser.parse_args([*front_arguments(config, resolve_model(config.model), port), "--enforce-eager"])
    engine_args = AsyncEngineArgs.from_cli_args(args)
    return args, engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)


async def _idle_cost(coordinator: Any) -> StepCost:
    """The step-time model of an idle replica, once a node is there to have measured it."""
    while True:
        try:
            body = await coordinator.query("idle_cost")
        except SlosserveError:
            body = {}
        if body:
            return msgspec.convert(body, StepCost)
        await asyncio.sleep(READY_POLL_S)


async def _listen(app: Any, config: ClusterConfig, index: int) -> None:
    host, port = config.endpoint.host, config.endpoint.port + index
    settings = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(settings)
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        gc.collect()
        gc.freeze()
        bound = server.servers[0].sockets[0].getsockname()[1]
        say("ready", index=index, url=f"http://{host}:{bound}")
    await serving


def main() -> None:
    """Entry point."""
    run_dir, index = Path(sys.argv[1]), int(sys.argv[2])
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    import uvloop

    with contextlib.suppress(KeyboardInterrupt):
        try:
            uvloop.run(serve(run_dir, index))
        except SystemExit:
            raise
        except BaseException as error:
            say("failed", error=f"endpoint {index}: {error}")
            raise


if __name__ == "__main__":
    main()
