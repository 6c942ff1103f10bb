"""Find the layers of a graph: which can be quantized, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx, nn

from bgd_plugin.graph.calls import (
    LOOKED_UP,
    attribute,
    call_geometry,
    calls_by_weight,
    conv_arguments,
    function_of,
    has_computed_geometry,
    kind_at,
    module_around,
    spoken,
    users_of_parameters,
)
from bgd_plugin.graph.computed import module_at
from bgd_plugin.graph.inside import bias_of, find_inside, unfit
from bgd_plugin.graph.kinds import FUNCTIONS, MODULES, family_of, kind_of, layout_of
from bgd_plugin.graph.layer import FoundLayer, LeftLayer
from bgd_plugin.graph.own_bias import with_own_bias
from bgd_plugin.pq.layout import AS_IT_IS

__all__ = ["find_layers"]

# A function of any other package is the network's own: only a run shows what it does with a weight.
_LIBRARIES = frozenset(("torch", "operator", "_operator", "math", "builtins"))


def find_layers(network: nn.Module) -> tuple[list[FoundLayer], list[LeftLayer]]:
    """All layers that can be quantized, and all weights left alone, each with its reason.

    In the order in which they run; for a network that is not a graph, in the order of its modules.
    """
    if not isinstance(network, fx.GraphModule):
        found, left = find_inside(network)
        found = _tied(found)
    else:
        found, left = _find_in_graph(network)
    return with_own_bias(network, found), left


def _find_in_graph(graph_module: fx.GraphModule) -> tuple[list[FoundLayer], list[LeftLayer]]:
    calls = calls_by_weight(graph_module)
    users = users_of_parameters(graph_module)
    found: list[FoundLayer] = []
    left: dict[str, str] = {}
    for target, nodes in calls.items():
        outcome = _examine(graph_module, _speaker(graph_module, target, nodes), nodes, users)
        if isinstance(outcome, FoundLayer):
            found.append(outcome)
        elif outcome:
            left[outcome.name] = outcome.reason
    names = {layer.name for layer in found}
    for other in _other_weights(graph_module, calls):
        if isinstance(other, FoundLayer):
            found.append(other)
        elif other.name not in names and _user_name(graph_module, other.name) not in left:
            left.setdefault(other.name, other.reason)
    order = {node.name: index for index, node in enumerate(graph_module.graph.nodes)}
    found.sort(key=lambda layer: order[layer.calls[0]])
    return found, [LeftLayer(name=name, reason=reason) for name, reason in left.items()]


def _speaker(graph_module: fx.GraphModule, target: str, nodes: list[fx.Node]) -> str:
    """The tied module that names the layer: an embedding is fitted on the inputs of a layer tied to it, if any."""
    if nodes[0].op != "call_module":
        return target
    others = [node for node in nodes if kind_at(graph_module, node) != "embedding"]
    return str(others[0].target) if others and kind_at(graph_module, nodes[0]) == "embedding" else target


def _tied(found: list[FoundLayer]) -> list[FoundLayer]:
    """One layer for all that hold the same weight."""
    groups: dict[int, list[FoundLayer]] = {}
    for layer in found:
        groups.setdefault(id(layer.weight), []).append(layer)
    return [_as_one(group) for group in groups.values()]


def _as_one(group: list[FoundLayer]) -> FoundLayer:
    """One layer for tied ones: of an embedding's family if one is an embedding, fitted on the inputs of the others."""
    first = next((layer for layer in group if layer.kind != "embedding"), group[0])
    family = "embedding" if any(layer.family == "embedding" for layer in group) else first.family
    return replace(first, family=family, tied=tuple(layer.target for layer in group if layer is not first))


def _examine(
    graph_module: fx.GraphModule, target: str, nodes: list[fx.Node], users: dict[int, set[str]]
) -> FoundLayer | LeftLayer | None:
    """A layer that can be quantized, or the reason why not."""
    first = next((node for node in nodes if str(node.target) == target), nodes[0])
    functional = first.op == "call_function"
    if functional and target == first.name:
        name = module_around(first) or function_of(first).__name__
        return LeftLayer(name=name, reason="its weight is computed in the graph, not a parameter")
    name, owner, weight = _held(graph_module, target, functional=functional)
    if weight is None:
        return LeftLayer(
            name=name, reason="its weight is not a parameter (a hook, such as a norm's, computes it): bake it first"
        )
    if not weight.is_floating_point():
        return LeftLayer(name=name, reason=f"its weight has dtype {weight.dtype}")
    tied = () if functional else _tied_to(graph_module, target, nodes)
    kind = FUNCTIONS[function_of(first)] if functional else str(kind_of(owner))
    if any(kind_of(module_at(graph_module, path)) not in (kind, "embedding") for path in tied):
        return LeftLayer(name=name, reason=f"its weight is shared with another kind of layer, {', '.join(tied)}")
    if not functional and (reason := unfit(owner, kind, functional=False)):
        return LeftLayer(name=name, reason=reason)
    is_table = functional and LOOKED_UP in users.get(id(weight), set())
    others = sorted(users.get(id(weight), set()) - {target, *tied, "its calls", *((LOOKED_UP,) if is_table else ())})
    if others or (not functional and "its calls" in users.get(id(weight), set())):
        return LeftLayer(name=name, reason=f"its weight is also used by {', '.join(others) or 'a function'}")
    if functional and any(map(has_computed_geometry, nodes)):
        return LeftLayer(name=name, reason="its stride, padding or groups are computed in the graph")
    groups = 1 if kind in ("linear", "embedding") else call_geometry(graph_module, first).groups
    is_embedding = is_table or any(kind_of(module_at(graph_module, path)) == "embedding" for path in tied)
    bias = _bias_of_call(graph_module, first) if functional else bias_of(owner, target)
    return FoundLayer(
        name=name,
        target=target,
        kind=kind,
        family="embedding" if is_embedding else family_of(kind, weight.shape, groups),
        weight=weight,
        calls=tuple(node.name for node in nodes if functional or kind_at(graph_module, node) == kind),
        functional=functional,
        groups=groups,
        bias=None if kind.startswith("conv_transpose") else bias,
        tied=_aliases(graph_module, target, weight) if functional else tied,
        layout=layout_of(kind, groups) if functional else AS_IT_IS,
    )


