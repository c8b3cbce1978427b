"""Writing a model as a folder of diffusers that every pipeline there samples right."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from zsnr.checkpoints.card import model_card
from zsnr.checkpoints.checkpoint_file import KEY, describe_model, open_checkpoint, read_checkpoint
from zsnr.checkpoints.diffusers_folder import read_diffusers_folder
from zsnr.checkpoints.lora import merge
from zsnr.checkpoints.model import Model
from zsnr.checkpoints.run_facts import published, read_run_facts
from zsnr.checkpoints.scheduler_config import scheduler_config
from zsnr.checkpoints.sharded import is_sharded
from zsnr.checkpoints.single_file import read_single_file
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import (
    Conditioner,
    OpenClipConditioner,
    SDXLConditioner,
    TransformersConditioner,
)
from zsnr.conditioning.tokenizers import BPE, PADDING, Tokenizer
from zsnr.files import check_new, new_folder
from zsnr.ldm_file import is_single_file
from zsnr.lora import is_adapted
from zsnr.pretrained import Precision, cast_weight, check_precision, read_config

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

    The folder appears under its name when it is complete. The model stays as it is.

    Args:
        model: Its weights may be on any device.
        folder: Where to; must not exist.
        dtype: Of the weights. A VAE that overflows in float16 (`force_upcast`) stays float32.
        facts: What is known of the run, for the card; see `model_card`.

    Raises:
        ValueError: The folder exists, or the model has a part that such a folder cannot hold.
    """
    from diffusers import DDIMScheduler

    folder = Path(folder)
    check_new(folder)
    check_precision(dtype)
    check_exportable(describe_model(model))
    scheduler = DDIMScheduler.from_config(scheduler_config(model.schedule, model.prediction_type))
    pipeline = _pipeline(model, scheduler, getattr(torch, dtype))
    with new_folder(folder) as beside:
        pipeline.save_pretrained(beside, safe_serialization=True)
        for config in beside.glob("text_encoder*/config.json"):
            _load_in_float32(config)
        known = {
            **(facts or {}),
            "schedule": model.schedule.settings(),
            "prediction_type": model.prediction_type,
            "image_size": model.image_size,
            "dtype": dtype,
            "pipeline": type(pipeline).__name__,
        }
        (beside / "README.md").write_text(model_card(folder.name, known), encoding="utf-8")


def read_exportable(
    source: str,
    *,
    ema: bool = True,
    base: str | None = None,
    merged: bool = False,
    form: Form = "diffusers",
) -> tuple[Model, dict[str, Any]]:
    """Read a model to export, and what is known of it.

    Args:
        source: A checkpoint of this package, file or shards, a folder of diffusers or a hub id, or
            a single file in the ldm layout.
        ema: Of a checkpoint, take the averaged weights, else the raw ones.
        base: Of a checkpoint of adapters, where the model under them is, if it has moved.
        merged: Merge its adapters.
        form: What it is read for; what that cannot hold is refused before weights are read.

    Returns:
        The model, and facts for `model_card` that tell no places on this machine.

    Raises:
        ValueError: Nothing readable is there, the form cannot hold it, or it has no adapters where
            they are asked for.
    """
    path = Path(source).expanduser()
    if path.suffix == ".ckpt" or is_sharded(path):
        checkpoint = open_checkpoint(path)
        adapted = is_adapted(checkpoint[KEY]["unet"])
        if (merged or form == "lora") and not adapted:
            raise ValueError(
                f"{source} has no adapters, it was not trained with model.lora: export the whole "
                "of it, without --merge."
            )
        if form == "diffusers":
            check_exportable(checkpoint[KEY], merged=merged)
        elif form == "single-file" and not merged:
            check_merged(checkpoint[KEY])
        beside = read_run_facts(path.resolve().parent) or {}
        if beside.get("global_step") != checkpoint.get("global_step"):  # a later checkpoint's
            beside = checkpoint.get("run") or beside
        facts = published(beside)
        facts["global_step"] = checkpoint.get("global_step")
        if "ema" in facts:
            facts["weights"] = "averaged" if ema and facts["ema"] is not None else "raw"
        model = read_checkpoint(path, ema=ema, base=base)
        return (merge(model) if merged else model), facts
    if form == "lora":
        raise ValueError(f"{source} is not a checkpoint of zsnr: it has no adapters to write.")
    for option, given in (("--raw", not ema), ("--merge", merged), ("--base", base is not None)):
        if given:
            raise ValueError(
                f"{source} is not a checkpoint of zsnr, and has one set of weights: leave {option} "
                "out."
            )
    facts = {"start": path.resolve().name if path.exists() else source}
    if is_single_file(str(path)):
        return read_single_file(str(path)), facts
    return read_diffusers_folder(str(path) if path.exists() else source), facts


