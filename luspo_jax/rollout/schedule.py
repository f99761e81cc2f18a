"""The host side of a rollout: which responses have pages, which are read, decoded or wait.

Nothing here knows a device or a token's meaning; it is about counts, so it is the same in every run
of the same requests.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from luspo_jax.rollout.pool import PagePool
from luspo_jax.rollout.records import Request, Response
from luspo_jax.rollout.sampling import Sampling


@dataclasses.dataclass(eq=False)
class Job:
    """Tokens to be read into pages, run after run.

    Attributes:
      request: the prompt that the tokens begin with.
      tokens: int32, from position 0 up to the last to be read.
      table: pages of these positions.
      at: position that is read next, where a page begins; `len(tokens)` if done.
      after: a job that must be done before.
      kind: what the tokens are: of a "prompt", "continued" from an earlier step, or "again" those
        of a response that was preempted.
      ids: expert ids of the tokens read, in pieces, if recorded.
    """

    request: Request
    tokens: np.ndarray
    table: list[int]
    at: int
    after: "Job | None" = None
    kind: str = "prompt"
    ids: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens not read yet."""
        return len(self.tokens) - self.at

    @property
    def least(self) -> int:
        """Tokens that the next run must have: what is left of a prompt with images is one run."""
        return max(0, len(self.request.tokens) - 1 - self.at) if self.request.images else 0

    @property
    def done(self) -> bool:
        """Whether all is read, of earlier jobs too."""
        return self.remaining == 0 and (self.after is None or self.after.done)

    @property
    def ready(self) -> bool:
        """Whether a run of it may be read now."""
        return self.remaining > 0 and (self.after is None or self.after.done)


@dataclasses.dataclass(eq=False)
class Prompt:
    """The pages of a prompt but for its last token, which every response reads itself.

    Attributes:
      job: reads them.
      pages: full ones, shared by the responses.
      rest: the page of what fills none; copied for each response, the last one takes it.
      users: responses that have pages now.
      waiting: responses that have none yet, or none any more.
    """

    job: Job
    pages: list[int]
    rest: int | None
    users: int = 0
    waiting: int = 0


@dataclasses.dataclass(eq=False)
class Sample:
    """A response on its way, its tokens in pieces.

    Attributes:
      request: its prompt.
      index: of the response in the result.
      sample_id: of its noise.
      limit: tokens, the prompt's included, at which it is cut.
      length: tokens so far, the prompt's included.
      drawn: whether the response has ended and its last token is still to be read.
      table: its pages; while it waits, none.
      prompt: its Prompt while it has pages.
      job: reads what the prompt's pages lack, if any.
      turn: the count of admissions when it was admitted; the youngest has the largest.
      started: whether it is decoded.
      step: the step that began it.
      versions: of the tokens that it had at the beginning.
      prompt_ids: expert ids of the prompt's tokens, if an earlier call recorded them for it.
    """

    request: Request
    index: int
    sample_id: int
    limit: int
    length: int
    drawn: bool = False
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    expert_ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    table: list[int] = dataclasses.field(default_factory=list)
    prompt: Prompt | None = None
    job: Job | None = None
    turn: int = -1
    started: bool = False
    step: int = 0
    versions: np.ndarray | None = None
    prompt_ids: np.ndarray | None = None

    @property
    def position(self) -> int:
        """Position of the token that it reads next: its last."""
        return self.length - 1

    @property
    def last_token(self) -> int:
        """The token that it reads next."""
        return int(self.tokens[-1][-1] if self.tokens else self.request.tokens[-1])

    def reads(self, steps: int, record: bool) -> int:
        """Returns the most tokens that it reads in `steps` steps."""
        rest = 1 if self.drawn else self.limit - self.length + int(record)
        return min(steps, rest)

    def extend(self, tokens, logprobs, expert_ids=None):
        """Appends the tokens and log-probs of one chunk, and the expert ids of what it read.

        Raises:
          FloatingPointError: a log-probability is not finite.
        """
        if not np.isfinite(logprobs).all():
            raise FloatingPointError(
                f"prompt_id {self.request.prompt_id}, sample_id {self.sample_id}: the sampler's "
                "log-probabilities are not finite; look for NaN or Inf in params"
            )
        if len(tokens):
            self.tokens.append(tokens)
            self.logprobs.append(logprobs)
        if expert_ids is not None:
            self.expert_ids.append(expert_ids)
        self.length += len(tokens)

    def ends(self, stop_token_ids) -> bool:
        """Whether its last token is its last."""
        if not self.tokens:
            return False
        return self.last_token in stop_token_ids or self.length >= self.limit

    def response(self, stop_token_ids, version: int, prompt_ids_TLK=None, ended=True) -> Response:
        """Returns the Response.

        Args:
          stop_token_ids: of the sampling.
          version: of the policy that drew what was not there at the beginning.
          prompt_ids_TLK: expert ids of the prompt, if recorded and read.
          ended: whether the response does not go on later.
        """
        tokens = np.concatenate([np.zeros(0, np.int32), *self.tokens])
        before = np.zeros(0, np.uint32) if self.versions is None else self.versions
        drawn = np.full(len(tokens) - len(before), version, np.uint32)
        # The first token that a response reads is its prompt's last.
        own = None if prompt_ids_TLK is None else np.concatenate(self.expert_ids)[1:]
        return Response(
            prompt_id=self.request.prompt_id,
            sample_id=self.sample_id,
            step=self.step,
            tokens=tokens,
            logprobs=np.concatenate([np.zeros(0, np.float32), *self.logprobs]),
            versions=np.concatenate([before, drawn]),
            stopped=len(tokens) > 0 and int(tokens[-1]) in stop_token_ids,
            ended=ended,
            expert_ids=own,
            prompt_expert_ids=prompt_ids_TLK,
        )


