"""FID, KID, IS, CLIP score and brightness against independent computations."""

import json
import math
import pickle
from functools import partial

import cells
import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from PIL import Image
from torch import nn

from zsnr.data.caption_files import read_captions
from zsnr.metrics import fidelity
from zsnr.metrics.clip import CLIPScore
from zsnr.metrics.collected import (
    LatentMean,
    LumaPercentile,
    LumaSpread,
    LumaWasserstein,
    MeanLuma,
    PromptGroups,
    RMSContrast,
)
from zsnr.metrics.features import FeatureExtractor, Inception, resize_clean
from zsnr.metrics.fidelity import (
    RealStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    real_statistics,
)
from zsnr.metrics.luma import luma_percentile, mean_luma, rms_contrast, wasserstein_1


def generator(seed):
    return torch.Generator().manual_seed(seed)


def statistics(features, **facts):
    facts = {"image_size": 16, "source": "here", "extractor": "net", **facts}
    return real_statistics(torch.linspace(-1, 1, len(features)), features, **facts)


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(0, 256, (6, 3, 20, 16), generator=generator(0), dtype=torch.uint8)


# Distances


def test_fid_is_the_formula_in_float64():
    mix = torch.randn(5, 5, generator=generator(1), dtype=torch.float64)
    real = (torch.randn(400, 5, generator=generator(2), dtype=torch.float64) @ mix + 1).float()
    fake = torch.randn(300, 5, generator=generator(3), dtype=torch.float64).float()
    a, b = (x.double().numpy() for x in (real, fake))
    C_a, C_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(C_a @ C_b).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(C_a + C_b - 2 * root)
    assert frechet_distance(statistics(real), fake) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(statistics(real), real) == pytest.approx(0, abs=1e-8)
    # Shifted alike pictures are the square of the shift apart.
    assert frechet_distance(statistics(real), real + 2) == pytest.approx(5 * 4, rel=1e-5)


def test_kid_is_the_unbiased_mmd_in_float64():
    real, fake = (torch.randn(40, 6, generator=generator(s)) + s / 20 for s in (4, 9))
    x, y = (part.double().numpy() for part in (real, fake))
    kernel = lambda u, v: (u @ v.T / 6 + 1) ** 3  # noqa: E731
    k_xx, k_yy, k_xy = kernel(x, x), kernel(y, y), kernel(x, y)
    n = 40
    wanted = (k_xx.sum() - np.trace(k_xx) + k_yy.sum() - np.trace(k_yy)) / (n * (n - 1))
    wanted -= 2 * k_xy.mean()
    mean, std = kernel_distance(statistics(real), fake)
    assert mean == pytest.approx(wanted, rel=1e-9)  # all subsets are all pictures
    assert std == pytest.approx(0, abs=1e-9)


def test_kid_of_more_pictures_is_over_subsets_of_a_seed(monkeypatch):
    monkeypatch.setattr(fidelity, "KID_SUBSET_SIZE", 20)
    real, fake = (torch.randn(50, 3, generator=generator(s)) for s in (4, 5))
    before = torch.get_rng_state()
    first = kernel_distance(statistics(real), fake, seed=1)
    assert first == kernel_distance(statistics(real), fake, seed=1)
    assert first != kernel_distance(statistics(real), fake, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert first[1] > 0


def test_inception_score_in_float64():
    logits = 3 * torch.randn(60, 7, generator=generator(6))
    # Any two parts of pictures that come in twins of both parts have the same score.
    p = torch.softmax(logits.double(), 1).numpy()
    wanted = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    mean, _ = inception_score(logits.repeat(400, 1), splits=2)
    assert mean == pytest.approx(wanted, rel=2e-3)
    # By hand, with the same parts.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        order = torch.randperm(60).numpy()
    scores = [
        np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in np.split(p[order], 3)
    ]
    mean, std = inception_score(logits, splits=3, seed=3)
    assert mean == pytest.approx(np.mean(scores), rel=1e-9)
    assert std == pytest.approx(np.std(scores, ddof=1), rel=1e-9)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.empty(0, 4), "^0 images: wanted at least 2"),
        (torch.randn(1, 4), "^1 images: wanted at least 2"),
        (torch.ones(50, 4), "All 50 images have the same"),
        (torch.full((50, 4), math.nan), "not finite"),
    ],
)
def test_pictures_without_a_distribution_are_refused(rows, message):
    real = statistics(torch.randn(30, 4, generator=generator(7)))
    for measure in (
        lambda: frechet_distance(real, rows),
        lambda: kernel_distance(real, rows),
        lambda: inception_score(rows),
    ):
        with pytest.raises(ValueError, match=message):
            measure()
    with pytest.raises(ValueError, match=message.replace("images", "real images")):
        statistics(rows)


