"""Base of all product-quantized modules: a codebook, codes, and a weight decoded from them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.adapters import notify_hosts
from bgd_plugin.encoding.eight_bit import round_to_eight_bits
from bgd_plugin.errors import ConfigError
from bgd_plugin.kernels.forms import KERNELS, Kernels
from bgd_plugin.kernels.switch import usable
from bgd_plugin.pq.forms import BLOCKS, FORMS, Form
from bgd_plugin.pq.masked import masked

__all__ = ["PQModule", "attributes_of", "storable"]

_OURS = "weight_shape", "matrix_shape", "_stands_for", "_form"


def attributes_of(module: nn.Module, ours: Collection[str] = ()) -> dict[str, Any]:
    """What a module has among its attributes, by name, that not every module has, and that is not among `ours`."""
    others = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in others and name not in ours}


def storable(codebook: Tensor, storage: str = "float16") -> Tensor:
    """Round a codebook to its storage type; returned unchanged if its values are out of range.

    Args:
        codebook: `[codebook_size, block_size]`; "int8" uses one scale for all of it.
        storage: "float16", or "int8" (float32 codebooks only, see `bgd_plugin.encoding.eight_bit`).
    """
    if storage == "int8" and codebook.dtype == torch.float32:
        return round_to_eight_bits(codebook.reshape(1, -1)).reshape(codebook.shape)
    half = codebook.half()
    largest = float(codebook.abs().max())
    fits = bool(torch.isfinite(half).all()) and float(half.abs().max()) >= largest / 2
    return half.to(codebook.dtype) if fits else codebook


class PQModule(nn.Module):
    """A weight of shape `weight_shape`, stored as codewords and codes.

    The weight is decoded at every use, so gradients reach the codebook and no decoded weight is kept in memory.

    The shapes of codebook and codes are those of blocks; other forms have others (`pq.forms`).

    Attributes:
        codebook: parameter `[codebook_size, block_size]`.
        codes: integer buffer `[rows, blocks_per_row]`, in the smallest type that holds them.
        mask: bool buffer `[*matrix_shape]`, false where the weight is zero regardless of the codeword; None: nowhere.
    """

    codebook: nn.Parameter
    codes: Tensor
    mask: Tensor | None
    _form = BLOCKS
    watched_form: Form | None = None
    """While training watches the decoded weight: the form of the codes, with decoding that tells of gradients."""

    def __init__(self, codebook: Tensor, codes: Tensor, weight_shape: Sequence[int]) -> None:
        nn.Module.__init__(self)  # not that of another base, which would create a weight
        notify_hosts()
        self._stands_for: type[nn.Module] | None = None
        self.weight_shape = self.matrix_shape = torch.Size(weight_shape)
        self.codebook = nn.Parameter(codebook, requires_grad=codebook.is_floating_point())
        self.register_buffer("codes", codes.to(self.form.codes_dtype(codebook.shape[0])))
        self.register_buffer("mask", None)

    def __getattr__(self, name: str) -> Any:
        """As in `nn.Module`; else a method or property of the class of the layer in whose place this module is."""
        kind = vars(self).get("_stands_for")
        if kind is not None and not name.startswith("__") and hasattr(kind, name):
            found = inspect.getattr_static(kind, name)
            return found.__get__(self, type(self)) if hasattr(found, "__get__") else found
        return super().__getattr__(name)

    def stand_for(self, module: nn.Module) -> None:
        """Take over what a layer has of its own: attributes, buffers, parameters, methods and properties of its class.

        Args:
            module: the layer in whose place this module is put.
        """
        vars(self).update(attributes_of(module, _OURS))
        self._buffers.update({k: v for k, v in module._buffers.items() if k not in ("codes", "mask")})
        self._non_persistent_buffers_set |= module._non_persistent_buffers_set
        self._modules.update(module._modules)
        more = {k: v for k, v in module._parameters.items() if k not in ("weight", "bias", "codebook")}
        self._parameters.update(more)
        self._stands_for = None if type(module).__module__.startswith("torch.nn.modules.") else type(module)

    def give_back(self, module: nn.Module) -> None:
        """Undo `stand_for`: give a float module of the layer's kind what the layer had of its own.

        Args:
            module: changed in place, of one of torch's classes.
        """
        vars(module).update(attributes_of(self, _OURS))
        module._buffers.update({k: v for k, v in self._buffers.items() if k not in ("codes", "mask")})
        module._non_persistent_buffers_set |= self._non_persistent_buffers_set
        module._modules.update(self._modules)
        module._parameters.update({k: v for k, v in self._parameters.items() if k not in ("bias", "codebook")})
        if self._stands_for is not None:
            module.__class__ = self._stands_for

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        notify_hosts()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`, but rejects the name `weight`: this layer can no longer be pruned or reparametrized.

        Raises:
            ConfigError: the name is `weight`, or ends with `_orig`.
        """
        if name == "weight" or name.endswith("_orig"):
            raise ConfigError(
                f"{type(self).__name__}({self.pq_repr()}) has codewords and codes, but no weight parameter to prune "
                "or parametrize: prune the float network first, then quantize"
            )
        super().register_parameter(name, param)

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
        """As in `nn.Module`, but rejects codes that have no codeword, and converts codes to the module's own dtype."""
        codes = state_dict.get(f"{prefix}codes")
        if isinstance(codes, Tensor) and not codes.is_meta and codes.numel():
            name, size = f"{prefix}codes", self.codebook_size
            if codes.is_floating_point():
                error_msgs.append(f"{name}: codes have dtype {codes.dtype}, expected integers")
            elif int(codes.min()) < 0 or int(codes.max()) >= size:
                error_msgs.append(
                    f"{name}: codes range from {int(codes.min())} to {int(codes.max())}, but there are {size} codewords"
                )
            else:
                state_dict[name] = codes.to(self.form.codes_dtype(size))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def held(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codebook, codes and mask, of the shapes in this class; read where torch keeps them, which is faster."""
        parameters, buffers = self._parameters, self._buffers
        codebook, codes = parameters.get("codebook"), buffers.get("codes")
        if codebook is None or codes is None or "mask" not in buffers:  # a hook or a parametrization computes them
            return self.codebook, self.codes, self.mask
        return codebook, codes, buffers["mask"]

    def take_form_(self, form: str, codes: Tensor) -> None:
        """Change the form of codes, and take codes of this form; the codebook given to the module must be of it, too.

        Args:
            form: its name, "blocks" or "trellis".
            codes: of the form's shape and type.
        """
        self._form, self.codes = form, codes
        self.form.prepare(self.codebook)

    @property
    def form(self) -> Form:
        """How codebook and codes stand for the weight."""
        return FORMS[self._form] if self.watched_form is None else self.watched_form

    @property
    def kernels(self) -> Kernels:
        """What computes on codes of this form, where kernels may be used (`kernels.switch`)."""
        return KERNELS[self._form]

    @property
    def has_blocks(self) -> bool:
        """Whether codes are indices of codewords."""
        return self._form == BLOCKS

    @property
    def codebook_size(self) -> int:
        """Number of codewords in the codebook; of trellis windows, of values in their table."""
        return self.form.sizes(self.codebook.shape)[1]

    @property
    def block_size(self) -> int:
        """Number of weights in a block."""
        return self.form.sizes(self.codebook.shape)[0]

    @property
    def code_bits(self) -> int:
        """Bits in a file for each item of `codes`."""
        return self.form.code_bits(self.codebook_size)

    @property
    def matrix(self) -> Tensor:
        """The decoded weight as it is cut into blocks, of shape `matrix_shape`, rows first."""
        codebook, codes, mask = self.held()
        if usable(codebook, codebook, codes):
            return masked(self.kernels.decode(codebook, codes).view(self.matrix_shape), mask)
        return masked(self.form.decode(codebook, codes, self.matrix_shape), mask)

    @property
    def weight(self) -> Tensor:
        """The decoded weight `[*weight_shape]`, differentiable with respect to the codebook."""
        return self.matrix

    def codeword_uses(self) -> Tensor:
        """Number of weights that each codebook entry represents, of the codebook's shape."""
        return self.form.uses(self.codebook, self.codes, self.mask)

    @torch.no_grad()
    def round_codebook_(self, storage: str) -> None:
        """Round the codebook in place to its storage type.

        Args:
            storage: "float16" or "int8".
        """
        self.codebook.copy_(storable(self.codebook, storage))

    def pq_repr(self) -> str:
        """The quantization part of `extra_repr`."""
        if not self.has_blocks:
            return f"codes={self._form!r}" + ("" if self.mask is None else f", zeros={int((~self.mask).sum())}")
        pruned = "" if self.mask is None else f", zeros={int((~self.mask).sum())}"
        return f"block_size={self.block_size}, codebook_size={self.codebook_size}{pruned}"
