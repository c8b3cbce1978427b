"""Object storage and other file systems that have addresses, by fsspec."""

from __future__ import annotations

from typing import Any

from zsnr.public import public_url

PACKAGES = {  # Python packages of fsspec's protocols
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}


def filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it.

    Args:
        url: The address.
        options: Of the file system.

    Raises:
        ValueError: The protocol is unknown, or needs a package that is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        found: tuple[Any, str] = url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(url.partition("://")[0])
        raise ValueError(
            f"{public_url(url)}: {error}" + f": `pip install {package}`." * bool(package)
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{public_url(url)}: {error}. Wanted a path, http(s)://, pipe:COMMAND or a protocol of "
            f"fsspec, such as {', '.join(f'{name}://' for name in PACKAGES)}."
        ) from error
    return found
