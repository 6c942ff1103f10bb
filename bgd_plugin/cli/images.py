"""Folders of images as batches: for calibration, for training, and with labels for evaluation."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bgd_plugin.calibration import logits_of
from bgd_plugin.cli.arguments import ImageOptions
from bgd_plugin.errors import BGDError, CalibrationError, ConfigError
from bgd_plugin.support.processes import processes, rank

__all__ = [
    "Answer",
    "CalibrationImages",
    "Preprocessing",
    "Transform",
    "accuracy",
    "answers",
    "labelled",
    "list_images",
    "preprocessing",
]

Transform = Callable[[Any], Tensor]

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"))
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Random crops for training: less severe than the 0.08 of training from scratch, since the teacher must recognize them.
_CROP_AREA = (0.35, 1.0)
_CROP_ASPECT = (3 / 4, 4 / 3)
_LABEL = re.compile(r"(?:^|_)(\d+)$")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Convert a PIL image to a tensor `[3, size, size]`.

    Args:
        size: size of the centre crop, in pixels.
        resize: shorter side before the crop, in pixels.
        mean, std: per channel, for values from 0 to 1.
        interpolation: used for resizing, "bilinear" or "bicubic".

    Raises:
        ConfigError: a value is out of range.
    """

    size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise ConfigError(f"size={self.size}, resize={self.resize}: give a size of at least 1 and at most resize")
        if min(self.std) <= 0:
            raise ConfigError(f"std={self.std}: give positive numbers")

    def __call__(self, image: Any) -> Tensor:
        width, height = image.size
        short = min(width, height)
        image = image.resize((self.resize * width // short, self.resize * height // short), self._resampling())
        left, top = (round((side - self.size) / 2) for side in image.size)
        return self.tensor(image.crop((left, top, left + self.size, top + self.size)))

    def random_crop(self, image: Any, rng: random.Random) -> Tensor:
        """A random crop of the image, drawn with `rng` and randomly mirrored, as in training: `[3, size, size]`."""
        width, height = image.size
        area, aspect = rng.uniform(*_CROP_AREA) * width * height, rng.uniform(*_CROP_ASPECT)
        w = min(width, max(1, round((area * aspect) ** 0.5)))
        h = min(height, max(1, round((area / aspect) ** 0.5)))
        left, top = rng.randint(0, width - w), rng.randint(0, height - h)
        image = image.resize((self.size, self.size), self._resampling(), box=(left, top, left + w, top + h))
        result = self.tensor(image)
        return result.flip(-1) if rng.random() < 0.5 else result

    def tensor(self, image: Any) -> Tensor:
        """Normalized values `[3, height, width]` of a PIL image."""
        values = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return (values - mean) / std

    def _resampling(self) -> Any:
        from PIL import Image

        return {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[self.interpolation]


def list_images(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, sorted by path.

    Raises:
        CalibrationError: the folder does not exist, or contains no image.
    """
    if not folder.is_dir():
        raise CalibrationError(f"{folder}: folder not found")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise CalibrationError(
            f"{folder}: no images found: give a folder with files named {', '.join(sorted(SUFFIXES))}"
        )
    return files


def labelled(folder: Path) -> list[tuple[Path, int]]:
    """Images and their class numbers.

    In a folder of folders each subfolder is a class, numbered in the order of their names, as in torchvision's
    `ImageFolder`. In a flat folder a file's name ends in the class number: `0243.jpg`, `photo_7_243.jpg`.

    Raises:
        CalibrationError: no images, or an image without a label.
    """
    files = list_images(folder)
    parents = [path.relative_to(folder).parts[0] for path in files if path.parent != folder]
    if parents and len(parents) < len(files):
        raise CalibrationError(f"{folder} contains both images and folders of images: give one or the other")
    if parents:
        classes = {name: i for i, name in enumerate(sorted(p.name for p in folder.iterdir() if p.is_dir()))}
        return [(path, classes[parent]) for path, parent in zip(files, parents, strict=True)]
    matches = [_LABEL.search(path.stem) for path in files]
    missing = [path.name for path, match in zip(files, matches, strict=True) if not match]
    if missing:
        raise CalibrationError(
            f"{folder}: {missing[0]!r} has no label: end file names in the class number, as in "
            "'0243.jpg' or 'photo_243.jpg', or give a folder with one subfolder per class"
        )
    return [(path, int(match[1])) for path, match in zip(files, matches, strict=True) if match]


class _Images(Dataset[Tensor]):
    """Images by number, each a tensor."""

    def __init__(self, files: Sequence[Path], transform: Callable[[Any, Path], Tensor]) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index]
        return self.transform(opened(path), path)


def opened(path: Path) -> Any:
    """A PIL image in RGB.

    Raises:
        CalibrationError: the file cannot be read as an image.
        BGDError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise BGDError(f"images need Pillow ({error}): pip install 'bgd-plugin[vision]'") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read as an image ({error}): remove it from the folder") from error


class CalibrationImages:
    """Batches of images: the first iteration yields the calibration set, every later one training images.

    The calibration set is held in memory, so it is a random choice of at most `images` files. Training iterates over
    all files in a new order each time, and uses random crops if the transform supports them.

    Args:
        images: maximum size of the calibration set.
        workers: worker processes that read images.
    """

    def __init__(
        self, folder: Path, transform: Transform, *, images: int, batch_size: int, seed: int = 0, workers: int = 0
    ) -> None:
        self.transform, self.batch_size, self.seed, self.workers = transform, batch_size, seed, workers
        self.files = list_images(folder)
        self.chosen = _own(sorted(random.Random(seed).sample(self.files, min(images, len(self.files)))))
        self.walks = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over all files; with several processes, over this process's part."""
        return -(-len(self.files) // (self.batch_size * processes()))

    def set_epoch(self, number: int) -> None:
        """Set the number of the next iteration; 0 yields the calibration set."""
        self.walks = number

    def __iter__(self) -> Iterator[Tensor]:
        walk, self.walks = self.walks, self.walks + 1
        mixed = random.Random(f"{self.seed} {walk}").sample(self.files, len(self.files))
        files = self.chosen if walk == 0 else _own(mixed)
        # without a generator the loader would draw from the global one
        own = torch.Generator().manual_seed(self.seed)
        dataset = _Images(files, _Varied(self.transform, walk, self.seed))
        yield from DataLoader(dataset, self.batch_size, num_workers=self.workers, generator=own)


def _own(files: list[Path]) -> list[Path]:
    """This process's part."""
    return files[rank() :: processes()]


@dataclass(frozen=True)
class _Varied:
    """The plain transform on the first pass, random crops on later ones; a class, so that workers can unpickle it."""

    transform: Transform
    walk: int
    seed: int

    def __call__(self, image: Any, path: Path) -> Tensor:
        if self.walk and isinstance(self.transform, Preprocessing):
            return self.transform.random_crop(image, random.Random(f"{self.seed} {self.walk} {path}"))
        return self.transform(image)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prediction for an image file with a label: up to five classes and their probabilities, the likeliest first."""

    file: str
    label: int
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def answers(
    model: nn.Module, images: Sequence[tuple[Path, int]], transform: Transform, *, batch_size: int, workers: int = 0
) -> list[Answer]:
    """The network's prediction for each of the images (file, label).

    Args:
        model: a classifier.
        transform: to a tensor `[3, height, width]`.
        batch_size, workers: number of images per batch, and of processes that read them.

    Raises:
        CalibrationError: a label is not below the number of the network's classes.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    dataset = _Images([path for path, _ in images], _Varied(transform, 0, 0))
    result: list[Answer] = []
    for batch in DataLoader(dataset, batch_size, num_workers=workers):
        logits = logits_of(model(batch.to(device))).float().cpu()
        top = logits.softmax(1).topk(min(5, logits.shape[1]))
        for values, classes in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            path, label = images[len(result)]
            if label >= logits.shape[1]:
                raise CalibrationError(
                    f"{path.name!r} has label {label}, but the network has {logits.shape[1]} classes, numbered from 0"
                )
            result.append(Answer(file=path.name, label=label, classes=tuple(classes), probabilities=tuple(values)))
    return result


def accuracy(found: Sequence[Answer]) -> dict[str, float]:
    """Top-1 and top-5 accuracy, from 0 to 1."""
    top1 = sum(a.label == a.classes[0] for a in found) / len(found)
    return {"top1": top1, "top5": sum(a.label in a.classes for a in found) / len(found)}


def preprocessing(options: ImageOptions) -> Preprocessing:
    """Preprocessing by the options.

    Raises:
        ConfigError: mean or standard deviation is not three numbers, or a value is out of range.
    """
    return Preprocessing(
        size=options.size,
        resize=options.resize,
        mean=_three_numbers("--mean", options.mean),
        std=_three_numbers("--std", options.std),
        interpolation=options.interpolation.value,
    )


def _three_numbers(option: str, text: str) -> tuple[float, float, float]:
    try:
        one, two, three = (float(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: give three numbers, such as 0.485,0.456,0.406") from error
    return one, two, three
