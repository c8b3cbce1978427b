"""Images per second that one core loads, compared with webdataset and torchvision's transforms.

    python benchmarks/data_throughput.py [--write]

All contenders run in one process on one thread, interleaved; the tables show medians. Both read
shards from disk and return float32 in [-1, 1] and the caption. The reference is the pipeline in the
packages' documentation: WebDataset(path).decode("pil") with Resize, CenterCrop, ToTensor,
Normalize. zsnr is measured with the dataset that training uses, including the conversion that
training does on the device. Images are JPEGs of quality 90, composed of parts of a photograph, so
that large and small images have the same number of bits per pixel.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import webdataset
from matplotlib.cbook import get_sample_data
from PIL import Image
from torchvision import transforms

from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import Conditioner
from zsnr.data.cache import (
    Cache,
    CacheDataset,
    find_cache,
    image_facts,
    select_cached,
    shard_files,
    write_cache,
)
from zsnr.data.captions import Captions
from zsnr.data.dataset import Pixels, ShardDataset
from zsnr.data.images import to_unit_range
from zsnr.data.index import load_index
from zsnr.data.order import StepBatches, TrainingOrder
from zsnr.data.samples import Samples, select
from zsnr.data.sources import Shard
from zsnr.data.storage import Retries, Storage
from zsnr.denoiser import Conditioning

TARGET = 512
COUNTS = {512: 64, 1024: 32, 2048: 12}
"""Number of images in the shard of each size (side in pixels)."""


def write_shard(path: Path, side: int, count: int) -> float:
    """Write square JPEGs with captions and return their bits per pixel."""
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as opened:
        photograph = opened.convert("RGB")
    size = 0
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            image = Image.new("RGB", (side, side))
            for i, x in enumerate(range(0, side, TARGET)):
                for j, y in enumerate(range(0, side, TARGET)):
                    top = (number + 37 * i + 61 * j) % (photograph.height - TARGET + 1)
                    image.paste(photograph.crop((0, top, TARGET, top + TARGET)), (x, y))
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=90)
            size += len(jpeg.getvalue())
            caption = f"photograph {number}".encode()
            for suffix, content in (("jpg", jpeg.getvalue()), ("txt", caption)):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return size * 8 / (count * side * side)


def plain(path: Path) -> Iterable[tuple[torch.Tensor, str]]:
    """Return the pipeline of webdataset and torchvision."""
    transform = transforms.Compose(
        [
            transforms.Resize(TARGET),
            transforms.CenterCrop(TARGET),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.5),
        ]
    )
    dataset: Iterable[tuple[torch.Tensor, str]] = (
        webdataset.WebDataset(str(path), shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg;png;webp", "txt")
        .map_tuple(transform, str)
    )
    return dataset


def dataset(path: Path) -> ShardDataset:
    """Return the dataset of a shard or folder, as in training."""
    return ShardDataset(select(load_index(str(path), Storage(), progress=False), TARGET))


class Floats:
    """The items of a dataset as float32 in [-1, 1], with their captions."""

    def __init__(self, items: ShardDataset) -> None:
        self._items = items

    def __iter__(self) -> Iterator[tuple[torch.Tensor, str]]:
        for i in range(len(self._items)):
            item = self._items[i]
            yield to_unit_range(item["image"][None])[0], item["caption"]


class Cached:
    """The moments of a cache as float32, with their captions."""

    def __init__(self, items: CacheDataset) -> None:
        self._items = items

    def __iter__(self) -> Iterator[tuple[torch.Tensor, str]]:
        for i in range(len(self._items)):
            item = self._items[i]
            yield item["moments"].float(), item["caption"]


def median_rates(loaders: Sequence[Iterable[object]], rounds: int, warm: int = 1) -> list[float]:
    """Return each loader's median items per second, over interleaved rounds."""
    rates: list[list[float]] = [[] for _ in loaders]
    for number in range(warm + rounds):
        for loader, samples in zip(loaders, rates, strict=True):
            start = time.perf_counter()
            count = sum(1 for _ in loader)
            if number >= warm:
                samples.append(count / (time.perf_counter() - start))
    return [statistics.median(samples) for samples in rates]


