# SPDX-License-Identifier: Apache-2.0
"""Schedules: which rank computes which tokens of a batch of very different lengths, and when."""

from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.model_shape import ModelShape
from gapless.schedule.schedule import Pack, Schedule, schedule_of
from gapless.schedule.shards import MicroBatch, Shard

__all__ = ["Cluster", "CostModel", "MicroBatch", "ModelShape", "Pack", "Schedule", "Shard", "schedule_of"]
