# SPDX-License-Identifier: Apache-2.0
"""Cost models from published timings."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from gapless.schedule.cost import CostModel
from gapless.schedule.fit import fit_times
from gapless.schedule.model_shape import ModelShape

LLAMA_7B = ModelShape(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, dim=128)

# ByteScale (arXiv:2502.21231): milliseconds of one layer's attention, forward, by tokens of one sequence, and of
# its MLP at 16K. That the first row is attention with its projections, and no MLP, follows from the numbers:
# a s^2 + b s + g fits all six within 1.4%, while an MLP would already take 0.9 ms of the 0.8 ms at 4K.
BYTESCALE_ATTENTION = {4096: 0.8, 8192: 1.8, 16384: 4.8, 32768: 14.1, 65536: 48.2, 131072: 175.5}
BYTESCALE_MLP = {16384: 3.6}
# GPUs that the timings are of: inferred, not published. The MLP's would be 1230 TFLOP/s, so at least 4 of the Ampere
# GPUs that the group's clusters of 12,288 had (MegaScale, arXiv:2402.15627), and a step of the ablation's batch, which
# takes its 1,024 GPUs about 150 s when balanced, would take them 16, 33, 66 or 131 s if they were of 1, 2, 4 or 8.
BYTESCALE_GPUS = 8


@cache
def bytescale() -> CostModel:
    """LLaMA-7B as in ByteScale's timings; a rank is a node of 8 tensor-parallel GPUs.

    Published: the times. Assumed: 8 network cards of 200 Gbit/s a node (MegaScale, arXiv:2402.15627), all of which
    carry a rank's keys and values, since each GPU has its own heads; four PCIe 4.0 x16 uplinks of 25 GB/s from 8
    GPUs to their host; 10 us a message; nothing recomputed. There are no links between ranks but the network.
    """
    tokens = np.array(list(BYTESCALE_ATTENTION), np.float64)
    cell, token, fixed = fit_times(
        tokens, tokens * (tokens + 1) / 2, np.array(list(BYTESCALE_ATTENTION.values())) * 1e-3
    )
    mlp = sum(ms * 1e-3 / s for s, ms in BYTESCALE_MLP.items())
    network = BYTESCALE_GPUS * 200e9 / 8
    return CostModel(
        cell=cell,
        token=token + mlp,
        fixed=fixed,
        layers=LLAMA_7B.layers,
        activation_bytes=LLAMA_7B.activation_bytes,
        kv_bytes=LLAMA_7B.kv_bytes,
        hidden_bytes=LLAMA_7B.hidden_bytes,
        host_bandwidth=4 * 25e9,
        node_bandwidth=network,
        network_bandwidth=network,
        latency=10e-6,
        name="bytescale: LLaMA-7B on ranks of 8 GPUs (arXiv:2502.21231)",
    )


@cache
def bytescale_gpu() -> CostModel:
    """The same, where a rank is one GPU, as ByteScale's 8K tokens a rank and 256 ranks for 2M suggest.

    An eighth of the speed, one card of 200 Gbit/s and half a PCIe uplink a rank. Assumed: 200 GB/s each way inside a
    node (NVLink of an A800). For clusters of 8 ranks a node.
    """
    node = bytescale()
    return node.replace(
        cell=node.cell * BYTESCALE_GPUS,
        token=node.token * BYTESCALE_GPUS,
        fixed=node.fixed * BYTESCALE_GPUS,
        host_bandwidth=node.host_bandwidth / BYTESCALE_GPUS,
        node_bandwidth=200e9,
        network_bandwidth=node.network_bandwidth / BYTESCALE_GPUS,
        name="bytescale-gpu: LLaMA-7B on ranks of one GPU (arXiv:2502.21231)",
    )


@cache
def flexsp() -> CostModel:
    """A 7B model on A100s with FlexSP's constants (arXiv:2412.01523); a rank is one GPU.

    Its solver counts ``5.128e-6 s^2 + 0.18396 s + 629.36`` milliseconds forward and backward for the whole model,
    4.71 MB of activations a token, and 121 GB/s inside a node of 8, 8.7 GB/s beyond. (It exchanges heads
    all-to-all, where a ring hands on keys and values: the sizes here are a ring's.) Assumed: one PCIe 4.0 x16
    uplink of 25 GB/s for two GPUs.
    """
    layers, attention, linear = LLAMA_7B.layers, 1 + 2.5, 1 + 2.0
    return CostModel(
        cell=2 * 5.128e-9 / (attention * layers),  # s^2 / 2 visible pairs
        token=0.18396e-3 / (linear * layers),
        fixed=629.36e-3 / (linear * layers),
        layers=layers,
        activation_bytes=4.71e6 / layers,
        kv_bytes=LLAMA_7B.kv_bytes,
        hidden_bytes=LLAMA_7B.hidden_bytes,
        host_bandwidth=25e9 / 2,
        node_bandwidth=121e9,
        network_bandwidth=8.7e9,
        name="flexsp: 7B on A100 (arXiv:2412.01523)",
    )


_MODELS: dict[str, Callable[[], CostModel]] = {
    "bytescale": bytescale,
    "bytescale-gpu": bytescale_gpu,
    "flexsp": flexsp,
}
NAMES = tuple(_MODELS)


def published(name: str) -> CostModel:
    """The model of that name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name not in _MODELS:
        raise ValueError(f"name is {name!r}: it has to be one of {', '.join(NAMES)}")
    return _MODELS[name]()
