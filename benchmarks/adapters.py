"""From epsilon to v at zero terminal SNR: all weights against each kind and rank of adapters.

    python benchmarks/adapters.py [--folder runs/adapters] [--jobs 2] [--write]

Trains one epsilon model on the original schedule of configs/ablation/openmoji.yaml, and moves it to
v-prediction at zero terminal SNR (configs/ablation/adapters.yaml) by each arm. The learning rate of
an arm is the one of three with the lowest validation loss after half of the steps, with a seed
that is not reported; three other seeds are. An interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flawed_against_fixed import CONFIGS, by_seed, interval, side_by_side, zsnr
from tqdm import tqdm

from zsnr.reports.arms import Arm
from zsnr.reports.images import panel_figure, save_figure

STEPS, TUNING_STEPS, TUNING_SEED, SEEDS = 100, 50, 100, (0, 1, 2)
WIDER = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
ARMS: dict[str, dict[str, Any] | None] = {
    "all weights": None,
    "lora, rank 4": {"rank": 4},
    "lora, rank 16": {"rank": 16},
    "lora, rank 64": {"rank": 64},
    "rslora, rank 16": {"rank": 16, "variant": "rslora"},
    "dora, rank 16": {"rank": 16, "variant": "dora"},
    "loha, rank 16": {"rank": 16, "variant": "loha"},
    "lokr, rank 16": {"rank": 16, "variant": "lokr"},
    "lora, rank 16, blocks": {"rank": 16, "target_modules": WIDER},
    "lora, rank 64, blocks": {"rank": 64, "target_modules": WIDER},
    "lora, rank 4, every layer": {"rank": 4, "target_modules": "all"},
    "lora, rank 16, every layer": {"rank": 16, "target_modules": "all"},
    "lora, rank 64, every layer": {"rank": 64, "target_modules": "all"},
    "rslora, rank 16, every layer": {"rank": 16, "variant": "rslora", "target_modules": "all"},
    "dora, rank 16, every layer": {"rank": 16, "variant": "dora", "target_modules": "all"},
    "loha, rank 16, every layer": {"rank": 16, "variant": "loha", "target_modules": "all"},
    "lokr, rank 16, every layer": {"rank": 16, "variant": "lokr", "target_modules": "all"},
    "lora, rank 16, 400 steps": {"rank": 16},
    "lora, rank 64, every layer, 400 steps": {"rank": 64, "target_modules": "all"},
}
LONGER = 400
TUNED_AS = {
    "lora, rank 16, 400 steps": "lora, rank 16",
    "lora, rank 64, every layer, 400 steps": "lora, rank 64, every layer",
}
"""Arms of four times the steps, with the learning rate of the same adapters."""
RATES = {None: (3e-4, 1e-3, 3e-3), "adapters": (1e-3, 4e-3, 1.6e-2)}


def rates_of(arm: str) -> tuple[float, ...]:
    return RATES[None if ARMS[arm] is None else "adapters"]


def train_base(folder: Path) -> Path:
    """Train the epsilon model unless it is trained; return its folder of diffusers."""
    run, base = folder / "epsilon", folder / "base"
    if not base.exists():
        zsnr(
            *("fit", "-c", CONFIGS / "openmoji.yaml", "-c", CONFIGS / "original.yaml"),
            *("--model.prediction_type", "epsilon", "--trainer.default_root_dir", run),
            *("--data.train", f"{folder}/data/train-*.tar"),
            *("--data.val", f"{folder}/data/val-*.tar", "--trainer.enable_progress_bar", "false"),
            *("--ckpt_path", "last"),
            log=folder / "epsilon.log",
        )
        zsnr("export", run, "-o", base)
    return base


def name_of(arm: str, rate: float, seed: int) -> str:
    return f"{arm.replace(', ', '-').replace(' ', '_')}-{rate:g}-{seed}"


def train(folder: Path, job: tuple[str, float, int]) -> Path:
    """Train one model unless it is trained; return the folder of its run."""
    from zsnr.cli import main

    arm, rate, seed = job
    run = folder / name_of(arm, rate, seed)
    steps = LONGER if "steps" in arm else TUNING_STEPS if seed == TUNING_SEED else STEPS
    if (run / "checkpoints" / f"step-{steps:08d}.ckpt").exists():
        return run
    lora = ARMS[arm]
    settings = ["--model.lora", "null" if lora is None else json.dumps(lora)]
    base = str(folder / "base")
    code = main(
        [
            *("fit", "-c", str(CONFIGS / "openmoji.yaml"), "-c", str(CONFIGS / "adapters.yaml")),
            *("--model.network", base, "--model.conditioner.init_args.pretrained", base),
            *settings,
            *("--model.optimizer.init_args.lr", f"{rate:g}", "--trainer.max_steps", str(steps)),
            *("--seed_everything", str(seed), "--data.seed", str(seed)),
            *("--data.train", f"{folder}/data/train-*.tar"),
            *("--data.val", f"{folder}/data/val-*.tar", "--trainer.default_root_dir", str(run)),
            *("--trainer.enable_progress_bar", "false"),
        ]
    )
    if code:
        raise SystemExit(f"{run}: zsnr fit ended with {code}.")
    return run


def scalars(run: Path) -> dict[str, float]:
    """Return the last value of each scalar of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted(run.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        found |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    return found


def quiet() -> None:
    torch.set_num_threads(1)


def run_all(folder: Path, jobs: list[tuple[str, float, int]], workers: int, title: str) -> None:
    context = multiprocessing.get_context("spawn")  # with a few processes, that each import once
    with ProcessPoolExecutor(workers, context, initializer=quiet) as pool:
        list(tqdm(pool.map(partial(train, folder), jobs), title, len(jobs)))


def trained_parameters(folder: Path, arm: str, rate: float) -> int:
    checkpoint = folder / name_of(arm, rate, SEEDS[0]) / "checkpoints" / "last.ckpt"
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    return sum(w.numel() for name, w in state.items() if name.startswith("trained."))


def planned_memory(folder: Path, arm: str) -> str:
    """Return what `zsnr plan` says of SDXL at 1024 pixels, one image on the device, in GiB."""
    import io
    from contextlib import redirect_stdout

    from zsnr.cli import main

    if arm in TUNED_AS:
        return ""
    kept = folder / f"{name_of(arm, 0, 0)}.plan"
    if kept.exists():
        return kept.read_text()
    lora = ARMS[arm]
    text = io.StringIO()
    adapters = ["--model.lora", json.dumps({**lora, "base_dtype": "bfloat16"})] if lora else []
    with redirect_stdout(text):
        main(
            [
                *("plan", str(CONFIGS.parent / "sdxl_zsnr.yaml")),
                str(CONFIGS.parent / "trainer" / ("lora.yaml" if lora else "gpu.yaml")),
                *("--ranks", "1", "--json", "--data.train", "x.tar"),
                *("--data.max_batch_size_per_device", "1", "--model.gradient_checkpointing"),
                *("true", *adapters),
            ]
        )
    kept.write_text(f"{json.loads(text.getvalue())['bytes_per_rank']['total'] / 2**30:.1f}")
    return kept.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/adapters"), help="of runs")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, one thread each")
    parser.add_argument("--num-steps", type=int, default=10, help="number of sampling steps")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder, S = options.folder.resolve(), options.num_steps
    shards = f"{folder}/data/train-*.tar"
    if not (folder / "data").exists():
        zsnr("data", "openmoji", folder / "data", "--glyphs", "demo")
    train_base(folder)
    tuned_arms = [arm for arm in ARMS if arm not in TUNED_AS]
    tuning = [(arm, rate, TUNING_SEED) for arm in tuned_arms for rate in rates_of(arm)]
    run_all(folder, tuning, options.jobs, "learning rates")
    losses = {
        arm: {rate: scalars(folder / name_of(arm, rate, TUNING_SEED))["val/loss"] for rate in rates}
        for arm, rates in ((arm, rates_of(arm)) for arm in tuned_arms)
    }
    chosen = {arm: min(tuned, key=tuned.__getitem__) for arm, tuned in losses.items()}
    for arm, tuned in losses.items():
        print(arm, {rate: round(loss, 3) for rate, loss in tuned.items()}, chosen[arm], flush=True)
    chosen |= {arm: chosen[other] for arm, other in TUNED_AS.items()}
    jobs = [(arm, chosen[arm], seed) for seed in SEEDS for arm in ARMS]
    run_all(folder, jobs, options.jobs, "arms")
    runs = {arm: [folder / name_of(arm, chosen[arm], seed) for seed in SEEDS] for arm in ARMS}
    plain = Arm(num_steps=S, guidance_scale=1.0, spacing="trailing")
    arms = [
        replace(plain, name=arm, models=tuple(str(run / "checkpoints/last.ckpt") for run in runs_))
        for arm, runs_ in runs.items()
    ]
    torch.set_num_threads(options.jobs)
    facts = {}
    for name, prompts, count in (("prompted", "data", 1), ("unprompted", "empty", 108)):
        groups = [
            side_by_side(
                folder / f"{name}{end}-{S}",
                [arm for arm in arms if (arm.name in TUNED_AS) == bool(end)],
                shards,
                prompts,
                count,
            )
            for end in ("", "-longer")
        ]
        facts[name] = {**groups[0], "arms": [arm for group in groups for arm in group["arms"]]}
    text = f"{measures(facts, runs)}\n\n{settings_table(folder, losses, chosen)}"
    print(text)
    if options.write:
        draw(facts["prompted"], folder, S)
        write(text, facts["prompted"], S)


