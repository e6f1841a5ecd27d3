"""The configuration of a cluster: flag > environment > YAML > default.

A flag names a key with dots (`endpoint.port`), the environment with two underscores
(`SLOSSERVE_ENDPOINT__PORT`), YAML by nesting. Unknown keys are errors wherever they come from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coordinator.config_layers import (
    Layer,
    did_you_mean,
    environment_layer,
    file_layer,
    find_config,
    find_profile,
    merged,
    nest,
)
from engine.errors import ConfigError
from engine.sessions import KV_SHARE, TTL_S

CONFIG_FILE = "config.json"

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """A part of the configuration: read-only, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), coerce_numbers_to_str=True)


class PoolsConfig(Section):
    """How many nodes start in each role. Roles change later by `slosserve rebalance`; with `auto` they follow
    the load from the start."""

    prefill: Count = 0
    decode: Count = 0
    mixed: Count = 0
    auto: bool = False

    @property
    def total(self) -> int:
        """Nodes in all."""
        return self.prefill + self.decode + self.mixed

    @model_validator(mode="after")
    def _can_finish_a_request(self) -> PoolsConfig:
        if self.decode + self.mixed == 0:
            raise ValueError("no node would decode: give decode or mixed at least 1")
        return self


class EngineConfig(Section):
    """One replica. `kv_cache_gib` None leaves the size to the engine; CPUs and GPUs are what Ray reserves.

    `step_profile`: what steps cost, from `slosserve profile fit`: a file, or the name of one that ships. None
    takes the one that ships for the model, if any; else a node fits a line to a few steps when it starts.
    `hold_steps`: no step takes less than the profile says: a small model rehearses the pace of a large one.
    `async_scheduling`: a step is composed while the one before it runs; on GPUs only.
    """

    max_model_len: Positive | None = None
    block_size: Positive | None = None
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    max_num_seqs: Positive = 64
    max_batch_tokens: Positive = 2048
    enable_prefix_caching: bool = True
    speculative: dict[str, Any] | None = None
    async_scheduling: bool = False
    step_profile: str | None = None
    hold_steps: bool = False
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    env: dict[str, str] = Field(default_factory=dict)

    @field_validator("step_profile")
    @classmethod
    def _profile_exists(cls, name: str | None) -> str | None:
        if name is not None:
            find_profile(name, "")
        return name


class VirtualConfig(Section):
    """What virtual engines pretend to be, where `engines` is virtual: they take the time and make tokens up.

    `profile`: a step profile, by file or by the name of one in configs/profiles or configs/hardware; without
    it a step takes `step_base_ms` and `step_per_token_us` for each token. The defaults are SLOs-Serve's own
    fit of a 7B model on an A100-40G. The link is that between any two nodes. With `max_draft_tokens` above 0
    they draft, and a draft is right by chance `acceptance`. `processes` host the nodes; KV is handed over
    only between nodes of one process, others compute the prompt again.
    """

    profile: str | None = None
    step_base_ms: Annotated[float, Field(gt=0)] = 24.8
    step_per_token_us: Annotated[float, Field(gt=0)] = 68.8
    kv_tokens: Positive = 40_000
    kv_bytes_per_token: Positive = 524_288
    link_gbps: Annotated[float, Field(gt=0)] = 100.0
    link_latency_ms: Annotated[float, Field(ge=0)] = 0.05
    max_draft_tokens: Count = 0
    acceptance: Annotated[float, Field(ge=0, le=1)] = 0.7
    processes: Positive = 1

    @field_validator("profile")
    @classmethod
    def _profile_exists(cls, name: str | None) -> str | None:
        if name is not None:
            find_profile(name, "")
        return name

    @property
    def link_bytes_per_s(self) -> float:
        """Rate of a link."""
        return self.link_gbps * 1e9 / 8


class TransferConfig(Section):
    """How long KV is held for a pull, and how long a pull may take before the prompt is recomputed.

    `checksum`: the prefill node sends a checksum of each block with the handoff, and what does not match after
    the pull is recomputed too. Virtual engines move no bytes, and it means nothing to them.
    """

    lease_s: Seconds = 30.0
    pull_deadline_s: Seconds = 10.0
    checksum: bool = True


class SessionsConfig(Section):
    """KV that is kept between the calls of a session, while its tools run.

    `ttl_s`: how long a session may be idle. `kv_share`: most of a node's KV memory that is kept for idle ones;
    a request that needs the memory takes it all the same.
    """

    ttl_s: Seconds = TTL_S
    kv_share: Annotated[float, Field(ge=0, le=1)] = KV_SHARE


