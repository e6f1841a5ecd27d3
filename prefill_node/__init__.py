"""The prefill role of a node."""
