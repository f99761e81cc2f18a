"""The account of lengths: estimates against other implementations, and made-up selections."""

import json
import math
import warnings

import numpy as np
import pytest
import scipy.stats

from luspo_jax.length import accounting
from luspo_jax.length.accounting import (
    AccountState,
    Batch,
    Cohort,
    Consumed,
    Finished,
    Running,
)
from luspo_jax.length.settings import LengthSettings
from luspo_jax.metrics import declared

SETTINGS = LengthSettings(account_window=6)
LIMIT = 400  # tokens of the made-up responses


def _counts(lengths, size):
    return np.bincount(np.asarray(lengths, int), minlength=size)


def _censored(seed, size=40, longest=30):
    """Lengths of which some are known only from below, many of them equal."""
    rng = np.random.default_rng(seed)
    lengths, limits = rng.integers(1, longest, (2, size))
    return lengths[lengths <= limits], limits[lengths > limits]


def _names(prefix, values):
    return {f"length/account/{prefix}{name}": value for name, value in values.items()}


# --- Kaplan–Meier --------------------------------------------------------------------------------


def _survival(ended, running, t):
    """P(length > t) as the product over the lengths seen, from the definition."""
    product = 1.0
    for u in sorted({u for u in ended if u <= t}):
        at_risk = sum(v >= u for v in ended) + sum(v >= u for v in running)
        product *= 1 - sum(v == u for v in ended) / at_risk
    return product


@pytest.mark.parametrize("seed", range(5))
def test_survival_is_that_of_the_definition_and_of_scipy(seed):
    ended, running = _censored(seed)
    size = max(*ended, *running) + 1
    got = accounting.kaplan_meier(_counts(ended, size), _counts(running, size))
    expected = [_survival(ended.tolist(), running.tolist(), t) for t in range(size)]
    np.testing.assert_allclose(got, expected, atol=1e-12)
    other = scipy.stats.ecdf(scipy.stats.CensoredData(uncensored=ended, right=running)).sf
    np.testing.assert_allclose(got, other.evaluate(np.arange(size)), atol=1e-12)


def test_survival_where_all_have_ended_or_none():
    lengths = np.array([2, 2, 5])
    ended, nothing = _counts(lengths, 6), np.zeros(6, int)
    survival = accounting.kaplan_meier(ended, nothing)
    np.testing.assert_allclose(survival, [(lengths > t).mean() for t in range(6)])
    assert accounting.restricted_mean(survival) == pytest.approx(lengths.mean())
    np.testing.assert_array_equal(accounting.kaplan_meier(nothing, ended), np.ones(6))


def test_the_mean_of_censored_lengths_is_that_of_all():
    """Half a million lengths, each looked at before a random number of tokens."""
    rng = np.random.default_rng(0)
    lengths, limits = rng.geometric(0.1, 500_000), rng.integers(1, 60, 500_000)
    ended, running = lengths[lengths <= limits], limits[lengths > limits]
    survival = accounting.kaplan_meier(_counts(ended, 60), _counts(running, 60))
    expected = np.minimum(lengths, 59).mean()
    assert accounting.restricted_mean(survival) == pytest.approx(expected, rel=0.01)
    assert ended.mean() < 0.85 * expected  # what the estimate is for


# --- a window ------------------------------------------------------------------------------------


def _state(cohorts, consumed):
    return AccountState(0, tuple(cohorts), tuple(consumed))


def _window(cohorts, consumed, running):
    """The window's comparison from lists of responses, one difference at a time."""

    def ratio(without=None):
        ended = [n for begun, lengths, _ in cohorts for n in lengths if begun != without]
        open_ones = [n for begun, _, lengths in cohorts for n in lengths if begun != without]
        open_ones += [n for begun, n in running if begun != without]
        trained = [min(n, horizon) for _, b, lengths in consumed for n in lengths if b != without]
        sampled = sum(_survival(ended, open_ones, t) for t in range(horizon))
        return np.mean(trained) / sampled, sampled, np.mean(trained)

    horizon = max(
        [n for _, ended, dropped in cohorts for n in (*ended, *dropped)] + [n for _, n in running]
    )
    begun = {*(c[0] for c in cohorts), *(b[1] for b in consumed), *(r[0] for r in running)}
    replicas = np.log([ratio(without=b)[0] for b in begun])
    squares = ((replicas - replicas.mean()) ** 2).sum()
    return *ratio(), horizon, math.sqrt((len(begun) - 1) / len(begun) * squares)


