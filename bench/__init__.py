# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: workloads as data, peers under one contract, and interleaved measurement. Installed as gapless.bench."""
