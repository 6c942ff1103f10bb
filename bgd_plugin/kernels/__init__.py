"""Fast inference on codes: kernels that read a sixteenth of the bytes, and when they are used.

Quantized layers choose them by themselves on a CPU where no gradient is needed and `llvmlite` (the extra `fast`) is
installed. The plain path, decoding and then torch's operator, stays the reference, and is what trains and is exported.
"""

from bgd_plugin.kernels.switch import disabled, enabled

__all__ = ["disabled", "enabled"]
