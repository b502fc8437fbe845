"""Time of the exact nearest neighbours of evals/knn.py, beside faiss-cpu's exact search (IndexFlatIP).

    python tools/bench_knn.py [--test 10000] [--train 50000] [--width 384] [--k 20] [--rounds 5] [--threads 2]

Both take turns on the same unit vectors; medians, their ratio, and this process's peak of memory are printed. On a
machine that does other work besides, the processor's time with `--threads 1` says more than the clock's. Without faiss
(pip install faiss-cpu) our own alone is measured.
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
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, call in contenders.items():
            began, busy = time.perf_counter(), time.process_time()
            call()
            times[name].append(time.perf_counter() - began)
            spent[name].append(time.process_time() - busy)
    for name, seconds in times.items():
        line = (
            f"{name:<17} {statistics.median(seconds):6.2f} s, {statistics.median(spent[name]):6.2f} s of the processor"
        )
        if name != "faiss" and "faiss" in times:
            clock, processor = (
                statistics.median(f / o for f, o in zip(kind["faiss"], kind[name], strict=True))
                for kind in (times, spent)
            )
            line += f"; {clock:.2f} and {processor:.2f} times as fast as faiss (medians of the rounds' ratios)"
        print(line)


if __name__ == "__main__":
    main()
