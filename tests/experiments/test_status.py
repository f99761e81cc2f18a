"""What `experiments.status` says of runs whose files are written by hand."""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest

from experiments.progress import facts, reading, text, watching
from luspo_jax.metrics import json_line

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOW = 1_800_000_000.0
CONFIG = {"num_steps": 40, "eval.every": 10, "hosts.dead_after_s": 30.0}
ACCURACY = "val-core/toy/acc/mean@4"
ACCURACIES = {0: 0.125, 10: 0.5, 20: 0.25}


def write_run(folder, *, steps=23, config=CONFIG, checkpoints=(10, 20), **last):
    """Writes a run that has taken so many steps; `last` are more metrics of its last step."""
    rows = []
    for step in range(steps + 1):
        row = {ACCURACY: ACCURACIES[step]} if step in ACCURACIES else {}
        if step:
            row |= {"reward": step / 100, "response_length/mean": 100.0 + step}
            row |= {"response_length/clip_ratio": 0.031, "timing_s/step": 7.0 + step % 7}
        if step in ACCURACIES and step:
            row["timing_s/testing"] = 30.0
        rows.append(json_line(step, row | (last if step == steps else {})))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(rows))
    (folder / "run.json").write_text(json.dumps({"config": config}))
    for step in checkpoints:
        for part in ("host", "state"):
            put(folder / "checkpoints" / str(step) / part / "data", b"x" * 500)
    put(folder / "rollouts" / "step_000001.jsonl", b"y" * 30)
    put(folder / "export" / "model.safetensors", b"z" * 4000)
    stamp(folder, NOW - 5)
    return folder


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def stamp(folder, written):
    for path in folder.rglob("*"):
        os.utime(path, (written, written))


def post(folder, index, *, written=NOW - 1, **fields):
    """Writes a heartbeat."""
    known = {
        "process": index, "host": f"host{index}", "pid": 70 + index, "attempt": "b", "phase": "gen",
        "phase_s": 3.0, "step": 24, "beat": 9, "status": "running", "message": "",
    } | fields  # fmt: skip
    path = folder / "processes" / f"{index}.json"
    put(path, json.dumps(known).encode())
    os.utime(path, (written, written))


