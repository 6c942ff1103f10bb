"""Corrections without gradients, applied as layers are quantized: batch norms and depthwise weights."""

from bgd_plugin.correction.batchnorm import absorb_row_scale_, correct_batchnorm_, is_batchnorm, row_scale_bounds
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
]