def measures(facts: dict[str, dict[str, Any]], runs: dict[str, list[Path]]) -> str:
    """Tabulate brightness and errors of each arm."""
    first = [facts[name]["arms"][0]["w1"]["estimate"] for name in ("prompted", "unprompted")]
    ends = ["t0099", "t0499", "t0899"]
    lines = [
        "| arm | W1 with prompts, 95 % interval | by seed | ratio to all weights "
        "| W1 without, 95 % interval | ratio | loss at the last timestep | "
        + " | ".join(f"adaptation, t = {int(end[1:])}" for end in ends)
        + " |",
        "|" + "---|" * (7 + len(ends)),
    ]
    for prompted, unprompted in zip(*(facts[n]["arms"] for n in facts), strict=True):
        found = [scalars(run) for run in runs[prompted["name"]]]
        means = [
            sum(each.get(tag, float("nan")) for each in found) / len(found)
            for tag in ("val_by_timestep/t0999", *(f"adaptation/{end}" for end in ends))
        ]
        lines.append(
            f"| {prompted['name']} | {interval(prompted['w1'])} | {by_seed(prompted)} "
            f"| {prompted['w1']['estimate'] / first[0]:.2f} | {interval(unprompted['w1'])} "
            f"| {unprompted['w1']['estimate'] / first[1]:.2f} | "
            + " | ".join(f"{mean:.2f}" for mean in means)
            + " |"
        )
    floors = [facts[name]["data"]["noise_floor"]["mean"] for name in facts]
    return "\n".join(
        [
            *lines,
            "",
            f"The same numbers of images drawn from the data have an expected W1 of "
            f"{floors[0]:.3f} (with prompts) and {floors[1]:.3f}.",
        ]
    )


