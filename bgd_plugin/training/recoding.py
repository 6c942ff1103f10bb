"""Codes chosen again while the network is finetuned: a few of them, at intervals, along the gradient of the weight.

Codewords move continuously, codes cannot. So the gradient of the decoded weight is averaged over the steps, as Adam
does it, and now and then every code is compared with the codeword nearest to where a step along this gradient would
take its block. Only the codes that gain most change, and only as far as the weight's change stays small: the gradient
holds near the present weight alone.

**Source**: Malinovskii et al., "PV-Tuning", arXiv 2405.14852, algorithm 2 (the linearized V step on a subspace) and
section 3.3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.config import FinetuningConfig
from bgd_plugin.encoding.stream import coded_bytes, is_codable
from bgd_plugin.encoding.tables import trellis_offset
from bgd_plugin.kernels.switch import plain_layers
from bgd_plugin.nn import PQModule
from bgd_plugin.pq.forms import Form
from bgd_plugin.pq.moves import Coding, Moves, block_moves, chosen_moves, code_lengths, walk_moves, walk_rate
from bgd_plugin.support.processes import processes, sum_

__all__ = ["Recoding"]

_MEMORY = 0.9, 0.99
"""Of the averages of the gradient and of its square."""
_FLOOR = 0.1
"""Added to the root of the mean square gradient, in units of its mean over the layer."""


class Recoding:
    """The codes of a network that is trained, and the averages by which they are chosen again.

    Layers with trellis windows keep their codes: one of theirs stands for parts of six weights.

    Args:
        student: its codes become copies: other networks may share the old tensors.
        config: the settings.
    """

    def __init__(self, student: nn.Module, config: FinetuningConfig) -> None:
        assert config.recode_every is not None
        self._config, self._every = config, config.recode_every
        self._layers = [_Layer(modules) for modules in _same_codes(student)]
        if any(layer.offset is not None for layer in self._layers):
            for layer in self._layers:  # where one is a stream in the file, others may be, too
                layer.limit_bytes()
        self._steps = 0
        self.trust = config.recode_trust
        self.changed = self.undone = 0

    def state_dict(self) -> dict[str, Any]:
        """The averages of each layer, the limit of a change as it is now, and counts."""
        averages = [[layer.mean, layer.square] for layer in self._layers]
        counts = {"steps": self._steps, "changed": self.changed, "undone": self.undone}
        return {"averages": averages, "trust": self.trust, **counts}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state; the codes themselves are part of the network's."""
        self._steps, self.changed, self.undone = state["steps"], state["changed"], state["undone"]
        self.trust = state["trust"]
        for layer, averages in zip(self._layers, state["averages"], strict=True):
            layer.mean, layer.square = (average.to(layer.mean) for average in averages)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the `with` block backward passes leave the gradients of decoded weights here."""
        with ExitStack() as stack:
            stack.enter_context(plain_layers())
            for layer in self._layers:
                stack.enter_context(layer.watched())
            yield

    @torch.no_grad()
    def step(self, share_of_rate: float, loss: Callable[[], float]) -> None:
        """Take the gradients of one step into the averages; where it is time, choose codes again.

        Changes that raise the loss are undone, and half as much of a change is allowed the next time.

        Args:
            share_of_rate: of the settings' rate, such as that of a schedule.
            loss: computes it on some samples with the network as it is, the same in every process.
        """
        self._steps += 1
        for layer in self._layers:
            layer.average_()
        if self._steps % self._every or share_of_rate <= 0:
            return
        before, old = loss(), [layer.codes.clone() for layer in self._layers]
        for layer in self._layers:
            layer.recode_(self._config, self._steps, share_of_rate, self.trust)
        changed = sum(int((layer.codes != codes).sum()) for layer, codes in zip(self._layers, old, strict=True))
        if changed and not loss() <= before:
            for layer, codes in zip(self._layers, old, strict=True):
                layer.codes.copy_(codes)
            self.trust /= 2
            self.undone += 1
        else:
            self.trust = min(self._config.recode_trust, 1.5 * self.trust)
            self.changed += changed


class _Layer:
    """Modules that share one codebook and one tensor of codes."""

    def __init__(self, modules: Sequence[PQModule]) -> None:
        self.modules = modules
        codes = modules[0].codes.clone()
        for module in modules:
            module.codes = codes
        self._one = modules[0]
        shape = self._one.matrix_shape
        rows, columns = shape[0], shape.numel() // shape[0]
        self.mean = torch.zeros(rows, columns, device=codes.device)
        self.square = torch.zeros_like(self.mean)
        self._gradient = torch.zeros_like(self.mean)
        is_single = self._one.block_size == 1
        self.offset = trellis_offset(codes.cpu().numpy(), self._one.codebook_size) if is_single else None
        self._most_bytes: int | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the `with` block the gradient of each decoded weight is added up."""
        form = _watched(self._one.form, self._gradient)
        for module in self.modules:
            module.watched_form = form
        try:
            yield
        finally:
            for module in self.modules:
                del module.watched_form

    def limit_bytes(self) -> None:
        """From now on the codes, entropy coded, take no more bytes than they do now."""
        codes, size = self._one.codes, self._one.codebook_size
        if is_codable(size, codes.shape[1]):
            self._most_bytes = coded_bytes(codes, size)

    def average_(self) -> None:
        """Take the gradient into the averages."""
        kept, kept_square = _MEMORY
        self.mean.lerp_(self._gradient, 1 - kept)
        self.square.lerp_(self._gradient.square(), 1 - kept_square)
        self._gradient.zero_()

    @property
    def codes(self) -> Tensor:
        """Of all its modules, `[rows, blocks_per_row]`."""
        return self._one.codes

    def recode_(self, config: FinetuningConfig, steps: int, share_of_rate: float, trust: float) -> None:
        """Choose codes again, as far as the limits allow."""
        module = self._one
        weight = module.matrix.detach().float().view(self.mean.shape)
        target, importance = self._asked(weight, steps, config.recode_rate * share_of_rate)
        moves = self._moves(target, importance)
        energy = (trust * float(torch.linalg.vector_norm(weight))) ** 2
        old, most, size = module.codes.long(), self._most_bytes, module.codebook_size
        spare = math.inf if most is None else 8.0 * (most - coded_bytes(old, size))
        taken = chosen_moves(moves, config.recode_share * old.numel(), energy, spare)
        codes = torch.where(taken[moves.number], moves.codes, old)
        if most is None or coded_bytes(codes, size) <= most:
            module.codes.copy_(codes)

    def _asked(self, weight: Tensor, steps: int, rate: float) -> tuple[Tensor, Tensor]:
        """Where a step of Adam on the decoded weight would take it, and how much each weight's error counts."""
        mean, square = self.mean / (1 - _MEMORY[0] ** steps), self.square / (1 - _MEMORY[1] ** steps)
        averages = [mean, square]
        sum_(averages)
        mean, square = (average / processes() for average in averages)
        root = square.sqrt()
        unit = float(root.mean())
        if not unit > 0:
            return weight, torch.ones_like(weight)
        importance = root / unit + _FLOOR
        size = float(weight.square().mean().sqrt())
        return weight - rate * size * (mean / unit) / importance, importance

    def _moves(self, target: Tensor, importance: Tensor) -> Moves:
        module = self._one
        codebook = module.codebook.detach().float()
        bits = code_lengths(module.codes, module.codebook_size, self.offset)
        if self.offset is None:
            kept = None if module.mask is None else module.mask.view(target.shape)
            return block_moves(codebook, module.codes, target, importance, kept, Coding(bits=bits, rate=0.0))
        levels = codebook[:, 0]
        coding = Coding(bits=bits, rate=walk_rate(levels))
        return walk_moves(levels, module.codes, self.offset, target, importance, coding)


