"""What a sweep is, which mistakes it names, and how its runs become a table."""

import csv
import json
import math
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest

from experiments.sweeps import report, runner, spec
from experiments.sweeps.report import estimate, paired
from experiments.sweeps.spec import Member, Outcome, Sweep
from luspo_jax.hosts.values import ConfigError
from luspo_jax.run import adapters, checks, fields
from luspo_jax.run.model import load_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASE = "configs/quickstart.py"
ACCURACY, LENGTH = "val-core/label_sums/acc/mean@4", "val-aux/label_sums/response_length/mean"


def _sweep(**changes):
    return Sweep(
        **{
            "base": BASE,
            "fixed": {"num_steps": 2},
            "axes": {
                "objective": {
                    "gspo": {"objective.preset": "gspo"},
                    "luspo": {"objective.preset": "luspo"},
                },
                "rate": {1e-4: {"train.learning_rate": 1e-4}, 2e-4: {"train.learning_rate": 2e-4}},
            },
            "seeds": (0, 1),
            "baseline": {"objective": "gspo"},
        }
        | changes
    )


def _finish(sweep, workdir, member, accuracies, lengths):
    """A folder as a finished run leaves it."""
    folder = member.folder(workdir)
    folder.mkdir(parents=True)
    rows = [
        {"step": step, ACCURACY: a, LENGTH: n}
        for step, (a, n) in enumerate(zip(accuracies, lengths, strict=True))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mark = {"fingerprint": fields.fingerprint(spec.config_of(sweep, member))}
    (folder / "finished.json").write_text(json.dumps(mark))
    return folder


@pytest.fixture
def finished(tmp_path):
    """A sweep all of whose runs are done: final accuracy 0.1·variant + 0.01·seed."""
    sweep = _sweep()
    for k, variant in enumerate(spec.variants(sweep)):
        for seed in sweep.seeds:
            last = 0.1 * k + 0.01 * seed
            _finish(sweep, tmp_path, Member(variant, seed), [0, 0, last], [9, 9, 10 + k])
    return sweep, tmp_path


# Statistics.


def test_an_interval_is_the_textbooks():
    found = estimate([1.0, 2.0, 4.0, math.nan])
    assert (found.mean, found.count) == (pytest.approx(7 / 3), 3)
    deviation = math.sqrt(sum((x - 7 / 3) ** 2 for x in (1, 2, 4)) / 2)
    assert found.half_width == pytest.approx(4.3026527 * deviation / math.sqrt(3))
    assert math.isnan(estimate([1.0]).half_width)
    assert estimate([]).count == 0


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (5, 2.776), (36, 2.030)])
def test_half_widths_are_of_students_t(count, quantile):
    values = list(np.random.default_rng(0).normal(size=count))
    assert estimate(values).half_width == pytest.approx(
        quantile * np.std(values, ddof=1) / math.sqrt(count), rel=3e-4
    )


def test_differences_are_by_seed():
    found = paired({0: 1.0, 1: 5.0, 2: 3.0}, {1: 4.0, 2: 1.0, 7: 9.0})
    assert (found.mean, found.count) == (1.5, 2)


ROWS = [{"step": s, "x": float(s * s), "y": 0.25 * s} for s in range(5)]


@pytest.mark.parametrize(
    ("reduce", "options", "expected"),
    [
        ("first", {}, 0.0),
        ("last", {}, 16.0),
        ("last", {"until": 2}, 4.0),
        ("change", {}, 16.0),
        ("mean", {}, 6.0),
        ("max", {}, 16.0),
        ("auc", {}, (0 / 2 + 1 + 4 + 9 + 16 / 2) / 4),
        ("at", {"where": "y", "level": 0.5}, 4.0),
        ("at", {"where": "y", "level": 0.375}, 2.5),  # half way from step 1 to step 2
        ("at", {"where": "y", "level": 2.0}, math.nan),
    ],
)
def test_reductions(reduce, options, expected):
    value = report.value_of(ROWS, Outcome("o", "x", reduce, **options))
    assert value == pytest.approx(expected, nan_ok=True)


def test_values_that_are_not_finite_are_left_out_and_a_missing_metric_is_nan():
    rows = [{"step": 0, "x": 1.0}, {"step": 1, "x": math.nan}, {"step": 2}]
    assert report.value_of(rows, Outcome("o", "x", "mean")) == 1.0
    assert math.isnan(report.value_of(rows, Outcome("o", "z")))


# What a sweep is.


def test_members_are_all_combinations_and_seeds():
    members = spec.check(_sweep())
    assert len(members) == 8
    config = spec.config_of(_sweep(), members[-1])
    assert (config.objective.preset, config.train.learning_rate) == ("luspo", 2e-4)
    assert (config.num_steps, config.seed) == (2, 1)


