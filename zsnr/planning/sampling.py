"""GPU memory that sampling needs, estimated without weights and without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from zsnr.checkpoints import Model
from zsnr.checkpoints.checkpoint_file import sampling_of
from zsnr.checkpoints.run_folder import resolve_model
from zsnr.codecs import AutoencoderKLCodec
from zsnr.guidance import Guidance
from zsnr.interop.models import choose_dtype, load_parts, read_model
from zsnr.pipeline import TextToImage
from zsnr.planning.estimate import GIB, modules_of, show_bytes, show_images, verdict
from zsnr.planning.memory import LiveBytes, fake_tensors, size_of, tensors_of, with_fake_tensors
from zsnr.prediction import PredictionType
from zsnr.sampling import choose_sampling
from zsnr.schedule import NoiseSchedule
from zsnr.weights.pretrained import loading_in, without_weights

PHASES = {
    "encoding": "text_encoder",
    "denoising": "network",
    "decoding": "vae",
}  # and the part in use


@dataclass(frozen=True)
class Request:
    """What is sampled, and how.

    Args:
        dtype: Data type of all parts, as `TextToImage.from_pretrained` takes it.
        offload: Whether only the part in use is on the GPU.
        vae: Another VAE, as `TextToImage.from_pretrained` takes it. None = the model's own.
        vae_tiling: Whether the VAE decodes in tiles.
        batch_size: Number of images sampled at a time.
        height: Height in pixels. None = the size that the model was trained at.
        width: Width in pixels. None = the size that the model was trained at.
        guidance_scale: The guidance scale; 1 = no guidance. None = as the model declares.
        max_rows: Largest number of rows of one call of the UNet. None = no limit.
        prediction_type: What the network predicts, on which the size of Stable Diffusion 2 depends.
            None = what the model declares.
    """

    dtype: str = "auto"
    offload: bool = False
    vae: str | None = None
    vae_tiling: bool = False
    batch_size: int = 1
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    max_rows: int | None = None
    prediction_type: PredictionType | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: wanted at least 1.")

    def size(self, model: Model) -> tuple[int, int]:
        """Return height and width in pixels."""
        height, width = self.height, self.width
        return (
            model.image_size if height is None else height,
            model.image_size if width is None else width,
        )

    def guidance(self, model: Model) -> Guidance:
        """Return a guidance that needs as much memory as that of the request."""
        changed = {} if self.guidance_scale is None else {"scale": self.guidance_scale}
        guidance = choose_sampling(model.sampling, guidance=changed).guidance
        return Guidance(against=guidance.against) if guidance.guides else Guidance(scale=1)


@dataclass(frozen=True)
class SamplingNeed:
    """Bytes on the GPU.

    Args:
        weights: Weights of each part: text_encoder, network, vae.
        working: Peak of live tensors other than weights in each phase: encoding, denoising,
            decoding.
    """

    weights: dict[str, int]
    working: dict[str, int]

    def peaks(self, offload: bool) -> dict[str, int]:
        """Return the peak of each phase, with the weights that are on the GPU."""
        everything = sum(self.weights.values())
        return {
            phase: self.working[phase] + (self.weights[part] if offload else everything)
            for phase, part in PHASES.items()
        }

    def total(self, offload: bool) -> int:
        """Return the largest peak."""
        return max(self.peaks(offload).values())


def read_weightless(source: str, request: Request) -> Model:
    """Read a model on the meta device, without weights, in the data types of sampling.

    Args:
        source: What `TextToImage.from_pretrained` takes.
        request: What is sampled.

    Raises:
        ValueError: It cannot be read.
    """
    source = resolve_model(source)
    chosen = choose_dtype(request.dtype, source, torch.device("cuda"))
    declared = choose_sampling(sampling_of(source)).guidance
    with torch.device("meta"), without_weights():
        with loading_in(chosen):
            model = read_model(
                source,
                NoiseSchedule(zero_terminal_snr=False),  # on which memory does not depend
                prediction_type=request.prediction_type,
                raw_beside=declared.against == "raw",
            )
        return load_parts(model, chosen, vae=request.vae, vae_tiling=request.vae_tiling)


def sampling_need(model: Model, request: Request) -> SamplingNeed:
    """Sample one step and decode one image with fake tensors.

    Args:
        model: A model on the meta device.
        request: What is sampled.

    Raises:
        ValueError: The size is not a multiple of the codec's factor; or the control flow of a part
            depends on the values of tensors.
    """
    height, width = request.size(model)
    shape = model.codec.latent_shape(height, width)
    guidance = request.guidance(model)
    prompts = [""] * request.batch_size
    negatives = ["negative"] * request.batch_size if guidance.against == "negative" else None
    with fake_tensors(), torch.no_grad():
        raw = model.raw_network
        model = replace(
            model,
            conditioner=with_fake_tensors(model.conditioner, [model.conditioner]),
            network=with_fake_tensors(model.network, [model.network]),
            raw_network=None if raw is None else with_fake_tensors(raw, [raw]),
            codec=with_fake_tensors(model.codec, modules_of(model.codec)),
        )
        parts = {
            "text_encoder": tensors_of(model.conditioner),
            "network": tensors_of(*filter(None, (model.network, model.raw_network))),
            "vae": tensors_of(*modules_of(model.codec)),
        }
        working = {}
        with LiveBytes(tensor for part in parts.values() for tensor in part) as live:
            denoiser = TextToImage(model).denoiser(
                prompts,
                negative_prompts=negatives,
                guidance=guidance,
                height=height,
                width=width,
                max_rows=request.max_rows,
            )
            working["encoding"] = live.restart()
            t = model.schedule.num_timesteps // 2  # where every guidance acts
            x_t = torch.empty(request.batch_size, *shape)
            x_0 = denoiser.at(t)(x_t, torch.full((request.batch_size,), t))
            working["denoising"] = live.restart()
            model.codec.decode(x_0[:1])
            working["decoding"] = live.restart()
    return SamplingNeed({name: size_of(part) for name, part in parts.items()}, working)


@dataclass(frozen=True)
class SamplingPlan:
    """The estimate for sampling.

    Args:
        request: What is sampled.
        need: Memory on the GPU.
        dtypes: Data type of each part that has weights.
        rows: Rows of one call of the UNet.
        height: Height in pixels.
        width: Width in pixels.
        memory: Bytes that may be used. None = unknown.
        way_out: What to change if it does not fit.
    """

    request: Request
    need: SamplingNeed
    dtypes: dict[str, str]
    rows: int
    height: int
    width: int
    memory: int | None
    way_out: str | None = None

    @property
    def total(self) -> int:
        """The largest peak."""
        return self.need.total(self.request.offload)

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices. None = the memory is unknown."""
        return None if self.memory is None else self.total <= self.memory

    def facts(self) -> dict[str, Any]:
        """Return the estimate as plain values; sizes in bytes."""
        return {
            **asdict(self.request),
            "height": self.height,
            "width": self.width,
            "rows": self.rows,
            "dtypes": self.dtypes,
            **asdict(self.need),
            "peaks": self.need.peaks(offload=False),
            "peaks_with_offload": self.need.peaks(offload=True),
            "total": self.total,
            "memory": self.memory,
            "fits": self.fits,
            "way_out": self.way_out,
        }

    def table(self) -> str:
        """Return the estimate as text, in lines of at most 100 characters."""
        request, need = self.request, self.need
        names = {"text_encoder": "text encoders", "network": "network", "vae": "VAE"}
        doing = {
            "encoding": f"encoding {request.batch_size} prompt{'s' * (request.batch_size > 1)}",
            "denoising": f"denoising, {self.rows} row{'s' * (self.rows > 1)}",
            "decoding": "decoding 1 image" + ", in tiles" * request.vae_tiling,
        }
        whole, offloaded = need.peaks(offload=False), need.peaks(offload=True)
        width = max(map(len, doing.values()))
        lines = [
            f"{show_images(request.batch_size)} of {self.width}x{self.height} at a time",
            "",
            "weights",
            *(
                f"  {names[part]:{width}}  {show_bytes(size):>10}  {self.dtypes[part]}"
                for part, size in need.weights.items()
                if part in self.dtypes
            ),
            "",
            f"{'peak':{width}}    {'working':>10}  {'with weights':>12}  {'--offload':>10}",
            *(
                f"  {doing[phase]:{width}}  {show_bytes(need.working[phase]):>10}  "
                f"{show_bytes(whole[phase]):>12}  {show_bytes(offloaded[phase]):>10}"
                for phase in PHASES
            ),
            "",
            f"total{' with --offload' * request.offload}: {show_bytes(self.total)}",
            *verdict(self.total, self.memory, self.way_out, on_gpu=True),
        ]
        return "\n".join(lines)