def decoding(folder: Path, rounds: int) -> str:
    """Tabulate JPEGs of several sizes, read and decoded to TARGET x TARGET."""
    lines = [
        f"| JPEG to {TARGET} px | bits / pixel | webdataset + torchvision, images/s "
        "| zsnr, images/s | zsnr / it |",
        "|---|---|---|---|---|",
    ]
    for side, count in COUNTS.items():
        path = folder / f"{side}.tar"
        bits = write_shard(path, side, count)
        loaders = [plain(path), Floats(dataset(path))]
        for (reference, caption), (tensor, text) in zip(*loaders, strict=True):
            assert reference.shape == tensor.shape == (3, TARGET, TARGET)
            assert reference.dtype == tensor.dtype == torch.float32
            assert caption == text
        plain_rate, rate = median_rates(loaders, rounds)
        lines.append(
            f"| {side} px | {bits:.1f} | {plain_rate:.1f} | {rate:.1f} | {rate / plain_rate:.2f} |"
        )
    return "\n".join(lines)


class Text(Conditioner):
    """Constant embeddings of Stable Diffusion's size."""

    context_dim = 768

    def __init__(self) -> None:
        super().__init__()

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 77, 768))

    def settings(self) -> dict[str, object]:
        return {}


def make_cache(folder: Path, shards: Path, *, text: bool) -> CacheDataset:
    """Cache shards with an autoencoder of Stable Diffusion's latent shape, but fewer channels."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    codec, conditioner = AutoencoderKLCodec(str(folder / "vae")), Text() if text else None
    index = load_index(str(shards), Storage(), progress=False)
    samples = select(index, TARGET)
    out = folder / f"cache-{text}"
    cache = Cache(
        folder=out,
        codec=codec.fingerprint(),
        conditioner=None if conditioner is None else conditioner.fingerprint(),
        captions=None if conditioner is None else {},
        images=image_facts(TARGET, None, Pixels()),
        filters=[],
        samples=samples.digest,
        dtype="float16",
        shards=shard_files(samples.shards),
    )
    write_cache(
        out,
        samples,
        codec,
        conditioner,
        index,
        cache=cache,
        pixels=Pixels(),
        captions=Captions(),
        retries=Retries(),
        progress=False,
    )
    loaded = find_cache(str(out))
    assert loaded is not None
    return CacheDataset(select_cached(loaded, load_index(str(out), Storage()), ()))


def caching(folder: Path, rounds: int) -> str:
    """Compare moments (and text embeddings) from a cache with images of the same size."""
    path = folder / "images.tar"
    write_shard(path, TARGET, COUNTS[TARGET])
    caches = [make_cache(folder, path, text=text) for text in (False, True)]
    loaders = [Floats(dataset(path)), *(Cached(cache) for cache in caches)]
    rates = median_rates(loaders, rounds)
    names = ["JPEG, decoded", "moments 8x64x64", "moments and text 77x768"]
    lines = [f"| {TARGET} px | samples/s | / decoding |", "|---|---|---|"]
    for name, rate in zip(names, rates, strict=True):
        lines.append(f"| {name} | {rate:.0f} | {rate / rates[0]:.1f} |")
    return "\n".join(lines)


def many_samples(count: int, num_shards: int, num_buckets: int) -> Samples:
    """Make the samples of a large dataset, without its shards."""
    draw = np.random.default_rng(0)
    return Samples(
        shards=[Shard(f"{i:05d}.tar") for i in range(num_shards)],
        sizes=[0] * num_shards,
        shapes=[(TARGET, 64 * (i + 1)) for i in range(num_buckets)],
        rows=np.arange(0),
        shard=np.sort(draw.integers(0, num_shards, count)).astype(np.int32),
        bucket=draw.integers(0, num_buckets, count).astype(np.int16),
        size=np.zeros((0, 2)),
        spans=np.zeros((0, 3, 2)),
        keys=None,
        removed={},
        total=count,
        faults=[],
        digest="0" * 32,
    )


def seeking(folder: Path, rounds: int) -> str:
    """Tabulate the time that a resumed run needs to find its position."""
    count, shards, buckets, size = 10_000_000, 1000, 9, 2048
    samples = many_samples(count, shards, buckets)
    start = time.perf_counter()
    TrainingOrder(samples, size, 0)
    seconds = time.perf_counter() - start
    path = folder / "images.tar"
    write_shard(path, TARGET, COUNTS[TARGET])
    real = dataset(path)
    lines = [
        "| samples seen | rows of the next batch of 2048, ms | first batch of 8 images, ms |",
        "|---|---|---|",
    ]
    for num_seen in (0, 1000, 1_000_000, 1_000_000_000):
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            order = TrainingOrder(samples, size, 0)
            start = time.perf_counter()
            order.batch(num_seen // size)
            times[0].append(time.perf_counter() - start)
            start = time.perf_counter()
            small = TrainingOrder(real.samples, 8, 0)
            batch = next(iter(StepBatches(8, first_step=num_seen // 8)))
            ShardDataset(real.samples, small).__getitems__(batch)
            times[1].append(time.perf_counter() - start)
        rows, first = (1000 * statistics.median(part) for part in times)
        lines.append(f"| {num_seen:,} | {rows:.0f} | {first:.0f} |")
    lines += [
        "",
        f"Rows: {count:,} samples in {shards} shards and {buckets} buckets; making the order, once "
        f"per process, takes {seconds:.1f} s.",
    ]
    return "\n".join(lines)


def memory(folder: Path, rounds: int) -> str:
    """Tabulate the resident memory of a process that loads continuously."""
    write_shard(folder / "0.tar", TARGET, COUNTS[TARGET])
    for number in range(1, 20):
        (folder / f"{number}.tar").write_bytes((folder / "0.tar").read_bytes())
    cached = make_cache(folder / "made", folder, text=False)
    images = dataset(folder)
    kinds: dict[str, tuple[ShardDataset, int]] = {
        "images": (ShardDataset(images.samples, TrainingOrder(images.samples, 8, 0)), 400),
        "cache": (CacheDataset(cached.samples, TrainingOrder(cached.samples, 8, 0)), 4000),
    }
    lines = ["| loading | samples | resident memory, MiB |", "|---|---|---|"]
    for name, (items, step) in kinds.items():
        for part in range(6):
            for position in range(part * step, (part + 1) * step):
                items[position]
            lines.append(f"| {name} | {(part + 1) * step} | {resident():.0f} |")
    return "\n".join(lines)


def resident() -> float:
    """Return this process's resident memory, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


SECTIONS = {"Memory": memory, "Decoding": decoding, "Cache": caching, "Seeking": seeking}
"""Measurements by title: each takes a folder for its files and the rounds, and returns a table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds per table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables = []
    for title, section in SECTIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            tables.append(f"## {title}\n\n{section(Path(folder), arguments.rounds)}\n")
        print(tables[-1])
    if arguments.write:
        out = Path(__file__).parent / "results" / "data_throughput.md"
        names = ("torch", "pillow", "webdataset", "torchvision")
        versions = ", ".join(f"{name} {version(name)}" for name in names)
        out.write_text(
            f"# Loading data on one core\n\n{date.today()}, {versions}, Python "
            f"{platform.python_version()}, {platform.machine()}, 1 thread; medians of "
            f"{arguments.rounds} interleaved rounds.\n"
            "Made by `python benchmarks/data_throughput.py --write`.\n\n" + "\n".join(tables)
        )


if __name__ == "__main__":
    main()
