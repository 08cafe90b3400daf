"""How torch and onnxruntime use threads. To be imported before torch, which reads GOMP_SPINCOUNT when it is loaded."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime

# After each of torch's steps libgomp's threads spin for milliseconds, on one processor more than on another, in which
# onnxruntime's want the cores: with two of them an image takes a seventh longer. After this many turns, a thirtieth of
# libgomp's own, they sleep. A user's own setting is left alone.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def session_options(threads: int) -> "onnxruntime.SessionOptions":
    """What onnxruntime runs a graph with; 0 threads leave their number to it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Within a run a thread that waits spins for 10 microseconds before it sleeps: 5 to 10 % less time for a detector's
    # many small steps, and no more on a busy machine, where longer waits take up to twice the time. Between runs none
    # spins: they would keep the cores from torch and the files, and an idle camera costs no power.
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 26):
        options.add_session_config_entry("session.intra_op.spin_duration_us", "10")
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:  # older releases spin for milliseconds or not at all
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
