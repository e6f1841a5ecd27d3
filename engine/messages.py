"""Messages between processes: one frozen dataclass each, versioned, encoded with msgpack.

On the wire a message is two frames: `name/version` and its body. A receiver that does not know the name or the
version raises ProtocolError: it never guesses. Every message about a request carries the attempt it belongs
to. Durations travel, clock readings never do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec

from engine.base import EngineInfo, Usage
from engine.cost import StepCost
from engine.errors import ProtocolError
from engine.prefix_log import PrefixChanges
from engine.request import Pace, RoleName, WorkKind
from engine.tally import Tally
from kv_transfer.base import Handoff, Lease, Link, PeerAddress, Pull

VERSION = 11
TELL_EVERY_S = 0.02  # a node tells of batches as they begin; of one that lasts longer, always


# ---- to a node -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Watch:
    """A peer is alive, and wants `Alive` (endpoints) or `Report` (coordinators) in return."""

    reports: bool


@dataclass(frozen=True, slots=True)
class Submit:
    """Work for a node. It answers with deltas, or declines within a step.

    `think_end_id`: the token with which thinking ends, and another pace begins, if the pace has one. `session`:
    its KV is kept for the next call of that session, for a while, where it ends. `said_token_ids`: its answer
    so far, from attempts before this one, which goes on after them; `max_tokens` counts them, `index` too.
    """

    request_id: str
    attempt: int
    kind: WorkKind
    prompt_token_ids: list[int]
    sampling: bytes
    max_tokens: int
    pace: Pace
    class_name: str = ""
    cached_tokens: int = 0  # of the prompt: their KV is believed to be there
    cache_salt: str | None = None
    handoff: Handoff | None = None
    pull_deadline_s: float = 10.0
    think_end_id: int | None = None
    session: str | None = None
    said_token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop an attempt, whatever its phase, with any KV it offers.

    `ended`: it has said all that its client wants (a stop string), and is a part of its session's history.
    """

    request_id: str
    attempt: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """End the lease on the KV that an attempt offered."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Promote:
    """What was taken as best effort is promised from now on. Not answered: reports show it."""

    request_id: str
    attempt: int
    pace: Pace


@dataclass(frozen=True, slots=True)
class Credit:
    """The sender can take this many more `Deltas`."""

    messages: int


@dataclass(frozen=True, slots=True)
class SetRole:
    """Change the role of a node. Running work goes on; what was placed there before is taken for a while."""

    call_id: int
    role: RoleName


@dataclass(frozen=True, slots=True)
class ListSessions:
    """For whom does a node keep KV?"""

    call_id: int


@dataclass(frozen=True, slots=True)
class ListPrefixes:
    """What has changed in the prefix cache of a node since this version?"""

    call_id: int
    since: int


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Nobody will call again: keep nothing for it. Not answered."""

    session: str


@dataclass(frozen=True, slots=True)
class ProbeLinks:
    """Measure the link from each of these peers to the node."""

    call_id: int
    peers: list[PeerAddress]


# ---- from a node -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alive:
    """Answer to an endpoint's `Watch`. `stuck_s`: how long the present step has been running."""

    node: str
    stuck_s: float


@dataclass(frozen=True, slots=True)
class Declined:
    """The node will not take this attempt; place it again."""

    request_id: str
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Where an attempt's time went on a node, in seconds since it got there."""

    queued_s: float  # until its first batch
    first_token_s: float
    pull_s: float | None = None
    pull_outcome: str | None = None
    pulled_bytes: int = 0


@dataclass(slots=True)
class Account:
    """What a node did for an attempt, told with its end.

    It had tokens in `batches`, in `chunks` of them tokens of its prompt; `held`: batches that it was left out
    of though it had its memory. `preempted`: times it lost that.
    """

    batches: int = 0
    chunks: int = 0
    held: int = 0
    preempted: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Delta(msgspec.Struct, frozen=True):
    """What one step gave one attempt. `index`: how many tokens of the request went before.

    A Struct, as one is made per token: eight times quicker to make than a dataclass.
    """

    request_id: str
    attempt: int
    index: int
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    payload: bytes | None = None
    cached_tokens: int | None = None
    handoff: Handoff | None = None
    error: str | None = None
    error_status: int = 500  # 400: the request itself cannot be served anywhere; else try elsewhere
    timing: Timing | None = None
    account: Account | None = None


