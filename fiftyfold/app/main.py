"""The console command ``fiftyfold``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from fiftyfold.errors import FiftyfoldError, first_line

TRAINER_COMMANDS = {
    "fit": "train a teacher or a student from a YAML recipe",
    "validate": "score a model on the development set",
    "test": "score a model on the test set; without labels there, on the development set, and says so",
    "predict": "write predictions for the test set; where there is none, for the development set, and says so",
}
"""Commands that Lightning's own command line carries out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words of the command line; the process's own if None.

    Returns:
        The exit status: 0 if all went well, 1 after an error that was explained, 2 for a malformed command line,
        130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        # A Trainer makes an exit with status 1 of Ctrl-C.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        explanation = _explanation(error)
        if explanation is None:
            raise
        print(f"fiftyfold: error: {explanation}", file=sys.stderr)
        return 1


def _dispatch(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if name == "--version":
        from fiftyfold import __version__

        print(__version__)
        return 0
    if name in TRAINER_COMMANDS:
        from fiftyfold.app.trainer_cli import run_trainer_command

        run_trainer_command(words)
        return 0
    commands = _own_commands()
    if name not in commands:
        known = ", ".join([*commands, *TRAINER_COMMANDS])
        raise FiftyfoldError(f"unknown command {name!r}; the commands are {known}.")
    from jsonargparse import auto_cli

    auto_cli(commands[name], args=words[1:], as_positional=True, prog=f"fiftyfold {name}")
    return 0


def _interrupted() -> int:
    print("fiftyfold: interrupted", file=sys.stderr)
    return 130


def _own_commands() -> dict[str, Callable[..., object]]:
    from fiftyfold.app.augment import augment
    from fiftyfold.app.benchmark import benchmark
    from fiftyfold.app.compile import compile_command
    from fiftyfold.app.compress import compress
    from fiftyfold.app.evaluate import evaluate
    from fiftyfold.app.export import export
    from fiftyfold.app.kernels import kernels
    from fiftyfold.app.plan import plan
    from fiftyfold.app.profile import profile
    from fiftyfold.app.quickstart import quickstart
    from fiftyfold.app.report import report
    from fiftyfold.app.tensorize import tensorize_command
    from fiftyfold.app.trim import trim

    return {
        "quickstart": quickstart,
        "compress": compress,
        "tensorize": tensorize_command,
        "augment": augment,
        "trim": trim,
        "export": export,
        "evaluate": evaluate,
        "plan": plan,
        "profile": profile,
        "report": report,
        "benchmark": benchmark,
        "compile": compile_command,
        "kernels": kernels,
    }


def _overview() -> str:
    rows = {name: (command.__doc__ or "").strip().split("\n")[0] for name, command in _own_commands().items()}
    rows |= TRAINER_COMMANDS
    lines = [f"  {name:<11} {text[:1].lower()}{text[1:].rstrip('.')}" for name, text in rows.items()]
    return "\n".join(
        [
            "usage: fiftyfold COMMAND ...",
            "",
            "Make a fine-tuned transformer up to fifty times smaller, as a file on disk, and keep its score.",
            "",
            *lines,
            "",
            "fiftyfold COMMAND --help tells what each one takes; fiftyfold --version prints the version.",
        ]
    )


def _explanation(error: Exception) -> str | None:
    """Return the message that serves the user better than a traceback, or None if only a traceback serves."""
    # jsonargparse wraps what a class raises as it is made from a recipe.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FiftyfoldError):
            return str(cause)
        cause = cause.__cause__
    # Lightning's own for a checkpoint that is not there; the one of the system has a number.
    if isinstance(error, FileNotFoundError) and error.errno is None:
        return f"{first_line(error)}; check its name."
    told = isinstance(error, OSError) and error.errno is not None
    return str(error) if told or type(error).__name__ == "MisconfigurationException" else None


if __name__ == "__main__":
    sys.exit(main())
