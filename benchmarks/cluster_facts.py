"""What a cluster says about itself (GET /cluster), and what of it happened during a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from engine.errors import ConfigError

Facts = dict[str, Any]
TIMEOUT_S = 10.0


async def fetch_facts(http: httpx.AsyncClient) -> Facts:
    """GET /cluster. Raises ConfigError when nothing, or something else, answers there."""
    return await _get(http, "/cluster")


async def fetch_timeline(http: httpx.AsyncClient, request_id: str) -> Facts:
    """GET /requests/ID: when a request was placed, where, and where its time went. Raises ConfigError."""
    return await _get(http, f"/requests/{request_id}")


def placed_on_pairs(before: Facts, after: Facts) -> int:
    """Requests that were placed on a prefill/decode pair during a run."""
    return _gain(before, after, "placements", "pair")


def attainment(before: Facts, after: Facts) -> dict[str, Any]:
    """By class: requests, how many met every stage, and the same for each stage, counted during a run."""
    classes: Mapping[str, Any] = after.get("attainment") or {}
    old: Mapping[str, Any] = before.get("attainment") or {}
    result: dict[str, Any] = {}
    for name, kept in classes.items():
        earlier = old.get(name) or {}
        total = kept.get("requests", 0) - earlier.get("requests", 0)
        if total > 0:
            stages = kept.get("stages") or {}
            result[name] = {
                **_share(kept.get("met", 0) - earlier.get("met", 0), total, "requests"),
                "stages": {
                    stage: _stage(counts, (earlier.get("stages") or {}).get(stage) or {})
                    for stage, counts in stages.items()
                },
            }
    return result


def handoffs(before: Facts, after: Facts) -> dict[str, Any]:
    """KV handoffs during a run: count, bytes. Percentiles and bandwidth are of the cluster's whole life."""
    now = after.get("handoffs") or {}
    return {
        "handoffs": _gain(before, after, "handoffs", "count"),
        "kv_bytes": _gain(before, after, "handoffs", "kv_bytes"),
        "handoff_p50_s": now.get("p50_s"),
        "handoff_p99_s": now.get("p99_s"),
        "handoff_bytes_per_s": now.get("bytes_per_s"),
    }


def placements(before: Facts, after: Facts) -> dict[str, int]:
    """Where requests went during a run."""
    kinds = after.get("placements") or {}
    return {kind: _gain(before, after, "placements", kind) for kind in kinds}


def _stage(counts: Mapping[str, int], earlier: Mapping[str, int]) -> dict[str, Any]:
    met = counts.get("met", 0) - earlier.get("met", 0)
    return _share(met, counts.get("total", 0) - earlier.get("total", 0), "total")


def _share(met: int, total: int, total_name: str) -> dict[str, Any]:
    return {total_name: total, "met": met, "attainment": met / total if total else None}


def _gain(before: Facts, after: Facts, section: str, key: str) -> int:
    new = (after.get(section) or {}).get(key) or 0
    return int(new - ((before.get(section) or {}).get(key) or 0))


async def _get(http: httpx.AsyncClient, path: str) -> Facts:
    url = f"{http.base_url}".rstrip("/") + path
    try:
        response = await http.get(path, timeout=TIMEOUT_S)
        response.raise_for_status()
        facts = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ConfigError(f"GET {url}: {error}. Is this the endpoint of a slosserve cluster?") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"GET {url}: expected a JSON object. Is this the endpoint of a slosserve cluster?")
    return facts
