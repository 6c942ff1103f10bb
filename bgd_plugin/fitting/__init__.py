"""Fit one layer: from its weight and inputs to a codebook and codes. One module per method."""

from bgd_plugin.fitting.method import FittedLayer, LayerContext, Method, output_error, shift_gain
from bgd_plugin.fitting.method_em import EM, fit_weight
from bgd_plugin.fitting.method_full_gram import FULL
from bgd_plugin.fitting.share import fitted_once
from bgd_plugin.fitting.target_residual import Skip

__all__ = [
    "METHODS",
    "FittedLayer",
    "LayerContext",
    "Method",
    "Skip",
    "fit_weight",
    "fitted_once",
    "output_error",
    "shift_gain",
]

METHODS: dict[str, Method] = {"em": EM, "full": FULL}
