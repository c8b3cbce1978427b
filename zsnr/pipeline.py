"""Prompts to images: the one sampling path of users, previews and predict."""

from __future__ import annotations

import json
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsnr.checkpoints import Model
from zsnr.checkpoints.run_folder import is_checkpoint, resolve_model
from zsnr.codecs import LatentCodec, PixelCodec
from zsnr.conditioning import Conditioner
from zsnr.conditioning.cuts import describe_cuts, longest_cut
from zsnr.denoiser import Conditioning, Denoiser, Network
from zsnr.editing import DEFAULT_CORRECTIONS, Edit, read_edit
from zsnr.files import replacing
from zsnr.guidance import Guidance
from zsnr.inpainting import InpaintingDenoiser
from zsnr.interop.adapter_file import AdapterFile
from zsnr.interop.adapter_merge import MergedAdapter, merge_adapter
from zsnr.interop.models import choose_dtype, load_parts, read_model
from zsnr.networks import network_folder, takes_sizes
from zsnr.noise import SampleNoise, sample_generator
from zsnr.prediction import PredictionType, check_prediction_type
from zsnr.progress import progress_bar
from zsnr.samplers import Sampler
from zsnr.samplers.base import Callback, Changed
from zsnr.sampling import Sampling as Sampling
from zsnr.sampling import choose_sampling
from zsnr.sampling import describe_guidance as describe_guidance
from zsnr.sampling import describe_sampling as describe_sampling
from zsnr.schedule import Schedule, noised
from zsnr.weights.pretrained import loading_in
from zsnr.weights.source import at_revision, has_variant, prefer_variant

if TYPE_CHECKING:
    from PIL.Image import Image


def check_threshold(guidance: Guidance, codec: LatentCodec) -> None:
    """Refuse a dynamic threshold where x_0 has another range than that of pixels.

    Raises:
        ValueError: The codec's latents are not pixels in [-1, 1].
    """
    pixels = isinstance(codec, PixelCodec) and codec.scale == 1 and codec.shift == 0
    if guidance.threshold is not None and not pixels:
        raise ValueError(
            f"Guidance threshold {guidance.threshold} is for models of pixels in [-1, 1], the "
            f"latents of a PixelCodec of scale 1; this model's codec is {type(codec).__name__}. "
            "Leave the threshold out."
        )


def check_steps(sampling: Sampling, schedule: Schedule) -> None:
    """Refuse the guidance method "cfg_pp" with a sampler it is not made for.

    Raises:
        ValueError: The method is "cfg_pp", and a step is not first order and deterministic.
    """
    sampler = sampling.sampler
    assert isinstance(sampler, Sampler)
    if sampling.guidance.method == "cfg_pp" and type(sampler).sample is Sampler.sample:
        sampler.plan(schedule, sampling.timesteps(schedule), sampling.guidance)


def report_cuts(
    conditioner: Conditioner,
    prompts: Sequence[str],
    reported: set[str],
    report: Callable[[str], None],
) -> None:
    """Report the prompts that are longer than the text encoder reads, together, and each once.

    Args:
        conditioner: The text encoder.
        prompts: The prompts that will be sampled.
        reported: Prompts that have been reported; those that are reported now are added.
        report: Takes the message.
    """
    new = [text for text in dict.fromkeys(prompts) if text and text not in reported]
    cuts = conditioner.cuts(new)
    if cuts:
        reported.update(cut.prompt for cut in cuts)
        report(describe_cuts(longest_cut(cuts), len(cuts), len(new)))


