# SPDX-License-Identifier: Apache-2.0
"""Check, then time all implementations of a case turn by turn, so that noise hits them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from gapless.bench import memory, peers
from gapless.bench.cases import Case, Inputs
from gapless.bench.check import check

SGEMM = 2048  # rows and columns of the matrices whose product gives the sgemm rate
SHORTEST_SAMPLE = 1e-3  # seconds; shorter calls are repeated inside a sample
Tell = Callable[[str], object]


@dataclass
class Timing:
    """Samples of one callable, in seconds for one call."""

    call: Callable[[], object]
    repeat: int = 1
    spent: float = 0.0
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def _synchronizer(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def ratio(a: Timing, b: Timing) -> float:
    """``a``'s time over ``b``'s, the median over the rounds that both were timed in (``paired``)."""
    return statistics.median(x / y for x, y in zip(a.samples, b.samples, strict=True))


@contextmanager
def no_collector():
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 50,
    seconds: float = 10.0,
    device: str = "cpu",
    paired: bool = False,
) -> dict[str, Timing]:
    """Time the calls in rounds, one sample of each per round, in another order every time.

    Everyone has an equal share of ``seconds``: who has used it up sits out the rounds that are left, so a slow call
    has fewer samples (at least one). Each is called before, untimed, unless a single call uses the share up.
    ``paired``: all stay for as many rounds as fit into ``seconds``, so that sample ``i`` of one goes with sample ``i``
    of another: for ratios of calls that take very different times.
    """
    timings = {name: Timing(call) for name, call in calls.items()}
    wait = _synchronizer(device)
    share = seconds / max(1, len(timings))
    with no_collector():
        for t in timings.values():
            once = _clock(t, wait)
            if once >= share and not paired:
                t.spent, t.samples = once, [once]  # too slow to be called for nothing
            else:
                # The better of two: one hiccup would make every sample a single call.
                while (
                    t.repeat < 1000 and (elapsed := min(_clock(t, wait), _clock(t, wait))) < SHORTEST_SAMPLE
                ):
                    t.repeat = min(1000, max(2 * t.repeat, int(t.repeat * SHORTEST_SAMPLE / elapsed)))
        order, draw = list(timings.values()), random.Random(0)
        for done in range(rounds):
            draw.shuffle(order)  # who comes after whom decides what is in the caches
            if paired and done and sum(t.spent for t in timings.values()) >= seconds:
                break
            for t in order:
                if t.samples and t.spent >= share and not paired:
                    continue
                elapsed = _clock(t, wait)
                t.spent += elapsed
                t.samples.append(elapsed / t.repeat)
    return timings


def _clock(t: Timing, wait: Callable[[], None]) -> float:
    begin = time.perf_counter()
    for _ in range(t.repeat):
        result = t.call()
    wait()
    elapsed = time.perf_counter() - begin
    del result  # freeing is not timed
    return elapsed


def sgemm(device: str = "cpu") -> tuple[Callable[[], object], int]:
    """A float32 matrix product and its number of operations: the rate that a perfect kernel could have."""
    a, b = torch.randn(2, SGEMM, SGEMM, device=device)
    return lambda: torch.mm(a, b), 2 * SGEMM**3


def read(nbytes: int, device: str = "cpu") -> tuple[Callable[[], object], int]:
    """A dot product of two float32 halves of ``nbytes``: the fastest plain read that torch has."""
    a, b = torch.ones(2, max(nbytes, 1 << 28) // 8, device=device)
    return lambda: torch.dot(a, b), 2 * a.nbytes


def checked(run: peers.Run, inputs: Inputs) -> str:
    """``ok``, or in what the result is wrong."""
    with_grads = inputs.case.direction == "fwd_bwd"
    outs, grads = run.train() if with_grads else (run.infer(), ())
    try:
        check(inputs, run.pack(outs), run.pack_grads(grads) if with_grads else None)
    except AssertionError as error:
        return (str(error).strip().splitlines() or ["wrong"])[0]
    return "ok"


def measure(
    case: Case,
    impls: Iterable[str] | None = None,
    *,
    rounds: int = 50,
    seconds: float = 10.0,
    with_memory: bool = True,
    tell: Tell = lambda text: None,
) -> tuple[list[dict], list[dict]]:
    """Rows of one case, and what was skipped and why.

    A result of gapless outside the error budget is not timed. Peers are timed all the same and the row says so: how
    exact they are is theirs to choose.
    """
    running, skipped = peers.select(None if impls is None else list(impls), case)
    inputs = case.inputs()
    runs: dict[str, peers.Run] = {}
    verdicts: dict[str, str] = {}
    for implementation in running:
        name = implementation.name
        tell(f"checking {name}")
        try:
            run = implementation.prepare(inputs)
            verdicts[name] = checked(run, inputs)
        except Exception as error:  # a peer that breaks must not take the table with it
            if not implementation.peer:
                raise
            skipped[name] = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"]
            continue
        if implementation.peer or verdicts[name] == "ok":
            runs[name] = run
    tell("timing " + ", ".join(runs))
    calls = {name: run.call(case.direction) for name, run in runs.items()}
    anchors = {"sgemm": sgemm(case.device)}
    if case.paged:
        anchors["read"] = read(case.key_bytes, case.device)
    timed = interleave(
        calls | {f"/{name}": anchor[0] for name, anchor in anchors.items()},
        rounds=rounds,
        seconds=seconds,
        device=case.device,
    )
    rates = {name: work / timed[f"/{name}"].median for name, (_, work) in anchors.items()}
    rows = []
    for implementation in running:
        name = implementation.name
        if name not in verdicts:
            continue
        timing = timed.get(name)
        extra = None
        if with_memory and timing:
            tell(f"memory of {name}")
            extra = memory.extra_bytes(case, name, torch.get_num_threads())
        rows.append(
            describe(case)
            | {
                "impl": name,
                "peer": implementation.peer,
                "check": verdicts[name],
                "seconds": timing.median if timing else None,
                "samples": len(timing.samples) if timing else 0,
                "extra_bytes": extra,
                "sgemm_flops_per_second": rates["sgemm"],
                "read_bytes_per_second": rates.get("read"),
            }
        )
    return rows, [{"case": case.label, "impl": name, "why": why} for name, why in skipped.items()]


def describe(case: Case) -> dict:
    """What a row says about its case."""
    return {
        "case": case.label,
        "workload": case.name,
        "sequences": len(case.lengths),
        "tokens": case.tokens_q,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "dim": case.dim,
        "dtype": case.dtype,
        "causal": case.causal,
        "direction": case.direction,
        "device": case.device,
        "flops": case.flops,
        "key_bytes": case.key_bytes,
    }
