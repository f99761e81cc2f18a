"""What figures of runs show, against a transcription: numbers of the artists, not pixels."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import figures
from experiments.drawing import benches, lengths, pressure, reading, tokens
from luspo import flags
from luspo_jax.hosts import figure_style
from luspo_jax.metrics import json_line

ROOT = pathlib.Path(figures.__file__).parents[1]


@pytest.fixture(autouse=True)
def closed():
    yield
    figure_style.pyplot().close("all")


def _responses(rng, count=12, size=40):
    return [
        reading.Responses(
            step, rng.integers(3, 30, size=size), rng.integers(0, 2, size=size) * 1.0, 0.1
        )
        for step in range(1, count + 1)
    ]


def _axis():
    return figure_style.pyplot().figure().subplots()


def test_series_leaves_out_what_is_not_finite_and_keeps_to_one_name():
    rows = [
        {"step": 1, "val-core/a/acc": 0.5, "loss": 1.0},
        {"step": 2, "val-core/b/acc": 0.7, "loss": float("nan")},
        {"step": 3, "val-core/a/acc": 0.6},
    ]
    assert [x.tolist() for x in reading.series(rows, "val-core/*")] == [[1, 3], [0.5, 0.6]]
    assert [x.tolist() for x in reading.series(rows, "loss")] == [[1], [1.0]]
    assert [len(x) for x in reading.series(rows, "absent")] == [0, 0]


@pytest.mark.parametrize("longest", [5, 24, 25, 1000, 16384])
def test_bins_hold_whole_tokens_all_of_them_and_are_few(longest):
    edges = lengths.bins(np.array([3, longest]))
    assert len(edges) - 1 <= 26
    assert edges[0] == 2.5
    assert edges[-1] >= longest + 0.5
    widths = np.diff(edges)
    assert (widths == widths[0]).all()
    assert widths[0] == int(widths[0])


def test_the_heat_map_has_the_share_of_each_length():
    steps = _responses(np.random.default_rng(0))
    edges = lengths.bins(np.concatenate([s.lengths_B for s in steps]))
    axis = _axis()
    lengths.heat_map(axis, steps, edges, 0.5)
    shown = np.square(axis.collections[0].get_array()).reshape(len(edges) - 1, len(steps))
    for column, step in zip(np.asarray(shown).T, steps, strict=True):
        width = edges[1] - edges[0]
        expected = np.zeros(len(edges) - 1)
        for length in step.lengths_B:
            expected[int((length - edges[0]) // width)] += 1 / len(step.lengths_B)
        np.testing.assert_allclose(column, expected, atol=1e-6)
    right, wrong = axis.lines
    expected = [s.lengths_B[s.rewards_B == 1].mean() for s in steps]
    np.testing.assert_allclose(right.get_ydata(), expected)
    assert right.get_label() == "mean of right"
    assert wrong.get_label() == "mean of wrong"


def test_means_of_few_responses_are_not_told():
    few = reading.Responses(1, np.arange(1, 11), np.array([1.0] * 8 + [0.0] * 2), 0.0)
    assert lengths.mean_lengths([few], True, 0.5).tolist() == [4.5]
    assert np.isnan(lengths.mean_lengths([few], False, 0.5)).all()


def test_ridges_stack_right_on_wrong_and_do_not_overlap():
    steps = _responses(np.random.default_rng(1))
    edges = lengths.bins(np.concatenate([s.lengths_B for s in steps]))
    axis = _axis()
    lengths.ridges(axis, steps, edges, 0.5)
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert len(labels) == lengths.RIDGES
    assert (labels[0], labels[-1]) == ("step 1", "step 12")
    stairs = axis.patches
    for place, (wrong, right) in enumerate(zip(stairs[::2], stairs[1::2], strict=True)):
        bottom, top = wrong.get_data(), right.get_data()
        np.testing.assert_allclose(top.baseline, bottom.values)  # right begins where wrong ends
        assert (bottom.values >= -place - 1e-9).all()
        assert (top.values <= -place + 1).all()


def test_accuracy_by_length():
    rng = np.random.default_rng(2)
    steps = _responses(rng, count=5, size=100)
    edges = np.array([2.5, 8.5, 14.5, 29.5, 40.5])
    found = lengths.by_length(steps, edges, 0.5)
    lengths_B = np.concatenate([s.lengths_B for s in steps])
    right_B = np.concatenate([s.rewards_B for s in steps])
    for k, (low, high) in enumerate([(2.5, 8.5), (8.5, 14.5), (14.5, 29.5)]):
        inside = (lengths_B > low) & (lengths_B < high)
        share = right_B[inside].mean()
        error = np.sqrt(share * (1 - share) / inside.sum())
        np.testing.assert_allclose([x[k] for x in found], [lengths_B[inside].mean(), share, error])
    assert len(found[0]) == 3  # nothing beyond 29


def _rows(rng, steps=30, every=1):
    lengths = 20 + np.cumsum(rng.normal(size=steps + 1))
    rows = [{"step": 0, "val-core/x/acc": 0.2, "val-aux/x/response_length/mean": lengths[0]}]
    for step in range(1, steps + 1):
        row = {"step": step, "response_length/mean": lengths[step]}
        row |= {"rollout/generated_tokens": 100.0 + step}
        if step % every == 0:
            row["length/pressure/taken"] = rng.normal()
            row["length/pressure/luspo"] = rng.normal()
            row["length/pressure/luspo/end"] = 9.0
            row["length/pressure/gspo"] = rng.normal()
        if step % 10 == 0:
            row |= {"val-core/x/acc": 0.2 + step / 100}
            row |= {"val-aux/x/response_length/mean": lengths[step]}
        rows.append(row)
    return rows


@pytest.mark.parametrize("every", [1, 3, 5, 10])
def test_what_followed_an_update(every):
    rows = _rows(np.random.default_rng(every), every=every)
    steps, predicted, measured = pressure.followed(rows, every)
    length = {row["step"]: row["response_length/mean"] for row in rows[1:]}
    taken = {row["step"]: row["length/pressure/taken"] for row in rows if len(row) > 6 or
             "length/pressure/taken" in row}  # fmt: skip
    width = max(every, 5)
    assert len(steps)
    assert (np.diff(steps) >= width).all()
    for step, said, came in zip(steps, predicted, measured, strict=True):
        before = [length[s] for s in range(int(step) - width, int(step)) if s in length]
        after = [length[s] for s in range(int(step), int(step) + width) if s in length]
        near = [value for s, value in taken.items() if abs(s - step) <= width / 2]
        assert came == pytest.approx(np.mean(after) - np.mean(before))
        assert said == pytest.approx((len(before) + len(after)) / 2 * np.mean(near))


def test_a_steady_drift_comes_true():
    """Where every update adds 0.4 tokens and says so, points lie on the line."""
    rows = [
        {"step": s, "response_length/mean": 10 + 0.4 * s, "length/pressure/taken": 0.4}
        for s in range(1, 41)
    ]
    for every in (1, 5):
        kept = [r if r["step"] % every == 0 else {k: r[k] for k in list(r)[:2]} for r in rows]
        _, predicted, measured = pressure.followed(kept, every)
        np.testing.assert_allclose(predicted, measured)


def test_pressure_is_drawn_of_every_objective_and_summed():
    rows = _rows(np.random.default_rng(3), every=5)
    figure = pressure.draw(rows, 5)
    first, second, third = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in first.lines}
    assert {"gspo", "luspo"} < lines.keys()
    assert "taken" not in lines
    assert np.abs(lines["luspo"]).max() == 1
    taken = [r["length/pressure/taken"] for r in rows if "length/pressure/taken" in r]
    start = rows[1]["response_length/mean"]
    expected = [start + 5 * (sum(taken[:k]) + taken[k] / 2) for k in range(len(taken))]
    np.testing.assert_allclose(third.lines[1].get_ydata(), expected)
    offsets = second.collections[0].get_offsets()
    np.testing.assert_allclose(offsets, np.transpose(pressure.followed(rows, 5)[1:]))


def test_accuracy_against_tokens_of_a_run():
    rows = _rows(np.random.default_rng(4))
    steps, own, sampled, accuracy = tokens.path(rows)
    assert steps.tolist() == [0, 10, 20, 30]
    assert accuracy.tolist() == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert sampled.tolist() == [sum(100 + s for s in range(1, n + 1)) for n in (0, 10, 20, 30)]
    assert own.tolist() == [
        r[reading.LENGTH.replace("*", "x")] for r in rows if "val-core/x/acc" in r
    ]
    figure = tokens.draw({"run": [(steps, own, sampled, accuracy)]})
    assert next(text.get_text() for text in figure.axes[0].texts) == "step 0"


def test_variants_are_means_over_their_common_steps():
    one = tuple(np.array(x, float) for x in ([0, 5, 10], [1, 2, 3], [0, 10, 20], [0.1, 0.2, 0.3]))
    two = tuple(np.array(x, float) for x in ([0, 10], [3, 5], [0, 40], [0.3, 0.5]))
    assert [x.tolist() for x in tokens.mean([one, two])] == [[0, 10], [2, 4], [0, 30], [0.2, 0.4]]
    figure = tokens.draw({"luspo": [one, two], "gspo": [one]})
    labels = [line.get_label() for line in figure.axes[0].lines if line.get_label()[0] != "_"]
    assert labels == ["luspo", "gspo"]
    assert [text.get_text() for text in figure.axes[1].texts] == labels


def _workdir(folder, rows):
    folder.mkdir(parents=True)
    text = "".join(json_line(row["step"], {k: v for k, v in row.items() if k != "step"})
                   for row in rows)  # fmt: skip
    (folder / "metrics.jsonl").write_text(text)
    (folder / "run.json").write_text('{"config": {"length.every": 5}}')
    return folder


@pytest.mark.parametrize("kind", figures.KINDS)
def test_a_run_is_drawn_in_every_kind(kind, tmp_path):
    rng = np.random.default_rng(5)
    run = _workdir(tmp_path / "run", _rows(rng, every=5))
    (run / "rollouts").mkdir()
    for step in (1, 2):
        lines = [
            json.dumps({"length": int(n), "reward": int(n % 2), "truncated": False})
            for n in rng.integers(1, 9, size=20)
        ]
        (run / f"rollouts/step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    assert figures.run_figure(run, kind) == run / f"{kind}.png"
    assert (run / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_is_compared_and_what_is_not_there_is_said(tmp_path):
    rows, sweep = _rows(np.random.default_rng(6)), tmp_path / "sweep"
    members = ["a (b)/seed_0", "a (b)/seed_1", "c/seed_0", "c/seed_1"]
    for member in ("a_b_/seed_0", "a_b_/seed_1", "c/seed_0"):
        (_workdir(sweep / "members" / member, rows) / "finished.json").write_text("{}")
    (sweep / "sweep.json").write_text(json.dumps({"members": dict.fromkeys(members, "")}))
    assert {name: len(paths) for name, paths in tokens.read(sweep).items()} == {"a (b)": 2, "c": 1}
    assert figures.run_figure(sweep, "tokens") == sweep / "tokens.png"
    with pytest.raises(FileNotFoundError, match="no metrics at"):
        figures.run_figure(sweep, "lengths")
    run = _workdir(tmp_path / "run", rows[:2])
    with pytest.raises(FileNotFoundError, match=r"output\.dump_every"):
        figures.run_figure(run, "lengths")
    with pytest.raises(FileNotFoundError, match="two held-out measurements"):
        figures.run_figure(run, "tokens")


def test_the_command_draws_what_there_is_and_says_what_not(tmp_path):
    run = _workdir(tmp_path / "run", _rows(np.random.default_rng(7), every=100))
    line = [sys.executable, "-m", "experiments.plot", f"--workdir={run}"]
    ran = subprocess.run([*line, "--kind=all"], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    found = ran.stdout.splitlines()
    assert found[:1] + found[2:3] == [f"{run}/summary.png", f"{run}/tokens.png"]
    assert found[1].startswith(f"lengths: not drawn: no responses in {run}/rollouts")
    assert found[3] == f"pressure: not drawn: no length pressure in {run}: set length.every"
    ran = subprocess.run([*line, "--kind=pressure"], capture_output=True, text=True, cwd=ROOT)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1), ran.stderr


def test_the_program_offers_every_kind():
    (kind,) = (flag for flag in flags.flags("plot") if flag.name == "kind")
    assert kind.values == (*figures.KINDS, "all")


def test_benches_are_drawn_as_found():
    found = {
        "vocab": 10,
        "embed": 2,
        "rows": [{"tokens": n, "plain": n * 2**30, "512": 2**29, "64": 2**28} for n in (4, 16)],
    }
    (axis,) = benches.head_memory(found).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.lines}
    assert list(lines) == ["chunks of 64 tokens", "chunks of 512 tokens", "all logits at once"]
    assert lines["all logits at once"] == [4, 16]
    assert lines["chunks of 64 tokens"] == [0.25, 0.25]
    rows = [
        {"tokens": n, "microseconds_a_token": n, "temporary_bytes_a_device": 2**20, "devices": 2}
        for n in (512, 1024)
    ]
    left, right = benches.long_context(rows).axes
    assert left.lines[0].get_ydata().tolist() == [512, 1024]
    assert [line.get_ydata().tolist() for line in right.lines] == [[1, 1], [1, 4]]
