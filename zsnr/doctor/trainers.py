"""The settings of other trainers: kohya's scripts, OneTrainer, SimpleTuner, diffusers' scripts.

Each program has one function from its settings, with its defaults, to a `Recipe`.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from zsnr.loss import LossWeighting, WeightingName
from zsnr.prediction import PredictionType
from zsnr.schedule import NoiseSchedule
from zsnr.untrusted import check_size, clipped, parse_object, shown

KOHYA = "kohya's scripts"
VARIABLES = "set by variables of the script"  # the name under which these are listed
_MAX_BYTES = 1 << 20
_TRUE = ("true", "1", "yes", "on")
_FALSE = ("false", "0", "no", "off", "none", "null", "")
_Weight = Callable[[NoiseSchedule, PredictionType], Tensor]  # -> lambda_t, (T,)
_Reader = Callable[[Mapping[str, Any]], "Recipe"]
_SCHEDULER = {"_class_name", "beta_schedule", "beta_start", "trained_betas"}
_KOHYA_FLOW = (
    *("lora_flux", "oft_flux", "lora_sd3", "lora_lumina", "lora_hunyuan_image", "lora_anima"),
    *("lora_wan", "lora_qwen_image", "lora_flux_2", "lora_zimage"),
)


@dataclass(frozen=True)
class Recipe:
    """What a trainer's settings say about schedule, loss and noise.

    Args:
        program: The trainer.
        prediction_type: What the network is trained to predict. None = by flow matching.
        zero_terminal_snr: Whether the schedule is rescaled.
        weights: Weights of the loss by their name; they are multiplied.
        snr_before_rescale: Whether the weights are those of the schedule before the rescale.
        noise_offset: Strength of offset noise.
        multires: Whether the noise is pyramid (multi-resolution) noise.
        nearest_of: K, if the nearest of K noises is chosen for each sample ("immiscible").
        last_timestep: The noisiest timestep that is trained.
        spacings: Timestep spacings of previews, by the name of their setting.
        base_decides: Whether the schedule is that of the base model, and Stable Diffusion's is
            taken for it.
    """

    program: str
    prediction_type: PredictionType | None
    zero_terminal_snr: bool
    weights: Mapping[str, _Weight] = field(default_factory=dict)
    snr_before_rescale: bool = False
    noise_offset: float = 0.0
    multires: bool = False
    nearest_of: int = 0
    last_timestep: int = 999
    spacings: Mapping[str, str] = field(default_factory=dict)
    base_decides: bool = False


def read_settings(path: Path) -> dict[str, Any] | None:
    """Read a trainer's settings as one flat mapping, names without leading dashes.

    Args:
        path: A .toml or .json file, or a script or text with a command line.

    Returns:
        The settings; None if the file holds none of a known trainer.

    Raises:
        ValueError: The file is too large, or cannot be read.
    """
    check_size(path, _MAX_BYTES)
    data = path.read_bytes()
    match path.suffix.lower():
        case ".toml":
            try:
                settings = _flat(tomllib.loads(data.decode("utf-8-sig")))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ValueError(f"{path} is not readable TOML: {error}") from error
        case ".json":
            settings = _flat(parse_object(data, str(path)))
        case _:
            settings = dict(_options(data.decode("utf-8", "replace")))
            variables = [
                n for n, value in settings.items() if re.search(r"[$%]\w|\$\{", str(value))
            ]
            settings = {n: value for n, value in settings.items() if n not in variables}
            settings[VARIABLES] = ", ".join(variables)
            name = settings.get("config_file")
            if isinstance(name, str) and not name.endswith((".yaml", ".yml")):  # of accelerate
                settings = {**_config_file(path, name), **settings}
    return settings if _reader_of(settings) is not None else None


def _config_file(script: Path, name: str) -> dict[str, Any]:
    """Read the TOML that a command line of kohya's scripts names, which it overrides.

    Raises:
        ValueError: It is not there, or cannot be read.
    """
    path = Path(name.replace("\\", "/"))
    path = path if path.suffix else path.with_suffix(".toml")
    for place in (script.parent / path, script.parent / path.name):
        if place.is_file():
            return read_settings(place) or {}
    raise ValueError(
        f"{script} takes the rest of its settings from {clipped(name)} (config_file), which is not "
        "beside it: put it there."
    )


def trained_with(metadata: Mapping[str, str]) -> Recipe | None:
    """Return what kohya's scripts wrote about the training of a file; None = nothing."""
    settings = {name[3:]: text for name, text in metadata.items() if name.startswith("ss_")}
    if "debiased_estimation" in settings:
        settings["debiased_estimation_loss"] = settings["debiased_estimation"]
    try:
        return _kohya(settings) if settings else None
    except ValueError:  # a value of another program, which is no reason to refuse the file
        return None