def _same_codes(student: nn.Module) -> list[list[PQModule]]:
    """The modules of blocks, those with one codebook and the same codes together."""
    groups: list[list[PQModule]] = []
    for module in student.modules():
        if isinstance(module, PQModule) and module.has_blocks:
            one = next((g for g in groups if _is_same(g[0], module)), None)
            groups.append([module]) if one is None else one.append(module)
    return groups


def _is_same(one: PQModule, other: PQModule) -> bool:
    return one.codebook is other.codebook and torch.equal(one.codes, other.codes)


def _watched(form: Form, gradient: Tensor) -> Form:
    """The form, whose decoded weights add their gradients to `gradient`, `[rows, columns]`."""

    def add(found: Tensor, at: Tensor | None = None) -> None:
        if at is None:
            gradient.add_(found.detach())
        else:
            gradient.index_add_(0, at, found.detach().to(gradient))

    def decode(codebook: Tensor, codes: Tensor, shape: Sequence[int]) -> Tensor:
        weight = form.decode(codebook, codes, shape)
        if weight.requires_grad:
            weight.register_hook(lambda found: add(found.reshape(gradient.shape)))  # type: ignore[no-untyped-call]
        return weight

    def rows(codebook: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
        found = form.rows(codebook, codes, indices)
        if found.requires_grad:
            at = indices.flatten()
            found.register_hook(lambda own: add(own.reshape(len(at), -1), at))  # type: ignore[no-untyped-call]
        return found

    return dataclasses.replace(form, decode=decode, rows=rows)
