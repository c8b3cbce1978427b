"""The commands of `zsnr`, one file each: a typed function whose docstring is its help."""