def read_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Return what settings mean to the trainer that reads them, with its defaults.

    Raises:
        ValueError: They are of no known trainer, or a value is not what it must be.
    """
    read = _reader_of(settings)
    if read is None:
        raise ValueError("These are settings of no trainer that is known here.")
    return read(settings)


def _reader_of(settings: Mapping[str, Any]) -> _Reader | None:
    """Recognize the trainer by the names of its settings."""
    if _SCHEDULER & settings.keys():
        return None  # the config of a scheduler
    return next((read for read, names in _READERS.items() if settings.keys() & names), None)


def _kohya(settings: Mapping[str, Any]) -> Recipe:
    weights: dict[str, _Weight] = {}
    gamma = _number(settings, "min_snr_gamma")
    if gamma:
        weights["min-SNR"] = _weighting("min_snr", gamma)
    if _flag(settings, "scale_v_pred_loss_like_noise_pred"):
        weights["scale_v_pred_loss_like_noise_pred"] = _weighting("snr")
    if _flag(settings, "debiased_estimation_loss"):
        weights["debiased estimation"] = lambda schedule, kind: (
            1 / (schedule.snr + 1)
            if kind == "v_prediction"
            else schedule.snr.clamp(max=1000).rsqrt()
        )
    said = str(settings.get("sdxl_prediction_type", ""))
    v = _flag(settings, "v_parameterization") or said == "v_prediction"
    flow = _flag(settings, "flow_model") or said == "rectified_flow" or _kohya_flow(settings)
    last = _number(settings, "max_timestep")
    noise = str(settings.get("noise_offset_type", "")).lower()  # the GUI uses one of the two kinds
    return Recipe(
        KOHYA,
        None if flow else "v_prediction" if v else "epsilon",
        _flag(settings, "zero_terminal_snr"),
        weights,
        snr_before_rescale=True,
        noise_offset=0.0 if noise == "multires" else _number(settings, "noise_offset"),
        multires=noise != "original" and _number(settings, "multires_noise_iterations") > 0,
        nearest_of=int(_number(settings, "immiscible_noise") or _number(settings, "immiscible")),
        last_timestep=min(999, int(last) - 1) if last else 999,
    )


def _kohya_flow(settings: Mapping[str, Any]) -> bool:
    """Whether a transformer is trained, as by the scripts for Flux and Stable Diffusion 3."""
    for name in ("flux1_checkbox", "sd3_checkbox"):
        if name in settings and _flag(settings, name):
            return True
    module = str(settings.get("network_module", "")).rpartition(".")[2]
    gui = "LoRA_type" in settings or "sdxl" in settings  # it writes all settings, used or not
    return module in _KOHYA_FLOW or bool(settings.get("t5xxl") and not gui)


def _onetrainer(settings: Mapping[str, Any]) -> Recipe:
    weights: dict[str, _Weight] = {}
    strength = _number(settings, "loss_weight_strength") or 5.0
    match str(settings.get("loss_weight_fn", "CONSTANT")).upper():
        case "MIN_SNR_GAMMA":
            weights["min-SNR"] = _weighting("min_snr", strength)
        case "DEBIASED_ESTIMATION":
            weights["debiased estimation"] = lambda schedule, kind: (
                schedule.snr.clamp(max=1000) + (kind == "v_prediction")
            ).rsqrt()
        case "P2":
            weights["P2"] = lambda schedule, _: (1 + schedule.snr) ** -strength
        case "CONSTANT" | "SIGMA" | "":
            pass
        case other:
            raise ValueError(f"loss_weight_fn={shown(other)} is unknown.")
    model = str(settings.get("model_type", "STABLE_DIFFUSION")).upper()
    if not model.startswith("STABLE_DIFFUSION"):
        raise ValueError(f"model_type={shown(model)}: only Stable Diffusion's schedule is judged.")
    flow = model.startswith("STABLE_DIFFUSION_3")
    zero = _flag(settings, "rescale_noise_scheduler_to_zero_terminal_snr")
    v = zero or _flag(settings, "force_v_prediction")
    strength_limit = settings.get("max_noising_strength")
    last = 999
    if strength_limit is not None:
        last = min(999, max(0, int(1000 * _number(settings, "max_noising_strength")) - 1))
    return Recipe(
        "OneTrainer",
        None if flow else "v_prediction" if v else "epsilon",
        zero,
        weights,
        noise_offset=_number(settings, "offset_noise_weight"),
        last_timestep=last,
    )


def _simpletuner(settings: Mapping[str, Any]) -> Recipe:
    recipe = replace(_diffusers(settings), program="SimpleTuner", base_decides=False)
    names = ("training_scheduler_timestep_spacing", "inference_scheduler_timestep_spacing")
    spacings = {name: str(settings[name]) for name in names[1:] if name in settings}
    family = str(settings.get("model_family", "sdxl")).lower()
    if family in ("pixart_sigma", "deepfloyd"):
        raise ValueError(f"model_family={family}: only Stable Diffusion's schedule is judged.")
    if family not in ("sdxl", "sd1x", "sd2x", "sd15", "sd21", "kolors", "legacy"):
        return replace(recipe, prediction_type=None, spacings={})
    return replace(recipe, spacings=spacings)


def _diffusers(settings: Mapping[str, Any]) -> Recipe:
    weights: dict[str, _Weight] = {}
    gamma = _number(settings, "snr_gamma")
    if gamma:
        weights["min-SNR"] = _weighting("min_snr", gamma)
    said = str(settings.get("prediction_type") or "epsilon").lower()
    kinds: dict[str, PredictionType | None] = {
        "epsilon": "epsilon",
        "v_prediction": "v_prediction",
        "sample": "sample",
        "flow_matching": None,
    }
    if said not in kinds:
        raise ValueError(f"prediction_type={shown(said)} is unknown. Known: {', '.join(kinds)}.")
    offset = "offset_noise" not in settings or _flag(settings, "offset_noise")
    base = str(settings.get("pretrained_model_name_or_path", "")).lower()
    flow = (
        re.search(r"flux|stable-diffusion-3|\bsd3|sana|hidream|lumina|qwen", base) is not None
        or "weighting_scheme" in settings
    )
    return Recipe(
        "diffusers' scripts",
        None if flow else kinds[said],
        _flag(settings, "rescale_betas_zero_snr"),
        weights,
        noise_offset=_number(settings, "noise_offset") if offset else 0.0,
        base_decides=True,
    )


def _weighting(name: WeightingName, gamma: float = 5.0) -> _Weight:
    return LossWeighting(name, gamma, allow_zero_terminal_weight=True).table


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all sections by their own names, without leading dashes."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            values = {**_flat(value), **values}
        else:
            values[str(name).lstrip("-")] = value
    return values


def _options(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the options of a command line."""
    text = re.sub(r"(?m)^\s*(#|REM\b).*$", "", text)
    text = re.sub(r"[\\`^]\s*\n", " ", text)
    for match in re.finditer(r"--([A-Za-z]\w*)(?:[= ][ \t]*(\"[^\"]*\"|'[^']*'|(?!--)\S+))?", text):
        value = match[2]
        yield match[1], True if value is None else value.strip("\"'")


