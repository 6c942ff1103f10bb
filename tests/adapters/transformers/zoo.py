"""Small models of many architectures of transformers, with random weights, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

__all__ = ["QUICK", "ZOO", "Entry", "answer"]

_BODY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {**_BODY, **_SPECIAL, "num_key_value_heads": 2}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    **_SPECIAL,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
_SPEECH = {
    **{k: v for k, v in _BODY.items() if k != "max_position_embeddings"},
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


@dataclass(frozen=True)
class Entry:
    """A model class, its settings, and what goes in.

    Attributes:
        model: name of the class.
        settings: of its config.
        inputs: "tokens", "pairs" (of an encoder and a decoder), "pixels", "sound", "spectrogram" or "both".
        body: field of the config with the number of layers; empty if there is none.
    """

    model: str
    settings: dict[str, Any]
    inputs: str = "tokens"
    body: str = "num_hidden_layers"

    def build(self) -> Any:
        """The model, in evaluation mode; always the same weights."""
        torch.manual_seed(0)
        kind: Any = getattr(transformers, self.model)
        model = kind(kind.config_class(**self.settings)).eval()
        with torch.no_grad():  # fresh models have zeros where trained ones have not
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    def batch(self, seed: int = 0) -> dict[str, Any]:
        """What the model takes."""
        return _INPUTS[self.inputs](torch.Generator().manual_seed(seed))


def _tokens(generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 60, (3, 10), generator=generator)}


def _pairs(generator: torch.Generator) -> dict[str, Any]:
    return _tokens(generator) | {"decoder_input_ids": torch.randint(3, 60, (3, 6), generator=generator)}


def _pixels(generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


_INPUTS: dict[str, Callable[[torch.Generator], dict[str, Any]]] = {
    "tokens": _tokens,
    "pairs": _pairs,
    "pixels": _pixels,
    "sound": lambda generator: {"input_values": torch.randn(2, 2000, generator=generator)},
    "spectrogram": lambda generator: {
        "input_features": torch.randn(2, 8, 40, generator=generator),
        "decoder_input_ids": torch.randint(3, 60, (2, 6), generator=generator),
    },
    "both": lambda generator: _tokens(generator) | _pixels(generator),
}

_CLIP = {
    "text_config": {**_BODY, **_SPECIAL, "projection_dim": 16},
    "vision_config": {k: v for k, v in _VISION.items() if k != "num_labels"},
    "projection_dim": 16,
}

ZOO: dict[str, Entry] = {
    "albert": Entry("AlbertForMaskedLM", {**_BODY, "embedding_size": 16}),
    "bart": Entry("BartForConditionalGeneration", _SEQ2SEQ, "pairs", "decoder_layers"),
    "beit": Entry("BeitForImageClassification", _VISION, "pixels"),
    "bert": Entry("BertForSequenceClassification", {**_BODY, "num_labels": 3}),
    "blenderbot": Entry("BlenderbotForConditionalGeneration", _SEQ2SEQ, "pairs", "decoder_layers"),
    "bloom": Entry(
        "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, **_SPECIAL}, body="n_layer"
    ),
    "clip": Entry("CLIPModel", _CLIP, "both", ""),
    "cohere": Entry("CohereForCausalLM", _DECODER),
    "convnext": Entry(
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "num_labels": 3},
        "pixels",
        "",
    ),
    "deberta": Entry(
        "DebertaV2ForSequenceClassification",
        {**_BODY, "num_labels": 3, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "deit": Entry("DeiTForImageClassification", _VISION, "pixels"),
    "dinov2": Entry(
        "Dinov2ForImageClassification", {k: v for k, v in _VISION.items() if k != "intermediate_size"}, "pixels"
    ),
    "distilbert": Entry(
        "DistilBertForSequenceClassification",
        {
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": 64,
            "max_position_embeddings": 64,
            "num_labels": 3,
        },
        body="n_layers",
    ),
    "electra": Entry("ElectraForSequenceClassification", {**_BODY, "embedding_size": 16, "num_labels": 3}),
    "falcon": Entry(
        "FalconForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, **_SPECIAL},
    ),
    "gemma": Entry("GemmaForCausalLM", {**_DECODER, "head_dim": 8}),
    "gemma2": Entry("Gemma2ForCausalLM", {**_DECODER, "head_dim": 8}),
    "gemma3": Entry("Gemma3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "gpt_neo": Entry(
        "GPTNeoForCausalLM",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 64,
            "max_position_embeddings": 64,
            **_SPECIAL,
        },
        body="",
    ),
    "gpt_neox": Entry("GPTNeoXForCausalLM", {**_BODY, **_SPECIAL}),
    "granite": Entry("GraniteForCausalLM", _DECODER),
    "hubert": Entry("HubertModel", _SPEECH, "sound"),
    "llama": Entry("LlamaForCausalLM", _DECODER),
    "marian": Entry("MarianMTModel", _SEQ2SEQ, "pairs", "decoder_layers"),
    "mbart": Entry("MBartForConditionalGeneration", _SEQ2SEQ, "pairs", "decoder_layers"),
    "mistral": Entry("MistralForCausalLM", _DECODER),
    "mixtral": Entry("MixtralForCausalLM", {**_DECODER, "num_local_experts": 2}),
    "mobilevit": Entry(
        "MobileViTForImageClassification",
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
            "image_size": 32,
            "num_labels": 3,
        },
        "pixels",
        "",
    ),
    "modernbert": Entry("ModernBertForSequenceClassification", {**_BODY, **_SPECIAL, "num_labels": 3}),
    "mpnet": Entry("MPNetForSequenceClassification", {**_BODY, "num_labels": 3, "pad_token_id": 1}),
    "olmo2": Entry("Olmo2ForCausalLM", _DECODER),
    "opt": Entry(
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 64,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            **_SPECIAL,
        },
    ),
    "pegasus": Entry("PegasusForConditionalGeneration", _SEQ2SEQ, "pairs", "decoder_layers"),
    "phi": Entry("PhiForCausalLM", {**_BODY, **_SPECIAL}),
    "phi3": Entry("Phi3ForCausalLM", _DECODER),
    "qwen2": Entry("Qwen2ForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": Entry("Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "resnet": Entry(
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 3},
        "pixels",
        "",
    ),
    "roberta": Entry("RobertaForMaskedLM", {**_BODY, "pad_token_id": 1}),
    "segformer": Entry(
        "SegformerForImageClassification",
        {
            "hidden_sizes": [16, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "num_labels": 3,
        },
        "pixels",
        "",
    ),
    "siglip": Entry("SiglipModel", {k: v for k, v in _CLIP.items() if k != "projection_dim"}, "both", ""),
    "smollm3": Entry("SmolLM3ForCausalLM", _DECODER),
    "stablelm": Entry("StableLmForCausalLM", _DECODER),
    "starcoder2": Entry("Starcoder2ForCausalLM", _DECODER),
    "swin": Entry(
        "SwinForImageClassification",
        {
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "image_size": 32,
            "patch_size": 4,
            "num_labels": 3,
        },
        "pixels",
        "",
    ),
    "t5": Entry(
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 64,
            **_SPECIAL,
            "decoder_start_token_id": 0,
        },
        "pairs",
        "num_decoder_layers",
    ),
    "vit": Entry("ViTForImageClassification", _VISION, "pixels"),
    "wav2vec2": Entry("Wav2Vec2Model", _SPEECH, "sound"),
    "whisper": Entry(
        "WhisperForConditionalGeneration",
        {
            **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"},
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        "spectrogram",
        "decoder_layers",
    ),
    "xlnet": Entry(
        "XLNetForSequenceClassification",
        {"d_model": 32, "d_inner": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64, "num_labels": 3, **_SPECIAL},
        body="n_layer",
    ),
}

QUICK = ("bert", "gemma2", "qwen2", "t5", "clip", "wav2vec2", "resnet", "swin")
"""One of each kind: a head on a body, a scaled and a plain tied embedding, three names of one table, two towers, a
model that looks at its convolutions while it is built, one that traces, and one whose buffers are not saved."""


@torch.no_grad()
def answer(model: Any, entry: Entry) -> torch.Tensor:
    """What the model says to a batch: tokens that it generates, and its first floating-point output."""
    batch = entry.batch(seed=9)
    output = model(**batch)
    values = [value for value in output.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    first = values[0].flatten().double()
    if not model.can_generate():
        return first
    prompt = {name: value for name, value in batch.items() if not name.startswith("decoder")}
    tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False, min_new_tokens=4)
    return torch.cat([first, tokens.flatten().double()])
