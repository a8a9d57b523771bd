# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a whole run: a job that loses a rank goes on from the last one, bitwise as if nothing had happened.

    checkpoints = Checkpoints("runs/7")
    run = {"model": hdp.module, "optimizer": optimizer, "sampler": sampler}
    saved = checkpoints.load(run)
    for step in range(saved.step if saved else 0, steps):
        ...
        checkpoints.save(step + 1, run, values={"digest": schedule.digest})

Files are those of torch.distributed.checkpoint. A checkpoint is written beside its place and moved there when it is
complete, so a crash at any moment leaves the one before.
"""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gapless.distributed.peers import PeerError
from gapless.distributed.state_tree import Structure, join, split

POINTER = "latest"
_PREFIX = "step-"  # of complete checkpoints; with a dot before it while they are written
_STRUCTURE = "structure"


class Stateful(Protocol):
    """A module, an optimizer, a sampler: anything with these two."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of itself: where it is, of how many steps and ranks, and the values saved with it."""

    path: Path
    step: int
    ranks: int
    values: dict[str, Any]


class Random:
    """The states of this process's random number generators: torch (CPU and the present GPU), NumPy, Python."""

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if cuda else None,
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["torch"])
        if state_dict["cuda"] is not None:
            torch.cuda.set_rng_state(state_dict["cuda"])
        np.random.set_state(state_dict["numpy"])
        random.setstate(state_dict["python"])


