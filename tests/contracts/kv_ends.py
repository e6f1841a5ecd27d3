"""The two ends of a KV transfer as the contract suite drives them: the fake, NIXL, and virtual engines."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from engine.base import UNPLANNED, Work
from engine.virtual import VirtualEngine
from kv_transfer.base import Handoff, Lease, Link, Pull, PullOutcome
from kv_transfer.fake import FakeFabric, Faults, ManualClock
from tests.contracts.engine_process import EngineProcess
from tests.contracts.paged_engine import PagedConfig, PagedEngine, expected_tokens
from tests.engine.virtual_replica import Stage

LEASE_S = 3.0
DEADLINE_S = 15.0  # far away: only rows about deadlines come near one


class Ends(ABC):
    """A source and a target. Requests are named; a request has the same prompt on both ends."""

    @abstractmethod
    def offer(self, request_id: str, num_tokens: int = 2000) -> Handoff:
        """Prefill at the source and offer."""

    @abstractmethod
    def begin_pull(self, request_id: str, handoff: Handoff, deadline_s: float = DEADLINE_S) -> None:
        """Let the target begin to pull, and not look at what has become of it."""

    @abstractmethod
    def end_pull(self, request_id: str) -> Pull:
        """Step the target until the pull has an outcome."""

    @abstractmethod
    def go_on(self, request_id: str) -> None:
        """Let the target go on with the request: recompute what was not pulled, and say a first token."""

    @abstractmethod
    def is_right(self, request_id: str) -> bool:
        """Whether the target says what the prompt gives, up to the end of the request."""

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Cancel at the target."""

    @abstractmethod
    def release(self, request_id: str) -> bool:
        """Release at the source, by the node."""

    @abstractmethod
    def leases(self) -> list[Lease]:
        """Leases at the source."""

    @abstractmethod
    def probe(self) -> Link:
        """The link to the target."""

    @abstractmethod
    def reuse_source_blocks(self) -> None:
        """Let the source free what it may, and write into every free block."""

    @abstractmethod
    def flip_a_bit(self, handoff: Handoff) -> None:
        """Let a bit of what the source has on offer flip."""

    @abstractmethod
    def shorten_transfers(self, short: bool) -> None:
        """Let the last block of every transfer not come, or come again."""

    @abstractmethod
    def wait(self, seconds: float) -> None:
        """Let time pass."""

    @abstractmethod
    def stop_source(self) -> None:
        """The source stops, as by SIGSTOP."""

    @abstractmethod
    def wake_source(self) -> None:
        """It goes on where it stopped."""

    @abstractmethod
    def kill_source(self) -> None:
        """The source is gone."""

    @abstractmethod
    def restart_source(self) -> None:
        """A new engine in its place."""

    @abstractmethod
    def used_blocks(self) -> tuple[int, int]:
        """Blocks in use at the source (0 if it is dead) and at the target, once both have nothing to do."""

    @abstractmethod
    def held_blocks(self) -> int:
        """Blocks that the target keeps apart."""

    def pull(self, request_id: str, handoff: Handoff, deadline_s: float = DEADLINE_S) -> Pull:
        """Begin and end a pull."""
        self.begin_pull(request_id, handoff, deadline_s)
        return self.end_pull(request_id)


class FakeEnds(Ends):
    """Over the fake."""

    def __init__(self) -> None:
        self._clock = ManualClock()
        self._fabric = FakeFabric(self._clock, latency_s=1e-3, bytes_per_s=1e9)
        self._restarts = 0
        self._kv: dict[str, list[bytes]] = {}
        self._pulled: dict[str, bool] = {}
        self._target = self._fabric.port("target", num_blocks=256, block_tokens=32)
        self.restart_source()

    def restart_source(self) -> None:
        self._restarts += 1
        self._source = self._fabric.port(
            f"source-{self._restarts}", num_blocks=256, block_tokens=32, lease_s=LEASE_S
        )

    def offer(self, request_id: str, num_tokens: int = 2000) -> Handoff:
        self._kv[request_id] = _stamps(request_id, num_tokens)
        self._source.compute(request_id, self._kv[request_id])
        return self._source.offer(request_id, num_tokens)

    def begin_pull(self, request_id: str, handoff: Handoff, deadline_s: float = DEADLINE_S) -> None:
        self._kv.setdefault(request_id, _stamps(request_id, handoff.num_tokens))
        self._target.start_pull(request_id, handoff, deadline_s)
        self._clock.advance(3e-3)
        self._target.step()

    def end_pull(self, request_id: str) -> Pull:
        for _ in range(20000):
            if pulls := self._target.take_pulls():
                assert [pull.request_id for pull in pulls] == [request_id]
                self._pulled[request_id] = pulls[0].outcome is PullOutcome.PULLED
                return pulls[0]
            self._clock.advance(1e-3)
            self._target.step()
        raise TimeoutError(f"the pull of {request_id} did not end")

    def go_on(self, request_id: str) -> None:
        if not self._pulled[request_id]:
            self._target.compute(request_id, self._kv[request_id])
            self._pulled[request_id] = True

    def is_right(self, request_id: str) -> bool:
        self.go_on(request_id)
        right = self._target.kv(request_id) == self._kv[request_id]
        self._target.free(request_id)
        return right

    def cancel(self, request_id: str) -> None:
        self._target.free(request_id)

    def release(self, request_id: str) -> bool:
        return self._source.release(request_id)

    def leases(self) -> list[Lease]:
        return self._source.leases()

    def probe(self) -> Link:
        return self._target.probe(self._source.address())

    def reuse_source_blocks(self) -> None:
        self._source.step()
        free = len(self._source.blocks) - self._source.used_blocks
        self._source.compute("other", [b"other"] * free)
        self._source.free("other")

    def flip_a_bit(self, handoff: Handoff) -> None:
        block = self._source.offered(handoff.request_id)[-1]
        content = self._source.blocks[block]
        self._source.blocks[block] = content[:-1] + bytes([content[-1] ^ 1])

    def shorten_transfers(self, short: bool) -> None:
        self._source.faults = Faults(short=short)

    def wait(self, seconds: float) -> None:
        self._clock.advance(seconds)

    def stop_source(self) -> None:
        self._source.faults = Faults(stalled=True)

    def wake_source(self) -> None:
        self._source.faults = Faults()

    def kill_source(self) -> None:
        self._source.faults = Faults(source_dead=True)

    def used_blocks(self) -> tuple[int, int]:
        for _ in range(20):
            self._clock.advance(1e-3)
            self._target.step()
            self._source.step()
        used = 0 if self._source.faults.source_dead else self._source.used_blocks
        return used, self._target.used_blocks

    def held_blocks(self) -> int:
        return self._target.held_blocks()


