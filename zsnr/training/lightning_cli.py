"""LightningCLI with this package's defaults, links, short options and short errors."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zsnr.checkpoints.checkpoint_file import KEY, open_checkpoint
from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner, Remembered
from zsnr.data.order import accumulation
from zsnr.data.sources import Source
from zsnr.files import replacing, side_file
from zsnr.guidance import Guidance
from zsnr.lora import LoRA
from zsnr.loss import LossWeighting
from zsnr.pipeline import Sampling, check_steps
from zsnr.public import MARK, left_out
from zsnr.samplers import Sampler, get_sampler
from zsnr.samplers.recommend import AUTO, resolve_sampling
from zsnr.schedule import NoiseSchedule
from zsnr.training.board import TrainingBoard
from zsnr.training.callbacks import PredictionWriter
from zsnr.training.checkpointing import CheckpointFiles, Checkpoints, find_last
from zsnr.training.checks import (
    check_guidance,
    check_lora,
    check_resumed,
    check_settings,
    check_unsharded,
)
from zsnr.training.configs import check_configs, read_safely
from zsnr.training.data import DataModule, check_shards, read_requests
from zsnr.training.facts import public_config
from zsnr.training.image_metrics import ImageMetrics, check_files
from zsnr.training.loggers import begin_loggers, continue_loggers, default_loggers
from zsnr.training.module import LatentDiffusion
from zsnr.training.preemption import EXIT_CODE, Preemption, listen, restarted, stopped_early
from zsnr.training.run_lock import RunLock
from zsnr.training.strategy import FullyShardedStrategy, check_strategy
from zsnr.training.watchdog import Watchdog
from zsnr.untrusted import shown

# Short options of every command that samples; --sampler and --seed need more than a name.
SHORT_OPTIONS = {
    "--num-steps": "--model.sampling.num_steps",
    "--spacing": "--model.sampling.spacing",
    **{
        f"--guidance-{option.name.replace('_', '-')}": f"--model.sampling.guidance.{option.name}"
        for option in dataclasses.fields(Guidance)
    },
    "--prompts": "--data.prompts",
    "--output": "--output.folder",
}

DEFAULTS = {
    # The train loader is endless: a step counts, an epoch does not.
    "trainer.max_epochs": -1,
    "trainer.check_val_every_n_epoch": None,
    "trainer.val_check_interval": 1000,
    "trainer.use_distributed_sampler": False,
    "trainer.num_sanity_val_steps": 0,
    # The default of LatentDiffusion is resolved for its own number of steps.
    "model.sampling.sampler": AUTO,
    "model.sampling.spacing": AUTO,
}


_PREDICT_HELP = (
    "Short options: --prompts FILE, --output FOLDER, --sampler NAME|auto, --num-steps N, "
    "--spacing NAME|auto, --guidance-scale W, --guidance-rescale PHI, --guidance-interval "
    "[LOW,HIGH] (of sigma / alpha), --guidance-method cfg|apg|cfg_zero_star|cfg_pp, "
    "--guidance-curve [[LOG_SNR,W],...], --guidance-at-zero-snr false, --guidance-threshold "
    "PERCENTILE, "
    "--guidance-apg-parallel ETA, --guidance-apg-norm R, --guidance-against negative|raw, "
    "--seed SEED (of prompts that name none). The number of steps alone is enough: where sampler "
    "and spacing are auto, which is the default, both are chosen for the number of steps and the "
    "guidance scale. If only one of them is given, the other is the paper's: ddim, trailing."
)


class SaveConfigOfFit(SaveConfigCallback):
    """Saves the whole configuration beside the logs of a training run, and of nothing else."""

    already_saved: bool

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it without secrets, and give it to the board, as other people see both."""
        if stage != "fit" or self.already_saved:
            return
        self.already_saved = True
        folder = Path(trainer.log_dir or ".")  # of the first rank; all ranks ask for it
        if not trainer.is_global_zero:
            return
        path = folder / self.config_filename
        with side_file(path), replacing(path) as beside:
            config = self.parser.dump(self.config, skip_none=False)
            beside.write_text(public_config(config, MARK), encoding="utf-8")
        settings = self.config.clone()
        settings.ckpt_path = None  # a resumed run has the same settings
        for callback in trainer.callbacks:
            if isinstance(callback, TrainingBoard):
                callback.config = public_config(self.parser.dump(settings))