def plan_sampling(
    read: Callable[[Request], Model], request: Request, memory: float | None = None
) -> SamplingPlan:
    """Plan sampling.

    Args:
        read: Reads the model on the meta device in the data types of the request.
        request: What is sampled.
        memory: GiB that may be used. None = unlimited.

    Raises:
        ValueError: The model cannot be read or planned, or a size is wrong.
    """
    model = read(request)
    need = sampling_need(model, request)
    guidance = request.guidance(model)
    rows = request.batch_size * (1 + (guidance.guides and guidance.against == "negative"))
    height, width = request.size(model)
    limit = None if memory is None else round(memory * GIB)
    way_out = None
    if limit is not None and need.total(request.offload) > limit:
        way_out = _find_way_out(read, request, model, need, limit)
    return SamplingPlan(
        request=request,
        need=need,
        dtypes=_dtypes(model),
        rows=min(rows, request.max_rows or rows),
        height=height,
        width=width,
        memory=limit,
        way_out=way_out,
    )


def _find_way_out(
    read: Callable[[Request], Model],
    request: Request,
    model: Model,
    need: SamplingNeed,
    memory: int,
) -> str:
    """Describe in one line what to change so that it fits.

    Tried in this order: half precision, offloading, both, tiles too, smaller batches too.
    """
    half = request.dtype if _dtypes(model)["network"] in ("float16", "bfloat16") else "float16"
    least = replace(request, dtype=half, offload=True)
    tried = [replace(request, dtype=half), replace(request, offload=True), least]
    if isinstance(model.codec, AutoencoderKLCodec):
        least = replace(least, vae_tiling=True)
        tried.append(least)
    batch_size = request.batch_size
    while batch_size > 1:
        batch_size //= 2
        tried.append(replace(least, batch_size=batch_size))
    needs = {replace(request, offload=False): need}
    totals = []
    for other in tried:
        alike = replace(other, offload=False)
        if alike not in needs:
            needs[alike] = sampling_need(read(alike), alike)
        totals.append(needs[alike].total(other.offload))
        if totals[-1] <= memory:
            return f"way out: {_changes(request, other)}: {show_bytes(totals[-1])}"
    return f"no way out: {show_bytes(min(totals))} at least"


def _changes(request: Request, other: Request) -> str:
    changes = []
    if other.dtype != request.dtype:
        changes.append(f"--dtype {other.dtype}")
    if other.offload != request.offload:
        changes.append("--offload")
    if other.vae_tiling != request.vae_tiling:
        changes.append("--vae-tiling")
    if other.batch_size != request.batch_size:
        changes.append(f"--batch-size {other.batch_size}")
    return " ".join(changes)


def _dtypes(model: Model) -> dict[str, str]:
    """Name the data type of each part that has weights."""
    modules: dict[str, list[nn.Module]] = {
        "text_encoder": [model.conditioner],
        "network": [model.network],
        "vae": modules_of(model.codec),
    }
    found = {
        name: next((p.dtype for module in part for p in module.parameters()), None)
        for name, part in modules.items()
    }
    return {k: str(v).removeprefix("torch.") for k, v in found.items() if v is not None}
