"""Every field of a configuration with values without sense: one line that names it, or it runs."""

import json
import math

import jax
import numpy as np
import pytest

from configs import quickstart, quickstart_format, quickstart_moe, quickstart_vl
from luspo_jax import train
from luspo_jax.datasets import DataError
from luspo_jax.hosts.values import ConfigError, Number
from luspo_jax.run import checks, fields
from luspo_jax.run.build import build, facts
from luspo_jax.run.fields import OPEN_SECTIONS, default_config
from luspo_jax.run.model import load_model
from luspo_jax.run.settings import RULES
from luspo_jax.run.workdir import Workdir

SENSELESS = (
    *(None, "", "nonsense", b"x", True, -1, -0.5, 0, 10**12, 1e300),
    *(math.nan, math.inf, -math.inf, {}, {"a": 1}, [], [1], object()),
)
SECTIONS = sorted({n.partition(".")[0] for n in fields.flat(default_config()) if "." in n})


def _put(config, field, value):
    """Sets a field whatever its type, as a file of the user may."""
    *sections, last = field.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type(), config.unlocked():
        config[last] = value


def _refusal(act):
    """The message of a refusal; None where there is none."""
    try:
        act()
    except (ConfigError, DataError) as error:
        return str(error)
    return None


def _fields(module):
    """All fields of the quickstart; of another configuration, those in which it differs."""
    found = fields.flat(module.get_config())
    if module is not quickstart:
        plain = fields.flat(quickstart.get_config())
        return [name for name, value in found.items() if plain.get(name, found) != value]
    return [*found, *(section.rstrip(".") for section in OPEN_SECTIONS)]


@pytest.mark.parametrize(
    "module",
    [quickstart, quickstart_format, quickstart_moe, quickstart_vl],
    ids=lambda m: m.__name__,
)
def test_every_field_takes_a_value_or_refuses_it_by_name_in_one_line(module):
    refused = 0
    for field in _fields(module):
        for value in SENSELESS:
            config = module.get_config()
            _put(config, field, value)
            line = _refusal(lambda config=config: checks.check(config))
            if line is not None:
                refused += 1
                named = field
                if field.startswith("reward.options."):  # a verifier checks its options together
                    named = ".".join(field.split(".")[:3])
                assert named in line, (field, value, line)
                assert "\n" not in line, (field, value, line)
    assert refused > 2 * len(_fields(module))


def test_sections_that_are_none_and_fields_that_are_missing():
    for section in SECTIONS:
        config = quickstart.get_config()
        _put(config, section, None)
        with pytest.raises(ConfigError, match=f"run: {section}=None must be a section"):
            checks.check(config)
    config = quickstart.get_config()
    with config.unlocked():
        del config.rollout["top_k"], config.rollout["top_p"]
    with pytest.raises(ConfigError, match=r"run: missing rollout\.top_k, rollout\.top_p: start"):
        checks.check(config)
    with config.unlocked():
        config.rollout.top_kk = 1
    with pytest.raises(ConfigError, match=r"unknown field rollout\.top_kk: did you mean"):
        checks.check(config)


def test_every_number_has_a_rule_or_an_owner_that_checks_it():
    known = default_config()
    for name in fields.flat(known):
        section, _, last = name.rpartition(".")
        kind = (known[section] if section else known).get_type(last)
        if kind in (int, float) and section not in ("objective", "length"):
            assert isinstance(RULES.get(name), Number), name
    assert set(RULES) <= set(fields.flat(known))


