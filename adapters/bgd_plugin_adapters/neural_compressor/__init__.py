"""`bgd_plugin` as an algorithm of neural-compressor: its configs, its entry points, its files.

`quantize`, `prepare`, `convert`, `autotune` and `save` are neural-compressor's own. Saved networks are loaded by `load`
of this package, because neural-compressor's own `load` supports only its own algorithms.
"""

from bgd_plugin_adapters.neural_compressor.algorithm import BGDQuantizer
from bgd_plugin_adapters.neural_compressor.composition import install as _install_composition
from bgd_plugin_adapters.neural_compressor.config import BGDConfig, get_default_bgd_config
from bgd_plugin_adapters.neural_compressor.loading import load
from bgd_plugin_adapters.neural_compressor.model import QuantizedModel

__all__ = ["BGDConfig", "BGDQuantizer", "QuantizedModel", "get_default_bgd_config", "load", "register"]


def register() -> None:
    """Make sums of our configs and others' work; the config and the algorithm are registered by importing."""
    _install_composition()


register()
