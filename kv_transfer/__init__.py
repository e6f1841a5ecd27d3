"""The KV-transfer layer: handoffs, leases, links. Imports nothing else of this project."""
