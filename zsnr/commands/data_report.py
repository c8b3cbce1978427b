"""`zsnr data report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from zsnr.commands.options import default_device, find_codec, path_or_none
from zsnr.commands.result import Result


def data_report(
    source: Sequence[str],
    *,
    output: str | Path,
    image_size: int | None = None,
    samples: int = 2000,
    filter: Sequence[str] = (),
    missing: Literal["error", "keep", "drop"] = "error",
    aspect: bool = False,
    codec: str | None = None,
    codec_subfolder: str | None = None,
    device: str | None = None,
    index: str | Path | None = None,
    tokenizer: str = "clip",
    max_tokens: int | None = None,
) -> Result:
    """Describe a dataset: sizes, captions, brightness, schedule.

    A report with images is written into a new folder: sizes, aspect ratios, caption lengths, what
    filters keep, brightness, and how much of its range the original schedule would retain. Captions
    that the text encoder would cut are counted.

    Args:
        source: A folder of shards or images, a pattern such as 'https://host/{000..099}.tar', ...
        output: New folder for the report.
        image_size: Height and width of the images in training, in pixels. Default: 512.
        samples: Number of images to look at, evenly from the whole dataset.
        filter: Such as 'aesthetic>=5', 'pwatermark<=0.8' or 'LANGUAGE in en,de'. May be repeated.
        missing: What filters do with samples that lack the field.
        aspect: Count aspect-ratio buckets.
        codec: Measure the latents of this codec too: a folder, hub id, asset:openmoji_vae, or
            pixels.
        codec_subfolder: Folder of the codec inside --codec, such as vae.
        device: Device to encode on. Default: the GPU if there is one.
        index: The folder that `zsnr data index --output` wrote.
        tokenizer: Tokenizer that counts the captions' tokens: clip, or a folder or hub id.
        max_tokens: Number of tokens that the text encoder reads. Default: those of one chunk, which
            are 75 for CLIP.
    """
    from zsnr.data.buckets import AspectBuckets
    from zsnr.data.filters import parse_filter
    from zsnr.reports.data import IMAGE_SIZE, report_text, write_data_report

    measured = find_codec(codec, codec_subfolder)
    if measured is not None:
        measured.latent_shape(*(image_size or IMAGE_SIZE,) * 2)
    page, facts = write_data_report(
        list(source),
        Path(output).expanduser(),
        image_size=image_size,
        most=samples,
        filters=[parse_filter(text, missing) for text in filter],
        aspect=AspectBuckets() if aspect else None,
        codec=measured,
        device=default_device(device),
        index_folder=path_or_none(index),
        tokenizer=tokenizer,
        max_tokens=max_tokens,
    )
    return Result(facts, report_text(facts, page))
