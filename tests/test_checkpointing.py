"""Checkpoints that are written while training goes on."""

import errno
import os
import threading
from pathlib import Path
from unittest import mock

import cells
import fsspec
import pytest
import tiny
import torch
import torch.distributed.checkpoint.state_dict_loader as state_dict_loader
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch.callbacks import Callback
from torch.distributed.checkpoint import FileSystemWriter

from zsnr.checkpoints import read_checkpoint, sharded
from zsnr.checkpoints.remote import Mirror
from zsnr.checkpoints.run_facts import read_run_facts
from zsnr.checkpoints.run_folder import find_last, resolve_model
from zsnr.cli import main
from zsnr.pipeline import TextToImage
from zsnr.training import Checkpoints
from zsnr.training.checkpoint_files import on_host

STEPS = 4


def fit(shards, root, *callbacks, asynchronous=True, **options):
    quiet = {"limit_val_batches": 0}
    options = {"every": 1, "trainer_options": quiet, "keep": 9, "steps": STEPS, **options}
    return cells.fit(shards, root, callbacks=callbacks, asynchronous=asynchronous, **options)


def written(root):
    return sorted((root / "checkpoints").glob("step-*.ckpt"))


def test_they_hold_what_a_waiting_run_writes(shards, tmp_path):
    for name, asynchronous in (("waits", False), ("goes on", True)):
        fit(shards, tmp_path / name, asynchronous=asynchronous)
    pairs = zip(written(tmp_path / "waits"), written(tmp_path / "goes on"), strict=True)
    count = 0
    for one, other in pairs:
        mine, theirs = (torch.load(path, weights_only=False) for path in (one, other))
        assert mine.keys() == theirs.keys()
        for part in ("state_dict", "progress", "loops", "lr_schedulers"):
            torch.testing.assert_close(mine[part], theirs[part], rtol=0, atol=0)
        optimizers = (mine["optimizer_states"], theirs["optimizer_states"])
        torch.testing.assert_close(*optimizers, rtol=0, atol=0)
        count += 1
    assert count == STEPS
    folder = tmp_path / "goes on" / "checkpoints"
    assert (folder / "last.ckpt").resolve().name == f"step-{STEPS:08d}.ckpt"
    assert read_run_facts(folder) is not None


class Slow(Callback):
    """Lets the first checkpoint be written only when the step after it has begun."""

    def __init__(self, monkeypatch):
        self.begun, self.waited = threading.Event(), []
        save = sharded.save_file

        def later(checkpoint, path):
            self.waited.append(self.begun.wait(60))
            save(checkpoint, path)

        monkeypatch.setattr(sharded, "save_file", later)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 2:
            self.begun.set()


