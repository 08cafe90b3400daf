"""How long torch's threads wait for work. Nothing here imports torch: it must be told before it is loaded."""

import os

# After each of torch's steps libgomp's threads spin for milliseconds, on one processor more than on another, in which
# onnxruntime's want the cores: with two of them an image takes a seventh longer. After this many turns, a thirtieth of
# libgomp's own, they sleep. Who has set either variable knows better.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
