"""The study of length controls: what it runs, at which rates, and how its tables read runs."""

import json

import numpy as np
import pytest
from matplotlib.text import Text

from experiments.studies.length_control import design, figure, rewards, tables
from experiments.studies.quickstart_runs import REFERENCE_LENGTH, TASKS
from experiments.sweeps import spec
from luspo_jax.hosts import figure_style
from luspo_jax.metrics import json_line
from luspo_jax.rewards.group import group_reward
from tests.rewards.group.group_cases import peers

RATES = {task: dict.fromkeys(design.RATE_GROUPS, 2e-4) for task in TASKS}


@pytest.fixture(scope="module")
def configs():
    """Task → cell → its whole configuration."""
    sweep = design.sweep(RATES)
    first = {m.variant.name: m for m in spec.check(sweep) if m.seed == design.SEEDS[0]}
    return {
        task: {
            name: spec.config_of(sweep, first[design.member(task, name)])
            for name in design.cells(task)
        }
        for task in TASKS
    }


def test_every_control_meets_both_tasks_with_every_seed(configs):
    assert len(spec.members(design.sweep(RATES))) == 2 * 32 * len(design.SEEDS)
    assert len(design.SEEDS) >= 5
    seen = set()
    for task, of_task in configs.items():
        assert len(of_task) == 32
        for config in of_task.values():
            assert config.data.name == f"label_{task}"
            assert config.rollout.prompts_per_step * config.rollout.group_size == 128
            assert config.eval.metric in ("", "gsm8k")
            changed = config.copy_and_resolve_references()
            changed.seed = 0
            seen.add(json.dumps(changed.to_dict(), sort_keys=True))
    assert len(seen) == 64, "two cells are the same run"


def test_the_grid_differs_in_weighting_and_beta_alone(configs):
    for task, of_task in configs.items():
        for family, alpha in (("GSPO", 0.0), ("LUSPO/L", 1.0)):
            for name, beta in (("0", 0.0), ("¼", 0.25), ("½", 0.5), ("1", 1.0)):
                found = of_task[design.grid_cell(family, name)].objective
                assert (found.length_alpha, found.clip_length_exponent) == (alpha, beta)
                assert found.preset == "luspo_normalized"
                assert found.reference_length == REFERENCE_LENGTH[task]
                assert found.clip_low is found.clip_high is None  # the preset's, for both


def test_the_most_important_runs_first_and_rates_are_tuned_on_other_seeds():
    kinds = [design.cells("sums")[name.split(", ")[1]].kind for name in design.sweep(RATES).members]
    order = ["grid", "reference", "reward", "samples", "objective"]
    assert kinds == sorted(kinds, key=order.index)
    tuning = design.tuning()
    assert not set(tuning.seeds) & set(design.SEEDS)
    tuned_steps = len(spec.check(tuning)) * design.TUNING_STEPS
    assert tuned_steps < len(spec.members(design.sweep(RATES))) * design.STEPS / 3
    for task in TASKS:
        for cell in design.cells(task).values():
            assert cell.rates in design.RATE_GROUPS


def test_every_block_begins_with_one_seed_of_each_of_its_cells():
    sweep = design.sweep(RATES)
    order = design.order(sweep)
    assert sorted(order) == sorted(member.name for member in spec.members(sweep))
    assert {name.split("/seed_")[1] for name in order[:16]} == {"0"}
    assert all("β=" in name for name in order[:80])
    assert order[16].startswith("sums, GSPO β=0/")
    assert order[80:82] == ["sums, GRPO/seed_0", "sums, DAPO/seed_0"]


def test_rates_are_those_of_the_group(configs):
    rates = {task: {g: 1e-4 * (k + 1) for k, g in enumerate(design.RATE_GROUPS)} for task in TASKS}
    sweep = design.sweep(rates)
    for task in TASKS:
        for name, cell in design.cells(task).items():
            fields = sweep.members[design.member(task, name)]
            assert fields["train.learning_rate"] == rates[task][cell.rates]


