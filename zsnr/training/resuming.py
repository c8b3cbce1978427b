"""The table of settings that a resumed run may change, and the messages about changes.

A checkpoint holds the settings of the run that wrote it, and a run that resumes from it compares
them with those of its config. A change is refused; or causes a warning with the value that is used
from now on; or is free, because it changes no weight except by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch


class Verdict(Enum):
    """What a resumed run may do with a setting."""

    REFUSED = "refused"
    NEW = "warned of; the new value is used"
    KEPT = "warned of; the checkpoint's value is used"
    FREE = "free"


def _under(prefix: str, names: str) -> list[str]:
    return [f"{prefix}.{name}" for name in names.split()]


_SCHEDULE = (
    "betas num_timesteps beta_start beta_end zero_terminal_snr alphas_cumprod_table snr_shift shift"
)
_GUIDANCE = (
    "scale rescale interval method curve at_zero_snr threshold apg_parallel apg_norm against"
)
_GROUPS: tuple[tuple[Verdict, Sequence[str]], ...] = (
    (  # they determine the meaning of the network's output, or which weights there are
        Verdict.REFUSED,
        [
            *_under("model", "network schedule prediction_type ema lora image_size"),
            *_under("model", "post_hoc_ema post_hoc_ema.sigma_rel"),
            *_under("model.schedule", _SCHEDULE),
            *_under("model.lora", "rank alpha target_modules base_dtype variant"),
            *_under("model.lora", "text_encoder_modules decompose_factor"),
            "optimizer",  # its class: the state of another one would be misread
        ],
    ),
    (  # they determine the samples and draws of a step; data.accept_changed_data allows changes
        Verdict.REFUSED,
        [
            "model.seed",
            *_under("data", "train image_size batch_size filters window_shards seed"),
            *_under("data", "aspect aspect.step aspect.max_ratio"),
            *_under("data", "pixels pixels.crop pixels.flip pixels.max_pixels"),
            *_under("data", "captions captions.fields captions.empty"),
            *_under("data", "tags tags.shuffle tags.keep tags.dropout tags.separator"),
        ],
    ),
    (  # they change what is learned from now on, and are changed on purpose
        Verdict.NEW,
        [
            *_under("model", "loss loss.name loss.gamma loss.allow_zero_terminal_weight"),
            *_under("model", "loss.min_terminal_share"),
            *_under("model.timestep_law", "name mean std a b shift allow_rare_terminal"),
            *_under("model", "timestep_law caption_dropout offset_noise"),
            *_under("model", "ema.decay ema.warmup ema.every_n_steps post_hoc_ema.every_n_steps"),
            *_under("model", "learning_rate learning_rate.warmup_steps learning_rate.decay"),
            *_under("model", "learning_rate.final"),
            *_under("trainer", "max_steps precision gradient_clip_val gradient_clip_algorithm"),
            *_under("trainer", "strategy.param_dtype strategy.reduce_dtype"),
        ],
    ),
    (  # another name may stand for the same weights
        Verdict.NEW,
        ["model.codec", "model.conditioner"],
    ),
    (Verdict.NEW, ["data.val_samples"]),  # validation losses can no longer be compared
    (  # an optimizer's state holds its settings, which replace those of the config
        Verdict.KEPT,
        _under("optimizer", "lr betas eps weight_decay amsgrad maximize"),
    ),
    (  # the same numbers by other means, or up to rounding
        Verdict.FREE,
        [
            *_under("optimizer", "foreach capturable differentiable fused"),
            *_under("model", "gradient_checkpointing compile tf32"),
            *_under("data", "max_batch_size_per_device num_workers index retries"),
            *_under("data.retries", "attempts backoff timeout outage"),
            *_under("data", "headers local_cache local_cache.folder local_cache.max_gib"),
            *_under("trainer", "accelerator strategy devices num_nodes accumulate_grad_batches"),
            *_under("trainer", "deterministic benchmark inference_mode use_distributed_sampler"),
            *_under("trainer", "plugins sync_batchnorm reload_dataloaders_every_n_epochs"),
        ],
    ),
    (  # they determine when a run stops, what it shows or what predict makes, but no step
        Verdict.FREE,
        [
            *_under("model", "max_skipped_steps terminal_window sampling watch"),
            *_under("model.watch", "latent_std ignore"),
            *_under("model.sampling", "sampler num_steps spacing guidance"),
            *_under("model.sampling.guidance", _GUIDANCE),
            *_under("data", "val error_budget accept_changed_data prompts prompt_seed"),
            *_under("data", "predict_batch_size"),
            *_under("trainer", "logger callbacks fast_dev_run max_epochs min_epochs min_steps"),
            *_under("trainer", "max_time limit_train_batches limit_val_batches"),
            *_under("trainer", "limit_test_batches limit_predict_batches overfit_batches"),
            *_under("trainer", "val_check_interval check_val_every_n_epoch num_sanity_val_steps"),
            *_under("trainer", "log_every_n_steps enable_checkpointing enable_progress_bar"),
            *_under("trainer", "enable_model_summary profiler detect_anomaly barebones"),
            *_under("trainer", "default_root_dir enable_autolog_hparams model_registry"),
        ],
    ),
)
RULES = {name: verdict for verdict, names in _GROUPS for name in names}
"""The verdict on each setting, by its name on the command line."""

_ELSEWHERE = ("optimizer.lr",)  # LatentDiffusion.on_train_start compares it


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to plain values by names with dots."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = _plain(value)
    return values


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the settings that differ as {name: [old, new]}; None = not set."""
    names = sorted(was.keys() | now.keys())
    return {n: [was.get(n), now.get(n)] for n in names if was.get(n) != now.get(n)}


def check_changes(changed: Mapping[str, Sequence[Any]]) -> str | None:
    """Refuse the changes that the table refuses, and return a warning about the others.

    Args:
        changed: Settings that differ, as `changes` returns them.

    Returns:
        The warning, or None if the changes need none.

    Raises:
        ValueError: A change is refused; the message names each with its old and new value.
    """
    by_verdict: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    for name, values in changed.items():
        if name not in _ELSEWHERE:
            was, now = ("not set" if value is None else value for value in values)
            by_verdict[verdict_on(name)].append(f"{name} was {was}, is {now} now")
    if by_verdict[Verdict.REFUSED]:
        raise ValueError(
            f"A run does not resume with other settings: {'; '.join(by_verdict[Verdict.REFUSED])}. "
            "Restore them; or export the checkpoint, and start a new run from its weights in "
            "another folder."
        )
    warnings = []
    if by_verdict[Verdict.NEW]:
        warnings.append(f"{'; '.join(by_verdict[Verdict.NEW])}: the new values are used")
    if by_verdict[Verdict.KEPT]:
        warnings.append(
            f"{'; '.join(by_verdict[Verdict.KEPT])}: the checkpoint's values are used, because "
            "they are a part of the optimizer's state; to use the config's, start a new run from "
            "exported weights"
        )
    if not warnings:
        return None
    return f"The run resumes with other settings than its checkpoint had. {'. '.join(warnings)}."


def verdict_on(name: str) -> Verdict:
    """Return the verdict on a setting, or on the setting that it is a part of.

    Raises:
        ValueError: The table has neither.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        known = RULES.get(".".join(parts[:end]))
        if known is not None:
            # settings of optimizers that are not listed are a part of their states too
            return Verdict.KEPT if end == 1 < len(parts) else known
    raise ValueError(f"No rule says whether a resumed run may change {name}.")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
