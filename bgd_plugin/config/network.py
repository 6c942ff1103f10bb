"""Settings: frozen, checked where they are made, and versioned as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bgd_plugin.config.checks import check, check_choice, counts
from bgd_plugin.config.layer import LayerConfig
from bgd_plugin.config.training import DistillationConfig, FinetuningConfig, ReconstructionConfig
from bgd_plugin.errors import ConfigError

__all__ = ["FAMILIES", "BGDConfig"]

CONFIG_VERSION = 1

# What the paper leaves float in a Mask R-CNN beside its first layer, and what is distilled: torchvision's names.
_MASK_RCNN_FLOAT = ("rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits")
_MASK_RCNN_OUTPUTS = ("backbone", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor")

Override = tuple[str, "LayerConfig | None"]


def _check_budget(target_bytes: Any, target_ratio: Any) -> None:
    check(
        target_bytes is None or target_ratio is None,
        f"target_bytes={target_bytes} and target_ratio={target_ratio}: give one of the two",
    )
    check(
        target_bytes is None or counts(target_bytes),
        f"target_bytes={target_bytes!r}: give a whole number of bytes, or None for no budget",
    )
    is_ratio = isinstance(target_ratio, (int, float)) and 1 < target_ratio < float("inf")
    check(
        target_ratio is None or is_ratio,
        f"target_ratio={target_ratio!r}: give how many times smaller the file is to be, a number above 1",
    )


# The kinds of layer that have a setting of their own; `first_layer`, `depthwise_conv` and `embedding` stay
# float unless set.
FAMILIES = ("conv", "pointwise_conv", "depthwise_conv", "linear", "embedding", "first_layer")


@dataclass(frozen=True, kw_only=True)
class BGDConfig:
    """What to quantize, and how.

    Args:
        method: how codebook and codes are fitted; "full" works with all correlations of a layer's inputs, "em" is
            the paper's (expectation-maximisation on one pooled Gram matrix).
        conv, pointwise_conv, depthwise_conv, linear, embedding, first_layer: setting for each kind of layer; None keeps
            it float. Transposed convolutions go with the pointwise ones: their blocks are runs of input channels. A
            default block size that does not divide a layer gives way to the largest one below it that does; a block
            size that you set is taken at its word, and is an error where it does not divide.
        overrides: pairs of a glob on layer names and a setting (None keeps the layer float); the first match wins,
        and a glob that matches nothing is an error.
        rounds: of least squares and coordinate descent in method "full".
        asymmetric_step: how far method "full" moves its aim from the layer's own weight (0) towards the weight that
            gives the float network's outputs on the student's inputs (1).
        refit_depthwise: depthwise convolutions that stay float are fitted anew, in method "full", to give the float
            network's outputs on the student's inputs.
        em_iterations: upper bound of the EM iterations of a layer.
        batchnorm: "matched" moves the statistics of each batch norm so that its output keeps the float network's mean
        and variance on the calibration data; "reestimate" replaces them by the calibration data's; "keep" leaves them.
        distillation: per-layer training of the codewords, or None.
        reconstruction: training of block after block against the float blocks' outputs, or None.
        finetuning: training of all codewords after the last layer, or None.
        freeze_norms: batch norms become, at the end, a factor and a summand for each channel: half the bytes, and no
            statistics that a later training could update.
        codebook_storage: the type that codebooks are rounded to and stored in; "int8" has one scale for each codebook.
        weight_storage: the same for the weights of first layers and depthwise convolutions that stay float by these
            settings (not by an override); "int8" has one scale for each output channel.
        float_storage: the same for all else that stays float (norms, biases, layers of an override).
        preserve_zeros: weights that are exactly zero, as pruning leaves them, are exactly zero in the decoded weights;
            which ones they are takes bits of the file. False: they are weights like the others.
        target_bytes, target_ratio: a budget, one of the two: the longest file there may be, or how many times smaller
            than the float network it must be. Block and codebook sizes are then chosen layer by layer, by what each
            layer's error does to the network's output, for the kinds of layer that have the default setting here; kinds
            with another setting, and layers of an override, stay as they are set.
        seed: of every random choice.
    """

    method: Literal["full", "em"] = "full"
    conv: LayerConfig | None = LayerConfig(block_size=9)
    pointwise_conv: LayerConfig | None = LayerConfig(block_size=4)
    depthwise_conv: LayerConfig | None = None
    linear: LayerConfig | None = LayerConfig(block_size=4)
    embedding: LayerConfig | None = None
    first_layer: LayerConfig | None = None
    overrides: tuple[Override, ...] = ()
    em_iterations: int = 100
    rounds: int = 2
    asymmetric_step: float = 0.5
    refit_depthwise: bool = True
    batchnorm: Literal["matched", "reestimate", "keep"] = "matched"
    distillation: DistillationConfig | None = None
    reconstruction: ReconstructionConfig | None = None
    finetuning: FinetuningConfig | None = None
    freeze_norms: bool = False
    codebook_storage: Literal["int8", "float16"] = "int8"
    weight_storage: Literal["int8", "float16", "float32"] = "int8"
    float_storage: Literal["float16", "float32"] = "float16"
    preserve_zeros: bool = False
    target_bytes: int | None = None
    target_ratio: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("method", self.method, ("full", "em"))
        check(self.rounds >= 0, f"rounds={self.rounds}: give 0 or more")
        step = self.asymmetric_step
        check(0 <= step <= 1, f"asymmetric_step={step}: give a number from 0 to 1")
        check_choice("batchnorm", self.batchnorm, ("matched", "reestimate", "keep"))
        check_choice("codebook_storage", self.codebook_storage, ("int8", "float16"))
        check_choice("weight_storage", self.weight_storage, ("int8", "float16", "float32"))
        check_choice("float_storage", self.float_storage, ("float16", "float32"))
        check(isinstance(self.preserve_zeros, bool), f"preserve_zeros={self.preserve_zeros!r}: give True or False")
        check(counts(self.em_iterations), f"em_iterations={self.em_iterations}: give at least 1")
        _check_budget(self.target_bytes, self.target_ratio)
        for family in FAMILIES:
            value = getattr(self, family)
            check(
                value is None or isinstance(value, LayerConfig),
                f"{family}={value!r}: give a LayerConfig, or None to keep these layers float",
            )
        object.__setattr__(self, "overrides", _checked_overrides(self.overrides))

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
                "mask_rcnn" is "large" for torchvision's `maskrcnn_resnet50_fpn`: the layers stay float that the paper
                leaves, and finetuning compares features, and the logits of both stages, since a detector has no others.
            codebook_size: codewords for convolutions.
            fc_codebook_size: codewords for linear layers (the paper: 2048 for ResNet-18, 1024 for ResNet-50, 256 for
                Mask R-CNN).
            pointwise_block_size: for 1×1 convolutions; the paper's large ResNet-18 has 4.
            **fields: any field of `BGDConfig`.

        **Source**: arXiv 1907.05686, sections 4.1 and 4.4, table 1.
        """
        check(regime in ("small", "large", "mask_rcnn"), f"regime={regime!r}: give 'small', 'large' or 'mask_rcnn'")
        small, detects = regime == "small", regime == "mask_rcnn"
        fc_codebook_size = fc_codebook_size or (256 if detects else 2048)
        pointwise = pointwise_block_size if pointwise_block_size is not None else (4 if small else 8)
        settings: dict[str, Any] = {
            "method": "em",
            "conv": LayerConfig(block_size=9 if small else 18, codebook_size=codebook_size),
            "pointwise_conv": LayerConfig(block_size=pointwise, codebook_size=codebook_size),
            "linear": LayerConfig(block_size=4, codebook_size=fc_codebook_size),
            "batchnorm": "keep",
            "codebook_storage": "float16",
            "weight_storage": "float32",
            "float_storage": "float32",
            "distillation": DistillationConfig(),
            "finetuning": FinetuningConfig(epochs=9, trained="codebooks"),
        }
        if detects:
            settings |= {
                "overrides": tuple((name, None) for name in _MASK_RCNN_FLOAT),
                "float_storage": "float16",
                "distillation": None,
                "finetuning": FinetuningConfig(epochs=9, trained="codebooks", outputs=_MASK_RCNN_OUTPUTS),
            }
        return cls(**(settings | fields))

    @property
    def has_budget(self) -> bool:
        """Whether block and codebook sizes are to be chosen."""
        return self.target_bytes is not None or self.target_ratio is not None

    def budget_bytes(self, original_bytes: int) -> int | None:
        """The longest file that the budget allows; None without a budget.

        Args:
            original_bytes: parameters and buffers of the float network.
        """
        if self.target_ratio is not None:
            return int(original_bytes / self.target_ratio)
        return self.target_bytes

    def has_default_sizes(self, family: str) -> bool:
        """Whether the setting of a family is the library's own, so that a budget may choose in its place."""
        value: LayerConfig | None = getattr(self, family)
        return value is not None and value == _DEFAULTS.get(family)

    def is_default(self, family: str) -> bool:
        """Whether the block size of a family is the library's default, not one that the user chose."""
        default = _DEFAULTS.get(family)
        value: LayerConfig | None = getattr(self, family)
        return value is not None and default is not None and value.block_size == default.block_size

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, with the version of the layout."""
        return {"version": CONFIG_VERSION} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BGDConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown field, a wrong value, or a version newer than this library's.
        """
        check(isinstance(values, Mapping), f"the settings are a {type(values).__name__}: give a mapping")
        fields = dict(values)
        version = fields.pop("version", CONFIG_VERSION)
        check(
            isinstance(version, int) and version <= CONFIG_VERSION,
            f"the settings have version {version!r}, this library reads up to {CONFIG_VERSION}: upgrade bgd-plugin",
        )
        for family in FAMILIES:
            if family in fields:
                fields[family] = _nested(LayerConfig, fields[family], family)
        for name, kind in _STAGES.items():
            if name in fields:
                fields[name] = _nested(kind, fields[name], name)
        if "overrides" in fields:
            fields["overrides"] = tuple(_nested_override(entry) for entry in fields["overrides"])
        result: BGDConfig = _nested(cls, fields, "BGDConfig")
        return result

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> BGDConfig:
        """The inverse of `to_json`."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the settings are not JSON ({error})") from error
        return cls.from_dict(values)


def _nested(kind: type[Any], values: Any, where: str) -> Any:
    """An instance of `kind` from a mapping; None and finished instances pass."""
    if values is None or isinstance(values, kind):
        return values
    check(isinstance(values, Mapping), f"{where}: found {values!r}, give the fields of {kind.__name__}")
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    check(not unknown, f"{where}: unknown {', '.join(unknown)}; {kind.__name__} has {', '.join(sorted(known))}")
    return kind(**values)


def _nested_override(entry: Any) -> Any:
    """An override whose setting may still be a mapping; what else is wrong with it is found later."""
    if isinstance(entry, (tuple, list)) and len(entry) == 2:
        return entry[0], _nested(LayerConfig, entry[1], f"override {entry[0]!r}")
    return entry


def _checked_overrides(overrides: Any) -> tuple[Override, ...]:
    checked = []
    for entry in overrides:
        check(
            isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str),
            f"overrides: found {entry!r}, give pairs of a glob and a LayerConfig or None",
        )
        pattern, layer = entry
        check(
            layer is None or isinstance(layer, LayerConfig),
            f"override {pattern!r}: found {layer!r}, give a LayerConfig, or None to keep the layers float",
        )
        checked.append((pattern, layer))
    return tuple(checked)


_STAGES: dict[str, type[Any]] = {
    "distillation": DistillationConfig,
    "reconstruction": ReconstructionConfig,
    "finetuning": FinetuningConfig,
}
_DEFAULTS = {
    f.name: f.default
    for f in dataclasses.fields(BGDConfig)
    if f.name in FAMILIES and isinstance(f.default, LayerConfig)
}