@pytest.mark.parametrize("seed", range(4))
def test_a_window_is_compared_as_by_hand(seed):
    rng = np.random.default_rng(seed)

    def lengths(size, most=25):
        return tuple(rng.integers(1, most, size).tolist())

    cohorts = [Cohort(begun, lengths(6), lengths(begun % 2)) for begun in range(4)]
    # Of a cohort before the window, trained lengths beyond all that the window has seen.
    consumed = [Batch(begun, begun - 1, lengths(5, most=40)) for begun in range(4)]
    running = [Running(begun, *lengths(1)) for begun in (2, 3, 3, 4)]
    got = accounting.compared(_state(cohorts, consumed), running)
    ratio, sampled, trained, horizon, error = _window(cohorts, consumed, running)
    assert got.horizon == horizon < 40
    assert got.sampled == pytest.approx(sampled, rel=1e-12)
    assert got.consumed == pytest.approx(trained, rel=1e-12)
    assert got.difference == pytest.approx(ratio - 1, abs=1e-12)
    assert got.standard_error == pytest.approx(error, rel=1e-9)
    assert not got.significant


@pytest.mark.parametrize(("count", "significant"), [(1, False), (3, False), (9, True)])
def test_the_same_difference_is_significant_where_enough_cohorts_have_it(count, significant):
    batches = [Batch(begun, begun, (7 + begun,)) for begun in range(count)]
    cohorts = [Cohort(begun, (7 + begun, 14 + begun)) for begun in range(count)]
    got = accounting.compared(_state(cohorts, batches), [])
    assert got.difference < -SETTINGS.account_limit
    assert got.significant is significant
    if count > 1:
        statistic = abs(math.log1p(got.difference)) / got.standard_error
        p_value = 2 * scipy.stats.t.sf(statistic, count - 1)
        assert (p_value < 1e-3) == significant


def test_the_median_is_the_least_length_that_half_do_not_pass():
    batch = [Batch(0, 0, (3,))]
    assert accounting.compared(_state([Cohort(0, (1, 2, 8, 9))], batch), []).median == 2
    assert accounting.compared(_state([Cohort(0, (1, 7, 8, 9))], batch), []).median == 7
    running = [Running(0, 4)] * 3
    assert math.isnan(accounting.compared(_state([Cohort(0, (1, 2))], batch), running).median)


