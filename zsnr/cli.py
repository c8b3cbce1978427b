"""The command line: `zsnr COMMAND ...`, the same as `python cli.py COMMAND ...`.

Each command imports only the floor it needs, when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zsnr.elastic import former_failure, note_failure
from zsnr.failures import tame_output, told
from zsnr.files import check_temporary
from zsnr.public import public_text
from zsnr.stops import stopping
from zsnr.untrusted import printable

if TYPE_CHECKING:
    from zsnr.codecs import LatentCodec

TRAINING = {
    "fit": "train from YAML, with validation and previews",
    "validate": "compute the validation loss of a checkpoint",
    "test": "the same as validate",
    "predict": "make images from a prompts file",
}

_OPEN = "open a .ckpt that has no run.json beside it; tensors and plain values only"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 for success, 1 for a plan that does not fit, 2 for
    wrong input or a machine that fails, 130 for Ctrl-C, 141 for a closed pipe; the doctor's is its
    verdict, and 3 for wrong input.
    """
    with stopping(alone=arguments is None):
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> int:
    """Run a command, and say what fails on one line."""
    command = arguments[0] if arguments else ""
    wrong = 3 if command == "doctor" else 2  # the doctor's 2 is a verdict
    tame_output()
    try:
        code = _dispatch(command, arguments)
        sys.stdout.flush()
    except SystemExit as stop:
        raise SystemExit(wrong if stop.code == 2 else stop.code) from None
    except KeyboardInterrupt:
        print("zsnr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at its end, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        text = told(error, command)
        if text is None or os.environ.get("ZSNR_TRACEBACK"):
            raise
        text = public_text(text)
        print(f"zsnr: error: {printable(text, one_line=True)}", file=sys.stderr)
        note_failure(text, error)
        return wrong
    return code


def _dispatch(command: str, arguments: Sequence[str]) -> int:
    if failed := former_failure():
        raise ValueError(failed)
    if command in TRAINING:
        check_temporary()
        from zsnr.training.lightning_cli import run

        run(arguments)
        return 0
    parser = _parser()
    options, settings = parser.parse_known_args(arguments)
    if settings and options.run not in (_data_cache, _plan):
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    options.settings = settings
    return options.run(options) or 0


def _print(*texts: object) -> None:
    """Print results, which may hold what strangers wrote."""
    for text in texts:
        print(printable(str(text)))


def _parser() -> argparse.ArgumentParser:
    from zsnr import __version__

    parser = argparse.ArgumentParser(
        prog="zsnr",
        description="Train and sample latent diffusion models with zero terminal SNR.",
        epilog="`zsnr COMMAND --help` explains every option. After a one-line error, "
        "ZSNR_TRACEBACK=1 shows where it came from.",
    )
    parser.add_argument("--version", action="version", version=f"zsnr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)

    data = commands.add_parser("data", help="make, index, cache, look at data").add_subparsers(
        required=True, metavar="COMMAND"
    )
    openmoji = data.add_parser(
        "openmoji",
        help="write shards of OpenMoji pictures with captions",
        description="Write webdataset shards of OpenMoji pictures on grey backgrounds, with "
        "captions such as 'grinning face on a black background', split into train and val.",
    )
    openmoji.add_argument("folder", help="where to write; must be empty or not exist")
    openmoji.add_argument("--size", type=int, default=64, help="pixels (default: 64)")
    openmoji.add_argument(
        "--glyphs",
        choices=("demo", "all"),
        default="all",
        help="the quickstart's few glyphs, or all of them (default: all)",
    )
    openmoji.set_defaults(run=_data_openmoji)

    index = data.add_parser(
        "index",
        help="list the samples of shards, and what is broken in them",
        description="Write an index file beside each shard, or into --output: one row a sample, "
        "with its place in the shard, the picture's size and the fields of its json. Broken and "
        "missing samples and shards are named. Training does this by itself for small sets.",
    )
    index.add_argument(
        "source", nargs="+", help="a folder, a pattern such as 'https://host/{000..099}.tar', ..."
    )
    index.add_argument(
        "--output", metavar="FOLDER", help="where to write; shards behind an address need it"
    )
    index.add_argument("--ledger", metavar="FILE", help="write what is broken as jsonl")
    index.add_argument(
        "--timeout", type=float, default=30.0, help="seconds until a server is stalled (default 30)"
    )
    index.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="shards read at once, each by a process (default: threads of one process)",
    )
    index.add_argument("--attempts", type=int, default=5, help="tries of one read (default 5)")
    index.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="send this to http servers, such as 'Authorization: Bearer ${TOKEN}', where ${TOKEN} "
        "is the environment's; repeatable",
    )
    index.add_argument(
        "--local-cache", metavar="FOLDER", help="keep whole remote shards there, as training does"
    )
    index.add_argument(
        "--max-gib", type=float, default=100.0, help="of --local-cache, in GiB (default 100)"
    )
    index.add_argument("--json", action="store_true", help="print the summary as JSON")
    index.set_defaults(run=_data_index)

    cache = data.add_parser(
        "cache",
        help="encode the pictures of a training config once",
        usage="%(prog)s -c CONFIG --output FOLDER [options] [settings, such as --data.val DIR]",
        description="Encode the pictures of a training config once, so that training needs neither "
        "VAE nor text encoder: then train with --data.train FOLDER. The cache holds the VAE's mean "
        "and standard deviation of each picture (and of its mirror image, with data.pixels.flip), "
        "captions, json fields and, with --text, text embeddings. It is written shard by shard: "
        "run the same command again and it resumes. Under torchrun, or with --rank and --ranks, "
        "each process caches its share.",
    )
    cache.add_argument(
        "-c", "--config", action="append", required=True, help="YAML of `zsnr fit`; may be repeated"
    )
    cache.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    cache.add_argument(
        "--source", choices=("train", "val"), default="train", help="what to cache (default train)"
    )
    cache.add_argument("--text", action="store_true", help="cache text embeddings too")
    cache.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="of what is kept (default float16)",
    )
    cache.add_argument(
        "--batch-size", type=int, default=8, help="pictures encoded at a time (default 8)"
    )
    cache.add_argument(
        "--device", type=_device, help="where to encode (default: the GPU if there is one)"
    )
    cache.add_argument("--rank", type=int, help="this process (default: RANK, else 0)")
    cache.add_argument("--ranks", type=int, help="all processes (default: WORLD_SIZE, else 1)")
    cache.set_defaults(run=_data_cache)

    look = data.add_parser(
        "report",
        help="look at a data set: sizes, captions, brightness, and the schedule's effect",
        description="Write FOLDER/report.md with pictures: sizes, aspect ratios, caption lengths, "
        "what filters keep, brightness, and how much of its range the usual schedule would keep.",
    )
    look.add_argument("source", nargs="+", help="as for `data index`, or a folder of pictures")
    look.add_argument("--output", required=True, metavar="FOLDER", help="where to write; new")
    look.add_argument("--image-size", type=int, default=512, help="pixels (default 512)")
    look.add_argument(
        "--samples", type=int, default=2000, help="pictures to look at, evenly (default 2000)"
    )
    look.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="TEST",
        help="such as 'aesthetic>=5', 'pwatermark<=0.8', 'LANGUAGE in en,de'; may be repeated",
    )
    look.add_argument(
        "--missing",
        choices=("error", "keep", "drop"),
        default="error",
        help="what filters do with samples that lack the field (default error)",
    )
    look.add_argument("--aspect", action="store_true", help="count aspect-ratio buckets")
    look.add_argument(
        "--codec", help="measure its latents too: a folder, hub id, asset:openmoji_vae, or pixels"
    )
    look.add_argument("--codec-subfolder", help="such as vae, in a Stable Diffusion folder")
    look.add_argument(
        "--device", type=_device, help="where to encode (default: the GPU if there is one)"
    )
    look.add_argument("--index", metavar="FOLDER", help="where `data index --output` wrote")
    look.add_argument("--json", action="store_true", help="print the figures as JSON")
    look.set_defaults(run=_data_report)

    plan = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="say what a training run needs of memory and time",
        usage="%(prog)s CONFIG [CONFIG ...] [options] [settings, such as --data.batch_size 64]",
        description="Say what `zsnr fit` with these configs will need, without loading a model or "
        "data: bytes on each rank, how the global batch is divided, images and hours. Sizes are "
        "those of weights, gradients, optimizer state, averaged weights, frozen parts, and of what "
        "a forward and backward pass of one micro-batch keeps and uses. Exit code 1 = it does not "
        "fit into --memory, 2 = wrong input.",
    )
    plan.add_argument(
        "configs",
        nargs="*",
        metavar="CONFIG",
        help="YAML of `zsnr fit`; later files lay over earlier ones",
    )
    plan.add_argument(
        "-c", "--config", action="append", default=[], help="the same, as `zsnr fit` takes it"
    )
    plan.add_argument(
        "--ranks", type=int, metavar="N", help="processes in all (default: the trainer's)"
    )
    plan.add_argument(
        "--ranks-per-node", type=int, metavar="M", help="of one node (default: the trainer's)"
    )
    plan.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="what one rank may use: say whether it fits, and if not, the way out. On a GPU leave "
        "1 to 2 GiB for CUDA itself",
    )
    rate = plan.add_mutually_exclusive_group()
    rate.add_argument(
        "--images-per-second", type=float, metavar="X", help="over all ranks, to tell the hours"
    )
    rate.add_argument(
        "--measure",
        action="store_true",
        help="measure it by a few steps on this machine, times the ranks, without loading and "
        "communication; this builds the model, with random weights",
    )
    plan.add_argument("--json", action="store_true", help="print it as JSON, sizes in bytes")
    plan.set_defaults(run=_plan)

    schedule = commands.add_parser(
        "schedule",
        help="print and plot a schedule and its timesteps",
        description="Print a schedule as it was published and rescaled to zero terminal SNR, and "
        "the timesteps of each spacing (Table 2); --plot draws log SNR and sqrt(abar) (Figure 2).",
    )
    schedule.add_argument(
        "target",
        nargs="?",
        default="scaled_linear",
        help="scaled_linear (Stable Diffusion's), linear, cosine, or what `zsnr doctor` reads: a "
        "folder, scheduler_config.json, .safetensors, checkpoint or YAML (default scaled_linear)",
    )
    schedule.add_argument(
        "--num-steps", type=int, default=10, metavar="S", help="of the timesteps (default 10)"
    )
    schedule.add_argument(
        "--spacing", action="append", metavar="NAME", help="only this one; may be repeated"
    )
    schedule.add_argument("--plot", metavar="FILE", help="write a PNG; must not exist")
    schedule.add_argument("--json", action="store_true", help="print all timesteps' values as JSON")
    schedule.add_argument("--open", action="store_true", help=_OPEN)
    schedule.set_defaults(run=_schedule)

    timesteps = commands.add_parser("timesteps", help="search timesteps").add_subparsers(
        required=True, metavar="COMMAND"
    )
    optimize = timesteps.add_parser(
        "optimize",
        help="choose the timesteps of few steps for a data set",
        description="Choose timesteps for a data set, by the exact denoiser of half of its "
        "pictures, without a model: one timestep moves at a time, as long as brightness and spread "
        "of samples come nearer to those of many steps. The other half judges the grid beside "
        "log_snr, karras and trailing. All of it is measured without guidance: with a guidance "
        "scale above 1 compare the grid with log_snr before you use it. Use the file as any "
        "spacing: --spacing grid.json.",
    )
    optimize.add_argument(
        "source", nargs="+", help="a folder, a pattern such as 'https://host/{000..099}.tar', ..."
    )
    optimize.add_argument(
        "--num-steps", type=int, default=10, metavar="S", help="of the grid (default 10)"
    )
    optimize.add_argument(
        "--output", required=True, metavar="FILE", help="where to write, .json; must not exist"
    )
    optimize.add_argument(
        "--sampler",
        default="multiscale",
        metavar="NAME",
        help="what the grid is for (default multiscale)",
    )
    optimize.add_argument(
        "--schedule",
        default="scaled_linear",
        metavar="TARGET",
        help="as for `zsnr schedule` (default scaled_linear, rescaled to zero SNR)",
    )
    optimize.add_argument(
        "--image-size", type=int, default=32, help="pixels that the denoiser sees (default 32)"
    )
    optimize.add_argument(
        "--pictures", type=int, default=1000, help="how many, evenly from the set (default 1000)"
    )
    optimize.add_argument(
        "--samples", type=int, default=256, help="of each grid that is tried (default 256)"
    )
    optimize.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    optimize.add_argument("--json", action="store_true", help="print what was found as JSON")
    optimize.set_defaults(run=_timesteps_optimize)

    configs = commands.add_parser("configs", help="list, show and copy the shipped YAML")
    actions = configs.add_subparsers(required=True, metavar="COMMAND")
    actions.add_parser("list", help="list the names").set_defaults(run=_configs_list)
    show = actions.add_parser("show", help="print one")
    show.add_argument("name", help="a name that `list` shows")
    show.set_defaults(run=_configs_show)
    copy = actions.add_parser("copy", help="copy one to change it")
    copy.add_argument("name", help="a name that `list` shows")
    copy.add_argument("to", nargs="?", default=".", help="file or folder (default: here)")
    copy.set_defaults(run=_configs_copy)

    checkpoint = commands.add_parser("checkpoint", help="work on checkpoints").add_subparsers(
        required=True, metavar="COMMAND"
    )
    consolidate = checkpoint.add_parser(
        "consolidate",
        help="make one file of a checkpoint in shards",
        description="Make one file of a sharded checkpoint: weights, averages and optimizer state, "
        "as a run on one device would have written it. predict, validate and fit read both.",
    )
    consolidate.add_argument("folder", help="the checkpoint, such as checkpoints/last.ckpt")
    consolidate.add_argument(
        "--output", required=True, metavar="FILE", help="where to write; must not exist"
    )
    consolidate.set_defaults(run=_checkpoint_consolidate)

    export = commands.add_parser(
        "export",
        help="write a model for diffusers, ComfyUI and A1111",
        description="Write a model so that others sample it right: a folder of diffusers with a "
        "scheduler config that says schedule, prediction type and spacing, and a model card; or a "
        "single file in the layout that ComfyUI and A1111 read. Averaged weights are taken, unless "
        "--raw is given.",
    )
    export.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint of zsnr (file or shards), a folder of diffusers, or a single file",
    )
    export.add_argument(
        "--output", required=True, metavar="PATH", help="where to write; must not exist"
    )
    export.add_argument(
        "--format",
        choices=("diffusers", "single-file", "lora", "lora-kohya"),
        help="what to write (default: single-file where PATH ends in .safetensors, else "
        "diffusers); lora and lora-kohya write adapters alone, as diffusers and kohya's scripts do",
    )
    export.add_argument(
        "--merge", action="store_true", help="write the whole model, with its adapters merged"
    )
    export.add_argument(
        "--base", metavar="MODEL", help="where the model under the adapters is, if it has moved"
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the weights (default float32)",
    )
    export.add_argument(
        "--raw", action="store_true", help="take the raw weights in the place of the averaged ones"
    )
    export.add_argument("--json", action="store_true", help="print what was written as JSON")
    export.set_defaults(run=_export)

    doctor = commands.add_parser(
        "doctor",
        help="say what a model is, and whether it is flawed",
        description="Say what a model declares, without loading it or running anything in it, and "
        "judge it. fixed (exit code 0): the schedule ends at SNR 0, with v or sample prediction, "
        "and sampling starts there. flawed (1): the schedule keeps signal at the last timestep. "
        "inconsistent (2): zero SNR with epsilon prediction, a spacing that misses the last "
        "timestep, or a scheduler class that drops the rescale. unreadable (3): it cannot be told, "
        "--fix cannot fix it, or the command is wrong.",
    )
    doctor.add_argument(
        "target",
        help="a folder of diffusers, a scheduler_config.json, a .safetensors file, a checkpoint or "
        "folder of checkpoints of zsnr, or a YAML of `zsnr fit`",
    )
    doctor.add_argument(
        "--num-steps",
        type=int,
        action="append",
        default=[],
        metavar="S",
        help="a step count to look at besides 10, 20, 25, 30 and 50; may be repeated",
    )
    doctor.add_argument("--json", action="store_true", help="print it as JSON")
    doctor.add_argument("--open", action="store_true", help=_OPEN)
    doctor.add_argument(
        "--fix",
        action="store_true",
        help="write a corrected scheduler_config.fixed.json beside the scheduler's config",
    )
    doctor.add_argument(
        "--in-place", action="store_true", help="with --fix: replace the config instead"
    )
    doctor.set_defaults(run=_doctor)

    _add_compare(commands)
    _add_figure(commands)

    report = commands.add_parser(
        "report",
        help="write report.md of a run: pictures, loss, brightness",
        description="Write RUN/report.md with the pictures that predict made in RUN/samples, the "
        "loss curve, and the brightness of samples and data. Also shows the flaw of the usual "
        "schedule without training, by an exact denoiser on the same pictures.",
    )
    report.add_argument("run_folder", metavar="RUN", help="the run's folder")
    report.add_argument("--data", required=True, help="the shards it was trained on")
    report.set_defaults(run=_report)
    return parser


