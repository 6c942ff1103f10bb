"""MTCNN's three networks: the faces that the detector finds with a compressed one in the place of the float one.

Run `python -m tests.benchmarks.default_faces` for what the measure itself bears: the faces in common where one network
is in half precision, and where normally distributed noise is added to its weights, in units of their spread.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.cli.demo import photos
from bgd_plugin.cli.images import Preprocessing, labelled, opened

__all__ = ["Detector", "cases", "noisy"]

_NETS = "pnet", "rnet", "onet"
_INPUTS = 512
_SAME = 0.5


class Detector:
    """Finds faces, with any of its networks exchanged.

    Args:
        files: of the photos in which it finds faces.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        from facenet_pytorch import MTCNN

        self.float: Any = MTCNN(keep_all=True)
        as_it_is = Preprocessing(size=224, resize=224, mean=(0.0,) * 3, std=(1 / 255,) * 3)
        self._photos = [torch.stack([as_it_is(opened(path)) for path in files]).permute(0, 2, 3, 1)]
        self._photos = [batch.contiguous() for batch in self._photos[0].split(25)]
        self.faces = self.found(self.float)

    @torch.no_grad()
    def found(self, detector: Any) -> list[Tensor]:
        """The boxes `[faces, 4]` of each photo."""
        boxes = [one for batch in self._photos for one in detector.detect(batch)[0]]
        return [torch.zeros(0, 4) if one is None else torch.as_tensor(one.astype("float32")) for one in boxes]

    def kept(self, **networks: nn.Module) -> float:
        """Of the float detector's faces and of those found with other networks in it, the percentage in both."""
        detector = copy.deepcopy(self.float)
        for name, network in networks.items():
            setattr(detector, name, network)
        both = every = 0
        for mine, theirs in zip(self.found(detector), self.faces, strict=True):
            same = int((_overlap(mine, theirs) > _SAME).any(0).sum()) if len(mine) and len(theirs) else 0
            both, every = both + same, every + len(mine) + len(theirs) - same
        return 100 * both / max(1, every)

    @torch.no_grad()
    def inputs(self, files: Sequence[Path]) -> dict[str, list[Tensor]]:
        """Batches of what the three networks get while the float detector looks at photos."""
        seen: dict[str, list[Tensor]] = {name: [] for name in _NETS}
        with _recorded(self.float, seen):
            Detector.found(_with_photos(self, files), self.float)
        batches = {"pnet": seen["pnet"]}
        for name in ("rnet", "onet"):
            crops = torch.cat(seen[name])
            order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))[:_INPUTS]
            batches[name] = list(crops[order].split(64))
        return batches


def _with_photos(detector: Detector, files: Sequence[Path]) -> Detector:
    other = copy.copy(detector)
    as_it_is = Preprocessing(size=224, resize=224, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    pictures = torch.stack([as_it_is(opened(path)) for path in files]).permute(0, 2, 3, 1)
    other._photos = [batch.contiguous() for batch in pictures.split(25)]
    return other


@contextmanager
def _recorded(detector: Any, seen: dict[str, list[Tensor]]) -> Iterator[None]:
    hooks = [
        getattr(detector, name).register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0].clone()))
        for name, kept in seen.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


def _overlap(mine: Tensor, theirs: Tensor) -> Tensor:
    """Intersection over union of boxes, `[mine, theirs]`."""
    low = torch.maximum(mine[:, None, :2], theirs[None, :, :2])
    high = torch.minimum(mine[:, None, 2:], theirs[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (mine, theirs)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The three networks as fields of `Case`; photos as of Lite0."""
    files = photos() if options.photos is None else [path for path, _ in labelled(options.photos)]
    random.Random(options.split).shuffle(files)
    half = len(files) // 2
    detector = Detector(files[half:])
    faces = sum(map(len, detector.faces))
    inputs = detector.inputs(files[:half])
    said = f"{half} photos calibrate, {faces} faces in {len(files) - half} others judge: faces in common"
    return [
        {
            "name": f"MTCNN {name}",
            "data": said,
            "model": getattr(detector.float, name).eval(),
            "calibration": inputs[name],
            "measure": lambda model, name=name: detector.kept(**{name: model}),
        }
        for name in _NETS
    ]


@torch.no_grad()
def noisy(network: nn.Module, size: float, seed: int) -> nn.Module:
    """A copy with noise in each weight, `size` times the weight's standard deviation."""
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    for weight in other.parameters():
        if weight.ndim > 1:
            weight += size * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


def main() -> None:
    """Print the faces in common, in percent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=_NETS)
    parser.add_argument("--photos", type=Path, help="folder of images; else the demo's 20")
    parser.add_argument("--split", type=int, default=0, help="seed of the photos' two halves")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.001, 0.003, 0.01])
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = photos() if options.photos is None else [path for path, _ in labelled(options.photos)]
    random.Random(options.split).shuffle(files)
    detector = Detector(files[len(files) // 2 :])
    print(f"{sum(map(len, detector.faces))} faces", flush=True)
    for name in options.networks:
        network = getattr(detector.float, name)
        halved = copy.deepcopy(network).half().float()
        print(f"{name}, half precision: {detector.kept(**{name: halved}):.1f}", flush=True)
        for size in options.noise:
            found = [detector.kept(**{name: noisy(network, size, seed)}) for seed in range(2)]
            print(f"{name}, noise {size:g}: {' and '.join(f'{one:.1f}' for one in found)}", flush=True)


if __name__ == "__main__":
    main()