def test_the_standard_error_is_that_of_repeated_sampling():
    """Half of the groups trained on, by chance; responses to a prompt resemble each other."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        means = rng.uniform(50, 150, (8, 4, 1))  # cohorts, groups
        lengths = rng.poisson(means, (8, 4, 5))
        cohorts = [Cohort(c, tuple(lengths[c].ravel())) for c in range(8)]
        batches = [Batch(c, c, tuple(lengths[c, :2].ravel())) for c in range(8)]
        found.append(accounting.compared(_state(cohorts, batches), []))
    errors = [window.standard_error for window in found]
    spread = np.std(np.log1p([window.difference for window in found]))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.15)


# --- a step --------------------------------------------------------------------------------------


def _account(state, step, finished=(), running=(), consumed=(), dropped=()):
    return accounting.account(
        state,
        SETTINGS,
        step,
        finished=finished,
        running=running,
        consumed=consumed,
        dropped=dropped,
    )


def test_the_populations_of_a_step():
    finished = [Finished(3, 10, False), Finished(3, 30, True), Finished(1, 50, False)]
    running = [Running(3, 7), Running(2, 90)]
    dropped = [Running(3, 5), Running(0, 99)]
    consumed = [Consumed(3, 10, 0), Consumed(1, 50, 2), Consumed(0, 20, 2), Consumed(0, 60, 7)]
    consumed += [Consumed(0, 80, 4)]
    _, got = _account(AccountState(), 3, finished, running, consumed, dropped)
    begun, ended, trained = [10, 30, 7, 5], [10, 30, 50], [10, 50, 20, 60, 80]
    expected = {
        "sampled/unfinished": 2 / 4,
        "finished/clip_ratio": 1 / 3,
        "consumed/age_0/mean": 10,
        "consumed/age_2/mean": 35,
        "consumed/age_4/mean": 70,
        "difference": 44 - 30,
        # The step sampled 10 and 30, and does not know how far two would have gone.
        "window/horizon": 30,
        "window/sampled_mean": 7 + 3 + 20 / 2,
        "window/consumed_mean": (10 + 30 + 20 + 30 + 30) / 5,
        "flag": 0,
    }
    for name, lengths in (("sampled", begun), ("finished", ended), ("consumed", trained)):
        expected |= {f"{name}/count": len(lengths), f"{name}/mean": np.mean(lengths)}
        expected |= {f"{name}/p{p}": np.percentile(lengths, p) for p in (10, 50, 90)}
    expected = _names("", expected)
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    ages = [name for name in got if "/age_" in name]
    assert len(ages) == 3  # no entry for an age that none has
    assert all(declared(name).reducer == "last" for name in got)
    assert all(isinstance(value, float) for value in got.values())


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_those_of_the_distribution_functions(seed):
    rng = np.random.default_rng(seed)
    one, other = rng.integers(1, 40, 30), rng.integers(10, 60, 50)
    grid = np.arange(61)
    apart = np.abs((one[:, None] <= grid).mean(0) - (other[:, None] <= grid).mean(0))
    expected = {
        "difference": one.mean() - other.mean(),
        "w1": apart.sum(),
        "w1_relative": apart.sum() / other.mean(),
        "ks": apart.max(),
    }
    assert accounting.distances(one, other) == pytest.approx(expected)
    assert expected["ks"] == pytest.approx(scipy.stats.ks_2samp(one, other).statistic)
    consumed = [Consumed(0, n, 0) for n in one]
    finished = [Finished(0, n, False) for n in other]
    _, got = _account(AccountState(), 0, finished, (), consumed)
    for prefix in ("", "complete/"):
        values = _names(prefix, expected)
        assert {name: got[name] for name in values} == pytest.approx(values)


def test_complete_cohorts_are_compared_once_nothing_of_them_is_open():
    state, got = _account(
        AccountState(), 0, [Finished(0, 10, False)], [Running(0, 5)], [Consumed(0, 10, 0)]
    )
    assert got["length/account/complete/count"] == 0
    state, got = _account(
        state, 1, [Finished(0, 30, False)], [Running(1, 7)], dropped=[Running(1, 2)]
    )
    # Of 10 and 30, the 10 has been trained on.
    complete = {"count": 2, "mean": 20, "difference": -10, "w1": 10, "w1_relative": 0.5, "ks": 0.5}
    complete = _names("complete/", complete)
    assert {name: got[name] for name in complete} == pytest.approx(complete)
    # A cohort that lost a response never becomes complete.
    _, got = _account(state, 2, [Finished(1, 9, False)], (), [Consumed(0, 30, 2)])
    complete |= _names("complete/", {"difference": 0, "w1": 0, "w1_relative": 0, "ks": 0})
    assert {name: got[name] for name in complete} == pytest.approx(complete)


def test_nothing_at_all_is_not_a_number_and_no_warning():
    state, got = _account(AccountState(), 0)
    assert state == AccountState(start=0)
    counts = {name for name in got if name.endswith(("count", "horizon", "flag"))}
    assert all(got[name] == 0 for name in counts)
    assert all(math.isnan(got[name]) for name in got.keys() - counts)
    for only in ("finished", "running", "dropped", "consumed"):
        kind = {"finished": Finished(0, 4, False), "consumed": Consumed(0, 4, 0)}
        _, got = _account(AccountState(), 0, **{only: [kind.get(only, Running(0, 4))]})
        assert math.isnan(got["length/account/window/relative_difference"])
        assert math.isnan(got["length/account/w1"])


# --- memory --------------------------------------------------------------------------------------


def test_the_window_is_bounded_and_leaves_out_what_it_saw_in_part():
    state, tolerant = AccountState(), LengthSettings(account_window=6, account_limit=9.0)
    for step in range(5, 25):
        # An older response ends in each step, and one is trained on two steps late.
        finished = [Finished(step, 10 + step, False), Finished(step - 3, 50, False)]
        state, _ = accounting.account(
            state,
            tolerant,
            step,
            finished=finished,
            running=[Running(step, 3)],
            consumed=[Consumed(step - 2, 9, 2)],
            dropped=[Running(step, 1)],
        )
        first = max(5, step - SETTINGS.account_window + 1)
        assert [cohort.begun for cohort in state.cohorts] == list(range(first, step + 1))
        assert [batch.step for batch in state.consumed] == list(range(first, step + 1))
        assert {batch.step - batch.begun for batch in state.consumed} == {2}
        late = [cohort.ended for cohort in state.cohorts if step - cohort.begun >= 3]
        assert all(ended[1:] == (50,) for ended in late)
    assert state.start == 5
    assert len(state.cohorts) == SETTINGS.account_window


def test_json_keeps_the_account_and_a_restored_one_goes_on_alike():
    rng = np.random.default_rng(0)

    def run(restart):
        state, found = AccountState(), []
        for step in range(10):
            if step == restart:
                state = AccountState.from_json(json.loads(json.dumps(state.to_json())))
            own = np.random.default_rng(step).integers(1, 30, 8)  # NumPy's integers, as sampled
            state, got = _account(
                state,
                step,
                [Finished(step, n, False) for n in own],
                [Running(step, 4)],
                [Consumed(step, n, 0) for n in own[:3]],
                [Running(step, rng.integers(1, 2))],
            )
            found.append((state, got))
        return found

    straight, resumed = run(None), run(5)
    np.testing.assert_equal(resumed, straight)
    state = straight[-1][0]
    assert AccountState.from_json(json.loads(json.dumps(state.to_json()))) == state


# --- selections ----------------------------------------------------------------------------------


class Rollout:
    """Made-up partial rollouts: all in flight get equally many tokens a step."""

    def __init__(self, seed, *, groups, spread=0.6, speed=100):
        self.rng = np.random.default_rng(seed)
        self.groups, self.spread, self.speed = groups, spread, speed
        self.in_flight, self.state, self.flags = [], AccountState(), []

    def step(self, step, *, until=0, drop=False, keep=None, settings=SETTINGS):
        """Trains on the groups that end in a step, or on those of them that `keep` takes.

        A step begins `groups` groups and adds `speed` tokens; or, with `until`, it fills up to
        `groups` groups and is over once `until` of them have ended. `drop` gives up the others.
        """
        fresh = self.groups - (len(self.in_flight) if until else 0)
        means = self.rng.lognormal(4.5, self.spread, (fresh, 1))
        lengths = np.clip(self.rng.gamma(4, means / 4, (fresh, 4)), 1, LIMIT)
        self.in_flight += [(step, 0, row) for row in lengths.astype(int)]
        tokens = sorted(row.max() - done for _, done, row in self.in_flight)[until - 1]
        finished, running, consumed, dropped, left = [], [], [], [], []
        for begun, done, row in self.in_flight:
            now = int(done + (tokens if until else self.speed))
            finished += [Finished(begun, n, n == LIMIT) for n in row if done < n <= now]
            so_far = [Running(begun, now) for n in row if n > now]
            if not so_far:
                kept = keep is None or keep(row)
                consumed += [Consumed(begun, n, step - begun) for n in row if kept]
            elif drop:
                dropped += so_far
            else:
                running += so_far
                left.append((begun, now, row))
        self.in_flight = left
        self.state, found = accounting.account(
            self.state,
            settings,
            step,
            finished=finished,
            running=running,
            consumed=consumed,
            dropped=dropped,
        )
        self.flags.append(found["length/account/flag"])
        return found

    def run(self, steps, **options):
        """Returns the last step's metrics."""
        return [self.step(step, **options) for step in range(steps)][-1]