def _device(name: str) -> str:
    """Check the name of a device, before anything is loaded onto it."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} is not a device here: {reason}") from error
    return name


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that samples; None = not given."""
    parser.add_argument(
        "--sampler",
        metavar="NAME",
        help="The sampler, such as ddim, multiscale or euler. The default, auto, chooses sampler "
        "and spacing for the number of steps and the guidance scale. If only --spacing is given, "
        "auto is ddim, or the sampler that a grid file was made for.",
    )
    parser.add_argument(
        "--num-steps",
        type=int,
        metavar="S",
        help="Number of sampling steps (default 50). It is enough to set this alone: sampler and "
        "spacing follow from it. With 50 and more steps they are ddim and trailing.",
    )
    parser.add_argument(
        "--spacing",
        metavar="NAME",
        help="The timestep spacing, such as trailing, guided or log_snr, or a grid file. The "
        "default, auto, chooses it with the sampler. If only --sampler is given, auto is "
        "trailing.",
    )
    parser.add_argument("--guidance-scale", type=float, metavar="W", help="w (default 7.5)")
    parser.add_argument(
        "--guidance-rescale", type=float, metavar="PHI", help="phi, 0 to 1 (default 0.7)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    """Add the other options of guidance, as texts of arms; None = not given."""
    for name, metavar, text in (
        ("interval", "LOW:HIGH", "levels sigma / alpha that are guided, such as 0.3:inf"),
        ("method", "NAME", "cfg, apg, cfg_zero_star or cfg_pp (default cfg)"),
        ("curve", "LOG_SNR:W/...", "w by log SNR, such as -6:1/0:7.5, instead of one w"),
        ("at-zero-snr", "true|false", "guide at SNR 0 (default true)"),
        ("threshold", "PERCENTILE", "dynamic threshold, for models of pixels, such as 0.995"),
        ("apg-parallel", "ETA", "with apg (default 0)"),
        ("apg-norm", "R", "with apg: bound on the norm of the difference"),
        ("against", "negative|raw", "what to guide away from (default negative)"),
    ):
        parser.add_argument(f"--guidance-{name}", metavar=metavar, help=text)


def _add_oracle(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that samples an exact denoiser; None = not given."""
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="with --oracle (default 32)"
    )
    parser.add_argument(
        "--betas",
        choices=("scaled_linear", "linear", "cosine"),
        help="with --oracle: the schedule (default scaled_linear)",
    )
    parser.add_argument(
        "--codec",
        help="with --oracle: sample its latents, in its scale: a folder, hub id, "
        "asset:openmoji_vae, or pixels (default pixels)",
    )
    parser.add_argument("--codec-subfolder", help="such as vae, in a Stable Diffusion folder")


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare models or ways to sample: pictures, brightness, one page",
        usage="%(prog)s MODEL ... --output FOLDER [options]\n       "
        "%(prog)s --oracle SHARDS --output FOLDER [options]",
        description="Sample two or more arms by the same prompts and seeds and write "
        "FOLDER/index.html, a page that stands alone: pictures side by side, luma histograms, "
        "numbers, settings, and whether brightness follows the prompts; FOLDER/compare.json with "
        "every number; and the pictures. An arm is a model, a way to sample, or both. With "
        "--oracle the network is the exact denoiser of your own pictures: the flaw of a schedule "
        "without any model.",
        epilog="Examples: `zsnr compare a.ckpt b.ckpt --output page`; `zsnr compare a.ckpt --vary "
        "guidance_rescale=0,0.35,0.7,1 --output sweep`; `zsnr compare --arm 'name=before "
        "model=a.ckpt spacing=leading' --arm 'name=after model=b1.ckpt,b2.ckpt,b3.ckpt' --data "
        "shards --prompts data --output page`.",
    )
    compare.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a checkpoint, folder of diffusers, single file or hub id; each is an arm, or what "
        "each --arm without a model of its own samples; A,B is one arm of several trainings",
    )
    compare.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="'SETTING=VALUE ...'",
        help="an arm; may be repeated. Settings: name, model, schedule (original or rescaled; "
        "default: as the model declares), spacing, sampler, num_steps, guidance_scale, "
        "guidance_rescale, guidance_interval (LOW:HIGH), guidance_method, guidance_curve "
        "(LOG_SNR:W/LOG_SNR:W), guidance_at_zero_snr (true or false), guidance_threshold, "
        "guidance_apg_parallel, guidance_apg_norm, guidance_against; those not named are as the "
        "options below say",
    )
    compare.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SETTING=VALUE,VALUE",
        help="make of every arm one with each value; may be repeated",
    )
    compare.add_argument("--output", required=True, metavar="FOLDER", help="where to write; new")
    compare.add_argument(
        "--prompts",
        metavar="FILE",
        help=".txt or .jsonl, which may say group and brightness_rank; 'data' = captions of "
        "--data; 'empty' = no prompt (default: a suite from solid black to solid white)",
    )
    compare.add_argument(
        "--num-prompts",
        type=int,
        default=64,
        metavar="N",
        help="captions of the data (default 64)",
    )
    compare.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="pictures of each prompt, by seeds s .. s+N-1 (default: as the file says, 2 of the "
        "suite, 1 of a caption, 64 without a prompt, 256 with --oracle)",
    )
    compare.add_argument(
        "--data",
        nargs="+",
        metavar="SHARDS",
        help="measure the distance of brightness to these pictures",
    )
    compare.add_argument(
        "--samples",
        type=int,
        default=1000,
        metavar="N",
        help="pictures of the data to look at, by chance (default 1000)",
    )
    _add_sampling(compare)
    _add_guidance(compare)
    compare.add_argument(
        "--oracle",
        nargs="+",
        metavar="SHARDS",
        help="compare without a model, by the exact denoiser of these pictures; by default the "
        "original and the rescaled schedule with leading and trailing timesteps",
    )
    _add_oracle(compare)
    compare.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="pictures at a time (default 8, 64 with --oracle)",
    )
    compare.add_argument(
        "--device", type=_device, help="where to sample (default: the GPU if there is one)"
    )
    compare.add_argument("--json", action="store_true", help="print compare.json")
    compare.set_defaults(run=_compare)


