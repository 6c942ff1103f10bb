"""Load a compressed network: the file is checked against the network that it is loaded into, name by name."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from bgd_plugin.encoding.codes import unpack
from bgd_plugin.encoding.masks import unpack_mask
from bgd_plugin.errors import BGDError, CheckpointError, TraceError
from bgd_plugin.files.attributes import give_attributes_
from bgd_plugin.files.format import Stored, restored
from bgd_plugin.files.layer_entries import checked_layers, install_empty_
from bgd_plugin.files.rotated import make_rotated_
from bgd_plugin.files.save import read_file
from bgd_plugin.files.ties import tie_, ties
from bgd_plugin.graph import (
    FoundLayer,
    baked,
    copy_module,
    find_layers,
    fold_parametrizations_,
    followed,
    isolate_weights_,
    isolated,
    layer_at,
    make_picklable_,
    module_at,
    module_or_none,
    narrow_,
    trace,
    unwrapped,
)
from bgd_plugin.nn import FrozenNorm, PQModule, is_batchnorm, take_hooks_

__all__ = ["load"]

_MAX_NAMED = 20


@isolated
def load(path: str | os.PathLike[str], *, like: nn.Module | ExportedProgram) -> nn.Module:
    """Read a compressed network from a file written by `save`. No code from the file is run.

    Args:
        path: the file.
        like: a network of the same architecture; its weights are not used, and it may be on the meta device.

    Returns:
        the compressed network, of the class of `like`, on its device (the CPU if that is meta), in its training or
            evaluation mode. In evaluation mode on a CPU, large embeddings and linear layers that are float stay as
            narrow as in the file, and are no parameters: `materialize` makes them float.

    Raises:
        CheckpointError: the file is damaged, of another format, written by a newer version, or does not fit `like`; the
            message names every mismatch.
    """
    tensors, header = read_file(path)
    try:
        tensors = restored(Stored(tensors=tensors, header=header))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    network: nn.Module = copy_module(baked(unwrapped(like)), share_tensors=True)
    fold_parametrizations_(network)
    found = _places(network, header)
    problems = make_rotated_(network, header.get("rotated", {}))
    layers = checked_layers(header, tensors, found, problems)
    _raise_if(problems, path)
    isolate_weights_(network, [found[target] for target in layers])
    for target, (form, *sizes) in layers.items():
        install_empty_(network, found[target], form, sizes, masked=target in header.get("masks", {}))
    _freeze_norms(header.get("frozen", []), network, problems)
    _raise_if(problems, path)
    tensors = _with_unused(network, header, tensors)
    state = _checked_state(header, tensors, network, problems)
    give_attributes_(network, header, tensors, problems)
    _raise_if(problems, path)
    groups = ties(network, header, tensors)
    _load_(network, state, path)
    tie_(network, groups)
    _require_no_meta(network)
    make_picklable_(network)
    return narrow_(network)


def _places(network: nn.Module, header: dict[str, Any]) -> dict[str, FoundLayer]:
    """The layers of a network that a file says are quantized; in a graph, all that can be."""
    if isinstance(network, fx.GraphModule):
        return {target: layer for layer in find_layers(network)[0] for target in (layer.target, *layer.tied)}
    tied: dict[str, list[str]] = {}
    for name, source in header.get("aliases", {}).items():
        if name.endswith(".codes") and isinstance(source, str):
            tied.setdefault(source.removesuffix(".codes"), []).append(name.removesuffix(".codes"))
    places = {target: layer_at(network, target, tied.get(target, ())) for target in header.get("layers", {})}
    return {target: layer for target, layer in places.items() if layer is not None}


def _with_unused(network: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, and what files of version 0.1 left out.

    Those held a graph of the network: other names of a module that has several are not in it, and modules that are not
    used in evaluation mode, which stay as `like` has them.
    """
    state = network.state_dict(keep_vars=True)
    sources = {name: str(header.get("aliases", {}).get(name, name)) for name in state}
    known = {name: source for name, source in sources.items() if source in tensors}
    if len(known) == len(state) or isinstance(network, fx.GraphModule):
        return tensors
    twins = {id(state[name]): tensors[source] for name, source in known.items()}
    found = {name: twins[id(value)] for name, value in state.items() if name not in known and id(value) in twins}
    missing = [name for name in state if name not in known and name not in found]
    try:
        held = trace(network).state_dict() if missing else {}
    except TraceError:
        return tensors
    if not any(name in held for name in missing):
        found |= {name: state[name].detach() for name in missing}
    return tensors | found


def _freeze_norms(paths: list[Any], network: nn.Module, problems: list[str]) -> None:
    """Insert empty frozen norms where the file has them; mismatches are appended to `problems`."""
    modules = dict(network.named_modules(remove_duplicate=False))
    frozen: dict[int, FrozenNorm] = {}
    for path in paths:
        norm: Any = modules.get(path) if isinstance(path, str) else None
        if isinstance(norm, FrozenNorm):  # `like` is a compressed network made dense
            continue
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not is_batchnorm(norm):
            problems.append(f"a frozen norm {path!r} is in the file; the network has no such batch norm")
            continue
        empty = torch.empty(norm.num_features, dtype=norm.running_mean.dtype, device="meta")  # type: ignore[union-attr]
        owner, _, name = path.rpartition(".")
        if id(norm) not in frozen:
            frozen[id(norm)] = FrozenNorm(empty, empty).train(norm.training)
            take_hooks_(frozen[id(norm)], norm)
        module_at(network, owner)._modules[name] = frozen[id(norm)]


