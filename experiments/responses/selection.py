"""Chooses which responses of a step are shown."""

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.command import UsageError
from experiments.responses import texts
from experiments.responses.reading import Response, Row, Step
from luspo_jax.hosts.values import nearest

SIGNS = {
    "pos": lambda a: a > 0,
    "neg": lambda a: a < 0,
    "zero": lambda a: a == 0,
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """A bound on the reward or one part of it, exclusive.

    Attributes:
      name: `reward`, or a part.
      value: the bound.
      above: whether values above it are wanted, or those below.
    """

    name: str
    value: float
    above: bool

    def allows(self, response: Response) -> bool:
        """Whether a response is on the wanted side; one without a verdict is on neither."""
        value = response.value(self.name)
        if value is None:
            return False
        return value > self.value if self.above else value < self.value


def bound(text: str, *, above: bool) -> Bound:
    """Reads NAME:NUMBER.

    Raises:
      UsageError: it is something else.
    """
    name, colon, number = text.rpartition(":")
    try:
        if not (name and colon):
            raise ValueError
        return Bound(name, float(number), above)
    except ValueError:
        flag = "above" if above else "below"
        raise UsageError(
            f"--{flag}={text}: give NAME:NUMBER, such as --{flag}=reward:0.5; NAME is reward or a "
            "part of it"
        ) from None


@dataclasses.dataclass(frozen=True)
class Filters:
    """What to show; a response must pass all.

    Attributes:
      truncated: only those that were cut at the limit, or only the others; None for both.
      advantage: a key of SIGNS; empty for all.
      status: of the reward; empty for all.
      bounds: on the reward and its parts.
      find: text that the response holds, whatever its case.
      problems: ids; empty for all.
      changed: only problems whose verdict changed, see `verdict`.
      longest, shortest: only so many of those that pass all the others, 0 for all.
      limit: responses shown at most, 0 for all.
    """

    truncated: bool | None = None
    advantage: str = ""
    status: str = ""
    bounds: Sequence[Bound] = ()
    find: str = ""
    problems: Sequence[int] = ()
    changed: bool = False
    longest: int = 0
    shortest: int = 0
    limit: int = 0

    def __post_init__(self):
        if self.longest and self.shortest:
            raise UsageError("give one of --longest and --shortest")

    def wants(self, response: Response) -> bool:
        """Whether a response passes the filters that look at it alone; unknown values do not."""
        value = response.advantage
        return (
            (self.truncated is None or response.truncated == self.truncated)
            and (not self.advantage or (value is not None and SIGNS[self.advantage](value)))
            and (not self.status or response.status == self.status)
            and (not self.problems or response.prompt_id in self.problems)
            and all(bound.allows(response) for bound in self.bounds)
            and (not self.find or texts.holds(response.response or "", self.find))
        )

    @property
    def words(self) -> str:
        """The filters as a phrase; empty without any."""
        named = {None: "", True: "truncated", False: "not truncated"}
        said = [
            named[self.truncated],
            self.advantage and f"advantage {self.advantage}",
            self.status and f"status {self.status}",
            *(f"{b.name} {'>' if b.above else '<'} {b.value:g}" for b in self.bounds),
            self.find and f"with {self.find!r}",
            self.problems and f"problem {', '.join(map(str, self.problems))}",
            self.changed and "verdict changed",
            self.longest and f"the {self.longest} longest",
            self.shortest and f"the {self.shortest} shortest",
        ]
        return ", ".join(filter(None, said))


def verdict(right: int, judged: int) -> str:
    """Returns a problem's verdict in a step: all, some or none of its judged responses right."""
    return "all right" if right == judged else "some right" if right else "all wrong"


def pass_rate(rows: Sequence[Row], part: str | None) -> tuple[int, int]:
    """Returns (right, judged) of responses."""
    known = [r for row in rows if (r := row.response.right(part)) is not None]
    return sum(known), len(known)


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Returns the rows group by group, in order."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return list(found.values())


def changed(step: Step, part: str, before: Mapping[int, tuple[int, int, int]]) -> set[int]:
    """Returns the groups of a step whose problem had another verdict before.

    Args:
      step: the step.
      part: of the reward, that is accuracy.
      before: problem → (step, right, judged) when it was last asked.
    """
    found = set()
    for rows in groups(step.rows):
        right, judged = pass_rate(rows, part)
        then = before.get(rows[0].response.prompt_id)
        if then and judged and verdict(right, judged) != verdict(*then[1:]):
            found.add(rows[0].group)
    return found


def check_names(step: Step, filters: Filters) -> None:
    """Refuses a bound on a part of the reward that no response of a step has.

    Raises:
      UsageError: with the names that there are.
    """
    parts = {name for row in step.rows for name in row.response.parts or ()}
    for item in filters.bounds:
        if step.rows and item.name not in parts | {"reward"}:
            flag = "above" if item.above else "below"
            raise UsageError(
                f"--{flag}={item.name}:{item.value:g}: step {step.number} has no such part of the "
                f"reward: {nearest(item.name, parts | {'reward'})}"
            )


def select(step: Step, filters: Filters, in_groups: set[int] | None = None) -> list[list[Row]]:
    """Returns the wanted rows, group by group, without the limit.

    Args:
      step: the step.
      filters: its `longest` and `shortest` also decide the order: theirs, instead of the file's.
      in_groups: groups to choose from; None for all.
    """
    rows = [r for r in step.rows if r.wanted and (in_groups is None or r.group in in_groups)]
    count = filters.longest or filters.shortest
    if not count:
        return groups(rows)
    known = [row for row in rows if row.response.length is not None]
    known.sort(key=lambda row: row.response.length, reverse=bool(filters.longest))
    return groups(known[:count])


def limited(chosen: Sequence[Sequence[Row]], limit: int) -> list[list[Row]]:
    """Returns the first groups until the limit on responses is reached; 0 is none."""
    found, left = [], limit or sum(map(len, chosen))
    for rows in chosen:
        if left <= 0:
            break
        found.append(list(rows[:left]))
        left -= len(rows)
    return found