def _with(**leaves):
    config = quickstart.get_config()
    for name, value in leaves.items():
        _put(config, name.replace("__", "."), value)
    return config


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("reward.parts.gsm8k='1'", _with(reward__parts={"gsm8k": "1"})),
        ("reward.parts.gsm8k=None", _with(reward__parts={"gsm8k": None})),
        ("reward.parts.gsm8k=nan", _with(reward__parts={"gsm8k": NAN})),
        ("reward.parts.gsm8k=True", _with(reward__parts={"gsm8k": True})),
        ("reward.parts.gsm9k: unknown", _with(reward__parts={"gsm9k": 1.0})),
        ("reward.options.exact: no part", _with(reward__options={"exact": {}})),
        ("reward.options.gsm8k=3", _with(reward__options={"gsm8k": 3})),
        ("data.options.foo: label_sums", _with(data__options={"foo": 3})),
        ("data.options.num_terms='x'", _with(data__options={"num_terms": "x"})),
        ("num_terms must", _with(data__options={"num_terms": 99})),
        ("data.split='nonsense'", _with(data__split="nonsense")),
        ("data.eval_split='trian'", _with(data__eval_split="trian")),
        ("data.mixture.a='label_sums'", _with(data__mixture={"a": "label_sums"})),
        ("data.mixture.a: it needs a name", _with(data__mixture={"a": {"path": "x"}})),
        ("data.mixture.a.name=", _with(data__mixture={"a": {"name": "label_sum"}})),
        ("data.mixture.a.weight=nan", _with(data__mixture={"a": {"name": "file", "weight": NAN}})),
        ("data.mixture.a.path=None", _with(data__mixture={"a": {"name": "file", "path": None}})),
        ("data.mixture.a.weigth", _with(data__mixture={"a": {"name": "file", "weigth": 1.0}})),
        ("model.overrides", _with(model__overrides={"hidden_size": 8})),
        ("model.stop_token_ids='a'", _with(model__stop_token_ids="a")),
        ("train.b1=2", _with(train__b1=2.0)),
        ("train.eps=-1", _with(train__eps=-1.0)),
        ("train.eps=1e-50", _with(train__eps=1e-50)),
        ("train.learning_rate=inf", _with(train__learning_rate=INF)),
        ("train.max_grad_norm=None", _with(train__max_grad_norm=None)),
        ("train.max_grad_norm=nan", _with(train__max_grad_norm=NAN)),
        ("train.weight_decay", _with(train__learning_rate=0.5, train__weight_decay=2.0)),
        ("rollout.mismatch_limit=nan", _with(rollout__mismatch_limit=NAN)),
        ("reward.timeout_s=-1", _with(reward__timeout_s=-1.0)),
        ("rollout.temperature=1e-09", _with(rollout__temperature=1e-9)),
        ("eval.temperature=1e-40", _with(eval__temperature=1e-40)),
        ("eval.temperature=inf", _with(eval__temperature=INF)),
        ("eval.num_samples=4 must be 1 at eval.temperature=0", _with(eval__temperature=0.0)),
        ("seed=-1", _with(seed=-1)),
        ("seed=4294967296", _with(seed=2**32)),
        ("eval.seed=4294967296", _with(eval__seed=2**32)),
        ("data.system_prompt", _with(data__system_prompt="hi")),
        ("data.enable_thinking", _with(data__enable_thinking=False)),
        ("shaping.lspo_low=nan", _with(shaping__lspo_low=NAN)),
        ("mesh.data and mesh.fsdp are -1", _with(mesh__data=-1)),
        ("objective.kl_coef = inf", _with(objective__kl_coef=INF)),
        ("objective.clip_low='x' must be", _with(objective__clip_low="x")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_values_without_sense_are_refused_by_field(field, config):
    with pytest.raises(ConfigError) as refused:
        checks.check(config)
    assert field in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer": 41}, "overlong buffer 41 is not within 1 … max length 40"),
        ({"buffer": 0}, "overlong buffer 0"),
        ({"buffer": "8"}, "TypeError"),
        ({"buffer": 8, "factor": NAN}, "must be finite"),
        ({}, "missing a required argument: 'buffer'"),
        ({"bufer": 8}, "'bufer'|buffer"),
    ],
    ids=str,
)
def test_an_overlong_penalty_that_no_response_could_get_is_refused_at_start(options, message):
    parts = {"gsm8k": 1.0, "overlong": 1.0}
    config = _with(reward__parts=parts, reward__options={"overlong": options}, eval__metric="gsm8k")
    with pytest.raises(ConfigError, match=rf"reward\.(options|parts)\.overlong.*{message}"):
        checks.check(config)
    checks.check(
        _with(
            reward__parts=parts, reward__options={"overlong": {"buffer": 40}}, eval__metric="gsm8k"
        )
    )


# ---------------------------------------------------------------- what only the model can say


def test_responses_beyond_the_models_positions_are_refused_by_both_fields():
    with pytest.raises(
        ConfigError, match=r"max_response_length=5000 .*prompt_length=16 .*holds 128"
    ):
        build(_with(rollout__max_response_length=5000))


def _model_folder(tmp_path, eos):
    from luspo_jax.models.locate import model_folder

    for file in model_folder("embedded:label_sums").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = tmp_path / name
        if file.exists():
            values = json.loads(file.read_text())
            file.write_text(json.dumps({k: v for k, v in values.items() if "eos_token" not in k}))
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    return str(tmp_path)


def test_a_model_without_any_stop_token_is_refused_until_one_is_named(tmp_path):
    config = _with(model__path=_model_folder(tmp_path, None))
    with pytest.raises(ConfigError, match=r"no token ends a response.*model\.stop_token_ids"):
        load_model(config)
    config.model.stop_token_ids = "2, 0"
    assert load_model(config).stop_token_ids == (0, 2)
    config.model.stop_token_ids = "none"  # as the user says
    assert load_model(config).stop_token_ids == ()
    config.model.stop_token_ids = "100000"
    with pytest.raises(ConfigError, match=r"model\.stop_token_ids='100000' must be tokens"):
        load_model(config)


# ---------------------------------------------------------------- accepted values run

_COSTLY = {  # at their bound they ask for more time or memory, and get it
    *("num_steps", "rollout.prompts_per_step", "rollout.group_size", "train.num_epochs"),
    *("eval.num_samples", "train.microbatch_tokens", "train.pack_length"),
}


def _bounds():
    for field, rule in RULES.items():
        if isinstance(rule, Number) and field not in _COSTLY:
            kind = fields.flat(default_config())[field].__class__
            inside = (rule.high - rule.low) * 1e-6
            yield field, kind(rule.low + inside * rule.open_low)
            yield field, kind(rule.high - inside * rule.open_high)


def _tiny():
    config = quickstart.get_config()
    config.num_steps = 1
    config.rollout.prompts_per_step, config.rollout.group_size = 2, 2
    config.rollout.max_response_length, config.rollout.num_slots = 8, 4
    config.train.num_minibatches = 1
    config.eval.num_problems, config.eval.num_samples = 2, 1
    config.output.export = config.output.tensorboard = False
    config.output.checkpoint_every = 0
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value"), _bounds())
def test_what_a_rule_allows_runs_or_the_model_refuses_it_by_name(field, value, tmp_path):
    config = _tiny()
    _put(config, field, value)
    line = _refusal(lambda: build(config, jax.devices()[:1]))
    if line is not None:
        assert field.rpartition(".")[2] in line
        return
    run = build(config, jax.devices()[:1])
    outcome = train.train(run, Workdir(tmp_path / "run", config, facts(run)))
    assert np.isfinite(outcome.final.accuracy)
