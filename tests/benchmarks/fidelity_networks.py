"""Networks with random weights for `fidelity`: torchvision's, the smallest of timm's, ten transformers families."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Case", "batches_of", "cases", "initialized"]

_SIZES = (64, 96, 128, 160, 224, 256)
_FAINT = 1e-3
"""Parameters that start below this, such as layer scales and heads of zeros, would hide every difference."""


@dataclass(frozen=True)
class Case:
    """A network to try.

    Attributes:
        name: library and architecture.
        build: makes the network.
        inputs: makes one batch for a network.
        compared: the part whose outputs are compared; "" for all of it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Any]
    compared: str = ""


def cases(*, timm: bool = True) -> Iterator[Case]:
    """All networks; timm's only if it is installed."""
    yield from _transformers()
    if timm:
        yield from _timm()
    yield from _torchvision()


@torch.no_grad()
def initialized(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network with random weights, none of which is so small that it would hide an error."""
    torch.manual_seed(seed)
    model = build().eval()
    for parameter in model.parameters():
        if not parameter.abs().max() > _FAINT:
            nn.init.normal_(parameter, std=0.05)
    return model


def batches_of(batch: Any) -> list[Any]:
    """Two batches: one, and its samples in the opposite order of their last dimension."""
    return [batch, pytree.tree_map_only(Tensor, lambda t: t.flip(-1), batch)]


# --- torchvision


def _torchvision() -> Iterator[Case]:
    from tests.benchmarks import zoo

    for kind, name in zoo.names():
        yield Case(
            f"torchvision:{name}",
            partial(zoo.build, kind, name),
            lambda _, kind=kind, name=name: zoo.inputs(kind, name),  # type: ignore[misc]
            "backbone" if kind == "detection" else "",
        )


# --- timm

SMALLEST: tuple[str, ...] = (
    "test_convnext",
    "test_efficientnet",
    "test_efficientnet_gn",
    "test_efficientnet_ln",
    "test_efficientnet_evos",
    "test_vit",
    "test_nfnet",
    "test_mambaout",
    "test_vit2",
    "test_byobnet",
    "test_convnext3",
    "test_resnet",
    "test_convnext2",
    "starnet_s050",
    "test_coatnet",
    "test_vit_relpos",
    "test_vit3",
    "test_vit4",
    "starnet_s100",
    "dla46x_c",
    "test_maxvit",
    "mobilevit_xxs",
    "dla46_c",
    "dla60x_c",
    "edgenext_xx_small",
    "mobilevitv2_050",
    "starnet_s150",
    "mobilenetv3_small_050",
    "lcnet_035",
    "mobilenetv2_035",
    "lcnet_050",
    "ese_vovnet19b_slim_dw",
    "mobilenetv4_conv_small_035",
    "mobilenetv2_050",
    "mnasnet_small",
    "mobilenetv3_small_075",
    "tf_mobilenetv3_small_075",
    "tinynet_e",
    "tf_mobilenetv3_small_minimal_100",
    "semnasnet_050",
    "convnext_zepto_rms",
    "convnext_zepto_rms_ols",
    "mnasnet_050",
    "mobilenetv4_conv_small_050",
    "repghostnet_050",
    "mobilevit_xs",
    "edgenext_x_small",
    "tinynet_d",
    "efficientvit_m0",
    "lcnet_075",
    "tinynet_c",
    "mobilenetv3_small_100",
    "tf_mobilenetv3_small_100",
    "repghostnet_058",
    "ghostnet_050",
    "mobilenetv2_075",
    "regnetx_002",
    "cspnext_tiny",
)
"""The 40 smallest architectures, and the 40 smallest of those that are not timm's own tests, by parameters."""


def _timm() -> Iterator[Case]:
    import timm

    for name in SMALLEST:
        yield Case(f"timm:{name}", partial(timm.create_model, name, pretrained=False), _images)


@torch.no_grad()
def _images(model: Any) -> Tensor:
    """Images of the smallest size that a network takes."""
    generator = torch.Generator().manual_seed(1)
    channels, *_ = model.default_cfg.get("input_size", (3,))
    for size in _SIZES:
        batch = torch.rand(2, channels, size, size, generator=generator)
        try:
            model(batch)
        except (AssertionError, RuntimeError, ValueError):
            continue
        return batch
    raise ValueError(f"{type(model).__name__} takes no square images of {_SIZES[0]} to {_SIZES[-1]} px")


# --- transformers

_BODY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 200,
}
_PAIR: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 200,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_VISION = {**_BODY, "image_size": 32, "patch_size": 8}
_FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "GPT2LMHeadModel": ({"vocab_size": 200, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, "tokens"),
    "T5ForConditionalGeneration": (
        {"vocab_size": 200, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        "pairs",
    ),
    "WhisperForConditionalGeneration": (_PAIR, "spectrogram"),
    "CLIPModel": (
        {"text_config": {**_BODY, "eos_token_id": 2}, "vision_config": _VISION, "projection_dim": 32},
        "tokens and pixels",
    ),
    "GemmaForCausalLM": ({**_BODY, "num_key_value_heads": 2, "head_dim": 16}, "tokens"),
    "MixtralForCausalLM": ({**_BODY, "num_key_value_heads": 2, "num_local_experts": 4}, "tokens"),
    "Wav2Vec2Model": (
        {
            **_BODY,
            "conv_dim": (32, 32),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        "sound",
    ),
    "BertModel": (_BODY, "tokens"),
    "MambaForCausalLM": ({"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, "tokens"),
    "SegformerForSemanticSegmentation": (
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]},
        "pixels",
    ),
}


def _transformers() -> Iterator[Case]:
    for name, (settings, inputs) in _FAMILIES.items():
        yield Case(
            f"transformers:{name}",
            partial(_transformer, name, settings),
            lambda _, inputs=inputs: _given(inputs),  # type: ignore[misc]
        )


def _transformer(name: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    kind: Any = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**settings))
    return model


def _given(inputs: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 199, (2, 12), generator=generator)
    pixels = torch.rand(2, 3, 32, 32, generator=generator)
    return {
        "tokens": {"input_ids": tokens},
        "pairs": {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)},
        "spectrogram": {
            "input_features": torch.rand(2, 8, 40, generator=generator),
            "decoder_input_ids": tokens,
        },
        "tokens and pixels": {"input_ids": tokens, "pixel_values": pixels},
        "sound": {"input_values": torch.randn(2, 2000, generator=generator)},
        "pixels": {"pixel_values": pixels},
    }[inputs]
