# SPDX-License-Identifier: Apache-2.0
"""A remote data loader on Ray: servers hold the sequences, one planner plans, each rank fetches its own slices.

    ray.init(address="auto")
    batches = RayLoader(read, partial(bytescale.plan, ranks=ranks, capacity=8192, cost=cost),
                        rank=hdp.rank, shards=nodes, tokens=1 << 20, name="run 7")
    for batch in batches:
        loss = hdp.step(batch.schedule, batch.tensors)

All ranks run the same lines: who comes first starts the actors, the others find them by name. Whatever dies may come
back: a server reads its shard again, the planner draws again from the state that each request carries, and a rank
goes on after the last batch that it acknowledged. What they answer depends on the request alone, so nothing is lost
or doubled. After the remote data loader of ByteScale (arXiv:2502.21231).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapless.distributed.data import GlobalBatch, RankBatch, ScheduleSampler
from gapless.schedule.schedule import Schedule

Ints = NDArray[np.int64]
NAMESPACE = "gapless"  # of the actors' names: that of the drivers may differ from rank to rank
KEPT = 16  # plans that the planner keeps for ranks that come later


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("the remote data loader needs ray: pip install 'gapless[ray]'") from error
    return ray


def _answers(asked: Mapping[str, Any], timeout: float) -> list[Any]:
    """What actors answer, all of them within ``timeout``, or an error that says who did not."""
    ray, until = _ray(), time.monotonic() + timeout
    found = []
    for who, ref in asked.items():
        try:
            found.append(ray.get(ref, timeout=max(until - time.monotonic(), 0.0)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(f"{who} has not answered for {timeout:g} s") from None
        except ray.exceptions.RayActorError as error:
            raise RuntimeError(f"{who} is dead and is not started again: {error}") from error
    return found


def _server(shard: int) -> str:
    return f"the server of shard {shard}"


class Server:
    """Actor that holds one shard. It knows nothing else, so a new one is as good.

    Args:
        read: see :class:`RayLoader`.
        shard, shards: which, and of how many.
    """

    def __init__(self, read: Callable[[int, int], Any], shard: int, shards: int) -> None:
        part = read(shard, shards)
        items = [part[i] for i in range(len(part))]
        found = [np.asarray(x["input_ids"] if isinstance(x, Mapping) else x).reshape(-1) for x in items]
        filled = [tokens for tokens in found if len(tokens)]  # an empty list would make floats of all
        self._tokens = np.concatenate(filled) if filled else np.empty(0, np.int64)
        if self._tokens.dtype.kind not in "iu":
            raise ValueError(f"shard {shard} has {self._tokens.dtype} tokens: they have to be integers")
        self._shard = shard
        self._starts = np.cumsum([0, *map(len, found)])

    def lengths(self) -> Ints:
        """Tokens of each sequence of this shard: all that the planner sees of them."""
        return np.diff(self._starts)

    def fetch(self, pieces: Ints) -> NDArray[Any]:
        """Tokens of some slices, one slice after the other.

        Args:
            pieces: int64 [p, 4], rows (sequence of this shard, begin, end, length that the sequence has to have).
        """
        slices = [self._tokens[:0]]
        for i, begin, end, expected in pieces.tolist():
            length = int(self._starts[i + 1] - self._starts[i]) if i + 1 < len(self._starts) else 0
            if length != expected:
                raise ValueError(
                    f"sequence {i} of shard {self._shard} has {length} tokens and had {expected} before its server was "
                    "started again: read has to give the same every time"
                )
            slices.append(self._tokens[self._starts[i] + begin : self._starts[i] + end])
        return np.concatenate(slices)


class Planner:
    """Actor that plans every global batch once, one ahead of what was asked for, for all ranks.

    Args:
        servers: of all shards.
        plan, options: of :class:`~gapless.distributed.data.ScheduleSampler`.
        timeout: seconds for the servers to have read their shards.
    """

    def __init__(
        self,
        servers: Sequence[Any],
        plan: Callable[[Ints], Schedule],
        options: Mapping[str, Any],
        timeout: float,
    ) -> None:
        self._servers, self._plan, self._options, self._timeout = servers, plan, options, timeout
        self._sampler: ScheduleSampler | None = None
        self._stream: Iterator[list[GlobalBatch]] = iter(())
        self._at: tuple[tuple[str, int], ...] | None = None  # the state that the stream goes on from
        self._plans: dict[tuple[tuple[str, int], ...], Any] = {}  # by the state before, oldest first

    def start(self) -> tuple[dict[str, Any], dict[str, int], Ints]:
        """The options, the state before the first batch, and int64 [shards + 1], where each shard's numbers begin."""
        if self._sampler is None:
            asked = {_server(shard): server.lengths.remote() for shard, server in enumerate(self._servers)}
            lengths = _answers(asked, self._timeout)
            self._offsets = np.cumsum([0, *map(len, lengths)])
            self._sampler = ScheduleSampler(np.concatenate(lengths), self._plan, **self._options)
            self._first = self._sampler.state_dict()
        return dict(self._options), self._first, self._offsets

    def after(self, state: Mapping[str, int]) -> Any:
        """Reference to the global batch that follows ``state``; to None, if the last epoch ends there."""
        self.start()
        assert self._sampler is not None
        key = tuple(sorted(state.items()))
        if key not in self._plans:
            if key != self._at:
                self._sampler.load_state_dict(state)
                self._stream = iter(self._sampler)
            self._at = None  # a plan that fails leaves no stream to go on with
            (batch,) = next(self._stream, (None,))
            if batch is not None:
                self._at = tuple(sorted(batch.state.items()))
            self._plans[key] = _ray().put(batch)
            if len(self._plans) > KEPT:
                del self._plans[next(iter(self._plans))]
        return self._plans[key]