class EndpointConfig(Section):
    """The OpenAI front. `count` processes listen on `port`, `port + 1`, ...; port 0 takes free ones.

    `max_waiting` requests may be in flight in each, of which the last quarter is for those that ask for an SLO.
    `api_key` is asked for by everything below /v1, `admin_key` by what changes the cluster. Where `host` is not
    loopback and no admin key is given, one is made up for each run.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    count: Positive = 1
    tool_call_parser: str | None = "hermes"
    reasoning_parser: str | None = None
    api_key: str | None = None
    admin_key: str | None = None
    max_waiting: Positive = 256

    @model_validator(mode="after")
    def _ports_exist(self) -> EndpointConfig:
        if self.port + self.count - 1 > 65535:
            raise ValueError(f"{self.count} endpoints from port {self.port} on pass 65535: lower port or count")
        return self


class RayConfig(Section):
    """The Ray underneath. With `address` a running one is joined; else one of our own is started and stopped.

    `num_cpus` is what our own Ray may reserve (None: the cores of this machine).
    """

    address: str | None = None
    num_cpus: Positive | None = None
    object_store_mib: Annotated[int, Field(ge=80)] = 100


class SloClass(Section):
    """What a class of requests is promised.

    The first token is due after `ttft_ms`, or, where that is None, after `ttft_scale` times what the prefill
    of the prompt takes alone on an idle replica, but never before `ttft_floor_ms`. `thinking_tpot_ms` is the
    pace of a thinking stage before the answer, whose pace is `tpot_ms`. `last_tpot_ms`: the pace of the call of
    a tool loop that answers, where its client says which that is: it is read, the others are waited for.
    """

    ttft_scale: Annotated[float, Field(ge=1)] = 5.0
    ttft_ms: Annotated[float, Field(gt=0)] | None = None
    tpot_ms: Annotated[float, Field(gt=0)] = 100.0
    thinking_tpot_ms: Annotated[float, Field(gt=0)] | None = None
    last_tpot_ms: Annotated[float, Field(gt=0)] | None = None
    ttft_floor_ms: Annotated[float, Field(ge=0)] = 0.0


class PlannerConfig(Section):
    """Admission. `max_deferred` requests may wait for a promise as best effort; more get 503.

    `explained`: how many decisions are remembered for `/explain`. Without `pairs` a request is prefilled and
    decoded on one node, whatever the roles.
    """

    max_deferred: Positive = 256
    explained: Positive = 256
    pairs: bool = True


class TimeoutsConfig(Section):
    """How long to wait before giving up, in seconds.

    `node_silent_s`: a node that said nothing for so long is lost. `endpoint_silent_s`: after so long a node
    drops the work of an endpoint. `place_s`: how long a new request waits for a coordinator. `resume_s`: how
    long a stream whose node is gone waits for another one before it ends with an error.
    """

    ray_start_s: Seconds = 60.0
    node_start_s: Seconds = 300.0
    ready_s: Seconds = 420.0
    stop_s: Seconds = 10.0
    place_s: Seconds = 5.0
    resume_s: Seconds = 60.0
    node_silent_s: Seconds = 1.0
    endpoint_silent_s: Seconds = 3.0
    stuck_step_s: Seconds = 30.0


# SLOs-Serve, table 1: loose 5x and 100 ms, tight 3x and 50 ms.
PAPER_SLO_CLASSES: dict[str, dict[str, float]] = {
    "chatbot": {"ttft_scale": 5.0, "tpot_ms": 100.0},
    "coder": {"ttft_scale": 5.0, "tpot_ms": 50.0},
    "summarizer": {"ttft_scale": 3.0, "tpot_ms": 100.0},
    "tool": {"ttft_scale": 3.0, "tpot_ms": 50.0, "last_tpot_ms": 100.0},
    "reasoning": {"ttft_scale": 3.0, "tpot_ms": 100.0, "thinking_tpot_ms": 50.0},
}


class ClusterConfig(Section):
    """All of it. `model` is a name made by `slosserve model make`, a path, or a Hugging Face name.

    `dtype` auto is vLLM's own choice, but for float32 on a CPU that has no instructions for bfloat16. Where
    hosts differ in that, say which: KV is handed over only between engines of the same.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")] = "slosserve"
    model: str = "tiny"
    served_model_name: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    engines: Literal["vllm", "virtual"] = "vllm"
    virtual: VirtualConfig = VirtualConfig()
    pools: PoolsConfig = PoolsConfig(prefill=1, decode=1)
    engine: EngineConfig = EngineConfig()
    transfer: TransferConfig = TransferConfig()
    sessions: SessionsConfig = SessionsConfig()
    endpoint: EndpointConfig = EndpointConfig()
    ray: RayConfig = RayConfig()
    slo_classes: dict[str, SloClass] = Field(default_factory=dict, validate_default=True)
    planner: PlannerConfig = PlannerConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    # By node, in seconds. For tests: a node whose clock is off keeps its promises all the same.
    clock_skew_s: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _steps_can_be_held(self) -> ClusterConfig:
        if self.engine.hold_steps and (self.engines == "virtual" or self.engine.step_profile is None):
            raise ValueError(
                "engine.hold_steps holds the steps of real engines to engine.step_profile: give one, or leave "
                "engine.hold_steps out"
            )
        return self

    @property
    def step_profile(self) -> Path | None:
        """The file of the nodes' step profile, if there is one."""
        if self.engines == "virtual":
            return None if self.virtual.profile is None else find_profile(self.virtual.profile, "")
        return find_profile(self.engine.step_profile, self.model)

    @field_validator("slo_classes", mode="before")
    @classmethod
    def _over_the_paper(cls, classes: Any) -> Any:
        return merged(PAPER_SLO_CLASSES, classes) if isinstance(classes, dict) else classes

    def write(self, run_dir: Path) -> Path:
        """Write the resolved configuration for the processes of the cluster. It may hold keys: mode 0600."""
        path = run_dir / CONFIG_FILE
        path.touch(mode=0o600)
        path.write_text(self.model_dump_json(indent=1), encoding="utf-8")
        return path

    @classmethod
    def read(cls, run_dir: Path) -> ClusterConfig:
        """Read what `write` wrote."""
        return cls.model_validate_json((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))


