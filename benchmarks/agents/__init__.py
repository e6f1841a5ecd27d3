"""Loops of tool calls on real engines: with sessions, without, and on vLLM as it ships."""
