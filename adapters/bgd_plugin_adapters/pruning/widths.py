"""The widths of a pruned network, from the tensors of its file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bgd_plugin.integration import CheckpointError, read_file

__all__ = ["file_shapes", "narrow_"]

Shape = tuple[int, ...]


def file_shapes(path: str | os.PathLike[str]) -> dict[str, Shape]:
    """The shape of each tensor of the network in the file at `path`, by name; decoded, if the weight is quantized.

    Raises:
        CheckpointError: the file cannot be read, or its header is damaged.
    """
    tensors, header = read_file(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        for name, entry in header.get("layers", {}).items():
            weight = tuple(map(int, entry[3]))
            shapes |= {name: weight, f"{name}.weight": weight}  # the second where the name is a module's
        for name, first in header.get("aliases", {}).items():
            module, _, part = name.rpartition(".")
            shared = str(first).rpartition(".")[0]
            if part in ("weight", "codebook") and f"{shared}.weight" in shapes:
                shapes[f"{module}.weight"] = shapes[f"{shared}.weight"]
            elif first in shapes:
                shapes[name] = shapes[first]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path}: the layers in its header are damaged ({error!r})") from error
    return shapes


def narrow_(module: nn.Module, shapes: Mapping[str, Shape], where: str) -> None:
    """Give a module on the meta device the widths that its own tensors have in a file.

    Args:
        module: changed in place.
        shapes: of its parameters and buffers, as far as the file has them.
        where: the file and the module's name, for messages.

    Raises:
        CheckpointError: a tensor that is wider in the file, or has another number of dimensions; a width that the file
            does not determine.
    """
    own = {
        name: tensor for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None
    }
    for name, shape in shapes.items():
        mine = tuple(own[name].shape) if name in own else ()
        if name in own and (len(mine) != len(shape) or any(a < b for a, b in zip(mine, shape, strict=True))):
            raise CheckpointError(
                f"{where} has a {name} {list(shape)} in the file, {list(mine)} in the network: give the network that "
                "was pruned"
            )
    changed = {name: shape for name, shape in shapes.items() if name in own and tuple(own[name].shape) != shape}
    if not changed:
        return
    for kind, adapt in _KINDS.items():
        if isinstance(module, kind):
            adapt(module, shapes, where)
            break
    for name, shape in changed.items():
        _resize_(module, name, shape)


def _resize_(module: nn.Module, name: str, shape: Shape) -> None:
    parameter = module._parameters.get(name)
    if parameter is not None:
        empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
        module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        return
    buffer = module._buffers[name]
    assert buffer is not None
    module._buffers[name] = torch.empty(shape, dtype=buffer.dtype, device="meta")


def _linear(module: Any, shapes: Mapping[str, Shape], where: str) -> None:
    module.out_features, module.in_features = _weight(shapes, where)


def _convolution(module: Any, shapes: Mapping[str, Shape], where: str) -> None:
    first, second, *_ = _weight(shapes, where)
    is_depthwise = module.groups == module.in_channels and module.groups > 1
    if module.transposed:  # [in channels, out channels of a group, ...]
        if is_depthwise:
            module.groups = first
        module.in_channels, module.out_channels = first, second * module.groups
    else:  # [out channels, in channels of a group, ...]
        if is_depthwise:
            module.groups = first // max(1, module.out_channels // module.in_channels)
        module.out_channels, module.in_channels = first, second * module.groups
    if module.in_channels % module.groups or module.out_channels % module.groups:
        raise _unknown(where, f"{module.groups} groups do not divide its channels")


def _features(module: Any, shapes: Mapping[str, Shape], where: str) -> None:
    width = _any(shapes, ("weight", "running_mean", "bias"))
    module.num_features = width[0]
    for name in ("running_mean", "running_var"):  # not in the file if the norm is frozen
        if module._buffers.get(name) is not None:
            _resize_(module, name, width)


def _group_norm(module: Any, shapes: Mapping[str, Shape], where: str) -> None:
    module.num_channels = _any(shapes, ("weight", "bias"))[0]
    if module.num_channels % module.num_groups:
        raise _unknown(where, f"{module.num_groups} groups do not divide {module.num_channels} channels")


def _layer_norm(module: Any, shapes: Mapping[str, Shape], where: str) -> None:
    module.normalized_shape = _any(shapes, ("weight", "bias"))


def _prelu(module: Any, shapes: Mapping[str, Shape], where: str) -> None:
    module.num_parameters = _weight(shapes, where)[0]


def _embedding(module: Any, shapes: Mapping[str, Shape], where: str) -> None:
    module.num_embeddings, module.embedding_dim = _weight(shapes, where)


def _attention(module: Any, shapes: Mapping[str, Shape], where: str) -> None:
    """Fewer heads of the same width, or as many narrower ones, as the projections allow."""
    packed = shapes.get("in_proj_weight")
    rows, width = packed if packed is not None else shapes.get("q_proj_weight", (0, 0))
    inner = rows // 3 if packed is not None else rows
    if inner != width or not inner:
        raise _unknown(where, f"its projections map {width} features to {inner}")
    if inner % module.head_dim == 0:
        module.num_heads = inner // module.head_dim
    elif inner % module.num_heads == 0:
        module.head_dim = inner // module.num_heads
    else:
        raise _unknown(where, f"{inner} features divide neither into its heads nor into heads of {module.head_dim}")
    module.embed_dim = inner
    module.kdim = shapes.get("k_proj_weight", (0, inner))[1]
    module.vdim = shapes.get("v_proj_weight", (0, inner))[1]


def _recurrent(module: Any, shapes: Mapping[str, Shape], where: str) -> None:
    raise _unknown(where, f"one tensor does not determine the widths of a {type(module).__name__}")


def _unknown(where: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {found}; build the network as it was pruned, and give it to bgd_plugin.load as like="
    )


def _weight(shapes: Mapping[str, Shape], where: str) -> Shape:
    if "weight" not in shapes:
        raise _unknown(where, "the file has no weight for it")
    return shapes["weight"]


def _any(shapes: Mapping[str, Shape], names: tuple[str, ...]) -> Shape:
    return next(shapes[name] for name in names if name in shapes)


_KINDS: dict[Any, Callable[[Any, Mapping[str, Shape], str], None]] = {
    nn.MultiheadAttention: _attention,
    nn.Linear: _linear,
    nn.modules.conv._ConvNd: _convolution,
    nn.modules.batchnorm._NormBase: _features,  # batch and instance norms
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
    nn.RNNBase: _recurrent,
}