def test_what_lacks_features_or_pictures_is_refused():
    luma = real_statistics(torch.zeros(3), image_size=16, source="here")
    with pytest.raises(ValueError, match="FID needs the features of real images"):
        frechet_distance(luma, torch.randn(9, 4))
    with pytest.raises(ValueError, match="KID needs"):
        kernel_distance(luma, torch.randn(9, 4))
    with pytest.raises(ValueError, match="19 images in 10 splits"):
        inception_score(torch.randn(19, 4))


def test_statistics_are_written_once_and_belong_to_their_network(tmp_path):
    path = tmp_path / "real.safetensors"
    features = torch.randn(30, 4, generator=generator(8))
    statistics(features).write(path)
    found = RealStatistics.read(path)
    assert (found.count, found.image_size, found.extractor) == (30, 16, "net")
    fake = torch.randn(20, 4, generator=generator(9))
    assert frechet_distance(found, fake) == frechet_distance(statistics(features), fake)
    assert kernel_distance(found, fake) == kernel_distance(statistics(features), fake)
    found.check("FILE", 16, "net", "here")
    found.check("FILE", 16, "", None)
    for wanted, message in (
        ((32, "net", "here"), "FILE describes images of 16 pixels, but the model generates 32"),
        ((16, "other", "here"), "features of 'net', wanted those of 'other'"),
        ((16, "net", "there"), "other images"),
    ):
        with pytest.raises(ValueError, match=message):
            found.check("FILE", *wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["real.safetensors"]
    (tmp_path / "none.safetensors").write_bytes(b"no")
    for name, message in (("none", "not a readable"), ("nowhere", "no such file")):
        with pytest.raises(ValueError, match=message):
            RealStatistics.read(tmp_path / f"{name}.safetensors")


# Features


def test_resizing_is_antialiased_and_not_rounded(pictures):
    # Every second column white: to a quarter of the size it is grey, where aliasing gives stripes.
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    small = resize_clean(stripes, 16)
    assert (small[..., 2:-2] - 127.5).abs().max() < 6
    # A bicubic kernel by hand, a = -0.5, widened by the scale, in float64.
    up, out = 31, resize_clean(pictures, 31)
    assert out.dtype == torch.float32
    assert (out != out.round()).float().mean() > 0.9

    def kernel(n_in):
        scale = n_in / up
        support = max(scale, 1.0)
        centre = (np.arange(up)[:, None] + 0.5) * scale
        x = abs((np.arange(n_in)[None] + 0.5 - centre) / support)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        w = np.where(x < 1, near, np.where(x < 2, far, 0))
        return w / w.sum(1, keepdims=True)

    wanted = np.einsum("ih,bchw,jw->bcij", kernel(20), pictures.double().numpy(), kernel(16))
    np.testing.assert_allclose(out, wanted, atol=2e-4)
    with pytest.raises(ValueError, match="wanted torch.uint8"):
        resize_clean(pictures.float())


def test_inception_is_that_of_torch_fidelity_but_for_the_resizing(inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
    own = FeatureExtractor(Inception(str(inception_file)))
    full = torch.randint(0, 256, (1, 3, 299, 299), generator=generator(1), dtype=torch.uint8)
    for a, b in zip(own(full), theirs(full), strict=True):  # nothing to resize: the same
        torch.testing.assert_close(a, b)
    small = full[:, :, :64, :64].contiguous()
    resized = resize_clean(small)
    for a, b in zip(own(small), own.network(resized), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(own(small)[0], theirs(small)[0], rtol=1e-3)
    assert own.fingerprint.startswith("inception ")


def test_inception_weights_are_read_safely(inception_file, tmp_path):
    with pytest.raises(ValueError, match="no such file. FID's Inception weights are weights-incep"):
        Inception(str(tmp_path / "none.pth"))

    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").mkdir, ())

    with open(tmp_path / "bomb.pth", "wb") as file:
        pickle.dump(Bomb(), file)
    torch.save({"a": Bomb()}, tmp_path / "bomb2.pth")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pth"))
    for name in ("bomb", "bomb2", "script"):
        with pytest.raises(ValueError, match="not opened"):
            Inception(str(tmp_path / f"{name}.pth"))
    assert not (tmp_path / "exploded").exists()
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights"):
        Inception(str(tmp_path / "other.pth"))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="more than weights"):
        Inception(str(tmp_path / "list.pth"))


def test_any_network_gives_features(pictures):
    network = cells.SmallFeatures()
    extract = FeatureExtractor(network)
    features, logits = extract(pictures)
    assert torch.equal(features, network(resize_clean(pictures, 8))[0])
    assert (features.shape, logits.shape) == ((6, 5), (6, 4))
    assert extract.fingerprint == FeatureExtractor(cells.SmallFeatures()).fingerprint
    assert extract.fingerprint != FeatureExtractor(cells.SmallFeatures(seed=1)).fingerprint
    with pytest.raises(ValueError, match=r"wanted \(B, D\)"):
        FeatureExtractor(nn.Identity())(pictures)


# CLIP


def transformers_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = tiny.letters_tokenizer()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small["intermediate_size"] = 32
    ends = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 0}
    text = {**small, **ends, "max_position_embeddings": 12}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(3)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return model, tokenizer


def test_clip_score_by_hand(tmp_path, pictures):
    model, tokenizer = transformers_clip(tmp_path)
    images = [Image.fromarray(p[:, :16].permute(1, 2, 0).numpy()) for p in pictures]
    captions = ["a cat", "b", "snow at night and much more than twelve tokens", "", "x", "zz"]
    score = CLIPScore(str(tmp_path))
    with pytest.warns(UserWarning, match=r"1 of 6 captions are longer than .* reads: their CLIP"):
        scores = score(images, captions)
    score(images, captions)  # it is said once, and other warnings are errors
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    for picture, caption, found in zip(pictures, captions, scores, strict=True):
        x = (picture[:, :16].float() / 255 - mean) / std  # 16 x 16 already
        ids = tokenizer(caption, truncation=True, max_length=12, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=x[None])
        cosine = (out.image_embeds[0] @ out.text_embeds[0]).item()
        assert found.item() == pytest.approx(max(100 * cosine, 0), abs=1e-3)
    assert scores.min() == 0
    assert scores.max() > 40


def test_clip_score_by_open_clip(tmp_path, pictures):
    import open_clip
    from open_clip.transform import image_transform

    name = "ViT-S-32-alt"
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures[:2]]
    score = CLIPScore(f"{name}:{tmp_path}/clip.pt")
    scores = score(images, ["a cat", "snow"])
    with pytest.warns(UserWarning, match="1 of 2 captions are longer than ViT-S-32-alt:"):
        score(images, ["a cat", "snow " * 76])
    prepare = image_transform(224, is_train=False)
    tokens = open_clip.get_tokenizer(name)(["a cat", "snow"])
    with torch.no_grad():
        a = model.encode_image(torch.stack([*map(prepare, images)]), normalize=True)
        b = model.encode_text(tokens, normalize=True)
    wanted = (100 * (a * b).sum(1)).clamp(min=0)
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere", "no such folder. Wanted a folder with a CLIPModel"),
        ("ViT-X:file", "open_clip has no model 'ViT-X'"),
        ("ViT-B-32:/nowhere.pt", "no such file with weights of ViT-B-32"),
        ("EMPTY", "holds no config.json"),
    ],
)
def test_a_wrong_clip_model_is_refused(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CLIPScore(model.replace("EMPTY", str(tmp_path)))


# Brightness, over ranks


def test_collected_brightness_is_that_of_all_pictures_at_once():
    images = torch.rand(7, 3, 8, 8, generator=generator(2)) * 2 - 1
    reference = torch.linspace(-1, 1, 11)
    luma = mean_luma(images)
    for make, wanted in (
        (MeanLuma, luma.mean()),
        (RMSContrast, rms_contrast(images).mean()),
        (partial(LumaPercentile, 1), luma_percentile(images, 1).mean()),
        (LumaSpread, luma.std(correction=0)),
        (partial(LatentMean, 3), images.mean((0, 2, 3))),
        (partial(LumaWasserstein, reference), torch.tensor(wasserstein_1(luma, reference))),
    ):
        with (
            pytest.warns(UserWarning, match="before the ``update``"),
            pytest.raises(ValueError, match="has no images"),
        ):
            make().compute()
        metric = make()
        for rows in images.split([3, 1, 3]):
            metric.update(rows)
        torch.testing.assert_close(metric.compute(), wanted, rtol=1e-6, atol=1e-7)
        metric.reset()
        metric.update(images[:1])
        metric.compute()
    groups = PromptGroups(MeanLuma(), ["dark", "bright"])
    groups.update(images, ["dark"] * 3 + ["bright"] * 4)
    found = groups.compute()
    assert found["dark"].item() == pytest.approx(luma[:3].mean().item(), rel=1e-6)
    assert found["bright"].item() == pytest.approx(luma[3:].mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="Known: dark, bright"):
        groups.update(images[:1], ["snow"])
    with pytest.raises(ValueError, match="1 groups for 2 images"):
        groups.update(images[:2], ["dark"])


def test_two_ranks_collect_what_one_does(ranks):
    [alone] = [cells.collect(0, 1)]
    for found in ranks[2](cells.collect_on_rank):
        assert found.keys() == alone.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=1e-7)


