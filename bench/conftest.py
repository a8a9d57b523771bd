# SPDX-License-Identifier: Apache-2.0
"""Options of the benchmarks."""


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="every workload, instead of a small case of each kind"
    )
