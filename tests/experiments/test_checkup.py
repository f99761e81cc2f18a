"""Checkups: every check at the smallest sizes, faults that must be found, budget, files, flags."""

import functools
import html.parser
import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from experiments.machine import (
    advice,
    attention_checks,
    decoding,
    plain,
    product_checks,
    records,
    registry,
    report,
    running,
    shapes,
)
from experiments.machine.records import (
    ABSENT,
    FAIL,
    OK,
    SKIPPED,
    Absent,
    Advised,
    Agreed,
    Check,
    Decoding,
    Fact,
    Gap,
    Outcome,
    Predicted,
    Rate,
    Training,
)
from experiments.machine.shapes import Sizes
from luspo_jax.ops import attention, grouped_matmul, paged_attention, reference_grouped_matmul

ROOT = pathlib.Path(__file__).resolve().parents[2]


def silent(_):
    """Says nothing."""


def known(seconds=1e4, tiny=True):
    """What is known before the first check, at the smallest sizes."""
    deadline = time.monotonic() + seconds
    return registry.known(quickstart.get_config(), "quickstart", deadline=deadline, tiny=tiny)


def _checked(wanted):
    """The outcomes of the checks that are wanted."""
    before = known()
    checks = [check for check in registry.checks(before.device) if wanted(check)]
    return running.run(checks, before, say=silent)


@pytest.fixture(scope="module")
def outcomes():
    """Every check of this machine, but kernels in a second type."""
    return _checked(lambda check: "bfloat16" not in check.name)


# ---------------------------------------------------------------- all checks


def test_every_check_of_a_cpu_passes_or_is_of_another_platform(outcomes):
    wrong = [o for o in outcomes if o.status == FAIL]
    assert not wrong
    assert {o.part for o in outcomes if o.status == OK} == {*records.PARTS} - {"rehearsal"}
    assert all(o.note for o in outcomes if o.status != OK)


@pytest.mark.slow
def test_the_same_in_bfloat16():
    found = _checked(lambda check: "bfloat16" in check.name or check.part in ("machine", "rates"))
    assert {o.part for o in found} >= {"kernels", "agreement"}
    assert {o.status for o in found} == {OK}


def test_every_kernel_is_listed(outcomes):
    names = [o.name for o in outcomes if o.part == "kernels"]
    for title, table in (
        ("attention", attention.IMPLEMENTATIONS),
        ("prefill over pages", attention.IMPLEMENTATIONS),
        ("attention over pages", paged_attention.IMPLEMENTATIONS),
        ("products of experts", grouped_matmul.IMPLEMENTATIONS),
    ):
        for name in table:
            assert any(one.startswith(f"{title}: {name}") for one in names), (title, name)
    status = {o.name: o.status for o in outcomes}
    assert status["attention: splash"] == status["attention over pages: gpu"] == ABSENT
    assert status["attention: ring over devices"] == OK  # over the tests' fake devices
    assert len(names) == len(set(names))


def test_what_is_measured_is_possible(outcomes):
    found = [record for outcome in outcomes for record in outcome.records]

    def of(kind):
        return [one for one in found if type(one) is kind]

    assert all(one.per_second > 0 for one in of(Rate))
    (step,) = of(Decoding)
    assert 0 < step.seconds < 10
    assert step.share == step.bandwidth_s / step.seconds
    (update,) = of(Training)
    assert 0 < update.flops <= update.computed_flops
    assert all(0 < one.mean < one.largest < one.limit for one in of(Gap))
    assert [one.measured for one in of(Predicted) if one.unit == "bytes"] == [None]
    assert {one.field for one in of(Advised)} == {
        "model.path", "model.attention", "model.remat", "train.num_microbatches",
        "rollout.num_slots", "rollout.cache_gb",
    }  # fmt: skip
    assert all(one.reason for one in of(Advised))


