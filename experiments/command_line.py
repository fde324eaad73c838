"""What the commands share: errors in a line, --debug, --help, and configs by name."""

from __future__ import annotations

import contextlib
import dis
import pathlib
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Callable, Collection, Iterator
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import saflex_jax
from experiments import task
from experiments.configs import own
from saflex_jax import checks, configure

PACKAGES = tuple(f"{pathlib.Path(file).parent}/" for file in (__file__, saflex_jax.__file__))
CONFIGS = pathlib.Path(__file__).parent / "configs"
COLLECTIONS = str(pathlib.Path(config_flags.__file__).parent.parent)
NO_CONFIGS = ("__init__", "methods", "sources")  # parts of configs
DEBUG = "--debug"
HELP = {"--help", "-h", "-help", "--helpfull", "--helpshort"}
RAISE = dis.opmap["RAISE_VARARGS"]
DATA = "Your own data, a path: short for --config=own:PATH, or own:PATH?trusted=FILE."
TRUSTED = "A file that names trusted samples, which also train."

_debug = False


# --- errors


def raised_on_purpose(error: BaseException) -> bool:
    """Whether a user can mend it: the system refuses a file, or this project raised it.

    Of what this project raises on purpose the innermost frame stands at a `raise` in its own files.
    Everything else is a bug, and its traceback says where.
    """
    if isinstance(error, OSError):
        return True
    place = _innermost(error)
    ours = place.tb_frame.f_code.co_filename.startswith(PACKAGES)
    raised = place.tb_frame.f_code.co_code[place.tb_lasti] == RAISE
    return ours and raised and not isinstance(error, AssertionError | app.UsageError)


def _innermost(error: BaseException) -> types.TracebackType:
    """Where an error was raised."""
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    return place


@contextlib.contextmanager
def in_a_line() -> Iterator[None]:
    """Ends the program with status 1 and the message alone where an error is the user's.

    With --debug, and where it is a bug, the traceback is shown.
    """
    try:
        yield
    except Exception as error:
        if shows_traceback(error):
            raise
        sys.exit(f"error: {error}")


def shows_traceback(error: Exception) -> bool:
    """Whether a message alone is not enough: with --debug, and of a bug."""
    return _debug or not raised_on_purpose(error)


def prepare_arguments() -> None:
    """Takes --debug out of the arguments of the process, and puts the home folder in for "~".

    Shells do so only where a word begins with it, which "--data=~/photos" does not.
    """
    global _debug
    _debug = DEBUG in sys.argv
    home = pathlib.Path.home().as_posix()
    sys.argv = [
        re.sub(r"(?<=[=:])~(?=/|$)", lambda _: home, argument) if argument[:1] == "-" else argument
        for argument in sys.argv
        if argument != DEBUG
    ]


# --- commands


def run_plain(main: Callable[[], None]) -> None:
    """Runs a command that parses its own arguments."""
    logging.set_verbosity(logging.WARNING)  # else Orbax reports every file
    prepare_arguments()
    with in_a_line():
        main()


def run_absl(
    main: Callable[[list[str]], None],
    *,
    rewrite: Callable[[list[str]], list[str]] = list,
) -> None:
    """Runs a command with absl's flags.

    Args:
      main: of a module with a docstring and flags.
      rewrite: the arguments of the process -> those that the flags are parsed of.
    """
    prepare_arguments()
    module = sys.modules[main.__module__]
    asked = HELP & set(sys.argv)

    def parse(argv):
        with _usage_errors():
            rest = flags.FLAGS(argv)
        if asked:
            print(help_of(module, whole="--helpfull" in asked))
            sys.exit(0)
        return rest

    def started(argv):
        try:
            with in_a_line():
                main(argv)
        except app.UsageError as error:
            _refuse(error)

    with _usage_errors():
        # In place: the flag of a config looks at the arguments of the process.
        sys.argv = rewrite([argument for argument in sys.argv if argument not in HELP])
    app.run(started, flags_parser=parse)


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Ends with status 2 on arguments that do not parse; says in a line what is accepted."""
    try:
        yield
    except Exception as error:
        behind = error  # the library of the config's flag wraps what a config raises
        while not raised_on_purpose(behind) and behind.__context__ is not None:
            behind = behind.__context__
        if isinstance(error, SyntaxError | UnicodeDecodeError) or "'get_config'" in str(error):
            reason = f"--config must be a Python file with a function get_config; {error}"
        elif _debug or not (raised_on_purpose(behind) or _of_flags(error)):
            raise
        else:
            reason = behind if raised_on_purpose(behind) else _unknown_field(error) or error
        _refuse(reason)


def _refuse(reason: object) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def _unknown_field(error: Exception) -> ValueError | None:
    """What is said of the first field on the command line that the config does not have."""
    if not isinstance(error, KeyError | AttributeError):
        return None
    file = next(a.partition("=")[2] for a in sys.argv if a.startswith("--config="))
    config = flags.FLAGS["config"].parser.parse(file)
    fields = (re.match(r"--?(?:no)?config\.([\w.]+)", argument) for argument in sys.argv)
    for match in filter(None, fields):
        section, name = config, "config"
        for field in match[1].split("."):
            try:
                checks.known(name, [field], section if isinstance(section, ConfigDict) else ())
            except ValueError as unknown:
                return unknown
            section, name = section[field], f"{name}.{field}"
    return None


def _of_flags(error: BaseException) -> bool:
    """Whether the library of the config's flag refuses what it was given."""
    file = _innermost(error).tb_frame.f_code.co_filename
    return isinstance(error, flags.Error | app.UsageError) or file.startswith(COLLECTIONS)


