"""Pure functions of values: no clock, no I/O, no torch, no vllm. Time is passed in."""
