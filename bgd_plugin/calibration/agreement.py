"""Whether a graph and the network from which it was traced give the same outputs, before and after the fit.

A trace can be wrong: it fixes decisions (a branch, a length, whether an argument is given), and it misses hooks and
state that `forward` writes. Both show when the graph and the network run on the same batches.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.batches import Batch, given_number
from bgd_plugin.calibration.nodes import last_uses, run_node
from bgd_plugin.calibration.store import give_back_memory
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import FROM_DATA, set_modes, untouched

__all__ = [
    "FAILURES",
    "answers_differ",
    "answers_of",
    "difference",
    "first_difference",
    "given_arguments",
    "same_random_numbers",
]

_BATCHES = 6
"""Maximum number of batches compared: the first two, the first of each structure and shapes, and the last one."""

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError, AssertionError)
"""What a network raises on inputs that it does not take."""


@torch.no_grad()
def difference(graph: fx.GraphModule, network: nn.Module, batches: Sequence[Batch]) -> str:
    """The first difference between the outputs of a graph and of a network, as text; empty if there is none.

    Both run on batch after batch, in evaluation mode and with the same random numbers, so that state that only one of
    them writes shows; `untouched` keeps it out of both.

    Args:
        graph: traced from the network.
        network: the caller's, which stays unchanged.
        batches: calibration batches; up to six of them are compared.

    Raises:
        CalibrationError: the network itself fails on a batch.
    """
    chosen = _compared(batches)
    with untouched(graph) as (graph,):
        set_modes(graph, {"": False})
        answers = [_answer_of_graph(graph, batches[index]) for index in chosen]
    give_back_memory()
    with untouched(network) as (network,):  # they may share modules: each begins with the state that they came with
        set_modes(network, {"": False})
        return _first_of(network, batches, dict(zip(chosen, answers, strict=True)))


def _first_of(
    network: nn.Module, batches: Sequence[Batch], answers: Mapping[int, tuple[Any, CalibrationError | None]]
) -> str:
    """The first difference between a network's answers and those of its graph, or its failures, by index of batch."""
    for index, (found, failure) in answers.items():
        batch, number = batches[index], given_number(batches, index)
        with same_random_numbers():
            try:
                wanted = batch.call(network)
            except FAILURES as error:
                raise failure or CalibrationError(
                    f"the network fails on calibration batch {number}: {error}"
                ) from error
        if failure is not None:
            return f"its graph fails on calibration batch {number}, the network itself does not ({failure})"
        where = first_difference(found, wanted, "its answer")
        if where:
            return f"its graph answers calibration batch {number} differently: {where}"
    return ""


@torch.no_grad()
def answers_differ(one: nn.Module, other: nn.Module, batches: Sequence[Batch]) -> str:
    """In what the answers of two networks in evaluation mode differ beyond rounding, in words; empty if in nothing.

    Compared are the tensors in mappings and sequences. Other objects, such as a cache of keys and values, are taken to
    be the network's own affair.
    """
    for index, batch in enumerate(batches):
        with same_random_numbers():
            found = _plain(batch.call(one))
        with same_random_numbers():
            wanted = _plain(batch.call(other))
        where = first_difference(found, wanted, "its answer")
        if where:
            return f"calibration batch {index}: {where}"
    return ""


def _plain(answer: Any) -> Any:
    """The tensors of an answer."""
    if isinstance(answer, Mapping):
        return {key: _plain(value) for key, value in answer.items()}
    if isinstance(answer, (list, tuple)):
        return [_plain(value) for value in answer]
    return answer if isinstance(answer, Tensor) else None


@torch.no_grad()
def answers_of(network: nn.Module, batches: Sequence[Batch]) -> list[Any]:
    """What a network answers, in evaluation mode, to each batch from the same random numbers on.

    Raises:
        CalibrationError: it fails on a batch.
    """
    set_modes(network, {"": False})
    answers = []
    for index, batch in enumerate(batches):
        try:
            with same_random_numbers():
                answers.append(batch.call(network))
        except FAILURES as error:
            raise CalibrationError(f"the network fails on calibration batch {index}: {error}") from error
    return answers


def given_arguments(network: nn.Module, batches: Sequence[Batch]) -> dict[str, Any] | None:
    """The network's arguments by name, for `trace`: constants, and `FROM_DATA` for those that vary or hold tensors.

    Args:
        network: the caller's network.
        batches: calibration batches.

    Returns:
        None if the arguments cannot be told by name, as with `*args`, or differ from batch to batch.

    Raises:
        CalibrationError: a batch with inputs that the network does not take, or that lacks one.
    """
    if network._forward_pre_hooks:  # they may change the arguments
        return None
    signature = inspect.signature(network.forward)
    given: dict[str, Any] = {}
    for index, batch in enumerate(batches):
        bound = _bound(signature, network, batch, given_number(batches, index))
        if index and given.keys() != bound.keys():  # given in some batches only: each case takes its own branch
            return None
        for name, value in bound.items():
            if signature.parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                return None
            is_constant = not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
            same = index == 0 or _is_same(given[name], value)
            given[name] = value if is_constant and same else FROM_DATA
    return given


