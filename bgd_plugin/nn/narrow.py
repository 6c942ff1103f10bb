"""Embeddings and linear layers whose float weight is held as narrow as in a file: half precision or 8-bit integers.

From outside they are float layers: `weight` is the whole float32 weight, widened at each use, and a state dict has it
under that name. The weight is no parameter: it is not trained. `materialize` makes them ordinary layers again.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgd_plugin.encoding.narrow import from_narrow, to_narrow
from bgd_plugin.errors import ConfigError
from bgd_plugin.kernels.narrow_linear import narrow_linear
from bgd_plugin.kernels.switch import plain_path
from bgd_plugin.nn.base import attributes_of
from bgd_plugin.support.direct import runs_directly

__all__ = ["NarrowEmbedding", "NarrowLinear", "NarrowModule", "narrowed", "widened"]

_logger = logging.getLogger(__name__)
_OWN = ("numbers", "scales")
_TO_TRAIN = "held narrow and not trained; bgd_plugin.integration.widen_(model) makes it a parameter"


class NarrowModule(nn.Module):
    """A layer with a narrow weight.

    Attributes:
        numbers: integer buffer `[rows, columns]`, see `encoding.narrow`; tied layers share it.
        scales: float buffer, `[1]` or `[rows]`, whose dtype is that of the weight.
        is_trainable: whether the weight was a parameter that requires a gradient, and becomes one again.
    """

    numbers: Tensor
    scales: Tensor

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("numbers", numbers)
        self.register_buffer("scales", scales)
        self.is_trainable = True

    def train(self, mode: bool = True) -> Self:
        """As in `nn.Module`; training mode (`mode` true) logs a warning, because the weight is not trained."""
        if mode and not self.training:
            _logger.warning("%s(%s): its weight is %s", type(self).__name__, self.extra_repr(), _TO_TRAIN)
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in `nn.Module`, but a weight that is no parameter cannot require gradients.

        Raises:
            ConfigError: `requires_grad` is true.
        """
        if requires_grad:
            raise ConfigError(f"{type(self).__name__}({self.extra_repr()}): its weight is {_TO_TRAIN}")
        return super().requires_grad_(requires_grad)

    def as_parameter(self) -> nn.Parameter:
        """The weight as a new parameter, `[rows, columns]`."""
        return nn.Parameter(self.weight.clone(), self.is_trainable)

    @property
    def weight(self) -> Tensor:
        """The weight `[rows, columns]`; as long as it is in use, tied layers return the same tensor."""
        if torch.compiler.is_compiling() or self.numbers.is_meta or self.numbers.is_inference():
            return from_narrow(self.numbers, self.scales)
        key = (id(self.numbers), self.numbers._version, self.scales.dtype)
        known = _in_use.get(key)
        wide = known.weight() if known is not None and known.numbers() is self.numbers else None
        if known is None or wide is None or wide._version != known.version:
            wide = from_narrow(self.numbers, self.scales)
            numbers, weight = weakref.ref(self.numbers), weakref.ref(wide, lambda own: _forget(key, own))
            _in_use[key] = _InUse(numbers=numbers, weight=weight, version=wide._version)
        return wide

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _OWN:
            destination.pop(prefix + name, None)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As in `nn.Module`; a weight that is in neither narrow form is refused."""
        name, own = f"{prefix}weight", {prefix + key: getattr(self, key) for key in _OWN}
        given = state_dict.pop(name, None)
        if given is None and strict:
            missing_keys.append(name)
        elif given is not None and not _equal(given, self.weight):
            found = to_narrow(given.to(torch.float32)) if given.shape == self.numbers.shape else None
            if found is None or found[0].dtype != self.numbers.dtype:
                error_msgs.append(
                    f"{name}: the layer holds its weight in {8 * self.numbers.element_size()} bits, in which the given "
                    f"{given.dtype} {list(given.shape)} is not exact: make the layer float first (materialize)"
                )
            else:
                own = dict(zip(own, found, strict=True))
        state_dict |= own
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for key in own:
            del state_dict[key]
        if given is not None:
            state_dict[name] = given


@dataclass(frozen=True, kw_only=True)
class _InUse:
    """Narrow numbers, and the wide weight that somebody holds; its version tells whether it was written to."""

    numbers: weakref.ref[Tensor]
    weight: weakref.ref[Tensor]
    version: int


_in_use: dict[Any, _InUse] = {}
"""By the identity and the version of the numbers."""


def _forget(key: Any, weight: weakref.ref[Tensor]) -> None:
    if key in _in_use and _in_use[key].weight is weight:
        del _in_use[key]


class NarrowLinear(NarrowModule):
    """`nn.Linear` with a narrow weight."""

    def __init__(self, numbers: Tensor, scales: Tensor, like: nn.Linear) -> None:
        super().__init__(numbers, scales)
        self.in_features = like.in_features
        self.out_features = like.out_features
        self.bias = like.bias

    def forward(self, input: Tensor) -> Tensor:
        """Map input `[..., in_features]` to `[..., out_features]`."""
        if input.dtype == self.scales.dtype and runs_directly(input) and not plain_path():
            output: Tensor = narrow_linear(input, self.numbers, self.scales, self.bias)
            return output
        return F.linear(input, self.weight, self.bias)

    def to_float(self) -> nn.Linear:
        """The float module of the same size, on the meta device."""
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        """Sizes and form, for `print`."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {_form(self)}"


