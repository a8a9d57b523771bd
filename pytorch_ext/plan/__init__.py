# SPDX-License-Identifier: Apache-2.0
"""Plans: small value objects that say which tiles exist, in which order. Built once, run many times."""

from gapless.plan.varlen import VarlenPlan

__all__ = ["VarlenPlan"]
