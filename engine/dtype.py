"""What `dtype: auto` is on a CPU.

vLLM takes bfloat16 there for every model, one that was saved in float32 included. A processor without
instructions for it computes a prompt at a quarter of the speed that it has in float32.
"""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of x86, and of ARM


def dtype_here(dtype: str, *, on_cpu: bool) -> str:
    """For vLLM on this machine: `auto` is float32 on a CPU that has no instructions for bfloat16."""
    return "float32" if dtype == "auto" and on_cpu and not has_bfloat16() else dtype


def has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16; True where the system does not say."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return True
    flags = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return not flags or not BFLOAT16.isdisjoint(flags[0])
