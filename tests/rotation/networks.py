"""Small transformers of the kinds that rotate, in plain torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, TOKENS, WORDS = 16, 6, 40


class RMSNorm(nn.Module):
    """Divides by the root mean square; its gain is `weight`, or 1 + weight."""

    def __init__(self, *, one_plus: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + (0.0 if one_plus else 0.5))
        self.one_plus = one_plus

    def forward(self, x: Tensor) -> Tensor:
        gain = 1 + self.weight if self.one_plus else self.weight
        return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def layer_norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, std=0.3)
    return norm


class Block(nn.Module):
    """Attention of two heads, with keys and values shared by both or not, and a gated feed-forward part."""

    def __init__(self, norm: type | object, *, bias: bool, shared_values: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()  # type: ignore[operator]
        values = WIDTH // 2 if shared_values else WIDTH
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=bias) for n in (WIDTH, values, values))
        self.o = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.gate, self.up = (nn.Linear(WIDTH, 24, bias=bias) for _ in range(2))
        self.down = nn.Linear(24, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (-1, WIDTH // 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if k.shape[1] == 1:
            k, v = (t.expand(-1, 2, -1, -1) for t in (k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """Words in, logits out; the head is tied to the embedding, or not."""

    def __init__(
        self, norm: object = RMSNorm, *, tied: bool = True, bias: bool = False, shared_values: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block(norm, bias=bias, shared_values=shared_values) for _ in range(2))
        self.norm = norm()  # type: ignore[operator]
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def words(count: int = 4) -> Tensor:
    return torch.randint(0, WORDS, (count, TOKENS))
