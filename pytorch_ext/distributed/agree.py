# SPDX-License-Identifier: Apache-2.0
"""Whether all ranks have the same schedule."""

from __future__ import annotations

import torch
import torch.distributed as dist

from gapless.schedule.schedule import Schedule


def agree(schedule: Schedule, group: dist.ProcessGroup | None = None) -> None:
    """Compare the schedules of all ranks of ``group`` by their digests; a collective of 32 bytes.

    Raises:
        ValueError: on every rank, if they differ; it names the ranks that have each. Also if the schedule is for
            another number of ranks than the group has.
    """
    # The device of the group's collectives; its ranks have no schedule in common to be told it by.
    nccl_only = "gloo" not in (backend := dist.get_backend_config(group)) and "nccl" in backend
    device = torch.device("cuda", torch.cuda.current_device()) if nccl_only else torch.device("cpu")
    mine = torch.frombuffer(bytearray.fromhex(schedule.digest), dtype=torch.uint8).to(device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group)
    ranks: dict[str, list[int]] = {}
    for rank, digest in enumerate(every):
        ranks.setdefault(bytes(digest.tolist()).hex(), []).append(rank)
    if len(ranks) > 1:
        sides = sorted(ranks.items(), key=lambda side: (-len(side[1]), side[1]))
        told = "; ".join(f"ranks {some} have {digest[:12]}" for digest, some in sides)
        raise ValueError(
            f"schedule differs between ranks: {told}. All ranks have to plan the same lengths with the same options"
        )
    if schedule.ranks != len(every):
        raise ValueError(f"schedule is for {schedule.ranks} ranks: the group has {len(every)}")
