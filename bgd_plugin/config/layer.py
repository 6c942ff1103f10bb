"""Settings of one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from bgd_plugin.config.checks import check, check_choice

__all__ = ["BLOCK_SIZES", "CODEBOOK_SIZE", "FAMILIES", "MAX_CODEBOOK_SIZE", "QUANTIZED", "LayerConfig", "of_its_kind"]

# Kinds of layer with their own setting; `first_layer`, `depthwise_conv` and `embedding` stay float by default.
FAMILIES = ("conv", "pointwise_conv", "depthwise_conv", "linear", "embedding", "first_layer")
QUANTIZED = ("conv", "pointwise_conv", "linear")
"""The kinds that are quantized by default."""
MAX_CODEBOOK_SIZE = 65536
BLOCK_SIZES = {"conv": 9, "pointwise_conv": 4, "depthwise_conv": 9, "linear": 4, "embedding": 4}
"""The block size of each kind of layer where nothing chooses one."""
CODEBOOK_SIZE = 256
"""The codebook size where nothing chooses one."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """How one layer is quantized. Without a block size, a bound or a budget chooses the sizes.

    Args:
        block_size: weights per block (d); must divide the number of weights in a row. None: chosen by the bound on the
            divergence or by the budget; without either, or beside the codebook size of a kind of layer, that of the
            kind, lowered to the next size that divides the row.
        codebook_size: codewords in the layer's codebook (k), a power of two from 2 to 65536. None: 256 beside a block
            size that is set, otherwise chosen like the block size. Layers with few blocks get the largest power of two
            strictly below a quarter of their number of blocks; with a block size of 1 that you set, up to one
            codeword for each weight, which then is exact but for the rounding of the codebook.
        codes: "blocks", or "trellis" for two bits for each weight and a scale for each row: six codes together look up
            a table of 4096 values that is the same for all layers. At two bits the error is lower than with blocks;
            there are no sizes to set or to choose.

    Raises:
        ConfigError: a value is out of range, or sizes are set beside trellis codes.
    """

    block_size: int | None = None
    codebook_size: int | None = None
    codes: Literal["blocks", "trellis"] = "blocks"

    def __post_init__(self) -> None:
        check_choice("codes", self.codes, ("blocks", "trellis"))
        check(
            self.codes == "blocks" or (self.block_size is None and self.codebook_size is None),
            f"codes='trellis' beside block_size={self.block_size!r}, codebook_size={self.codebook_size!r}: these codes "
            "have no blocks and no codebook; leave both sizes out",
        )
        check(
            self.block_size is None or (isinstance(self.block_size, int) and self.block_size >= 1),
            f"block_size={self.block_size!r}: give an integer of at least 1, or None to have it chosen",
        )
        k = self.codebook_size
        check(
            k is None or (isinstance(k, int) and 2 <= k <= MAX_CODEBOOK_SIZE and k & (k - 1) == 0),
            f"codebook_size={k!r}: give a power of two from 2 to {MAX_CODEBOOK_SIZE}",
        )
        if k is None and self.block_size is not None:
            object.__setattr__(self, "codebook_size", CODEBOOK_SIZE)

    @property
    def is_open(self) -> bool:
        """Whether a bound or a budget chooses the block size, and the codebook size if that is not set either."""
        return self.block_size is None and self.codes == "blocks"


def of_its_kind(setting: LayerConfig | None, family: str) -> LayerConfig | None:
    """A kind of layer's setting; one that names a codebook size alone takes the block size of the kind.

    Args:
        setting: of the kind; None: it stays float.
        family: one of `FAMILIES`. Kinds that are float by default are left as they are.
    """
    if setting is None or not setting.is_open or setting.codebook_size is None or family not in QUANTIZED:
        return setting
    return replace(setting, block_size=BLOCK_SIZES[family])
