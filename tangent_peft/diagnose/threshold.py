"""When a cosine of two axes is too large, and what a small one does not say."""

from __future__ import annotations


#: Beyond it two axes are not disentangled: the data mix them, or the learning rate was too high (TS-DPO's own rule is
#: for cos > 0.3). A cosine below −0.3 is flagged as well: each axis then undoes part of the other.
COSINE_LIMIT = 0.3

NOT_ALONE = (
    "A small cosine alone does not rule out interference (arXiv 2608.09490): look at the non-additivity R(λ) of the "
    "mix as well (`additivity`)."
)


def is_entangled(cosine: float) -> bool:
    """Whether |cosine| exceeds the limit; not for NaN."""
    return abs(cosine) > COSINE_LIMIT
