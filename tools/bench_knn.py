"""Time of the exact nearest neighbours of evals/knn.py, beside faiss-cpu's exact search (IndexFlatIP).

    python tools/bench_knn.py [--test 10000] [--train 50000] [--width 384] [--k 20] [--rounds 5] [--threads 2]

Both take turns on the same unit vectors; medians, their ratio, and this process's peak of memory are printed. Without
faiss (pip install faiss-cpu) our own alone is measured.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch
import torch.nn.functional as F

from ssl_ib.evals.knn import knn_classes, neighbours


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"test": 10000, "train": 50000, "width": 384, "k": 20, "rounds": 5, "threads": 2}.items():
        p.add_argument(f"--{name}", type=int, default=value)
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    train, test = (
        F.normalize(torch.randn(count, options.width, generator=generator), dim=1)
        for count in (options.train, options.test)
    )
    labels = torch.randint(10, (options.train,), generator=generator)

    def classified() -> torch.Tensor:
        return knn_classes(train, labels, test, [options.k], 10)

    def searched() -> torch.Tensor:
        return torch.cat([rows for _, rows in neighbours(train, test, options.k)])

    contenders = {"ours, neighbours": searched, "ours, classes": classified}
    searched()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak of memory, of the whole process, before faiss is loaded: {peak:.2f} GB")
    try:
        import faiss
    except ImportError:
        print("faiss-cpu is not installed: ours alone")
    else:
        faiss.omp_set_num_threads(options.threads)

        def by_faiss() -> torch.Tensor:
            index = faiss.IndexFlatIP(options.width)
            index.add(train.numpy())
            return torch.from_numpy(index.search(test.numpy(), options.k)[1])

        same = (by_faiss().sort().values == searched().sort().values).double().mean().item()
        print(f"the same neighbours: {100 * same:.3f} %")
        contenders["faiss"] = by_faiss
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, call in contenders.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    for name, seconds in times.items():
        line = f"{name:<17} {statistics.median(seconds):6.2f} s"
        if name != "faiss" and "faiss" in times:
            ratio = statistics.median(f / o for f, o in zip(times["faiss"], seconds, strict=True))
            line += f", {ratio:.2f} times as fast as faiss (median of the rounds' ratios)"
        print(line)


if __name__ == "__main__":
    main()