def test_training_goes_on_while_one_is_written(shards, tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    fit(shards, tmp_path, slow, every=2)
    assert slow.waited == [True, True]
    assert [path.name for path in written(tmp_path)] == ["step-00000002.ckpt", "step-00000004.ckpt"]


@pytest.mark.parametrize("every", [1, 3])
def test_what_cannot_be_written_stops_the_run_at_the_next_one(shards, tmp_path, monkeypatch, every):
    def full(checkpoint, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sharded, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        fit(shards, tmp_path, every=every)
    assert written(tmp_path) == []


def test_ranks_wait_for_each_other(ranks, shards, tmp_path):
    for kind in ("ddp", "full"):
        ranks[2](fit, shards, tmp_path / kind, kind=kind, every=2)
        names = [path.name for path in written(tmp_path / kind)]
        assert names == ["step-00000002.ckpt", "step-00000004.ckpt"]


def test_shards_hold_what_a_waiting_run_writes(ranks, shards, tmp_path):
    for name, asynchronous in (("waits", False), ("goes on", True)):
        options = {"kind": "sharded", "asynchronous": asynchronous, "steps": 2}
        ranks[2](fit, shards, tmp_path / name, **options)
    assert len(written(tmp_path / "waits")) == 2
    pairs = zip(written(tmp_path / "waits"), written(tmp_path / "goes on"), strict=True)
    for one, other in pairs:
        mine, theirs = map(sharded.consolidate, (one, other))
        assert mine.keys() == theirs.keys()
        for part in ("state_dict", "optimizer_states", "progress", "loops", "lr_schedulers"):
            torch.testing.assert_close(mine[part], theirs[part], rtol=0, atol=0)


def fit_slowly(shards, root, rank_1="writes"):
    """Train, on each rank, and write the shards of step 2 only in step 3.

    Returns:
        Whether each write has seen that; and the step and the error where the run stopped.
    """
    begun, seen, write = threading.Event(), [], FileSystemWriter.write_data

    class Steps(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 2:
                begun.set()

        def on_train_batch_end(self, trainer, *_):
            self.done = trainer.global_step

    def later(writer, plan, planner):
        seen.append(begun.wait(60))
        if rank_1 != "writes" and torch.distributed.get_rank() == 1:
            if rank_1 == "fails":
                raise OSError(errno.ENOSPC, "No space left on device")
            if len(seen) == 2:
                os._exit(1)
        return write(writer, plan, planner)

    steps, error = Steps(), None
    with mock.patch.object(FileSystemWriter, "write_data", later):
        try:
            fit(shards, root, steps, kind="sharded", every=2)
        except OSError as failure:
            error = str(failure)
    return seen, steps.done, error


def test_training_goes_on_while_shards_are_written(ranks, shards, tmp_path):
    results = ranks[2](fit_slowly, shards, tmp_path)
    assert results == [([True, True], 4, None)] * 2
    assert [path.name for path in written(tmp_path)] == ["step-00000002.ckpt", "step-00000004.ckpt"]


def test_shards_that_one_rank_cannot_write_stop_all_at_the_next_checkpoint(ranks, shards, tmp_path):
    for seen, step, error in ranks[2](fit_slowly, shards, tmp_path, "fails"):
        assert (seen, step) == ([True], 3)
        assert "step-00000002.ckpt could not be written: " in error
        assert "No space left" in error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["run.json"]


def test_a_kill_while_shards_are_written_leaves_the_checkpoint_before(ranks, shards, tmp_path):
    with pytest.raises(AssertionError, match="rank 1 died"):
        ranks[2](fit_slowly, shards, tmp_path, "dies")
    assert find_last(tmp_path).name == "step-00000002.ckpt"
    assert len(written(tmp_path)) == 1


def test_a_copy_keeps_structure_and_what_is_shared():
    tensor = torch.ones(2)
    state = torch.nn.Linear(2, 2).state_dict()
    value = {"a": [tensor, (tensor, 1)], "state": state, "b": {"c": {1, 2}}}
    copied = on_host(value)
    tensor.zero_()
    value["b"]["c"].clear()
    assert copied["a"][0] is copied["a"][1][0]
    assert copied["a"][0].tolist() == [1, 1]
    assert copied["b"] == {"c": {1, 2}}
    assert copied["state"]._metadata == state._metadata


def test_reading_fills_no_unet_with_random_numbers_first(shards, tmp_path, monkeypatch):
    run = fit(shards, tmp_path, asynchronous=False, every=STEPS)
    [path] = written(tmp_path)
    filled = []

    def noted(fill):
        def call(tensor, *args, **kwargs):
            if not tensor.is_meta:
                filled.append(tuple(tensor.shape))
            return fill(tensor, *args, **kwargs)

        return call

    for name in ("kaiming_uniform_", "uniform_", "normal_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, noted(getattr(torch.nn.init, name)))
    conditioner = tiny.conditioner(trainable=True)  # it is built anew, with its random weights
    expected, filled[:] = list(filled), []
    model = read_checkpoint(path, ema=False)
    assert filled == expected
    state = model.network.state_dict()
    for name, weight in state.items():
        assert torch.equal(weight, run["weights"][f"unet.{name}"])
    path.write_bytes(b"")  # the weights are no view of the file
    assert all(weight.isfinite().all() for weight in state.values())
    assert type(model.conditioner) is type(conditioner)


class Interrupt(Callback):
    def on_train_start(self, trainer, module):
        raise InterruptedError


def test_no_command_reads_a_checkpoint_whole(ranks, shards, tmp_path, monkeypatch):
    """Weights are memory-mapped, and the optimizer's state is read by training alone."""
    fit(shards, tmp_path / "file", asynchronous=False, steps=1)
    ranks[2](fit, shards, tmp_path / "folder", kind="sharded", asynchronous=False, steps=1)
    load, fill = torch.load, state_dict_loader.load
    read = []  # what the optimizer's state is taken from: files, and names in folders

    class Noted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function.__name__ in ("clone", "to", "cpu", "copy_", "__deepcopy__"):
                read.append("a file")
            return super().__torch_function__(function, types, args, kwargs or {})

    def noted(source, *args, **kwargs):
        loaded = load(source, *args, **kwargs)
        if isinstance(source, Path) and source.suffix == ".ckpt":
            assert kwargs["mmap"]
            for state in loaded["optimizer_states"][0]["state"].values():
                state.update({name: value.as_subclass(Noted) for name, value in state.items()})
        return loaded

    def filled(tensors, *args, **kwargs):
        read.extend(name for name in tensors if name.startswith("optimizer_states"))
        fill(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "load", noted)
    monkeypatch.setattr(state_dict_loader, "load", filled)
    for kind in ("file", "folder"):
        [path] = written(tmp_path / kind)
        cells.evaluate(shards, tmp_path, "one", str(path))
        images = str(tmp_path / f"{kind}-images")
        cells.predict(shards, tmp_path, "one", str(path), images, [{"prompt": "grey"}])
        read_checkpoint(path)
        assert main(["doctor", str(path)]) == 0
        assert read == []
        root = tmp_path / f"{kind}-resumed"
        with pytest.raises(InterruptedError):
            fit(shards, root, Interrupt(), steps=2, checkpoint=str(path))
        assert read
        read.clear()


def test_a_resumed_optimizer_does_not_depend_on_its_file(shards, tmp_path):
    fit(shards, tmp_path, asynchronous=False, every=STEPS)
    [path] = written(tmp_path)

    class Damage(Callback):
        def on_train_start(self, trainer, module):
            path.write_bytes(b"")

    run = fit(shards, tmp_path, Damage(), steps=STEPS + 1, checkpoint=str(path))
    assert all(weight.isfinite().all() for weight in run["weights"].values())


# Object storage


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An address whose files this process keeps in its memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    yield "memory://bucket/run"
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


@pytest.fixture
def at_once(monkeypatch):
    """Let a run wait for each copy, so that none is left out."""
    copy = Mirror.copy

    def wait(mirror, *args):
        copy(mirror, *args)
        mirror.wait()

    monkeypatch.setattr(Mirror, "copy", wait)


def held(bucket):
    files, path = fsspec.url_to_fs(bucket)
    return sorted(name.rpartition("/")[2] for name in files.ls(path, detail=False))


def names(*steps):
    return [f"step-{step:08d}.ckpt" for step in steps]


def test_checkpoints_are_copied_and_removed_in_object_storage(shards, tmp_path, bucket, at_once):
    run = fit(shards, tmp_path / "run", mirror=bucket, keep=2, asynchronous=False)
    assert held(bucket) == names(3, 4)
    for address in (bucket, f"{bucket}/last.ckpt", f"{bucket}/step-00000004.ckpt"):
        path = Path(resolve_model(address))
        assert path.read_bytes() == written(tmp_path / "run")[-1].read_bytes()
        assert main(["doctor", address, "--open"]) == 0
    assert len(list((tmp_path / "cache").rglob("step-*.ckpt"))) == 1
    unet = TextToImage.from_pretrained(bucket, device="cpu").model.network
    assert torch.equal(unet.unet.conv_in.weight, run["ema"]["unet.unet.conv_in.weight"])
    # a run that resumes from there on another machine, at an earlier step
    checkpoint = f"{bucket}/step-00000003.ckpt"
    on = fit(shards, tmp_path / "on", mirror=bucket, checkpoint=checkpoint, steps=5, every=2)
    assert len(on["logged"]) == 2
    assert held(bucket) == names(3, 4, 5)
    again = fit(shards, tmp_path / "again", mirror=bucket, checkpoint=checkpoint, every=9)
    assert held(bucket) == [
        "step-00000003.ckpt",
        "step-00000004.ckpt",
        "step-00000005.ckpt.abandoned",
    ]
    for name, weight in run["weights"].items():
        assert torch.equal(again["weights"][name], weight)


def test_a_new_run_does_not_mix_with_the_copies_of_another(shards, tmp_path, bucket, capsys):
    fsspec.filesystem("memory").pipe("/bucket/run/step-00000004.ckpt", b"a checkpoint")
    values = {
        "trainer": {"accelerator": "cpu", "max_steps": 1, "default_root_dir": str(tmp_path)},
        "model": tiny.MODEL,
        "data": {"train": f"{shards}/train-*.tar", "image_size": 16, "batch_size": 4},
        "checkpoint": {"mirror": bucket},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["fit", "-c", str(tmp_path / "config.yaml")]) == 2
    assert f"mirror={bucket} holds checkpoints of an earlier run" in capsys.readouterr().err


def test_storage_that_fails_warns_once_and_ends_no_run(shards, tmp_path, bucket, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    told = []
    monkeypatch.setattr("zsnr.files.warnings.warn", lambda text, **_: told.append(text))
    monkeypatch.setattr(MemoryFileSystem, "_open", full)
    run = fit(shards, tmp_path, mirror=bucket)
    assert len(run["logged"]) == len(written(tmp_path)) == STEPS
    [line] = [text for text in told if bucket in text]
    assert "the run continues without it: [Errno 28] No space left" in line
    with pytest.raises(ValueError, match="is not a checkpoint, and holds none"):
        resolve_model(bucket)


def test_shards_are_copied_and_an_incomplete_copy_is_left_out(ranks, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = f"file://{tmp_path}/bucket"
    ranks[2](fit, shards, tmp_path / "run", kind="sharded", steps=1, mirror=address)
    [original] = written(tmp_path / "run")
    incomplete = tmp_path / "bucket" / "step-00000009.ckpt"
    incomplete.mkdir()
    (incomplete / "__0_0.distcp").write_bytes(b"cut")
    copied = Path(resolve_model(address))
    assert copied.name == original.name
    wanted, got = (sharded.consolidate(path)["state_dict"] for path in (original, copied))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_addresses_that_are_wrong_are_refused():
    with pytest.raises(ValueError, match="Set checkpoint.mirror to the address"):
        Checkpoints("s3://bucket/run")
    for address, reason in (
        ("runs/mine", "wanted an address such as s3://bucket/run"),
        ("nothing://bucket", "Protocol not known: nothing"),
    ):
        with pytest.raises(ValueError, match=reason):
            Checkpoints(mirror=address)
    with pytest.raises(ValueError, match="is not a checkpoint, and holds none"):
        resolve_model("memory://nothing/here")