def _flag(settings: Mapping[str, Any], name: str) -> bool:
    value = str(settings.get(name, False)).strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name}={shown(settings[name])}: wanted true or false.")


def _number(settings: Mapping[str, Any], name: str) -> float:
    value = settings.get(name)
    if value is None or str(value).strip().lower() in _FALSE or value is True:
        return 0.0
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={clipped(str(value))}: wanted a number.") from error
    if not math.isfinite(number):
        raise ValueError(f"{name}={value}: wanted a finite number.")
    return number


# Names of settings that only one trainer has; those that also others have come last.
_READERS: dict[_Reader, tuple[str, ...]] = {
    _onetrainer: (
        *("rescale_noise_scheduler_to_zero_terminal_snr", "force_v_prediction", "loss_weight_fn"),
        *("force_epsilon_prediction", "training_method", "offset_noise_weight"),
    ),
    _simpletuner: (
        *("model_family", "inference_scheduler_timestep_spacing", "data_backend_config"),
        *("training_scheduler_timestep_spacing", "lora_type", "snr_weight"),
    ),
    _kohya: (
        *("v_parameterization", "zero_terminal_snr", "min_snr_gamma", "debiased_estimation_loss"),
        *("scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "multires_noise_iterations"),
        *("network_module", "ip_noise_gamma", "adaptive_noise_scale", "noise_offset_type"),
        *("sdxl_prediction_type", "network_dim", "network_alpha", "save_model_as"),
        "optimizer_type",
    ),
    # Not prediction_type, which the configs of schedulers have too.
    _diffusers: ("snr_gamma", "pretrained_model_name_or_path", "dataset_name", "train_data_dir"),
}
