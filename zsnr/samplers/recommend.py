"""Which sampler and spacing a budget of steps is best spent on, by what was measured."""

from __future__ import annotations

from zsnr.guidance import Guidance

PAPER = ("ddim", "trailing")
MANY_STEPS = 50


def recommend_sampling(num_steps: int, guidance: Guidance | float | None = None) -> tuple[str, str]:
    """Choose a sampler and a spacing for a number of steps and a guidance scale.

    | steps | no guidance (w = 1) | with guidance |
    |---|---|---|
    | 50 and more | ddim, trailing: the paper's | the same |
    | 7 to 49 | multiscale, log_snr | multiscale, guided |
    | up to 6 | multiscale, log_snr | w <= 4: multiscale, guided; else ddim, guided |

    CFG++ is made for first-order steps: ddim, guided. The figures behind each row, of every sampler
    and spacing that was tried, are in benchmarks/results/guided.md and fidelity.md.

    Args:
        num_steps: S, at least 1.
        guidance: The guidance, or its scale w. None = no guidance.

    Returns:
        Names that `get_sampler` and `get_timesteps` take.

    Raises:
        ValueError: num_steps is not a positive int.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}: wanted an int of at least 1.")
    if num_steps >= MANY_STEPS:
        return PAPER
    if isinstance(guidance, Guidance):
        if guidance.method == "cfg_pp":
            return "ddim", "guided"
        scales = [guidance.scale] if guidance.curve is None else [w for _, w in guidance.curve]
        w = float(max(scales))
    else:
        w = 1.0 if guidance is None else float(guidance)
    if w <= 1:
        return "multiscale", "log_snr"
    return "ddim" if num_steps < 7 and w > 4 else "multiscale", "guided"
