"""A quantized network under Lightning's own Trainer: trained, checkpointed, and gone on from a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

import pytorch_lightning as lightning

import bgd_plugin as bgd
from bgd_plugin.integration import PQModule
from tests.networks import SmallResNet, em, images, randomized

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tensorboardX.*",
    "ignore:.*treespec.*:FutureWarning",
    "ignore:Found .* in eval mode",
    "ignore:The dirpath has changed",
)


class Finetuning(lightning.LightningModule):  # type: ignore[misc]
    """Lets a compressed network answer as the float one."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def training_step(self, batch: Any, index: int) -> Tensor:
        (x,) = batch
        return nn.functional.mse_loss(self.student(x), self.teacher(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.student.parameters(), lr=1e-3)


def _module() -> Finetuning:
    torch.manual_seed(0)
    teacher = randomized(SmallResNet()).eval()
    return Finetuning(bgd.quantize(teacher, images(), em(), progress=False).model, teacher)


def _fit(module: Finetuning, folder: Path, epochs: int, checkpoint: str | None = None) -> Any:
    data = DataLoader(TensorDataset(torch.cat(images())), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[lightning.callbacks.ModelCheckpoint(folder, save_top_k=-1)],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    return trainer


def test_training_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    whole = _module()
    layers = {path: m.codes.clone() for path, m in whole.student.named_modules() if isinstance(m, PQModule)}
    before = {name: value.clone() for name, value in whole.student.state_dict().items()}
    _fit(whole, tmp_path, epochs=4)
    after = whole.student.state_dict()
    assert layers
    for path, codes in layers.items():
        assert torch.equal(after[f"{path}.codes"], codes)
        assert not torch.equal(after[f"{path}.codebook"], before[f"{path}.codebook"])
    half = next(tmp_path.glob("epoch=1-*.ckpt"))
    second = _module()
    _fit(second, tmp_path / "second", epochs=4, checkpoint=str(half))
    assert all(torch.equal(value, second.student.state_dict()[name]) for name, value in after.items())


def test_a_trained_network_is_saved_and_read(tmp_path: Path) -> None:
    module = _module()
    _fit(module, tmp_path, epochs=1)
    student = module.student.eval()
    bgd.save(student, tmp_path / "net.safetensors")
    again = bgd.load(tmp_path / "net.safetensors", like=SmallResNet().eval())
    x = images()[0]
    assert torch.allclose(again(x), student(x), atol=1e-2)
