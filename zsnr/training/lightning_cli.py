"""The commands fit, validate, test and predict: LightningCLI with this package's defaults."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zsnr.agreement import is_first_process
from zsnr.checkpoints.checkpoint_file import KEY, open_checkpoint
from zsnr.checkpoints.remote import Mirror, is_address
from zsnr.checkpoints.run_folder import find_last, resolve_model
from zsnr.checkpoints.snapshots import check_can_resume
from zsnr.data.order import accumulation
from zsnr.data.sources import Source
from zsnr.files import replacing, side_file
from zsnr.guidance import Guidance
from zsnr.lora import LoRA
from zsnr.loss import LossWeighting
from zsnr.networks import UNetConfig
from zsnr.pipeline import Sampling, check_steps
from zsnr.public import MARK, left_out
from zsnr.reports.status import checkpoints_of_run, read_run_config, run_of
from zsnr.samplers.recommend import resolve_sampling
from zsnr.schedule import NoiseSchedule, RectifiedFlow
from zsnr.timestep_law import TimestepLaw
from zsnr.training.board import TrainingBoard
from zsnr.training.checkpoint_files import CheckpointFiles
from zsnr.training.checkpointing import Checkpoints
from zsnr.training.checks import (
    check_guidance,
    check_lora,
    check_resumed,
    check_settings,
    check_unsharded,
)
from zsnr.training.configs import (
    check_configs,
    config_files,
    list_overrides,
    read_safely,
    separate_networks,
)
from zsnr.training.console import print_summary, progress_callbacks, quiet_lightning
from zsnr.training.data import DataModule, check_shards, read_requests
from zsnr.training.deferred import deferred_weights
from zsnr.training.ema import PostHocEMA
from zsnr.training.facts import public_config
from zsnr.training.follow import Follower, wait_for_first
from zsnr.training.from_checkpoint import checkpoint_config
from zsnr.training.from_run import decisive_settings, keeps_samples, validation_config
from zsnr.training.help import help_text
from zsnr.training.image_metrics import check_files
from zsnr.training.loggers import (
    begin_loggers,
    config_folder,
    continue_loggers,
    default_loggers,
)
from zsnr.training.measurements import BOARD, Measurements
from zsnr.training.messages import short_message
from zsnr.training.module import LatentDiffusion
from zsnr.training.preemption import listen, restarted, stopped_early
from zsnr.training.run_lock import RunLock
from zsnr.training.settings import DEFAULTS, GROUPS, LINKED
from zsnr.training.short_options import expand_short_options, option_values, take_run
from zsnr.training.strategy import FullyShardedStrategy, check_strategy
from zsnr.untrusted import read_yaml, shown

CLI = TypeVar("CLI", bound="ZsnrCLI")

_LIGHTNING_ADDS = ("model", "data", "trainer")  # groups that LightningCLI adds by itself


class SaveConfigOfFit(SaveConfigCallback):
    """Saves the whole configuration beside the logs of a training run, and of nothing else."""

    already_saved: bool

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration without secrets, and pass it to the board."""
        if stage != "fit" or self.already_saved:
            return
        self.already_saved = True
        folder = config_folder(trainer)
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


class Parser(LightningArgumentParser):
    """Writes a noise schedule as the settings that it has in YAML, without its class."""

    def dump(self, *args: Any, **options: Any) -> str:
        return re.sub(
            rf"^( *)schedule:\n\1  class_path: zsnr\.{NoiseSchedule.__name__}\n\1  init_args:\n"
            r"((?:\1    .*\n)+)",
            lambda found: f"{found[1]}schedule:\n" + re.sub("(?m)^  ", "", found[2]),
            super().dump(*args, **options),
            flags=re.MULTILINE,
        )


