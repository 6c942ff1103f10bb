"""Settings of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from bgd_plugin.config.checks import check

__all__ = ["BLOCK_SIZES", "FAMILIES", "MAX_CODEBOOK_SIZE", "LayerConfig"]

# Kinds of layer with their own setting; `first_layer`, `depthwise_conv` and `embedding` stay float by default.
FAMILIES = ("conv", "pointwise_conv", "depthwise_conv", "linear", "embedding", "first_layer")
MAX_CODEBOOK_SIZE = 65536
BLOCK_SIZES = {"conv": 9, "pointwise_conv": 4, "depthwise_conv": 9, "linear": 4, "embedding": 4}
"""The default block size of each kind of layer."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """How one layer is quantized.

    Args:
        block_size: weights per block (d); must divide the number of weights in a row. None: that of the layer's kind,
            lowered to the next size that divides the row.
        codebook_size: codewords in the layer's codebook (k), a power of two from 2 to 65536. Layers with few blocks get
            the largest power of two strictly below a quarter of their number of blocks.

    Raises:
        ConfigError: a value is out of range.
    """

    block_size: int | None = None
    codebook_size: int = 256

    def __post_init__(self) -> None:
        check(
            self.block_size is None or (isinstance(self.block_size, int) and self.block_size >= 1),
            f"block_size={self.block_size!r}: give an integer of at least 1, or None for that of the layer's kind",
        )
        k = self.codebook_size
        check(
            isinstance(k, int) and 2 <= k <= MAX_CODEBOOK_SIZE and k & (k - 1) == 0,
            f"codebook_size={k!r}: give a power of two from 2 to {MAX_CODEBOOK_SIZE}",
        )
