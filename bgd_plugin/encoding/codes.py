"""Pack codes into log2(codebook_size) bits each instead of whole bytes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["code_dtype", "pack", "unpack"]

_CHUNK = 1 << 16
"""Codes per chunk: a multiple of 8, so that each chunk ends on a byte; limits scratch memory to 16 MiB."""


def code_dtype(codebook_size: int) -> torch.dtype:
    """The smallest integer dtype that holds the codes of a codebook and that torch.distributed can send.

    gloo and NCCL do not support 16-bit integers, and DistributedDataParallel broadcasts every buffer when it is built.

    Args:
        codebook_size: number of codewords.

    Returns:
        uint8 or int32.
    """
    return torch.uint8 if codebook_size <= 256 else torch.int32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Write the codes one after another with `bits` bits each, lowest bit first.

    Bit j of code i is bit `(i·bits + j) mod 8` of byte `(i·bits + j) div 8`; the last byte is padded with zeros.

    Args:
        codes: integers in 0 … 2^bits − 1, any shape; read in row-major order.
        bits: 1 … 16.

    Returns:
        uint8 `[ceil(codes.numel() · bits / 8)]`.

    Raises:
        ValueError: `bits` is out of range, or a code does not fit.
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise ValueError(f"codes from {int(flat.min())} to {int(flat.max())} do not fit {bits} bits")
    packed = torch.zeros(_packed_bytes(flat.numel(), bits), dtype=torch.uint8, device=codes.device)
    places = torch.arange(bits, dtype=torch.int32, device=codes.device)
    for chunk, part in zip(torch.split(flat, _CHUNK), torch.split(packed, _CHUNK * bits // 8), strict=True):
        ones = (chunk.to(torch.int32).unsqueeze(1) >> places & 1).flatten()
        padded = torch.nn.functional.pad(ones, (0, part.numel() * 8 - ones.numel()))
        part.copy_(_join_bits(padded.view(-1, 8)))
    return packed


def unpack(packed: Tensor, bits: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Inverse of `pack`: read `count` codes of `bits` bits.

    Args:
        packed: uint8 `[ceil(count · bits / 8)]`.
        bits: 1 … 16.
        count: number of codes.
        dtype: of the result, an integer type that holds `bits` bits; a wide one takes several times the packed bytes.

    Returns:
        `[count]`.

    Raises:
        ValueError: `bits` is out of range, or `packed` has the wrong dtype or length for `count` codes.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape != (_packed_bytes(count, bits),):
        raise ValueError(
            f"{count} codes of {bits} bits need uint8 ({_packed_bytes(count, bits)},), "
            f"found {packed.dtype} {tuple(packed.shape)}"
        )
    if bits == 8:
        return packed.to(dtype, copy=True)
    codes = torch.empty(count, dtype=dtype, device=packed.device)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    for part, chunk in zip(torch.split(packed, _CHUNK * bits // 8), torch.split(codes, _CHUNK), strict=True):
        ones = (part.unsqueeze(1) >> places & 1).flatten()
        chunk.copy_(_join_bits(ones[: chunk.numel() * bits].view(-1, bits)))
    return codes


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits={bits}: codes have 1 to 16 bits")


def _packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _join_bits(ones: Tensor) -> Tensor:
    """`[n, bits]` of 0 and 1, lowest bit first -> int32 `[n]`."""
    joined = torch.zeros(ones.shape[0], dtype=torch.int32, device=ones.device)
    for place in range(ones.shape[1]):
        joined |= ones[:, place].to(torch.int32) << place
    return joined
