"""Groups of judged responses by hand."""

from luspo_jax.rewards import Reward, Sample
from luspo_jax.rewards.group import Peers


def peers(lengths, right, values=None, *, max_length=100, target=None, tokens=None, duals=None):
    """Judged responses with these lengths; their rewards are 1 for right and 0 for wrong."""
    meta = {} if target is None else {"target_length": target}
    values = [float(each) for each in right] if values is None else values
    return Peers(
        samples=[Sample("x" * n, "!", n, max_length, meta) for n in lengths],
        rewards=[Reward(value, "ok", {"right": value}) for value in values],
        right=[bool(each) for each in right],
        tokens=tokens or [list(range(n)) for n in lengths],
        duals=duals or {},
    )
