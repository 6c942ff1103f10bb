"""What errors in layers cost: each one's share in the loss of the network's output, and the loss of all together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bgd_plugin.config import DEFAULT_DIVERGENCE
from bgd_plugin.encoding.stream import overhead_bytes
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.forms import TRELLIS
from bgd_plugin.pq.rate import EntropyCurve, RateCurve

__all__ = ["LEVEL", "Sensitivity", "beside_codes", "entropy_bits", "joint_loss"]

LEVEL = DEFAULT_DIVERGENCE
"""The loss of all layers together at which a layer's share is told unless another one is asked for."""
_LEAST_SLOPE = 0.2
_LEAST_LOSS, _MOST_LOSS, _PRECISION = 1e-15, 1e6, 1.001
_USUAL_LEVELS = 48
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The expected loss of a layer's candidates.

    Attributes:
        curves: the layer's error by codebook size, for each block size.
        losses: pairs (error, loss of the network's output), both ascending. Between and beyond them the loss is a power
            of the error, and next to no error proportional to it.
        reason: what was measured, as text for the report.
        entropy: the layer's error by bits for each weight where codes are entropy coded; None where they may not be.
        windows: the layer's error with trellis codes; infinite where it may not have them.
        rounding: error that any codebook has, since its values are rounded for the file.
        narrow: error of the layer in float, with 8 bits for each weight and a scale for each row; infinite if unknown.
    """

    curves: tuple[RateCurve, ...]
    losses: tuple[tuple[float, float], ...]
    reason: str
    entropy: EntropyCurve | None = None
    windows: float = math.inf
    rounding: float = 0.0
    narrow: float = math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """The inverse of `to_dict`; `values` may have gone through JSON."""
        curves = tuple(
            RateCurve(block_size=curve["block_size"], points=tuple((k, error) for k, error in curve["points"]))
            for curve in values["curves"]
        )
        points = (values.get("entropy") or {}).get("points")
        entropy = EntropyCurve(points=tuple((bits, error) for bits, error in points)) if points else None
        losses = tuple((error, loss) for error, loss in values["losses"])
        return cls(
            curves=curves,
            losses=losses,
            reason=values["reason"],
            entropy=entropy,
            windows=values.get("windows", math.inf),
            rounding=values.get("rounding", 0.0),
            narrow=values.get("narrow", math.inf),
        )

    def error(self, block_size: int, codebook_size: int) -> float:
        """The expected error, mean square per weight, in blocks of `block_size` with `codebook_size` codewords."""
        return next(c for c in self.curves if c.block_size == block_size).error(codebook_size) + self.rounding

    def error_at(self, loss: float) -> float:
        """The error of this layer, mean square per weight, whose loss by itself is `loss` nats."""
        points = self.losses
        if loss <= points[0][1]:
            return points[0][0] * loss / points[0][1]
        above = next((i for i, (_, found) in enumerate(points) if found >= loss), len(points) - 1)
        (e0, l0), (e1, l1) = points[max(0, above - 1)], points[above]
        slope = math.log(l1 / l0) / math.log(e1 / e0) if above else 1.0
        return e0 * float((loss / l0) ** (1 / max(slope, _LEAST_SLOPE)))

    def per_error(self, level: float = LEVEL) -> float:
        """Loss in nats for each unit of error, where the errors of all layers together cost `level` nats.

        The loss is no multiple of the error, and a layer's error does not act alone: its share is that at the point to
        which all errors together move the outputs.
        """
        return level / max(self.error_at(level), _TINY)

    def loss(self, block_size: int, codebook_size: int, level: float = LEVEL) -> float:
        """The share of a candidate in the loss of all layers together.

        Args:
            block_size: weights per block.
            codebook_size: codewords.
            level: the loss of all layers together, in nats.

        Returns:
            nats.
        """
        return self.per_error(level) * self.error(block_size, codebook_size)

    def at_least(self, per_error: float) -> Sensitivity:
        """The same with every loss at least `per_error` nats for each unit of error."""
        losses = tuple((error, max(loss, per_error * error)) for error, loss in self.losses)
        return dataclasses.replace(self, losses=losses)

    def error_of(self, layer: PlannedLayer) -> float:
        """The expected error, mean square per weight, of a layer quantized as planned."""
        if layer.codes == "entropy" and self.entropy is not None:
            return self.entropy.error(entropy_bits(layer))
        if layer.codes == TRELLIS:
            return self.windows
        return self.error(layer.block_size, layer.codebook_size)


def joint_loss(errors: Sequence[tuple[Sensitivity, float]]) -> float:
    """The loss L in nats of several layers' errors together: that at which their shares in a loss of L add up to L.

    Args:
        errors: of layers, mean square per weight, each with the layer's sensitivity.
    """
    if not any(error > 0 for _, error in errors):
        return 0.0
    low, high = _LEAST_LOSS, _MOST_LOSS
    while high > _PRECISION * low:
        middle = math.sqrt(low * high)
        shares = sum(error / max(one.error_at(middle), _TINY) for one, error in errors)
        low, high = (middle, high) if shares > 1 else (low, middle)
    return low


def entropy_bits(layer: PlannedLayer) -> float:
    """The bits for each weight that an entropy-coded layer has for its codes."""
    return max(0.0, 8 * (layer.size_bytes - beside_codes(layer)) / layer.weights)


def beside_codes(layer: PlannedLayer) -> int:
    """About the bytes of frequencies, lanes and levels, if there are as many levels as there mostly are."""
    return overhead_bytes(layer.rows, layer.weights // layer.rows, _USUAL_LEVELS) + _USUAL_LEVELS + 4
