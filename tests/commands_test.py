"""The command `saflex`: what it hands on and refuses, what its help says, what a wheel holds."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

import saflex_jax
from experiments import build, command_line, commands

ROOT = pathlib.Path(saflex_jax.__file__).parent.parent


def run(*command, cwd=None):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=cwd
    )


def test_help_is_fast_because_it_imports_nothing():
    code = "import sys; from experiments import commands; commands.main(['--help'])\n"
    done = run("-c", code + "print({'jax', 'numpy', 'absl'} & set(sys.modules))", cwd=ROOT)
    *lines, imported = done.stdout.splitlines()
    assert imported == "set()" and done.returncode == 0
    listed = [line.split()[0] for line in lines if re.match(r"  [a-z]+ ", line)]
    assert listed == list(commands.COMMANDS)


def test_every_command_has_a_module_that_runs_and_says_how():
    for name, (module, about) in commands.COMMANDS.items():  # parsed: their flags share names
        tree = ast.parse((ROOT / "experiments" / f"{module}.py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert "command" in functions and f"saflex {name}" in ast.get_docstring(tree)
        assert len(about) < 70


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["trian"], "no command 'trian'; did you mean 'train'?"), ([], "usage: saflex COMMAND")],
)
def test_what_is_no_command_is_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(argv)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["saflex"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "experiments.inspect", raising=False)
    monkeypatch.setattr(
        importlib, "import_module", lambda name: (_ for _ in ()).throw(missing("matplotlib"))
    )
    with pytest.raises(SystemExit, match=r'train needs matplotlib: pip install "saflex_jax\[exper'):
        commands.main(["train"])
    monkeypatch.setattr(
        importlib, "import_module", lambda name: (_ for _ in ()).throw(missing("saflex_jax.x"))
    )
    with pytest.raises(ModuleNotFoundError):  # no extra would help
        commands.main(["train"])


def missing(name):
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


# --- errors ------------------------------------------------------------------------------------


def bug():
    return [][1]


def unpacked():
    a, _ = (1, 2, 3)
    return a


def refused():
    saflex_jax.solve_targets([[0.0]], [[0.0, 1.0]])


def no_file():
    open("nowhere/x")


@pytest.mark.parametrize(
    ("call", "is_users"), [(bug, False), (unpacked, False), (refused, True), (no_file, True)]
)
def test_only_what_was_raised_on_purpose_loses_its_traceback(call, is_users, monkeypatch):
    monkeypatch.setattr(command_line, "PACKAGES", (*command_line.PACKAGES, str(ROOT / "tests")))
    with pytest.raises(Exception) as caught:
        call()
    assert command_line.raised_on_purpose(caught.value) == is_users
    with pytest.raises(SystemExit if is_users else type(caught.value)), command_line.in_a_line():
        call()
    monkeypatch.setattr(command_line, "_debug", True)
    with pytest.raises(type(caught.value)), command_line.in_a_line():
        call()


def bug_behind_a_file():
    try:
        no_file()
    except OSError:
        bug()


def test_a_bug_in_a_command_keeps_its_traceback_whatever_it_was_raised_behind(monkeypatch):
    def main(argv):
        bug_behind_a_file()

    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(command_line.app, "run", lambda main, flags_parser: main(sys.argv))
    with pytest.raises(IndexError):
        command_line.run_absl(main)


def test_a_config_is_taken_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wdbc = f"--config={command_line.CONFIGS / 'wdbc.py'}"
    for given in (["--config=wdbc"], ["--config", "wdbc"], [wdbc]):
        assert command_line.arguments(["x", *given, "y"]) == ["x", wdbc, "y"]
    assert "digits.py" in command_line.arguments(["x", "--config.seed=1"])[1]
    assert command_line.arguments(["x", "--config=own:a:b"])[1].endswith("own.py:a:b")
    with pytest.raises(ValueError, match="there is no 'digit'; did you mean 'digits'"):
        command_line.arguments(["x", "--config=digit"])


def test_the_home_folder_is_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    given = ["--data=~/x", "--config=own:~/x?trusted=~/t", "--out=~", "--o=~x", "--config.a=b~/c"]
    monkeypatch.setattr(sys, "argv", ["~/x", *given, "--debug"])
    monkeypatch.setattr(command_line, "_debug", False)
    command_line.prepare_arguments()
    assert sys.argv == [
        "~/x",
        "--data=/h/x",
        "--config=own:/h/x?trusted=/h/t",
        "--out=/h",
        *given[3:],
    ]


def parsed(*argv):
    """The flags of a command with these arguments."""
    argv, values = command_line.arguments(["x", *argv]), flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values


@pytest.mark.parametrize(
    ("given", "fields"),
    [(["--config=digits", "--config.model.name=resnet18"], {"name", "norm"}),
     (["--config=digits", "--config.model.name=vit"], {"name"}),
     (["--config=wdbc", "--config.model.name=ft_transformer"], {"name"}),
     (["--config=digits", "--config.model.name=mlp"], {"name", "norm", "widths"})],
)  # fmt: skip
def test_another_network_is_asked_for_by_its_name_alone(given, fields):
    config = command_line.given_config(parsed(*given)["config"])
    assert set(config.model) == fields
    build.check(config)
    assert set(command_line.given_config(parsed(given[0])["config"]).model) > {"name"}
    own = command_line.given_config(parsed(*given, "--config.model.widths=(3,)")["config"])
    assert own.model.widths == (3,)  # said, so refused where it does not fit


CASES = [
    (["--data=nowhere/x.csv"], "error: --data must be the path of .* no 'nowhere/x.csv'"),
    (["--config=wdbc", "--config.data.name=t.csv"], "error: config.data.noise is 0.3 in this conf"),
]


@pytest.mark.parametrize("given, said", CASES)
def test_a_users_error_is_one_line(given, said, tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,x\n2,y\n")
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    code = path + "from experiments import commands; commands.main()"
    done = run("-c", code, "train", *given, cwd=tmp_path)
    *_, last = done.stderr.strip().splitlines()
    assert done.returncode in (1, 2) and re.match(said, last) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [("--config.train.epochs=3", "config.train has no field 'epochs'; .*known fields: .'batch_s"),
     ("--config.train.stepz=3", "config.train has no field 'stepz'; did you mean 'steps'"),
     ("--noconfig.data.on_devic", "config.data has no field 'on_devic'; did you mean 'on_device'"),
     ("--config.seed.x=1", "config.seed has no field 'x'")],
)  # fmt: skip
def test_an_unknown_field_is_said_as_other_commands_do(given, said, monkeypatch, capsys):
    argv = ["--config=wdbc", "--config.seed=1", given]
    monkeypatch.setattr(flags, "FLAGS", parsed("--config=wdbc"))
    monkeypatch.setattr(sys, "argv", command_line.arguments(["x", *argv]))
    with pytest.raises(SystemExit), command_line._usage_errors():
        parsed(*argv)
    assert re.match(f"error: {said}", capsys.readouterr().err)


def test_help_lists_the_fields_of_the_config_with_their_meaning():
    done = run("-m", "experiments.main", "--config=wdbc", "--help", cwd=ROOT)
    assert done.returncode == 0 and "  --workdir='runs/digits'\n" in done.stdout
    for text in (
        "--config.data.noise=0.3\n      share of",
        "--config.method.saflex.rule.sharpness=",
    ):
        assert text in done.stdout
    assert "--config.method.l2rw" not in done.stdout


# --- the wheel ---------------------------------------------------------------------------------


def test_a_wheel_holds_every_file_that_the_commands_read():
    """Files beside the code are those of package_data; nothing else is looked for beside it."""
    given = re.search(
        r'package_data=\{.*"experiments": (\[.*?\])\}', (ROOT / "setup.py").read_text()
    )
    shipped = {
        file
        for pattern in ast.literal_eval(given[1])
        for file in (ROOT / "experiments").glob(pattern)
    }
    there = {
        file
        for folder in ("experiments", "saflex_jax")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert there == shipped | {ROOT / "saflex_jax" / "py.typed"}
    for folder in (ROOT / "experiments").rglob("*/"):  # or find_packages leaves it out
        assert folder.name == "__pycache__" or (folder / "__init__.py").exists()


def test_the_version_is_said_once():
    assert f"version: {saflex_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {saflex_jax.__version__} " in (ROOT / "CHANGELOG.md").read_text()