def test_a_list_of_members_needs_no_grid():
    sweep = _sweep(
        axes={}, members={"a": {}, "b": {"train.max_grad_norm": 0.0}}, baseline={"member": "a"}
    )
    assert [m.name for m in spec.check(sweep)] == ["a/seed_0", "a/seed_1", "b/seed_0", "b/seed_1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fixed": {"train.learning_rat": 1.0}}, "did you mean.*train.learning_rate"),
        ({"fixed": {"train.b1": "fast"}}, "train.b1='fast'"),
        ({"fixed": {"rollout.prompts_per_step": 7}}, "prompts_per_step"),
        ({"axes": {"a": {"x y": {}, "x_y": {"num_steps": 3}}}}, "2 members are named"),
        ({"seeds": (0, 0)}, "2 seeds are named 0"),
        ({"seeds": ()}, "seeds is empty"),
        ({"axes": {}}, "no members"),
        ({"baseline": {"objective": "grpo"}}, "is none of its variants"),
        ({"outcomes": (Outcome("a", "x", "median"),)}, "reduce='median'"),
        ({"base": "configs/nothing.py"}, "does not exist"),
        (
            {
                "fixed": {
                    "objective.length_scale": "adaptive",
                    "length.steer": "band",
                    "length.target_low": 30.0,
                    "length.target_high": 20.0,
                },
                "axes": {"a": {"luspo": {"objective.preset": "luspo"}}},
                "baseline": {},
            },
            "target_low=30 and length.target_high=20",
        ),
    ],
)
def test_each_mistake_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        spec.check(_sweep(**changes))


def test_a_stored_configuration_comes_back_with_the_options_of_rewards():
    """What a worker is handed is flat; sections inside open ones must survive it."""
    sweep = _sweep(
        fixed={
            "reward.parts": {"gsm8k": 1.0, "overlong": 0.5},
            "reward.options": {"overlong": {"buffer": 12, "factor": 0.3}},
            "eval.metric": "gsm8k",
        }
    )
    config = spec.config_of(sweep, spec.check(sweep)[0])
    again = fields.default_config()
    fields.assign(again, json.loads(json.dumps(fields.flat(config))))
    assert fields.fingerprint(again) == fields.fingerprint(config)
    assert again.reward.options.overlong.factor == 0.3


def test_the_base_is_shipped_or_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert spec.base_config("configs/quickstart.py").num_steps == 80
    own = tmp_path / "mine.py"
    own.write_text(
        "from luspo_jax.run.fields import default_config\n"
        "def get_config():\n    config = default_config()\n    config.num_steps = 17\n"
        "    return config\n"
    )
    assert spec.base_config("mine.py").num_steps == 17
    assert spec.base_config(str(own)).num_steps == 17


def test_launch_lines_set_every_field():
    sweep = _sweep()
    for member in spec.check(sweep):
        words = shlex.split(spec.launch_line(sweep, member, pathlib.Path("DIR"), "file.py"))
        assert words[:3] == ["python", "-m", "experiments.train"]
        for name, value in member.variant.fields:
            assert f"--config.{name}={value}" in words
        assert f"--config.seed={member.seed}" in words
        assert f"--workdir={member.folder(pathlib.Path('DIR'))}" in words


def test_launch_lines_leave_whole_sections_to_the_sweep():
    sweep = _sweep(fixed={"reward.parts": {"exact": 1.0}})
    member = spec.check(sweep)[0]
    line = spec.launch_line(sweep, member, pathlib.Path("DIR"), "file.py")
    assert f"--only={member.name}" in shlex.split(line)


# Standing of members.


def test_a_finished_run_is_known_and_damage_is_named(finished):
    sweep, workdir = finished
    member = spec.members(sweep)[0]
    folder, config = member.folder(workdir), spec.config_of(sweep, member)
    assert runner.standing(folder, config) == ("finished", "")
    metrics = (folder / "metrics.jsonl").read_text()
    for name, text, message in (
        ("metrics.jsonl", metrics.replace('{"step": 1', "{step 1"), "line 2"),
        ("metrics.jsonl", metrics.rsplit("\n", 2)[0] + "\n", "ends at step 1 of 2"),
        ("metrics.jsonl", metrics, ""),
        ("finished.json", "{", "finished.json is damaged"),
        ("finished.json", '{"fingerprint": "other"}', "belongs to another configuration"),
    ):
        (folder / name).write_text(text)
        state, reason = runner.standing(folder, config)
        assert state == ("broken" if message else "finished")
        assert message in reason
        assert not message or f"delete {folder}" in reason
    (folder / "finished.json").unlink()
    assert runner.standing(folder, config) == ("unfinished", "")


def test_nothing_is_run_again_and_a_damaged_member_does_not_stop_the_rest(finished, capsys):
    sweep, workdir = finished
    broken = spec.members(sweep)[3]
    (broken.folder(workdir) / "finished.json").write_text("{")
    failures = runner.run(sweep, workdir)  # would take minutes if anything were run
    assert list(failures) == [broken.name]
    text = report.write(sweep, workdir, failures)
    assert f"- {broken.name}: " in text
    assert "delete" in text


