"""The study of adapters: what it runs, how rates are chosen, and that unfinished runs are named."""

from experiments.studies.adapters import design, tables
from experiments.sweeps import report, spec

RATES = {o: {w: rates[1] for w, rates in design.RATES.items()} for o in design.OBJECTIVES}


def test_every_setting_can_run_and_is_compared_with_full_weights():
    for sweeps in (design.sweeps(RATES), design.real()):
        for objective, sweep in sweeps.items():
            ranks = set()
            for member in spec.check(sweep):
                config = spec.config_of(sweep, member)
                assert config.objective.preset == objective.lower()
                assert spec.baseline_of(sweep, member.variant) == design.FULL
                ranks.add(config.lora.rank)
            assert ranks == {0, 1, 8, 32}
    assert not set(design.SEEDS) & set(design.TUNING_SEEDS)


def test_the_rate_with_the_largest_area_is_chosen(monkeypatch, tmp_path):
    sweep = design.tuning()
    results = [
        report.Result(m, {tables.AREA: -abs(dict(m.variant.fields)["train.learning_rate"] - 1e-3)})
        for m in spec.members(sweep)
    ]
    monkeypatch.setattr(report, "collect", lambda *_: results)
    rates, text = tables.tuned(sweep, tmp_path)
    assert rates["LUSPO"] == {"full": 8e-4, "rank 32": 1e-3, "rank 8": 1e-3, "rank 1": 1e-3}
    assert text.count("**") == 2 * 8


def test_unfinished_runs_are_named(tmp_path):
    text = tables.write(design.sweeps(RATES), tmp_path, "", {})
    assert text.count("seed_") == 2 * 4 * len(design.SEEDS)
    assert (tmp_path / "curves.png").is_file()