# --- configs


def names() -> list[str]:
    """Of the configs that come with the package: what --config takes beside a path."""
    return sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in NO_CONFIGS)


def given_config(flag: flags.Flag) -> ConfigDict:
    """The config with what the command line changes.

    With another network, fields that it lacks and that the config has of its own are left out.

    Args:
      flag: `flags.FLAGS["config"]`.

    Raises:
      ValueError: as `_check_noise`.
    """
    config, changed = flag.value, config_flags.get_override_values(flag)
    _check_noise(config.data, changed)
    if "model.name" in changed and config.model.name in configure.BACKBONES:
        known = configure.model_fields(config.model.name)
        with config.unlocked():
            for field in set(config.model) - known:
                if f"model.{field}" not in changed:
                    del config.model[field]
    return config


def _check_noise(data: ConfigDict, changed: Collection[str]) -> None:
    """Refuses wrong labels that a config makes of data that only the command line named.

    Args:
      data: the config's section.
      changed: paths of the fields that the command line gives.

    Raises:
      ValueError: names the fields, and what to say instead.
    """
    if "data.name" not in changed or not task.is_own(data.name):
        return
    for field in ("noise", "outside", "labels"):
        if data[field] and f"data.{field}" not in changed:
            off = 0 if field != "labels" else "''"
            raise ValueError(
                f"config.data.{field} is {data[field]!r} in this config, which would make labels "
                f"of {data.name} wrong. --config.data.{field}={off} trains on them as they are, "
                f"and so does --data={data.name} in the place of --config and "
                f"--config.data.name; --config.data.{field}={data[field]} makes them wrong"
            )


def arguments(argv: list[str]) -> list[str]:
    """The arguments with what --data and --trusted stand for; first the config's file.

    Raises:
      ValueError: --data beside --config; as `config_file`.
    """
    given, others = {}, []
    program, *rest = argv
    left = iter(rest)
    for argument in left:
        match = re.fullmatch(r"--?(data|trusted|config)(=(.*))?", argument, re.DOTALL)
        if match:
            given[match[1]] = match[3] if match[2] else next(left, "")
        else:
            others.append(argument)
    if "data" in given:
        path = given["data"]
        if "config" in given:
            raise ValueError(
                "--data stands for --config=own:PATH and goes with no other --config; with another "
                f"one say --config.data.name={path}"
            )
        given["config"] = f"own:{path}"
        if not any(re.match(r"--?workdir", argument) for argument in others):
            others.append(f"--workdir=runs/{pathlib.Path(path).resolve().stem}")
    config = given.get("config", "digits")
    if "trusted" in given:
        if config.startswith("own:") and own.TRUSTED not in config:
            config += f"{own.TRUSTED}{given['trusted']}"
        else:
            # In front, since of a field given twice the last counts: what was said of it stays.
            others = [f"--config.data.trusted={given['trusted']}", "--config.data.val=0",
                      "--config.data.train_on_val=True", *others]  # fmt: skip
    return [program, f"--config={config_file(config)}", *others]


def config_file(config: str) -> str:
    """A config's file in the place of its name, with what is behind a colon.

    Args:
      config: as --config takes it: a file, or one of `names`, and perhaps ":ARGUMENT".

    Raises:
      ValueError: there is neither such a config nor such a file.
    """
    name, colon, rest = config.partition(":")
    if name in names():
        name = str(CONFIGS / f"{name}.py")
    elif not pathlib.Path(name).exists():
        near = checks.nearest(name, names())
        raise ValueError(
            f"--config must be a file, or one of {', '.join(names())}; there is no {name!r}{near}"
        )
    return f"{name}{colon}{rest}"


# --- help


def help_of(module: types.ModuleType, *, whole: bool) -> str:
    """What a module does, its flags, and the fields of its config.

    Args:
      module: with a docstring, flags, and a flag "config" where it has a config.
      whole: all methods' and rules' fields, not the chosen ones' alone.
    """
    known = flags.FLAGS.get_flags_for_module(module)
    shown = [flag for flag in known if flag.name.partition(".")[0] != "config"]
    lines = [(module.__doc__ or "").strip(), "", "Options:"]
    lines += [_entry(f"--{flag.name}={_text(flag.default)}", flag.help) for flag in shown]
    lines.append(_entry(DEBUG, "Show where an error was raised."))
    if len(shown) < len(known):
        lines += _config_help(flags.FLAGS.config, whole)
    return "\n".join(lines)


def _config_help(config, whole: bool) -> list[str]:
    from experiments import fields  # with JAX, which takes a while

    chosen = {config.method.name, config.method.rule}
    lines = [
        _entry(
            "--config=NAME", f"A file with a function get_config, or one of {', '.join(names())}."
        ),
        "",
        "Fields of the config, with the values that they have now (--helpfull: also those of the "
        "methods and rules that are not chosen):",
    ]
    for path, value, meaning in fields.of_config(config):
        section, _, rest = path.removeprefix("method.").partition(".")
        if whole or not (path.startswith("method.") and rest) or section in chosen:
            lines.append(_entry(f"--config.{path}={_text(value)}", meaning))
    return lines


def _text(value: object) -> str:
    return "" if value is None else f"'{value}'" if isinstance(value, str) else str(value)


def _entry(option: str, meaning: str) -> str:
    width = max(60, min(100, shutil.get_terminal_size().columns))
    body = textwrap.fill(meaning or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {option}\n{body}"
