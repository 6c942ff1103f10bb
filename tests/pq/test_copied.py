"""Decoding by copies of codewords, against torch's look-up: values, derivatives, graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from bgd_plugin.pq import blocks
from bgd_plugin.pq.blocks import decode
from bgd_plugin.pq.copied import copied


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("code_type", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_both_ways_to_decode_give_the_same(
    dtype: torch.dtype, code_type: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    codebook, codes = torch.randn(16, 4).to(dtype), torch.randint(0, 16, (6, 5)).to(code_type)
    literal = torch.stack([torch.cat([codebook[int(code)] for code in row]) for row in codes])
    assert torch.equal(decode(codebook, codes, (6, 20)), literal)
    monkeypatch.setattr(blocks, "can_copy", lambda *_: False)
    assert torch.equal(decode(codebook, codes, (6, 20)), literal)


def test_many_codes_are_copied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, codes = torch.randn(16, 4), torch.randint(0, 16, (7, 5))
    whole = copied(codebook, codes)
    for most in (1, 12, 34):
        monkeypatch.setattr("bgd_plugin.pq.copied._MOST", most)
        assert torch.equal(copied(codebook, codes), whole)
    codes[6, 4] = 16
    with pytest.raises(IndexError):
        copied(codebook, codes)


def test_derivatives_reach_the_codebook_both_ways() -> None:
    codebook, codes = torch.randn(16, 4, requires_grad=True), torch.randint(0, 16, (6, 5))
    assert decode(codebook, codes, (6, 20)).requires_grad
    with torch.no_grad():
        assert not decode(codebook, codes, (6, 20)).requires_grad
    with forward_ad.dual_level():
        moved = forward_ad.make_dual(codebook.detach(), torch.ones(16, 4))
        assert torch.equal(forward_ad.unpack_dual(decode(moved, codes, (6, 20))).tangent, torch.ones(6, 20))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_traced_decoding_holds_operators_and_no_values() -> None:
    codes = torch.randint(0, 16, (6, 5))
    traced = torch.jit.trace(lambda codebook: decode(codebook, codes, (6, 20)), torch.randn(16, 4))
    other = torch.randn(16, 4)
    assert torch.equal(traced(other), decode(other, codes, (6, 20)))


def test_compiled_and_exported_decodings_are_the_same() -> None:
    class Decoder(torch.nn.Module):
        def forward(self, codebook: Tensor, codes: Tensor) -> Tensor:
            return decode(codebook, codes, (6, 20))

    given = torch.randn(16, 4), torch.randint(0, 16, (6, 5))
    expected = decode(*given, (6, 20))
    exported = torch.export.export(Decoder(), given)
    with torch.no_grad():
        compiled = torch.compile(Decoder(), backend="eager", fullgraph=True)(*given)
    assert torch.equal(exported.module()(*given), expected)
    assert torch.equal(compiled, expected)