class NarrowEmbedding(NarrowModule):
    """`nn.Embedding` with a narrow weight; only the requested rows are widened."""

    def __init__(self, numbers: Tensor, scales: Tensor, like: nn.Embedding) -> None:
        super().__init__(numbers, scales)
        self.num_embeddings = like.num_embeddings
        self.embedding_dim = like.embedding_dim
        self.padding_idx = like.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Map an input of indices `[...]` to `[..., embedding_dim]`."""
        rows = input.reshape(-1)
        scales = self.scales if self.numbers.dtype == torch.int16 else self.scales[rows]
        return from_narrow(self.numbers[rows], scales).view(*input.shape, self.embedding_dim)

    def to_float(self) -> nn.Embedding:
        """The float module of the same size, on the meta device."""
        return nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, device="meta")

    def extra_repr(self) -> str:
        """Sizes and form, for `print`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {_form(self)}"


def narrowed(module: nn.Linear | nn.Embedding, numbers: Tensor, scales: Tensor) -> NarrowLinear | NarrowEmbedding:
    """The layer with a narrow weight in place of its own; its bias, its mode and its own attributes are kept.

    Args:
        module: a layer of torch's own class.
        numbers: of its weight, int16 or int8 `[rows, columns]`, see `encoding.narrow.to_narrow`.
        scales: of its weight, floats `[1]` or `[rows]`.
    """
    is_linear = isinstance(module, nn.Linear)
    result: Any = (NarrowLinear if is_linear else NarrowEmbedding)(numbers, scales, module)  # type: ignore[arg-type]
    vars(result).update(attributes_of(module))
    result.is_trainable = module.weight.requires_grad
    trained: NarrowLinear | NarrowEmbedding = result.train(module.training)
    return trained


def widened(module: NarrowLinear | NarrowEmbedding, weight: nn.Parameter) -> nn.Module:
    """The ordinary layer with this weight, the inverse of `narrowed`; bias and attributes are shared with `module`.

    Args:
        module: the layer.
        weight: `[rows, columns]`.
    """
    result: Any = module.to_float()
    vars(result).update(attributes_of(module, ("is_trainable",)))
    result.weight = weight
    if isinstance(module, NarrowLinear):
        result.bias = module.bias
    trained: nn.Module = result.train(module.training)
    return trained


def _equal(given: Tensor, weight: Tensor) -> bool:
    is_like = given.shape == weight.shape and given.device == weight.device and not given.is_meta
    return given is weight or (is_like and torch.equal(given.to(weight.dtype), weight))


def _form(module: NarrowModule) -> str:
    return "half precision" if module.numbers.dtype == torch.int16 else "8 bits"