class Checkpoints:
    """A folder of checkpoints that all ranks see.

    Args:
        folder: made if missing.
        group: whose ranks save and load together; None is the default group, or this process alone.
        keep: how many of the newest stay.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None, keep: int = 3
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: it has to be at least 1")
        self.folder, self._group, self._keep = Path(folder), group, keep
        self._ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0

    def save(
        self,
        step: int,
        shared: Mapping[str, Stateful],
        own: Mapping[str, Stateful] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint; every rank has to call it.

        Args:
            step: steps done; at least 0.
            shared: what is the same on all ranks, which share the writing: so no buffers that differ from rank to rank.
                An optimizer sharded by torch's ZeroRedundancyOptimizer is collected on rank 0.
            own: what differs from rank to rank; generators of random numbers are saved in any case.
            values: plain values, the same on all ranks (a schedule's digest, a planner's state).

        Returns:
            Its folder, complete.

        Raises:
            PeerError: another rank is lost or late; the checkpoint before is the latest.
            RuntimeError: some rank could not write; the message has its error.
        """
        if step < 0:
            raise ValueError(f"step is {step}: it has to be at least 0")
        with self._told(f"saving step {step}"):
            state = self._state(step, shared, own or {}, dict(values or {}))
            final = self.folder / str(self._from_first(lambda: self._begin(step)))
            partial = final.with_name(f".{final.name}")
            alone = self._ranks == 1
            group = None if alone else self._group
            with _no_word_of_being_alone():
                dcp.save(
                    state, storage_writer=dcp.FileSystemWriter(partial), process_group=group, no_dist=alone
                )
            self._barrier()
            self._from_first(lambda: self._publish(partial, final))
        return final

    def latest(self) -> Path | None:
        """The newest complete checkpoint, the same on all ranks; None if there is none."""
        with self._told("looking for a checkpoint"):
            name = self._from_first(self._find)
        return None if name is None else self.folder / name

    def load(
        self,
        shared: Mapping[str, Stateful],
        own: Mapping[str, Stateful] | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Saved | None:
        """Give everything the state that it had; every rank has to call it.

        Files are unpickled: load only what you trust.

        Args:
            shared, own: objects like those that were saved, by the same names.
            path: a checkpoint; None is the latest.

        Returns:
            What was saved; None, with nothing changed, if there is no checkpoint.

        Raises:
            ValueError: a name that was not saved, or ``own`` states of another number of ranks. Without ``own`` the
                number may change; generators of random numbers are then left as they are.
        """
        chosen = self.latest() if path is None else Path(path)
        if chosen is None:
            return None
        reader = dcp.FileSystemReader(chosen)
        known = reader.read_metadata().state_dict_metadata
        about = _read(reader, known, "about")
        if own and about["ranks"] != self._ranks:
            raise ValueError(
                f"{chosen} was saved by {about['ranks']} ranks with states of their own: this group has {self._ranks}"
            )
        mine = dict(own or {}) | ({"random": Random()} if about["ranks"] == self._ranks else {})
        places = [(f"shared/{name}", target) for name, target in shared.items()]
        places += [(f"rank{self._rank}/{name}", target) for name, target in mine.items()]
        for place, target in places:
            if f"{place}/{_STRUCTURE}" not in known:
                saved = sorted(k.removesuffix(f"/{_STRUCTURE}") for k in known if k.endswith(_STRUCTURE))
                raise ValueError(f"{chosen} has no {place}: it has {saved}")
            target.load_state_dict(_read(reader, known, place))
        self._barrier()
        return Saved(chosen, about["step"], about["ranks"], about["values"])

    def _state(
        self, step: int, shared: Mapping[str, Stateful], own: Mapping[str, Stateful], values: dict[str, Any]
    ) -> dict[str, Any]:
        """Flat: tensors and structures by key."""
        flat: dict[str, Any] = {}
        places = [(f"shared/{name}", source) for name, source in shared.items()]
        places += [(f"rank{self._rank}/{name}", source) for name, source in own.items()]
        places.append((f"rank{self._rank}/random", Random()))
        for place, source in places:
            if hasattr(source, "consolidate_state_dict"):  # ZeroRedundancyOptimizer
                source.consolidate_state_dict(to=0)
                if self._rank != 0:
                    continue
            structure, tensors = split(source.state_dict(), place)
            flat |= tensors
            flat[f"{place}/{_STRUCTURE}"] = Structure(structure)
        about = {"step": step, "ranks": self._ranks, "values": values}
        flat[f"about/{_STRUCTURE}"] = Structure(about)
        return flat

    def _begin(self, step: int) -> str:
        """Sweep up what a crash left, and choose a name: the step's, or another if a run has come back to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{_PREFIX}*"):
            shutil.rmtree(left)
        plain = f"{_PREFIX}{step:010d}"
        names = [plain, *(f"{plain}.{again:03d}" for again in range(1, 1000))]
        name = next(name for name in names if not (self.folder / name).exists())
        (self.folder / f".{name}").mkdir()
        return name

    def _publish(self, partial: Path, final: Path) -> None:
        """Move a complete checkpoint to its place, point to it, and let old ones go."""
        os.replace(partial, final)
        _sync(self.folder)
        pointer = self.folder / f".{POINTER}"
        pointer.write_text(final.name + "\n")
        _sync(pointer)
        os.replace(pointer, self.folder / POINTER)
        _sync(self.folder)
        others = [path for path in self._complete() if path != final]
        for old in others[: max(len(others) - self._keep + 1, 0)]:
            shutil.rmtree(old)

    def _complete(self) -> list[Path]:
        """All complete checkpoints, the oldest first."""
        return sorted(p for p in self.folder.glob(f"{_PREFIX}*") if (p / ".metadata").is_file())

    def _find(self) -> str | None:
        names = [path.name for path in self._complete()]
        pointer = self.folder / POINTER
        pointed = pointer.read_text().strip() if pointer.is_file() else ""
        return pointed if pointed in names else names[-1] if names else None

    def _from_first(self, make: Callable[[], str | None]) -> str | None:
        """What rank 0 makes, on all ranks."""
        made = [make() if self._rank == 0 else None]
        if self._ranks > 1:
            dist.broadcast_object_list(made, group=self._group, group_src=0)
        return made[0]

    def _barrier(self) -> None:
        if self._ranks > 1:
            dist.barrier(self._group)

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:  # no Exception, and says everything twice
            told = "; ".join(f"rank {rank}: {wrapped[0]!r}" for rank, wrapped in error.failures.items())
            raise RuntimeError(f"rank {self._rank}, {doing}: {told}") from error
        except RuntimeError as error:
            raise PeerError(
                f"rank {self._rank}, {doing}: another rank is lost or late; see its log. {error}"
            ) from error


def _read(reader: dcp.FileSystemReader, known: Mapping[str, Any], place: str) -> Any:
    """What was saved at ``place``, on the CPU; each rank reads for itself."""
    structure: dict[str, Any] = {f"{place}/{_STRUCTURE}": None}
    flat: dict[str, Any] = {
        key: torch.empty(info.size, dtype=info.properties.dtype)
        for key, info in known.items()
        if f"{key}/".startswith(f"{place}/") and isinstance(info, TensorStorageMetadata)
    }
    flat |= structure
    with _no_word_of_being_alone():
        dcp.load(flat, storage_reader=reader, no_dist=True)
    return join(flat[f"{place}/{_STRUCTURE}"].root, flat)


@contextmanager
def _no_word_of_being_alone() -> Iterator[None]:
    """torch warns where no group takes part, also if it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