@pytest.mark.parametrize("seed", range(4))
def test_rollouts_that_only_take_longer_are_not_flagged(seed):
    """Long responses come late but come: at the start only short ones are trained on."""
    rollout = Rollout(seed, groups=48)
    first = rollout.step(0)
    assert first["length/account/window/relative_difference"] < -0.3
    got = [rollout.step(step) for step in range(1, 30)]
    assert not any(rollout.flags)
    late = [step["length/account/window/relative_difference"] for step in got[10:]]
    assert np.abs(late).max() < SETTINGS.account_limit
    # Whereas in any one step, what ends is short against what runs.
    assert got[-1]["length/account/sampled/unfinished"] > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_keeping_fast_finishers_is_flagged(seed):
    rollout = Rollout(seed, groups=48)
    with pytest.warns(UserWarning, match=r"chooses by length.*account_limit=0\.1") as caught:
        got = rollout.run(20, drop=True)
    window = SETTINGS.account_window
    assert rollout.flags == [0.0] * (window - 1) + [1.0] * (21 - window)
    assert len(caught) == 1  # where it begins, not in every step
    assert got["length/account/window/relative_difference"] < -0.3
    # Nothing is seen by who looks at ended responses of groups that ended.
    assert got["length/account/complete/count"] == 0


def test_a_window_at_the_start_that_could_not_have_seen_long_responses_is_not_flagged():
    """They take up to 16 steps: of the first window only short ones have ended, beyond chance."""
    settings, parted = LengthSettings(account_window=10), []
    for seed in range(3):
        rollout = Rollout(seed, groups=120, speed=25)
        for step in range(30):
            found = rollout.step(step, settings=settings)
            parted.append(found["length/account/window/relative_difference"] < -0.1)
        assert not any(rollout.flags)
        assert parted[-21]
        assert not parted[-1]


