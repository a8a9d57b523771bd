# SPDX-License-Identifier: Apache-2.0
"""Demonstrations on real input: ``gapless demo``."""
