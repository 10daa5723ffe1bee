"""How much memory this process has taken."""

from __future__ import annotations

import math


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, in GiB; NaN where the platform does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
