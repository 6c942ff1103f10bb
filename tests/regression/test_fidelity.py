"""A few published architectures at a setting that loses next to nothing; `make bench-fidelity` tries all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'bgd-plugin[demo]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

from tests.benchmarks.fidelity import Reader, config, is_right, run
from tests.benchmarks.fidelity_networks import cases

pytestmark = pytest.mark.slow

NETWORKS = [
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
    "transformers:BertModel",
    "transformers:CLIPModel",
    "transformers:GPT2LMHeadModel",
    "transformers:GemmaForCausalLM",
    "transformers:MambaForCausalLM",
    "transformers:MixtralForCausalLM",
    "transformers:SegformerForSemanticSegmentation",
    "transformers:T5ForConditionalGeneration",
    "transformers:Wav2Vec2Model",
    "transformers:WhisperForConditionalGeneration",
]


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BGD_KERNELS", "off")  # as the tests themselves
        process = Reader(timm=False)
        yield process
        process.close()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_that_went_in_comes_back(name: str, reader: Reader) -> None:
    case = next(case for case in cases(timm=False) if case.name == name)
    row = run(case, config("full" if name.startswith("transformers") else "em"), reader)
    assert is_right(row), row
