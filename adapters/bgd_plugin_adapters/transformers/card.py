"""The model card's section, and saving with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bgd_plugin.integration import ConfigError, mib
from bgd_plugin_adapters.transformers.config import BGDQuantizationConfig

__all__ = ["model_card_section", "save_pretrained"]

_BEGIN, _END = "<!-- bgd_plugin: begin -->", "<!-- bgd_plugin: end -->"


def save_pretrained(model: Any, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """`model.save_pretrained`, with a section of the model card (`README.md`) on how to load the folder.

    An existing card keeps its text; only the section is replaced.

    Args:
        model: quantized by this adapter.
        save_directory: the folder.
        **options: of `model.save_pretrained`.

    Raises:
        ConfigError: `push_to_hub=True`, which would upload the folder before the section is in it.
    """
    if options.get("push_to_hub"):
        raise ConfigError(
            "push_to_hub=True uploads before the model card is written: use huggingface_hub.upload_folder"
        )
    section = model_card_section(model)
    model.save_pretrained(save_directory, **options)
    card = Path(save_directory) / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    before, begin, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2] if begin else ""
    parts = [before.rstrip(), section, after.strip()]
    card.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def model_card_section(model: Any) -> str:
    """The section of the model card, in Markdown.

    Raises:
        ConfigError: the model is not quantized by this adapter.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BGDQuantizationConfig) or not config.layers:
        raise ConfigError("the model is not quantized by bgd_plugin, so its card needs no section")
    layers = [tuple(sizes[:2]) for sizes in config.layers.values() if len(sizes) > 1]
    kinds = ", ".join(f"blocks of {block} from {codewords} codewords" for block, codewords in sorted(set(layers)))
    size = f" The float model has {mib(config.original_bytes)}." if config.original_bytes else ""
    name = type(model).__name__
    return f"""{_BEGIN}
## Compressed by product quantization

{len(layers)} layers are product-quantized by [bgd_plugin](https://pypi.org/project/bgd-plugin/): {kinds}.{size}

Only the package's adapter can read the weights. `pip install 'bgd-plugin[transformers]'`, then:

```python
import bgd_plugin
from transformers import {name}

bgd_plugin.load_adapter("transformers")
model = {name}.from_pretrained("this folder")
```

Without the adapter, `from_pretrained` warns of an unknown quantization type and fails with an error about sizes that
do not match; never pass `ignore_mismatched_sizes=True`, which fills the layers with random numbers.
{_END}"""
