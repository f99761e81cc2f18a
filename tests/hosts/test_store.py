"""The store over a client of the test's; real clients are in tests/test_two_processes.py."""

import types

import pytest

from luspo_jax.hosts import store as stores


class _Client:
    """Of jax 0.10: keys come back whole."""

    def __init__(self):
        self.values, self.barriers = {}, []

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder + "/")]

    def wait_at_barrier(self, label, timeout_in_ms, process_ids=None):
        self.barriers.append((label, timeout_in_ms))


@pytest.fixture
def state(monkeypatch):
    state = types.SimpleNamespace(client=_Client(), coordinator_address="head:1234")
    monkeypatch.setattr(stores, "_state", lambda: state)
    return state


def test_each_process_has_one_text(state):
    store, other = stores.Store("luspo_jax/a"), stores.Store("luspo_jax/b")
    store.put(0, "zero")
    store.put(1, "one")
    store.put(1, "one more")
    other.put(0, "of another start")
    assert sorted(store.texts()) == ["one more", "zero"]
    store.meet("end", 1.5)
    assert state.client.barriers == [("luspo_jax/a/end", 1500)]
    assert stores.coordinator() == "head:1234"


def test_jax_without_it_is_named(state):
    state.client = types.SimpleNamespace(key_value_set=print, wait_at_barrier=print)
    with pytest.raises(stores.StoreError, match="has no key_value_dir_get of its coordination"):
        stores.Store("a")
    state.client = None
    with pytest.raises(stores.StoreError, match="has no key_value_set, key_value_dir_get"):
        stores.Store("a")
    state.coordinator_address = None
    with pytest.raises(stores.StoreError, match="address of its coordinator"):
        stores.coordinator()


def test_who_has_left_can_post_no_more(state):
    store = stores.Store("a")
    state.client = None
    with pytest.raises(stores.StoreError, match="no longer connected"):
        store.put(0, "late")
    with pytest.raises(stores.StoreError, match="no longer connected"):
        store.texts()


def test_state_of_this_jax_is_where_it_is_looked_for():
    assert hasattr(stores._state(), "client")
    assert hasattr(stores._state(), "coordinator_address")
