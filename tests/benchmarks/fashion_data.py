"""Fashion-MNIST as tensors, from wherever it is: a folder given, the Debian package, or torchvision's download.

Why not torchvision's dataset class alone: it reads only its own folder layout, and it can fetch only with a network.
The benchmarks also run on machines without one, where a distribution package is the way to get the same four files.

**Source**: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
arXiv 1708.07747; MIT licence. File format: the idx format of MNIST (big-endian header, then raw bytes).
"""

import gzip
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.datasets import FashionMNIST

__all__ = [
    "CACHE",
    "CLASSES",
    "ENVIRONMENT_VARIABLE",
    "FashionData",
    "input_batches",
    "load_fashion_mnist",
    "random_crop_and_flip",
    "to_input",
]

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "fashion"
ENVIRONMENT_VARIABLE = "BGD_FASHION_MNIST"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

# Mean and standard deviation of all training pixels on the scale 0..1.
PIXEL_MEAN = 0.2860
PIXEL_STD = 0.3530

_IMAGE_MAGIC = 2051
_LABEL_MAGIC = 2049
_SIDE = 28
_PARTS = (("train", 60_000), ("t10k", 10_000))

_HOW_TO_GET = f"""Fashion-MNIST was not found. Either
  * with a network: run again without naming a folder; torchvision then downloads it into {CACHE}; or
  * on Debian and Ubuntu: apt-get install dataset-fashion-mnist (found by itself in {DEBIAN_FOLDER}); or
  * give the folder that holds the four idx files, gzipped or not: --data DIR or {ENVIRONMENT_VARIABLE}=DIR."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FashionData:
    """All 70,000 images: `*_images` uint8 `[images, 1, 28, 28]`, `*_labels` int64 `[images]` (index into CLASSES)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_fashion_mnist(folder: Path | None = None) -> FashionData:
    """Read the 60,000 training and 10,000 test images.

    A folder that the caller names (argument, then `BGD_FASHION_MNIST`) is the only one looked into: a typing error must
    not silently give other files. Otherwise: the Debian package, an earlier download, a new download.

    Args:
        folder: holds the four idx files, or torchvision's `FashionMNIST/raw` below it.

    Raises:
        FileNotFoundError: the data are nowhere; the message says how to get them.
        ValueError: a file is there but is not the Fashion-MNIST file of that name.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if folder is None and named:
        folder = Path(named)
    files = _find(folder) if folder is not None else _find_or_download()
    (train_images, train_labels), (test_images, test_labels) = (_read_part(files, *part) for part in _PARTS)
    return FashionData(
        train_images=train_images, train_labels=train_labels, test_images=test_images, test_labels=test_labels
    )


def to_input(images: Tensor) -> Tensor:
    """Pixels to what the network takes: normalized, the grey channel repeated to three (torchvision's stem is kept).

    Args:
        images: uint8 `[images, 1, 28, 28]`.

    Returns:
        float32 `[images, 3, 28, 28]`.
    """
    grey = (images.to(torch.float32) / 255 - PIXEL_MEAN) / PIXEL_STD
    return grey.repeat(1, 3, 1, 1)


def input_batches(images: Tensor, batch_size: int) -> list[Tensor]:
    """Network inputs in order, float32 `[at most batch_size, 3, 28, 28]` each; a list, so it can be walked again."""
    return [to_input(part) for part in torch.split(images, batch_size)]


def random_crop_and_flip(images: Tensor, generator: torch.Generator, padding: int) -> Tensor:
    """Shift each image by up to `padding` pixels (black comes in) and mirror half of them; shape and dtype stay."""
    count = images.shape[0]
    padded = functional.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, _SIDE, 1).unfold(3, _SIDE, 1)  # [images, 1, shifts, shifts, 28, 28], a view
    shifts = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    cropped = windows[torch.arange(count), :, shifts[0], shifts[1]]
    mirrored = torch.rand(count, generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], cropped.flip(3), cropped)


def _find(folder: Path) -> Path:
    """The folder with the idx files: the given one, or torchvision's layout below it."""
    for candidate in (folder, folder / "FashionMNIST" / "raw"):
        if _is_complete(candidate):
            return candidate
    raise FileNotFoundError(f"{folder} does not hold the four idx files of Fashion-MNIST.\n{_HOW_TO_GET}")


def _find_or_download() -> Path:
    downloaded = CACHE / "FashionMNIST" / "raw"
    for candidate in (DEBIAN_FOLDER, downloaded):
        if _is_complete(candidate):
            return candidate
    logger.info("downloading Fashion-MNIST into %s", CACHE)
    try:
        FashionMNIST(str(CACHE), download=True)
    except (OSError, RuntimeError) as error:  # torchvision: RuntimeError for a bad download, OSError for no network
        raise FileNotFoundError(f"torchvision's download failed ({error}).\n{_HOW_TO_GET}") from error
    return downloaded


def _is_complete(folder: Path) -> bool:
    names = (f"{part}-{kind}" for part, _ in _PARTS for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return all(any((folder / f"{name}{end}").is_file() for end in ("", ".gz")) for name in names)


def _read_part(folder: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Images uint8 `[count, 1, 28, 28]` and labels int64 `[count]` of one part."""
    images = _read_idx(folder / f"{part}-images-idx3-ubyte", _IMAGE_MAGIC, (count, _SIDE, _SIDE))
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte", _LABEL_MAGIC, (count,))
    return images.unsqueeze(1), labels.to(torch.int64)


def _read_idx(path: Path, magic: int, shape: tuple[int, ...]) -> Tensor:
    """An idx file, gzipped or not, as uint8 of the given shape; its header must say exactly that shape."""
    zipped = path.with_name(f"{path.name}.gz")
    content = path.read_bytes() if path.is_file() else gzip.decompress(zipped.read_bytes())
    header = b"".join(number.to_bytes(4, "big") for number in (magic, *shape))
    expected_bytes = len(header) + torch.Size(shape).numel()
    if not content.startswith(header) or len(content) != expected_bytes:
        raise ValueError(
            f"{path}: expected an idx file of shape {list(shape)} ({expected_bytes} bytes unzipped), "
            f"found {len(content)} bytes beginning {content[:16].hex()}; get the file again or name another folder"
        )
    return torch.frombuffer(bytearray(content[len(header) :]), dtype=torch.uint8).reshape(shape)
