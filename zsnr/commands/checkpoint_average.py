"""`zsnr checkpoint average`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsnr.commands.result import Result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zsnr.checkpoints.snapshots import Snapshot
    from zsnr.power_average import Average, Combination

_NOTED = 0.05  # residuals above are noted: weights differ by about 1e-3 of themselves
_LARGEST = 0.3


def checkpoint_average(
    run: str | Path,
    *,
    sigma_rel: str,
    step: int | None = None,
    output: str | Path | None = None,
) -> Result:
    """Make averaged weights of any length from the snapshots of a run.

    Each length gives a checkpoint, which sample, compare, validate, export and doctor read as any
    other; no run resumes from it. An average of length sigma_rel weighs the steps of training by a
    power function whose standard deviation is sigma_rel times their number: 0.05 is short, 0.25
    counts nearly all of training. It is the nearest combination of the averages that training with
    model.post_hoc_ema kept in RUN/checkpoints/snapshots. The residual says how near: the difference
    of the weight profiles, divided by the norm of the wanted one. Above 0.3 nothing is written.

    Examples:
        zsnr checkpoint average runs/mine --sigma-rel 0.05,0.10,0.15
        zsnr compare models runs/mine/averages/*.ckpt -o page

    Args:
        run: Folder of the run, which may still be training, or of its checkpoints or snapshots; or
            its address in object storage.
        sigma_rel: Lengths, such as 0.05,0.10,0.15.
        step: Step of the snapshot that the averages end with. Default: the last one.
        output: Folder for the checkpoints, which may exist. Default: averages in the folder of the
            run.
    """
    from zsnr.checkpoints.remote import is_address
    from zsnr.checkpoints.run_facts import write_run_facts
    from zsnr.checkpoints.sharded import save_file
    from zsnr.checkpoints.snapshots import averaged_checkpoint, find_snapshots, folder_of_run
    from zsnr.files import check_new
    from zsnr.power_average import Average, combine
    from zsnr.public import public_url

    lengths = _lengths(sigma_rel)
    source = str(run) if is_address(run) else Path(run).expanduser()
    if output is None and not isinstance(source, Path):
        raise ValueError(f"{public_url(source)} is an address: give --output FOLDER.")
    folder = (
        folder_of_run(Path(source)) / "averages" if output is None else Path(output).expanduser()
    )
    snapshots = _until(find_snapshots(source), step)
    end, kept = snapshots[-1].averages[0].end, [a for each in snapshots for a in each.averages]
    made: list[tuple[Path, Average, Combination]] = []
    for length in lengths:
        wanted = Average(length, end)
        path = folder / f"sigma-rel-{length}-step-{snapshots[-1].step:08d}.ckpt"
        check_new(path)
        combination = combine(kept, wanted)
        if combination.residual > _LARGEST:
            raise ValueError(f"--sigma-rel {length}: {_why(snapshots, wanted, combination)}")
        made.append((path, wanted, combination))
    described = _facts_to_write(folder, snapshots[-1])
    notes = []
    for path, wanted, combination in made:
        save_file(averaged_checkpoint(snapshots, combination, wanted, progress=True), path)
        if combination.residual > _NOTED:
            notes.append(f"{path.name}: {_why(snapshots, wanted, combination)}")
    if described:
        write_run_facts(folder, described)
    facts = [
        {"sigma_rel": wanted.sigma_rel, "residual": combination.residual, "path": str(path)}
        for path, wanted, combination in made
    ]
    text = "\n".join(
        f"{path} (residual {combination.residual:.2g})" for path, _, combination in made
    )
    return Result(
        {
            "step": snapshots[-1].step,
            "end": end,
            "snapshots": len(snapshots),
            "averages": facts,
        },
        text,
        notes=tuple(notes),
    )


def _lengths(text: str) -> list[float]:
    """Read the lengths.

    Raises:
        ValueError: One is not a number, is out of range, or is given twice.
    """
    from zsnr.power_average import check_sigma_rel

    try:
        lengths = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--sigma-rel {text}: wanted numbers, such as 0.05,0.10,0.15.") from error
    for length in lengths:
        check_sigma_rel("--sigma-rel", length)
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"--sigma-rel {text}: wanted each length once.")
    return lengths


def _facts_to_write(folder: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Return what run.json beside the averages says, from which doctor reads their schedule.

    It is empty where the folder has a run.json, or the snapshot records nothing of its run.

    Raises:
        ValueError: The run.json of the folder describes another model.
    """
    from zsnr.checkpoints.opening import open_checkpoint
    from zsnr.checkpoints.run_facts import NAME, read_run_facts

    run = open_checkpoint(snapshot.path).get("run")
    if not isinstance(run, dict):
        return {}
    of_all = {**run, "ema": None, "metrics": {}}
    of_all.pop("global_step", None)  # averages of other steps may follow
    there = read_run_facts(folder)
    if there is None:
        return of_all
    told = json.loads(json.dumps(of_all))
    if any(there.get(name) != told.get(name) for name in ("schedule", "prediction_type")):
        raise ValueError(
            f"{folder / NAME} describes a model with another schedule or prediction type: choose "
            "another --output."
        )
    return {}


def _until(snapshots: Sequence[Snapshot], step: int | None) -> Sequence[Snapshot]:
    """Return the snapshots up to a step.

    Raises:
        ValueError: There is none of that step.
    """
    if step is None:
        return snapshots
    known = [snapshot.step for snapshot in snapshots]
    if step not in known:
        near = sorted(known, key=lambda each: abs(each - step))[:2]
        raise ValueError(
            f"--step {step}: there is no snapshot of that step. The nearest are of "
            f"{' and '.join(map(str, sorted(near)))}; there are {len(known)}, of steps {known[0]} "
            f"to {known[-1]}."
        )
    return [snapshot for snapshot in snapshots if snapshot.step <= step]


def _why(snapshots: Sequence[Snapshot], wanted: Average, combination: Combination) -> str:
    """Say how far a combination is from the average, and why."""
    from zsnr.progress import counted

    ends = [snapshot.averages[0].end for snapshot in snapshots]
    lengths = sorted({average.sigma_rel for each in snapshots for average in each.averages})
    if wanted.sigma_rel < lengths[0]:
        before = ends[-2] if len(ends) > 1 else 0
        why = (
            f"it is shorter than the kept {lengths[0]}, and the last two snapshots are "
            f"{wanted.end - before} steps apart"
        )
    elif wanted.sigma_rel < lengths[-1]:
        why = f"the run has no more than {counted(len(ends), 'snapshot')}"
    else:
        why = f"the first of {len(ends)} snapshots is of step {ends[0]} of {wanted.end}"
    return (
        f"the nearest combination has a residual of {combination.residual:.2g}, because {why}. "
        "Choose a length nearer to those that were kept"
        f" ({', '.join(map(str, lengths))}), or train with more snapshots."
    )