def _bound(signature: inspect.Signature, network: nn.Module, batch: Batch, number: int) -> Mapping[str, Any]:
    try:
        return signature.bind(*batch.args, **batch.kwargs).arguments
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        gives = ", ".join(batch.kwargs) if batch.kwargs else f"{len(batch.args)} inputs"
        raise CalibrationError(
            f"calibration batch {number} gives {gives}; {type(network).__name__}.forward takes {takes} ({error}): give "
            "batches of these, or pass forward=callable(model, batch), which calls the model on a batch"
        ) from error


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other))


def _compared(batches: Sequence[Batch]) -> list[int]:
    forms: dict[Any, int] = {}
    for index, batch in enumerate(batches):
        forms.setdefault(_form(batch), index)
    chosen = {0, 1, len(batches) - 1, *list(forms.values())[: _BATCHES - 2]}
    return sorted(index for index in chosen if index < len(batches))


def _form(batch: Batch) -> Any:
    leaves, spec = pytree.tree_flatten((batch.args, batch.kwargs))
    return str(spec), tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else str(leaf) for leaf in leaves)


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """A context in which the same random numbers are drawn each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _answer_of_graph(graph: fx.GraphModule, batch: Batch) -> tuple[Any, CalibrationError | None]:
    """The graph's output, computed node by node as in a walk, or the error; the output is no part of its state."""
    with same_random_numbers():
        return _along_nodes(graph, batch)


def _along_nodes(graph: fx.GraphModule, batch: Batch) -> tuple[Any, CalibrationError | None]:
    try:
        given = {node.name: value for node, value in batch.placeholders(graph.graph).items()}
        values = dict(given)
        dead = last_uses(list(graph.graph.nodes))
        for node in graph.graph.nodes:
            if node.op == "output":
                output = pytree.tree_map_only(fx.Node, lambda n: values[n.name], node.args[0])
                output = graph.graph.process_outputs(output)  # exported graphs give leaves in a row
                return pytree.tree_map_only(Tensor, Tensor.clone, output), None
            run_node(graph, node, values, protected=(given,))
            for name in dead.get(node.name, ()):
                values.pop(name, None)
    except CalibrationError as error:
        return None, error
    raise AssertionError("the graph has no output")


def first_difference(found: Any, wanted: Any, where: str) -> str:
    """The first place where the output `found` differs from `wanted` in structure, type, or values beyond rounding."""
    if isinstance(wanted, Tensor) or isinstance(found, Tensor):
        return _tensor_difference(found, wanted, where)
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        if list(found) != list(wanted):
            return f"{where} has {', '.join(map(str, found))}, not {', '.join(map(str, wanted))}"
        return next(filter(None, (first_difference(found[k], wanted[k], f"{where}[{k!r}]") for k in wanted)), "")
    if isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)):
        if len(found) != len(wanted):
            return f"{where} has {len(found)} parts, not {len(wanted)}"
        pairs = enumerate(zip(found, wanted, strict=True))
        return next(filter(None, (first_difference(f, w, f"{where}[{i}]") for i, (f, w) in pairs)), "")
    if type(found) is not type(wanted):
        return f"{where} is a {type(found).__name__}, not a {type(wanted).__name__}"
    if isinstance(getattr(wanted, "__dict__", None), dict):
        return first_difference(vars(found), vars(wanted), where)
    return "" if found == wanted else f"{where} is {found!r}, not {wanted!r}"


def _tensor_difference(found: Any, wanted: Any, where: str) -> str:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return f"{where} is a {type(found).__name__}, not a {type(wanted).__name__}"
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{where} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
    if torch.equal(found, wanted):
        return ""
    if not wanted.is_floating_point():
        return f"{where} has other values"
    one, other = (value.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for value in (found, wanted))
    are_alike = torch.equal(found.isfinite(), wanted.isfinite())
    off, norm = float((one - other).abs().max()), float(other.abs().max())
    if are_alike and off <= _TOLERANCES.get(wanted.dtype, 1e-4) * norm:
        return ""
    share = float((one - other).norm() / other.norm()) if norm else float("inf")
    return f"{where} is off by {share:.2g} of its norm"