def samples_of(
    requests: Sequence[Request], group_size: int, sampling: Sampling, step: int
) -> list[Sample]:
    """Returns the samples of all requests, request-major, with the tokens that they have.

    A response has as many tokens as the sampling allows, or its request's limit. `step` began those
    whose request names none.
    """
    longest, samples = sampling.max_response_length, []
    for index, request in enumerate(requests):
        for sample_id, limit in enumerate(request.limits(group_size, longest)):
            sample = Sample(
                request,
                index * group_size + sample_id,
                sample_id,
                len(request.tokens) + limit,
                len(request.tokens),
                step=step if request.step is None else request.step,
            )
            if request.begun:
                _begin(sample, request.begun[sample_id])
            sample.drawn = sample.ends(sampling.stop_token_ids)
            samples.append(sample)
    return samples


def _begin(sample, begun):
    """Gives a sample the tokens of its response so far."""
    if len(begun.tokens):
        sample.tokens, sample.logprobs = [begun.tokens], [begun.logprobs]
        sample.versions, sample.length = begun.versions, sample.length + len(begun.tokens)
    if begun.expert_ids is not None:
        sample.prompt_ids = begun.prompt_expert_ids
        sample.expert_ids = [begun.prompt_expert_ids[-1:], begun.expert_ids]


