# SPDX-License-Identifier: Apache-2.0
"""What work costs: one model for kernels' tiles, for planners and for the simulator."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.model_shape import ModelShape

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CostModel:
    """Times and sizes of one transformer layer, and of the machine that runs it.

    A layer's forward pass over a micro-batch takes ``cell * cells + token * tokens + fixed`` seconds, where ``cells``
    counts the visible (query, key) pairs: ByteScale's ``T(s) = a1 s^2 + b1 s + g`` (arXiv:2502.21231, section 4.2).

    Attributes:
        cell: seconds of attention for one visible pair, forward, one layer.
        token: seconds of everything else for one token, forward, one layer.
        fixed: seconds of one layer's forward pass that do not depend on the micro-batch.
        layers: of the model.
        backward_cell, backward_token: the backward pass as a multiple of the forward one.
        activation_bytes: kept for the backward pass, for one token of one layer.
        kv_bytes: keys and values of one token of one layer: what a ring hands on in the forward pass.
        backward_kv: what it hands on in the backward pass (keys, values and their gradients), as a multiple of that.
        hidden_bytes: one token's hidden state: what remapping moves.
        host_bandwidth: bytes a second between a rank and its host, each way.
        node_bandwidth: bytes a second between two ranks of a node.
        network_bandwidth: bytes a second of one network card (NIC), each way.
        latency: seconds of one message.
        causal: whether a query sees only the keys up to its own.
        name: where the numbers are from.
    """

    cell: float
    token: float
    fixed: float = 0.0
    layers: int = 1
    backward_cell: float = 2.5
    backward_token: float = 2.0
    activation_bytes: float = 0.0
    kv_bytes: float = 0.0
    backward_kv: float = 2.0
    hidden_bytes: float = 0.0
    host_bandwidth: float = math.inf
    node_bandwidth: float = math.inf
    network_bandwidth: float = math.inf
    latency: float = 0.0
    causal: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("causal", "name"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field.name} is {value!r}: it has to be a number")
            if not value >= 0 or (math.isinf(value) and not field.name.endswith("bandwidth")):
                raise ValueError(f"{field.name} is {value}: it has to be finite and at least 0")
            if value == 0 and field.name.endswith("bandwidth"):
                raise ValueError(f"{field.name} is 0: it has to be above 0")
        if not isinstance(self.layers, int) or self.layers < 1:
            raise ValueError(f"layers is {self.layers}: it has to be a whole number of at least 1")

    def cells(self, lengths: ArrayLike) -> Floats:
        """Visible pairs of whole sequences."""
        n = np.asarray(lengths, np.float64)
        return n * (n + 1) / 2 if self.causal else n * n

    def attention(self, cells: ArrayLike) -> Floats:
        """Seconds of attention over so many pairs: forward and backward, all layers."""
        return np.asarray(cells, np.float64) * (self.cell * (1 + self.backward_cell) * self.layers)

    def linear(self, tokens: ArrayLike) -> Floats:
        """Seconds of everything else for so many tokens: forward and backward, all layers."""
        return np.asarray(tokens, np.float64) * (self.token * (1 + self.backward_token) * self.layers)

    @property
    def overhead(self) -> float:
        """Seconds that each micro-batch costs whatever is in it: forward and backward, all layers."""
        return self.fixed * (1 + self.backward_token) * self.layers

    def work(self, lengths: ArrayLike) -> Floats:
        """Seconds of computing that whole sequences take, on however many ranks: forward and backward, all layers."""
        return self.attention(self.cells(lengths)) + self.linear(lengths)

    def ring(
        self,
        tokens: ArrayLike,
        ranks: ArrayLike,
        across_nodes: ArrayLike = False,
        width: ArrayLike | None = None,
        sharing: int = 1,
    ) -> Floats:
        """Seconds in which ``ranks`` ranks hand the keys and values of ``tokens`` tokens all around, all layers.

        Each rank sends its share ``ranks - 1`` times forward, and ``backward_kv`` times as much backward. With a
        ``width`` below ``ranks``, most of that goes around so many ranks of a node, and only once each time from
        every rank to the next node (:attr:`gapless.schedule.Schedule.widths`), both at the same time; ``sharing`` ranks
        of a node then send over one network card.
        """
        n = np.asarray(ranks, np.float64)
        w = n if width is None else np.asarray(width, np.float64)
        share = np.asarray(tokens, np.float64) / n * (self.kv_bytes * (1 + self.backward_kv))
        near, far = (share / b + 2 * self.latency for b in (self.node_bandwidth, self.network_bandwidth))
        inner = np.where(np.asarray(across_nodes) & (w == n), far, near)
        outer = share * sharing / self.network_bandwidth + 2 * self.latency
        return self.layers * np.maximum(n / w * (w - 1) * inner, (n / w - 1) * outer)

    def seconds(
        self,
        tokens: ArrayLike,
        cells: ArrayLike,
        ranks: ArrayLike = 1,
        across_nodes: ArrayLike = False,
        width: ArrayLike | None = None,
        sharing: int = 1,
    ) -> Floats:
        """Seconds of one micro-batch of ``tokens`` and ``cells`` on each of its ``ranks``, the ring behind attention.

        Forward and backward, all layers, with the overhead of one micro-batch. See :meth:`ring` for the ring.
        """
        n = np.asarray(ranks, np.float64)
        attention = np.maximum(self.attention(cells) / n, self.ring(tokens, n, across_nodes, width, sharing))
        return attention + self.linear(tokens) / n + self.overhead

    def activation(self, tokens: ArrayLike) -> Floats:
        """Bytes that so many tokens keep for the backward pass: ``l * Act(s)``."""
        return np.asarray(tokens, np.float64) * (self.activation_bytes * self.layers)

    def resident_share(self, offload: ArrayLike) -> Floats:
        """Share of the activations that stays on the device when a share ``offload`` of them goes to the host.

        The first and the last layer's stay, so ``(2 + (1 - r)(l - 2)) / l`` (ByteScale, equation 3).
        """
        inner = max(self.layers - 2, 0)
        return 1 - np.asarray(offload, np.float64) * (inner / self.layers)

    def replace(self, **changes: Any) -> CostModel:
        """The same model with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite bandwidth is None."""
        return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> CostModel:
        """What :meth:`to_dict` gave. Raises ValueError where a field is unknown or missing."""
        known = {f.name for f in fields(CostModel)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"cost model: unknown fields {unknown}; known are {sorted(known)}")
        if missing := sorted({"cell", "token"} - set(values)):
            raise ValueError(f"cost model: the fields {missing} are missing")
        given: dict[str, Any] = {k: math.inf if v is None else v for k, v in values.items()}
        return CostModel(**given)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def load(path: str | Path) -> CostModel:
        """Read what :meth:`save` or ``gapless calibrate`` wrote."""
        try:
            values = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(
                f"{path} holds a {type(values).__name__}: it has to be an object of cost model fields"
            )
        return CostModel.from_dict(values)

    @staticmethod
    def estimate(
        shape: ModelShape, *, flops: float, attention_flops: float | None = None, **fields: Any
    ) -> CostModel:
        """A model from sizes alone: operations over a rate that is really reached, with no measurement.

        Args:
            shape: of the model.
            flops: operations a second of the linear modules.
            attention_flops: of attention; None is the same.
            fields: the other fields of the model (bandwidths, latency, ...).
        """
        for name, rate in (("flops", flops), ("attention_flops", attention_flops)):
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} is {rate}: it has to be above 0 and finite")
        return CostModel(
            cell=shape.cell_flops / (attention_flops or flops),
            token=2 * shape.linear_parameters / flops,
            layers=shape.layers,
            **{
                "activation_bytes": shape.activation_bytes,
                "kv_bytes": shape.kv_bytes,
                "hidden_bytes": shape.hidden_bytes,
            }
            | fields,
        )

    @staticmethod
    def published(name: str) -> CostModel:
        """A model fitted to published timings: see :mod:`gapless.schedule.published` for the names."""
        from gapless.schedule.published import published

        return published(name)