@dataclass(frozen=True, slots=True)
class Deltas:
    """All that one step gave to one endpoint."""

    node: str
    items: list[Delta]


@dataclass(slots=True)
class WorkState:
    """A promise as the node that keeps it sees it. Not frozen, to be made quickly: reports are full of them."""

    request_id: str
    attempt: int
    kind: WorkKind
    prompt_tokens: int
    prefill_left_tokens: int
    output_tokens: int
    max_tokens: int
    first_token_left_s: float
    tpot_s: float
    best_effort: bool
    class_name: str = ""
    next_due_left_s: float | None = None  # until its next token is due; None before the first
    acceptance: float | None = None  # chance that a token drafted for it is right; None: none are drafted


@dataclass(frozen=True, slots=True)
class Report:
    """A node's own account of itself: role, promises, leases, progress, and what steps cost.

    One that is made as a batch begins tells of the works as they will be when it ends, in `in_flight_s`; the
    times left count from then.
    """

    node: str
    boot_id: str
    role: RoleName
    info: EngineInfo
    kv: PeerAddress
    usage: Usage
    works: list[WorkState]
    leases: list[Lease]
    pulls: list[Pull]
    cost: StepCost
    idle_cost: StepCost
    promises_preempted: int  # since it started, for want of memory
    promises_starved: int  # of those that waited for memory, how many were late then
    cost_margin: float  # 19 of 20 steps lately took at most (1 + this) times what `cost` says
    steps: int
    step_s: float
    stuck_s: float
    local_prefills: int
    corrupt_pulls: int  # of the local prefills, those for KV that came and was not what was offered
    pid: int
    in_flight_s: float = 0.0
    age_s: float = 0.0  # since it was made; set when it is sent
    sessions: int = 0  # for which it keeps KV while they are idle
    session_tokens: int = 0  # of that KV
    sessions_version: int = 0  # another one: another list of them
    prefixes_version: int = 0  # another one: its prefix cache holds others
    tally: Tally = field(default_factory=Tally)
    role_pause_s: float | None = None  # between the batches around its last change of role; None: it was idle


@dataclass(frozen=True, slots=True)
class Reports:
    """What has changed on nodes of a host since it last said so. Others are as they were."""

    items: list[Report]


@dataclass(frozen=True, slots=True)
class RoleSet:
    """Answer to SetRole: the role that the node has now."""

    call_id: int
    role: RoleName


@dataclass(frozen=True, slots=True)
class SessionsListed:
    """Answer to ListSessions: tokens of KV that are kept, by session."""

    call_id: int
    version: int
    tokens: dict[str, int]


@dataclass(frozen=True, slots=True)
class PrefixesListed:
    """Answer to ListPrefixes: names (engine.prefix) of cached prefixes."""

    call_id: int
    changes: PrefixChanges


@dataclass(frozen=True, slots=True)
class LinksProbed:
    """Answer to ProbeLinks. `errors` by engine id of the peer."""

    call_id: int
    links: list[Link]
    errors: dict[str, str] = field(default_factory=dict)


