"""What the server that forks ranks and commands imports, late imports of training included."""

import importlib
import os

import cells
import PIL.Image

for name in ("lightning.pytorch.cli", "PIL.ImageCms", "torch.distributed.tensor", "webdataset"):
    importlib.import_module(name)
importlib.import_module("zsnr.training.lightning_cli")
PIL.Image.init()
cells.module()  # diffusers, transformers and open_clip import while they build
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is not to be forked"