def test_decoding_counts_weights_and_live_entries(outcomes):
    """The bound of one row: every matrix once, its keys and values, its logits four times."""
    (step,) = [r for o in outcomes for r in o.records if type(r) is Decoding]
    model = shapes.model(shapes.LEAST)
    D, F, L, N, K, H, V = (
        model.embed_dim, model.mlp_dim, model.num_layers, model.num_heads, model.num_kv_heads,
        model.head_dim, model.vocab_size,
    )  # fmt: skip
    weights = L * (D * H * (2 * N + 2 * K) + 3 * D * F) + V * D
    entries = (step.context + 8) * 2 * L * K * H  # 16 steps: 8 more on average
    assert step.bytes == 4 * (weights + entries + 4 * V)


# ---------------------------------------------------------------- faults


def _of(name, device):
    every = [*attention_checks.checks(device), *product_checks.checks(device)]
    return next(check for check in every if check.name.startswith(name))


def _run(name):
    before = known()
    return running.run([_of(name, before.device)], before, say=silent)[0]


def test_a_kernel_that_is_wrong_fails(monkeypatch):
    right = reference_grouped_matmul.matmul

    def wrong(*arrays, **how):
        return 1.001 * right(*arrays, **how)

    monkeypatch.setattr(reference_grouped_matmul, "matmul", wrong)
    outcome = _run("products of experts: reference, float32")
    assert (outcome.status, outcome.note) == (FAIL, "beyond the tolerance")
    assert 0.5e-3 < outcome.records[0].error < 2e-3
    assert not running.passed([outcome])


def test_a_gradient_that_is_wrong_fails(monkeypatch):
    right = reference_grouped_matmul.outer
    monkeypatch.setattr(reference_grouped_matmul, "outer", lambda *arrays: -right(*arrays))
    outcome = _run("products of experts: reference, float32")
    assert outcome.status == FAIL
    assert outcome.records[0].error < 1e-5
    assert outcome.records[0].gradient_error > 1


def test_attention_that_sees_the_future_or_another_segment_fails(monkeypatch):
    right = attention.attention

    def blind(*arrays, segment_ids_BT, **how):
        return right(*arrays, segment_ids_BT=jnp.ones_like(segment_ids_BT), **how)

    for wrong in (blind, lambda *arrays, causal, **how: right(*arrays, causal=False, **how)):
        monkeypatch.setattr(attention, "attention", wrong)
        assert _run("attention: reference, float32, packed rows").status == FAIL


def test_a_page_more_or_less_fails(monkeypatch):
    from luspo_jax.ops import block_paged_attention

    right = block_paged_attention.attend

    def short(query, pool, layer, tables, lengths, shared):
        return right(query, pool, layer, tables, lengths - 1, shared)

    monkeypatch.setattr(block_paged_attention, "attend", short)
    assert _run("attention over pages: blocks, float32").status == FAIL


def test_a_kernel_that_raises_or_gives_nan_fails_and_the_others_go_on(monkeypatch):
    def raises(_):
        raise RuntimeError("\n  no such instruction\nat 0x0")

    checks = [
        Check("kernels", "raises", 0.0, raises),
        Check("kernels", "nan", 0.0, lambda _: [Agreed(float("nan"), 0.1)]),
        Check("kernels", "sound", 0.0, lambda _: [Agreed(0.05, 0.1, 0.1)]),
    ]
    found = running.run(checks, known(), say=silent)
    assert [one.status for one in found] == [FAIL, FAIL, OK]
    assert found[0].note == "RuntimeError: no such instruction"
    told = report.as_json(report.record(found, config="c", minutes=1.0, seconds=2.0))
    assert json.loads(told)["outcomes"][1]["records"][0]["error"] == "nan"
    assert not json.loads(told)["passed"]
    text = report.text(found, 2.0)
    assert text.index("raises") < text.index("sound")  # what failed comes first
    assert "FAILED: raises; nan" in text


# ---------------------------------------------------------------- plain formulas