def dealt(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Deals samples to `parts` devices: as many to each, groups together; first those that earlier
    steps began, then the longest prompts.

    Prompts of a prefill then need little padding, and what is long already lies on all devices.
    """
    groups = [list(group) for _, group in itertools.groupby(samples, lambda s: s.request.key)]
    groups.sort(key=lambda group: (group[0].step, -len(group[0].request.tokens)))
    if any(sample.tokens for sample in samples):
        return _one_by_one(groups, parts)
    if len(groups) % parts == 0:  # devices side by side read prompts of about one length
        return [[s for group in groups[part::parts] for s in group] for part in range(parts)]
    flat = [sample for group in groups for sample in group]
    size = -(-len(flat) // parts)
    return [flat[part * size : (part + 1) * size] for part in range(parts)]


def _one_by_one(groups, parts):
    """Deals each group to the device with the fewest samples; what is too many goes to the next."""
    found, most = [[] for _ in range(parts)], -(-sum(map(len, groups)) // parts)
    for group in groups:
        while group:
            own = min(found, key=len)
            room = most - len(own)
            own += group[:room]
            group = group[room:]
    return found


def common_prefix(requests: Sequence[Request], image_token: int | None, unit: int) -> np.ndarray:
    """Returns the tokens that all prompts begin with, whole units of them, before any image.

    At least the last token of every prompt is left out.
    """
    if len(requests) < 2:
        return np.zeros(0, np.int32)
    first = np.asarray(requests[0].tokens)
    size = min(len(request.tokens) for request in requests) - 1
    for request in requests[1:]:
        tokens = np.asarray(request.tokens)
        differ = np.flatnonzero(tokens[:size] != first[:size])
        size = int(differ[0]) if len(differ) else size
    if image_token is not None:
        images = np.flatnonzero(first[:size] == image_token)
        size = int(images[0]) if len(images) else size
    return first[: size - size % unit].astype(np.int32)


class Shard:
    """The responses of one device along "batch", their pages, and who is next.

    A response is admitted while a row and pages are free. If pages run out, the youngest gives its
    own back and waits at the head of the queue, with the tokens it has.
    """

    def __init__(self, samples, pool: PagePool, *, page_tokens: int, rows: int, root: np.ndarray):
        """
        Args:
          samples: in the order in which they are admitted.
          pool: its pages.
          page_tokens: tokens of a page.
          rows: most responses with pages.
          root: tokens that all prompts begin with, whole pages.
        """
        self.pool, self.page_tokens, self.rows = pool, page_tokens, rows
        self.waiting = collections.deque(samples)
        self.admitted: list[Sample] = []
        self.jobs: list[Job] = []
        self.prompts: dict[tuple[int | None, int], Prompt] = {}
        self.turns = self.preemptions = 0
        self.crowded = False  # nobody is admitted between a preemption and an end
        self.root = None
        if len(root) and samples:
            table = pool.take(len(root) // page_tokens)
            self.root = Job(Request(0, root), root, table, 0)
            self.jobs.append(self.root)

    @property
    def decoding(self) -> list[Sample]:
        """Responses that are decoded."""
        return [sample for sample in self.admitted if sample.started]

    @property
    def free_rows(self) -> int:
        """Rows without a response."""
        return self.rows - len(self.admitted)

    # ------------------------------------------------------------ admission

    def admit(self) -> None:
        """Admits responses in order while a row and pages are free."""
        while self.waiting and self.free_rows > 0 and not (self.crowded and self.admitted):
            sample = self.waiting[0]
            # Room for those that are decoded to grow a little, else they would be preempted soon.
            kept = len(self.admitted) // 4
            if self._pages_of(sample) + kept > self.pool.free:
                if self._drop_idle_prompts(but=sample.request.key):
                    continue
                return
            self._assign(self.waiting.popleft())

    def _pages_of(self, sample):
        """Pages to take when `sample` is admitted."""
        prompt = self.prompts.get(sample.request.key)
        read = len(sample.request.tokens) - 1
        count = 0
        if prompt is None:
            count = -(-read // self.page_tokens) - len(self._root_pages())
        full = read - read % self.page_tokens
        return count + -(-(sample.position - full) // self.page_tokens)

    def _root_pages(self):
        return self.root.table if self.root else []

    def _assign(self, sample):
        prompt = self.prompts.get(sample.request.key) or self._new_prompt(sample.request)
        prompt.users += 1
        prompt.waiting -= 1
        full = len(prompt.pages) * self.page_tokens
        self.pool.share(prompt.pages)
        own = self.pool.take(-(-(sample.position - full) // self.page_tokens))
        sample.prompt, sample.table, sample.job = prompt, [*prompt.pages, *own], None
        first = sample.turn < 0
        sample.turn, self.turns = self.turns, self.turns + 1
        self.admitted.append(sample)
        if own and (sample.tokens or prompt.rest is None):
            tokens = np.concatenate([np.asarray(sample.request.tokens), *sample.tokens])
            sample.job = Job(
                sample.request,
                tokens[: sample.position].astype(np.int32),
                sample.table,
                full,
                after=prompt.job,
                kind="continued" if sample.versions is not None and first else "again",
            )
            self.jobs.append(sample.job)

    def _new_prompt(self, request):
        read = len(request.tokens) - 1
        root = self._root_pages()
        self.pool.share(root)
        full = [*root, *self.pool.take(read // self.page_tokens - len(root))]
        rest = self.pool.take(1)[0] if read % self.page_tokens else None
        table = full if rest is None else [*full, rest]
        at = len(root) * self.page_tokens
        tokens = np.asarray(request.tokens)[:read].astype(np.int32)
        job = Job(request, tokens, table, at, self.root)
        if job.remaining:
            self.jobs.append(job)
        waiting = sum(s.request.key == request.key for s in self.waiting)
        prompt = Prompt(job, full, rest, waiting=waiting + 1)
        self.prompts[request.key] = prompt
        return prompt

    def start(self) -> list[tuple[int, int]]:
        """Starts the responses whose prompt, and own tokens, are read.

        Returns:
          (source, target) of pages that must be copied before anything else is done.
        """
        copies = []
        self.jobs = [job for job in self.jobs if not job.done]
        for sample in self.admitted:
            prompt = sample.prompt
            if sample.started or not (sample.job or prompt.job).done:
                continue
            sample.started = True
            if sample.job is None and len(sample.table) > len(prompt.pages):
                if self._needs_rest(prompt, sample):
                    copies.append((prompt.rest, sample.table[-1]))
                else:  # the last one takes the page itself
                    self.pool.give_back(sample.table[-1:])
                    sample.table[-1], prompt.rest = prompt.rest, None
            sample.job = None
        return copies

    def _needs_rest(self, prompt, but):
        """Whether another response is still to begin with the prompt's last page."""
        return prompt.waiting > 0 or any(
            s.prompt is prompt and not s.started and s.job is None and s is not but
            for s in self.admitted
        )

    # ------------------------------------------------------------ pages for the next steps

    def most_steps(self, steps: int, record: bool) -> int:
        """Returns the most steps, up to `steps`, for which there are pages."""
        low, high = 0, steps
        while low < high:
            middle = (low + high + 1) // 2
            if self._growth(middle, record) <= self.pool.free:
                low = middle
            else:
                high = middle - 1
        return low

    def grow(self, steps: int, record: bool) -> None:
        """Takes the pages that all started responses need for `steps` steps."""
        for sample in self.decoding:
            sample.table += self.pool.take(self._own_growth(sample, steps, record))

    def _growth(self, steps, record):
        return sum(self._own_growth(sample, steps, record) for sample in self.decoding)

    def _own_growth(self, sample, steps, record):
        end = sample.position + sample.reads(steps, record)
        return max(0, -(-end // self.page_tokens) - len(sample.table))

    def make_room(self) -> None:
        """Frees pages: of prompts that nobody reads now, else of the youngest response.

        Raises:
          RuntimeError: only one response has pages.
        """
        if self._drop_idle_prompts():
            return
        if len(self.admitted) < 2:
            raise RuntimeError("one response alone does not fit into the pool of pages")
        youngest = max(self.admitted, key=lambda sample: sample.turn)
        self._leave(youngest)
        youngest.prompt.waiting += 1
        youngest.started, youngest.prompt = False, None
        self.waiting.appendleft(youngest)
        self.preemptions, self.crowded = self.preemptions + 1, True

    def _drop_idle_prompts(self, but=None):
        """Frees the prompts without users; returns whether there were any."""
        idle = [key for key, prompt in self.prompts.items() if not prompt.users and key != but]
        for key in idle:
            self._release(key)
        return bool(idle)

    def _release(self, key):
        prompt = self.prompts.pop(key)
        if prompt.job in self.jobs:
            self.jobs.remove(prompt.job)
        self.pool.give_back(prompt.pages)
        if prompt.rest is not None:
            self.pool.give_back([prompt.rest])

    def _leave(self, sample):
        self.admitted.remove(sample)
        if sample.job in self.jobs:
            self.jobs.remove(sample.job)
        sample.job = None
        self.pool.give_back(sample.table)
        sample.table = []
        sample.prompt.users -= 1

    # ------------------------------------------------------------ after a chunk

    def finish(self, sample: Sample) -> None:
        """Takes the pages of a response that has ended."""
        self._leave(sample)
        self.crowded, prompt = False, sample.prompt
        if not prompt.users and not prompt.waiting:
            self._release(sample.request.key)

    def steal(self, other: "Shard") -> None:
        """Takes the last waiting response of `other`, which has no row for it.

        Only one that had none before: the pages of its prompt are on the other device more likely.
        """
        sample = other.waiting[-1]
        if sample.turn >= 0:
            return
        other.waiting.pop()
        left = other.prompts.get(sample.request.key)
        if left is not None:
            left.waiting -= 1
            if not left.users and not left.waiting:
                other._release(sample.request.key)
        own = self.prompts.get(sample.request.key)
        if own is not None:
            own.waiting += 1
        self.waiting.append(sample)
