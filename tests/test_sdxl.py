"""Stable Diffusion XL: two text encoders, a pooled embedding and sizes."""

import pytest
import tiny
import torch

from zsnr import Guidance
from zsnr.conditioning import SDXLConditioner
from zsnr.pipeline import TextToImage

PROMPTS = ["a cat", "dog b"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, and diffusers' pipeline that it was made by."""
    folder = tmp_path_factory.mktemp("sdxl")
    return folder, tiny.sdxl_folder(folder)


@pytest.mark.peer
@pytest.mark.parametrize("zero_null", [None, False])
def test_embeddings_are_diffusers(made, zero_null):
    folder, theirs = made
    prompts = [*PROMPTS, "a very long prompt of more than twelve letters"]
    ours = SDXLConditioner(str(folder), zero_null=zero_null)
    assert list(ours.parameters()) == []
    context, null, pooled, null_pooled = theirs.encode_prompt(
        prompts, negative_prompt=None if zero_null is None else [""] * 3
    )
    cond, uncond = ours(prompts), ours.null().expand(3)
    assert (ours.context_dim, ours.pooled_dim) == (context.shape[-1], pooled.shape[-1]) == (40, 20)
    for mine, other in zip(
        (cond.context, uncond.context, cond.pooled, uncond.pooled),
        (context, null, pooled, null_pooled),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert context.std() > 0.1
    assert (null.abs().max() == 0) == (zero_null is None)


@pytest.mark.peer
@pytest.mark.parametrize(("num_steps", "scale", "rescale"), [(10, 4.0, 0.7), (8, 7.5, 0.0)])
def test_images_are_diffusers(made, num_steps, scale, rescale):
    folder, theirs = made
    ours = TextToImage.from_pretrained(folder, device="cpu")
    codec, found = ours.model.codec, []
    decode = codec.decode
    codec.decode = lambda latents: found.append(latents) or decode(latents)
    settings = {"num_steps": num_steps, "guidance": Guidance(scale, rescale), "progress": False}
    images = ours(PROMPTS, seeds=[5, 6], height=16, width=24, **settings)
    assert [image.size for image in images] == [(24, 16)] * 2
    start = [torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    wanted = theirs(
        PROMPTS,
        latents=torch.cat(start),
        num_inference_steps=num_steps,
        guidance_scale=scale,
        guidance_rescale=rescale,
        height=16,
        width=24,
        output_type="latent",
    ).images
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1
