"""Passwords, tokens and signatures stay out of what a run writes."""

import cells
import pytest
import tiny
import yaml
from faulty_server import FaultyServer

from zsnr.cli import main
from zsnr.data.faults import Fault, Ledger, summarize
from zsnr.data.sources import Shard
from zsnr.public import left_out, public, public_text

SECRET = "S3CR3T"


@pytest.mark.parametrize(
    ("value", "shown", "marked"),
    [
        ("https://u:S3CR3T@h/{0..9}.tar", "https://h/{0..9}.tar", "https://***@h/{0..9}.tar"),
        ("https://S3CR3T@h:80/a.tar", "https://h:80/a.tar", "https://***@h:80/a.tar"),
        ("https://h/a.tar?X-Sig=S3CR3T&b=1#S3CR3T", "https://h/a.tar", "https://h/a.tar?***"),
        ("https://h/a?S3CR3T", "https://h/a", "https://h/a?***"),
        ("https://h/a b.tar?t=S3CR3T x", "https://h/a b.tar", "https://h/a b.tar?***"),
        ("s3://key:S3CR3T@bucket/a.tar", "s3://bucket/a.tar", "s3://***@bucket/a.tar"),
        ("s3://bucket/a-??.tar", "s3://bucket/a-??.tar", "s3://bucket/a-??.tar"),
        ("abfs://box@host/a.tar", "abfs://box@host/a.tar", "abfs://box@host/a.tar"),
        ("file:///a/b-??.tar", "file:///a/b-??.tar", "file:///a/b-??.tar"),
        ("a/b?c.tar", "a/b?c.tar", "a/b?c.tar"),
        ("pipe:curl -H 'Authorization: S3CR3T' h", "pipe:...", "pipe:***"),
        (
            "https://u:S3CR3T@h/a.tar::https://u:S3CR3T@h/b.tar",
            "https://h/a.tar::https://h/b.tar",
            "https://***@h/a.tar::https://***@h/b.tar",
        ),
        ({"api_key": "S3CR3T", "tokenizer": "a"}, None, {"api_key": "***", "tokenizer": "a"}),
        ({"headers": {"X": "S3CR3T"}, "max_tokens": 3}, None, None),
        ({"hub_token": None, "Authorization": "S3CR3T"}, None, None),
        (("a", ["https://h/?S3CR3T"], 1.5, None), ["a", ["https://h/"], 1.5, None], None),
    ],
)
def test_settings_without_secrets(value, shown, marked):
    assert SECRET not in str(public(value))
    assert SECRET not in str(public(value, "***"))
    assert shown is None or public(value) == shown
    assert marked is None or public(value, "***") == marked
    assert left_out(public(value)) == []


def test_names_of_what_was_left_out():
    config = {"data": {"train": [{"path": "https://u:p@h/a"}, "pipe:x"], "val": "a"}, "n": 1}
    assert left_out(public(config, "***")) == ["data.train.path", "data.train"]
    assert left_out(public({"token": "x", "url": "https://h/a?b=c"}, "***")) == ["token", "url"]
    assert left_out({"prompts": ["a ***star*** at night", "***?"]}) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:S3CR3T@h/a.tar?k=S3CR3T: 403 it", "https://h/a.tar: 403 it"),
        ("('https://h/a?S3CR3T')", "('https://h/a')"),
        ("pipe:aws --token S3CR3T s3 cp", "pipe:aws --token *** s3 cp"),
        ("curl --api-key=S3CR3T x", "curl --api-key=*** x"),
        ("-H 'Authorization: Bearer S3CR3T' x", "-H 'Authorization: ***"),
        ("77 tokens, a token of text", "77 tokens, a token of text"),
        ("see https://h/page.", "see https://h/page."),
    ],
)
def test_text_without_secrets(text, shown):
    assert public_text(text) == shown


def test_faults_are_told_without_secrets_and_known_again(tmp_path):
    fault = Fault("sample", "https://u:S3CR3T@h/a.tar?t=S3CR3T", "k", "https://h/?S3CR3T: no", 1)
    again = Fault("sample", "https://u:other@h/a.tar?t=other", "k", "no", 2)
    assert SECRET not in summarize([fault])
    Ledger(tmp_path / "ledger").write([fault])
    assert SECRET not in (tmp_path / "ledger").read_text()
    ledger = Ledger(tmp_path / "ledger", position=2)
    ledger.write([again])
    assert len((tmp_path / "ledger").read_text().splitlines()) == 1


def test_a_shard_that_is_signed_anew_has_the_same_name():
    assert Shard("https://h/a/0.tar?sig=x/y").name == Shard("https://h/b/0.tar?sig=z").name
    assert Shard("a/0?.tar").name == "0?.tar"


def test_a_run_writes_no_secret_and_its_config_says_what_to_give_again(tmp_path, capfd):
    tiny.write_shards(tmp_path / "shards", [8])
    run = tmp_path / "run"
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "enable_progress_bar": False,
            "default_root_dir": str(run),
            "callbacks": [{"class_path": "test_public.Careless", "init_args": {"token": SECRET}}],
        },
        "model": tiny.MODEL,
        "data": {"image_size": 16, "batch_size": 4, "num_workers": 0, "index": str(run / "index")},
    }
    with FaultyServer(tmp_path / "shards") as server:
        address = server.url("train-000000.tar").replace("http://", f"http://me:{SECRET}@")
        settings["data"]["train"] = f"{address}?signature={SECRET}"
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        assert main(["fit", "-c", str(tmp_path / "config.yaml")]) == 0
        told = capfd.readouterr()
        assert SECRET not in told.out + told.err
        for path in run.rglob("*"):
            assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
        [saved] = run.rglob("run_config.yaml")
        assert main(["fit", "-c", str(saved), "--ckpt_path", "last"]) == 2
        told = capfd.readouterr().err
        assert "data.train" in told
        assert "Give the whole setting again" in told
        again = ["--data.train", settings["data"]["train"], "--trainer.callbacks", "null"]
        assert main(["fit", "-c", str(saved), *again, "--ckpt_path", "last"]) == 0


class Careless(cells.Callback):
    """A callback that is given a secret."""

    def __init__(self, token: str):
        self.given = token
