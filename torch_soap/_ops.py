"""Loads libsoap_runtime.so, which registers `torch.ops.torch_soap.*`. Importing this module is enough."""

from __future__ import annotations

from pathlib import Path

import torch

RUNTIME_LIBRARY = Path(__file__).parent / "libsoap_runtime.so"

if not RUNTIME_LIBRARY.exists():
    raise ImportError(f"{RUNTIME_LIBRARY} is missing: build the extension (`make build`)")
torch.ops.load_library(str(RUNTIME_LIBRARY))
