"""What settings say of a kind of layer."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

from bgd_plugin.config.layer import BLOCK_SIZES, CODEBOOK_SIZE, QUANTIZED, LayerConfig

__all__ = ["ByKind"]


class ByKind:
    """Settings with a field for each of `FAMILIES`."""

    def sizes(self, setting: LayerConfig, kind: str) -> tuple[int, int]:
        """Block and codebook size of a setting where nothing chooses them.

        Args:
            setting: the layer's setting.
            kind: the kind of layer, one of `FAMILIES`.

        Returns:
            weights per block and codewords: the setting's own, or else those of the kind of layer.
        """
        own = self.setting_for(kind)
        block_size = setting.block_size or (own and own.block_size) or BLOCK_SIZES[kind]
        return block_size, setting.codebook_size or CODEBOOK_SIZE

    def setting_for(self, family: str) -> LayerConfig | None:
        """The setting of a family; None where its layers stay float, as those with "auto" do until data decides.

        Args:
            family: a kind of layer, one of `FAMILIES`.

        Returns:
            the setting, or None.
        """
        value: LayerConfig | Literal["auto"] | None = getattr(self, family)
        return None if value == "auto" else value

    def decided(self, *, has_data: bool) -> Self:
        """The same settings without "auto": what is left to a bound or a budget is open, or stays float.

        Args:
            has_data: whether the effect of each layer's error will be measured.

        Returns:
            the settings.
        """
        config: Any = self
        if config.embedding != "auto":
            return self
        is_open = config.has_target or (has_data and config.bound is not None)
        decided: Self = dataclasses.replace(config, embedding=LayerConfig() if is_open else None)
        return decided

    def is_default(self, family: str) -> bool:
        """Whether the block size of a family is the default rather than the user's choice.

        Args:
            family: a kind of layer, one of `FAMILIES`.

        Returns:
            True if it is the default, which gives way to the next smaller one that divides a layer's row.
        """
        value = self.setting_for(family)
        return value is not None and family in QUANTIZED and value.block_size in (None, BLOCK_SIZES[family])