class ZsnrCLI(LightningCLI):
    """One of fit, validate, test and predict from YAML.

    Args:
        command: Its name; the parsers of the others are not made.
        options: Of LightningCLI.
    """

    follows = False  # whether the command measures several checkpoints

    def __init__(self, command: str, **options: Any) -> None:
        self._command = command
        super().__init__(
            LatentDiffusion,
            DataModule,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # model.optimizer and model.learning_rate are there
            load_from_checkpoint_support=False,  # the module saves no hyperparameters
            parser_kwargs={"exit_on_error": False},
            parser_class=Parser,
            **options,
        )

    def subcommands(self) -> dict[str, set[str]]:
        return {self._command: super().subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for group, cls in GROUPS.items():
            if group not in _LIGHTNING_ADDS:
                parser.add_lightning_class_args(cls, group)
        for target, source in LINKED.items():
            parser.link_arguments(source, target)
        parser.set_defaults(DEFAULTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Let no checkpoint's hyper_parameters name classes that the config does not."""

    def instantiate_classes(self) -> None:
        shards = self.subcommand == "fit" and is_sharded(self.config.fit.trainer)
        try:
            with deferred_weights() if shards else nullcontext():
                super().instantiate_classes()
            network = self.config[self.subcommand].model.network
            if _is_class(network):
                self.model.record_arguments(network.get("init_args", Namespace()).as_dict())
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ValueError(short_message(str(error))) from error
        self.trainer.strategy.checkpoint_io = CheckpointFiles(
            with_optimizers=self.subcommand == "fit"
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        if trainer.logger is None:
            kwargs["logger"] = default_loggers(trainer.default_root_dir or ".")
        callbacks = trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        bar = trainer.enable_progress_bar is not False
        custom = any(isinstance(callback, ProgressBar) for callback in callbacks)
        shown = progress_callbacks(bar and not custom)
        if not any(isinstance(callback, ProgressBar) for callback in [*callbacks, *shown]):
            kwargs["enable_progress_bar"] = False
        self.trainer_defaults["callbacks"] = shown
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Refuse what cannot train, and continue the logs of a resumed run."""
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
        self.model.resumes = checkpoint is not None
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
        """Refuse wrong settings before a model or data is loaded."""
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
            raise ValueError(
                "trainer.max_steps is not set: give the number of steps to train, as in "
                "--max-steps 1000."
            )
        folder = checkpoint_folder(config)
        if self.subcommand == "fit":
            config.ckpt_path = _resumed(config.ckpt_path, folder)
        elif config.ckpt_path == "last":
            config.ckpt_path = str(find_last(folder) or folder / "last.ckpt")
        if self.subcommand == "validate" and not config.trainer.limit_val_batches:
            config.trainer.limit_val_batches = None  # the run leaves validation to this command
        checkpoint = config.ckpt_path
        if checkpoint is None:
            if self.subcommand != "fit" and not isinstance(model.network, str):
                raise ValueError(f"{self.subcommand} needs a checkpoint: --ckpt_path CHECKPOINT.")
            if self.subcommand == "fit" and config.checkpoint.mirror is not None:
                Mirror(config.checkpoint.mirror).check_new()
        else:
            opened = open_checkpoint(checkpoint)
            if self.subcommand == "fit":
                check_can_resume(checkpoint, opened)
            check_resumed(
                opened[KEY],
                {
                    "schedule": schedule_of(model).settings(),
                    "prediction_type": model.prediction_type,
                },
            )
        if self.subcommand != "predict":
            check_files(config.metrics, writes_once=self.subcommand != "fit" and not self.follows)
        if self.subcommand == "predict":
            config.trainer.logger = False  # it logs nothing, and a CSV logger would overwrite
            if data.prompts is None or config.output.folder is None:
                raise ValueError("predict needs --prompts FILE and --output FOLDER.")
            read_requests(data.prompts)
        else:
            for name in ("train", "val") if self.subcommand == "fit" else ("val",):
                if data[name] is not None:
                    both = (data.train if self.subcommand == "fit" else None), data.val
                    check_shards(*(None if _is_class(each) else _sources(each) for each in both))
                elif name == "train" or self.subcommand != "fit":
                    raise ValueError(
                        f"{self.subcommand} needs data.{name}, a folder of images or shards: give "
                        f"--data.{name} FOLDER."
                    )


def _is_class(parsed: Any) -> bool:
    return isinstance(parsed, Namespace) and "class_path" in parsed


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
    sampling, schedule = model.sampling, schedule_of(model)
    guidance = Guidance(**sampling.guidance.as_dict())
    sampler, spacing = resolve_sampling(
        sampling.sampler, sampling.spacing, sampling.num_steps, guidance
    )
    check_settings(
        schedule,
        model.prediction_type,
        LossWeighting(**model.loss.as_dict()),
        TimestepLaw(**model.timestep_law.as_dict()),
        spacing,
        sampling.num_steps,
    )
    if isinstance(sampler, str):
        check_steps(Sampling(sampler, sampling.num_steps, spacing, guidance), schedule)
    check_guidance(guidance, averaged=model.ema is not None)
    if model.post_hoc_ema is not None:
        PostHocEMA(**model.post_hoc_ema.as_dict())
    if model.lora is not None:
        LoRA(**model.lora.as_dict())
        check_lora(model.network, bool(model.conditioner.get("init_args", {}).get("trainable")))
    if isinstance(model.network, Namespace) and not _is_class(model.network):
        UNetConfig(**model.network.as_dict())


def schedule_of(model: Any) -> NoiseSchedule | RectifiedFlow:
    """Return the schedule of a parsed config's model."""
    settings = model.schedule.as_dict()
    if "class_path" not in settings:
        return NoiseSchedule(**settings)
    classes = {cls.__name__: cls for cls in (NoiseSchedule, RectifiedFlow)}
    name = settings["class_path"].rpartition(".")[2]
    return classes[name](**settings.get("init_args", {}))


def is_sharded(trainer: Any) -> bool:
    """Whether a parsed config's trainer shards weights."""
    name = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
    return bool(name.rpartition(".")[2] == FullyShardedStrategy.__name__)


def _resumed(asked: str | None, folder: Path) -> str | None:
    """Decide what fit resumes from: the given checkpoint, the newest one, or none.

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
    return None if asked is None else resolve_model(asked)


def run(arguments: Sequence[str]) -> None:
    """Run one of fit, validate, test, predict.

    Raises:
        ValueError: The command line or a YAML is wrong; one line.
        SystemExit: Help was printed; or a signal has stopped training before its end, and the code
            is 143, or 130 for Ctrl-C.
    """
    command = arguments[0]
    asked, topic = _help_topic(arguments[1:])
    if asked:
        print(help_text(command, topic))
        raise SystemExit(0)  # as the other commands do
    check_environment()
    source, follows = None, False
    words = expand_short_options(arguments)[1:]
    if command == "validate":
        words, source, follows = take_run(words)
    settings = _prepare([command, *words])
    listen(signal.SIGUSR1)
    # Lightning's launcher starts the other ranks with sys.argv.
    sys.argv[1:] = arguments
    if follows:
        _follow(str(source), settings)
        return
    if source is not None:
        settings = _with_source(source, settings)
    elif command != "fit":
        settings = _with_checkpoint(command, settings)
    cli = _parsed(
        ZsnrCLI,
        command,
        args=[command, *settings],
        save_config_callback=SaveConfigOfFit,
        save_config_kwargs={"overwrite": True, "config_filename": "run_config.yaml"},
    )
    stopped = stopped_early(cli.trainer, cli.model)
    if command == "fit":
        print_summary(cli.trainer, bool(stopped))
    if stopped:
        raise SystemExit(stopped)


def _follow(source: str, settings: Sequence[str]) -> None:
    """Measure each checkpoint of a run.

    Raises:
        ValueError: The folder is not one of a run, or a setting is wrong; one line.
        SystemExit: A checkpoint could not be measured; the code is 1.
    """
    if is_address(source):
        raise ValueError(
            f"--follow needs a local folder: {source} is an address. `zsnr validate {source} "
            "--data.val FOLDER` measures the newest checkpoint there."
        )
    folder = Path(source).expanduser()
    run = run_of(folder)
    if folder.absolute() not in (run.absolute(), run.absolute() / "checkpoints"):
        raise ValueError(f"--follow needs the folder of a run, such as {run}: {source} is not one.")
    _check_alone(run, settings)
    results = Measurements()
    try:
        if not _follower(run, results, settings).follow():
            raise SystemExit(1)
    finally:
        results.close()


def _follower(run: Path, results: Measurements, settings: Sequence[str]) -> Follower:
    """Build what measures the checkpoints of a run, once there is one.

    Raises:
        ValueError: The run has ended without a checkpoint, or a setting is wrong; one line.
    """
    while True:
        checkpoint = wait_for_first(run)
        try:
            cli = _parsed(
                partial(_FollowCLI, run, results, keeps_samples(_named(settings))),
                "validate",
                args=["validate", *_with_run(run, checkpoint, settings)],
                save_config_callback=None,
            )
        except (ValueError, OSError):
            if checkpoint.exists():
                raise
            results.close()  # the run has removed the checkpoint meanwhile: there is a newer one
        else:
            return cli.follower


class _FollowCLI(ZsnrCLI):
    """The command validate, of each checkpoint of a run.

    Args:
        run: Folder of the run.
        results: Where measurements are recorded.
        as_run: Whether the samples are those that the run itself validates.
        command: As in ZsnrCLI.
        options: Of LightningCLI.
    """

    follows = True

    def __init__(
        self, run: Path, results: Measurements, as_run: bool, command: str, **options: Any
    ) -> None:
        self._run_folder, self._results, self._as_run = run, results, as_run
        super().__init__(command, **options)

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config = self.config.validate
        folder = Path(config.trainer.default_root_dir)
        # the run writes files of the same names into its folder, such as faults
        config.trainer.default_root_dir = str(folder / BOARD)
        if is_sharded(config.trainer):  # validation holds whole weights in any case
            config.trainer.strategy = "auto"
        if is_first_process():
            self._results.open(folder, decisive_settings(config.as_dict()))

    def validate(
        self,
        model: LatentDiffusion,
        datamodule: DataModule,
        ckpt_path: str,
        verbose: bool,
        weights_only: bool | None,
    ) -> None:
        """Prepare to measure all checkpoints, not one; the arguments are those of Lightning."""
        model.validates_as_run = self._as_run
        run, results = self._run_folder, self._results
        self.follower = Follower(self.trainer, model, datamodule, run, results)


def _help_topic(settings: Sequence[str]) -> tuple[bool, str | None]:
    """Return whether help is wanted, and the group that it is wanted of."""
    for i, setting in enumerate(settings):
        name, equals, topic = setting.partition("=")
        if name in ("-h", "--help"):
            following = settings[i + 1 : i + 2]
            if not equals and following and not following[0].startswith("-"):
                topic = following[0]
            return True, topic or None
    return False, None


def _with_checkpoint(command: str, settings: list[str]) -> list[str]:
    """Put what the checkpoint says before all other settings, which override it.

    Raises:
        ValueError: No checkpoint is given, or it cannot be read.
    """
    files = list(config_files(settings))
    given = [value for name, value in option_values(settings) if name == "ckpt_path"]
    given = given or [read_yaml(path).get("ckpt_path") for path in files]
    path = next((str(each) for each in reversed(given) if each), None)
    if path is None and not files:
        raise ValueError(f"{command} needs a checkpoint: --ckpt_path CHECKPOINT.")
    if not files and path == "last":
        raise ValueError(
            "`--ckpt_path last` needs the config of the run: give it with -c FILE, or name the "
            "folder of the run, as in --ckpt_path runs/mine."
        )
    if path is None or path == "last":
        return settings  # the files say what the model is, and where its checkpoints are
    checkpoint = Path(resolve_model(path))
    options = ("model.network", "model.network.class_path")
    named = [value for name, value in option_values(settings) if name in options]
    config = checkpoint_config(
        checkpoint, _replaced_parts(files, settings), named[-1] if named else None
    )
    text = yaml.safe_dump(config, sort_keys=False)
    return [f"--config={text}", *settings, f"--ckpt_path={checkpoint}"]


def _with_source(source: str, settings: Sequence[str]) -> list[str]:
    """Put what the folder of a run, or a checkpoint, says before all other settings.

    Raises:
        ValueError: There is no checkpoint, or it cannot be read.
    """
    checkpoint = Path(resolve_model(source))
    parent = checkpoint.parent if checkpoint.parent.name else checkpoint.absolute().parent
    if parent.name in ("checkpoints", "averages"):
        return _with_run(parent.parent, checkpoint, settings)
    folder = run_of(Path(source).expanduser())
    config = read_run_config(folder)  # the checkpoints may be in another folder
    last = find_last(checkpoints_of_run(folder, config)) if config else None
    if last is not None:
        return _with_run(folder, last, settings)
    return _with_checkpoint("validate", [*settings, f"--ckpt_path={source}"])


def _with_run(run: Path, checkpoint: Path, settings: Sequence[str]) -> list[str]:
    """Put what a run and its checkpoint say before all other settings, which override it.

    Raises:
        ValueError: Another checkpoint is given too, or this one cannot be read.
    """
    _check_alone(run, settings)
    config = validation_config(run, checkpoint)
    for part in _replaced_parts(list(config_files(settings)), settings):
        config["model"].pop(part, None)
    text = yaml.safe_dump(config, sort_keys=False)
    # TensorBoard would read the newest file of a folder, and not the one of the run that trains
    logger = [] if "trainer.logger" in dict(option_values(settings)) else ["--trainer.logger=false"]
    return [f"--config={text}", *settings, *logger, f"--ckpt_path={checkpoint}"]


def _check_alone(run: Path, settings: Sequence[str]) -> None:
    """Refuse another checkpoint beside that of a run.

    Raises:
        ValueError: There is one.
    """
    given = [value for name, value in option_values(settings) if name == "ckpt_path"]
    if any(given) or any(read_yaml(path).get("ckpt_path") for path in config_files(settings)):
        raise ValueError(f"{run} and --ckpt_path both name what is validated: give one of them.")


def _named(settings: Sequence[str]) -> set[str]:
    """Name the settings that files and options give, those of files by group and first name."""
    names = {name for name, _ in option_values(settings)}
    for path in config_files(settings):
        for group, values in read_yaml(path).items():
            inside = values if isinstance(values, dict) else {}
            names |= {f"{group}.{name}" for name in inside} or {group}
    return names


def _replaced_parts(files: Sequence[Path], settings: Sequence[str]) -> set[str]:
    """Name the parts of the model that files and options replace, and do not only change."""
    replaced = set()
    for path in files:
        values = read_yaml(path)
        model = values.get("model") if isinstance(values, dict) else None
        for name, value in (model if isinstance(model, dict) else {}).items():
            if name == "network" or not isinstance(value, dict) or "class_path" in value:
                replaced.add(name.partition(".")[0])
    for option, _ in option_values(settings):
        group, _, name = option.partition(".")
        part, _, inside = name.partition(".")
        if group == "model" and (part == "network" or inside in ("", "class_path")):
            replaced.add(part)
    return replaced & {"codec", "conditioner", "network"}


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
    cli = _parsed(
        _ParseOnly,
        "fit",
        run=False,
        args=_prepare(["fit", *arguments]),
        save_config_callback=None,
    )
    return cli.config


def build(name: str, cls: type[Any], values: Any) -> Any:
    """Instantiate one part of a parsed config.

    Raises:
        ValueError: Its settings are wrong; one line.
    """
    parser = ArgumentParser(exit_on_error=False)
    if cls is DataModule:
        parser.add_class_arguments(cls, name)
    else:
        parser.add_subclass_arguments(cls, name)
    values = values.as_dict() if hasattr(values, "as_dict") else values
    try:
        return parser.instantiate_classes(parser.parse_object({name: values}))[name]
    except (ValueError, TypeError) as error:
        raise ValueError(short_message(str(error))) from error


def _parsed(cls: Callable[..., CLI], command: str, **options: Any) -> CLI:
    try:
        return cls(command, **options)
    except ArgumentError as error:
        raise ValueError(short_message(str(error))) from error


def check_environment() -> None:
    """Refuse environment variables of launchers that are wrong, before any rank waits for another.

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


_COUNTS = {
    **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), 2**20),
    **dict.fromkeys(("NODE_RANK", "GROUP_RANK", "SLURM_NTASKS", "SLURM_PROCID"), 2**20),
    **dict.fromkeys(("SLURM_LOCALID", "SLURM_NODEID", "SLURM_RESTART_COUNT"), 2**20),
    **dict.fromkeys(("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"), 2**20),
    "GROUP_WORLD_SIZE": 2**20,
    "MASTER_PORT": 2**16 - 1,
}


def _prepare(arguments: Sequence[str]) -> list[str]:
    """Check a command line and its configs before jsonargparse and Lightning read them.

    Args:
        arguments: The command's name and what follows it.

    Returns:
        The settings, with short options expanded.

    Raises:
        ValueError: One of them is wrong.
    """
    quiet_lightning()
    read_safely()
    settings = expand_short_options(arguments)[1:]
    check_configs(settings, complete=arguments[0] == "fit")
    if is_first_process():
        for line in list_overrides(settings):
            print(line, file=sys.stderr)
    return separate_networks(settings)
