# SPDX-License-Identifier: Apache-2.0
"""What the tests and the benchmarks share: the error budget, factories of inputs, oracles. Needs no test runner."""

from gapless.testing.block_sparse import (
    attend_layout,
    layout_batch,
    layout_oracle_and_witness,
    layouts,
    make_layout,
    random_mask,
)
from gapless.testing.budget import assert_within_budget
from gapless.testing.paging import Pages, scatter_pages
from gapless.testing.varlen import Batch, Results, assert_results, attend, make_batch, oracle_and_witness

__all__ = [
    "Batch",
    "Pages",
    "Results",
    "assert_results",
    "assert_within_budget",
    "attend",
    "attend_layout",
    "layout_batch",
    "layout_oracle_and_witness",
    "layouts",
    "make_batch",
    "make_layout",
    "oracle_and_witness",
    "random_mask",
    "scatter_pages",
]
