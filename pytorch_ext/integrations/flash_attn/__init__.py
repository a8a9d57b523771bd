# SPDX-License-Identifier: Apache-2.0
"""flash-attn 2.8's public functions over gapless, and ``install()``, which lets ``import flash_attn`` find them.

    import gapless.integrations.flash_attn as shim
    shim.install()                                    # before the first import that asks for flash_attn
    from flash_attn import flash_attn_varlen_func     # the real one if it is installed, else gapless

Names, order of arguments, shapes and what is returned are flash-attn's. What differs:

- float32 and float64 are taken beside float16 and bfloat16, any head dim from 1 to 256, any page size, and CPU tensors.
- ``dropout_p > 0`` raises a ValueError.
- The LSE of a row that sees no key is -inf, the neutral element of a merge, where flash-attn 2 gives +inf.
- ``softmax_lse`` has a gradient; flash-attn drops it.
- ``cu_seqlens`` has to end at the number of tokens; it may be int64.
- Results are deterministic whatever ``deterministic`` says, and do not depend on ``num_splits``.
"""

from gapless.integrations.flash_attn.installation import install, uninstall
from gapless.integrations.flash_attn.interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
