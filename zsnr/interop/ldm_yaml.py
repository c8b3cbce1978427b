"""The YAML of the original latent diffusion code, beside a single file of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsnr.prediction import PredictionType
from zsnr.schedule import NoiseSchedule
from zsnr.untrusted import read_yaml, shown

_PREDICTIONS: dict[str, PredictionType] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# The original code's "linear" is linear in sqrt(beta).
_BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True)
class LdmYaml:
    """Settings that such a YAML declares.

    Args:
        path: Path of the YAML.
        prediction_type: What the network predicts.
        schedule: The schedule the network was trained on.
    """

    path: Path
    prediction_type: PredictionType
    schedule: NoiseSchedule


def read_beside(path: Path) -> LdmYaml | None:
    """Read the YAML of the original code beside a single file. None = there is none.

    Raises:
        ValueError: The YAML cannot be read.
    """
    for suffix in (".yaml", ".yml"):
        beside = path.with_suffix(suffix)
        if beside.exists():
            document = read_yaml(beside)
            return declared_by(beside, document) if is_ldm(document) else None
    return None


def is_ldm(document: Any) -> bool:
    """Whether a YAML has the form of the original code's configs."""
    model = document.get("model") if isinstance(document, Mapping) else None
    return isinstance(model, Mapping) and {"target", "params"} <= model.keys()


def declared_by(path: Path, document: Any) -> LdmYaml:
    """Return the settings of a YAML, with the defaults of the original code.

    Raises:
        ValueError: A value is unknown or out of range.
    """
    params = document["model"]["params"]
    if not isinstance(params, Mapping):
        raise ValueError(f"{path}: model.params is {shown(params)}: wanted settings by name.")
    kind, betas = params.get("parameterization", "eps"), params.get("beta_schedule", "linear")
    for name, value, known in (
        ("parameterization", kind, _PREDICTIONS),
        ("beta_schedule", betas, _BETAS),
    ):
        if not isinstance(value, str) or value not in known:
            listed = ", ".join(map(repr, known))
            raise ValueError(f"{path}: {name}={shown(value)} is unknown. Known: {listed}.")
    ends = {}
    if betas != "cosine":
        ends = {
            "beta_start": params.get("linear_start", 1e-4),
            "beta_end": params.get("linear_end", 2e-2),
        }
    try:
        schedule = NoiseSchedule.from_settings(
            {
                "betas": _BETAS[betas],
                "num_timesteps": params.get("timesteps", 1000),
                "zero_terminal_snr": params.get("zero_terminal_snr", False),
                **ends,
            }
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return LdmYaml(path, _PREDICTIONS[kind], schedule)
