"""A cluster on one host is reached from this machine alone, Ray, NIXL and UCX included."""

from __future__ import annotations

import ipaddress

import psutil

from coordinator.cluster_process import ClusterProcess
from coordinator.process_tree import processes_of
from tests.e2e.conftest import Client


def test_nothing_of_a_cluster_on_one_host_listens_beyond_loopback(
    cluster: Client, cluster_process: ClusterProcess
) -> None:
    state = cluster_process.state
    processes = processes_of(state.run_id, state.processes.values())
    assert {node["pid"] for node in cluster.nodes().values()} <= {process.pid for process in processes}
    listening = [
        (process.name(), ipaddress.ip_address(one.laddr.ip), one.laddr.port)
        for process in processes
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > len(processes) / 2, "Ray, nodes and the endpoint listen"
    beyond = [one for one in listening if not (getattr(one[1], "ipv4_mapped", None) or one[1]).is_loopback]
    assert not beyond
