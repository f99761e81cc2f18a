"""The key-value store of `jax.distributed`, which lives in process 0 and dies with it.

jax has no public name for it; this is the one module that knows the private one. Only a process
that jax has registered may use it: the service refuses other clients.
"""

import jax

_METHODS = ("key_value_set", "key_value_dir_get", "wait_at_barrier")


class StoreError(RuntimeError):
    """This jax has no such store, or this process is not connected; the message says which."""


class Store:
    """One text for each process, which all processes can read.

    Any error of jax's runtime may come out of a call, when process 0 cannot be reached.
    """

    def __init__(self, folder: str):
        """folder: beginning of the keys; the same on all processes."""
        self._folder = folder
        client = _state().client
        missing = [name for name in _METHODS if not callable(getattr(client, name, None))]
        if missing:
            raise StoreError(
                f"jax {jax.__version__} has no {', '.join(missing)} of its coordination service "
                "after jax.distributed.initialize: luspo_jax needs it for the signs of life of "
                "several processes; report this, and use another version of jax"
            )

    def put(self, index: int, text: str) -> None:
        """Replaces the text of a process."""
        _client().key_value_set(f"{self._folder}/{index}", text, allow_overwrite=True)

    def texts(self) -> list[str]:
        """Returns the texts of all processes that have put one."""
        return [text for _, text in _client().key_value_dir_get(self._folder)]

    def meet(self, label: str, timeout_s: float) -> None:
        """Waits until all processes are here; `label` names the place, to be used once."""
        _client().wait_at_barrier(f"{self._folder}/{label}", int(1000 * timeout_s))


def coordinator() -> str:
    """Returns HOST:PORT of process 0, as this process has reached it."""
    address = getattr(_state(), "coordinator_address", None)
    if not address:
        raise StoreError(f"jax {jax.__version__} does not tell the address of its coordinator")
    return address


def _state():
    try:
        from jax._src import distributed

        return distributed.global_state
    except (ImportError, AttributeError) as error:
        raise StoreError(
            f"jax {jax.__version__} keeps its coordination elsewhere: {error}"
        ) from None


def _client():
    client = _state().client
    if client is None:
        raise StoreError("this process is no longer connected to the others")
    return client
