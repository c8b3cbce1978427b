"""Shim: `python cli.py ...` is `zsnr ...`."""

import sys

from zsnr.cli import main

if __name__ == "__main__":
    sys.exit(main())
