"""`zsnr doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from zsnr.commands.result import Result


def doctor(
    target: str,
    *,
    num_steps: Sequence[int] = (),
    open: bool = False,
    fix: bool = False,
    in_place: bool = False,
) -> Result:
    """Say what a model declares, and whether its noise schedule is flawed.

    The model is not loaded, and nothing in it is run. The verdict is the exit code. fixed (0): the
    schedule ends at SNR 0, with v, flow or sample prediction, and sampling starts there. flawed
    (1): the schedule keeps signal at the last timestep. inconsistent (2): zero SNR with epsilon
    prediction, a spacing that misses the last timestep, or a scheduler class that drops the
    rescale. unknown or unreadable (3): the target does not declare enough or cannot be read, --fix
    cannot fix the model, or the command is wrong.

    Args:
        target: A diffusers folder, a scheduler_config.json, a .safetensors file, a checkpoint or
            the folder of a run of zsnr, also in object storage, a YAML of `zsnr fit`, or the
            settings of another trainer (kohya's scripts, OneTrainer, SimpleTuner or diffusers'
            scripts: TOML, JSON, or a script with the command line).
        num_steps: A number of steps to examine besides 10, 20, 25, 30 and 50. May be repeated.
        open: Open a .ckpt that has no run.json beside it; only tensors and plain values are read.
        fix: Write a corrected scheduler_config.fixed.json beside the config of the scheduler.
        in_place: With --fix, replace the config instead.
    """
    from zsnr.doctor import examine as doctor

    if in_place and not fix:
        raise ValueError("--in-place belongs to --fix.")
    diagnosis = doctor.examine(target, num_steps=list(num_steps), open_pickle=open)
    code, notes = diagnosis.exit_code, tuple[str, ...]()
    if fix and diagnosis.exit_code != 3:
        try:
            notes = tuple(doctor.fix(target, in_place=in_place))
        except (ValueError, OSError) as error:
            code, notes = 3, (f"zsnr: error: {' '.join(str(error).split())}",)
    return Result(asdict(diagnosis), diagnosis.to_text(), code, notes)