def test_lengthening_the_wrong_is_lie_with_the_limit_as_its_length():
    """Rescaled from 9,000 tokens to 40, and without its penalty on repetition."""
    lengths, right = [1, 5, 20, 37, 38, 40, 3], [0, 0, 0, 0, 0, 0, 1]
    lie = group_reward("lie", {"alpha": 0.3 / 40, "slack": 2, "redundancy": 0.0})
    expected = lie.score(peers(lengths, right, target=40, max_length=40))
    found = rewards.longer_if_wrong([""] * 7, lengths, right, [bool(x) for x in right], 40)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert found[0] < found[2] < found[4] == found[6] == 0


# A control's share of right answers and its tokens; grid points move along β.
def _outcome(task, name):
    accuracy, length = 0.5, 20.0 if task == "sums" else 8.0
    if "β=" in name:
        beta = design.BETAS[name.split("β=")[1]]
        return accuracy + 0.1 * name.startswith("LUSPO") + 0.05 * beta, length - 4 * beta
    order = list(design.cells(task)).index(name)
    return accuracy + 0.01 * order, length + 0.2 * order


def _write(folder, rows):
    folder.mkdir(parents=True)
    lines = [json_line(step, row) for step, row in rows.items()]
    (folder / "metrics.jsonl").write_text("".join(lines))


