"""Changed golds must be refused and rewritten ones accepted; the makers and counters of both."""

import csv
import json

import pytest

from experiments.verdicts import ablation, plain_math_verify
from experiments.verdicts.golds import SETS, Gold, golds
from experiments.verdicts.mutations import MUTATIONS, mutants
from experiments.verdicts.page import write_section
from experiments.verdicts.rewritings import REWRITINGS, rewritings
from experiments.verdicts.trials import tables, trials, verdicts, write_mistakes
from experiments.verdicts.truth import is_constant, same_in_truth
from luspo_jax.rewards.answers import latex

GOLDS = (
    "42",
    "12345",
    "-7",
    "3.50",
    r"\frac{3}{7}",
    r"-\frac{5}{9}",
    r"3\sqrt{13} + \pi",
    r"2x^2 - 5x + 3",
    r"x = 4",
    r"y^2 = 3x + 1",
    r"(3, -8)",
    r"[2, 5)",
    r"\left(-\infty, \frac{1}{2}\right] \cup (4, 9)",
    r"\{1, \sqrt{3}, 6\}",
    r"2, 9, -4",
    r"35^\circ",
    r"12 \text{ cm}",
    r"\$48",
    r"25\%",
    r"6.2e-5",
    r"\text{Saturday}",
    r"\text{(B)}",
    r"5 \cdot 2^{n-1}",
    r"$7$, $-2$",
    r"x \in [1,6]",
    r"\frac{1}{2} a h",
)


@pytest.mark.parametrize(
    ("gold", "other", "same"),
    [
        (r"\frac12", r"\dfrac{1}{2}", True),
        ("0.5", r"\frac{2}{4}", True),
        ("1+x", "x+1", True),
        ("(-x)^2", "x^2", True),
        ("x^2", "x^3", False),
        ("2, 3", "3, 2", True),
        ("(2, 3)", "(3, 2)", False),
        ("(2, 3)", "[2, 3]", False),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        (r"1 \pm 2", r"1 \mp 2", True),
        ("x + y = 2", "2x + 2y = 4", True),
        ("x + y = 2", "x - y = 2", False),
        ("1 = 2", "3 = 5", False),
        (r"1\frac{1}{2}", r"\frac{3}{2}", True),
        (r"2^{100}", r"2^{100}+1", False),
        ("7", r"7-10^{-50}", False),
        (r"\text{east}", r"\text{west}", False),
        (r"\sin(-x)", r"-\sin(x)", True),
        ("90^{\\circ}", "90", False),
        ("4e33", "4", False),
    ],
)
def test_independent_reading(gold, other, same):
    assert same_in_truth(gold, other) is same
    assert same_in_truth(other, gold) is same


def test_names_are_no_constants():
    assert all(map(is_constant, (r"\frac{\sqrt{5}}{2}", r"3\pi")))
    assert not any(map(is_constant, ("2x", "e", r"5^\circ")))


def test_every_kind_has_a_member():
    assert {kind for gold in GOLDS for kind, _ in mutants(gold)[0]} == set(MUTATIONS)
    assert {kind for gold in GOLDS for kind, _ in rewritings(gold)} == set(REWRITINGS)


@pytest.mark.parametrize("gold", GOLDS)
def test_changes_are_others_and_depend_on_the_seed_only(gold):
    made, _ = mutants(gold, seed=3)
    assert made
    assert made == mutants(gold, seed=3)[0]
    assert len({text for _, text in made}) == len(made)
    assert not [text for _, text in made if same_in_truth(gold, text)]
    assert rewritings(gold, seed=3) == rewritings(gold, seed=3)


def test_what_is_no_change_is_left_out():
    made, dropped = mutants("x^2 + (-y)^2")
    assert dropped  # the sign within a square
    assert "x^{2} + (y)^{2}" not in [text for _, text in made]


def _shares(made, found):
    """(share of changes accepted, share of rewritings accepted, what was judged wrongly)."""
    wrong = [(t, a) for t, a in zip(made, found, strict=True) if a != t.right]
    parts = [[a for t, a in zip(made, found, strict=True) if t.right == r] for r in (False, True)]
    return (*(sum(part) / len(part) for part in parts), wrong)


def test_golds_written_here():
    made, _ = trials([Gold("here", k, text) for k, text in enumerate(GOLDS)], most=2)
    changed, rewritten, wrong = _shares(made, verdicts("ours", made, workers=2))
    assert (changed, rewritten) == (0, 1), wrong


def _some(data, count):
    for name in SETS:
        found = golds(name, data)
        yield from found[:: max(1, len(found) // count)]


def test_golds_of_public_sets(shared_data):
    made, _ = trials([*_some(shared_data, 25)], most=1)
    changed, rewritten, wrong = _shares(made, verdicts("ours", made, workers=2))
    assert len(made) > 1_500
    assert changed <= 0.001, [t for t, accepted in wrong if accepted]
    assert rewritten >= 0.995, [t for t, accepted in wrong if not accepted]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_all_golds(shared_data, name):
    made, _ = trials(golds(name, shared_data))
    changed, rewritten, wrong = _shares(made, verdicts("ours", made))
    assert changed <= 0.001, [t for t, accepted in wrong if accepted]
    assert rewritten >= 0.995, [t for t, accepted in wrong if not accepted]


def test_mistakes_are_written_and_counted(tmp_path):
    made, _ = trials([Gold("here", 7, "5")])
    accepted = {"one": [True] * len(made), "two": [False] * len(made)}
    write_mistakes(tmp_path, made, accepted)
    rows = [*csv.reader((tmp_path / "accepted.tsv").open(), delimiter="\t")]
    assert rows[0] == ["set", "id", "kind", "gold", "answer", "one", "two"]
    assert len(rows) == 1 + sum(not trial.right for trial in made)
    assert rows[1][:2] + rows[1][5:] == ["here", "7", "right", "wrong"]
    assert (tmp_path / "rejected.tsv").read_text().count("\n") == 1
    assert f"| all | {len(rows) - 1} | {len(rows) - 1} | 100.00% | 0 | 0.00% |" in tables(
        made, accepted
    )


def _changing(gold, answer):
    """The verdict, and the rules without which it is another."""
    verdict = ablation.check(rf"\boxed{{{answer}}}", gold, {"extract": "boxed"})
    return verdict.value, json.loads(verdict.prediction)


def test_a_rule_is_turned_off_and_on_again():
    known, before = ablation.rules(), latex._REWRITES
    value, changing = _changing("B", "(B) the second one")
    assert value == 1
    assert "choices_agree" in changing
    assert _changing("1+x", "x+1") == (1, ["formulas"])
    assert _changing("6", "6") == (1, [])
    assert ablation.rules() == known
    assert latex._REWRITES is before


def test_math_verify_by_itself():
    assert plain_math_verify.response(r"so \boxed{0.5}", r"\frac12") == 1
    assert plain_math_verify.whole("0.5", r"\frac12") == 1
    assert plain_math_verify.response(r"so \boxed{0.6}", r"\frac12") == 0


def test_sections_of_a_page_keep_each_other(tmp_path):
    page = tmp_path / "page.md"
    write_section(page, "One", "first")
    write_section(page, "Two", "## within\n\nsecond")
    write_section(page, "One", "    # no title\n\nnew")
    assert page.read_text() == "# One\n\n    # no title\n\nnew\n\n# Two\n\n## within\n\nsecond\n"