def test_plain_attention_is_a_softmax():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 3, n, 4)) for n in (2, 1, 1))
    sees = np.tri(3, dtype=bool)[None]
    function = functools.partial(lambda sees, *x: (plain.attention(*x, sees),), sees)
    (out,), _ = plain.pulled(function, [query, key, value], None)
    scores = key[0, :2, 0] @ query[0, 1, 1] / 2.0
    weights = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(out[0, 1, 1], weights @ value[0, :2, 0], rtol=1e-12)
    assert out.dtype == np.float64


def test_plain_draws_and_roundings():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert plain.kept(logits, 0, 0.81).tolist() == [True, True, True, False]
    assert plain.kept(logits, 2, 1.0).tolist() == [True, True, False, False]
    kept = np.ones(4, bool)  # blocks of two: 0.8 and 0.2; 0.5/0.8 = 0.625
    assert plain.drawn(logits, kept, np.array([0.79, 0.62])) == 0
    assert plain.drawn(logits, kept, np.array([0.79, 0.63])) == 1
    assert plain.drawn(logits, kept, np.array([0.81, 0.76])) == 3
    rounded = plain.nearest(np.array([[2.0], [0.4], [-0.7]]), (-1.0, 0.0, 0.5, 1.0), 2)
    np.testing.assert_array_equal(rounded, [[2.0], [0.0], [-0.7]])


def test_an_error_is_a_share_of_the_largest_value():
    assert plain.error([np.array([1.0, 3.0])], [np.array([1.0, 4.0])]) == 0.25
    assert np.isnan(plain.error([np.array([np.nan, 3.0])], [np.array([1.0, 4.0])]))


# ---------------------------------------------------------------- budget, sizes, advice


def test_what_does_not_fit_in_the_time_is_left_out_and_said():
    clock = []
    checks = [
        Check("rates", "short", 0.0, lambda _: clock.append(1) or [Fact("a", "b")]),
        Check("training", "long", 1e6, lambda _: clock.append(2)),
        Check("advice", "also short", 0.0, lambda _: []),
    ]
    found = running.run(checks, known(seconds=100), say=silent)
    assert [one.status for one in found] == [OK, SKIPPED, OK]
    assert clock == [1]
    assert found[1].note.startswith("takes about 1000000 s, and")
    text = report.text(found, 1.0)
    assert "long: skipped: takes about 1000000 s" in text
    assert "1 skipped" in text


def test_a_machine_that_was_slow_is_expected_to_be():
    def slow(_):
        time.sleep(0.05)
        return []

    checks = [
        Check("rates", "slow", 0.001, slow),
        Check("rates", "next", 10.0, lambda _: []),
    ]
    found = running.run(checks, known(seconds=400), say=silent)
    assert [one.status for one in found] == [OK, SKIPPED]  # 10 s would take 500


def test_no_time_at_all_says_so_everywhere():
    before = known(seconds=0)
    found = running.run(registry.checks(before.device), before, say=silent)
    assert {one.status for one in found} <= {OK, SKIPPED, ABSENT}
    assert {one.part for one in found if one.status == SKIPPED} >= {"kernels", "advice", "training"}
    assert running.passed(found)
    assert "needs the rate of reading memory" in _message(before, advice.slots)


def _message(before, check):
    with pytest.raises(records.Skipped) as reason:
        check(before)
    return str(reason.value)


def test_parts_bring_what_they_rest_on():
    device = jax.devices()[0]
    parts = {check.part for check in registry.checks(device, ["rehearsal"])}
    assert parts == {"machine", "rates", "training"}
    assert {check.part for check in registry.checks(device)} == {*records.PARTS} - {"rehearsal"}


def _fast(before, per_second):
    for kind in ("matrix products", "reading memory"):
        before.found.append(Rate(kind, "float32", 64, per_second))
    return before


def test_the_shape_follows_from_rate_and_time(monkeypatch):
    before = registry.known(None, "", deadline=time.monotonic() + 400)
    monkeypatch.setattr(shapes, "device_memory", lambda _: 64e9)
    assert shapes.chosen(_fast(before, 1e9), 512) == shapes.LEAST
    assert shapes.chosen(_fast(before, 2e11), 512) == shapes.TINY
    assert shapes.chosen(_fast(before, 1e13), 512) == shapes.SMALL
    monkeypatch.setattr(shapes, "device_memory", lambda _: 8e9)
    assert shapes.chosen(before, 512) == shapes.TINY