def check_merged(description: Mapping[str, Any]) -> None:
    """Refuse adapters beside a UNet.

    Args:
        description: What `describe_model` returned, or a checkpoint stores.

    Raises:
        ValueError: There are some.
    """
    if is_adapted(description["unet"]):
        raise ValueError(
            "The UNet carries LoRA adapters: merge them (`zsnr export --merge`, or "
            "zsnr.checkpoints.lora.merge), or write them alone (`--format lora`)."
        )


def check_exportable(description: Mapping[str, Any], *, merged: bool = False) -> None:
    """Refuse parts that a Stable Diffusion pipeline cannot hold; loads no weights.

    Args:
        description: What `describe_model` returned, or a checkpoint stores.
        merged: Its adapters will be merged.

    Raises:
        ValueError: There is one; names it and the way out.
    """
    if not merged:
        check_merged(description)
    codec, conditioner = description["codec"], description["conditioner"]
    if not _is(codec, AutoencoderKLCodec):
        raise ValueError(
            f"The codec is a {_name(codec)}, but a Stable Diffusion pipeline decodes with an "
            "AutoencoderKL: train with an AutoencoderKLCodec, such as asset:openmoji_vae, to "
            "export. zsnr.pipeline.TextToImage samples the checkpoint as it is."
        )
    unet = description["unet"].get("init_args", {}).get("config") or {}
    if _is(conditioner, SDXLConditioner):
        kind = unet.get("addition_embed_type", "text_time")
        if kind != "text_time":
            raise ValueError(
                f"The UNet has addition_embed_type={kind!r}, but StableDiffusionXLPipeline tells "
                "it a pooled embedding and sizes: train one with 'text_time', such as SDXL's, to "
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
                f"The UNet has {key}={unet[key]!r}, which StableDiffusionPipeline does not feed: "
                "export such a model with the conditioner it belongs to."
            )


def _check_text(own: Mapping[str, Any]) -> None:
    """Refuse settings of a TransformersConditioner that the pipeline does not have."""
    config = own.get("config")
    if config is None:
        config = read_config(str(own.get("pretrained")), own.get("subfolder")) or {}
    model_type = config.get("model_type", "clip_text_model")
    if model_type not in ("clip", "clip_text_model"):
        raise ValueError(
            f"The text encoder is of type {model_type!r}, but a Stable Diffusion pipeline holds a "
            "CLIP text model ('clip_text_model'): train with one to export."
        )
    if own.get("use_mask"):
        raise ValueError(
            "The text encoder was used with use_mask: true, but a Stable Diffusion pipeline shows "
            "padding to the UNet: its pictures would be others. Train with use_mask: false to "
            "export."
        )
    if own.get("layer", -1) != -1 and not own.get("final_norm", True):
        raise ValueError(
            f"The context is hidden state {own['layer']} without the final norm, but a Stable "
            "Diffusion pipeline always applies it: train with final_norm: true to export."
        )


def _is(described: Mapping[str, Any], cls: type[Any]) -> bool:
    return str(described["class_path"]) == f"{cls.__module__}.{cls.__qualname__}"


def _name(described: Mapping[str, Any]) -> str:
    return str(described["class_path"]).rpartition(".")[2]


