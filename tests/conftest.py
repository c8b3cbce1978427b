import pytest
import ranks as processes
import tiny
import torch
from hypothesis import settings

settings.register_profile("zsnr", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("zsnr")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks():
    """Groups of 1, 2 and 4 processes, made when they are first wanted."""
    with processes.groups() as made:
        yield made


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of train-*.tar and val-*.tar."""
    folder = tmp_path_factory.mktemp("shards")
    tiny.write_shards(folder, [7, 6])
    return tiny.write_shards(folder, [5], "val")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights of FID's Inception network."""
    return tiny.write_inception(tmp_path_factory.mktemp("inception") / "weights.pth")