def look(folder, *, now=NOW, beats=None):
    return facts.progress(str(folder), reading.folder(str(folder)), beats or facts.Beats(), now=now)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run in a folder whose path may be long: the terminal is wide, so that no line is broken."""
    monkeypatch.setenv("COLUMNS", "300")
    return write_run(tmp_path / "run")


def call(*arguments):
    """Runs the command; gives status, standard output and standard error."""
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.status", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"COLUMNS": "300"}, capture_output=True, text=True,
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


def test_how_far_how_fast_and_how_well(run):
    known = look(run)
    seconds = statistics.median(7.0 + step % 7 for step in range(14, 24))
    assert (known.state, known.age_s) == ("running", 5)
    assert (known.step, known.num_steps, known.seconds_per_step) == (23, 40, seconds)
    assert known.ends_in_s == 17 * seconds + 2 * 30.0  # evaluations of steps 30 and 40
    assert known.values["reward"] == facts.Point(23, 0.23)
    assert known.values["response_length/mean"] == facts.Point(23, 123.0)
    assert known.values["response_length/clip_ratio"].value == 0.031
    curve = known.curves[ACCURACY]
    assert (curve.first, curve.best, curve.last) == tuple(
        facts.Point(step, ACCURACIES[step]) for step in (0, 10, 20)
    )
    assert (known.checkpoints, known.best_checkpoint) == ([10, 20], 10)
    sizes = {"checkpoints": 2000, "rollouts": 30, "export": 4000}
    rest = sum((run / name).stat().st_size for name in ("run.json", "metrics.jsonl"))
    assert known.bytes == {**sizes, "rest": rest}
    assert not known.flags


def test_of_a_loss_the_least_is_best(tmp_path):
    run = write_run(tmp_path / "run", steps=0, checkpoints=(1, 2, 3))
    losses = {1: 2.5, 2: 1.5, 3: 2.0}
    rows = [json_line(step, {"held_out/loss": loss}) for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(rows))
    known = look(run)
    assert known.curves["held_out/loss"].best == facts.Point(2, 1.5)
    assert known.best_checkpoint == 2


def test_an_incomplete_checkpoint_is_none(run):
    put(run / "checkpoints" / "30" / "state" / "data")
    put(run / "checkpoints" / "40.orbax-checkpoint-tmp" / "host" / "data")
    assert look(run).checkpoints == [10, 20]


def test_what_warns(tmp_path):
    names = ("length/degeneration/flag", "length/degeneration/collapse", "length/account/flag")
    run = write_run(tmp_path / "a", **dict.fromkeys(names, 1.0), **{"actor/skipped_updates": 2.0})
    assert look(run).flags == {
        "length/degeneration/flag": "length grows and accuracy does not",
        "length/degeneration/collapse": "it falls and accuracy does not grow",
        "length/account/flag": "lengths consumed have parted from sampled",
        "actor/skipped_updates": "2 updates were not finite",
    }
    quiet = write_run(tmp_path / "b", **dict.fromkeys(names, 0.0), **{"actor/skipped_updates": 0.0})
    assert not look(quiet).flags


def test_without_heartbeats_silence_is_several_steps(run):
    longest = max(7.0 + step % 7 for step in range(14, 21)) + 30.0  # step 20 was measured, too
    limit = 3 * longest
    assert look(run, now=NOW - 5 + limit - 1).state == "running"
    assert "no process of this host" in look(run).notes[0]
    assert look(run, now=NOW - 5 + limit + 1).state == "silent"


def test_a_run_that_holds_its_lock_runs(run):
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = look(run, now=NOW + 1e6)
        assert (known.state, known.notes) == ("running", [])
    assert look(run, now=NOW + 1e6).state == "silent"


def test_before_its_first_step_a_run_may_be_silent_for_long(tmp_path):
    run = write_run(tmp_path / "run", steps=0, checkpoints=())
    (run / "metrics.jsonl").unlink()
    known = look(run, now=NOW + 1000)
    assert (known.state, known.step, known.ends_in_s) == ("running", None, None)
    assert "none yet" in text.page(known, 100)
    assert look(run, now=NOW + 10_000).state == "silent"


@pytest.mark.parametrize(("checkpoints", "state"), [((40,), "finished"), ((10,), "silent")])
def test_a_run_is_finished_when_its_last_step_is_kept(tmp_path, checkpoints, state):
    known = look(write_run(tmp_path / "run", steps=40, checkpoints=checkpoints), now=NOW + 1e6)
    assert known.state == state
    assert known.ends_in_s is None


def test_processes_and_their_heartbeats(run):
    post(run, 0)
    post(run, 1, written=NOW - 29, step=23, phase="reward")
    known = look(run)
    assert known.state == "running"
    assert known.notes == []
    assert known.processes[1] == facts.Process(1, "host1", 71, "running", 23, "reward", 29.0, "")
    post(run, 1, written=NOW - 31)
    known = look(run)
    assert (known.state, [p.status for p in known.processes]) == ("silent", ["running", "dead"])


def test_a_process_that_failed_says_why(run):
    post(run, 0, status="stopped", message="process 1 failed")
    post(run, 1, status="failed", message="out of\n\x1b[31m memory")
    known = look(run)
    assert known.state == "failed"
    shown = text.page(known, 200)
    assert "FAILED" in shown
    assert "failed, phase gen of step 24, 1 s ago; host host1, pid 71: out of" in shown
    assert "\x1b" not in shown


def test_a_run_that_was_asked_to_end_is_silent_and_says_so(run):
    for index in (0, 1):
        post(run, index, status="preempted", message="asked to end, and saved")
    known = look(run)
    assert known.state == "silent"
    assert "preempted, phase gen" in text.page(known, 200)


def test_heartbeats_of_an_earlier_start_say_nothing(run):
    post(run, 0)
    post(run, 1, written=NOW - 500, attempt="a", status="failed")
    assert [p.index for p in look(run).processes] == [0]
    post(run, 0, written=NOW - 400, status="failed")
    assert look(run).processes == []  # metrics came later: it goes on as one process
    assert look(run).state == "running"


def test_when_all_processes_are_done_the_run_is_finished(run):
    for index in (0, 1):
        post(run, index, status="done", written=NOW - 10)
    assert look(run, now=NOW + 1e6).state == "finished"


def test_a_watch_goes_by_its_own_clock(run):
    """The clock of the storage is an hour behind: heartbeats that change are signs of life."""
    now = [100.0]
    beats = facts.Beats(clock=lambda: now[0])
    for beat, state in ((1, "silent"), (2, "running")):
        post(run, 0, written=NOW - 20, beat=beat)
        assert look(run, now=NOW + 3600, beats=beats).state == state
    now[0] += 31
    assert look(run, now=NOW + 3600, beats=beats).state == "silent"


def test_half_a_line_no_manifest_and_damage_are_a_line_each(run):
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 24, "rew')
    (run / "run.json").unlink()
    put(run / "processes" / "0.json", b'{"process"')
    known = look(run)
    assert (known.step, known.num_steps, known.ends_in_s) == (23, None, None)
    assert [note.split(":")[0] for note in known.notes] == [
        "run.json is not there",
        "metrics.jsonl",
        "processes/0.json is no heartbeat (JSONDecodeError",
        "no process of this host holds its lock",
    ]
    assert text.page(known, 500).count("\n  note ") == 4
    (run / "run.json").write_text("{")
    assert "run.json is damaged" in look(run).notes[0]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:5], "junk", *lines[5:]]))
    known = look(run)
    assert (known.step, "line 6" in known.notes[1]) == (4, True)


def test_values_that_are_not_finite(tmp_path):
    run = write_run(tmp_path / "run", reward=float("nan"), **{ACCURACY: float("inf")})
    known = look(run)
    assert known.curves[ACCURACY].last.step == 20
    assert "reward      nan" in text.page(known, 100)
    (line,) = call("--json", run)[1].splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["values"]["reward"]["value"] is None


def test_the_page(run):
    post(run, 0)
    seconds = statistics.median(7.0 + step % 7 for step in range(14, 24))
    left = 17 * seconds + 2 * 30.0
    page = text.page(look(run), 200).splitlines()
    assert page[0] == f"{run}: running, last sign of life 1 s ago"
    assert page[1].startswith(
        f"  step        23 of 40, {seconds:g} s each; about {text.span(left)} to go, until "
    )
    assert page[2:7] == [
        "  reward      0.23",
        "  length      123.0 tokens, 3.1% truncated",
        "  held out    toy/acc/mean@4: first 0.125 (step 0), best 0.5 (step 10), "
        "last 0.25 (step 20)",
        "  process 0   running, phase gen of step 24, 1 s ago; host host0, pid 70",
        "  checkpoints latest 20, best 10; 2 kept",
    ]


@pytest.mark.parametrize("width", [40, 60, 100])
def test_lines_fit_the_terminal(run, width):
    page = text.page(look(run), width).splitlines()
    assert max(map(len, page[1:])) <= width
    member = text.member_lines([look(run)], width)
    assert max(map(len, member.splitlines())) <= width


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min"), (3_600, "1 h"), (3_605, "1 h"), (90_000, "1 d 1 h")],
)
def test_times_are_in_their_two_largest_units(seconds, words):
    assert text.span(seconds) == words


def test_exit_status_and_several_workdirs(tmp_path):
    good, bad = (write_run(tmp_path / name) for name in ("good", "bad"))
    stamp(good, time.time())
    stamp(bad, time.time() - 10_000)
    assert call(good)[0] == 0
    code, out, err = call(good, bad, f"--workdir={tmp_path / 'none'}")
    assert code == 2  # named both ways
    code, out, err = call(good, bad, tmp_path / "none", tmp_path)
    assert (code, err) == (1, "")
    heads = [line.split(": ")[1] for line in out.splitlines() if line.startswith(str(tmp_path))]
    assert [head.split(",")[0] for head in heads] == ["running", "SILENT", "GONE", "never started"]
    assert [json.loads(line)["state"] for line in call(good, bad, "--json")[1].splitlines()] == [
        "running",
        "silent",
    ]


@pytest.mark.parametrize("value", ["x", "-1", "nan", "inf", ""])
def test_a_wrong_interval_is_one_line(run, value):
    code, _, err = call(run, f"--watch={value}")
    assert (code, err.count("\n")) == (2, 1)
    assert "--watch" in err


def test_a_bucket_and_no_workdir_are_one_line():
    for arguments, says in ((["ftp://host/run"], "ftp:// is not known"), ([], "--workdir")):
        code, _, err = call(*arguments)
        assert (code, err.count("\n"), says in err) == (2, 1, True)


def test_a_watch_draws_until_ctrl_c_also_when_the_workdir_goes(run, capsys, monkeypatch):
    stamp(run, time.time())
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 1:
            shutil.rmtree(run)
        elif len(slept) == 2:
            stamp(write_run(run), time.time())
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert watching.show([str(run)], every_s=0.5)
    assert slept == [0.5] * 3
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split(": ")[1] for line in lines if line.startswith(str(run))]
    assert [head.split(",")[0] for head in heads] == ["running", "GONE", "running"]
    shutil.rmtree(run)
    assert not watching.show([str(run)], every_s=0.5)


@pytest.mark.parametrize(
    ("every_s", "as_json", "redraws"), [(1.0, False, True), (1.0, True, False), (0.0, False, False)]
)
def test_only_a_watch_clears_the_screen(every_s, as_json, redraws, run, capsys, monkeypatch):
    def sleep(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    watching.show([str(run)], every_s=every_s, as_json=as_json)
    assert capsys.readouterr().out.startswith("\x1b[H\x1b[J") == redraws


def test_the_command_ends_with_ctrl_c(run):
    """`--watch` alone takes no value: the workdir after it is one."""
    stamp(run, time.time())
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.status", "--watch", str(run)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A suite in the background of a shell ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as watched:  # fmt: skip
        while watched.stdout.readline() != "\n":
            pass  # the page is there, and its end
        watched.send_signal(signal.SIGINT)
        assert watched.wait(10) == 0
        assert watched.stderr.read() == ""


def test_a_sweep_is_a_line_for_each_member(tmp_path):
    for variant, seed in (("luspo", 0), ("gspo", 1)):
        write_run(tmp_path / "sweep" / "members" / variant / f"seed_{seed}")
    stamp(tmp_path, time.time())
    put(tmp_path / "sweep" / "members" / "gspo" / "seed_1" / "finished.json", b"{}")
    put(tmp_path / "sweep" / "sweep.json", b"{}")
    code, out, _ = call(tmp_path / "sweep")
    assert code == 0
    head, columns, *lines = out.splitlines()
    assert head.endswith("a sweep, 1 of 2 members that began are finished")
    assert columns.split()[:3] == ["member", "state", "step"]
    assert [line.split()[:5] for line in lines] == [
        ["gspo/seed_1", "finished", "23/40", "0.230", "123"],
        ["luspo/seed_0", "running", "23/40", "0.230", "123"],
    ]
    lines = call(tmp_path / "sweep", "--json")[1].splitlines()
    names = [json.loads(line)["workdir"] for line in lines]
    assert names == [f"{tmp_path / 'sweep'}/members/{m}" for m in ("gspo/seed_1", "luspo/seed_0")]


def test_nothing_is_changed_and_jax_is_not_imported(run):
    post(run, 0, written=time.time())
    before = {p: p.lstat()[:9] for p in [run, *run.rglob("*")]}
    code = (
        "import sys; sys.argv = ['status', *sys.argv[1:]]\n"
        "from experiments import command, status\n"
        "code = command.call(status.main, required=('workdir',), positional='workdir')\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.exit(code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    after = {p: p.lstat()[:9] for p in [run, *run.rglob("*")]}
    assert {p: s[:7] + s[8:] for p, s in after.items()} == {
        p: s[:7] + s[8:] for p, s in before.items()
    }  # all but the time of reading