def _pipeline(model: Model, scheduler: Any, dtype: torch.dtype) -> DiffusionPipeline:
    """Put copies of the parts, whose tensors are shared where the dtype allows, together."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    assert isinstance(model.codec, AutoencoderKLCodec)
    conditioner = getattr(model.conditioner, "described", model.conditioner)
    conditioner.load()
    parts = {"vae": _vae(model.codec, dtype), "unet": _unet(model, dtype), "scheduler": scheduler}
    if isinstance(conditioner, SDXLConditioner):
        for end, tokenize in zip(("", "_2"), conditioner._tokenizers, strict=True):
            encoder, source = getattr(conditioner, f"encoder{end}"), conditioner.settings()
            tokenizer = _tokenizer(
                source["pretrained"], f"tokenizer{end}", conditioner._max_length, tokenize
            )
            config, state = _config(encoder), dict(encoder.state_dict())
            parts[f"text_encoder{end}"] = _encoder(type(encoder), config, state, tokenizer, dtype)
            parts[f"tokenizer{end}"] = tokenizer
        return StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=conditioner._zero_null, add_watermarker=False
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
    """Let transformers load a text encoder as diffusers loads the rest, in float32 unless told.

    It would else take the dtype in the file, and a pipeline of half and single precision fails.
    """
    settings = json.loads(config.read_text(encoding="utf-8"))
    text = json.dumps({**settings, "dtype": "float32"}, indent=2)
    config.write_text(text + "\n", encoding="utf-8")


def _unet(model: Model, dtype: torch.dtype) -> nn.Module:
    unet = model.unet.unet
    config = {**unet.config, "sample_size": model.image_size // model.codec.factor}
    return _copy(type(unet), config, unet.state_dict(), dtype)


def _vae(codec: AutoencoderKLCodec, dtype: torch.dtype) -> AutoencoderKL:
    """Copy the VAE with the codec's scale; its shift moves into the 1x1 convolutions.

    Stable Diffusion pipelines know no shift. raw = latents / scale + shift, and the first layer of
    the decoder is linear in raw, so the shift is a change of that layer's bias.
    """
    whole = AutoencoderKLCodec(**{**codec.settings(), "dtype": "float32"}).load()
    vae = whole._vae
    config = {**vae.config, "scaling_factor": codec.scale, "shift_factor": None}
    state = vae.state_dict()
    if codec.shift:
        if not (config["use_quant_conv"] and config["use_post_quant_conv"]):
            raise ValueError(
                f"The codec has shift={codec.shift:g}, which Stable Diffusion pipelines ignore, "
                "and its VAE has no quant_conv and post_quant_conv to put it into: train with "
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
    """Copy a CLIP text encoder so that its last hidden state is the context, and its tokenizer."""
    from transformers import CLIPTextModel

    if isinstance(conditioner, OpenClipConditioner):
        config, state = _open_clip_tower(conditioner)
        tokenizer = _clip_tokenizer("open_clip", conditioner.max_length)
    else:
        assert isinstance(conditioner, TransformersConditioner)
        config, state = _clip_text_model(conditioner)
        own = conditioner.settings()
        source, subfolder = own["tokenizer"] or own["pretrained"], own["tokenizer_subfolder"]
        tokenizer = _tokenizer(source, subfolder, conditioner.max_length, conditioner.tokenize)
    return _encoder(CLIPTextModel, config, state, tokenizer, dtype), tokenizer


def _encoder(
    cls: Any, config: Any, state: dict[str, Tensor], tokenizer: Any, dtype: torch.dtype
) -> nn.Module:
    """Build a CLIP text model around weights, without memory of its own."""
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
    """Copy a config, without the place its weights came from."""
    config = copy.deepcopy(encoder.config)
    config._name_or_path = ""  # type: ignore[union-attr]
    return config


def _clip_text_model(conditioner: TransformersConditioner) -> tuple[Any, dict[str, Tensor]]:
    """Return config and weights, without the layers behind the one that the context is from."""
    from transformers import CLIPTextModel

    encoder = conditioner.encoder
    if not isinstance(encoder, CLIPTextModel):
        raise ValueError(
            f"The text encoder is a {type(encoder).__name__}: wanted a CLIPTextModel to export."
        )
    config = _config(encoder)
    layer = conditioner.settings()["layer"]
    if layer != -1:  # the final norm follows the last layer that is left
        depth = config.num_hidden_layers
        config.num_hidden_layers = depth + 1 + layer if layer < 0 else layer
    return config, dict(encoder.state_dict())


def _open_clip_tower(conditioner: OpenClipConditioner) -> tuple[Any, dict[str, Tensor]]:
    """Return config and weights of open_clip's text tower in transformers' names."""
    from transformers import CLIPTextConfig

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
    state = {
        "text_model.embeddings.token_embedding.weight": tower.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": tower.positional_embedding,
    }
    parts: dict[str, nn.Module] = {"text_model.final_layer_norm": tower.ln_final}
    for i, block in enumerate(blocks):
        layer, own = f"text_model.encoder.layers.{i}", dict(block.attn.named_parameters())
        parts[f"{layer}.layer_norm1"], parts[f"{layer}.layer_norm2"] = block.ln_1, block.ln_2
        parts[f"{layer}.mlp.fc1"], parts[f"{layer}.mlp.fc2"] = block.mlp.c_fc, block.mlp.c_proj
        parts[f"{layer}.self_attn.out_proj"] = block.attn.out_proj
        for kind in ("weight", "bias"):
            for name, third in zip("qkv", own[f"in_proj_{kind}"].chunk(3), strict=True):
                state[f"{layer}.self_attn.{name}_proj.{kind}"] = third
    for name, part in parts.items():
        state |= {f"{name}.{kind}": tensor for kind, tensor in part.state_dict().items()}
    return config, state


def _tokenizer(source: str, subfolder: str | None, length: int, tokenize: Tokenizer) -> Any:
    """Make or load the tokenizer that `tokenize` stands for as one of transformers."""
    from transformers import AutoTokenizer

    if source in BPE or is_single_file(source):  # which has no tokenizer but CLIP's
        [ids] = tokenize([""])[0].tolist()
        return _clip_tokenizer("open_clip" if ids[-1] == 0 else "clip", length)
    tokenizer = AutoTokenizer.from_pretrained(source, subfolder=subfolder or "")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = length
    return tokenizer


def _clip_tokenizer(kind: Literal["open_clip", "clip"], length: int) -> Any:
    """Make CLIP's tokenizer of transformers from the vocabulary that open_clip ships."""
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
    """Build a model of diffusers around weights, in a dtype, without memory of its own."""
    with torch.device("meta"):
        copied: nn.Module = cls.from_config({k: v for k, v in config.items() if k[0] != "_"})
    _fill(copied, state, dtype)
    return copied


def _fill(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    wanted = module.state_dict().keys()
    tensors = {k: cast_weight(k, v, dtype) for k, v in state.items() if k in wanted}
    module.load_state_dict(tensors, assign=True)
    module.eval()
