import dataclasses
import json
from hashlib import blake2b

import pytest
import tiny
import torch
from safetensors.torch import save_file

from zsnr.conditioning import (
    ClassLabels,
    Conditioner,
    NullConditioner,
    OpenClipConditioner,
    Remembered,
    TransformersConditioner,
)
from zsnr.conditioning.prompt_weights import parse_weights
from zsnr.conditioning.tokenizers import bpe_tokenizer, transformers_tokenizer
from zsnr.denoiser import Conditioning
from zsnr.described import build, describe

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
CONFIGS = {
    "clip_text_model": {"model_type": "clip_text_model", **SMALL},
    "bert": {"model_type": "bert", **SMALL},
    "t5": {
        "model_type": "t5",
        "d_model": 16,
        "d_ff": 32,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 2,
    },
}


def small(model_type="clip_text_model", **options):
    torch.manual_seed(0)
    return TransformersConditioner(
        config=CONFIGS[model_type], tokenizer="open_clip", max_length=8, **options
    ).eval()


def frozen(folder, **options):
    small().encoder.save_pretrained(folder)
    return TransformersConditioner(
        str(folder), **{"tokenizer": "open_clip", "max_length": 8, **options}
    )


@pytest.fixture(scope="module")
def tiny_open_clip(tmp_path_factory):
    """An open_clip model of a config and weights of its own: its name and its weights."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "zsnr-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "zsnr-tiny.json")
    torch.manual_seed(0)
    weights = folder / "weights.safetensors"
    save_file(open_clip.create_model("zsnr-tiny").state_dict(), weights)
    return "zsnr-tiny", weights


class Counting(NullConditioner):
    """A conditioner that notes what it encodes, and when it is released."""

    def __init__(self):
        super().__init__(4)
        self.calls = []

    def forward(self, prompts):
        self.calls.append(list(prompts))
        codes = [[[float(ord(c)) for c in prompt.ljust(4)[:4]]] for prompt in prompts]
        return Conditioning(
            torch.tensor(codes), torch.tensor([[prompt != ""] for prompt in prompts])
        )

    def release(self):
        self.calls.append("released")
        return super().release()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_new_encoders(model_type):
    conditioner = small(model_type)
    cond = conditioner(["a black cat", "", "a very long prompt of more words than fit in eight"])
    assert cond.context.shape == (3, 8, 16)
    assert conditioner.context_dim == 16
    assert (cond.mask is None) == (model_type == "clip_text_model")
    if cond.mask is not None:
        assert cond.mask.sum(1).tolist() == [5, 2, 8]
    null = conditioner.null()
    torch.testing.assert_close(null.context, cond.context[1:2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(cond.context[0], cond.context[1], atol=1e-3)
    alone = conditioner(["a black cat"])
    torch.testing.assert_close(alone.context, cond.context[:1], rtol=1e-5, atol=1e-6)


def test_frozen_or_trained():
    frozen, trained = small(), small(trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.train().training
    assert not frozen(["a"]).context.requires_grad
    assert trained.train().training
    trained(["a"]).context.sum().backward()
    assert trained.encoder.get_input_embeddings().weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not trained(["a"]).context.requires_grad


def test_penultimate_layer_is_transformers():
    conditioner = small(layer=-2)
    ids, _ = conditioner.tokenize(["a black cat"])
    encoder = conditioner.encoder
    out = encoder(ids, output_hidden_states=True)  # no mask: as Stable Diffusion calls CLIP
    norms = [m for n, m in encoder.named_modules() if n.endswith("final_layer_norm")]
    wanted = norms[0](out.hidden_states[-2])
    torch.testing.assert_close(conditioner(["a black cat"]).context, wanted)
    plain = small(layer=-2, final_norm=False)(["a black cat"]).context
    torch.testing.assert_close(plain, out.hidden_states[-2])
    last = small()(["a black cat"]).context
    torch.testing.assert_close(last, norms[0](out.hidden_states[-1]))


LONG = "a photo of a black cat and two dogs on a red sofa"  # 13 tokens


def by_hand(prompts, pieces, num_chunks, encode):
    """Encode each chunk of six tokens alone, and concatenate the contexts of a prompt's chunks."""
    bpe = open_clip_tokenizer()
    rows = []
    for prompt in prompts:
        tokens, chunks = bpe.encode(prompt)[: num_chunks * 6], []
        for i in range(num_chunks):
            ids = [bpe.sot_token_id, *tokens[6 * i : 6 * i + 6], bpe.eot_token_id]
            padding = [0 if pieces == "open_clip" else bpe.eot_token_id] * (8 - len(ids))
            chunks.append(encode(torch.tensor([ids + padding]))[0])
        rows.append(torch.cat(chunks))
    return torch.stack(rows)