def test_of_a_large_shape_as_many_layers_are_trained_as_fit(monkeypatch):
    before = known()
    room = 0.9 * 0.8 * 80e9

    def fitted(memory):
        monkeypatch.setattr(shapes, "device_memory", lambda _: memory)
        return shapes.fitted(before, shapes.LARGE, beside=0.2)

    def size(layers):
        one = shapes.Shape("x", shapes.LARGE.path, layers)
        return shapes.STATE_BYTES * shapes.parameters(one)

    assert fitted(1e12) == shapes.LARGE
    shape = fitted(80e9)
    assert size(shape.layers) <= room < size(shape.layers + 1)
    assert str(shape) == f"Qwen2.5-7B, {shape.layers} layers"
    with pytest.raises(records.Skipped, match="two layers of Qwen2"):
        fitted(16e9)


def test_a_run_that_cannot_fit_is_told_so(monkeypatch):
    before = _fast(known(), 1e11)
    monkeypatch.setattr(shapes, "device_memory", lambda _: 1e6)
    before.config.rollout.cache_gb = 0.01
    (found,) = advice.whole(before)
    assert found.value is None
    assert "adapter" in found.reason
    assert "does not fit" in _message(before, advice.microbatches)
    ending = report.ending([Outcome("advice", "fits", OK, "", 0.0, (found,))], 1.0)
    assert any(line.startswith("DOES NOT FIT: model.path: master weights") for line in ending)
    assert not any("--config" in line or "Nothing" in line for line in ending)


def test_changes_are_told_as_flags():
    change = Advised("train.num_microbatches", 1, 2, "x")
    same = Advised("model.remat", "none", "none", "y")

    def ending(*records):
        return report.ending([Outcome("advice", "a", OK, "", 0.0, records)], 1.0)

    assert "To set: --config.train.num_microbatches=2" in ending(change, same)
    assert any(line.startswith("Nothing to set") for line in ending(same))


def test_a_slow_machine_estimates_what_it_cannot_time():
    before = _fast(known(), 1e3)
    found = advice.microbatches(before)
    assert [one.field for one in found] == ["train.num_microbatches"]
    assert "estimated, because an update takes about" in found[0].reason


def test_packed_rows_are_advised_by_their_own_field():
    before = _fast(known(tiny=False), 1e3)
    before.config.train.packing = True
    before.config.train.microbatch_tokens = 4 * 56
    (found,) = advice.microbatches(before)
    assert (found.field, found.now) == ("train.microbatch_tokens", 224)
    assert found.value == 448  # the largest that fits


def test_random_weights_look_random():
    tree = {"a": {"kernel": jax.ShapeDtypeStruct((3, 1000), jnp.float32)},
            "b": {"kernel": jax.ShapeDtypeStruct((3, 1000), jnp.float32)},
            "n": {"scale": jax.ShapeDtypeStruct((4,), jnp.float32)}}  # fmt: skip
    made = shapes.random_tree(tree)
    a, b = (np.asarray(made[name]["kernel"]).ravel() for name in "ab")
    assert abs(a.std() / 0.02 - 1) < 0.05
    assert abs(a.mean()) < 0.002
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.1
    np.testing.assert_array_equal(made["n"]["scale"], 1)


def test_a_case_has_responses_of_one_length():
    made = shapes.case(_fast(known(), 1e11), shapes.LEAST, Sizes(4, 8, 12))
    assert made.response_lengths == [12] * 4
    assert made.sizes.responses_per_minibatch == 4
    assert made.engine.max_length == 20
    assert decoding.costs.parts(made.layouts[0]).tokens == 1


# ---------------------------------------------------------------- files and flags


