"""k-means alone against faiss-cpu and scikit-learn: the same points, the same start, as many iterations, one thread.

Run `python -m tests.benchmarks.kmeans` (`make bench-kmeans`): 262,144 points of 9, as a 512×512×3×3 layer has them, 256
centroids, 25 iterations. Runs take turns and the fastest of each counts, so that other work on the machine, which can
only slow a run down, falls out. Ends with status 1 where the core takes more than twice faiss's CPU time, or where its
clustering is worse than faiss's.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bgd_plugin.pq.kmeans import kmeans
from bgd_plugin.support.tables import table

POINTS, DIMENSIONS, CENTROIDS, ITERATIONS = 262_144, 9, 256, 25
TARGETS = {"times_faiss": 2.0, "relative_objective": 1e-3}

Clustering = Callable[[Tensor, Tensor], Tensor]


def ours(points: Tensor, start: Tensor) -> Tensor:
    """The library's own."""
    return kmeans(points, start, ITERATIONS, generator=torch.Generator().manual_seed(0)).centroids


def faiss(points: Tensor, start: Tensor) -> Tensor:
    """faiss-cpu's, on all points (by default it would take 256 points a centroid)."""
    import faiss as library  # type: ignore[import-not-found, import-untyped, unused-ignore]

    library.omp_set_num_threads(1)
    limits = {"max_points_per_centroid": len(points), "min_points_per_centroid": 1}
    found = library.Kmeans(points.shape[1], len(start), niter=ITERATIONS, **limits)
    found.train(points.numpy(), init_centroids=start.numpy())
    return torch.from_numpy(found.centroids)


def scikit_learn(points: Tensor, start: Tensor) -> Tensor:
    """scikit-learn's plain Lloyd."""
    from sklearn.cluster import KMeans  # type: ignore[import-untyped, unused-ignore]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped, unused-ignore]

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        found = KMeans(len(start), init=start.numpy(), n_init=1, max_iter=ITERATIONS, tol=0.0, algorithm="lloyd")
        found.fit(points.numpy())
    return torch.from_numpy(found.cluster_centers_).to(points)


RIVALS: dict[str, Clustering] = {"bgd_plugin": ours, "faiss-cpu": faiss, "scikit-learn": scikit_learn}


def objective(points: Tensor, centroids: Tensor) -> float:
    """Sum over the points of the squared distance to the nearest centroid."""
    pieces = torch.split(points, 8192)
    return sum(float(torch.cdist(piece, centroids).min(1).values.square().sum()) for piece in pieces)


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """For each rival that is installed: the least CPU-seconds of all rounds, and the objective."""
    points = torch.randn(POINTS, DIMENSIONS, generator=torch.Generator().manual_seed(0))
    start = points[torch.randperm(POINTS, generator=torch.Generator().manual_seed(1))[:CENTROIDS]]
    figures: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, cluster in RIVALS.items():
            begin = time.process_time()
            try:
                centroids = cluster(points, start)
            except ImportError as error:
                print(f"{name} left out: {error}")
                continue
            seconds = time.process_time() - begin
            if name not in figures:
                figures[name] = {"cpu_seconds": seconds, "objective": objective(points, centroids)}
            figures[name]["cpu_seconds"] = min(seconds, figures[name]["cpu_seconds"])
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the status to end with."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kmeans", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="the first one also loads the libraries")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = measure(options.rounds)
    rows = [[name, f"{x['cpu_seconds']:.2f}", f"{x['objective']:.1f}"] for name, x in figures.items()]
    print(table(["k-means", "CPU-s", "objective"], rows))
    if options.json:
        options.json.write_text(json.dumps({"figures": figures, "targets": TARGETS}, indent=2) + "\n")
    if "faiss-cpu" not in figures:
        print("faiss-cpu is not installed, so the bar cannot be judged: pip install faiss-cpu")
        return 1
    mine, theirs = figures["bgd_plugin"], figures["faiss-cpu"]
    times = mine["cpu_seconds"] / theirs["cpu_seconds"]
    worse = mine["objective"] / theirs["objective"] - 1
    print(f"{times:.2f} times faiss-cpu's CPU time (bar: {TARGETS['times_faiss']}), objective {worse:+.2e} beside its")
    return int(times > TARGETS["times_faiss"] or worse > TARGETS["relative_objective"])


if __name__ == "__main__":
    raise SystemExit(main())
