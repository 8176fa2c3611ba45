"""The command line, `jidm <verb>`: each verb is a typed dataclass with `run()`, found in the table below.

Heavy packages are loaded only when a verb runs, so that `jidm --help` is fast. Every failure is one line on standard error
and a non-zero exit code: 2 for a wrong command line, 130 for Ctrl-C, 1 for anything else.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from jidm.cli.text import one_line
from jidm.errors import JidmWarning

VERBS = {
    "demo": "jidm.cli.demo:Demo",
    "decode": "jidm.cli.decode:Decode",
    "babble": "jidm.cli.babble:Babble",
    "train": "jidm.cli.train:Train",
    "evaluate": "jidm.cli.evaluate:Evaluate",
    "score": "jidm.cli.score:Score",
    "fit-scales": "jidm.cli.score:FitScales",
    "rank": "jidm.cli.rank:Rank",
    "report": "jidm.cli.report:Report",
    "view": "jidm.cli.viewer:View",
    "label": "jidm.cli.label:Label",
    "serve": "jidm.cli.serve:Serve",
    "embodiments": "jidm.cli.embodiments:Embodiments",
    "dataset": "jidm.cli.dataset:Dataset",
    "doctor": "jidm.cli.doctor:Doctor",
}
"""Verb -> its dataclass. A new verb is one file and one line here."""

_DESCRIPTION = """Decode robot video into joint velocities, for any robot with a URDF or a trained field.

Errors are one line on standard error; --traceback shows the full traceback. --version prints the version."""


@runtime_checkable  # so that annotations can be checked in tests
class Verb(Protocol):
    """A verb's dataclass; its fields are filled from the command line."""

    def run(self) -> int | None:
        """Run the verb; returns the exit code, None means 0."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; `sys.argv` if not given) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    if arguments[:1] == ["--version"]:
        from jidm import __version__

        print(f"jidm {__version__}")
        return 0
    try:
        verb = _parse(arguments)
        if isinstance(verb, int):
            return verb
        with _one_line_warnings():
            code = verb.run() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of the output is gone (`jidm ... | head`); without this Python prints another error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if traceback:
            raise
        return _fail(one_line(error), 1)


def _parse(arguments: list[str]) -> Verb | int:
    """The filled dataclass of the chosen verb, or an exit code if there is nothing to run."""
    import tyro

    verbs = {name: _load(where) for name, where in VERBS.items()}
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            verb: Verb = tyro.extras.subcommand_cli_from_dict(
                verbs,
                prog="jidm",
                description=_DESCRIPTION,
                args=arguments or ["--help"],
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
            )
            return verb
    except SystemExit as stop:
        if not stop.code:
            return 0
        return _fail(_flatten(stderr.getvalue()), 2)


def _load(target: str) -> Any:
    module, name = target.split(":")
    return getattr(import_module(module), name)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Shows each warning of jidm once, as one line without the place in the code."""
    with warnings.catch_warnings():
        show = warnings.showwarning
        shown: set[str] = set()

        def show_once(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
            text = " ".join(str(message).split())
            if not issubclass(category, JidmWarning):
                show(message, category, *where, **options)
            elif text not in shown:
                shown.add(text)
                print(f"jidm: warning: {text}", file=sys.stderr)

        warnings.showwarning = show_once
        warnings.filterwarnings("always", category=JidmWarning)
        yield


def _flatten(boxed: str) -> str:
    """Tyro's framed error message as one line."""
    # The top of the frame repeats what follows; deeply indented lines explain arguments, as --help does.
    body = (line for line in boxed.splitlines() if not line.startswith("╭") and not re.match(r"│ {9}", line))
    lines = [re.sub(r"[│╰╯─]+", " ", line).strip() for line in body]
    text = " ".join(" ".join(line for line in lines if line).split())
    text = re.sub(r"\.? For full helptext, run:?", "; help:", text)
    return text.replace(" Available subcommands:", "; available subcommands:")


def _fail(message: str, code: int) -> int:
    print(f"jidm: {message}", file=sys.stderr)
    return code
