"""The study of age: what it runs and where, and how its tables read runs."""

import numpy as np
import pytest

from experiments.studies.age import design, running, tables
from experiments.sweeps import runner, spec
from luspo_jax.metrics import json_line


@pytest.mark.parametrize("task", design.TASKS)
def test_every_mode_meets_every_objective_and_correction_with_every_seed(task):
    sweep, found = design.sweep(task), set()
    members = spec.check(sweep)
    for member in members:
        config = spec.config_of(sweep, member)
        rollout = config.rollout
        mode = (rollout.overlap, rollout.max_age, rollout.late, config.rollout_mesh.apart)
        objective = config.objective
        found.add((mode, objective.preset, objective.correction or "none", member.seed))
        assert config.data.name == f"label_{task}"
        assert config.model.path == f"embedded:label_{task}"
        assert rollout.prompts_per_step * rollout.group_size == 128
        assert rollout.num_slots >= (design.PROMPTS + rollout.overlap) * rollout.group_size
    assert len(found) == len(members) == 180
    assert {mode for mode, *_ in found} == {
        (0, 0, "wait", 0), (32, 2, "wait", 0), (32, 0, "drop", 0), (0, 1, "wait", 1),
    }  # fmt: skip
    assert {objective for _, objective, _, _ in found} == {"gspo", "luspo", "grpo"}
    assert {correction for _, _, correction, _ in found} == {"none", "tis", "geometric-mask"}


def test_what_has_a_correction_decouples_the_old_policy():
    """Else the old log-prob of a stale token is the sampler's, and nothing is corrected."""
    for member in spec.members(design.sweep()):
        objective = spec.config_of(design.sweep(), member).objective
        plain = (objective.correction or "none") == "none"
        assert (objective.old_policy or "behaviour") == ("behaviour" if plain else "decoupled")


def test_each_is_compared_with_synchronous_steps_all_else_equal():
    sweep = design.sweep()
    for variant in spec.variants(sweep):
        mode, objective, correction = dict(variant.levels).values()
        assert spec.baseline_of(sweep, variant) == f"synchronous,{objective},{correction}"
        assert variant.name == design.cell(mode, objective, correction)


def test_only_what_samples_apart_has_two_devices(monkeypatch, tmp_path):
    """And everything is run once, or what is named."""
    calls = []

    def run(sweep, workdir, *, parallel, only, environment):
        assert (workdir, parallel) == (tmp_path, 2)
        calls.append((environment["JAX_NUM_CPU_DEVICES"], only))
        return {only[0]: "failed"}

    monkeypatch.setattr(runner, "run", run)
    sweep = design.sweep()
    failures = running.run(sweep, tmp_path, parallel=2)
    for devices, names in calls:
        assert all(name.startswith("one step off") == (devices == "2") for name in names)
    names = [name for _, found in calls for name in found]
    assert sorted(names) == sorted(variant.name for variant in spec.variants(sweep))
    assert set(failures) == {calls[0][1][0], calls[1][1][0]}
    calls.clear()
    running.run(sweep, tmp_path, parallel=2, only=["one step off,GSPO,tis/seed_3"])
    assert calls == [("2", ["one step off,GSPO,tis/seed_3"])]


# Tokens and share of right answers that a mode changes, by objective; a correction takes half of it
# back, and the mask nothing.
SHIFT = {"synchronous": 0.0, "waiting": 0.0, "dropping": -4.0, "one step off": -1.0}
FACTOR = {"GSPO": 1.0, "LUSPO": 2.0, "GRPO": 1.0}
KEPT = {"none": 1.0, "tis": 0.5, "mask": 1.0}


