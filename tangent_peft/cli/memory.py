"""How much memory this process has taken."""

from __future__ import annotations

import math
import sys


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, in GiB; NaN where the platform does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes that `ru_maxrss` counts in: Linux and the BSDs have KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