def _held(graph_module: fx.GraphModule, target: str, *, functional: bool) -> tuple[str, nn.Module, nn.Parameter | None]:
    """The user's name of the layer at a target, the module that holds its weight, and the weight if a parameter."""
    path, _, attribute = target.rpartition(".") if functional else (target, "", "weight")
    owner = graph_module.get_submodule(path)
    return _user_name(graph_module, target) if functional else target, owner, owner._parameters.get(attribute)


def _tied_to(graph_module: fx.GraphModule, target: str, nodes: list[fx.Node]) -> tuple[str, ...]:
    """Paths of the other modules that are called with the weight of the module at `target`."""
    paths = sorted({str(node.target) for node in nodes} - {target})
    owner = module_at(graph_module, target)
    return tuple(path for path in paths if module_at(graph_module, path) is not owner)


def _aliases(graph_module: fx.GraphModule, target: str, weight: nn.Parameter) -> tuple[str, ...]:
    """Other paths of a parameter, which exported graphs keep though they read only one."""
    names = graph_module.named_parameters(remove_duplicate=False)
    return tuple(name for name, parameter in names if parameter is weight and name != target)


def _bias_of_call(graph_module: fx.GraphModule, call: fx.Node) -> str | None:
    """The path of a call's bias, if it is a parameter that no other call uses."""
    bias = conv_arguments(call).get("bias")
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or list(bias.users) != [call]:
        return None
    return str(bias.target) if isinstance(attribute(graph_module, str(bias.target)), nn.Parameter) else None


def _user_name(graph_module: fx.GraphModule, target: str) -> str:
    """The user's name of a weight: `block.conv` for `block.conv.weight`, otherwise its path."""
    owner, _, attribute = target.rpartition(".")
    parts = graph_module.get_submodule(owner).children() if owner else ()
    alone = owner and attribute == "weight" and not any(True for part in parts for _ in part.parameters())
    return owner if alone else target


def _other_weights(graph_module: fx.GraphModule, calls: dict[str, list[fx.Node]]) -> Iterator[FoundLayer | LeftLayer]:
    """Weights that no conv or linear call of the graph reads: layers inside other nodes, or weights left alone."""
    seen: set[str] = set()
    weights = {id(attribute(graph_module, target)) for target, nodes in calls.items() if _reads(nodes[0], target)}
    for node in graph_module.graph.nodes:
        target = str(node.target)
        if node.op not in ("call_module", "get_attr") or target in calls or target in seen:
            continue
        seen.add(target)
        if node.op == "call_module":
            module = module_at(graph_module, target)
            if not isinstance(module, tuple(MODULES)):
                runs = tuple(n.name for n in graph_module.graph.nodes if n.op == node.op and n.target == node.target)
                found, left = find_inside(graph_module, target, runs)
                yield from found
                yield from left
        else:
            value = attribute(graph_module, target)
            if isinstance(value, nn.Parameter) and value.ndim > 1 and id(value) not in weights:
                yield _read_by_function(graph_module, target, value)


def _reads(call: fx.Node, target: str) -> bool:
    """Whether a call is that of a function, to which a parameter at `target` is given."""
    return call.op == "call_function" and target != call.name


def _read_by_function(graph_module: fx.GraphModule, target: str, weight: nn.Parameter) -> FoundLayer | LeftLayer:
    """A weight that functions read: a layer's, if a layer owns it and only the network's own functions read it."""
    readers = [n for n in graph_module.graph.nodes if n.op == "get_attr" and n.target == target]
    users = list(dict.fromkeys(user for reader in readers for user in reader.users))
    owner_path, _, name = target.rpartition(".")
    owner = module_at(graph_module, owner_path)
    kind = kind_of(owner)
    if (
        kind not in FUNCTIONS.values()
        or name != "weight"
        or not users
        or not all(_is_networks_own(user) for user in users)
    ):
        names = ", ".join(sorted({spoken(user) for user in users}))
        return LeftLayer(name=target, reason=f"a plain tensor, used by {names or 'nothing'}")
    return FoundLayer(
        name=owner_path,
        target=target,
        kind=str(kind),
        family=family_of(str(kind), weight.shape, getattr(owner, "groups", 1)),
        weight=weight,
        calls=tuple(user.name for user in users),
        functional=True,
        groups=getattr(owner, "groups", 1),
        hidden=True,
        bias=bias_of(owner, owner_path),
    )


def _is_networks_own(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and module.partition(".")[0] not in _LIBRARIES