def _add_figure(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    figure = commands.add_parser(
        "figure",
        help="draw the paper's Figure 2, 4, 5 or 6 with a model or without one",
        description="Draw a figure of the paper, as PNG. 2: log SNR and sqrt(abar), original and "
        "rescaled. 4: leading, linspace and trailing timesteps at S = 5 and 25. 5: the prediction "
        "of x_0 after each step; at zero terminal SNR the first is the same whatever the noise. 6: "
        "guidance rescale 0, 0.25, 0.5, 0.75, 1. With --oracle, the exact denoiser of your own "
        "pictures is the model, and a prompt is a group of them.",
    )
    figure.add_argument("number", type=int, choices=(2, 4, 5, 6), help="which one")
    source = figure.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        help="a checkpoint, folder of diffusers, single file or hub id; in Figure 2 also linear, "
        "cosine or scaled_linear",
    )
    source.add_argument(
        "--oracle", nargs="+", metavar="SHARDS", help="no model: these pictures themselves"
    )
    figure.add_argument("--output", required=True, metavar="FILE", help="a new .png")
    figure.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what to show; may be repeated (default: three of the suite). With --oracle: words of "
        "captions, which make a group (default: the whole set; in Figure 6 its darkest and "
        "brightest quarter)",
    )
    figure.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="seeds of each prompt (default: 2; more of one alone)",
    )
    figure.add_argument(
        "--schedule",
        choices=("original", "rescaled"),
        help="default: as the model declares; rescaled with --oracle",
    )
    _add_sampling(figure)
    figure.add_argument(
        "--samples",
        type=int,
        default=1000,
        metavar="N",
        help="with --oracle: pictures to know, by chance (default 1000)",
    )
    _add_oracle(figure)
    figure.add_argument(
        "--device", type=_device, help="where to sample (default: the GPU if there is one)"
    )
    figure.set_defaults(run=_figure)


