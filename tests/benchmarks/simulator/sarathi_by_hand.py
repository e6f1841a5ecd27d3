"""Sarathi-Serve once more, slowly and plainly: no arrays, nothing compiled, nothing shared with the simulator
but the cost of a step. Memory and preemption as in vLLM (see `engine/virtual_kernel.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.cost import StepCost


@dataclass(eq=False)
class Seq:
    """A request: its lengths, what is computed of it, the blocks it holds, and when its tokens were made."""

    arrival_s: float
    prompt: int
    output: int
    computed: int = 0
    blocks: int = 0
    token_times_s: list[float] = field(default_factory=list)

    @property
    def known(self) -> int:
        return self.prompt + len(self.token_times_s)

    @property
    def decodes(self) -> bool:
        return self.known - self.computed == 1


@dataclass
class Sarathi:
    """One replica. `running` in the order in which they got in, `waiting` in the order in which they get in."""

    cost: StepCost
    budget: int
    max_seqs: int
    num_blocks: int
    block_tokens: int
    running: list[Seq] = field(default_factory=list)
    waiting: list[Seq] = field(default_factory=list)
    preemptions: int = 0

    def serve(self, requests: Sequence[tuple[float, int, int]]) -> list[Seq]:
        """All requests, from the first to the last token."""
        seqs = [Seq(*request) for request in requests]
        coming = sorted(seqs, key=lambda seq: seq.arrival_s)
        now_s = 0.0
        while coming or self.running or self.waiting:
            while coming and coming[0].arrival_s <= now_s:
                self.waiting.append(coming.pop(0))
            if not self.running and not self.waiting:
                now_s = coming[0].arrival_s
                continue
            batch = self._batch(self._plan())
            if batch:
                now_s += self._seconds(batch)
                self._end(batch, now_s)
        return seqs

    def _plan(self) -> list[tuple[Seq, int]]:
        """Who may have how many tokens: decodes one, then prompts in order what is left of the budget."""
        decodes = [(seq, 1) for seq in self.running if seq.decodes]
        left = self.budget - len(decodes)
        prompts = []
        for seq in [seq for seq in self.running if not seq.decodes] + self.waiting:
            chunk = max(min(seq.known - seq.computed, left), 0)
            left -= chunk
            prompts.append((seq, chunk))
        return decodes + prompts

    def _batch(self, plan: list[tuple[Seq, int]]) -> list[tuple[Seq, int]]:
        """Those that get their blocks: running ones at the cost of the last one, waiting ones in order."""
        order = [seq for seq, _ in plan if seq in self.running]
        batch, preempted = [], False
        for seq, chunk in plan:
            if seq not in order or seq not in self.running or chunk == 0:
                continue
            while seq in self.running and self._needs(seq, chunk) > self._free():
                victim = [other for other in order if other in self.running][-1]
                batch = [(other, tokens) for other, tokens in batch if other is not victim]
                self._preempt(victim)
                preempted = True
            if seq in self.running:
                seq.blocks += max(self._needs(seq, chunk), 0)
                batch.append((seq, chunk))
        for seq, chunk in plan:
            if seq in order or chunk == 0 or preempted:
                continue
            if len(self.running) >= self.max_seqs or self._blocks(seq.known) > self._free():
                break
            self.waiting.remove(seq)
            self.running.append(seq)
            seq.blocks += self._needs(seq, chunk)
            batch.append((seq, chunk))
        return batch

    def _preempt(self, seq: Seq) -> None:
        self.running.remove(seq)
        self.waiting.insert(0, seq)
        seq.computed = seq.blocks = 0
        self.preemptions += 1

    def _end(self, batch: list[tuple[Seq, int]], now_s: float) -> None:
        for seq, chunk in batch:
            seq.computed += chunk
            if seq.computed == seq.known:
                seq.token_times_s.append(now_s)
                if len(seq.token_times_s) == seq.output:
                    self.running.remove(seq)
                    seq.blocks = 0

    def _seconds(self, batch: list[tuple[Seq, int]]) -> float:
        decodes = [seq for seq, chunk in batch if chunk == 1 and seq.computed > 0]
        prompts = [(seq, chunk) for seq, chunk in batch if seq not in decodes]
        return self.cost.predict(
            sum(chunk for _, chunk in batch),
            seqs=len(batch),
            context_tokens=sum(seq.computed for seq in decodes),
            prefill_work=sum(chunk * (seq.computed + chunk / 2) for seq, chunk in prompts),
            prefill_kv_tokens=sum(seq.computed for seq, _ in prompts),
        )

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _needs(self, seq: Seq, chunk: int) -> int:
        return self._blocks(seq.computed + chunk) - seq.blocks

    def _free(self) -> int:
        return self.num_blocks - sum(seq.blocks for seq in self.running)