class TextToImage:
    """A latent diffusion model as a function from prompts to images.

    Args:
        model: The parts of the model. With `raw_network`, guidance against "raw" is possible.
        network: Network that replaces the model's own. None = its own.
        name: Name of the model in the metadata of its images, such as its path.
        loras: Adapters that are merged into the model, for the metadata of its images.
    """

    def __init__(
        self,
        model: Model,
        network: Network | None = None,
        name: str = "",
        loras: Sequence[MergedAdapter] = (),
    ) -> None:
        check_prediction_type(model.prediction_type, model.schedule)
        self.model = model
        self.network: Network = network or model.network
        self.name = name
        self._offload = False
        self._device: torch.device | None = None  # of the part in use, with offload
        self.warned_of: set[str] = set()  # prompts that a warning has counted as cut
        self.loras = tuple(loras)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub: str | Path,
        schedule: Schedule | None = None,
        *,
        prediction_type: PredictionType | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
        vae: str | None = None,
        vae_dtype: torch.dtype | str | None = None,
        vae_tiling: bool = False,
        offload: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        raw_beside: bool = False,
        max_tokens: int | None = None,
        clip_skip: int | None = None,
        prompt_weights: bool | None = None,
        network: nn.Module | type[nn.Module] | None = None,
    ) -> TextToImage:
        """Load a model.

        Args:
            path_or_hub: A diffusers folder, a hub id, a single .safetensors file in the ldm layout,
                a .ckpt of this package (file or sharded folder), or the folder of a run, whose
                newest checkpoint that can be read is taken.
            schedule: Noise schedule that replaces the declared one. None = the declared one.
            prediction_type: Prediction type that replaces the declared one. None = the declared
                one.
            device: Device of all parts. None = the GPU if there is one.
            dtype: Data type of all parts, such as "bfloat16". "auto" = on a GPU float16 or bfloat16
                if the file has it, else float32.
            vae: Another VAE: a folder, a hub id, or a .safetensors file.
            vae_dtype: Data type of the VAE. None = `dtype`, or float32 if it overflows in float16.
            vae_tiling: Decode in overlapping tiles: less memory for large images.
            offload: Keep only the part in use on the device: less GPU memory, more time.
            revision: Branch, tag or commit of a hub id, which OWNER/NAME@REVISION names too. None =
                main.
            variant: Variant of the weights that is preferred if there are several, such as "fp16".
            raw_beside: Also load the raw weights beside the averaged ones, for guidance against
                "raw". Only checkpoints of this package have both.
            max_tokens: Number of tokens of a prompt that CLIP reads, in chunks of 75, such as 225.
                None = as the model was trained, else 75.
            clip_skip: Layer of the text encoder whose output is the context, counted from the end:
                1 = the last, 2 = the penultimate, each with the final norm. None = as the model was
                trained.
            prompt_weights: Whether weights such as (word:1.2) in prompts are read, as in A1111.
                None = as the model was trained.
            network: For a checkpoint with a network of your own: that network, or its class; see
                `read_checkpoint`.

        Raises:
            ValueError: The source cannot be read, or lacks the raw weights that were requested; or
                its text encoder lacks a setting.
        """
        source = at_revision(resolve_model(path_or_hub), revision)
        if raw_beside:
            check_raw_beside(source)
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise ValueError(f"device={device!r} is not a device, such as 'cuda'.") from error
        if variant is not None and not has_variant(source, network_folder(source), variant):
            raise ValueError(f"{source} has no weights of the variant {variant!r} of its network.")
        with prefer_variant(variant):
            chosen = choose_dtype(dtype, source, device)
            with loading_in(chosen):
                model = read_model(source, schedule, prediction_type, raw_beside, network)
            model.conditioner.configure(
                max_tokens=max_tokens, clip_skip=clip_skip, prompt_weights=prompt_weights
            )
            model = load_parts(model, chosen, vae, vae_dtype, vae_tiling)
        pipe = cls(model, name=source)
        pipe._offload = offload
        return pipe.to(device)

    def to(self, device: torch.device | str) -> TextToImage:
        """Move every part to a device, in place, and return self; with offload, when it is used."""
        if self._offload:
            self._device = torch.device(device)
            device = "cpu"
        self.model.codec.to(device)
        self.model.conditioner.to(device)
        self.model.network.to(device)
        if self.model.raw_network is not None:
            self.model.raw_network.to(device)
        return self

    def warn_of_cuts(self, prompts: Sequence[str]) -> None:
        """Warn once of the prompts that are longer than the text encoder reads."""
        report_cuts(
            self.model.conditioner,
            prompts,
            self.warned_of,
            lambda message: warnings.warn(message, stacklevel=6),
        )

    def load_lora(self, path: str | Path | AdapterFile, scale: float = 1.0) -> None:
        """Merge an adapter of any program into the weights; several add up.

        LoRA (also of convolutions), LoHa, LoKr, DoRA and full differences are read, in the layouts
        of kohya's scripts, LyCORIS, OneTrainer, ComfyUI, diffusers and peft. Every tensor of the
        file is used, or the file is refused and nothing changes. To take an adapter out again, load
        the model again.

        Args:
            path: A .safetensors file, a folder of peft or diffusers that holds one, or an opened
                file.
            scale: What the change is multiplied by; see `zsnr.interop.adapter_merge` for DoRA.

        Raises:
            ValueError: The file is damaged, of another kind or for another model; or the weights
                are sharded, quantized or not those that the pipeline samples with.
        """
        if self.network is not self.model.network:
            raise ValueError(
                "This pipeline samples with another network than its model's own: load the "
                "adapter into a pipeline of the model itself, before its network is wrapped."
            )
        self.loras = (*self.loras, merge_adapter(self.model, path, scale))

    @torch.no_grad()  # a sharded network cannot be gathered in inference mode
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: Sampler | str | None = None,
        num_steps: int | None = None,
        spacing: str | None = None,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        image: Tensor | Image | Sequence[Image] | None = None,
        strength: float | None = None,
        mask: Tensor | Image | None = None,
        mask_corrections: int = DEFAULT_CORRECTIONS,
        batch_size: int = 8,
        max_rows: int | None = None,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> list[Image]:
        """Generate one image for each prompt.

        The same prompt and seed give the same image, whatever else is in the list.

        With `image`, sampling starts inside of the grid of timesteps, where the share `strength` of
        the steps is left, at x_t = alpha_t x_0 + sigma_t eps with the noise of the seed. With
        `mask`, the rest of the image is kept; see `InpaintingDenoiser`.

        Args:
            prompts: Text prompts.
            negative_prompts: Negative prompts, one for each prompt; "" = none. None = none at all.
            seeds: Seeds, one for each prompt. None = 0, 1, 2, ...: one after the other, as in
                `zsnr sample` and in previews.
            height: Height in pixels. None = the size that the model was trained at.
            width: Width in pixels. None = the size that the model was trained at.
            sampler: A sampler, or the name of a registered one. This and the next three are by
                default what the model declares, see `choose_sampling`.
            num_steps: S, see `Sampling`. A model that declares nothing is sampled in 50 steps.
            spacing: A registered timestep spacing, or the path of a grid file.
            guidance: Scale 7.5 and rescale 0.7, the paper's, if the model declares nothing.
                Against "raw" it needs a model with `raw_network`, and takes no negative prompts.
            sampling: All of these four at once.
            image: Image to start from: (B, 3, H, W) in [-1, 1], an image of PIL, or a list of them;
                one for all prompts, or one for each. It gives height and width.
            strength: Share of the steps that are made, in (0, 1], rounded down to whole steps. 1
                without a mask is the same as no image. None = 1 with a mask, else 0.6.
            mask: Part of the image that is repainted, 1 or white: (H, W) or (B, 1, H, W), or an
                image of PIL. Values between 0 and 1 mix both; from 0.5 on latents are repainted.
            mask_corrections: Corrections of each prediction for the kept part, each of which is one
                more network call. 0 = the kept part of each prediction is only replaced.
            batch_size: Number of images sampled at a time.
            max_rows: Largest number of rows of one network call, to bound memory; see `Denoiser`,
                also for sharded networks. None = two for each image with guidance, else one.
            progress: Show the progress on stderr.
            callback: Called after each step of each batch, as by `Sampler.sample`: with the step's
                number, its timestep, the predicted x_0 and the state it led to, both latents. It
                may return a `Changed` of them.

        Returns:
            Images whose `info["zsnr"]` is a JSON text with all their settings, which `save_png`
            writes into the file.

        Raises:
            ValueError: The lists have different lengths, a setting is out of range, or images,
                mask and size do not fit.
        """
        prompts, negatives = _prompts(prompts, negative_prompts)
        edit = read_edit(image, strength, mask, mask_corrections, len(prompts))
        seeds = range(len(prompts)) if seeds is None else seeds
        seeds = [operator.index(seed) for seed in seeds]
        _check_count("seeds", seeds, prompts)
        for name, count in (("batch_size", batch_size), ("max_rows", max_rows)):
            if count is not None and count < 1:
                raise ValueError(f"{name}={count}: wanted at least 1.")
        if sampling is None:
            sampling = choose_sampling(
                self.model.sampling,
                sampler=sampler,
                num_steps=num_steps,
                spacing=spacing,
                guidance=guidance,
            )
        elif (sampler, num_steps, spacing, guidance) != (None,) * 4:
            raise ValueError(
                "sampling holds sampler, num_steps, spacing and guidance: give it alone."
            )
        self._check_guidance(sampling.guidance, negatives)
        timesteps = sampling.timesteps(self.model.schedule)
        if edit is not None:
            timesteps = timesteps[edit.first_step(sampling.num_steps) :]
            height, width = edit.size(height, width)
        height = self.model.image_size if height is None else height
        width = self.model.image_size if width is None else width
        shape = self.model.codec.latent_shape(height, width)

        for seed in seeds:
            sample_generator(seed)  # refuses a wrong seed before anything slow
        self.warn_of_cuts([*prompts, *negatives])
        facts = {**self.describe(sampling), **({} if edit is None else edit.facts())}
        known: Tensor | None = None
        images: list[Image] = []
        batches = range(0, len(prompts), batch_size)
        bar = progress_bar(len(batches) * len(timesteps), "sampling", "step", show=progress)

        def after_step(i: int, t: int, x_0: Tensor, x_s: Tensor) -> Changed | None:
            bar.update()
            return None if callback is None else callback(i, t, x_0, x_s)

        with bar:
            for i in batches:
                rows = slice(i, i + batch_size)
                denoiser = self.denoiser(
                    prompts[rows],
                    negative_prompts=negatives[rows],
                    guidance=sampling.guidance,
                    height=height,
                    width=width,
                    max_rows=max_rows,
                )
                part = None
                if edit is not None:
                    part = edit.rows(rows)
                    if known is None or len(edit.image) > 1:
                        known = self._encode(part.image, denoiser)
                with self._in_use(self.model.network, self.model.raw_network):
                    latents = self._sample(
                        *(denoiser, seeds[rows], shape, sampling, timesteps, after_step),
                        *(part, known),
                    )
                # One at a time: a decoder needs far more memory than the network.
                with self._in_use(self.model.codec):
                    decoded = [self.model.codec.decode(x[None])[0] for x in latents]
                for row, pixels in enumerate(decoded, start=i):
                    images.append(to_image(pixels if part is None else part.keep(pixels, row - i)))
                    images[-1].info["zsnr"] = json.dumps(
                        {
                            "prompt": prompts[row],
                            "negative_prompt": negatives[row],
                            "seed": seeds[row],
                            "height": height,
                            "width": width,
                            **facts,
                        }
                    )
        return images

    @torch.no_grad()
    def denoiser(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        guidance: Guidance | None = None,
        height: int | None = None,
        width: int | None = None,
        max_rows: int | None = None,
    ) -> Denoiser:
        """Return the guided denoiser of prompts, (x_t, t) -> x_0, for a custom sampling loop.

        It is the denoiser that `__call__` samples with. Call it within torch.no_grad(), and with
        offload move the network to the device first. Its latents
        have the shape `model.codec.latent_shape(height, width)`, one row for each prompt.

        Args:
            prompts: Text prompts.
            negative_prompts: Negative prompts, one for each prompt; "" = none. None = none at all.
            guidance: Guidance. None = that of the model, else scale 7.5 and rescale 0.7.
            height: Height in pixels, for networks that take sizes. None = the size that the model
                was trained at.
            width: Width in pixels, for networks that take sizes. None = the size that the model
                was trained at.
            max_rows: Largest number of rows of one network call, see `Denoiser`.

        Raises:
            ValueError: The lists have different lengths, or the guidance does not fit the model.
        """
        prompts, negatives = _prompts(prompts, negative_prompts)
        guidance = guidance or choose_sampling(self.model.sampling).guidance
        self._check_guidance(guidance, negatives)
        self.warn_of_cuts([*prompts, *negatives])
        size = self.model.image_size
        cond, uncond = self._conditioning(
            prompts,
            negatives,
            (size if height is None else height, size if width is None else width),
            guidance,
        )
        return Denoiser(
            self.network,
            self.model.schedule,
            self.model.prediction_type,
            cond,
            uncond,
            guidance,
            max_rows=max_rows,
            weak_network=self.model.raw_network if guidance.against == "raw" else None,
        )

    @contextmanager
    def _in_use(self, *parts: Any) -> Iterator[None]:
        """Have parts on the device while they are in use, where the others are offloaded."""
        parts = tuple(part for part in parts if part is not None and self._device is not None)
        try:
            for part in parts:
                part.to(self._device)
            yield
        finally:
            for part in parts:
                part.to("cpu")

    def describe(self, sampling: Sampling) -> dict[str, Any]:
        """Return all settings of an image except prompt, seed and size, as plain values."""
        from zsnr import __version__

        return {
            "model": self.name,
            **self.model.conditioner.configured,
            **({"loras": [lora.facts() for lora in self.loras]} if self.loras else {}),
            **describe_sampling(sampling),
            "prediction_type": self.model.prediction_type,
            "schedule": self.model.schedule.settings(),
            "zsnr_version": __version__,
        }

    def _check_guidance(self, guidance: Guidance, negatives: Sequence[str]) -> None:
        """Refuse guidance that does not fit this model or its negative prompts."""
        check_threshold(guidance, self.model.codec)
        if guidance.against != "raw":
            return
        if self.model.raw_network is None:
            raise ValueError(
                "Guidance against 'raw' needs the raw weights beside the averaged ones, and this "
                "model was loaded without them: load a .ckpt of training by "
                "TextToImage.from_pretrained(..., raw_beside=True)."
            )
        if any(negatives):
            raise ValueError(
                "Guidance against 'raw' leads away from raw weights, not from negative prompts: "
                "leave one of them out."
            )

    def _conditioning(
        self,
        prompts: list[str],
        negatives: list[str],
        size: tuple[int, int],
        guidance: Guidance,
    ) -> tuple[Conditioning, Conditioning | None]:
        """Encode the prompts and, with guidance, the negative prompts.

        A network that takes sizes gets those of an uncropped image of this size, for both.
        """
        conditioner = self.model.conditioner
        uncond = None
        with self._in_use(conditioner):
            cond = conditioner(prompts)
            if guidance.guides and guidance.against == "negative":
                uncond = conditioner.null().expand(len(prompts))
                if any(negatives):
                    nonempty = torch.tensor([text != "" for text in negatives])
                    uncond = conditioner(negatives).where(nonempty, uncond)
        if takes_sizes(self.model.network):
            sizes = torch.tensor([[*size, 0, 0, *size]], device=cond.device)
            sizes = sizes.expand(len(prompts), -1)
            cond = replace(cond, sizes=sizes)
            uncond = None if uncond is None else replace(uncond, sizes=sizes)
        return cond, uncond

    def _encode(self, images: Tensor, denoiser: Denoiser) -> Tensor:
        """Encode images (B, 3, H, W) to the means of their latents, one at a time."""
        codec = self.model.codec
        with self._in_use(codec):
            images = images.to(self._device_of(denoiser))
            return torch.cat([codec.latents(codec.encode(each[None])) for each in images])

    def _device_of(self, denoiser: Denoiser) -> torch.device:
        return self._device or denoiser.device or torch.device("cpu")

    def _sample(
        self,
        denoiser: Denoiser,
        seeds: list[int],
        shape: tuple[int, int, int],
        sampling: Sampling,
        timesteps: Tensor,
        callback: Callback,
        edit: Edit | None,
        known: Tensor | None,
    ) -> Tensor:
        """Sample latents, with an edit from the latents of its images."""
        assert isinstance(sampling.sampler, Sampler)
        schedule, noise = self.model.schedule, SampleNoise(seeds)
        # of the size that x_t of unit data has there: 1, but for flow that starts before T
        size = round(math.hypot(*schedule(timesteps.tolist()[0])), 9)
        x_T = size * noise.randn(shape, device=self._device_of(denoiser))
        conditioned: Denoiser | InpaintingDenoiser = denoiser
        if edit is not None and known is not None:
            known = known.expand_as(x_T)
            unknown = edit.repainted(*shape[1:])
            noisy = noised(known, x_T, *schedule(timesteps[:1].to(x_T.device)))
            if unknown is not None:
                unknown = unknown.to(x_T.device)
                conditioned = InpaintingDenoiser(
                    denoiser, schedule, known, unknown, edit.corrections
                )
            if edit.strength < 1:
                x_T = noisy
            elif unknown is not None:
                x_T = torch.where(unknown, x_T, noisy)
        return sampling.sampler.sample(
            conditioned,
            schedule,
            x_T,
            timesteps,
            randn_like=noise.randn_like,
            callback=callback,
        )


