# SPDX-License-Identifier: Apache-2.0
"""Let ``import flash_attn`` find the shim where no real flash-attn is installed."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

VERSION = "2.8.3"  # the flash-attn whose interface this is; code compares it with the version it needs

MODULES = {
    "flash_attn": "gapless.integrations.flash_attn.interface",
    "flash_attn.flash_attn_interface": "gapless.integrations.flash_attn.interface",
    "flash_attn.bert_padding": "gapless.integrations.flash_attn.bert_padding",
}


def install() -> bool:
    """Make ``import flash_attn`` work, if it would fail now.

    Call it before importing what looks for flash-attn (transformers asks once and remembers). The shim stands last
    in line: a real flash-attn, installed now or later, is always found first. Package metadata is provided too, so
    that ``importlib.metadata.version("flash-attn")`` answers.

    Returns:
        True if ``flash_attn`` is the shim from now on, False if a real flash-attn is installed.
    """
    spec = importlib.util.find_spec("flash_attn")
    if spec is None:
        sys.meta_path.append(_finder)
        importlib.invalidate_caches()
        return True
    return getattr(spec, "gapless_shim", False)


def uninstall() -> None:
    """Undo :func:`install`. Modules that took functions from the shim keep them."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name in MODULES:
        if getattr(getattr(sys.modules.get(name), "__spec__", None), "gapless_shim", False):
            del sys.modules[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the modules of ``MODULES``, and the metadata of a distribution called flash-attn."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        spec = ModuleSpec(fullname, self, origin="gapless", is_package=fullname == "flash_attn")
        spec.gapless_shim = True  # type: ignore[attr-defined]  # how gapless tells it from the real one
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        source = importlib.import_module(MODULES[module.__name__])
        module.__doc__ = source.__doc__
        module.__dict__.update({name: getattr(source, name) for name in source.__all__})
        if module.__name__ == "flash_attn":
            module.__version__ = VERSION  # type: ignore[attr-defined]

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        name = None if context is None else context.name
        if name is None or name.lower().replace("_", "-") == "flash-attn":
            yield _Distribution()


class _Distribution(importlib.metadata.Distribution):
    """Metadata that says flash-attn, and that gapless provides it."""

    FILES = {
        "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\nSummary: provided by gapless\n",
        "top_level.txt": "flash_attn\n",
    }

    def read_text(self, filename: str) -> str | None:
        return self.FILES.get(filename)

    def locate_file(self, path):
        raise FileNotFoundError(f"{path}: flash-attn is provided by gapless, it has no files")


_finder = _Finder()
