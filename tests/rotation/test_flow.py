"""Following values through a run: the same structure each time, whatever memory the run happens to reuse."""

import torch
from torch import Tensor

from bgd_plugin.calibration import Batch
from bgd_plugin.rotation.flow import structure_of
from bgd_plugin.rotation.structure import Structure
from tests.rotation.networks import Block, Model, words

NORMS = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]


class Caching(Model):
    """Joins each block's values to an empty cache, as language models do, made of plain Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            assert isinstance(block, Block)
            block.v.register_forward_hook(lambda _module, _args, out: torch.cat([torch.tensor([]), out], dim=-2))


def _structure(model: Model, x: Tensor) -> Structure:
    return structure_of(model, Batch(args=(x,)), NORMS)


def test_the_structure_is_the_same_each_time() -> None:
    torch.manual_seed(0)
    for model in (Model().eval(), Caching().eval()):
        for _ in range(8):
            structure = _structure(model, words(int(torch.randint(1, 9, ()))))
            (stream,) = structure.streams()
            assert stream.obstacle == ""
            assert list(stream.norms) == NORMS
            assert [reader.name for _, reader in structure.heads] == ["blocks.0.o.weight", "blocks.1.o.weight"]


def test_what_is_added_and_who_reads() -> None:
    torch.manual_seed(0)
    structure = _structure(Model(tied=False).eval(), words())
    (stream,) = structure.streams()
    assert {part.name for part in stream.parts} == {
        *("embed.weight", "positions"),
        *(f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in ("o", "down")),
    }
    assert {part.name for part in structure.norms["blocks.0.norm2"].readers} == {
        "blocks.0.gate.weight",
        "blocks.0.up.weight",
    }
    assert [part.name for part in structure.norms["norm"].readers] == ["head.weight"]