def open_clip_tokenizer():
    import open_clip

    return open_clip.SimpleTokenizer()


@pytest.mark.parametrize("tokenizer", ["clip", "open_clip"])
@pytest.mark.parametrize(("layer", "final_norm"), [(-1, True), (-2, True), (-2, False)])
def test_long_prompts_are_encoded_in_chunks(tokenizer, layer, final_norm):
    torch.manual_seed(0)
    conditioner = TransformersConditioner(
        config={"model_type": "clip_text_model", **SMALL},
        tokenizer=tokenizer,
        max_length=8,
        layer=layer,
        final_norm=final_norm,
        max_tokens=13,  # three chunks
    ).eval()
    encoder = conditioner.encoder

    def encode(ids):
        out = encoder(ids, output_hidden_states=True)
        norms = [m for n, m in encoder.named_modules() if n.endswith("final_layer_norm")]
        hidden = out.hidden_states[layer]
        return norms[0](hidden) if final_norm else hidden

    prompts = [LONG, "", "a cat", f"{LONG} {LONG}", "a b c d e f"]
    cond = conditioner(prompts)
    assert cond.context.shape == (5, 24, 16)
    assert cond.mask is None
    assert conditioner.context_length == 24
    wanted = by_hand(prompts, tokenizer, 3, encode)
    torch.testing.assert_close(cond.context, wanted, rtol=0, atol=1e-6)
    tokens = conditioner.tokenizer(prompts)
    assert torch.equal(conditioner(tokens).context, cond.context)
    assert [cut.prompt for cut in tokens.cuts] == [prompts[3]]
    alone = conditioner(["a cat"]).context
    torch.testing.assert_close(alone, cond.context[2:3], rtol=0, atol=1e-6)
    torch.testing.assert_close(conditioner.null().context, cond.context[1:2], rtol=0, atol=1e-6)


def test_one_chunk_changes_nothing():
    plain, chunked = small(), small(max_tokens=6)
    for prompts in ([LONG], ["a cat", ""]):
        assert torch.equal(plain(prompts).context, chunked(prompts).context)
    assert "max_tokens" not in plain.settings()
    assert chunked.settings()["max_tokens"] == 6


def test_chunks_of_an_open_clip_tower(tiny_open_clip):
    name, weights = tiny_open_clip
    one = OpenClipConditioner(name, str(weights))
    three = OpenClipConditioner(name, str(weights), max_tokens=18)
    wanted = by_hand([LONG, "a"], "open_clip", 3, lambda ids: one(tokens_of(one, ids)).context)
    torch.testing.assert_close(three([LONG, "a"]).context, wanted, rtol=0, atol=1e-6)
    assert three.fingerprint() == {**one.fingerprint(), "num_chunks": 3}
    one.configure(max_tokens=18, clip_skip=1)
    assert one.settings() == {**three.settings(), "layer": "last"}
    assert one.configured == {"max_tokens": 18, "clip_skip": 1}
    with pytest.raises(ValueError, match="clip_skip=3: wanted 1 or 2"):
        one.configure(clip_skip=3)


def tokens_of(conditioner, ids):
    return dataclasses.replace(conditioner.tokenizer([""]), ids=(ids,))


def test_chunks_are_trained_masked_and_described():
    trained = small(trainable=True, max_tokens=12, use_mask=True).train()
    cond = trained([LONG, "a"])
    assert cond.mask.sum(1).tolist() == [16, 3 + 2]
    cond.context.sum().backward()
    assert trained.encoder.get_input_embeddings().weight.grad.abs().sum() > 0
    again = build(describe(trained), Conditioner)
    assert again.context_length == 16
    assert again.settings() == trained.settings()


