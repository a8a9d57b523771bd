# SPDX-License-Identifier: Apache-2.0
"""A few processes joined by torch.distributed (gloo, loopback) that run functions of a test, one after another.

Importing torch takes seconds, so it is imported once (a fork server), and processes are given many cases::

    with Processes(4) as processes:
        results = processes.run(case, 1, 2)  # case(1, 2) on each rank; results in the order of ranks
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

START = 300.0  # seconds that processes may take to start


@dataclass(frozen=True)
class Failure:
    """What a rank gave in place of a result: the error that it raised, or how it ended."""

    rank: int
    message: str  # its traceback, or its exit code
    died: bool  # without raising


class ProcessesError(AssertionError):
    """Some ranks failed; the message holds the traceback of each."""


class Processes:
    """``ranks`` processes with an initialised process group, one thread each.

    Args:
        ranks: how many.
        timeout: seconds that one :meth:`run` may take; then every process is killed.
        group_timeout: seconds that the process group waits for a peer.
        backend: of the process group.
    """

    def __init__(
        self, ranks: int, *, timeout: float = 300.0, group_timeout: float = 60.0, backend: str = "gloo"
    ) -> None:
        self.ranks, self.timeout = ranks, timeout
        self._folder = tempfile.mkdtemp(prefix="gapless-")
        context = _context()
        self._pipes: list[connection.Connection] = []
        self._children: list[Any] = []
        self._joined = False
        store = str(Path(self._folder) / "store")
        before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")}
        os.environ["OMP_NUM_THREADS"] = "1"  # read when a child imports torch
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            for rank in range(ranks):
                mine, theirs = context.Pipe()
                arguments = (rank, ranks, store, backend, group_timeout, theirs)
                child = context.Process(target=_serve, args=arguments, daemon=True)
                child.start()
                theirs.close()
                self._pipes.append(mine)
                self._children.append(child)
        finally:
            for name, value in before.items():
                _restore(name, value)

    @property
    def alive(self) -> bool:
        """They take another run."""
        return bool(self._children)

    def run(
        self, function: Callable[..., Any], *args: Any, check: bool = True, timeout: float | None = None
    ) -> list[Any]:
        """``function(*args)`` on every rank at once; the results, in the order of ranks.

        ``function`` is a plain function of any module or test file, and finds its rank by ``dist.get_rank()``.
        With ``check=False`` ranks that fail give a :class:`Failure` in place of their result. After a failure the
        processes are gone.

        Raises:
            ProcessesError: a rank raised, died, or took longer than ``timeout``; with ``check=False`` the last only.
        """
        if not self._children:
            raise RuntimeError("the processes are gone: an earlier run failed, or they were closed")
        module = sys.modules[function.__module__]
        where = (function.__module__, getattr(module, "__file__", None), function.__qualname__)
        request = pickle.dumps((where, pickle.dumps(args)))
        limit = self.timeout if timeout is None else timeout
        self._join()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # of one that died: found below
                pipe.send_bytes(request)
        results = self._collect(time.monotonic() + limit, check)
        late = [rank for rank in range(self.ranks) if rank not in results]
        failures = [r for r in results.values() if isinstance(r, Failure)]
        if failures or late:
            self.close()
        if late or (failures and check):
            told = [f"rank {f.rank}: {f.message}" for f in sorted(failures, key=lambda f: f.rank)]
            if late:
                told.append(f"ranks {late} gave no result within {limit:g} s")
            raise ProcessesError("\n".join(told))
        return [results[rank] for rank in range(self.ranks)]

    def _join(self) -> None:
        """Once all have imported torch, which no timeout counts, they make their group."""
        if self._joined:
            return
        deadline = time.monotonic() + START
        for rank, pipe in enumerate(self._pipes):
            try:
                started = pipe.poll(max(0.0, deadline - time.monotonic())) and pipe.recv_bytes()
            except (EOFError, OSError):
                started = False
            if not started:
                self.close()
                raise ProcessesError(f"rank {rank} has not started within {START:g} s")
        for pipe in self._pipes:
            pipe.send_bytes(b"join")
        self._joined = True

    def _collect(self, deadline: float, check: bool) -> dict[int, Any]:
        results: dict[int, Any] = {}
        while len(results) < self.ranks:
            waiting = {self._pipes[r]: r for r in range(self.ranks) if r not in results}
            for pipe in connection.wait(list(waiting), max(0.0, deadline - time.monotonic())):
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    results[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self._children[rank].join(5)
                    ended = f"died, exit code {self._children[rank].exitcode}"
                    results[rank] = Failure(rank, ended, died=True)
                if check and isinstance(results[rank], Failure):
                    deadline = min(deadline, time.monotonic() + 3.0)  # the others may tell more
            if time.monotonic() > deadline:
                break
        return results

    def close(self) -> None:
        """End the processes: kindly, then not."""
        for pipe in self._pipes:
            pipe.close()
        for child in self._children:
            child.join(2)
            if child.exitcode is None:
                child.kill()
                child.join()
        self._pipes, self._children = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_shared: dict[int, Processes] = {}


def shared(ranks: int = 4) -> Processes:
    """Processes that all tests of a session share; started again if a failure ended them."""
    if ranks not in _shared or not _shared[ranks].alive:
        _shared[ranks] = Processes(ranks)
        atexit.register(_shared[ranks].close)
    return _shared[ranks]


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def run_processes(function: Callable[..., Any], ranks: int, *args: Any, **options: Any) -> list[Any]:
    """One :meth:`Processes.run` of ``function(*args)`` in ``ranks`` processes of its own; ``options`` of both."""
    how = {name: options.pop(name) for name in ("check",) if name in options}
    with Processes(ranks, **options) as processes:
        return processes.run(function, *args, **how)


def _context() -> Any:
    """Processes forked from one that has imported torch and nothing else has run in; else new ones."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "gapless.distributed"])
    return context


def _serve(
    rank: int, ranks: int, store: str, backend: str, timeout: float, pipe: connection.Connection
) -> None:
    torch.set_num_threads(1)
    pipe.send_bytes(b"started")
    pipe.recv_bytes()
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            request = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            where, payload = pickle.loads(request)
            function = _find(*where)
            reply = pickle.dumps(function(*pickle.loads(payload)))
        except BaseException:
            pipe.send_bytes(pickle.dumps(Failure(rank, traceback.format_exc(), died=False)))
            os._exit(1)  # peers see the connection close; a broken group has no orderly end
        pipe.send_bytes(reply)


def _find(module: str, file: str | None, name: str) -> Callable[..., Any]:
    """The function, from a module that can be imported, or from a test's file."""
    if module not in sys.modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            if file is None:
                raise
            _load(module, file)
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _load(module: str, file: str) -> None:
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    spec.loader.exec_module(loaded)