def _data_openmoji(options: argparse.Namespace) -> None:
    from zsnr.data.openmoji import write_openmoji_shards

    write_openmoji_shards(options.folder, size=options.size, glyphs=options.glyphs)


def _data_index(options: argparse.Namespace) -> None:
    from zsnr.data.index import write_indices
    from zsnr.data.local_cache import LocalCache

    kept = options.local_cache
    cache = None if kept is None else LocalCache(kept, options.max_gib)
    headers = {}
    for text in options.header:
        name, colon, value = (part.strip() for part in text.partition(":"))
        if not (name and colon):
            raise ValueError(f"--header: wanted 'NAME: VALUE', {len(text)} characters came.")
        headers[name] = value
    _print(
        write_indices(
            options.source,
            None if options.output is None else Path(options.output).expanduser(),
            ledger=None if options.ledger is None else Path(options.ledger).expanduser(),
            attempts=options.attempts,
            timeout=options.timeout,
            processes=options.processes,
            headers=headers,
            local_cache=cache,
            as_json=options.json,
        )
    )


def _data_cache(options: argparse.Namespace) -> None:
    check_temporary()
    from zsnr.training.caching import run_cache

    _print(
        run_cache(
            options.config,
            options.settings,
            output=options.output,
            source=options.source,
            text=options.text,
            dtype=options.dtype,
            batch_size=options.batch_size,
            device=options.device,
            rank=options.rank,
            ranks=options.ranks,
        )
    )


