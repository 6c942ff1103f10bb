"""What `plan` and `quantize` return."""

from bgd_plugin.planning.types import Plan, PlannedLayer, SkippedLayer
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.report.report import Quantized, Report

__all__ = ["LayerReport", "Plan", "PlannedLayer", "Quantized", "Report", "SkippedLayer"]