def _rows(task, name, seed, steps):
    accuracy, length = _outcome(task, name)
    noise = np.random.default_rng(seed).normal()
    for step in range(0, steps + 1, 8):
        done = step / steps
        yield (
            step,
            {
                f"val-core/label_{task}/acc/mean@2": 0.3 * (1 - done)
                + (accuracy + 0.01 * noise) * done,
                f"val-aux/label_{task}/response_length/mean": 15.0 * (1 - done) + length * done,
                f"val-aux/label_{task}/tokens_per_right": length / accuracy,
                "actor/pg_clipfrac": 0.1,
                "length/degeneration/flag": float(name == "lie"),
            },
        )


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Made-up runs of everything but one."""
    tuning, sweep = design.tuning(), design.sweep(RATES)
    for member in spec.members(tuning):
        task, name, rate = member.variant.name.split(", ")
        gain = {"0.0001": 0.0, "0.0002": 0.1, "0.0004": 0.2 if name == "LUSPO/L β=0" else 0.05}[
            rate
        ]
        rows = {0: {"val-core/x": 0.2}, 16: {"val-core/x": 0.4 + gain}}
        _write(member.folder(tmp_path / "tuning"), rows)
    for member in spec.members(sweep):
        if member.name == "lookup, kimi/seed_4":
            continue  # not finished
        task, name = member.variant.name.split(", ", 1)
        _write(member.folder(tmp_path / "main"), dict(_rows(task, name, member.seed, design.STEPS)))
    monkeypatch.setattr(
        "experiments.sweeps.runner.standing",
        lambda folder, config: ("finished" if folder.is_dir() else "unfinished", ""),
    )
    return tmp_path, (tuning, tmp_path / "tuning"), (sweep, tmp_path / "main")


def _row(section, *heads):
    start = "| " + " | ".join(heads)
    (line,) = (
        line for line in section.splitlines() if " ".join(line.split()).startswith(start + " |")
    )
    return [cell.strip() for cell in line.split("|")[1 + len(heads) : -1]]


def test_tables_and_figure_say_what_the_runs_say(ran):
    workdir, tuned, main = ran
    rates = tables.chosen_rates(*tuned, workdir / "rates.json")
    # 0.1 and 0.1 against 0.05 and 0.2: the mean of both weightings decides.
    assert rates["sums"] == {"wide": 4e-4, "tight": 2e-4, "unscaled": 2e-4, "token": 2e-4}
    assert json.loads((workdir / "rates.json").read_text()) == rates
    text = tables.write(tables.Study(tuned, main, rates, {}), workdir)
    assert (workdir / "results.md").read_text() == text
    assert (workdir / "accuracy_tokens.png").stat().st_size > 1000
    _, tuning, grid, pair, controls, sums, lookup = text.split("\n## ")[:7]
    assert _row(tuning, "sums", "wide", "GSPO β=0") == ["0.3000", "0.3500", "0.3250", "0.0004"]
    # Of 24 steps 0 to 24: the area of what grows in a straight line is half of it.
    assert _row(grid, "sums", "GSPO β=1 − GSPO β=0") == [
        "0.0250 ± 0.0000", "0.0500 ± 0.0000", "-2.000 ± 0.000", "-4.000 ± 0.000",
        f"{16 / 0.55 - 20 / 0.5:.1f} ± 0.0",
    ]  # fmt: skip
    assert _row(grid, "lookup", "LUSPO/L β=¼ − GSPO β=¼")[1] == "0.1000 ± 0.0000"
    # Every row of the grid but those of weighting moves length; all move accuracy.
    assert "intervals exclude 0" in grid
    assert _row(controls, "sums", "DAPO − GRPO")[1] == "0.0100 ± 0.0000"
    steps = [_row(pair, "sums", step)[1:] for step in
             ("as published", "clip range", "weighting", "size of the loss")]  # fmt: skip
    whole, *parts = [[float(cell.split()[0]) for cell in cells[:4]] for cells in steps]
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=0, atol=2e-3)
    told = _row(lookup, "kimi")
    assert told[:3] == ["reward", "0.0002", "4"]
    assert "Before training: accuracy 0.3000 ± 0.0000, 15.0 ± 0.0 tokens" in sums
    assert "growth flag" in sums
    assert "collapse flag" not in sums  # no run has it
    assert _row(sums, "lie")[-1] == "1.000 ± 0.000"
    assert "- lookup, kimi/seed_4: not finished" in text


def test_what_is_stored_stays_and_half_a_tuning_is_not_stored(ran, tmp_path):
    workdir, (tuning, folder), _ = ran
    found = tables.chosen_rates(tuning, tmp_path / "none", workdir / "rates.json")
    assert found == RATES  # the middle one
    assert not (workdir / "rates.json").is_file()
    (workdir / "rates.json").write_text('{"sums": 1}')
    assert tables.chosen_rates(tuning, folder, workdir / "rates.json") == {"sums": 1}


def test_an_unfinished_study_has_tables_too(tmp_path):
    tuning, sweep = design.tuning(), design.sweep(RATES)
    study = tables.Study(
        (tuning, tmp_path), (sweep, tmp_path), RATES, {"sums, kimi/seed_1": "it broke"}
    )
    text = tables.write(study, tmp_path)
    assert text.count("/seed_") == 320
    assert "- sums, kimi/seed_1: it broke" in text
    assert "0 of 0 intervals exclude 0" in text


def test_labels_cover_neither_points_nor_each_other(ran):
    _, _, (sweep, folder) = ran
    values = tables.Values(sweep, tables.report.collect(sweep, folder))
    plt = figure_style.pyplot()
    drawn = plt.figure(figsize=(10, 8))
    axis = drawn.subplots()
    labels = figure.of_task(axis, values, "sums")
    figure.place(drawn, axis, labels)
    assert {label[2] for label in labels} >= {"kimi", "β=¼", "gfpo"}
    assert labels[-1][2] == f"{figure.BASE} is outside: 15.0 tokens, 0.30"
    x, y = labels[-1][:2]
    assert axis.get_xlim()[0] < x < axis.get_xlim()[1]
    assert axis.get_ylim()[0] < y < axis.get_ylim()[1]
    drawn.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without their lines
    assert len(boxes) == len(labels) == 33
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
    plt.close(drawn)