# ---- endpoint and coordinator ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """A node and where its socket is."""

    node: str
    address: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where should this go? `avoid`: nodes that declined or were lost. Seconds are what is LEFT.

    `siblings`: ids of the other sequences of the same request, which go the same way. `said_tokens` of what is
    called its prompt are its answer so far, from attempts before this one: they are computed where it decodes.
    """

    request_id: str
    attempt: int
    prompt_tokens: int
    max_tokens: int
    class_name: str | None
    first_token_left_s: float
    tpot_s: float
    one_node: bool
    may_defer: bool
    sequences: int = 1
    avoid: list[str] = field(default_factory=list)
    prefix_hashes: list[int] = field(default_factory=list)
    siblings: list[str] = field(default_factory=list)
    session: str | None = None
    said_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Placed:
    """The answer. `verdict`: admitted, best_effort, refused (429) or no_capacity (503).

    `handoff_s`: what the handoff takes of the first deadline, so that a prefill for elsewhere is
    due that much earlier. `cached_tokens` of the prompt have their KV where it is prefilled.
    """

    request_id: str
    attempt: int
    verdict: str
    prefill: NodeAddress | None = None
    decode: NodeAddress | None = None
    reason: str = ""
    retry_after_s: float = 0.0
    candidates: dict[str, str] = field(default_factory=dict)
    handoff_s: float = 0.0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Promoted:
    """A deferred request is admitted after all, where it is."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A request is over: what the coordinator counts and frees. `stages`: kind -> met, by the scoring rule.

    `strict`: every token in time, without tolerance; `goodput`: TTFT and mean TPOT in time, as vLLM counts it.
    `placement`: pair, one_node, or none when it was never placed.
    """

    request_id: str
    attempt: int
    class_name: str | None
    outcome: str
    verdict: str
    met: bool
    strict: bool
    goodput: bool
    stages: dict[str, bool]
    placement: str
    handoff_s: float | None = None
    kv_bytes: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    nodes: list[str] = field(default_factory=list)  # which hold its KV, as far as it was computed
    prefix_hashes: list[int] = field(default_factory=list)  # of prompt and output
    ended_itself: bool = False  # else it was cut: by max_tokens, by its client, or by us
    session: str | None = None


@dataclass(frozen=True, slots=True)
class LoopEnded:
    """A tool loop with a deadline is over: `seconds` from its first call to the end of its answer."""

    class_name: str
    calls: int
    seconds: float
    met: bool


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """A node that takes work, as an endpoint needs to know it: where, in which role, how busy."""

    node: str
    address: str
    role: RoleName
    requests: int


@dataclass(frozen=True, slots=True)
class View:
    """The nodes that take work now. What carries no promise is placed by it, without asking."""

    nodes: list[NodeLoad]


@dataclass(frozen=True, slots=True)
class Query:
    """A question that is answered with JSON: `cluster`, `explain`, ..."""

    call_id: int
    what: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """JSON (an object) for a Query; `error` instead, with its HTTP status."""

    call_id: int
    body: dict[str, Any]
    error: str | None = None
    http_status: int = 200


Message = (
    Watch | Submit | Cancel | Release | Promote | Credit | SetRole | ProbeLinks | ListSessions | ListPrefixes
    | CloseSession | Alive | Declined | Deltas | Report | Reports | RoleSet | LinksProbed | SessionsListed
    | PrefixesListed
    | Place | Placed | Promoted | Finished | LoopEnded | View | Query | Answer
)  # fmt: skip

_DECODERS = {
    f"{kind.__name__}/{VERSION}".encode(): msgspec.msgpack.Decoder(kind, strict=False)
    for kind in get_args(Message)
}
_NAMES = {kind: f"{kind.__name__}/{VERSION}".encode() for kind in get_args(Message)}
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> list[bytes]:
    """Two frames: name/version, and the body."""
    return [_NAMES[type(message)], _ENCODER.encode(message)]


def decode(frames: list[bytes]) -> Message:
    """The inverse of `encode`. Raises ProtocolError for anything else."""
    if len(frames) != 2:
        raise ProtocolError(f"expected 2 frames, got {len(frames)}")
    decoder = _DECODERS.get(frames[0])
    if decoder is None:
        raise ProtocolError(
            f"unknown message or version {frames[0][:64]!r}: this process speaks version {VERSION}; "
            "run the same release on every host"
        )
    try:
        message: Message = decoder.decode(frames[1])
    except msgspec.ValidationError as error:
        raise ProtocolError(f"malformed {frames[0].decode()}: {error}") from error
    except msgspec.DecodeError as error:
        raise ProtocolError(f"garbled {frames[0].decode()}: {error}") from error
    return message
