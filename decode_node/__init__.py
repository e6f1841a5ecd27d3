"""The decode and mixed roles of a node."""
