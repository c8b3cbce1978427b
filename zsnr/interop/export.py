"""Export of a model as a diffusers folder that every diffusers pipeline samples correctly."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from zsnr.checkpoints.checkpoint_file import KEY, describe_model, open_checkpoint, read_checkpoint
from zsnr.checkpoints.exported_sampling import write_folder_settings
from zsnr.checkpoints.model import Model, as_unet
from zsnr.checkpoints.run_facts import published, read_run_facts
from zsnr.checkpoints.run_folder import is_checkpoint
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import (
    Conditioner,
    OpenClipConditioner,
    SDXLConditioner,
    TransformersConditioner,
)
from zsnr.conditioning.tokenizers import BPE, PADDING, Tokenizer
from zsnr.files import check_new, new_folder
from zsnr.interop.card import model_card
from zsnr.interop.diffusers_folder import read_diffusers_folder, text_problem, used_layers
from zsnr.interop.lora import merge
from zsnr.interop.scheduler_config import scheduler_config
from zsnr.interop.single_file import read_single_file
from zsnr.lora import is_adapted
from zsnr.prediction import PredictionType
from zsnr.schedule import Schedule, schedule_from_settings
from zsnr.weights.ldm_layout import from_ldm, ldm_names
from zsnr.weights.pretrained import Precision, as_dtype, cast_weight, read_config
from zsnr.weights.source import is_single_file, local_path

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline

Form = Literal["diffusers", "single-file", "lora"]


def export_diffusers(
    model: Model,
    folder: str | Path,
    *,
    dtype: Precision = "float32",
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that diffusers' StableDiffusion(XL)Pipeline reads, with a model card.

    How the model is sampled and reads prompts is in `zsnr.json`, which diffusers does not read.
    The folder gets its name once it is complete. The model is not changed.

    Args:
        model: The model, with weights on any device.
        folder: Output folder, which must not exist.
        dtype: Data type of the weights. A VAE that overflows in float16 (`force_upcast`) stays in
            float32.
        facts: Facts about the run for the model card; see `model_card`.

    Raises:
        ValueError: The folder exists, or the model has a part that such a folder cannot hold.
    """
    import diffusers

    folder = Path(folder)
    check_new(folder)
    stored = as_dtype(dtype)
    declared = scheduler_config(model.schedule, model.prediction_type)
    check_exportable(describe_model(model))
    scheduler = getattr(diffusers, declared["_class_name"]).from_config(declared)
    pipeline = _pipeline(model, scheduler, stored)
    with new_folder(folder) as beside:
        pipeline.save_pretrained(beside, safe_serialization=True)
        for encoder in beside.glob("text_encoder*/config.json"):
            _load_in_float32(encoder)
        write_folder_settings(beside, model)
        card_facts = {
            **(facts or {}),
            "schedule": model.schedule.settings(),
            "prediction_type": model.prediction_type,
            "image_size": model.image_size,
            "dtype": str(stored).removeprefix("torch."),
            "pipeline": type(pipeline).__name__,
        }
        (beside / "README.md").write_text(model_card(folder.name, card_facts), encoding="utf-8")


