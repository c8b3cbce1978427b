"""Memory of one rank for the index of a large dataset, by number of samples.

    python benchmarks/index_memory.py [--samples 1000000 5000000] [--write]

Index files of shards of 10,000 samples are synthetic; the shards themselves are sparse files of the
right size. Each measurement has a separate process. "Own memory" is the private memory of the
process (RssAnon), minus that after its imports; pages of the mapped file belong to the page cache,
which holds them once per node and can reclaim them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from zsnr.data.buckets import AspectBuckets
from zsnr.data.faults import Fault
from zsnr.data.filters import Filter
from zsnr.data.index import load_index
from zsnr.data.index_file import write_index
from zsnr.data.order import TrainingOrder
from zsnr.data.samples import select
from zsnr.data.scan import ShardIndex
from zsnr.data.sources import Source
from zsnr.data.storage import Storage

RESULT = Path(__file__).parent / "results" / "index_memory.md"
PER_SHARD = 10_000
BATCH, STEPS = 1024, 300
TARGET = 100_000_000


def write_data(folder: Path, samples: int) -> None:
    """Write index files of this number of samples, beside sparse shards."""
    draw = np.random.default_rng(0)
    for number in range(samples // PER_SHARD):
        sizes = draw.integers(20_000, 200_000, PER_SHARD)
        starts = np.concatenate([[0], (sizes + 2560).cumsum()])
        shard = folder / f"{number:05d}.tar"
        with shard.open("wb") as file:
            os.truncate(file.fileno(), int(starts[-1]))
        texts, records = (draw.integers(20, 200, PER_SHARD) for _ in range(2))
        table = pa.table(
            {
                "key": [f"{number:05d}{i:04d}" for i in range(PER_SHARD)],
                "height": draw.integers(256, 2048, PER_SHARD).astype(np.int32),
                "width": draw.integers(256, 2048, PER_SHARD).astype(np.int32),
                "image_offset": starts[:-1] + 512,
                "image_size": sizes,
                "text_offset": starts[1:] - 1536,
                "text_size": texts,
                "json_offset": starts[1:] - 512,
                "json_size": records,
                "json.aesthetic": draw.random(PER_SHARD) * 10,
                "json.similarity": draw.random(PER_SHARD),
            }
        )
        status = shard.stat()
        faults = [Fault("sample", str(shard), f"{number}-{i}", "0 bytes") for i in range(10)]
        index = ShardIndex(table, faults, status.st_size, status.st_mtime_ns, f"{number:032d}")
        write_index(index, Path(f"{shard}.index"))


SETTINGS = {
    "squares": ({}, 1.0, 1.0),
    "buckets, a filter, weights 0.7 and 2": (
        {"aspect": AspectBuckets(), "filters": [Filter("aesthetic", min=1)]},
        0.7,
        2.0,
    ),
}


def own_memory() -> int:
    """Return the private memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def measure(folder: Path, name: str) -> dict[str, float]:
    """Load, select and iterate over some steps, as a rank does."""
    options, first, second = SETTINGS[name]
    half = len(list(folder.glob("*.tar"))) // 2
    paths = sorted(map(str, folder.glob("*.tar")))
    sources = [Source(paths[:half], first), Source(paths[half:], second)]
    fields = [f.field for f in options.get("filters", [])]
    base, peak, finished = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not finished.wait(0.01):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    index = load_index(sources, Storage(), fields=fields, progress=False)
    indexed = time.process_time()
    samples = select(index, 512, folder=folder / "run", **options)
    del index
    order = TrainingOrder(samples, BATCH, 0)
    order.prepare()
    ready = time.process_time()
    for step in range(STEPS):
        for row in order.batch(step * 37)[1][::64]:
            _ = samples[row]
    steady = own_memory() - base
    finished.set()
    watcher.join()
    return {
        "samples": samples.total,
        "steady": steady,
        "peak": max(peak[0], own_memory()) - base,
        "footers": indexed - start,
        "ready": ready - start,
    }


def in_process(folder: Path, name: str) -> dict[str, float]:
    """Measure in a new process."""
    command = [sys.executable, __file__, "--measure", str(folder), name]
    result: dict[str, float] = json.loads(subprocess.check_output(command))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 3_000_000])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT}")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return
    lines = [
        "# Memory of the index",
        "",
        f"{date.today()}, pyarrow {version('pyarrow')}, numpy {version('numpy')}, torch "
        f"{version('torch')}, Python {platform.python_version()}, {os.cpu_count()} CPUs. Shards of "
        f"{PER_SHARD:,} samples. Own memory of a process in MB, without that of its imports; "
        "CPU seconds until the index is read, and until the first batch. "
        "The first process of a node writes the file; each further rank maps it.",
        f"Made by `python benchmarks/index_memory.py --samples {' '.join(map(str, args.samples))} "
        "--write`.",
        "",
        "| settings | samples | process | peak | steady | index read, CPU s | ready, CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    slopes: dict[tuple[str, str], list[dict[str, float]]] = {}
    for samples in args.samples:
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), samples)
            for name in SETTINGS:
                for process in ("first", "further"):
                    result = in_process(Path(folder), name)
                    slopes.setdefault((name, process), []).append(result)
                    lines.append(
                        f"| {name} | {samples:,} | {process} | {result['peak'] / 1e6:.1f} | "
                        f"{result['steady'] / 1e6:.1f} | {result['footers']:.1f} | "
                        f"{result['ready']:.1f} |"
                    )
                    print(lines[-1], file=sys.stderr)
    if len(args.samples) > 1:
        lines += ["", f"Growth from the smallest to the largest, extrapolated to {TARGET:,}:"]
        lines += ["", "| settings | process | bytes per sample, peak | steady | peak | steady |"]
        lines += ["|---|---|---|---|---|---|"]
        for (name, process), found_all in slopes.items():
            low, high = found_all[0], found_all[-1]
            span = high["samples"] - low["samples"]
            cells = []
            for kind in ("peak", "steady"):
                slope = (high[kind] - low[kind]) / span
                total = low[kind] + slope * (TARGET - low["samples"])
                cells.append((f"{slope:.2f}", f"{total / 1e6:.0f} MB"))
            (peak, peak_all), (steady, steady_all) = cells
            lines.append(f"| {name} | {process} | {peak} | {steady} | {peak_all} | {steady_all} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