def _stamps(request_id: str, num_tokens: int) -> list[bytes]:
    return [f"{request_id}:{block}".encode() for block in range(-(-num_tokens // 32))]


class NixlEnds(Ends):
    """Over NIXL: two processes, each with vLLM's scheduler, our connector and real memory."""

    def __init__(self, base_port: int) -> None:
        self._port = base_port
        self._target = EngineProcess(PagedEngine, PagedConfig("target", base_port, LEASE_S))
        self._source: EngineProcess | None = None
        self._restarts = 0
        self.restart_source()

    def restart_source(self) -> None:
        # The same address every time: the target must not take the new engine for the old one.
        self._restarts += 1
        self._source = EngineProcess(
            PagedEngine, PagedConfig(f"source-{self._restarts}", self._port + 1, LEASE_S)
        )
        for process in (self._target, self._source):
            process.ready()
        # The first contact of a pair costs a handshake: not what the rows below are about.
        self.probe()

    def close(self) -> None:
        for process in (self._target, self._source):
            if process is not None:
                process.kill()

    @property
    def _alive(self) -> EngineProcess:
        assert self._source is not None
        return self._source

    def offer(self, request_id: str, num_tokens: int = 2000) -> Handoff:
        handoff: Handoff = self._alive.call("offer", request_id, _prompt(request_id, num_tokens))
        self._alive.call("step")
        return handoff

    def begin_pull(self, request_id: str, handoff: Handoff, deadline_s: float = DEADLINE_S) -> None:
        prompt = _prompt(request_id, handoff.num_tokens)
        self._target.call("submit_pull", request_id, prompt, handoff, deadline_s)
        self._target.call("step", False)

    def end_pull(self, request_id: str) -> Pull:
        for _ in range(20000):
            pulls: list[Pull] = self._target.call("take_pulls")
            if pulls:
                assert [pull.request_id for pull in pulls] == [request_id]
                return pulls[0]
            self._target.call("step")
        raise TimeoutError(f"the pull of {request_id} did not end")

    def go_on(self, request_id: str) -> None:
        self._step_to(request_id, num_tokens=1)

    def is_right(self, request_id: str) -> bool:
        tokens = self._step_to(request_id, num_tokens=2)
        return tokens == expected_tokens(self._target.call("prompt", request_id))

    def _step_to(self, request_id: str, num_tokens: int) -> list[int]:
        for _ in range(100):
            tokens: list[int] = self._target.call("tokens", request_id)
            if len(tokens) >= num_tokens:
                return tokens
            self._target.call("step")
        raise TimeoutError(f"{request_id} did not go on")

    def cancel(self, request_id: str) -> None:
        self._target.call("abort", request_id)

    def release(self, request_id: str) -> bool:
        return bool(self._alive.call("release", request_id))

    def leases(self) -> list[Lease]:
        leases: list[Lease] = self._alive.call("leases")
        return leases

    def probe(self) -> Link:
        link: Link = self._target.call("probe", self._alive.call("address"))
        return link

    def reuse_source_blocks(self) -> None:
        for _ in range(3):
            self._alive.call("step")
        self._alive.call("overwrite_free_blocks")

    def flip_a_bit(self, handoff: Handoff) -> None:
        self._alive.call("flip_a_bit", handoff.params["remote_block_ids"][0][-1])

    def shorten_transfers(self, short: bool) -> None:
        self._target.call("shorten_reads", short)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def stop_source(self) -> None:
        self._alive.stop()

    def wake_source(self) -> None:
        self._alive.wake()

    def kill_source(self) -> None:
        self._alive.kill()
        self._source = None

    def used_blocks(self) -> tuple[int, int]:
        ends = [self._target] if self._source is None else [self._source, self._target]
        for _ in range(200):
            for end in ends:
                end.call("step")
            if not any(end.call("has_work") for end in ends):
                break
        used = [int(end.call("used_blocks")) for end in ends]
        return (used[0], used[-1]) if len(ends) == 2 else (0, used[0])

    def held_blocks(self) -> int:
        return int(self._target.call("held_blocks"))


class VirtualEnds(Ends):
    """Two virtual engines on a clock that is moved by hand. What the target says is right if it says the same
    as an engine that got nothing handed over."""

    def __init__(self) -> None:
        self._stage = Stage(latency_s=1e-3, bytes_per_s=1e8)
        self._target = self._engine("target")
        self._judge = self._engine("judge")
        self._restarts = 0
        self._said: dict[str, list[int]] = {}
        self._prompts: dict[str, list[int]] = {}
        self.restart_source()

    def _engine(self, engine_id: str) -> VirtualEngine:
        # No caches: every row is about bytes that move.
        sizes = {"kv_tokens": 256 * 32, "max_model_len": 4096, "max_batch_tokens": 4096}
        return self._stage.engine(engine_id, lease_s=LEASE_S, enable_prefix_caching=False, **sizes)

    def restart_source(self) -> None:
        self._restarts += 1
        self._source: VirtualEngine | None = self._engine(f"source-{self._restarts}")

    @property
    def _alive(self) -> VirtualEngine:
        assert self._source is not None
        return self._source

    def offer(self, request_id: str, num_tokens: int = 2000) -> Handoff:
        self._alive.submit(Work(request_id, _prompt(request_id, num_tokens), b"", 1, offer_kv=True))
        (output,) = self._alive.step(lambda _: UNPLANNED).outputs
        assert output.handoff is not None
        return output.handoff

    def begin_pull(self, request_id: str, handoff: Handoff, deadline_s: float = DEADLINE_S) -> None:
        self._prompts[request_id] = _prompt(request_id, handoff.num_tokens)
        self._said[request_id] = []
        pulling = Work(
            request_id, self._prompts[request_id], b"", 2, handoff=handoff, pull_deadline_s=deadline_s
        )
        self._target.submit(pulling)
        self._step()

    def _step(self) -> None:
        for output in self._target.step(lambda _: UNPLANNED).outputs:
            self._said[output.work_id] += output.token_ids

    def end_pull(self, request_id: str) -> Pull:
        for _ in range(20000):
            if pulls := self._target.kv.take_pulls():
                assert [pull.request_id for pull in pulls] == [request_id]
                return pulls[0]
            self._stage.clock.advance(1e-3)
            self._step()
        raise TimeoutError(f"the pull of {request_id} did not end")

    def go_on(self, request_id: str) -> None:
        self._say(request_id, 1)

    def is_right(self, request_id: str) -> bool:
        self._say(request_id, 2)
        self._judge.submit(Work(request_id, self._prompts[request_id], b"", 2))
        expected: list[int] = []
        while self._judge.has_work():
            for output in self._judge.step(lambda _: UNPLANNED).outputs:
                expected += output.token_ids
        return self._said[request_id] == expected

    def _say(self, request_id: str, tokens: int) -> None:
        for _ in range(100):
            if len(self._said[request_id]) >= tokens:
                return
            self._step()
        raise TimeoutError(f"{request_id} did not go on")

    def cancel(self, request_id: str) -> None:
        self._target.cancel([request_id])

    def release(self, request_id: str) -> bool:
        return self._alive.kv.release(request_id)

    def leases(self) -> list[Lease]:
        return self._alive.kv.leases()

    def probe(self) -> Link:
        return self._target.kv.probe(self._alive.kv.address())

    def reuse_source_blocks(self) -> None:
        self._alive.step(lambda _: UNPLANNED)

    def flip_a_bit(self, handoff: Handoff) -> None:
        self._alive.kv.corrupt.add(handoff.request_id)

    def shorten_transfers(self, short: bool) -> None:
        self._alive.kv.short = short

    def wait(self, seconds: float) -> None:
        self._stage.clock.advance(seconds)

    def stop_source(self) -> None:
        self._alive.kv.stalled = True

    def wake_source(self) -> None:
        self._alive.kv.stalled = False

    def kill_source(self) -> None:
        self._alive.stop()
        self._source = None

    def used_blocks(self) -> tuple[int, int]:
        ends = [self._target] if self._source is None else [self._source, self._target]
        for _ in range(50):
            self._stage.clock.advance(1e-3)
            self._step()
            if self._source is not None:
                self._source.step(lambda _: UNPLANNED)
        used = [end.usage().used_blocks for end in ends]
        return (used[0], used[-1]) if len(ends) == 2 else (0, used[0])

    def held_blocks(self) -> int:
        return self._target.kv.held_blocks()


def _prompt(request_id: str, num_tokens: int) -> list[int]:
    start = sum(request_id.encode())
    return [(start + 13 * position) % 1000 for position in range(num_tokens)]
