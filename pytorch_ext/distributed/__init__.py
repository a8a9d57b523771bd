# SPDX-License-Identifier: Apache-2.0
"""Schedules run on torch.distributed."""