def _rows(mode, objective, correction, seed):
    rng = np.random.default_rng(seed)
    base = 20 + rng.normal()  # of the seed: alike in all modes
    shift = SHIFT[mode] * FACTOR[objective] * KEPT[correction]
    for step in range(design.STEPS + 1):
        row = {
            "response_length/mean": base + shift,
            "actor/pg_clipfrac": 0.1,
            "rollout_corr/k3_kl": 3e-5,
        }
        if mode in ("waiting", "dropping"):
            row["rollout/age/mean"] = float(mode == "waiting")
            row["length/account/window/consumed_mean"] = base + shift
            row["length/account/window/sampled_mean"] = base
            row["length/account/window/relative_difference"] = (base + shift) / base - 1
        if mode != "synchronous":
            row["staleness/share/age_0"] = 0.25
        if step % 5 == 0:
            row["val-core/label_sums/acc/mean@2"] = 0.5 + 0.01 * base + 0.01 * shift
            row["val-aux/label_sums/response_length/mean"] = base + shift / 2
        yield {"step": step, **row}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    sweep = design.sweep()
    for member in spec.members(sweep):
        if member.name == "waiting,GRPO,mask/seed_4":
            continue  # not finished
        folder = member.folder(tmp_path)
        folder.mkdir(parents=True)
        rows = _rows(*dict(member.variant.levels).values(), member.seed)
        lines = [json_line(row.pop("step"), row) for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines))
    monkeypatch.setattr(
        "experiments.sweeps.runner.standing",
        lambda folder, config: ("finished" if folder.is_dir() else "unfinished", ""),
    )
    return sweep, tmp_path


def _row(section, *heads):
    start = "| " + " | ".join(heads)
    (line,) = (
        line for line in section.splitlines() if " ".join(line.split()).startswith(start + " |")
    )
    return [cell.strip() for cell in line.split("|")[1 + len(heads) : -1]]


def test_tables_and_figure_say_what_the_runs_say(ran):
    sweep, workdir = ran
    text = tables.write(sweep, workdir, {})
    assert (workdir / "results.md").read_text() == text
    assert (workdir / "curves.png").stat().st_size > 1000
    _, bias, back, weighting, levels = text.split("\n## ")[:5]
    cells = _row(bias, "dropping", "LUSPO")
    assert cells[1] == "0.0000 ± 0.0000"  # age
    assert cells[2] == "0.2500 ± 0.0000"
    assert cells[3] == "-8.000 ± 0.000"
    assert cells[4] == cells[5] == "-4.000 ± 0.000"
    assert cells[6] == cells[7] == "-0.0800 ± 0.0000"
    assert _row(bias, "one step off", "GSPO")[:3] == ["–", "–", "0.2500 ± 0.0000"]
    assert _row(bias, "waiting", "GSPO")[1] == "1.000 ± 0.000"
    assert set(_row(bias, "waiting", "GSPO")[3:]) == {"0.0000 ± 0.0000"}
    # Six of nine rows differ in all five columns.
    assert "30 of 45 intervals exclude 0; 2.2 would by chance." in bias
    assert _row(back, "dropping", "GSPO", "none") == [
        "-2.000 ± 0.000", "–", "-0.0400 ± 0.0000", "–",
    ]  # fmt: skip
    assert _row(back, "dropping", "GSPO", "tis") == [
        "-1.000 ± 0.000", "1.000 ± 0.000", "-0.0200 ± 0.0000", "0.0200 ± 0.0000",
    ]  # fmt: skip
    assert _row(back, "dropping", "GSPO", "mask")[1] == "0.0000 ± 0.0000"
    assert _row(weighting, "dropping", "none", "LUSPO − GSPO") == [
        "-4.000 ± 0.000", "-2.000 ± 0.000", "-0.0400 ± 0.0000",
    ]  # fmt: skip
    assert _row(weighting, "waiting", "tis", "LUSPO − GRPO")[0] == "0.0000 ± 0.0000"
    assert "- waiting,GRPO,mask/seed_4: not finished" in text
    told = _row(levels, "waiting", "GRPO", "mask")
    assert told[0] == "4"
    assert told[-1] == "3e-05"
    assert _row(levels, "synchronous", "GSPO", "none")[6] == "–"


def test_unfinished_studies_have_tables_too(tmp_path):
    text = tables.write(design.sweep(), tmp_path, {"waiting,GSPO,none/seed_1": "it broke"})
    assert text.count("seed_") == 180
    assert "- waiting,GSPO,none/seed_1: it broke" in text
    assert "0 of 0 intervals exclude 0" in text