def test_a_workdir_keeps_to_one_sweep_and_takes_more_members(finished):
    sweep, workdir = finished
    runner.run(sweep, workdir)
    with pytest.raises(ConfigError, match="holds another sweep"):
        runner.run(_sweep(fixed={"num_steps": 3}), workdir)
    with pytest.raises(ConfigError, match="--only=gpso is no member"):
        runner.run(sweep, workdir, only=["gpso"])


def test_what_is_named_runs_in_the_order_of_its_names_and_once(monkeypatch, tmp_path):
    ran = []

    def run_all(waiting, *_):
        ran.extend(member.name for member, _ in waiting)

    monkeypatch.setattr(runner, "_run_all", run_all)
    sweep = _sweep()
    members = [member.name for member in spec.members(sweep)]
    last = spec.members(sweep)[-1].variant.name
    runner.run(sweep, tmp_path, only=[members[2], last, members[-1], members[0]])
    own = [name for name in members if name.startswith(f"{last}/")]
    assert ran == [members[2], *own, members[0]]


def test_workers_have_the_environment_that_is_asked_for(monkeypatch, tmp_path):
    """Added to this process's own."""
    started = []

    def popen(command, *, env, **_):
        started.append(env)
        raise OSError("no worker today")

    monkeypatch.setenv("INHERITED", "yes")
    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    failures = runner.run(
        _sweep(), tmp_path, only=["gspo,0.0001/seed_0"], environment={"ADDED": "2"}
    )
    assert "no worker today" in failures["gspo,0.0001/seed_0"]
    (environment,) = started
    assert (environment["ADDED"], environment["INHERITED"]) == ("2", "yes")


# The table.


def test_table_has_means_intervals_and_paired_differences(finished):
    sweep, workdir = finished
    text = report.write(sweep, workdir)
    with (workdir / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["objective"] for row in rows] == ["gspo", "gspo", "luspo", "luspo"]
    last = rows[-1]  # accuracy 0.3 and 0.31; its baseline, gspo at the same rate, 0.1 and 0.11
    assert float(last["accuracy"]) == pytest.approx(0.305)
    assert float(last["accuracy ±95%"]) == pytest.approx(12.706 * 0.005, rel=1e-3)
    assert float(last["Δ accuracy"]) == pytest.approx(0.2)
    assert float(last["Δ accuracy ±95%"]) == pytest.approx(0, abs=1e-9)
    assert rows[0]["Δ accuracy"] == ""  # the baseline itself
    assert "0.3050 ± 0.0635" in text
    for name in ("curves.png", "outcomes.png", "table.md", "results.csv"):
        assert (workdir / name).stat().st_size > 0


def test_ranks_of_an_adapter_are_beside_full_weights():
    sweep = spec.load("configs/sweeps/lora_rank.py")
    found = {}
    for member in spec.check(sweep):
        config = spec.config_of(sweep, member)
        model = load_model(config).config
        made = adapters.adapter(config, model)
        count = 0 if made is None else adapters.num_trained(model, made)
        found[member.variant.name] = (count, made and made.scale, config.train.learning_rate)
        assert spec.baseline_of(sweep, member.variant) == "full"
    # Of rank r: r · (inputs + outputs) of each of 7 matrices of 3 layers.
    per_rank = 3 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
    lora = {str(r): (r * per_rank, 2.0, pytest.approx(2e-3)) for r in (1, 8, 32)}
    assert found == {"full": (0, None, 2e-4), **lora}


def test_dry_run_prints_launch_lines_and_writes_nothing(tmp_path):
    ran = subprocess.run(
        [
            sys.executable, "-m", "experiments.sweep", "--dry_run",
            "--sweep=configs/sweeps/length_scale.py", f"--workdir={tmp_path / 'none'}",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("python -m experiments.train") == 21
    assert not (tmp_path / "none").exists()


def test_a_missing_sweep_file_is_one_line(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", "--sweep=nothing.py", f"--workdir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode != 0
    assert "--sweep=nothing.py does not exist" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_trackers_show_the_members_of_a_sweep_together(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "not_installed", lambda text: ())
    sweep, tasks = _sweep(fixed={"output.trackers": "wandb", "output.project": "p"}), []
    monkeypatch.setattr(runner, "_run_all", lambda waiting, *_: tasks.extend(waiting))
    runner.run(sweep, tmp_path / "study")
    assert tasks
    for member, task in tasks:
        named = {k: task["config"][f"output.{k}"] for k in ("project", "group", "run_name")}
        assert named == {"project": "p", "group": "study", "run_name": member.name}
        assert task["fingerprint"] == fields.fingerprint(spec.config_of(sweep, member))
        line = spec.launch_line(sweep, member, tmp_path / "study", "s.py")
        assert "--config.output.group=study" in line
        assert f"--config.output.run_name={member.name}" in shlex.split(line)
    tasks.clear()
    runner.run(_sweep(), tmp_path / "untracked")
    assert {task["config"]["output.group"] for _, task in tasks} == {""}
    own = {"output.trackers": "wandb", "output.group": "mine", "output.run_name": "x"}
    tasks.clear()
    runner.run(_sweep(fixed=own), tmp_path / "own")
    assert {task["config"]["output.group"] for _, task in tasks} == {"mine"}
