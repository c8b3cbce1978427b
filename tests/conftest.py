import gc
import os
import signal

import pytest
import ranks as processes
import tiny
import torch
from hypothesis import settings

settings.register_profile("zsnr", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("zsnr")
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it


# Files that take longest, from measured processor time: processes that share the files of `make
# test` begin with these, so that none is left with a long one at the end.
LONGEST = (
    *("test_ranks", "test_stops", "test_plan", "test_cli", "test_data_runs", "test_lora"),
    *("test_sdxl", "test_side_files", "test_validate", "test_single_file", "test_export"),
    *("test_samplers", "test_multistep", "test_board", "test_training", "test_compare"),
    *("test_docs", "test_timesteps", "test_doctor", "test_resuming", "test_follow"),
    "test_fuzz",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One process more than the machine has cores, since some tests wait; at most 8."""
    return min((os.cpu_count() or 1) + 1, 8)


def pytest_collection_modifyitems(items):
    def place(item):
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)

    items.sort(key=place)  # stable: within a file the order stays


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what is imported by now is no garbage: do not look at it again


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