class _Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.headings = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open += [tag] if tag not in ("meta", "link") else []
        self.links += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_has_every_part_and_loads_nothing(outcomes):
    text = report.page(outcomes, "A <title>", 12.0)
    page = _Page(text)
    assert not page.open
    assert page.headings == list(records.PARTS.values())
    assert page.links == ["data:,"]
    assert "<script" not in text
    assert "A &lt;title&gt;" in text
    assert "default-src 'none'" in text
    for outcome in outcomes:
        if outcome.part == "kernels":
            assert f"<td>{outcome.name}</td>" in text


def test_the_json_has_every_outcome(outcomes):
    found = json.loads(
        report.as_json(report.record(outcomes, config="c", minutes=8.0, seconds=1.0))
    )
    assert [one["name"] for one in found["outcomes"]] == [one.name for one in outcomes]
    kinds = {record["record"] for one in found["outcomes"] for record in one["records"]}
    assert kinds == {
        "fact", "agreed", "rate", "decoding", "training", "gap", "predicted", "advised",
    }  # fmt: skip
    (step,) = [r for o in found["outcomes"] for r in o["records"] if r["record"] == "decoding"]
    assert step["share"] > 0


_PATCHED = """
import sys
from experiments import checkup
from experiments.machine import records, registry

def wrong(_):
    raise RuntimeError("no such instruction")

def checks(device, parts):
    found = [records.Check("rates", "fine", 0.0, lambda _: [records.Fact("a", "b")])]
    return found + [records.Check("kernels", "broken", 0.0, wrong)] * BROKEN

registry.checks = checks
sys.argv = ["checkup.py", *ARGUMENTS]
sys.exit(checkup.call())
"""


def _command(*arguments, broken=0, patched=True):
    code = _PATCHED.replace("BROKEN", str(broken)).replace("ARGUMENTS", repr(list(arguments)))
    called = ["-c", code] if patched else ["-m", "experiments.checkup", *arguments]
    return subprocess.run(
        [sys.executable, *called], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_command_writes_whole_files_and_exits_with_what_it_found(tmp_path):
    files = [f"--html={tmp_path / 'new' / 'a.html'}", f"--json={tmp_path / 'a.json'}"]
    ran = _command(*files, broken=1)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr + ran.stdout
    assert "broken: FAIL: RuntimeError: no such instruction" in ran.stdout
    assert json.loads((tmp_path / "a.json").read_text())["passed"] is False
    assert (tmp_path / "new" / "a.html").read_text().endswith("</html>\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "new"]
    again = _command(*files)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert _command(*files, "--overwrite").returncode == 0
    assert json.loads((tmp_path / "a.json").read_text())["passed"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts=kernel"], "there are machine, kernels"),
        (["--config=nowhere.py"], "--config cannot be loaded"),
        (["--config.rollout.slots=3"], "no field 'rollout.slots'"),
        (["--config.rollout.num_slots=0"], "rollout.num_slots=0 must"),
        (["--config=configs/sft_label_sums.py"], "a supervised run samples nothing"),
        (["--json=a", "--html=a"], "name two files"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    ran = _command(*flags, patched=False)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert not ran.stdout


def test_a_busy_machine_is_told_at_the_end():
    busy = Fact("load before", "9.0; OTHERS USE THIS MACHINE: its rates and times will not hold")
    for facts, told in (((busy,), True), ((Fact("load before", "0.1"),), False)):
        lines = report.ending([Outcome("machine", "m", OK, "", 0.0, facts)], 1.0)
        assert any("run it again alone" in line for line in lines) == told


def test_out_of_memory_is_no_fault_of_a_kernel():
    def large(_):
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GiB")

    (found,) = running.run([Check("training", "x", 0.0, large)], known(), say=silent)
    assert (found.status, found.note[:13]) == (SKIPPED, "out of memory")


def test_absent_and_skipped_are_told_apart():
    def gone(_):
        raise Absent("runs on tpu")

    found = running.run([Check("kernels", "x", 0.0, gone)], known(), say=silent)
    assert (found[0].status, found[0].note) == (ABSENT, "runs on tpu")
    assert _run("attention: splash").note == "runs on tpu, not on cpu"
    assert ABSENT == "not on this platform"