def test_a_conditioner_is_configured_in_place(tmp_path):
    conditioner, wanted = frozen(tmp_path), frozen(tmp_path, layer=-2, max_tokens=12)
    plain = conditioner.fingerprint()
    conditioner.configure()
    assert conditioner.fingerprint() == plain
    conditioner.configure(max_tokens=12, clip_skip=2)
    assert conditioner.settings() == wanted.settings()
    assert (
        conditioner.fingerprint()
        == wanted.fingerprint()
        == {**plain, "layer": -2} | {"num_chunks": 2}
    )
    assert torch.equal(conditioner([LONG]).context, wanted([LONG]).context)
    remembered = Remembered(wanted)
    assert torch.equal(remembered([LONG, "a"]).context, wanted([LONG, "a"]).context)
    assert remembered.context_length == 16
    assert remembered.cuts([f"{LONG} b"])[0].lost == "sofa b"


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("t5", {"max_tokens": 12}, "only CLIP's text encoders read a prompt in chunks"),
        ("t5", {"prompt_weights": True}, "only CLIP's text encoders take weights"),
        ("bert", {"clip_skip": 2}, "it is for CLIP's text encoders"),
        ("clip_text_model", {"max_tokens": 0}, "max_tokens=0: wanted 1 to 600, such as 18 for 3"),
        ("clip_text_model", {"max_tokens": 601}, "max_tokens=601: wanted 1 to 600"),
        ("clip_text_model", {"clip_skip": 0}, "clip_skip=0: wanted 1 to 2"),
        ("clip_text_model", {"clip_skip": 3}, "clip_skip=3: wanted 1 to 2"),
    ],
)
def test_what_cannot_be_configured_is_refused(model_type, options, message):
    with pytest.raises(ValueError, match=message):
        small(model_type).configure(**options)


def test_other_conditioners_have_no_such_settings():
    for options in ({"max_tokens": 75}, {"clip_skip": 2}, {"prompt_weights": True}):
        with pytest.raises(ValueError, match="a NullConditioner has no such setting"):
            NullConditioner(4).configure(**options)


def test_longer_chunks_than_the_encoder_has_positions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_length=225: .* has 16 positions. .* max_tokens=225"):
        frozen(tmp_path, max_length=225)


