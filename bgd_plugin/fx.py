"""Quantization as one pass among others in a `torch.fx` pass manager."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from bgd_plugin.config import BGDConfig, given_config
from bgd_plugin.errors import ConfigError
from bgd_plugin.planning.survey import is_finished
from bgd_plugin.quantization.quantize import quantize
from bgd_plugin.report.report import Report

__all__ = ["BGDPass"]


class BGDPass(PassBase):
    """`quantize` under the contract of `torch.fx.passes.infra.pass_base.PassBase`.

    The graph module that goes in is left as it is; the result holds a new one. A graph in which every layer
    that the settings name is quantized already comes out unmodified, so a pass manager may run the pass more than once.

    Attributes:
        report: of the last call that changed something.
    """

    def __init__(self, config: BGDConfig | None, calibration: Iterable[Any], **options: Any) -> None:
        """Take the arguments of `quantize`, all but the network."""
        super().__init__()
        self.config = given_config(config)
        self.calibration = calibration
        self.options = options
        self.report: Report | None = None

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check that the input is a graph module with a well-formed graph.

        Args:
            graph_module: the input of the pass.

        Raises:
            ConfigError: it is not a graph module.
        """
        if not isinstance(graph_module, fx.GraphModule):
            raise ConfigError(
                f"BGDPass works on a GraphModule, found {type(graph_module).__name__}: trace the network first"
            )
        graph_module.graph.lint()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Quantize the graph module with the settings and data of this pass; see `bgd_plugin.quantize`.

        Args:
            graph_module: the float network; never changed.

        Returns:
            the result, with `modified=False` if every layer is already quantized.
        """
        if is_finished(graph_module, self.config):
            return PassResult(graph_module, False)
        result = quantize(graph_module, self.calibration, self.config, **self.options)
        self.report = result.report
        return PassResult(result.model, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that the graph is still well formed.

        Args:
            graph_module: the output of the pass.
        """
        graph_module.graph.lint()
