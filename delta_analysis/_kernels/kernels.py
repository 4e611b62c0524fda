"""The inner loops of pruning on the CPU, compiled, each over one block of entries.

`torch_loops` has the same in plain torch for every other device; both give the same bits. It lacks
`drop_at` and `positions_between`, which spare memory in rows of millions of entries on the CPU alone.
"""

from delta_analysis._kernels.drop import drop, drop_at, power_sums, random_bits
from delta_analysis._kernels.order import (
    count_high,
    count_low,
    drop_below,
    drop_least,
    positions_between,
    rank_sums,
    tied,
)

__all__ = [
    "count_high",
    "count_low",
    "drop",
    "drop_at",
    "drop_below",
    "drop_least",
    "positions_between",
    "power_sums",
    "random_bits",
    "rank_sums",
    "tied",
]
