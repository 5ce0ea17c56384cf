"""bitsandbytes, imported where it is used: it takes a second, and not every device has its kernels."""

import logging
from functools import cache
from typing import Any


@cache
def library_for(device_type: str) -> Any:
    """bitsandbytes' native library, where it has kernels for a kind of device; else None.

    The import warns of a kernel for products in 4 bit that it did not download. It is not used here, so that one logger
    tells errors only.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    loaded = not isinstance(lib, ErrorHandlerMockBNBNativeLibrary)
    return lib if loaded and device_type in ("cpu", "cuda") else None


def bitsandbytes() -> Any:
    """The package; its import warns of nothing (see ``library_for``)."""
    library_for("cpu")
    import bitsandbytes

    return bitsandbytes