def _data_report(options: argparse.Namespace) -> None:
    import json

    import torch

    from zsnr.data.buckets import AspectBuckets
    from zsnr.data.filters import parse_filter
    from zsnr.reports.data import write_data_report

    codec = _codec(options.codec, options.codec_subfolder)
    if codec is not None:
        codec.latent_shape(options.image_size, options.image_size)
    report, facts = write_data_report(
        options.source,
        Path(options.output).expanduser(),
        image_size=options.image_size,
        most=options.samples,
        filters=[parse_filter(text, options.missing) for text in options.filter],
        aspect=AspectBuckets() if options.aspect else None,
        codec=codec,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        index_folder=None if options.index is None else Path(options.index).expanduser(),
    )
    _print(json.dumps(facts) if options.json else report)


def _checkpoint_consolidate(options: argparse.Namespace) -> None:
    from zsnr.checkpoints.sharded import consolidate, is_sharded, save_file
    from zsnr.files import check_new

    folder, output = Path(options.folder).expanduser(), Path(options.output).expanduser()
    if not is_sharded(folder):
        what = "a file already" if folder.is_file() else "not a sharded checkpoint"
        raise ValueError(f"{folder} is {what}: wanted a folder that training wrote in shards.")
    check_new(output)
    save_file(consolidate(folder), output)
    _print(output)


