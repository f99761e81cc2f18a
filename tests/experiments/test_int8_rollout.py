"""The study of int8 weights: what it runs, and that its table tells of every cell."""

from experiments.studies.int8_rollout import design, tables
from experiments.sweeps import report, spec


def test_every_type_meets_every_correction_with_every_seed():
    sweep = design.sweep()
    found = set()
    for member in spec.members(sweep):
        config = spec.config_of(sweep, member)
        spec.checks.check(config)
        assert config.model.dtype == "float32"
        found.add((config.model.rollout_dtype, config.objective.correction, config.seed))
    assert found == {
        (kind, correction, seed)
        for kind in design.TYPES
        for correction in design.CORRECTIONS
        for seed in design.SEEDS
    }
    assert len(design.SEEDS) >= 3


def test_each_is_compared_with_float32_and_with_no_correction():
    sweep = design.sweep()
    for variant in spec.variants(sweep):
        kind, correction = dict(variant.levels).values()
        assert spec.baseline_of(sweep, variant) == f"float32,{correction}"
        assert spec.baseline_of(design.of_correction(sweep), variant) == f"{kind},none"


def test_small_mismatches_are_told_with_their_digits():
    sweep = design.sweep()
    results = [
        report.Result(member, {"k3 KL(sampler, trainer)": 3e-5 * (1 + member.seed)})
        for member in spec.members(sweep)
    ]
    text = tables.mismatch_table(sweep, results)
    assert text.count("6e-05") == 6


def test_unfinished_runs_are_named(tmp_path):
    text = tables.write(design.sweep(), tmp_path, {})
    assert text.count("seed_") == 18
    assert (tmp_path / "results.md").read_text() == text
