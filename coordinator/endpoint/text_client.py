"""What vLLM's front may ask of an engine and a cluster that generates text answers the same way always."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError

from engine.errors import NoCapacity


class TextEngineClient(EngineClient):  # type: ignore[misc]  # vLLM ships no types
    """Healthy as long as its process lives; without pooling, LoRA, sleep, pause or a profiler of its own."""

    @property
    def is_running(self) -> bool:
        """Always: an endpoint without nodes says so request by request."""
        return True

    @property
    def is_stopped(self) -> bool:
        """Never while the process lives."""
        return False

    @property
    def errored(self) -> bool:
        """Never: engines fail on nodes."""
        return False

    @property
    def dead_error(self) -> BaseException:
        """What a dead engine would raise."""
        return NoCapacity("the cluster is gone")

    async def get_supported_tasks(self) -> tuple[Any, ...]:
        """Text generation."""
        return ("generate",)

    async def notify_kv_transfer_request_rejected(
        self, request_id: str, kv_transfer_params: dict[str, Any], *, data_parallel_rank: int | None = None
    ) -> None:
        """Clients' own KV transfers are refused, so there is nothing to clean up."""

    async def encode(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """Pooling models are not served."""
        raise VLLMValidationError("this cluster generates text; pooling models are not served")
        yield

    async def is_tracing_enabled(self) -> bool:
        """No OTLP tracing."""
        return False

    async def do_log_stats(self) -> None:
        """Metrics are scraped, not logged."""

    async def check_health(self) -> None:
        """The endpoint itself is alive if it answers; `/health/ready` asks the cluster."""

    async def start_profile(self, *args: Any, **kwargs: Any) -> None:
        """Engines run on nodes."""
        raise NotImplementedError("profile a node, not the endpoint")

    async def stop_profile(self) -> None:
        """Engines run on nodes."""
        raise NotImplementedError("profile a node, not the endpoint")

    async def reset_mm_cache(self) -> None:
        """Text only."""

    async def reset_encoder_cache(self) -> None:
        """Text only."""

    async def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Prefix caches belong to nodes."""
        return False

    async def sleep(self, *args: Any, **kwargs: Any) -> None:
        """Not offered over a cluster."""
        raise NotImplementedError("a cluster does not sleep")

    async def release_kv_cache_memory(self) -> None:
        """Not offered over a cluster."""
        raise NotImplementedError("a cluster does not release its KV cache")

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """Not offered over a cluster."""
        raise NotImplementedError("a cluster does not sleep")

    async def is_sleeping(self) -> bool:
        """Never."""
        return False

    async def add_lora(self, lora_request: Any) -> bool:
        """Not offered yet."""
        raise NotImplementedError("LoRA adapters are not served")

    async def pause_generation(self, **kwargs: Any) -> None:
        """Not offered over a cluster."""
        raise NotImplementedError("a cluster is not paused")

    async def resume_generation(self) -> None:
        """Not offered over a cluster."""
        raise NotImplementedError("a cluster is not paused")

    async def is_paused(self) -> bool:
        """Never."""
        return False