def _export(options: argparse.Namespace) -> None:
    import json

    from zsnr.checkpoints.export import Form, export_diffusers, read_exportable
    from zsnr.checkpoints.lora import Layout, write_lora
    from zsnr.files import check_new

    output = Path(options.output).expanduser()
    check_new(output)
    file = output.suffix == ".safetensors"
    kind = options.format or ("single-file" if file else "diffusers")
    layouts: dict[str, Layout] = {"lora": "diffusers", "lora-kohya": "kohya"}
    adapters = kind in layouts
    if kind == "diffusers" and file:
        raise ValueError(
            f"{output}: a folder of diffusers is not a file. Use --format single-file."
        )
    if kind in ("single-file", "lora-kohya") and not file:
        raise ValueError(f"{output}: wanted a name that ends in .safetensors for one file.")
    if adapters and options.merge:
        raise ValueError("--merge writes a whole model: leave it out, or --format lora.")
    form: Form = "lora" if adapters else "single-file" if kind == "single-file" else "diffusers"
    model, facts = read_exportable(
        options.checkpoint,
        ema=not options.raw,
        base=options.base,
        merged=options.merge,
        form=form,
    )
    print(printable(f"writing {output}"), file=sys.stderr)
    metadata = {"zsnr.run": json.dumps(facts)}
    if adapters:
        write_lora(model, output, layout=layouts[kind], dtype=options.dtype, metadata=metadata)
    elif kind == "single-file":
        from zsnr.checkpoints.single_file import write_single_file

        write_single_file(model, output, dtype=options.dtype, metadata=metadata)
    else:
        export_diffusers(model, output, dtype=options.dtype, facts=facts)
    written = {
        **facts,
        "output": str(output),
        "format": kind,
        "dtype": options.dtype,
        "schedule": model.schedule.settings(),
        "prediction_type": model.prediction_type,
        "image_size": model.image_size,
        "terminal_snr": float(model.schedule.snr[-1]),
    }
    _print(json.dumps(written) if options.json else output)