def test_what_is_cut_is_said():
    conditioner = small()
    assert conditioner.cuts(["a b c d e f", ""]) == ()
    [cut] = conditioner.cuts([LONG, "a cat"])
    assert (cut.prompt, cut.num_tokens, cut.limit, cut.max_tokens) == (LONG, 13, 6, 18)
    assert cut.lost == "and two dogs on a red sofa"
    [cut] = conditioner.cuts(
        ["ein B\u00e4r \u65e5\u672c"]
    )  # seven tokens; the last is half a letter
    assert cut.lost == "\u672c"
    [cut] = small("t5").cuts([LONG])
    assert cut.max_tokens is None
    assert NullConditioner(4).cuts([LONG]) == ()


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("", []),
        ("normal text: 1.2", [("normal text: 1.2", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[unbalanced", [("unbalanced", 1 / 1.1)]),
        ("un) balanced]", [("un) balanced]", 1)]),
        (r"\(literal\] \\ a\b", [(r"(literal] \ ab", 1)]),
        (r"cat \(animal\:1.2)", [(r"cat (animal:1.2)", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(a:1.5)(b: .5 )[(c:+1.)]", [("a", 1.5), ("b", 0.5), ("c", 1 / 1.1)]),
        ("(a:1.2.3) (b:x)", [("a:1.2.3", 1.1), (" ", 1), ("b:x", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.3 * 1.21),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_weights_are_read_as_a1111_reads_them(prompt, wanted):
    parsed = parse_weights(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in wanted]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in wanted])


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_weights_multiply_the_context_of_their_tokens(kind, tmp_path, tiny_open_clip):
    if kind == "transformers":
        plain, weighted = frozen(tmp_path, max_tokens=12), frozen(tmp_path, max_tokens=12)
    else:
        name, weights = tiny_open_clip
        plain, weighted = (OpenClipConditioner(name, str(weights), max_tokens=12) for _ in "ab")
    for conditioner in (plain, weighted):  # of new weights the mean is 0
        names = dict(conditioner.load().named_parameters())
        [bias] = [
            names[name] for name in names if "ln_final.bias" in name or "layer_norm.bias" in name
        ]
        bias.data += torch.linspace(0, 1, 16)
    weighted.configure(prompt_weights=True)
    prompts = ["a (red:1.5) house", "a photo of a cat and [two dogs]", "a cat", ""]
    got = weighted(prompts).context
    wanted = plain(["a red house", "a photo of a cat and two dogs", "a cat", ""]).context
    assert torch.equal(got[2:], wanted[2:])
    factors = torch.ones(2, 16)
    factors[0, 2] = 1.5
    factors[1, [9, 10]] = 1 / 1.1
    for row, (changed, z) in enumerate(zip(got, wanted[:2], strict=False)):
        for chunk in (slice(0, 8), slice(8, 16)):
            each = z[chunk] * factors[row, chunk, None]
            if (factors[row, chunk] != 1).any():
                each = each * z[chunk].mean() / each.mean()
            torch.testing.assert_close(changed[chunk], each, rtol=0, atol=1e-6)
    assert torch.equal(weighted(weighted.tokenizer(prompts)).context, got)
    assert weighted.fingerprint() == {**plain.fingerprint(), "prompt_weights": True}
    assert build(describe(weighted), Conditioner).tokenizer.prompt_weights
    assert (
        plain.cuts([f"({LONG}:1.1)"])[0].num_tokens
        > weighted.cuts([f"({LONG}:1.1)"])[0].num_tokens
        == 13
    )


def test_tokenizers_are_the_libraries(tmp_path):
    """Ids and masks of chunks are those that the tokenizers' own truncation and padding give."""
    import open_clip
    from transformers import BertTokenizer

    prompts = ["", "a", "a b c d e f", LONG, "!", "caf\u00e9 \u732b 1.5"]
    for kind, padding in (("open_clip", 0), ("clip", 49407)):
        ids, mask = bpe_tokenizer(kind, 8)[0](prompts)
        theirs = open_clip.SimpleTokenizer(context_length=8)(prompts)
        assert torch.equal(ids, theirs.where(mask, torch.tensor(padding)))
        assert mask.sum(1).tolist() == [2, 3, 8, 8, 3, 8]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef", "cat", "photo"]
    bert = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=8)
    left = tiny.letters_tokenizer(padding_side="left")
    for i, auto in enumerate((tiny.letters_tokenizer(), left, bert)):
        auto.save_pretrained(tmp_path / str(i))
        mine, _, length = transformers_tokenizer(str(tmp_path / str(i)), None, 8)
        ids, mask = mine(prompts)
        theirs = auto(
            prompts, padding="max_length", truncation=True, max_length=8, return_tensors="pt"
        )
        assert length == 8
        assert torch.equal(ids, theirs["input_ids"])
        assert torch.equal(mask, theirs["attention_mask"].bool())


def test_pretrained_encoder_and_tokenizer_from_folders(tmp_path):
    small().encoder.save_pretrained(tmp_path / "text_encoder")
    conditioner = TransformersConditioner(
        str(tmp_path), subfolder="text_encoder", tokenizer="open_clip", max_length=8
    )
    for prompts in (["a black cat"], ["", "b"]):
        torch.testing.assert_close(conditioner(prompts).context, small()(prompts).context)


def test_open_clip_penultimate_layer():
    import open_clip

    torch.manual_seed(0)
    conditioner = OpenClipConditioner("ViT-S-32-alt", layer="last").eval()
    model, _, _ = open_clip.create_model_and_transforms("ViT-S-32-alt")
    names = {
        "token_embedding": model.token_embedding,
        "transformer": model.transformer,
        "ln_final": model.ln_final,
    }
    for name, module in names.items():
        module.load_state_dict(getattr(conditioner, name).state_dict())
    with torch.no_grad():
        model.positional_embedding.copy_(conditioner.positional_embedding)
    hidden = []
    model.ln_final.register_forward_hook(lambda module, args, out: hidden.append(out))
    model.eval()
    ids = open_clip.get_tokenizer("ViT-S-32-alt")(["a black cat", ""])
    model.encode_text(ids)
    cond = conditioner(["a black cat", ""])
    torch.testing.assert_close(cond.context, hidden[0], rtol=1e-4, atol=1e-5)
    assert conditioner.context_dim == cond.context.shape[-1]
    conditioner.layer = "penultimate"
    blocks = model.transformer.resblocks
    kept = []
    blocks[-1].register_forward_hook(lambda module, args, out: kept.append(args[0]))
    model.encode_text(ids)
    wanted = kept[0] if kept[0].shape[0] == 2 else kept[0].transpose(0, 1)
    got = conditioner(["a black cat", ""]).context
    torch.testing.assert_close(got, model.ln_final(wanted), rtol=1e-4, atol=1e-5)


def test_null_conditioner():
    cond = NullConditioner(4)(["a", "b"])
    assert torch.equal(cond.context, torch.zeros(2, 1, 4))


def test_class_labels():
    numbers = ClassLabels(1000)
    cond = numbers(["3", "", 257])
    assert cond.parts().keys() == {"labels"}
    assert cond.labels.tolist() == [3, 1000, 257]
    assert numbers.null().labels.tolist() == [1000]
    named = ClassLabels(2, ["cat", "dog"])
    assert named(["dog", "0", ""]).labels.tolist() == [1, 0, 2]
    assert (named.num_labels, named.context_dim) == (3, 0)
    for prompt in ("1000", "-1", "a cat", 3.0):
        with pytest.raises(
            ValueError, match=r"is no class: wanted a number from 0 to 999; or noth"
        ):
            numbers([prompt])
    with pytest.raises(ValueError, match=r"0 to 1, or a name such as 'cat'; or nothing"):
        named(["cow"])
    for names in (["cat"], ["cat", "cat"], ["cat", ""]):
        with pytest.raises(ValueError, match="names of 2 classes: wanted one for each"):
            ClassLabels(2, names)
    remembered = Remembered(numbers)
    assert remembered(["3", "5", "3"]).labels.tolist() == [3, 5, 3]
    assert remembered.null().labels.tolist() == [1000]


def test_described_conditioners_are_built_again():
    for conditioner in (small(trainable=True), NullConditioner(4), ClassLabels(2, ["a", "b"])):
        again = build(describe(conditioner), Conditioner)
        assert again.settings() == conditioner.settings()
        assert again.trainable == conditioner.trainable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `pretrained` or `config`"),
        ({"pretrained": "x", "config": {}}, "either `pretrained` or `config`"),
        ({"config": CONFIGS["bert"]}, "needs `tokenizer`"),
        (
            {"config": {"model_type": "bert", "hiden_size": 8}, "tokenizer": "open_clip"},
            "has no 'hiden_size'. Did you mean 'hidden_size'",
        ),
        ({"config": SMALL, "tokenizer": "open_clip"}, "has no model_type"),
        ({"config": {"model_type": "gtp"}, "tokenizer": "open_clip"}, "'gtp' is not one of"),
        ({"pretrained": "./nowhere", "tokenizer": "open_clip"}, "holds no config.json"),
        ({"pretrained": "./nowhere"}, "Cannot load a tokenizer from ./nowhere"),
        (
            {"config": CONFIGS["clip_text_model"], "tokenizer": "clip", "max_length": 1},
            "max_length=1: wanted at least 2",
        ),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TransformersConditioner(**options)


def test_unknown_open_clip_models_are_refused():
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-Z'"):
        OpenClipConditioner("ViT-Z")


def test_tags_of_no_open_clip_model_are_refused():
    with pytest.raises(ValueError, match="'laion3b': wanted a path, or a tag.*laion2b_s32b_b79k"):
        OpenClipConditioner("ViT-H-14", "laion3b")
    with pytest.raises(
        ValueError,
        match="no text tower of CLIP's kind: use a TransformersConditioner with 'roberta-base'",
    ):
        OpenClipConditioner("roberta-ViT-B-32")


def test_a_conditioner_needs_no_weights_until_it_is_used(tmp_path, tiny_open_clip):
    name, _ = tiny_open_clip
    lost = [frozen(tmp_path / "text"), OpenClipConditioner(name, str(tmp_path / "no.safetensors"))]
    (tmp_path / "text" / "model.safetensors").unlink()
    for conditioner in lost:
        assert conditioner.context_dim == 16
        assert list(conditioner.parameters()) == []
        assert conditioner.state_dict() == {}
        assert not conditioner.train().training
        assert conditioner.fingerprint()["weights"] is None
        for use in (conditioner.load, conditioner.null, lambda c=conditioner: c(["a"])):
            with pytest.raises(
                ValueError,
                match="Cannot load zsnr|complete weights of a text",
            ):
                use()
    (tmp_path / "text" / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is not a readable .safetensors file: Error while"):
        lost[0].load()
    (tmp_path / "no.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="Cannot load zsnr-tiny from .*: Error while"):
        lost[1].load()
    (tmp_path / "text" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        TransformersConditioner(str(tmp_path / "text"), tokenizer="open_clip")
    pickled = tmp_path / "model.pt"
    torch.save(Conditioner, pickled)
    with pytest.raises(ValueError, match="Cannot load zsnr-tiny from .*model.pt': Weights only"):
        OpenClipConditioner(name, str(pickled)).load()


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_released_conditioners_load_again(tmp_path, tiny_open_clip, kind):
    if kind == "transformers":
        conditioner = frozen(tmp_path)
    else:
        conditioner = OpenClipConditioner(tiny_open_clip[0], str(tiny_open_clip[1]))
    prompts = ["a black cat", ""]
    with torch.inference_mode():
        first = conditioner(prompts).context
    weights = list(conditioner.parameters())
    assert weights
    assert not any(p.is_inference() or p.requires_grad for p in weights)
    assert not any(module.training for module in conditioner.modules())
    assert next(conditioner.load().parameters()) is weights[0]
    assert list(conditioner.release().parameters()) == []
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = conditioner(prompts).context
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, first)
    assert next(conditioner.parameters()) is not weights[0]
    eager = type(conditioner)(**{**conditioner.settings(), "trainable": True}).eval()
    assert len(list(eager.release().parameters())) == len(weights)
    for name, weight in conditioner.state_dict().items():
        assert torch.equal(eager.state_dict()[name], weight)


def test_moves_of_unloaded_conditioners_are_remembered(tmp_path):
    conditioner = frozen(tmp_path)
    assert next(conditioner.encoder.parameters()).dtype == torch.float32
    conditioner.release().bfloat16()
    assert next(conditioner.encoder.parameters()).dtype == torch.bfloat16
    conditioner.release()
    assert next(conditioner.encoder.parameters()).dtype == torch.bfloat16
    assert next(conditioner.float().release().encoder.parameters()).dtype == torch.float32
    assert next(conditioner.release().to("meta").encoder.parameters()).device.type == "meta"


def test_half_precision_weights_stay_so_unless_cast(tmp_path):
    small().encoder.half().save_pretrained(tmp_path)
    conditioner = TransformersConditioner(str(tmp_path), tokenizer="open_clip", max_length=8)
    assert next(conditioner.to("cpu").encoder.parameters()).dtype == torch.float16
    assert next(conditioner.release().float().encoder.parameters()).dtype == torch.float32


def test_fingerprints_of_conditioners(tmp_path, tiny_open_clip):
    conditioner = frozen(tmp_path / "a")
    weights = tmp_path / "a" / "model.safetensors"
    first = conditioner.fingerprint()
    assert list(conditioner.parameters()) == []
    assert json.loads(json.dumps(first)) == first
    assert first["weights"] == blake2b(weights.read_bytes(), digest_size=16).hexdigest()
    assert frozen(tmp_path / "b").fingerprint() == first
    for name, value in (("layer", -2), ("max_length", 7), ("final_norm", False)):
        assert frozen(tmp_path / "b", **{name: value}).fingerprint() == {**first, name: value}
    assert frozen(tmp_path / "b", use_mask=False).fingerprint() == first  # as None is for CLIP
    assert frozen(tmp_path / "b", use_mask=True).fingerprint() == {**first, "use_mask": True}
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert conditioner.fingerprint() != first
    assert {**conditioner.fingerprint(), "weights": first["weights"]} == first

    name, weights = tiny_open_clip
    assert OpenClipConditioner(name, str(weights)).fingerprint() == {
        "class": "zsnr.conditioning.open_clip_text.OpenClipConditioner",
        "model": name,
        "layer": "penultimate",
        "weights": blake2b(weights.read_bytes(), digest_size=16).hexdigest(),
    }
    assert NullConditioner(4).fingerprint() != NullConditioner(5).fingerprint()
    with pytest.raises(ValueError, match="weights are trained jointly"):
        small(trainable=True).fingerprint()
    with pytest.raises(ValueError, match="weights are random"):
        small().fingerprint()


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    from transformers import CLIPTokenizer

    letters = [*"abc", *(f"{c}</w>" for c in "abc")]
    found = []
    for folder, tokens in (("a", letters), ("b", letters), ("c", letters[::-1])):
        tokens = ["<|startoftext|>", "<|endoftext|>", *tokens]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
        tokenizer.save_pretrained(tmp_path / folder / "tokenizer")
        options = {"tokenizer": None, "tokenizer_subfolder": "tokenizer"}
        found.append(frozen(tmp_path / folder, **options).fingerprint())
    assert found[0] == found[1]
    assert found[0]["tokenizer"] != found[2]["tokenizer"]
    assert {**found[0], "tokenizer": found[2]["tokenizer"]} == found[2]


def test_checkpoints_of_tags_are_found_on_disk(tmp_path, monkeypatch):
    from zsnr.conditioning.open_clip_text import _weight_file

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert _weight_file("ViT-H-14", "laion2b_s32b_b79k") is None
    repository = tmp_path / "models--laion--CLIP-ViT-H-14-laion2B-s32B-b79K"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    for name in ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"):
        (folder / name).write_bytes(b"weights")
        assert _weight_file("ViT-H-14", "laion2b_s32b_b79k") == folder / name
    assert _weight_file("RN50", "yfcc15m") is None


def test_remembered_prompts_are_encoded_once():
    inner = Counting()
    remembered = Remembered(inner)
    prompts = ["cat", "", "dog", "cat"]
    got = remembered(prompts)
    assert inner.calls == [["cat", "", "dog"], "released"]
    wanted = Counting()(prompts)
    assert torch.equal(got.context, wanted.context)
    assert torch.equal(got.mask, wanted.mask)
    again = remembered(["dog", "bird", "", "dog", "bird"])
    assert inner.calls[2:] == [["bird"], "released"]
    assert torch.equal(again.context, Counting()(["dog", "bird", "", "dog", "bird"]).context)
    assert torch.equal(remembered.null().context, wanted.context[1:2])
    assert len(inner.calls) == 4


def test_remembered_rows_are_the_encoders(tmp_path):
    remembered = Remembered(frozen(tmp_path))
    prompts = ["a black cat", "", "two dogs"]
    wanted = frozen(tmp_path)(prompts).context
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        remembered(prompts)
    assert list(remembered.parameters()) == []
    order = [2, 0, 0, 1, 2]
    got = remembered([prompts[i] for i in order]).context
    assert torch.equal(got, wanted[order])
    layer = torch.nn.Linear(16, 1)
    layer(got).sum().backward()  # rows from sampling serve training
    got.zero_()
    assert torch.equal(remembered(prompts).context, wanted)


def test_known_prompts_load_nothing(tmp_path):
    conditioner = frozen(tmp_path)
    rows = conditioner(["a black cat", ""])
    (tmp_path / "model.safetensors").unlink()
    remembered = Remembered(conditioner.release())
    null = Conditioning(rows.context[1:])
    remembered.add("", null)
    assert torch.equal(remembered.null().context, rows.context[1:])
    assert torch.equal(remembered(["", ""]).context, rows.context[[1, 1]])
    assert remembered.load().context_dim == 16
    assert list(remembered.parameters()) == []
    with pytest.raises(ValueError, match="holds no complete weights of a text encoder"):
        remembered(["", "a black cat"])
    assert remembered.to("meta")([""]).context.device.type == "meta"
    moved = Remembered(conditioner.to("meta"))
    moved.add("", null)
    assert moved.null().context.device.type == "meta"
    for wrong in (rows, Conditioning(torch.zeros(1, 8, 5))):
        with pytest.raises(ValueError, match=r"for 'a': wanted one row, \(1, L, 16\)"):
            remembered.add("a", wrong)


def test_remembered_is_described_as_what_it_holds(tmp_path):
    inner = frozen(tmp_path)
    remembered = Remembered(inner)
    assert describe(remembered) == describe(Remembered(remembered)) == describe(inner)
    assert remembered.fingerprint() == inner.fingerprint()
    assert type(build(describe(remembered), Conditioner)) is TransformersConditioner
    with pytest.raises(ValueError, match="are trained jointly: its embeddings cannot be cached"):
        Remembered(small(trainable=True))


def test_weights_that_are_not_whole_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    conditioner = tiny.frozen_conditioner(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if "q_proj.weight" in name)
    save_file({n: w for n, w in whole.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 of the tensors, such as .*q_proj.weight"):
        conditioner(["a cat"])


def test_a_name_of_a_class_is_not_the_number_of_another():
    with pytest.raises(ValueError, match="names has '1' for class 0, but that is the number of"):
        ClassLabels(2, ["1", "0"])
    assert ClassLabels(2, ["0", "1"])(["1", 0]).labels.tolist() == [1, 0]
