"""Random numbers named by (seed, tensor), and inner loops over blocks of a tensor; private."""

from delta_analysis._kernels.blocks import (
    map_blocks,
    new_tensor,
    row_length,
    single_threaded_pool,
    thread_pool,
    to_float32,
    uninitialised,
)
from delta_analysis._kernels.drop import drop_at, drop_randomly, inverse_keep, power_sums
from delta_analysis._kernels.floats import HIGH, LOW, NATIVE, READABLE, compiled, entries
from delta_analysis._kernels.order import (
    count_high,
    count_low,
    drop_below,
    drop_least,
    positions_between,
    rank_sums,
    tied,
)
from delta_analysis._kernels.philox import RANGE, Key, stream_key
from delta_analysis._kernels.tally import ALONE, BESIDE, BUCKETS, SUBTRACT, tally_piece

__all__ = [
    "ALONE",
    "BESIDE",
    "BUCKETS",
    "HIGH",
    "LOW",
    "NATIVE",
    "RANGE",
    "READABLE",
    "SUBTRACT",
    "Key",
    "compiled",
    "count_high",
    "count_low",
    "drop_at",
    "drop_below",
    "drop_least",
    "drop_randomly",
    "entries",
    "inverse_keep",
    "map_blocks",
    "new_tensor",
    "positions_between",
    "power_sums",
    "rank_sums",
    "row_length",
    "single_threaded_pool",
    "stream_key",
    "tally_piece",
    "thread_pool",
    "tied",
    "to_float32",
    "uninitialised",
]
