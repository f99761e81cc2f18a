"""A user's reward of a group: a function named by `module:function` or `path/file.py:function`."""

import functools
import hashlib
import inspect

from luspo_jax.rewards.group.record import GroupReward, GroupRewardError, Peers
from luspo_jax.rewards.user import load_function, sources

# What f may take by name, besides responses, lengths, rewards and right.
OFFERED = ("max_length", "metas", "answers", "tokens")


def user_group_reward(function: str) -> GroupReward:
    """Returns the reward around `f(responses, lengths, rewards, right, **names) -> numbers`.

    Each argument but max_length is a list with one entry for each judged response; names are those
    of OFFERED that f takes. The function runs in this process, without a time limit.

    Raises:
      ValueError: no such function, or it cannot be called so.
    """
    module, loaded = load_function(function)
    signature = inspect.signature(loaded)
    everything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    accepted = [name for name in OFFERED if everything or name in signature.parameters]
    try:
        signature.bind([], [], [], [], **dict.fromkeys(accepted))
    except TypeError as error:
        raise ValueError(
            f"group reward {function!r} takes {signature} and is called with (responses, lengths, "
            f"rewards, right), and with {', '.join(OFFERED)} where it has arguments of these "
            f"names: {error}"
        ) from error
    digest = hashlib.sha256(sources(loaded, module)).hexdigest()[:12]
    score = functools.partial(_score, name=function, function=loaded, accepted=tuple(accepted))
    return GroupReward(function, digest, score)


def _score(peers: Peers, *, name, function, accepted) -> list[float]:
    offered = {
        "max_length": peers.max_length,
        "metas": [dict(sample.meta) for sample in peers.samples],
        "answers": [sample.answer for sample in peers.samples],
        "tokens": [list(tokens) for tokens in peers.tokens],
    }
    responses = [sample.response for sample in peers.samples]
    lists = (responses, list(peers.lengths), peers.values, list(peers.right))
    try:
        return [float(x) for x in function(*lists, **{key: offered[key] for key in accepted})]
    except Exception as error:
        raise GroupRewardError(
            f"group reward {name!r} failed: {type(error).__name__}: {error}"
        ) from error