def _compare(options: argparse.Namespace) -> None:
    from zsnr.reports.arms import GUIDANCE, SETTINGS, Arm, make_arms, parse_setting
    from zsnr.reports.compare import compare_exact, compare_models, comparison_text, to_json

    exact = options.oracle is not None
    _check_options(
        options,
        ("data", "prompts", "device", *GUIDANCE)
        if exact
        else ("image_size", "betas", "codec", "codec_subfolder"),
        "belongs to a comparison of models, not to --oracle" if exact else "belongs to --oracle",
    )
    given = {name: getattr(options, name, None) for name in SETTINGS}
    defaults = Arm(
        **{
            name: parse_setting(name, value) if isinstance(value, str) else value
            for name, value in given.items()
            if value is not None
        }
    )
    varied = options.vary
    if exact and not options.arm and not varied:
        varied = ["schedule=original,rescaled"]
        if options.spacing is None:
            varied.append("spacing=leading,trailing")
    arms = make_arms(options.models, options.arm, varied, defaults, exact=exact)
    output = Path(options.output).expanduser()
    if exact:
        from zsnr.schedule import NoiseSchedule

        facts = compare_exact(
            arms,
            output,
            data=options.oracle,
            image_size=32 if options.image_size is None else options.image_size,
            codec=_codec(options.codec, options.codec_subfolder),
            most=options.samples,
            count=256 if options.count is None else options.count,
            seed=options.seed,
            schedule=NoiseSchedule(options.betas or "scaled_linear"),
            batch_size=64 if options.batch_size is None else options.batch_size,
        )
    else:
        facts = compare_models(
            arms,
            output,
            prompts=options.prompts,
            num_prompts=options.num_prompts,
            count=options.count,
            seed=options.seed,
            data=options.data,
            most=options.samples,
            batch_size=8 if options.batch_size is None else options.batch_size,
            device=options.device,
        )
    _print(to_json(facts) if options.json else comparison_text(facts, output / "index.html"))


def _figure(options: argparse.Namespace) -> None:
    from zsnr.reports.arms import SETTINGS, Arm
    from zsnr.reports.compare import check_pictures
    from zsnr.reports.figures import DEFAULTS, draw_figure, draw_schedule

    output = Path(options.output).expanduser()
    given = {name: getattr(options, name, None) for name in SETTINGS}
    fixed = {
        2: ("schedule", "spacing", "sampler", "guidance_scale", "guidance_rescale"),
        4: ("num_steps", "spacing"),
        5: (),
        6: ("guidance_rescale",),
    }[options.number]
    _check_options(options, fixed, f"is not free in Figure {options.number}")
    oracle = ("image_size", "betas", "codec", "codec_subfolder")
    if options.oracle is None:
        _check_options(options, oracle, "belongs to --oracle")
    if options.number == 2:
        _check_options(options, ("prompt", "count", "device"), "says nothing in Figure 2")
        if options.oracle is not None:
            check_pictures(options.oracle)
        draw_schedule(
            options.model or options.betas or "scaled_linear", options.num_steps or 10, output
        )
        _print(output)
        return
    if options.model is None and options.oracle is None:
        raise ValueError(f"Figure {options.number} needs --model MODEL or --oracle SHARDS.")
    settings = {name: value for name, value in given.items() if value is not None}
    draw_figure(
        options.number,
        Arm(**{**DEFAULTS[options.number], **settings}),
        output,
        model=options.model,
        data=options.oracle,
        prompts=options.prompt,
        count=options.count,
        seed=options.seed,
        image_size=32 if options.image_size is None else options.image_size,
        codec=_codec(options.codec, options.codec_subfolder),
        betas=options.betas or "scaled_linear",
        most=options.samples,
        device=options.device,
    )
    _print(output)


