"""Pages that readers act on: names and defaults in their tables are true, and their code runs."""

import dataclasses
import re
from importlib.metadata import PackageNotFoundError, version

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.site import tree
from luspo import fields
from luspo_jax import objectives
from luspo_jax.rewards.record import Sample
from luspo_jax.rewards.user import user_reward
from luspo_jax.run.fields import default_config

DOCS = tree.ROOT / "docs"


# Page → fewest fields of ours that it names.
PAGES = {"from_trl.md": 60, "from_verl.md": 60, "from_tunix.md": 30, "own_model.md": 4,
         "own_dataset.md": 14, "own_reward.md": 4, "own_objective.md": 4}  # fmt: skip
# A field as code, alone or with a value, and after it perhaps its default.
_OURS = re.compile(r"`(?:config\.|--config\.)?([a-z_]+)\.(\w+)(?:=[^`]*)?`(?: \(([^)`\]]+)\))?")


@pytest.mark.parametrize("name", PAGES)
def test_fields_that_a_page_names_exist_with_their_defaults(name):
    config, sections = default_config(), fields.sections("Settings")
    known = {field.name for section in sections for field in section.fields}
    roots = {section.name for section in sections}
    named = 0
    for line in (DOCS / name).read_text(encoding="utf-8").splitlines():
        _, _, ours = line.partition(" | ") if name.startswith("from_") else ("", "", line)
        for root, field, said in _OURS.findall(ours):
            if root not in roots:
                continue
            assert f"{root}.{field}" in known, line
            named += 1
            value, _, rest = said.partition(" ")
            if rest == "in all presets":
                for preset in objectives.PRESETS.values():
                    assert _same(value, getattr(preset, field)), line
            elif said:
                assert _same(said, config[root][field]), line
    assert named >= PAGES[name]


def _same(said, value):
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return said != "None" and float(said) == value
    return said == str(value)


def _first_column(page, heads):
    """Yields (name, default or None) of each code span in the first column of tables so headed."""
    inside = False
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.startswith(heads):
            inside = True
        elif inside:
            cell = line.split("|")[1]
            if " of the trainer" not in cell:
                yield from re.findall(r"`([\w.]+)`(?: \(((?:[^()]|\([^)]*\))+)\))?", cell)


def _declared(kind):
    for field in dataclasses.fields(kind):
        has = field.default is not dataclasses.MISSING
        yield field.name, field.default if has else field.default_factory


def test_names_and_defaults_of_trl():
    """Where the version that the page is about is installed."""
    _need("trl", "1.16.0")
    from trl import GRPOConfig

    theirs, seen = dict(_declared(GRPOConfig)), 0
    for name, said in _first_column("from_trl.md", "| `GRPOConfig`"):
        assert name in theirs, name
        if said:
            assert _same(said, theirs[name]), name
        seen += 1
    assert seen > 60


def test_names_and_defaults_of_tunix():
    _need("google-tunix", "0.1.7")
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig
    from tunix.rl.rollout.base_rollout import RolloutConfig

    kinds = (GRPOConfig, rl_cluster.RLTrainingConfig, rl_cluster.ClusterConfig, RolloutConfig)
    text = (DOCS / "from_tunix.md").read_text(encoding="utf-8")
    for kind in kinds:
        part = text.partition(f"## `{kind.__name__}`")[2].partition("\n## ")[0]
        theirs = dict(_declared(kind))
        rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
        assert rows
        for name, said in re.findall(r"`(\w+)`(?: \(((?:[^()]|\([^)]*\))+)\))?", " ".join(rows)):
            assert name in theirs, name
            if said:
                assert _same(said, theirs[name]), name


def _need(package, exactly):
    try:
        found = version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} {exactly} is not installed")
    if found != exactly:
        pytest.skip(f"the page is about {package} {exactly}, and {found} is installed")


def _code(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_rewards_and_data_that_readers_are_told_to_write(tmp_path, monkeypatch):
    function, wiring = _code("own_reward.md")
    (tmp_path / "my_rewards.py").write_text(function, encoding="utf-8")
    config = default_config()
    exec(wiring + "".join(_code("own_dataset.md")), {"config": config})
    assert set(config.data.mixture) == {"own", "school"}
    monkeypatch.chdir(tmp_path)
    mine = user_reward(config.reward.options.mine.function)
    for response, length, value in (("4", 10, 1.0), ("4", 30, 0.5), ("5", 10, 0.0)):
        sample = Sample(response, "4", length=length, max_length=40)
        assert mine.check(sample).value == value


def test_the_length_scale_that_readers_are_told_to_write():
    (code,), made = _code("own_objective.md"), {}
    try:
        exec(code, made)
        chosen = made["get_config"]().objective
        scale_B = objectives.length_scales(
            objectives.preset(
                chosen.preset,
                length_scale=chosen.length_scale,
                reference_length=chosen.reference_length,
            ),
            jnp.array([5.0, 20.0]),
            jnp.array([0, 0]),
        )
        np.testing.assert_allclose(scale_B, [10.0, 20.0], rtol=1e-6)
    finally:
        made["LENGTH_SCALES"].pop("root", None)
