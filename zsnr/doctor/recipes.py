"""Verdicts on the settings of other trainers.

They are kohya's scripts, OneTrainer, SimpleTuner and the scripts of diffusers.

Which flags go together is settled by three numbers: the SNR that the schedule ends at, the share of
the loss weight that is left for t >= 900, and the signal that the choice of noise brings back at T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from zsnr.doctor.diagnosis import Diagnosis, judge, schedule_facts
from zsnr.doctor.trainers import KOHYA, VARIABLES, Recipe, read_recipe
from zsnr.schedule import NoiseSchedule

_NOISY = 900  # the timesteps that decide brightness and layout


def examine_recipe(target: str, settings: Mapping[str, Any]) -> Diagnosis:
    """Judge a trainer's settings.

    Raises:
        ValueError: They are of no known trainer, or a value is not what it must be.
    """
    recipe = read_recipe(settings)
    kind = f"settings of {recipe.program}"
    if recipe.prediction_type is None:
        reason = "cannot be told: it trains by flow matching, which has no schedule of betas"
        return Diagnosis(target, kind, "unknown", reason)
    schedule = NoiseSchedule(zero_terminal_snr=recipe.zero_terminal_snr)
    prediction = recipe.prediction_type
    warnings, changes = [], []
    if settings.get(VARIABLES):
        warnings.append(
            f"not read, because variables of the script set them: {settings[VARIABLES]}"
        )
    facts: dict[str, Any] = {"prediction_type": prediction, **schedule_facts(schedule)}
    lacking = None
    possible = not (recipe.zero_terminal_snr and prediction == "epsilon")
    if possible:
        share, last = weight_shares(recipe)
        facts |= {
            "loss_weighting": ", ".join(recipe.weights) or "uniform",
            "loss_weight_t900": share,
            "terminal_loss_weight": last,
        }
        if recipe.zero_terminal_snr and recipe.weights and share < 0.01:
            names = " and ".join(recipe.weights)
            lacking = (
                f"zero SNR, but {names} leaves {100 * share:.2g} % of the loss weight for "
                f"t >= {_NOISY} (uniform: 10 %): starting from pure noise is hardly trained"
            )
            changes.append(f"leave out {names}: a uniform loss trains all timesteps")
        elif recipe.weights and share < 0.05:
            warnings.append(_share_text(recipe, share))
    if recipe.last_timestep < schedule.num_timesteps - 1:
        lacking = lacking or (
            f"timesteps above t = {recipe.last_timestep} are never trained, and sampling from pure "
            "noise starts at t = 999"
        )
        changes.append("train up to the last timestep")
    verdict, reason = judge(schedule, prediction, {}, lacking if recipe.zero_terminal_snr else None)
    if verdict == "fixed":
        reason = f"SNR_T = 0 and {prediction}: sample from the last timestep (trailing)"
    elif verdict == "flawed":
        changes.insert(0, "train v prediction with zero terminal SNR")
        if lacking:
            warnings.append(lacking)
    elif not possible:
        changes.insert(0, "train v prediction: with zero terminal SNR, eps leaves x_0 open")
    if recipe.base_decides:
        warnings.append(
            f"{recipe.program} take the schedule of the base model, here Stable Diffusion's: "
            "examine the base model too"
        )
    flags = ("v_parameterization", "zero_terminal_snr")
    unset = [f"--{name}" for name in flags if name not in settings]
    if unset and recipe.program == KOHYA and Path(target).suffix.lower() == ".toml":
        warnings.append(
            f"it does not set {' or '.join(unset)}, and flags of a command line are not seen: if "
            "they stand there, examine a script that names this file as --config_file"
        )
    warnings += _noise_warnings(recipe)
    for name, spacing in recipe.spacings.items():
        if spacing != "trailing":
            warnings.append(f"{name}={spacing}: previews do not start at T. Use trailing")
    return Diagnosis(target, kind, verdict, reason, facts, tuple(warnings), tuple(changes))


def recipe_warnings(recipe: Recipe) -> list[str]:
    """Return what is wrong with the loss and the noise of a recipe, in sentences."""
    warnings = [*_noise_warnings(recipe)]
    if recipe.weights and recipe.prediction_type is not None:
        possible = recipe.snr_before_rescale or recipe.prediction_type != "epsilon"
        if possible or not recipe.zero_terminal_snr:
            share, _ = weight_shares(recipe)
            if share < 0.05:
                warnings.append(_share_text(recipe, share))
    return warnings


def _share_text(recipe: Recipe, share: float) -> str:
    return (
        f"{' and '.join(recipe.weights)} leaves {100 * share:.2g} % of the loss weight for "
        f"t >= {_NOISY} (uniform: 10 %), which decide brightness and layout"
    )


def weight_shares(recipe: Recipe) -> tuple[float, float]:
    """Return the share of the loss weight for t >= 900, and the last weight over the mean."""
    assert recipe.prediction_type is not None
    rescaled = recipe.zero_terminal_snr and not recipe.snr_before_rescale
    schedule = NoiseSchedule(zero_terminal_snr=rescaled)
    table = torch.ones_like(schedule.snr)
    for weight in recipe.weights.values():
        table = table * weight(schedule, recipe.prediction_type)
    table[recipe.last_timestep + 1 :] = 0
    return float(table[_NOISY:].sum() / table.sum()), float(table[-1] / table.mean())


def nearest_noise_leak(count: int, dimensions: int = 64 * 64 * 4) -> tuple[float, float]:
    """Compute what choosing the nearest of K noises to x_0 leaves of the image at T.

    Chosen by the inner product with x_0, the noise has the mean m along x_0 / |x_0|, the expected
    maximum of K standard normals. For x_0 of unit variance in N dimensions, |x_0| = sqrt(N), so
    x_T = eps holds m / sqrt(N) of x_0, as much as a schedule with that sqrt(abar_T). Chosen by the
    squared distance, which the norm of the noise takes part in, it is sqrt(2 / 3) of that.

    Args:
        count: K.
        dimensions: N.

    Returns:
        m, and m / sqrt(N).
    """
    x = torch.linspace(0, 12, 12_001, dtype=torch.float64)
    above = torch.special.ndtr(-x)
    mean = float(torch.trapezoid(1 - (1 - above) ** count - above**count, x))
    return mean, mean / math.sqrt(dimensions)


def _noise_warnings(recipe: Recipe) -> Iterator[str]:
    kinds = []
    if recipe.noise_offset:
        kinds.append(f"offset noise of {recipe.noise_offset:g}")
    if recipe.multires:
        kinds.append("multi-resolution noise")
    for kind in kinds:
        if recipe.zero_terminal_snr:
            yield (
                f"{kind} beside zero terminal SNR: it was made for schedules that keep signal, and "
                "trains on noise that sampling never starts from"
            )
        else:
            yield f"{kind} hides the flaw of the schedule and does not repair it"
    if recipe.nearest_of > 1:
        mean, leak = nearest_noise_leak(recipe.nearest_of)
        yield (
            f"the nearest of {recipe.nearest_of} noises has a mean of up to {mean:.2f} along the "
            f"image: it leaves as much of it at T as sqrt(abar_T) = {leak:.3f} (64x64x4 latents of "
            "unit variance). Pairing noises within a batch does not"
        )
