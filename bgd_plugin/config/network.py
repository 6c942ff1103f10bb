"""The settings of a run: frozen, validated on creation, and versioned as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bgd_plugin.config.by_kind import ByKind
from bgd_plugin.config.checks import check, check_budget, check_choice, check_codes, check_share, counts
from bgd_plugin.config.layer import FAMILIES, LayerConfig, of_its_kind
from bgd_plugin.config.paper import opened, paper_settings
from bgd_plugin.config.parsing import Override, checked_overrides, nested, nested_overrides, upgraded
from bgd_plugin.config.training import DistillationConfig, FinetuningConfig, ReconstructionConfig
from bgd_plugin.errors import ConfigError

__all__ = ["DEFAULT_DIVERGENCE", "BGDConfig"]

CONFIG_VERSION = 2
DEFAULT_DIVERGENCE = 0.01
"""The bound on the divergence of a run without a budget."""


@dataclass(frozen=True, kw_only=True)
class BGDConfig(ByKind):
    """What to quantize, and how.

    By default the sizes of each layer are chosen for the smallest file whose answers stay within `max_divergence` of
    the float network's. Settings of layers and of training stages may be given as mappings, `{"codebook_size": 16}`;
    what they leave out is the default. `overrides` may be a mapping by glob.

    Args:
        method: how codebook and codes are fitted. "full" uses all correlations of a layer's inputs; "em" is the paper's
            method, expectation-maximization on one pooled Gram matrix.
        conv: setting for convolutions. `LayerConfig()` leaves the sizes to the bound or the budget, a block size fixes
            them, and None keeps these layers float; the same holds for the other kinds of layer. A block size that
            differs from that of the layer's kind is never adjusted, and is an error if it does not divide the row.
        pointwise_conv: setting for 1×1 convolutions and transposed convolutions.
        depthwise_conv: setting for depthwise convolutions; float by default.
        linear: setting for linear layers.
        embedding: setting for embeddings. "auto": their sizes are chosen as other layers' are, 8 bits for each weight
            with a scale for each row being one choice, by a bound with calibration data, or by a budget; otherwise they
            stay float.
        first_layer: setting for the first layer; float by default.
        codes: what a bound or a budget chooses from, beside blocks. "entropy": codes of single weights as entropy-coded
            streams, at any rate: the smallest file, while in memory and in exports such a layer takes a byte a weight.
            "trellis": trellis codes, two bits for each weight in the file and in memory.
        overrides: pairs of a glob on layer names and a setting (None keeps the layer float). The first match wins; a
            glob that matches nothing is an error.
        rounds: rounds of least squares and coordinate descent in method "full".
        asymmetric_step: target of method "full", from the layer's own weight (0) to the weight that best reproduces the
            float network's outputs on the student's inputs (1).
        rotation: put a transformer's weights into random bases before the fit, by rotations that fold into neighbouring
            layers, if the float network then computes the same; False by default. "auto": in method "full", unless
            zeros are to be preserved. The report says what was rotated, or why not.
        refit_depthwise: refit depthwise convolutions that stay float, in method "full", to the float network's outputs
            on the student's inputs.
        em_iterations: maximum number of EM iterations per layer.
        batchnorm: "matched" adjusts the statistics of each batch norm so that its output keeps the float network's mean
            and variance on the calibration data; "reestimate" replaces them by that data's; "keep" keeps them.
        distillation: training of each layer's codewords right after its fit, or None.
        reconstruction: training of block after block to match the float blocks' outputs, or None.
        finetuning: training of the whole network after the last layer, or None.
        freeze_norms: replace batch norms at the end by one scale and one shift per channel: half the bytes, but no
            statistics that later training could update.
        codebook_storage: "float16" or "int8", the type in which codebooks are stored and to which they are rounded;
            "int8" has one scale per codebook.
        weight_storage: "float32", "float16", "int8" or "int5", the same for the weights of first layers and depthwise
            convolutions that stay float by default (not by an override); "int8" has one scale per output channel.
            "int5": the scales of depthwise convolutions go into the batch norms behind them, their weights take five
            bits, and the numbers of frozen norms seven significant ones; other weights as "int8". With entropy-coded
            codes "int8" is the same as "int5".
        float_storage: "float32" or "float16", the same for everything else that stays float (norms, biases, layers
            kept float by an override).
        preserve_zeros: keep weights that are exactly zero, such as pruned ones, exactly zero after decoding; their
            positions take bits in the file. False: treat them like other weights.
        target_bytes: a budget, the maximum length of the file in bytes. The sizes that the settings leave open are then
            chosen layer by layer, by the effect of each layer's error on the network's output.
        target_ratio: the same budget as a compression ratio, float bytes / file bytes. Give one of the two.
        max_divergence: a bound on how far the compressed network's answers may be from the float network's: the
            Kullback-Leibler divergence of the logits (or probabilities) in nats. For other outputs, and for "logits"
            that do not tell samples apart, such as an embedding's, the squared error may be a tenth of this share of
            the outputs' variance. Open sizes are chosen for the smallest file within it. The default applies where no
            budget is given. None: without a budget, open sizes are fixed at blocks of 9 (convolutions) or 4 and 256
            codewords.
        kept_aside: share of the calibration samples that no step of the fit sees: they judge the compressed network's
            answers at the end. At most 64 samples are kept aside, and none of fewer than 16.
        seed: seed of all random choices.

    Raises:
        ConfigError: a value is out of range, or settings contradict each other.
    """

    method: Literal["full", "em"] = "full"
    conv: LayerConfig | None = LayerConfig()
    pointwise_conv: LayerConfig | None = LayerConfig()
    depthwise_conv: LayerConfig | None = None
    linear: LayerConfig | None = LayerConfig()
    embedding: LayerConfig | Literal["auto"] | None = "auto"
    first_layer: LayerConfig | None = None
    codes: Literal["blocks", "trellis", "entropy"] = "blocks"
    overrides: tuple[Override, ...] = ()
    em_iterations: int = 100
    rounds: int = 2
    asymmetric_step: float = 0.5
    rotation: bool | Literal["auto"] = False
    refit_depthwise: bool = True
    batchnorm: Literal["matched", "reestimate", "keep"] = "matched"
    distillation: DistillationConfig | None = None
    reconstruction: ReconstructionConfig | None = None
    finetuning: FinetuningConfig | None = None
    freeze_norms: bool = False
    codebook_storage: Literal["int8", "float16"] = "int8"
    weight_storage: Literal["int8", "int5", "float16", "float32"] = "int8"
    float_storage: Literal["float16", "float32"] = "float16"
    preserve_zeros: bool = False
    target_bytes: int | None = None
    target_ratio: float | None = None
    max_divergence: float | None = DEFAULT_DIVERGENCE
    kept_aside: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("method", self.method, ("full", "em"))
        check(self.rounds >= 0, f"rounds={self.rounds}: give 0 or more")
        step = self.asymmetric_step
        check(0 <= step <= 1, f"asymmetric_step={step}: give a number from 0 to 1")
        check_choice("rotation", self.rotation, (True, False, "auto"))
        check_choice("batchnorm", self.batchnorm, ("matched", "reestimate", "keep"))
        check_choice("codebook_storage", self.codebook_storage, ("int8", "float16"))
        check_choice("weight_storage", self.weight_storage, ("int8", "int5", "float16", "float32"))
        check_choice("float_storage", self.float_storage, ("float16", "float32"))
        check(isinstance(self.preserve_zeros, bool), f"preserve_zeros={self.preserve_zeros!r}: give True or False")
        check(counts(self.em_iterations), f"em_iterations={self.em_iterations}: give at least 1")
        check_budget(self.target_bytes, self.target_ratio, self.max_divergence, DEFAULT_DIVERGENCE)
        check_codes(self.codes, has_budget=self.has_budget, preserve_zeros=self.preserve_zeros)
        check(isinstance(self.seed, int), f"seed={self.seed!r}: give an integer")
        check_share("kept_aside", self.kept_aside, 0.5)
        for family in FAMILIES:
            value = getattr(self, family)
            value = nested(LayerConfig, value, family) if isinstance(value, Mapping) else value
            is_auto = family == "embedding" and value == "auto"
            check(
                is_auto or value is None or isinstance(value, LayerConfig),
                f"{family}={value!r}: give a LayerConfig, or None to keep these layers float",
            )
            object.__setattr__(self, family, value if is_auto else of_its_kind(value, family))
        for name, kind in _STAGES.items():
            object.__setattr__(self, name, nested(kind, getattr(self, name), name))
        object.__setattr__(self, "overrides", checked_overrides(nested_overrides(self.overrides)))

    @classmethod
    def paper(
        cls,
        regime: Literal["small", "large", "mask_rcnn"] = "small",
        *,
        codebook_size: int = 256,
        fc_codebook_size: int | None = None,
        pointwise_block_size: int | None = None,
        **fields: Any,
    ) -> BGDConfig:
        """The paper's method and block sizes.

        Args:
            regime: "small" has blocks of 9 (3×3) and 4 (1×1), "large" blocks of 18 and 8; linear layers have 4 in both.
                "mask_rcnn" is "large" for torchvision's `maskrcnn_resnet50_fpn`: the layers that the paper keeps float
                stay float, and finetuning matches features and the logits of both stages.
            codebook_size: codewords for convolutions.
            fc_codebook_size: codewords for linear layers (in the paper 2048 for ResNet-18, 1024 for ResNet-50, 256 for
                Mask R-CNN).
            pointwise_block_size: block size of 1×1 convolutions; 4 in the paper's large ResNet-18.
            **fields: any field of `BGDConfig`. With a budget or a bound, sizes equal to the default ones are chosen.

        Returns:
            the settings.

        Raises:
            ConfigError: an unknown regime or field, or a value out of range.

        **Source**: arXiv 1907.05686, sections 4.1 and 4.4, table 1.
        """
        check(regime in ("small", "large", "mask_rcnn"), f"regime={regime!r}: give 'small', 'large' or 'mask_rcnn'")
        settings = paper_settings(regime, codebook_size, fc_codebook_size, pointwise_block_size)
        result = cls(**(settings | fields))
        return dataclasses.replace(result, **(opened(settings) | fields)) if result.has_budget else result

    @property
    def has_target(self) -> bool:
        """Whether the file has a budget in bytes, given as such or as a ratio."""
        return self.target_bytes is not None or self.target_ratio is not None

    @property
    def bound(self) -> float | None:
        """The bound on the divergence, in nats, that applies: none beside a budget in bytes."""
        return None if self.has_target else self.max_divergence

    @property
    def makes_good(self) -> bool:
        """Whether each layer's fit aims at the float network's outputs, and makes good part of what was lost before."""
        return self.method == "full" and self.asymmetric_step > 0

    @property
    def has_budget(self) -> bool:
        """Whether open sizes are chosen layer by layer, for a number of bytes or a bound."""
        return self.has_target or self.max_divergence is not None

    def budget_bytes(self, original_bytes: int) -> int | None:
        """The maximum file size in bytes; None without a budget.

        Args:
            original_bytes: size of the float network's parameters and buffers.

        Returns:
            bytes, or None.
        """
        if self.target_ratio is not None:
            return int(original_bytes / self.target_ratio)
        return self.target_bytes

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values.

        Returns:
            dicts, lists, numbers and texts, with the version of the layout.
        """
        return {"version": CONFIG_VERSION} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BGDConfig:
        """Inverse of `to_dict`.

        Args:
            values: the settings as plain values; missing fields have their defaults, also within a layer's setting.

        Returns:
            the settings.

        Raises:
            ConfigError: an unknown field, an invalid value, or a version newer than this library supports.
        """
        check(isinstance(values, Mapping), f"the settings are of type {type(values).__name__}: give a mapping")
        fields = dict(values)
        version = fields.pop("version", CONFIG_VERSION)
        check(
            isinstance(version, int) and version <= CONFIG_VERSION,
            f"the settings have version {version!r}, this library reads up to {CONFIG_VERSION}: upgrade bgd-plugin",
        )
        result: BGDConfig = nested(cls, upgraded(fields, version), "BGDConfig")
        return result

    def to_json(self) -> str:
        """The settings as JSON.

        Returns:
            the text of `to_dict`.
        """
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> BGDConfig:
        """Inverse of `to_json`.

        Args:
            text: the settings as JSON.

        Returns:
            the settings.

        Raises:
            ConfigError: the text is not JSON; otherwise as `from_dict`.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the settings are not JSON ({error})") from error
        return cls.from_dict(values)


_STAGES: dict[str, type[Any]] = {
    "distillation": DistillationConfig,
    "reconstruction": ReconstructionConfig,
    "finetuning": FinetuningConfig,
}
