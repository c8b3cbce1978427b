"""The command line: `zsnr COMMAND ...`, the same as `python cli.py COMMAND ...`.

A command is a function of `zsnr.commands`; its module is imported when the command runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from zsnr.elastic import former_failure, note_failure
from zsnr.failures import tame_output, told
from zsnr.public import public_text
from zsnr.stops import stopping
from zsnr.untrusted import printable

TRAINING = {
    "fit": "Train from YAML, with validation and previews.",
    "validate": "Compute the validation loss of a checkpoint, or of each one of a run.",
    "test": "Compute the validation loss of a checkpoint, as validate does.",
    "predict": "Make the images of a prompts file, on one or more devices.",
}
# Commands by group: name -> the module of zsnr.commands, and the function where its name differs
GROUPS: dict[str, dict[str, str]] = {
    "Check and fix a model": {
        "doctor": "doctor",
        "schedule": "schedule",
        "export": "export",
    },
    "Make and compare images": {
        "sample": "sample",
        "compare models": "compare_models",
        "compare oracle": "compare_oracle",
        "figure": "figure",
        "timesteps optimize": "timesteps_optimize",
    },
    "Prepare data": {
        "data openmoji": "data_openmoji",
        "data index": "data_index",
        "data report": "data_report",
        "data cache": "data_cache",
    },
    "Train": {
        "configs list": "configs.list_configs",
        "configs show": "configs.show_config",
        "configs copy": "configs.copy_config",
        "plan": "plan",
        **dict.fromkeys(TRAINING, ""),
        "status": "status",
        "checkpoint average": "checkpoint_average",
        "checkpoint consolidate": "checkpoint_consolidate",
    },
}
COMMANDS = {name: place for group in GROUPS.values() for name, place in group.items()}


def find_function(command: str) -> Callable[..., Any]:
    """Import the function of a command that is not LightningCLI's."""
    module, _, name = COMMANDS[command].partition(".")
    function: Callable[..., Any] = getattr(import_module(f"zsnr.commands.{module}"), name or module)
    return function


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 for success, 1 for a plan that does not fit or a
    checkpoint of a followed run that could not be measured, 2 for wrong input or a machine that
    fails, 130 for Ctrl-C, 141 for a closed pipe; the doctor's is its verdict, and 3 for wrong
    input.
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
        from zsnr.files import check_temporary

        check_temporary()
        from zsnr.training.lightning_cli import run

        run(arguments)
        return 0
    from zsnr.commands.finding import find_command
    from zsnr.commands.parsing import parse_arguments
    from zsnr.commands.result import show

    name = find_command(arguments, GROUPS, TRAINING, find_function)
    if name is None:  # help has been printed; argparse ends in the same way
        raise SystemExit(0)
    function = find_function(name)
    values, as_json = parse_arguments(name, function, arguments[len(name.split()) :])
    return show(function(**values), as_json=as_json)


if __name__ == "__main__":
    sys.exit(main())
