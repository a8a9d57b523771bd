# SPDX-License-Identifier: Apache-2.0
"""Hybrid data parallelism: a model on every rank, any number of ranks for a sequence (ByteScale, arXiv:2502.21231).

    hdp = HDP(model)
    optimizer = ZeroRedundancyOptimizer(hdp.parameters(), torch.optim.AdamW, lr=1e-4)  # torch's own ZeRO-1
    for lengths, sequences in data:
        schedule = bytescale.plan(lengths, ranks=hdp.ranks, capacity=8192, cost=cost)
        loss = hdp.step(schedule, from_sequences(sequences))
        hdp.clip_gradients(1.0)
        optimizer.step()
        optimizer.zero_grad()

Losses are sums over tokens divided by the tokens of the whole global batch, so ranks may compute different numbers of
micro-batches, or none, and the gradients are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gapless.distributed.agree import agree
from gapless.distributed.current import Running, run, running_steps
from gapless.distributed.gradients import BUCKET_BYTES, sum_gradients
from gapless.distributed.losses import IGNORED, TokenBatch, causal_lm_loss
from gapless.distributed.offload import OffloadStats, layers_of, offload
from gapless.distributed.peers import PeerError
from gapless.distributed.rows import Rows
from gapless.schedule.schedule import Schedule
from gapless.schedule.shards import MicroBatch


class HDP(nn.Module):
    """A model whose attention follows a schedule, and whose gradients are summed once a step.

    Attention has to ask for the micro-batch: transformers models made with ``attn_implementation="gapless"`` do (import
    ``gapless.integrations.transformers``), own modules call :func:`gapless.distributed.attend`.

    Args:
        module: the same on every rank; what differs is overwritten by rank 0's at once.
        group: whose ranks schedules number; None is the default group, or this process alone where there is none.
        layers: modules whose activations may be offloaded, in the order in which they run; None: the longest
            ``nn.ModuleList`` of the module.
        smallest: bytes of an activation that is worth offloading.
        reduce_dtype: in which gradients are summed, unless a parameter's is wider; None: the parameters' own.
        bucket_bytes: of gradients that are summed together.
        broadcast: send rank 0's parameters and buffers to all ranks.

    Attributes:
        offloaded: what the last micro-batch that offloaded anything did.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup | None = None,
        *,
        layers: Sequence[nn.Module] | None = None,
        smallest: int = 1 << 16,
        reduce_dtype: torch.dtype | None = torch.float32,
        bucket_bytes: int = BUCKET_BYTES,
        broadcast: bool = True,
    ) -> None:
        super().__init__()
        self.module = module
        self.offloaded = OffloadStats()
        self._group, self._smallest = group, smallest
        self._layers = tuple(layers_of(module) if layers is None else layers)
        self._reduction: dict[str, Any] = {"dtype": reduce_dtype, "bucket_bytes": bucket_bytes}
        self.ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        if broadcast and self.ranks > 1:
            with self._told("sending the model from rank 0"), torch.no_grad():
                for tensor in dict.fromkeys([*module.parameters(), *module.buffers()]):
                    _broadcast(tensor, group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own; inside of :meth:`micro_batch`."""
        return self.module(*args, **kwargs)

    @contextmanager
    def micro_batch(
        self, micro_batch: MicroBatch | Running, schedule: Schedule | None = None
    ) -> Iterator[Running]:
        """Context of one micro-batch's forward pass, and of its backward pass if that recomputes anything.

        Attention goes over the ranks of each sequence, and the micro-batch's share of activations to the host.

        Args:
            micro_batch: of this rank; all ranks take their own in the order of steps.
            schedule: if it moves tokens between attention and linear modules, the model has to be fed with the ``rows``
                of what this context gives, and not with the micro-batch's pieces.
        """
        running = (
            micro_batch
            if isinstance(micro_batch, Running)
            else Running(
                micro_batch,
                self._group,
                schedule if schedule is not None and len(schedule.moves) else None,
            )
        )
        if running.micro_batch.rank != self.rank:
            raise ValueError(f"micro_batch is of rank {running.micro_batch.rank}: this is rank {self.rank}")
        share = running.micro_batch.offload
        with run(running):
            if share == 0:
                yield running
                return
            with offload(share, self._layers, smallest=self._smallest) as moved:
                yield running
            self.offloaded = moved.stats

    def reduce_gradients(self) -> None:
        """Sum gradients over all ranks, once a step, on every rank, after all its backward passes."""
        sum_gradients(self.module.parameters(), self._group, **self._reduction)

    def clip_gradients(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the summed gradients to a norm of at most ``max_norm``; returns the norm before.

        Every rank has the same sums, so it is the global norm with nothing to exchange.
        """
        return nn.utils.clip_grad_norm_(self.module.parameters(), max_norm, norm_type)

    def global_sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in a new one."""
        total = value.detach().clone()
        if self.ranks > 1:
            with self._told("summing over ranks"):
                dist.all_reduce(total, group=self._group)
        return total

    def step(
        self,
        schedule: Schedule,
        batch_of: Callable[[Rows], TokenBatch],
        loss_fn: Callable[[nn.Module, TokenBatch], Tensor] = causal_lm_loss,
    ) -> Tensor:
        """Forward and backward of all this rank's micro-batches, and the sum of gradients.

        Args:
            schedule: the same on all ranks (which is checked).
            batch_of: gives the tensors of some tokens: ``targets`` int64 [tokens] (-100 does not count), and what else
                ``loss_fn`` needs; ``position_ids`` [tokens] is added unless it is there. For example
                :func:`from_sequences`.
            loss_fn: gives the sum (not the mean) of the token losses of a batch, from the module and the batch.

        Returns:
            The loss of the global batch, a float64 scalar, the same on all ranks: the mean over all its targets, 0 if
            there are none.

        Raises:
            ValueError: ranks have different schedules, or the schedule is for another number of ranks.
            PeerError: another rank is lost or late.
        """
        if self.ranks > 1:
            with self._told("comparing schedules"):
                agree(schedule, self._group)
        elif schedule.ranks != 1:
            raise ValueError(f"schedule is for {schedule.ranks} ranks: this process is alone")
        steps = running_steps(schedule, self.rank, self._group)
        batches = [self._batch(running.rows, batch_of) for running in steps]
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        targets = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            targets += (batch["targets"] != IGNORED).sum()
        targets = self.global_sum(targets).clamp(min=1)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for running, batch in zip(steps, batches, strict=True):
            with self.micro_batch(running):
                loss = loss_fn(self.module, batch)
                (loss / targets).backward()
            total += loss.detach()
        self.reduce_gradients()
        return self.global_sum(total) / targets

    def _batch(self, rows: Rows, batch_of: Callable[[Rows], TokenBatch]) -> TokenBatch:
        batch = batch_of(rows)
        targets = batch["targets"]
        if tuple(targets.shape) != (rows.tokens,):
            raise ValueError(
                f"targets has shape {list(targets.shape)}: it has to be [{rows.tokens}], the tokens of rank "
                f"{rows.rank} in step {rows.step}"
            )
        if "position_ids" in batch:
            return batch
        positions = torch.from_numpy(rows.positions).to(targets.device, non_blocking=True)
        return {**batch, "position_ids": positions}

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Errors of collectives say what this rank was doing."""
        try:
            yield
        except RuntimeError as error:
            raise PeerError(
                f"rank {self.rank}, {doing}: another rank is lost or late; see its log. {error}"
            ) from error


def _broadcast(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    whole = tensor.detach()
    sent = whole.contiguous()
    dist.broadcast(sent, group=group, group_src=0)
    if sent.data_ptr() != whole.data_ptr():
        whole.copy_(sent)