class ZsnrCLI(LightningCLI):
    """fit, validate, test and predict from YAML."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(PredictionWriter, "output")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(ImageMetrics, "metrics")
        parser.add_lightning_class_args(TrainingBoard, "board")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(Preemption, "preemption")
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("data.seed", "model.seed")
        parser.set_defaults(DEFAULTS)

    def _parse_ckpt_path(self) -> None:
        """Let no checkpoint's hyper_parameters name classes that the config does not."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ValueError(short_message(str(error))) from error
        self.trainer.strategy.checkpoint_io = CheckpointFiles()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        if trainer.logger is None:
            kwargs["logger"] = default_loggers(trainer.default_root_dir or ".")
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Refuse what cannot train; let the loggers go on with a resumed run."""
        check_strategy(self.trainer.strategy)
        data = self.datamodule
        accumulation(data.batch_size, self.trainer.world_size, data.max_batch_size_per_device)
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            self.trainer.strategy.shard_size()
        checkpoint = self.config.fit.ckpt_path
        folder = checkpoint_folder(self.config.fit)
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.resumed_from = Path(checkpoint).name if checkpoint else ""
        lock = RunLock(folder)
        lock.take(self.trainer, self.model)
        self.trainer.callbacks.insert(0, lock)
        if not self.trainer.is_global_zero:
            return
        try:
            if checkpoint is None:
                begin_loggers(self.trainer.loggers)
            else:
                continue_loggers(self.trainer.loggers, open_checkpoint(checkpoint)["global_step"])
        except BaseException:
            lock.release()
            raise

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work before a model or data is loaded."""
        config = self.config[self.subcommand]
        model, data = config.model, config.data
        lost = left_out(config.as_dict())
        if lost:
            raise ValueError(
                f"{', '.join(lost)}: the config was saved without a password, signature or command "
                f"({MARK} is in its place). Give the whole setting again, such as --{lost[0]} "
                "VALUE."
            )
        check_model(model)
        if self.subcommand == "fit" and is_sharded(config.trainer):
            check_unsharded(model.lora is not None)
        if self.subcommand == "fit" and config.trainer.max_steps < 1:
            raise ValueError("trainer.max_steps is not set: say how many steps to train.")
        folder = checkpoint_folder(config)
        if self.subcommand == "fit":
            config.ckpt_path = _resumed(config.ckpt_path, folder)
        elif config.ckpt_path == "last":
            config.ckpt_path = str(find_last(folder) or folder / "last.ckpt")
        checkpoint = config.ckpt_path
        if checkpoint is None:
            if self.subcommand != "fit" and not isinstance(model.unet, str):
                raise ValueError(f"{self.subcommand} needs a checkpoint: --ckpt_path FILE.")
        else:
            check_resumed(
                open_checkpoint(checkpoint)[KEY],
                {
                    "schedule": NoiseSchedule(**model.schedule.as_dict()).settings(),
                    "prediction_type": model.prediction_type,
                },
            )
        if self.subcommand != "predict":
            check_files(config.metrics, writes_once=self.subcommand != "fit")
        if self.subcommand == "predict":
            config.trainer.logger = False  # it logs nothing, and a CSV logger would start anew
            if data.prompts is None or config.output.folder is None:
                raise ValueError("predict needs --prompts FILE and --output FOLDER.")
            read_requests(data.prompts)
        else:
            for name in ("train", "val") if self.subcommand == "fit" else ("val",):
                if data[name] is not None:
                    train = _sources(data.train) if self.subcommand == "fit" else None
                    check_shards(train, _sources(data.val))
                elif name == "train" or self.subcommand != "fit":
                    raise ValueError(f"{self.subcommand} needs data.{name}: a folder of shards.")


def _sources(parsed: Any) -> Any:
    """Build the objects with path and weight among the sources of a parsed config."""
    if not isinstance(parsed, list):
        return parsed
    return [Source(**vars(item)) if isinstance(item, Namespace) else item for item in parsed]


def checkpoint_folder(config: Any) -> Path:
    """Return where a parsed config's checkpoints are."""
    root = config.trainer.default_root_dir or "."
    return Path(config.checkpoint.dirpath or Path(root) / "checkpoints")


