"""Rotations that fold into neighbouring layers: the same network, with weights that are easier to quantize."""

from bgd_plugin.rotation.rotate import Rotated, rotated

__all__ = ["Rotated", "rotated"]