def load_config(path_or_name: str | Path | None, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """Merge flags over environment over YAML over defaults.

    `path_or_name`: a YAML file, the name of one that ships ("laptop"), or None for the defaults alone.
    `overrides`: values by dotted key. Raises ConfigError with place, key and remedy.
    """
    layers = [
        *([file_layer(find_config(path_or_name))] if path_or_name is not None else []),
        environment_layer(os.environ, ClusterConfig.model_fields),
        Layer("command line", nest(overrides or {})),
    ]
    values: dict[str, Any] = {}
    for layer in layers:
        values = merged(values, layer.values)
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explained(error, layers)) from None


def _explained(error: ValidationError, layers: Sequence[Layer]) -> str:
    return "\n".join(_sentence(details, layers) for details in error.errors(include_url=False))


def _sentence(details: Any, layers: Sequence[Layer]) -> str:
    path = [str(part) for part in details["loc"]]
    key = ".".join(path) or "the file as a whole"
    place = _place_of(path, layers)
    if details["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        return (
            f"{place}: unknown key {key}.{did_you_mean(path[-1], known)}"
            f" Known here: {', '.join(sorted(known))}. Correct or remove it."
        )
    message = details["msg"].removeprefix("Value error, ")
    given = "" if isinstance(details["input"], (dict, BaseModel)) else f" (given: {details['input']!r})"
    wrong = f"{place}: {key}: {message[0].lower()}{message[1:]}{given}."
    return f"{wrong} Correct this value or remove it for the default."


def _place_of(path: Sequence[str], layers: Sequence[Layer]) -> str:
    for layer in reversed(layers):
        node: Any = layer.values
        for part in path:
            node = node.get(part, _ABSENT) if isinstance(node, Mapping) else _ABSENT
        if node is not _ABSENT and path:
            return layer.named(path)
    return layers[0].place


_ABSENT = object()


def _known_keys(path: Sequence[str]) -> list[str]:
    section: Any = ClusterConfig
    for part in path:
        if isinstance(section, type) and issubclass(section, BaseModel):
            section = _section_type(section.model_fields[part].annotation)
        else:  # dict[str, Section]: any name, then the keys of the section
            section = _section_type(get_args(section)[1])
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _section_type(annotation: Any) -> Any:
    """The section inside an optional one."""
    if get_origin(annotation) in (Union, UnionType):
        return next(arg for arg in get_args(annotation) if arg is not type(None))
    return annotation