# Captions


def test_captions_of_coco_are_one_an_image_and_nested(tmp_path):
    annotations = [
        {"image_id": i, "id": 10 * i + k, "caption": f"picture {i}\n  caption {k} "}
        for i in range(50)
        for k in (3, 1, 2)
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": annotations, "images": []}))
    ten, twenty = read_captions(path, 10), read_captions(path, 20)
    assert twenty[:10] == ten
    assert len({one.number for one in twenty}) == 20
    assert all(one.caption == f"picture {one.number} caption 1" for one in twenty)
    path.write_text(json.dumps({"annotations": annotations[::-1]}))
    assert read_captions(path, 20) == twenty
    assert read_captions(path, 20, seed=1) != twenty
    with pytest.raises(ValueError, match="captions of 50 images, and num_images=51"):
        read_captions(path, 51)


def test_captions_of_lines(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \n")
    found = read_captions(tmp_path / "a.txt", 2)
    assert sorted((one.number, one.caption) for one in found) == [(1, "a cat"), (3, "a dog")]
    lines = [{"caption": "a", "group": "dark"}, {"prompt": "b", "seed": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = sorted(read_captions(tmp_path / "a.jsonl", 2), key=lambda one: one.number)
    assert [(one.caption, one.group) for one in found] == [("a", "dark"), ("b", "")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a", r"ends in .json, .txt or .jsonl"),
        ("a.json", "[]", "wanted an object with annotations"),
        ("a.json", '{"annotations": [{"id": 1}]}', "annotation 0 is"),
        ("a.jsonl", '{"text": "a"}', "line 1 is"),
        ("a.jsonl", '{"caption": 3}', "line 1 is"),
        ("a.jsonl", '{"caption": "a", "group": 3}', "group=3"),
        ("a.txt", "\n", "captions of 0 images"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"caption": ' + "[" * 100_000, "line 1 is not JSON: nested too deeply"),
        ("a.jsonl", '{"caption": "half \\ud800"}', "line 1 is"),
        ("a.json", '{"annotations": [{"id": 1e999, "image_id": 1, "caption": "a"}]}', "0 is"),
        (
            "a.json",
            f'{{"annotations": [{{"id": 1{"0" * 400}, "image_id": 1, "caption": "a"}}]}}',
            "0 is",
        ),
    ],
)
def test_wrong_captions_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name, 1)
    with pytest.raises(ValueError, match="no such captions file"):
        read_captions(tmp_path / "b.txt", 1)
