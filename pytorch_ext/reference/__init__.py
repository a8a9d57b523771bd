# SPDX-License-Identifier: Apache-2.0
"""Readable references in eager torch: differentiable, in any dtype, and the definition of correct."""

from gapless.reference.varlen import merge_attention, varlen_attention

__all__ = ["merge_attention", "varlen_attention"]
