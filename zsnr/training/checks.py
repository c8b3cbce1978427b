"""Settings of a model that contradict each other, or the checkpoint that a run resumes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zsnr.guidance import Guidance
from zsnr.lora import LoRA, require_peft
from zsnr.loss import LossWeighting
from zsnr.networks import network_folder
from zsnr.prediction import PredictionType, check_prediction_type
from zsnr.schedule import Schedule
from zsnr.timestep_law import TimestepLaw
from zsnr.timesteps import get_timesteps


def check_settings(
    schedule: Schedule,
    prediction_type: PredictionType,
    loss: LossWeighting,
    timestep_law: TimestepLaw,
    spacing: str,
    num_steps: int,
) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        ValueError: The network predicts epsilon at zero SNR, the loss has no weight at the last
            timestep, training hardly ever visits it, or the schedule has no such grid of sampling
            timesteps.
    """
    check_prediction_type(prediction_type, schedule)
    loss.table(schedule, prediction_type)
    timestep_law.check(schedule.num_timesteps)
    get_timesteps(spacing, num_steps, schedule.num_timesteps, schedule=schedule)


def check_guidance(guidance: Guidance, averaged: bool) -> None:
    """Refuse guidance by the difference of raw and averaged weights where none are averaged.

    Raises:
        ValueError: guidance.against is "raw", and the weights are not averaged.
    """
    if guidance.against == "raw" and not averaged:
        raise ValueError(
            "model.sampling.guidance.against: raw guides from the raw weights to the averaged "
            "ones, but model.ema is null: set model.ema, or guide against negative."
        )


def check_lora(network: Any, trains_text: bool) -> None:
    """Refuse LoRA without a pretrained UNet, or with a text encoder whose weights are trained.

    Nothing is loaded.

    Args:
        network: The setting model.network.
        trains_text: Whether the text encoder is trained.

    Raises:
        ValueError: One of them is so, or peft is not installed.
    """
    if not isinstance(network, str):
        raise ValueError(
            "model.lora adapts a pretrained UNet, but model.network is the size of a new one or "
            "another class: set model.network to the folder or hub id of a model, or train without "
            "model.lora."
        )
    if network_folder(network) != "unet":
        raise ValueError(
            f"model.lora adapts UNets only, and the network of {network} is a transformer: train "
            "the whole of it, without model.lora."
        )
    if trains_text:
        raise ValueError(
            "model.lora freezes all weights, but the conditioner's trainable is true: set it to "
            "false, and list modules of the text encoder in model.lora.text_encoder_modules to "
            "adapt them too."
        )
    require_peft()


def check_unsharded(adapters: bool) -> None:
    """Refuse LoRA with a strategy that shards weights.

    Args:
        adapters: Whether the model trains LoRA adapters.

    Raises:
        ValueError: It does.
    """
    if adapters:
        raise ValueError(
            "model.lora does not train with FullyShardedStrategy: adapters and their optimizer "
            "state fit on each device. Use trainer.strategy auto or ddp."
        )


def check_shapes(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights have other shapes than the model of the config.

    Args:
        saved: State dict of the checkpoint.
        here: That of the model.

    Raises:
        ValueError: A weight has another shape; the message names the first one.
    """
    for name, weight in here.items():
        other = saved.get(name, weight)
        if isinstance(other, Tensor) and other.shape != weight.shape:
            raise ValueError(
                f"The checkpoint does not fit the config: its {name} is {tuple(other.shape)}, the "
                f"config's model has {tuple(weight.shape)}. Leave out the settings that override "
                "the checkpoint's codec, conditioner or UNet."
            )


def check_resumed(saved: dict[str, Any], configured: dict[str, Any]) -> None:
    """Refuse a checkpoint that was written with other settings.

    Args:
        saved: Description of the model in the checkpoint, as `describe_model` returns it.
        configured: The parts of such a description that are to be the same.

    Raises:
        ValueError: A setting differs; the message names both values.
    """
    for name, now in configured.items():
        was = saved[name]
        if was == now:
            continue
        if name == "network":
            kinds = [str(each["class_path"]).rpartition(".")[2] for each in (was, now)]
            if kinds[0] != kinds[1] and "AdaptedUNet" not in kinds:
                raise ValueError(
                    f"The checkpoint's network is a {kinds[0]}, the config's a {kinds[1]}: a "
                    "checkpoint resumes with the network it was written with."
                )
            was, now = _decisive(was), _decisive(now)
            if ("lora" in was) != ("lora" in now):
                holds, do = ("adapters", "set") if "lora" in was else ("a whole UNet", "unset")
                raise ValueError(
                    f"The checkpoint holds {holds}: {do} model.lora, as the run that wrote it did."
                )
            if was.get("weights") != now.get("weights"):
                raise ValueError(
                    f"The checkpoint's adapters were trained on a UNet with other weights (digest "
                    f"{was['weights']}) than model.network has (digest {now['weights']}): give "
                    "them the same base model."
                )
            if was == now:  # a moved folder is another name of the same weights
                continue
        if isinstance(was, dict):
            keys = [key for key in now if was.get(key) != now[key]]
            was, now = {k: was.get(k) for k in keys}, {k: now[k] for k in keys}
        raise ValueError(
            f"The checkpoint's {name} has {was}, the config has {now}: a checkpoint resumes with "
            "the settings it was written with."
        )


def _decisive(network: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a network's description that a resumed run must share."""
    settings = dict(network.get("init_args", {}))
    if "lora" in settings:
        lora = LoRA(**settings["lora"]).settings()  # with the defaults of newer settings
        return {"weights": settings["weights"], "lora": lora}
    config: dict[str, Any] = settings.get("config", settings)
    return config