def test_steps_that_end_when_half_of_the_groups_have_are_fair_if_the_rest_goes_on():
    settings = LengthSettings(account_window=12)
    goes_on, given_up = Rollout(0, groups=48), Rollout(0, groups=48)
    got = goes_on.run(36, until=24, settings=settings)
    assert not any(goes_on.flags)
    assert got["length/account/consumed/age_1/mean"] > got["length/account/consumed/age_0/mean"]
    with pytest.warns(UserWarning, match="chooses by length"):
        got = given_up.run(36, until=24, drop=True, settings=settings)
    assert given_up.flags[-24:] == [1.0] * 24
    assert got["length/account/window/relative_difference"] < -0.2


def test_a_filter_by_length_is_flagged_in_both_directions():
    for keep, sign in ((lambda row: row.mean() < 100, -1), (lambda row: row.mean() > 80, 1)):
        rollout = Rollout(1, groups=48)
        with pytest.warns(UserWarning, match="chooses by length"):
            got = rollout.run(20, keep=keep)
        assert sign * got["length/account/window/relative_difference"] > SETTINGS.account_limit
        assert sign * got["length/account/complete/difference"] > 0


def test_a_filter_that_is_blind_to_length_is_not_flagged():
    rng = np.random.default_rng(5)
    rollout = Rollout(2, groups=48)
    rollout.run(30, keep=lambda row: rng.random() < 0.5)
    assert not any(rollout.flags)


@pytest.mark.parametrize("seed", range(10))
def test_chance_in_small_batches_does_not_warn(seed):
    """The same blind filter on two groups a step, whose means are often beyond the limit."""
    rng = np.random.default_rng(seed)
    rollout = Rollout(seed, groups=2, spread=0.9)
    got = [rollout.step(step, keep=lambda row: rng.random() < 0.5) for step in range(30)]
    assert not any(rollout.flags)
    beyond = [
        abs(step["length/account/window/relative_difference"]) > SETTINGS.account_limit
        for step in got
    ]
    assert np.mean(beyond) > 0.2  # without the standard error it would


def test_a_flag_ends_with_its_cause_and_a_second_one_warns_again():
    rollout = Rollout(3, groups=48)
    warned = []
    for step in range(60):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rollout.step(step, drop=step % 30 < 15)
        warned += [step] * len(caught)
    onsets = [s for s in range(1, 60) if rollout.flags[s] > rollout.flags[s - 1]]
    assert warned == onsets
    assert [step // 30 for step in warned] == [0, 1]


def test_a_larger_limit_tolerates_more():
    rollout = Rollout(0, groups=48)
    rollout.run(20, drop=True, settings=LengthSettings(account_window=6, account_limit=0.9))
    assert not any(rollout.flags)
