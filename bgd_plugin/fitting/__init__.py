"""Fit one layer: from its weight and its inputs to a codebook and codes. One module for each method."""

from bgd_plugin.fitting.base import FittedLayer, LayerContext, Method, output_error
from bgd_plugin.fitting.em import EM
from bgd_plugin.fitting.full import FULL

__all__ = ["METHODS", "FittedLayer", "LayerContext", "Method", "output_error"]

METHODS: dict[str, Method] = {"em": EM, "full": FULL}
