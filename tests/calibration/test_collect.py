"""Large batches are cut into pieces, where the network answers each sample by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import Batches, collect_batches, take_aside_
from bgd_plugin.errors import CalibrationError

CPU = torch.device("cpu")
CONFIG = bgd.BGDConfig(first_layer=bgd.LayerConfig(block_size=4, codebook_size=16), max_divergence=None)


class Rows(nn.Module):
    """Answers each sample by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2)).mean(1)


class Together(Rows):
    """Looks at all samples at once."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Fixed(Rows):
    """Takes eight samples at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(8, -1, 8))


class Dict(Rows):
    """Answers with a mapping, of which one part has no samples."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "scale": torch.ones(3)}


def large(count: int = 3) -> list[Tensor]:
    """Batches of eight samples of a mebibyte each."""
    return [torch.randn(8, 1 << 15, 8) for _ in range(count)]


def collected(model: nn.Module, data: list[Tensor]) -> Batches:
    return collect_batches(data, model.eval(), device=CPU, forward=None)


@pytest.mark.parametrize("network", [Rows, Dict])
def test_large_batches_lie_in_pieces_in_their_order(network: type[nn.Module]) -> None:
    data = large()
    batches = collected(network(), data)
    assert [batch.size for batch in batches] == [2, 2, 2, 2] * 3
    assert torch.equal(torch.cat([batch.args[0] for batch in batches]), torch.cat(data))
    assert batches.given == 3 and batches.numbers == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("network", [Together, Fixed])
def test_a_network_that_needs_its_batches_whole_gets_them_whole(network: type[nn.Module]) -> None:
    batches = collected(network(), large())
    assert [batch.size for batch in batches] == [8, 8, 8]
    aside = take_aside_(batches, 0.5)
    assert [batch.size for batch in aside] == [8] and [batch.size for batch in batches] == [8, 8]


def test_small_batches_stay_as_they_are() -> None:
    calls = []
    model = Rows().eval()
    model.register_forward_hook(lambda *_: calls.append(1))
    data = [torch.randn(8, 4, 8) for _ in range(3)]
    assert [batch.size for batch in collected(model, data)] == [8, 8, 8]
    assert not calls  # and the network is not tried


def test_a_network_of_a_fixed_batch_size_is_quantized() -> None:
    model = Fixed().eval()
    data = [torch.randn(8, 4, 8) for _ in range(4)]
    exported = torch.export.export(model, (data[0],))
    for network in (model, exported):
        result = bgd.quantize(network, data, CONFIG, progress=False)
        assert len(result.report.layers) == 1
        assert result.model(data[0]).shape == (8, 64)


def test_errors_name_the_callers_batch() -> None:
    class Picky(Rows):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x == 7).any()):
                raise ValueError("a seven")
            return super().forward(x)

    data = large(2)
    data[1][5, 0, 0] = 7
    with pytest.raises(CalibrationError, match="calibration batch 1: a seven"):
        bgd.quantize(Picky().eval(), data, CONFIG, progress=False)


def test_networks_are_tried_in_evaluation_mode_and_left_in_theirs() -> None:
    class Normed(Rows):
        """Looks at all samples at once in training mode."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0) if self.training else x)

    network = Normed().train()
    batches = collect_batches(large(1), network, device=CPU, forward=None)
    assert [batch.size for batch in batches] == [2, 2, 2, 2]
    assert network.training


def test_a_network_is_tried_once_and_small_batches_before_do_not_decide() -> None:
    calls: list[int] = []

    class Counted(Together):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    batches = collect_batches([torch.randn(1, 4, 8), *large(2)], Counted().eval(), device=CPU, forward=None)
    assert [batch.size for batch in batches] == [1, 8, 8]
    assert calls == [2, 1]
    assert not batches.may_be_cut()


def test_a_bound_on_memory_is_that_of_the_batches() -> None:
    data = [torch.randn(4, 3) for _ in range(4)]
    batches = collect_batches(data, Rows().eval(), device=CPU, forward=None, memory_bytes=1)
    assert batches.store.bound_bytes == 1
    assert all(torch.equal(batch.args[0], x) for batch, x in zip(batches, data, strict=True))
    assert batches.store.spilled_bytes
    assert collect_batches(data, Rows().eval(), device=CPU, forward=None).store.bound_bytes is None


def test_the_trial_copies_no_weight() -> None:
    class Where(Rows):
        def forward(self, x: Tensor) -> Tensor:
            places.update(parameter.data_ptr() for parameter in self.parameters())
            return super().forward(x)

    places, model = set[int](), Where().eval()
    collect_batches(large(1), model, device=CPU, forward=None)
    assert places == {parameter.data_ptr() for parameter in model.parameters()}
