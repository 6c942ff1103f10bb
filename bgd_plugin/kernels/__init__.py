"""Fast inference on codes: kernels that read codes instead of weights, and when they are used.

Quantized layers use them on a CPU, if no gradient is needed and `llvmlite` (the extra `fast`) is installed. The plain
path, which decodes the weight and calls torch's operator, is the reference; training and export use it.
"""

from bgd_plugin.jit.switch import disabled, enabled

__all__ = ["disabled", "enabled"]
