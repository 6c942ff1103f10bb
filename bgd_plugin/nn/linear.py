"""The product-quantized linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bgd_plugin.kernels.plain import linear_by_tiles
from bgd_plugin.kernels.switch import computable, needs_no_gradient_here, usable
from bgd_plugin.nn.base import PQModule

__all__ = ["PQLinear"]


class PQLinear(PQModule):
    """`nn.Linear` with a decoded weight; in inference on a CPU it is never decoded whole (`bgd_plugin.kernels`)."""

    def __init__(self, codebook: Tensor, codes: Tensor, like: nn.Linear) -> None:
        super().__init__(codebook, codes, like.weight.shape)
        self.in_features = like.in_features
        self.out_features = like.out_features
        self.bias = like.bias

    def forward(self, input: Tensor) -> Tensor:
        """Map input `[..., in_features]` to `[..., out_features]`."""
        codebook, codes, mask = self.held()
        bias = self.bias if (own := self._parameters.get("bias")) is None else own
        if usable(input, codebook, codes, bias):
            return self.kernels.linear(input, codebook, codes, mask, bias)
        if not self.training and computable(input, codebook, codes):  # inference without torch.no_grad()
            return self.kernels.linear_with_gradients(input, codebook, codes, mask, bias)
        if self.form.is_wide and needs_no_gradient_here(input, codebook, bias):
            return linear_by_tiles(self.form, input, codebook, codes, mask, bias)
        return F.linear(input, self.weight, self.bias)

    def to_float(self) -> nn.Linear:
        """The float module of the same size, on the meta device."""
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        """Sizes, block size and codebook size, for `print`."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.pq_repr()}"
