"""The commands of `zsnr`, one file each: a typed function whose docstring is its `--help`.

The functions are the Python API of the command line too: `from zsnr.commands.doctor import doctor`.
What stands before `*` in a signature is a positional argument, what stands after it is an option.
Heavy imports are inside the functions.
"""