class Slices:
    """A sequence of which only some slices are here; looks like an int64 tensor [length] to who stays inside them.

    Args:
        length: of the whole sequence.
        held: (begin, tokens) of each slice.
    """

    def __init__(self, length: int, held: Sequence[tuple[int, Tensor]]) -> None:
        self._length, self._held = length, held

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, wanted: slice) -> Tensor:
        begin, end, _ = wanted.indices(self._length)
        if begin >= end:
            return torch.empty(0, dtype=torch.int64)
        for first, tokens in self._held:
            if first <= begin and end <= first + len(tokens):
                return tokens[begin - first : end - first]
        raise IndexError(f"tokens {begin} to {end} are not this rank's: it has not fetched them")


class RayLoader:
    """A rank's batches, each fetched while the one before it is computed.

    Args:
        read: called as ``read(shard, shards)`` on the server of each shard, to read and tokenise its part: gives a list
            or map-style dataset of tokens [length], or mappings with ``input_ids``. It has to give the same every time.
            The dataset is the shards' sequences in the order of the shards.
        plan: makes a :class:`~gapless.schedule.Schedule` of some lengths, the same one for the same lengths.
        rank: in the schedules.
        shards: number of servers, spread over Ray's nodes.
        tokens: of a global batch, as for :class:`~gapless.distributed.data.ScheduleSampler`.
        name: of this loader among all that run on the Ray cluster. Its actors outlive the ranks, so that these may be
            started again, until :meth:`stop` is called.
        timeout: seconds that a server may take to read its shard, or to answer while it is started again; the planner,
            which waits for the servers, may take twice as long.
        actors: options of Ray's actors, such as ``num_cpus`` or ``resources``.
        options: seed, epochs, shuffle, prefetch of the sampler.

    Raises:
        ImportError: ray is not installed.
        RuntimeError: Ray does not run in this process. While iterating: a server or the planner died for good.
        TimeoutError: a server or the planner does not answer.
        ValueError: no shards; a loader of this name runs with other options; what the sampler and ``plan`` raise.
    """

    def __init__(
        self,
        read: Callable[[int, int], Any],
        plan: Callable[[Ints], Schedule],
        *,
        rank: int,
        shards: int,
        tokens: int,
        name: str = "loader",
        timeout: float = 300.0,
        actors: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        ray = _ray()
        if not ray.is_initialized():
            raise RuntimeError(
                "Ray does not run in this process: call ray.init(address=..) with the cluster's"
            )
        if shards < 1:
            raise ValueError(f"shards is {shards}: it has to be at least 1")
        self.rank, self._timeout = rank, timeout
        # All calls are pure, so that Ray may repeat them on an actor that it has started again.
        common = {
            "namespace": NAMESPACE,
            "get_if_exists": True,
            "lifetime": "detached",
            "max_restarts": -1,
            "max_task_retries": -1,
            "num_cpus": 0,
            **(actors or {}),
        }
        server = ray.remote(Server).options
        self._servers = [
            server(name=f"{name}/shard {i}", scheduling_strategy="SPREAD", **common).remote(read, i, shards)
            for i in range(shards)
        ]
        options["tokens"] = tokens
        self._planner = (
            ray.remote(Planner)
            .options(name=f"{name}/planner", **common)
            .remote(self._servers, plan, options, timeout)
        )
        theirs, self._state, self._offsets = self._of_planner(self._planner.start)
        for key in sorted(theirs.keys() | options.keys()):
            if theirs.get(key) != options.get(key):
                raise ValueError(
                    f"a loader named {name!r} runs with {key}={theirs.get(key)}, not {options.get(key)}: "
                    "stop it or take another name"
                )
        if len(self._offsets) != shards + 1:
            raise ValueError(
                f"a loader named {name!r} runs with {len(self._offsets) - 1} shards, not {shards}"
            )

    def state_dict(self) -> dict[str, int]:
        """Where the batch that was acknowledged last ends: the number of the following one, and what it begins with."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after the batch that ``state`` came with, at the next ``iter``."""
        self._state = dict(state)

    def acknowledge(self, batch: RankBatch) -> None:
        """``batch`` is done: a restart begins after it. Asking for the next batch acknowledges the one before."""
        self._state = dict(batch.state)

    def __iter__(self) -> Iterator[RankBatch]:
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._load, self._state)
            while (batch := ahead.result()) is not None:
                ahead = pool.submit(self._load, batch.state)
                yield batch
                self.acknowledge(batch)

    def stop(self) -> None:
        """End the actors, for all ranks."""
        for actor in (self._planner, *self._servers):
            _ray().kill(actor)

    def _of_planner(self, method: Any, *args: Any) -> Any:
        return _answers({"the planner": method.remote(*args)}, 2 * self._timeout)[0]

    def _load(self, state: Mapping[str, int]) -> RankBatch | None:
        batch = self._batch_after(state)
        return None if batch is None else RankBatch(batch, self._fetch(batch))

    def _batch_after(self, state: Mapping[str, int]) -> GlobalBatch | None:
        lost = _ray().exceptions.ObjectLostError
        until = time.monotonic() + 2 * self._timeout
        while True:
            ref = self._of_planner(self._planner.after, dict(state))
            try:
                return _answers({"the planner's node": ref}, self._timeout)[0]
            except lost:  # the planner died after it had answered: the new one plans the same
                if time.monotonic() > until:
                    raise

    def _fetch(self, batch: GlobalBatch) -> Mapping[int, Tensor]:
        """The slices that this rank is fed with, each with the token after it, by sequence of the schedule."""
        i, begin, end = np.unique(batch.pieces_of(self.rank), axis=0).T
        lengths = batch.schedule.lengths[i]
        end = np.minimum(end + 1, lengths)
        shard = np.searchsorted(self._offsets, batch.indices[i], side="right") - 1
        pieces = np.stack([batch.indices[i] - self._offsets[shard], begin, end, lengths], 1)
        shards = np.unique(shard).tolist()
        asked = {_server(s): self._servers[s].fetch.remote(pieces[shard == s]) for s in shards}
        held: defaultdict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        for s, found in zip(shards, _answers(asked, self._timeout), strict=True):
            tokens = torch.from_numpy(found.astype(np.int64))
            mine = np.flatnonzero(shard == s)
            parts = tokens.split((end - begin)[mine].tolist())
            for k, part in zip(mine.tolist(), parts, strict=True):
                held[int(i[k])].append((int(begin[k]), part))
        sequences = {k: Slices(int(batch.schedule.lengths[k]), held[k]) for k in np.unique(i).tolist()}
        return cast("Mapping[int, Tensor]", sequences)  # slices are all that is asked of them