def check_model(model: Any) -> None:
    """Refuse a parsed config's model that contradicts itself; builds nothing.

    Raises:
        ValueError: Settings contradict each other, or are out of range.
    """
    sampling, schedule = model.sampling, NoiseSchedule(**model.schedule.as_dict())
    guidance = Guidance(**sampling.guidance.as_dict())
    sampler, spacing = resolve_sampling(
        sampling.sampler, sampling.spacing, sampling.num_steps, guidance
    )
    check_settings(
        schedule,
        model.prediction_type,
        LossWeighting(**model.loss.as_dict()),
        spacing,
        sampling.num_steps,
    )
    if isinstance(sampler, str):
        check_steps(Sampling(sampler, sampling.num_steps, spacing, guidance), schedule)
    check_guidance(guidance, averaged=model.ema is not None)
    if model.lora is not None:
        LoRA(**model.lora.as_dict())
        check_lora(model.unet, bool(model.conditioner.get("init_args", {}).get("trainable")))


def is_sharded(trainer: Any) -> bool:
    """Whether a parsed config's trainer shards weights."""
    name = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
    return bool(name.rpartition(".")[2] == FullyShardedStrategy.__name__)


def _resumed(asked: str | None, folder: Path) -> str | None:
    """Decide what fit goes on from: what was asked for, the newest checkpoint, or nothing.

    Raises:
        ValueError: An earlier run's checkpoints are in the way, or none can be read.
    """
    if restarted():  # what was asked for is where the first start began
        last = find_last(folder)
        if last is not None or asked is None:
            return None if last is None else str(last)
    if asked == "last":
        last = find_last(folder)
        return None if last is None else str(last)
    if asked is None and any(folder.glob("*.ckpt")):
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run. `--ckpt_path last` resumes it; "
            "else choose another folder, or remove this one."
        )
    return asked


def expand_short_options(arguments: Sequence[str]) -> list[str]:
    """Replace short options by the settings they stand for.

    Raises:
        ValueError: --sampler is neither a registered name nor "auto".
    """
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--sampler":
            value = value if equals else next(rest, "")
            if value != AUTO:
                cls = type(get_sampler(value))
                value = f"{cls.__module__}.{cls.__qualname__}"
            expanded.append(f"--model.sampling.sampler={value}")
        elif name == "--seed":
            seed = "--data.prompt_seed" if "predict" in arguments[:1] else "--data.seed"
            expanded.append(seed + equals + value)
        elif name in SHORT_OPTIONS:
            expanded.append(SHORT_OPTIONS[name] + equals + value)
        else:
            expanded.append(argument)
    return expanded


def run(arguments: Sequence[str]) -> None:
    """Run one of fit, validate, test, predict.

    Raises:
        ValueError: The command line or a YAML is wrong; one line.
        SystemExit: A signal has stopped training before its end; the code is 143.
    """
    check_environment()
    _prepare(arguments)
    listen(signal.SIGUSR1)
    # argv[0] stays: Lightning's launcher starts the other ranks with it.
    sys.argv[1:] = expand_short_options(arguments)
    cli = _parsed(
        ZsnrCLI,
        save_config_callback=SaveConfigOfFit,
        save_config_kwargs={"overwrite": True, "config_filename": "run_config.yaml"},
        parser_kwargs={"exit_on_error": False, "predict": {"epilog": _PREDICT_HELP}},
    )
    if stopped_early(cli.trainer, cli.model):
        raise SystemExit(EXIT_CODE)


class _ParseOnly(ZsnrCLI):
    """Reads a config and builds nothing."""

    def before_instantiate_classes(self) -> None:
        """Nothing will be instantiated."""

    def instantiate_classes(self) -> None:
        """Leave it to the caller."""


def parse_fit(arguments: Sequence[str]) -> Any:
    """Read configs and settings of fit, and return their values.

    Raises:
        ValueError: Something in them is wrong; one line.
    """
    _prepare(arguments)
    cli = _parsed(
        _ParseOnly,
        run=False,
        args=list(arguments),
        save_config_callback=None,
        parser_kwargs={"exit_on_error": False},
    )
    return cli.config


