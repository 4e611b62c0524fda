"""Random numbers named by (seed, tensor), and inner loops over blocks of a tensor; private."""

from delta_analysis._kernels.blocks import (
    kernels_for,
    map_blocks,
    new_tensor,
    row_length,
    single_threaded_pool,
    thread_pool,
)
from delta_analysis._kernels.drop import inverse_keep
from delta_analysis._kernels.floats import HIGH, LOW, NATIVE, READABLE, compiled, entries
from delta_analysis._kernels.memory import to_float32, uninitialised
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
    "entries",
    "inverse_keep",
    "kernels_for",
    "map_blocks",
    "new_tensor",
    "row_length",
    "single_threaded_pool",
    "stream_key",
    "tally_piece",
    "thread_pool",
    "to_float32",
    "uninitialised",
]
