"""Folders of images, and what happens to an image before the network sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.common import image


def test_folders_of_classes_are_numbered_by_name(tmp_path: Path) -> None:
    from bgd_plugin.cli.images import labelled

    for i, name in enumerate(("zebra", "ant", "bee")):
        image(tmp_path / name / "1.png", i)
    assert {path.parent.name: label for path, label in labelled(tmp_path)} == {"ant": 0, "bee": 1, "zebra": 2}


def test_preprocessing_equals_torchvisions() -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
    from bgd_plugin.cli.images import Preprocessing

    values = torch.randint(0, 256, (37, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image, ours = Image.fromarray(values.numpy()), Preprocessing(size=20, resize=25)
    steps = [transforms.Resize(25), transforms.CenterCrop(20), transforms.ToTensor()]
    theirs = transforms.Compose([*steps, transforms.Normalize(ours.mean, ours.std)])
    torch.testing.assert_close(ours(image), theirs(image))


def test_training_walks_see_all_images_in_random_crops(flat: Path) -> None:
    from bgd_plugin.cli.images import CalibrationImages, Preprocessing

    data = CalibrationImages(flat, Preprocessing(size=8, resize=8), images=4, batch_size=4)
    assert data.steps_per_epoch == 2
    walks = [torch.cat(list(data)) for _ in range(3)]
    assert [len(walk) for walk in walks] == [4, 6, 6]
    assert not torch.equal(walks[1], walks[2])
    again = CalibrationImages(flat, Preprocessing(size=8, resize=8), images=4, batch_size=4)
    assert all(torch.equal(torch.cat(list(again)), walk) for walk in walks)