def _parsed(cls: type[ZsnrCLI], **options: Any) -> ZsnrCLI:
    try:
        return cls(LatentDiffusion, DataModule, seed_everything_default=0, **options)
    except ArgumentError as error:
        raise ValueError(short_message(str(error))) from error


def check_environment() -> None:
    """Refuse variables that say of the processes what cannot be, before anything waits for them.

    Raises:
        ValueError: One is not a number, or SLURM has tasks that `srun` did not start.
    """
    for name, most in _COUNTS.items():
        value = os.environ.get(name)
        if value and not (value.isascii() and value.isdigit() and int(value[:20]) <= most):
            raise ValueError(
                f"The environment variable {name} is {shown(value)}: wanted a whole number, at "
                f"most {most}. Unset it, or start with torchrun or srun."
            )
    tasks = os.environ.get("SLURM_NTASKS") or "1"
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # as Lightning says
    started = {"SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if int(tasks) > 1 and not started and not interactive:
        raise ValueError(
            f"SLURM_NTASKS={tasks}, but srun did not start this process: start it with srun, or "
            "unset SLURM_NTASKS to train in this shell alone."
        )


def _prepare(arguments: Sequence[str]) -> None:
    """Look at what a config says, before jsonargparse and Lightning do."""
    _quieten()
    read_safely()
    check_configs(arguments, _GROUPS, [*_BASES.values()])


def _quieten() -> None:
    """Hide what Lightning says of things that are meant."""
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")  # EMA
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*infer the batch indices fetched")
    warnings.filterwarnings("ignore", message=".*sync_dist=True")  # they are reduced already
    warnings.filterwarnings("ignore", message=".*across ranks is zero")  # no validation data
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")
    warnings.filterwarnings("ignore", message=".*dirpath has changed from")
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


def short_message(message: str) -> str:
    """Make one line of jsonargparse's message, with the known names where a name is wrong."""
    key = re.search(r"Parser key \"([\w.]+)\"", message)
    for suffix, base in _BASES.items():
        wrong = "import path" in message or "Not a valid subclass" in message
        if key and key[1].endswith(suffix) and wrong:
            usable = set(base.__subclasses__()) - {Remembered}
            known = ", ".join(sorted(cls.__name__ for cls in usable))
            return f"{key[1]}: no such class. Known: {known}, or the import path of your own."
    union = re.search(r"Errors:\s+- (.*?)(?:\n *- |\nGiven |$)", message, re.DOTALL)
    if union and "Does not validate against" in message:
        return " ".join(union[1].split())
    unknown = re.search(r"(?:accept option '|arguments: --)([\w.]+)", message)
    line = " ".join(message.split())
    if unknown:
        near = difflib.get_close_matches(unknown[1], _option_names(), n=1)
        line += f". Did you mean {near[0]}?" if near else ". `zsnr fit --help` lists them all."
    return line


_COUNTS = {
    **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), 2**20),
    **dict.fromkeys(("NODE_RANK", "GROUP_RANK", "SLURM_NTASKS", "SLURM_PROCID"), 2**20),
    **dict.fromkeys(("SLURM_LOCALID", "SLURM_NODEID", "SLURM_RESTART_COUNT"), 2**20),
    **dict.fromkeys(("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"), 2**20),
    "GROUP_WORLD_SIZE": 2**20,
    "MASTER_PORT": 2**16 - 1,
}
_GROUPS: dict[str, Any] = {
    "model": LatentDiffusion,
    "data": DataModule,
    "trainer": Trainer,
    "output": PredictionWriter,
    "checkpoint": Checkpoints,
    "metrics": ImageMetrics,
    "board": TrainingBoard,
    "watchdog": Watchdog,
    "preemption": Preemption,
}
_BASES: dict[str, type[Any]] = {
    "codec": LatentCodec,
    "conditioner": Conditioner,
    "sampler": Sampler,
}


def _option_names() -> list[str]:
    """List the settings of model, data and trainer, down to the fields of dataclasses."""
    names: list[str] = []
    for group, cls in _GROUPS.items():
        for name, parameter in inspect.signature(cls).parameters.items():
            names.append(f"{group}.{name}")
            default = parameter.default
            if dataclasses.is_dataclass(default):
                names += [f"{group}.{name}.{f.name}" for f in dataclasses.fields(default) if f.init]
    return names
