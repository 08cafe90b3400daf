"""The search's kernel for GPUs against brute force: by triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

CHECK = """
import torch
from models.cuda_search import Table
from models.memory_bank import MemoryBank

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
half, full = torch.float16, torch.float32
for queries, vectors, dim, dtype in (
    (130, 300, 40, half), (7, 5, 3, full), (65, 129, 33, half), (64, 700, 112, full), (1, 1, 1, full)
):
    bank = (5 + torch.randn(vectors, dim)).to(dtype)
    asked = 5 + torch.randn(queries, dim)
    asked[0] = bank[-1]
    found = Table(MemoryBank(bank.to(device))).nearest(asked.to(device)).cpu()
    wanted = (asked.double()[:, None] - bank.double()).norm(dim=2).amin(dim=1)
    assert found[0] == 0
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)
print("done")
"""


def test_the_nearest_is_found():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}  # read when triton is imported
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=os.environ | interpreted, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "done\n", done.stderr
