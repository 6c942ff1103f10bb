"""The algorithm: record the network's arguments during calibration, then quantize with the core."""

from __future__ import annotations

from typing import Any

from neural_compressor.common.utils import Mode
from neural_compressor.torch.algorithms.base_algorithm import Quantizer
from neural_compressor.torch.utils import logger
from neural_compressor.torch.utils.utility import register_algo
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import bgd_plugin as bgd
from bgd_plugin.integration import CalibrationError
from bgd_plugin_adapters.neural_compressor.config import ALGORITHM
from bgd_plugin_adapters.neural_compressor.foreign import traced
from bgd_plugin_adapters.neural_compressor.layers import Mapping, core_settings
from bgd_plugin_adapters.neural_compressor.model import as_quantized_

__all__ = ["BGDQuantizer", "bgd_entry"]

_META = "bgd_calibration"
_OPTIONS = ("teacher", "checkpoint", "memory_bytes", "reproducible", "progress", "original_bytes")


@register_algo(name=ALGORITHM)
def bgd_entry(model: nn.Module, configs_mapping: Mapping, *args: Any, mode: Any = Mode.QUANTIZE, **kwargs: Any) -> Any:
    """Apply the algorithm; gradients stay on, since distillation and finetuning need them.

    Args:
        model: the float or the prepared network.
        configs_mapping: the config of each layer, by name and type.
        *args: ignored; neural-compressor passes them to some algorithms.
        mode: prepare, convert or quantize.
        **kwargs: `run_fn` and `run_args`; `convert` also passes on the options of `bgd_plugin.quantize`: `teacher`,
            `checkpoint`, `memory_bytes`, `reproducible`, `progress`, `original_bytes`.

    Raises:
        CalibrationError: no `run_fn`, or the network was not called during calibration.
    """
    return BGDQuantizer(configs_mapping).execute(model, mode, *args, **kwargs)


class BGDQuantizer(Quantizer):
    """Prepare, calibrate, convert. The state is in the prepared network; the quantizer has none.

    The `args` and `kwargs` of its methods are those of `bgd_entry`.
    """

    def execute(self, model: nn.Module, mode: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one step: `mode` is prepare, convert or quantize; `args` and `kwargs` are those of `bgd_entry`."""
        steps = {Mode.PREPARE: self.prepare, Mode.CONVERT: self.convert, Mode.QUANTIZE: self.quantize}
        return steps[mode](model, *args, **kwargs)

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Make the network record the arguments of its calls; `args` and `kwargs` are ignored."""
        _take_recording(model)
        recording = _Recording()
        model.register_forward_pre_hook(recording, with_kwargs=True)
        if isinstance(model, fx.GraphModule):  # a deepcopy drops its hooks, and keeps its meta
            graph: Any = model
            graph.meta[_META] = recording
        return model

    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Prepare the network, run `run_fn` from `kwargs` (`args` are ignored), and convert.

        Raises:
            CalibrationError: no `run_fn`, or it does not call the network.
        """
        run_fn = kwargs.get("run_fn")
        if run_fn is None:
            raise CalibrationError(
                "BGDConfig needs calibration: give run_fn=callable(model), which calls the network on some batches"
            )
        self.prepare(model)
        try:
            run_fn(model, *(kwargs.get("run_args") or ()))
        except BaseException:
            _take_recording(model)
            raise
        return self.convert(model)

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Quantize with the recorded batches; `kwargs` may hold options of `bgd_plugin.quantize`, `args` are ignored.

        Raises:
            CalibrationError: the network is not prepared, or was not called.
        """
        recording = _take_recording(model)
        if recording is None or not recording.batches:
            what = "was not called" if recording else "is not prepared"
            raise CalibrationError(
                f"BGDConfig needs calibration, and the network {what}: prepare it, call it on some batches, "
                "then convert what prepare returned"
            )
        options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
        graph = traced(model)
        config = core_settings(graph, self.quant_config, options.get("original_bytes"))
        result = bgd.quantize(graph, recording.batches, config, forward=_call, **options)
        for skipped in result.report.skipped:
            logger.info("bgd leaves %s as it is: %s", skipped.name, skipped.reason)
        logger.info("bgd: %d bytes, %.1f times smaller", result.report.compressed_bytes, result.report.ratio)
        for name in ("is_prepared", "quant_config", "example_inputs"):  # set by neural-compressor's `prepare`
            vars(result.model).pop(name, None)
        earlier = getattr(model, "qconfig", None)  # of another algorithm, or of layers quantized before
        qconfig = (earlier if isinstance(earlier, dict) else {}) | self.quant_config
        return as_quantized_(result.model, qconfig, result.report)


class _Recording:
    """A hook that records the arguments of each call; copies share the record."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, Any]] = []

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.batches.append(pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs)))

    def __deepcopy__(self, memo: Any) -> _Recording:
        result = _Recording()
        result.batches = self.batches
        memo[id(self)] = result
        return result


def _call(model: nn.Module, batch: Any) -> Any:
    args, kwargs = batch
    return model(*args, **kwargs)


def _take_recording(model: nn.Module) -> _Recording | None:
    """Remove the recording from a prepared network, which is then as before."""
    meta: dict[str, Any] = model.meta if isinstance(model, fx.GraphModule) else {}
    found: _Recording | None = meta.pop(_META, None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Recording):
            found = hook
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    return found