def check_raw_beside(source: str) -> None:
    """Refuse a source of weights that does not hold raw weights beside the averaged ones.

    Raises:
        ValueError: The source is not a checkpoint of this package.
    """
    if not is_checkpoint(source):
        raise ValueError(
            f"{source} holds one set of weights: guidance against 'raw' needs a checkpoint (.ckpt) "
            "that training wrote, with averaged and raw ones. Use guidance against 'negative'."
        )


def to_image(pixels: Tensor) -> Image:
    """Convert (3, H, W) in [-1, 1] to an 8-bit image; values outside are clamped."""
    from PIL import Image

    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def save_png(image: Image, path: str | Path) -> None:
    """Write an image with its `info["zsnr"]` as PNG text; a crash leaves no half-written file.

    Raises:
        TypeError: It is not an image of PIL.
    """
    import PIL.Image
    from PIL.PngImagePlugin import PngInfo

    if not isinstance(image, PIL.Image.Image):
        raise TypeError(
            f"save_png got a {type(image).__name__}: wanted an image of PIL, as "
            "zsnr.pipeline.to_image makes it of a tensor (3, H, W) in [-1, 1]."
        )
    info = PngInfo()
    if "zsnr" in image.info:
        info.add_text("zsnr", image.info["zsnr"])
    with replacing(Path(path)) as beside:
        image.save(beside, format="PNG", pnginfo=info)


def write_sample(image: Image, path: Path, manifest: Path) -> None:
    """Write an image of a pipeline, and its line of the manifest."""
    save_png(image, path)
    entry = {"file": path.name, **json.loads(image.info["zsnr"])}
    with open(manifest, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")


def _prompts(
    prompts: Sequence[str], negative_prompts: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Check prompts and negative prompts; missing negative prompts become empty ones."""
    prompts = _texts("prompts", prompts)
    if negative_prompts is None:
        return prompts, [""] * len(prompts)
    negatives = _texts("negative_prompts", negative_prompts)
    _check_count("negative_prompts", negatives, prompts)
    return prompts, negatives


def _check_count(name: str, values: Sequence[Any], prompts: Sequence[str]) -> None:
    if len(values) != len(prompts):
        raise ValueError(
            f"{len(values)} {name} for {len(prompts)} prompts: wanted one for each prompt."
        )


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}: wanted a list of strings, such as ['a black cat'].")
    return list(texts)
