# SPDX-License-Identifier: Apache-2.0
"""Triton kernels. Importing this package imports Triton; ``gapless`` itself does not."""