def _checked_state(
    header: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module, problems: list[str]
) -> dict[str, Tensor]:
    """The network's whole state from the file's tensors; mismatches are appended to `problems`."""
    expected = network.state_dict()
    aliases: dict[str, Any] = header.get("aliases", {})
    modules = {p: m for p, m in network.named_modules(remove_duplicate=False) if isinstance(m, PQModule)}
    device = next((t.device for t in expected.values() if not t.is_meta), torch.device("cpu"))
    state: dict[str, Tensor] = {}
    for name, wanted in expected.items():
        source = aliases.get(name, name)
        value = tensors.get(source) if isinstance(source, str) else None
        if value is None:
            problems.append(f"{name!r} is missing from the file")
            continue
        if source in state:
            state[name] = state[source]
            continue
        path, _, attribute = name.rpartition(".")
        if path in modules and attribute == "codes":
            checked = _unpacked(name, value, modules[path], problems)
        elif path in modules and attribute == "mask":
            checked = _unpacked_mask(name, value, header["masks"].get(source.rpartition(".")[0]), wanted, problems)
        else:
            checked = _widened(name, value, wanted, header.get("dtypes", {}).get(name), problems)
        if checked is not None:
            state[name] = checked.to(device)
    others = {*expected, *map(str, aliases.values()), *header.get("attributes", {})}
    extra = sorted(name for name in set(tensors) - others if not _is_of_a_graph(name, network))
    problems += [f"{name!r} is in the file; the network has no such state" for name in extra]
    return state


def _is_of_a_graph(name: str, network: nn.Module) -> bool:
    """Whether a tensor is a constant of the graph that files of version 0.1 held, which the network computes itself."""
    path, _, attribute = name.rpartition(".")
    owner = module_or_none(network, path)
    is_attribute = owner is not None and isinstance(vars(owner).get(attribute), Tensor)
    return not isinstance(network, fx.GraphModule) and (is_attribute or name.startswith("_tensor_constant"))


def _load_(network: nn.Module, state: dict[str, Tensor], path: Any) -> None:
    versioned: Any = OrderedDict(state)
    versioned._metadata = getattr(network.state_dict(), "_metadata", None)  # modules may ask for their version
    try:
        with followed(network):
            network.load_state_dict(versioned, strict=True, assign=True)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:  # the network's own hooks run
        raise CheckpointError(f"{path}: the network given as `like` does not take its state: {error}") from error


def _unpacked(name: str, packed: Tensor, module: PQModule, problems: list[str]) -> Tensor | None:
    count, bits = module.codes.numel(), module.code_bits
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() != -(-count * bits // 8):
        found = f"{packed.dtype} {list(packed.shape)}"
        problems.append(f"{name!r}: {count} codes of {bits} bits expected, found {found}")
        return None
    codes = unpack(packed, bits, count, module.codes.dtype)
    if count and int(codes.max()) >= module.codebook_size:
        problems.append(
            f"{name!r}: code {int(codes.max())} is out of range, the codebook has {module.codebook_size} codewords"
        )
        return None
    return codes.reshape(module.codes.shape).to(module.codes.dtype)


def _unpacked_mask(name: str, packed: Tensor, form: Any, wanted: Tensor, problems: list[str]) -> Tensor | None:
    try:
        return unpack_mask(packed, str(form), wanted.shape)
    except ValueError as error:
        problems.append(f"{name!r}: the mask is damaged ({error})")
        return None


def _widened(name: str, value: Tensor, wanted: Tensor, original: Any, problems: list[str]) -> Tensor | None:
    """The stored tensor in the network's dtype: the same, or a wider one from which it was narrowed without loss."""
    expected = str(wanted.dtype).removeprefix("torch.")
    narrowed = {
        "float32": (torch.float16,),
        "float64": (torch.float16,),
        "int64": (torch.uint8, torch.int16, torch.int32),
    }
    is_same = value.dtype == wanted.dtype and original in (None, expected)
    is_narrowed = value.dtype in narrowed.get(expected, ()) and original in (None, expected)
    if value.shape != wanted.shape or not (is_same or is_narrowed):
        found = f"{original or str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        problems.append(f"{name!r}: {found} in the file, {expected} {list(wanted.shape)} in the network")
        return None
    if value.is_floating_point() and name.endswith(".codebook") and not bool(torch.isfinite(value).all()):
        problems.append(f"{name!r}: the codebook contains NaN or infinite values")
        return None
    return value.to(wanted.dtype, copy=True)  # a tensor of the file's own would keep all of it mapped


def _raise_if(problems: list[str], path: Any) -> None:
    if problems:
        more = f"\n  and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        shown = "".join(f"\n  {problem}" for problem in problems[:_MAX_NAMED])
        raise CheckpointError(f"{path} does not fit the network given as `like`:{shown}{more}")


def _require_no_meta(network: nn.Module) -> None:
    """Fail if non-persistent buffers have no values, because `like` is on the meta device."""
    names = [name for name, t in (*network.named_parameters(), *network.named_buffers()) if t.is_meta]
    if names:
        raise BGDError(
            f"{', '.join(names)}: not saved in files, and `like` is on the meta device: build `like` on the CPU"
        )
