"""The memory bank: distances against brute force in float64, and what it refuses."""

import pytest
import torch

from models.errors import InputError
from models.memory_bank import MemoryBank


def brute_force(queries, vectors):
    return torch.cdist(queries.double(), vectors.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)


@pytest.mark.parametrize("size", [(1, 3, 7), (5, 1, 1), (300, 784, 192), (5000, 100, 64)])
def test_distances_equal_brute_force(size):
    m, q, d = size
    bank, queries = torch.randn(m, d), torch.randn(q, d)
    found = MemoryBank(bank).nearest(queries)
    torch.testing.assert_close(found.double(), brute_force(queries, bank), rtol=1e-4, atol=0)


def test_no_queries_give_no_distances():
    assert MemoryBank(torch.randn(5, 3)).nearest(torch.empty(0, 3)).shape == (0,)


def test_a_query_in_the_bank_is_at_distance_zero():
    bank = torch.randn(500, 100) + 1000
    assert MemoryBank(bank).nearest(bank).max() == 0


def test_bad_banks_and_queries_are_refused():
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 0), torch.tensor([[torch.nan]])):
        with pytest.raises(InputError):
            MemoryBank(bad)
    with pytest.raises(InputError, match=r"\(Q, 3\).*\(5, 4\)"):
        MemoryBank(torch.zeros(2, 3)).nearest(torch.zeros(5, 4))
    with pytest.raises(InputError, match="NaN"):
        MemoryBank(torch.zeros(2, 3)).nearest(torch.full((5, 3), torch.nan))