def read_exportable(
    source: str,
    *,
    ema: bool = True,
    base: str | None = None,
    merged: bool = False,
    form: Form = "diffusers",
    schedule: Schedule | None = None,
    prediction_type: PredictionType | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Read a model to export, and the facts about it.

    Args:
        source: A checkpoint of this package (file or sharded folder), a diffusers folder, a hub
            id, or a single file in the ldm layout.
        ema: For a checkpoint, use the averaged weights, else the raw ones.
        base: For a checkpoint of adapters, path of the base model, if it has moved.
        merged: Merge the adapters.
        form: Output format; models that it cannot hold are refused before weights are read.
        schedule: Schedule of a folder or file that does not declare the right one.
        prediction_type: Prediction type of such a folder or file.

    Returns:
        The model, and facts for `model_card` that contain no paths of this machine.

    Raises:
        ValueError: The source is not readable, the form cannot hold the model, or adapters are
            requested and it has none.
    """
    path = Path(source).expanduser()
    if is_checkpoint(path):
        if schedule is not None or prediction_type is not None:
            raise ValueError(f"{source} records its schedule and prediction type: give neither.")
        checkpoint = open_checkpoint(path)
        adapted = is_adapted(checkpoint[KEY]["network"])
        if (merged or form == "lora") and not adapted:
            raise ValueError(
                f"{source} has no adapters, because it was not trained with model.lora: export the "
                "whole model, without --merge."
            )
        if form == "diffusers":
            check_exportable(checkpoint[KEY], merged=merged)
        elif form == "single-file" and not merged:
            check_merged(checkpoint[KEY])
        beside = read_run_facts(path.resolve().parent) or {}
        run = checkpoint.get("run") or {}
        averaged = run.get("averaged") is not None  # by `zsnr checkpoint average`
        if averaged and not ema:
            raise ValueError(f"{source} has averaged weights alone: omit --raw.")
        if averaged or beside.get("global_step") != checkpoint.get("global_step"):
            beside = run or beside  # run.json is that of a later checkpoint
        facts = published(beside)
        facts["global_step"] = checkpoint.get("global_step")
        if "ema" in facts:
            is_average = averaged or (ema and facts["ema"] is not None)
            facts["weights"] = "averaged" if is_average else "raw"
        model = read_checkpoint(path, ema=ema, base=base)
        return (merge(model) if merged else model), facts
    if form == "lora":
        raise ValueError(f"{source} is not a checkpoint of zsnr: it has no adapters to write.")
    for option, is_set in (("--raw", not ema), ("--merge", merged), ("--base", base is not None)):
        if is_set:
            raise ValueError(
                f"{source} is not a checkpoint of zsnr, and has one set of weights: omit {option}."
            )
    facts = {"start": path.resolve().name if path.exists() else source}
    if is_single_file(str(path)):
        return read_single_file(str(path), schedule, prediction_type), facts
    folder = str(path) if path.exists() else source
    return read_diffusers_folder(folder, schedule, prediction_type), facts


def check_merged(description: Mapping[str, Any]) -> None:
    """Refuse a UNet with adapters.

    Args:
        description: The result of `describe_model`, or a checkpoint's description.

    Raises:
        ValueError: The UNet has adapters.
    """
    if is_adapted(description["network"]):
        raise ValueError(
            "The UNet has LoRA adapters: merge them (`zsnr export --merge`, or "
            "zsnr.interop.lora.merge), or write only the adapters (`--format lora`)."
        )


def check_exportable(description: Mapping[str, Any], *, merged: bool = False) -> None:
    """Refuse what a Stable Diffusion pipeline cannot hold; loads no weights.

    Args:
        description: The result of `describe_model`, or a checkpoint's description.
        merged: Whether its adapters will be merged.

    Raises:
        ValueError: A part, the schedule or the prediction type cannot be held.
    """
    schedule = schedule_from_settings(description["schedule"])
    scheduler_config(schedule, description["prediction_type"])
    if not merged:
        check_merged(description)
    if _name(description["network"]) not in ("UNet", "AdaptedUNet"):
        raise ValueError(
            f"The network is a {_name(description['network'])}, but a Stable Diffusion pipeline "
            "holds a UNet of diffusers. zsnr.pipeline.TextToImage samples the checkpoint without "
            "export."
        )
    codec, conditioner = description["codec"], description["conditioner"]
    if not _is(codec, AutoencoderKLCodec):
        raise ValueError(
            f"The codec is a {_name(codec)}, but a Stable Diffusion pipeline decodes with an "
            "AutoencoderKL: train with an AutoencoderKLCodec, such as asset:openmoji_vae, to "
            "export. zsnr.pipeline.TextToImage samples the checkpoint without export."
        )
    unet = description["network"].get("init_args", {}).get("config") or {}
    if _is(conditioner, SDXLConditioner):
        kind = unet.get("addition_embed_type", "text_time")
        if kind != "text_time":
            raise ValueError(
                f"The UNet has addition_embed_type={kind!r}, but StableDiffusionXLPipeline passes "
                "a pooled embedding and sizes: train one with 'text_time', such as SDXL's, to "
                "export."
            )
        return
    if _is(conditioner, TransformersConditioner):
        _check_text(conditioner["init_args"])
    elif not _is(conditioner, OpenClipConditioner):
        raise ValueError(
            f"The conditioner is a {_name(conditioner)}, but a Stable Diffusion pipeline encodes "
            "prompts with a CLIP text model: train with a TransformersConditioner or an "
            "OpenClipConditioner, or for SDXL an SDXLConditioner, to export."
        )
    for key, fine in (("addition_embed_type", (None, "text")), ("class_embed_type", (None,))):
        if unet.get(key) not in fine:
            raise ValueError(
                f"The UNet has {key}={unet[key]!r}, whose input StableDiffusionPipeline does not "
                "provide: export such a model with the conditioner it was made for."
            )


def _check_text(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a TransformersConditioner that the pipeline does not have."""
    config = settings.get("config")
    if config is None:
        config = read_config(str(settings.get("pretrained")), settings.get("subfolder")) or {}
    problem = text_problem(settings, config.get("model_type", "clip_text_model"))
    if problem is not None:
        raise ValueError(f"The model cannot be a Stable Diffusion pipeline: it has {problem}.")


def _is(described: Mapping[str, Any], cls: type[Any]) -> bool:
    return str(described["class_path"]) == f"{cls.__module__}.{cls.__qualname__}"


def _name(described: Mapping[str, Any]) -> str:
    return str(described["class_path"]).rpartition(".")[2]


def _pipeline(model: Model, scheduler: Any, dtype: torch.dtype) -> DiffusionPipeline:
    """Assemble copies of the parts, which share tensors if the dtype allows it."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    assert isinstance(model.codec, AutoencoderKLCodec)
    conditioner = getattr(model.conditioner, "described", model.conditioner)
    conditioner.load()
    parts = {"vae": _vae(model.codec, dtype), "unet": _unet(model, dtype), "scheduler": scheduler}
    if isinstance(conditioner, SDXLConditioner):
        for end, tokenize in zip(("", "_2"), conditioner.tokenizer.tokenizers, strict=True):
            encoder, source = getattr(conditioner, f"encoder{end}"), conditioner.settings()
            tokenizer = _tokenizer(
                source["pretrained"], f"tokenizer{end}", conditioner.max_length, tokenize
            )
            config, state = _config(encoder), dict(encoder.state_dict())
            parts[f"text_encoder{end}"] = _encoder(type(encoder), config, state, tokenizer, dtype)
            parts[f"tokenizer{end}"] = tokenizer
        return StableDiffusionXLPipeline(
            **parts,
            force_zeros_for_empty_prompt=conditioner.settings()["zero_null"],
            add_watermarker=False,
        )
    if parts["vae"].config["latents_mean"] is not None:
        raise ValueError(
            "The VAE has latents_mean and latents_std, which StableDiffusionPipeline ignores: "
            "train with another VAE to export."
        )
    encoder, tokenizer = _text_encoder(conditioner, dtype)
    return StableDiffusionPipeline(
        **parts,
        text_encoder=encoder,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _load_in_float32(config: Path) -> None:
    """Make float32 a text encoder's default dtype, which is diffusers' default for other parts.

    Otherwise transformers would use the file's dtype, and a pipeline of mixed precision fails.
    """
    settings = json.loads(config.read_text(encoding="utf-8"))
    text = json.dumps({**settings, "dtype": "float32"}, indent=2)
    config.write_text(text + "\n", encoding="utf-8")


def _unet(model: Model, dtype: torch.dtype) -> nn.Module:
    unet = as_unet(model.network, "A Stable Diffusion pipeline").unet
    config = {**unet.config, "sample_size": model.image_size // model.codec.factor}
    return _copy(type(unet), config, unet.state_dict(), dtype)


def _vae(codec: AutoencoderKLCodec, dtype: torch.dtype) -> AutoencoderKL:
    """Copy the VAE with the codec's scale; its shift moves into the 1x1 convolutions.

    Stable Diffusion pipelines have no shift. raw = latents / scale + shift, and the first layer of
    the decoder is linear in raw, so the shift is absorbed into that layer's bias.
    """
    loaded = AutoencoderKLCodec(**{**codec.settings(), "dtype": "float32"}).load()
    vae = loaded.vae
    config = {**vae.config, "scaling_factor": codec.scale, "shift_factor": None}
    state = vae.state_dict()
    if codec.shift:
        if not (config["use_quant_conv"] and config["use_post_quant_conv"]):
            raise ValueError(
                f"The codec has shift={codec.shift:g}, which Stable Diffusion pipelines ignore, "
                "and its VAE has no quant_conv and post_quant_conv to absorb it: train with "
                "shift: 0 to export."
            )
        out = state["post_quant_conv.weight"].double().sum((1, 2, 3)) * codec.shift
        state["post_quant_conv.bias"] = (state["post_quant_conv.bias"].double() + out).float()
        moments = state["quant_conv.bias"].clone()
        moments[: codec.channels] -= codec.shift
        state["quant_conv.bias"] = moments
    overflows = dtype == torch.float16 and config["force_upcast"]
    return _copy(type(vae), config, state, torch.float32 if overflows else dtype)


def _text_encoder(conditioner: Conditioner, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Return a CLIP text encoder whose last hidden state is the context, and its tokenizer."""
    from transformers import CLIPTextModel

    if isinstance(conditioner, OpenClipConditioner):
        config, state = _open_clip_tower(conditioner)
        tokenizer = _clip_tokenizer("open_clip", conditioner.max_length)
    else:
        assert isinstance(conditioner, TransformersConditioner)
        config, state = _clip_text_model(conditioner)
        settings = conditioner.settings()
        source, subfolder = (
            settings["tokenizer"] or settings["pretrained"],
            settings["tokenizer_subfolder"],
        )
        tokenizer = _tokenizer(source, subfolder, conditioner.max_length, conditioner.tokenize)
    return _encoder(CLIPTextModel, config, state, tokenizer, dtype), tokenizer


def _encoder(
    cls: Any, config: Any, state: dict[str, Tensor], tokenizer: Any, dtype: torch.dtype
) -> nn.Module:
    """Build a CLIP text model around existing weights, without copying them."""
    with torch.device("meta"):
        copied: nn.Module = cls(config)
    if not any(name.startswith("text_model.") for name in copied.state_dict()):
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    if tokenizer.pad_token == PADDING:
        [name] = [name for name in state if name.endswith("token_embedding.weight")]
        state[name] = state[name].clone()
        state[name][tokenizer.pad_token_id] = state[name][0]
    _fill(copied, state, dtype)
    return copied


def _config(encoder: nn.Module) -> Any:
    """Copy a config, without the path its weights came from."""
    config = copy.deepcopy(encoder.config)
    config._name_or_path = ""  # type: ignore[union-attr]
    return config


def _clip_text_model(conditioner: TransformersConditioner) -> tuple[Any, dict[str, Tensor]]:
    """Return config and weights, without the layers after the one that the context is from."""
    from transformers import CLIPTextModel

    encoder = conditioner.encoder
    if not isinstance(encoder, CLIPTextModel):
        raise ValueError(
            f"The text encoder is a {type(encoder).__name__}: wanted a CLIPTextModel to export."
        )
    config = _config(encoder)
    config.num_hidden_layers = used_layers(conditioner)  # the final norm follows the last one
    return config, dict(encoder.state_dict())


def _open_clip_tower(conditioner: OpenClipConditioner) -> tuple[Any, dict[str, Tensor]]:
    """Return config and weights of open_clip's text tower in transformers' names."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tower, blocks = conditioner, list(conditioner.transformer.resblocks)
    if conditioner.layer == "penultimate":
        blocks = blocks[:-1]
    first = blocks[0]
    vocabulary, width = tower.token_embedding.weight.shape
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=first.mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=first.attn.num_heads,
        max_position_embeddings=len(tower.positional_embedding),
        hidden_act="gelu" if isinstance(first.mlp.gelu, nn.GELU) else "quick_gelu",
        layer_norm_eps=first.ln_1.eps,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
    )
    with torch.device("meta"):
        names = ldm_names("open_clip", CLIPTextModel(config).state_dict(), config.to_dict())
    weights = tower.state_dict()
    return config, {
        name: from_ldm(name, ldm_name, weights[ldm_name]) for name, ldm_name in names.items()
    }


def _tokenizer(source: str, subfolder: str | None, length: int, tokenize: Tokenizer) -> Any:
    """Make or load the transformers tokenizer that corresponds to `tokenize`."""
    from transformers import AutoTokenizer

    if source in BPE or is_single_file(source):  # a single file always uses CLIP's tokenizer
        [ids] = tokenize([""])[0].tolist()
        return _clip_tokenizer("open_clip" if ids[-1] == 0 else "clip", length)
    tokenizer = AutoTokenizer.from_pretrained(
        str(local_path(source, subfolder)), subfolder=subfolder or "", trust_remote_code=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = length
    return tokenizer


def _clip_tokenizer(kind: Literal["open_clip", "clip"], length: int) -> Any:
    """Make transformers' CLIP tokenizer from the vocabulary in the package open_clip."""
    import open_clip
    from transformers import CLIPTokenizer

    bpe = open_clip.SimpleTokenizer(context_length=length)
    names = {bpe.sot_token_id: "<|startoftext|>", bpe.eot_token_id: "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={names.get(i, token): i for token, i in bpe.encoder.items()},
        merges=list(bpe.bpe_ranks),
        pad_token=PADDING if kind == "open_clip" else "<|endoftext|>",
        model_max_length=length,
    )


def _copy(
    cls: Any, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """Build a diffusers model around existing weights, cast to a dtype."""
    with torch.device("meta"):
        copied: nn.Module = cls.from_config({k: v for k, v in config.items() if k[0] != "_"})
    _fill(copied, state, dtype)
    return copied


def _fill(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    names = module.state_dict().keys()
    tensors = {k: cast_weight(k, v, dtype) for k, v in state.items() if k in names}
    module.load_state_dict(tensors, assign=True)
    module.eval()
