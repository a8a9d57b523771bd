# SPDX-License-Identifier: Apache-2.0
"""Triton kernels. Importing this package imports Triton; ``gapless`` itself does not."""

if __name__ == "kernels":
    raise ImportError("this folder is installed as gapless.kernels: import that")
