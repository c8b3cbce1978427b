import torch
from hypothesis import settings

settings.register_profile("zsnr", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("zsnr")
torch.set_num_threads(1)
