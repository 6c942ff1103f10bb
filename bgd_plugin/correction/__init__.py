"""Corrections without gradients, as layers are quantized: batch norms, row scales, biases, depthwise weights."""

from bgd_plugin.correction.absorb import absorb_row_scale_, row_scale_bounds, shift_biases_
from bgd_plugin.correction.batchnorm import correct_batchnorm_, is_batchnorm
from bgd_plugin.correction.bias import shift_helps
from bgd_plugin.correction.depthwise_refit import refitted
from bgd_plugin.correction.gain import Gain
from bgd_plugin.correction.norms import DriftedSkip, NormCorrection

__all__ = [
    "DriftedSkip",
    "Gain",
    "NormCorrection",
    "absorb_row_scale_",
    "correct_batchnorm_",
    "is_batchnorm",
    "refitted",
    "row_scale_bounds",
    "shift_biases_",
    "shift_helps",
]
