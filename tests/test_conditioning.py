import pytest
import torch

from zsnr.conditioning import (
    Conditioner,
    NullConditioner,
    OpenClipConditioner,
    TransformersConditioner,
)
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
    ids, _ = conditioner._tokenize(["a black cat"])
    encoder = conditioner.encoder
    out = encoder(ids, output_hidden_states=True)  # no mask: as Stable Diffusion calls CLIP
    norms = [m for n, m in encoder.named_modules() if n.endswith("final_layer_norm")]
    wanted = norms[0](out.hidden_states[-2])
    torch.testing.assert_close(conditioner(["a black cat"]).context, wanted)
    plain = small(layer=-2, final_norm=False)(["a black cat"]).context
    torch.testing.assert_close(plain, out.hidden_states[-2])
    last = small()(["a black cat"]).context
    torch.testing.assert_close(last, norms[0](out.hidden_states[-1]))


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


def test_described_conditioners_are_built_again():
    for conditioner in (small(trainable=True), NullConditioner(4)):
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
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TransformersConditioner(**options)


def test_unknown_open_clip_models_are_refused():
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-Z'"):
        OpenClipConditioner("ViT-Z")