def _check_options(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuse options that would do nothing here."""
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} {why}: leave it out.")


def _codec(name: str | None, subfolder: str | None) -> LatentCodec | None:
    """Find what --codec names."""
    from zsnr.codecs import AutoencoderKLCodec, PixelCodec

    if subfolder is not None and name in (None, "pixels"):
        raise ValueError(
            f"--codec-subfolder {subfolder} is of a --codec FOLDER, which is not given."
        )
    if name is None:
        return None
    return PixelCodec() if name == "pixels" else AutoencoderKLCodec(name, subfolder=subfolder)


def _report(options: argparse.Namespace) -> None:
    from zsnr.reports.run import write_report

    _print(write_report(options.run_folder, options.data))


def _plan(options: argparse.Namespace) -> int:
    check_temporary()
    from zsnr.training.planning import run_plan

    text, fits = run_plan(
        [*options.configs, *options.config],
        options.settings,
        ranks=options.ranks,
        ranks_per_node=options.ranks_per_node,
        memory=options.memory,
        images_per_second=options.images_per_second,
        measure=options.measure,
        as_json=options.json,
    )
    _print(text)
    return 0 if fits else 1


def _schedule(options: argparse.Namespace) -> None:
    from zsnr.files import check_new
    from zsnr.reports.schedule import (
        find_schedule,
        plot_schedule,
        schedule_facts,
        schedule_text,
        to_json,
    )

    path = None if options.plot is None else Path(options.plot).expanduser()
    if path is not None:
        if path.suffix != ".png":
            raise ValueError(f"--plot {path}: wanted a name that ends in .png.")
        check_new(path)
    schedule = find_schedule(options.target, open_pickle=options.open)
    facts = schedule_facts(schedule, options.num_steps, options.spacing)
    if path is not None:
        plot_schedule(facts, path)
    _print(to_json(facts) if options.json else schedule_text(schedule, facts, options.target))


def _timesteps_optimize(options: argparse.Namespace) -> None:
    import json

    from zsnr.reports.grid import grid_text, write_grid
    from zsnr.reports.schedule import find_schedule

    output = Path(options.output).expanduser()
    facts = write_grid(
        options.source,
        output,
        options.num_steps,
        sampler=options.sampler,
        schedule=find_schedule(options.schedule),
        image_size=options.image_size,
        pictures=options.pictures,
        samples=options.samples,
        seed=options.seed,
    )
    _print(json.dumps(facts) if options.json else grid_text(facts, output))


def _doctor(options: argparse.Namespace) -> int:
    from zsnr.checkpoints.doctor import examine, fix

    if options.in_place and not options.fix:
        raise ValueError("--in-place belongs to --fix.")
    found = examine(options.target, num_steps=options.num_steps, open_pickle=options.open)
    _print(found.to_json() if options.json else found.to_text())
    if options.fix and found.verdict != "unreadable":
        try:
            done = fix(options.target, in_place=options.in_place)
        except (ValueError, OSError) as error:
            print(f"zsnr: error: {printable(str(error), one_line=True)}", file=sys.stderr)
            return 3
        print(*map(printable, done), sep="\n", file=sys.stderr)
    return found.exit_code


def _configs_folder() -> Path:
    shipped = Path(__file__).parent / "configs"
    return shipped if shipped.is_dir() else Path(__file__).parents[1] / "configs"


def _config(name: str) -> Path:
    folder = _configs_folder()
    path = folder / (name if Path(name).suffix else f"{name}.yaml")
    if not path.is_file():
        raise ValueError(f"There is no config {name!r}. Known: {', '.join(_config_names())}.")
    return path


def _config_names() -> list[str]:
    folder = _configs_folder()
    yaml = [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")]
    return sorted(yaml) + sorted(str(p.relative_to(folder)) for p in folder.rglob("*.sbatch"))


def _configs_list(options: argparse.Namespace) -> None:
    for name in _config_names():
        lines = _config(name).read_text().splitlines()
        first = lines[lines[0].startswith("#!")]
        _print(f"{name:24} {first.lstrip('# ')}")


def _configs_show(options: argparse.Namespace) -> None:
    print(_config(options.name).read_text(), end="")


def _configs_copy(options: argparse.Namespace) -> None:
    source, to = _config(options.name), Path(options.to)
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise ValueError(f"{target} exists: choose another name.")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is not a folder.")
    target.write_text(source.read_text())
    _print(target)


if __name__ == "__main__":
    sys.exit(main())