def settings_table(folder: Path, losses: dict[str, Any], chosen: dict[str, float]) -> str:
    lines = [
        f"| arm | trained parameters | validation loss after {TUNING_STEPS} steps by learning rate "
        "| chosen | SDXL, GiB by `zsnr plan` |",
        "|---|---|---|---|---|",
    ]
    for arm in ARMS:
        tuned = losses.get(arm, {})
        listed = ", ".join(f"{rate:g}: {loss:.2f}" for rate, loss in tuned.items())
        count = trained_parameters(folder, arm, chosen[arm])
        lines.append(
            f"| {arm} | {count:,} | {listed} | {chosen[arm]:g} | {planned_memory(folder, arm)} |"
        )
    return "\n".join(lines)


def draw(facts: dict[str, Any], folder: Path, S: int, count: int = 6) -> None:
    """Draw the first images of each arm's first model, without selection."""
    from PIL import Image

    rows, names = [], []
    for arm in facts["arms"]:
        made = folder / f"prompted{'-longer' if arm['name'] in TUNED_AS else ''}-{S}"
        files = [made / image["file"] for image in arm["images"][:count]]
        rows.append([Image.open(file).convert("RGB") for file in files])
        names.append(f"{arm['name']}\nW1 {arm['w1']['estimate']:.2f}")
    columns = [f"caption {n}" for n in range(1, count + 1)]
    title = "From epsilon to v at zero terminal SNR: the same data, steps, prompts and seeds"
    save_figure(
        panel_figure(rows, names, columns, title),
        Path(__file__).parent / "results" / "adapters.png",
    )


def write(text: str, facts: dict[str, Any], S: int) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
    out = Path(__file__).parent / "results" / "adapters.md"
    out.write_text(
        f"# Adapters from epsilon to v\n\n{date.today()}, {versions}, Python "
        f"{platform.python_version()}, {platform.machine()}. Made by `python benchmarks/"
        "adapters.py --write`.\n\nOne epsilon model of 1.1 M parameters, trained for 500 steps on "
        "the original schedule (configs/ablation/openmoji.yaml), is moved to v-prediction at zero "
        "terminal SNR "
        f"in {STEPS} steps with batch size 32 (configs/ablation/adapters.yaml); the text encoder "
        f"is frozen. Seeds {', '.join(map(str, SEEDS))} of each arm; all models are included. The "
        "learning rate is the one of three with the lowest validation loss of another seed. DDIM, "
        f"S = {S}, trailing, no guidance, the same prompts and seeds in all arms. W1 is the "
        "1-Wasserstein distance between the mean luma of images and that of the data, intervals "
        "resample seeds, then images; the W1 of resampled images is biased upward, so that an "
        "interval may lie above its estimate. Adaptation is the validation loss divided by that of "
        "the epsilon model, converted (1 = as good). The layers that are adapted are 32 and 64 "
        "wide, so that rank 64 is no bound here. `blocks` adds the feed-forward layers and the "
        "convolutions of residual blocks to the attentions, `every layer` also the first and the "
        "last convolution, the embeddings of the timestep and all projections "
        "(`model.lora.target_modules: all`). The arms of every layer and the last two were added "
        "when the others had been seen.\n\n"
        f"{text}\n\n![Images](adapters.png)\n"
    )


if __name__ == "__main__":
    main()
