"""The program luspo is a door: what it is told reaches the launchers as `python -m` brings it."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import command
from experiments.sweeps import spec
from luspo import places, program

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}"

# command, words after `python -m experiments.COMMAND`, words after `luspo COMMAND`.
CASES = [
    (
        "train",
        [QUICKSTART, "--workdir=w", "--config.num_steps=3", "--dry_run"],
        ["quickstart", "--workdir=w", "--config.num_steps=3", "--dry_run"],
    ),
    ("train", ["--workdir=w", QUICKSTART], ["--workdir=w", "--config=quickstart"]),
    ("train", ["--workdir", "w", QUICKSTART], ["--workdir", "w", "--config", "quickstart"]),
    ("train", ["--workdir=w", QUICKSTART], ["--workdir=w", "quickstart"]),
    ("sft", ["--config=mine.py", "--workdir=w"], ["mine.py", "--workdir=w"]),
    (
        "sweep",
        [f"--sweep={ROOT / 'configs' / 'sweeps' / 'lora_rank.py'}", "--only=a", "--only=b"],
        ["lora_rank", "--only=a", "--only=b"],
    ),
    ("rehearse", [QUICKSTART, "--topology=local"], ["quickstart", "--topology=local"]),
    ("evaluate", ["--model=m", "--benchmarks=aime24"], ["m", "--benchmarks=aime24"]),
    ("status", ["a", "b", "--json"], ["a", "b", "--json"]),
    ("show", ["w", "--step=3"], ["w", "--step=3"]),
    ("preview", [QUICKSTART, "--num=1"], ["quickstart", "--num=1"]),
    ("plot", ["--workdir=w"], ["w"]),
    ("export", ["--workdir=w", "--out=o"], ["w", "--out=o"]),
    ("tasks", ["--task=gcd"], ["gcd"]),
    ("checkup", [QUICKSTART, "--minutes=1"], ["quickstart", "--minutes=1"]),
]

# Runs launchers by `python -m` and by the door; `call` records what it is asked to call.
_RECORD = """
import json, runpy, sys
from absl import flags, logging
from experiments import cluster, command
from luspo import program

def call(main, **options):
    code = main.__code__
    said = [code.co_filename, code.co_firstlineno, list(sys.argv), options]
    record.append([*said, sys.modules["__main__"].__doc__, sorted(flags.FLAGS)])
    return 0

def directly(name, words):
    sys.argv = [name, *words]
    try:
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code == 0

def by_the_door(name, words):
    sys.argv = ["luspo", name, *words]
    assert program.main() == 0

command.call = cluster.call = call
shared = list(flags.FLAGS)
record = []
for name, direct, door in json.loads(sys.argv[1]):
    for run, words in ((directly, direct), (by_the_door, door)):
        run(name, words)
        for flag in set(flags.FLAGS) - set(shared):
            delattr(flags.FLAGS, flag)
print(json.dumps(record))
"""


def _python(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_door_leads_to_the_same_main_with_the_same_flags():
    ran = _python("-c", _RECORD, json.dumps(CASES))
    assert ran.returncode == 0, ran.stderr[-2000:]
    record = json.loads(ran.stdout)
    assert len(record) == 2 * len(CASES)
    for (name, direct, _), wanted, reached in zip(CASES, record[::2], record[1::2], strict=True):
        assert reached == wanted
        assert pathlib.Path(reached[0]) == ROOT / "experiments" / f"{name}.py"
        assert reached[2][1:] == direct


def test_every_command_is_a_launcher():
    assert {name for name, _, _ in CASES} == set(program.COMMANDS)
    for name, known in program.COMMANDS.items():
        assert importlib.util.find_spec(f"experiments.{name}"), name
        assert known.about


@pytest.fixture
def luspo(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["luspo", *words])
        status = program.main()
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "luspo: no command 'trian': did you mean 'train'? `luspo` lists them\n"),
        (["help", "shwo"], "luspo: no command 'shwo': did you mean 'show'? `luspo` lists them\n"),
        (["qqqq"], "luspo: no command 'qqqq': nothing has a name like it; `luspo` lists them\n"),
        (["train", "quikstart"], "no configuration 'quikstart': did you mean 'quickstart'?"),
        (["train", "--config=quikstart"], "no configuration 'quikstart': did you mean"),
        (["sweep", "lora_rnk"], "no sweep 'lora_rnk': did you mean 'lora_rank'?"),
        (["fields", "rolout"], "did you mean 'rollout'? `luspo fields` lists them"),
        (["fields", "a", "b"], "luspo fields [--sft] [PREFIX]"),
        (["completion", "csh"], "luspo completion SHELL, one of bash, zsh, fish"),
    ],
)
def test_a_mistake_is_one_line(luspo, words, message):
    status, out, err = luspo(*words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize("words", [(), ("--help",), ("help",)])
def test_alone_it_lists_commands_and_configurations_a_line_each(luspo, words):
    status, out, err = luspo(*words)
    assert (status, err) == (0, "")
    lines = out.split("\n")
    for name in [*program.COMMANDS, "fields", "completion", *places.configs()]:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1, name
    quickstart = (ROOT / "configs" / "quickstart.py").read_text().split('"""')[1].split("\n")[0]
    assert any(line.endswith(quickstart) for line in lines)


def test_overview_and_fields_come_without_jax():
    code = (
        "import sys; from luspo import program\n"
        "for words in (['--help'], ['fields'], ['completion', 'bash'], ['train', '--help']):\n"
        "    sys.argv = ['luspo', *words]; assert program.main() == 0\n"
        "assert 'jax' not in sys.modules"
    )
    ran = _python("-c", code)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_help_of_a_command_is_its_own_and_says_how_it_is_called_here():
    ran = _python("-m", "luspo", "train", "--help")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "luspo train quickstart --workdir=DIR" in ran.stdout
    assert "python -m" not in ran.stdout
    assert "\nFlags:\n" in ran.stdout
    assert "--fork_step: Checkpoint to begin from" in ran.stdout
    assert "  --config.rollout.group_size=" in ran.stdout


def test_messages_name_the_program(tmp_path):
    ran = _python("-m", "luspo", "export", "--out=x", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr == "luspo export: --workdir is required\n"


def test_a_path_of_the_documents_works_in_any_folder_and_an_own_file_comes_first(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert program.arguments("train", ["configs/quickstart.py"]) == [QUICKSTART]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").touch()
    own = ["--config=configs/quickstart.py"]
    assert program.arguments("train", ["configs/quickstart.py"]) == own
    (tmp_path / "quickstart").mkdir()  # a workdir, say
    assert program.arguments("train", ["quickstart"]) == [QUICKSTART]


def test_experiments_of_the_working_folder_are_not_ours(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    ran = _python("-m", "luspo", "plot", "absent", cwd=tmp_path)
    assert "wrong" not in ran.stderr
    assert ran.stderr.startswith("luspo plot: ")


def test_the_launch_lines_of_a_sweep_call_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "installed", True)
    sweep = spec.Sweep("configs/quickstart.py", members={"one": {"num_steps": 3}}, seeds=[5])
    (member,) = spec.members(sweep)
    line = spec.launch_line(sweep, member, pathlib.Path("out"), "mine.py")
    program_, name, *words = line.split()
    assert (program_, name) == ("luspo", "train")
    assert program.arguments(name, words) == [
        QUICKSTART, "--config.num_steps=3", "--config.seed=5", "--workdir=out/members/one/seed_5"
    ]  # fmt: skip
