"""Asking a running cluster: where it is, and what went wrong, in a sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import httpx

from coordinator.config import ClusterConfig
from coordinator.run_state import find_run, run_directory
from engine.errors import NoCapacity, RequestError, SlosserveError

ANSWER_S = 30.0
REBALANCE_S = 600.0


@dataclass(frozen=True, slots=True)
class ClusterClient:
    """One endpoint of a cluster. `admin_key` is what its administrative routes ask for.

    `others`: those of its endpoints that listen beside it.
    """

    url: str
    admin_key: str | None = None
    others: tuple[str, ...] = ()

    def cluster(self) -> dict[str, Any]:
        """GET /cluster. Raises NoCapacity if nothing answers, SlosserveError with the error it answered."""
        return self._ask("GET", "/cluster", None, ANSWER_S)

    def explain(self, request_id: str) -> dict[str, Any]:
        """GET /explain/ID of the endpoint that served it. Raises as `cluster`; RequestError if none did."""
        path = f"/explain/{quote(request_id, safe='')}"
        for url in self.others:
            try:
                return replace(self, url=url)._ask("GET", path, None, ANSWER_S)
            except (RequestError, NoCapacity):
                continue  # each knows its own, and one that is gone hides no other's
        return self._ask("GET", path, None, ANSWER_S)

    def set_pools(self, prefill: int, decode: int, mixed: int, *, dry_run: bool) -> dict[str, Any]:
        """POST /cluster/pools. Raises as `cluster`."""
        wanted = {"prefill": prefill, "decode": decode, "mixed": mixed, "dry_run": dry_run}
        return self._ask("POST", "/cluster/pools", wanted, REBALANCE_S)

    def follow_load(self, on: bool) -> dict[str, Any]:
        """POST /cluster/pools with `auto`. Raises as `cluster`."""
        return self._ask("POST", "/cluster/pools", {"auto": on}, ANSWER_S)

    def set_nodes(
        self, nodes: int | None, role: str | None, remove: Sequence[str], *, dry_run: bool, drain_s: float
    ) -> dict[str, Any]:
        """POST /cluster/nodes. Raises as `cluster`."""
        wanted = {
            "nodes": nodes,
            "role": role,
            "remove": list(remove),
            "dry_run": dry_run,
            "drain_s": drain_s,
        }
        return self._ask("POST", "/cluster/nodes", wanted, ANSWER_S)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.admin_key}"} if self.admin_key else {}
        try:
            answer = httpx.request(method, self.url + path, json=body, headers=headers, timeout=timeout_s)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoCapacity(
                f"no cluster answers at {self.url} ({str(error) or type(error).__name__}). Is it up?"
                " Start one with `slosserve up`, or give its address with --url."
            ) from None
        if answer.is_error:
            kind = RequestError if answer.is_client_error else SlosserveError
            raise kind(f"{self.url}{path}: {_error_of(answer)} (HTTP {answer.status_code})")
        return _object_of(answer)


def find_cluster(url: str | None, name: str | None, admin_key: str | None = None) -> ClusterClient:
    """The cluster at `url` (else SLOSSERVE_URL), or the one of this machine: `name` where several run."""
    admin_key = admin_key or os.environ.get("SLOSSERVE_ENDPOINT__ADMIN_KEY")
    url = url or (None if name else os.environ.get("SLOSSERVE_URL"))
    if url is not None:
        return ClusterClient(url.rstrip("/").removesuffix("/v1"), admin_key)
    run = find_run(name)
    if not run.urls:
        raise NoCapacity(
            f"the cluster {run.name!r} is still starting. Logs: {run_directory(run.name) / 'logs'}"
        )
    config = ClusterConfig.read(run_directory(run.name))
    return ClusterClient(run.urls[0], admin_key or config.endpoint.admin_key, tuple(run.urls[1:]))


def _error_of(answer: httpx.Response) -> str:
    try:
        error = answer.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return answer.text.strip()[:500] or answer.reason_phrase


def _object_of(answer: httpx.Response) -> dict[str, Any]:
    try:
        value = answer.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise SlosserveError(f"{answer.url} answered, but not with a JSON object: is it a slosserve endpoint?")
    return value
