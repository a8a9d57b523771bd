# SPDX-License-Identifier: Apache-2.0
"""Schedules run on torch.distributed."""

from gapless.distributed.agree import agree
from gapless.distributed.attention import varlen_attention
from gapless.distributed.checkpoint import Checkpoints
from gapless.distributed.current import attend
from gapless.distributed.hdp import HDP
from gapless.distributed.losses import causal_lm_loss, from_sequences
from gapless.distributed.peers import PeerError
from gapless.distributed.remap import to_attention, to_linear
from gapless.distributed.ring_plan import RingPlan

__all__ = [
    "HDP",
    "Checkpoints",
    "PeerError",
    "RingPlan",
    "agree",
    "attend",
    "causal_lm_loss",
    "from_sequences",
    "to_attention",
    "to_linear",
    "varlen_attention",
]
