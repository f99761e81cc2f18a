"""One call of the engine: the loop between the host's schedule and the devices' programs."""

import jax
import numpy as np

from luspo_jax.images import batch
from luspo_jax.ops.paged_attention import Places, Shared, most_groups
from luspo_jax.ops.paged_prefill import Runs
from luspo_jax.ops.sizes import bucket_count, rounded_up
from luspo_jax.rollout import programs
from luspo_jax.rollout.pool import PagePool
from luspo_jax.rollout.records import RolloutStats
from luspo_jax.rollout.sampling import seed_key
from luspo_jax.rollout.schedule import Job, Shard, common_prefix, dealt, samples_of

SMALLEST_RUN = 64  # tokens of the shortest prefill program
LONGEST_RUN = 2_048  # tokens of the longest, but for prompts with images
_REFILL = 1 / 16  # share of the rows that must be free before they are refilled
_FEWEST_STEPS = 8  # a chunk shorter than this, for want of pages, preempts


class Loop:
    """Samples the responses to some requests with an Engine.

    `device` has the functions of `programs`: a rehearsal gives others, which only count.
    """

    def __init__(self, engine, params, requests, group_size, noise, device=programs):
        """`noise` is (seed, step): the step is of requests that name none, and the number of steps
        that the policy has taken."""
        self.engine, self.params, self.device = engine, params, device
        seed, self.version = noise
        self.key, self.group_size = seed_key(seed), group_size
        parts, unit = engine.row_multiple, engine.page_tokens
        # Those that have ended are counted too: calls of a run have one size, and one program.
        total = len(requests) * group_size
        self.counts = engine.row_counts(total)
        self.num_pages = engine.pages_of(engine.cache.gb * 1e9, total)
        self.responses = [None] * total
        self.prompt_ids = {}  # key of a request -> expert ids of its tokens but the last
        samples = self._unended(samples_of(requests, group_size, engine.sampling, self.version))
        model = engine.how.model
        root = common_prefix(requests, model.image_token_id, unit)
        self.shards = [
            Shard(
                own,
                PagePool(self.num_pages),
                page_tokens=unit,
                rows=self.counts[0],
                root=root,
            )
            for own in dealt(samples, parts)
        ]
        self.offsets = {}  # key of a request -> rotary position minus index, after its images
        self.pages = None
        self.finished = total - len(samples)
        self.generated = self.decode_steps = self.row_steps = 0
        self.prefill_calls = 0
        self.read = dict.fromkeys(("prompt", "continued", "again"), 0)  # tokens, by kind of job
        self.in_use = []

    def _unended(self, samples):
        """Keeps the responses that have ended; returns the others."""
        rest = []
        for sample in samples:
            request = sample.request
            begun = request.begun[sample.sample_id] if request.begun else None
            if begun is not None and begun.ended:
                self.responses[sample.index] = begun
            else:
                rest.append(sample)
        return rest

    def run(self, progress, until=None):
        """Samples until all responses have ended, or `until` says that enough have.

        `until` is asked every chunk_length decode steps, which every process counts for itself; one
        whose responses have all ended goes on asking.
        """
        next_look = self.engine.chunk_length
        while until is not None or self.finished < len(self.responses):
            if self.finished < len(self.responses):
                self._advance(progress)
            if until is None:
                continue
            if self.finished == len(self.responses) or self.decode_steps >= next_look:
                if until([response is not None for response in self.responses]):
                    break
                next_look = max(next_look, self.decode_steps + 1)
                next_look += -next_look % self.engine.chunk_length
        for shard in self.shards:
            for sample in [*shard.admitted, *shard.waiting]:
                self.responses[sample.index] = self._response(sample, ended=False)

    def _advance(self, progress):
        """Decodes a chunk, after the prefills that must come before it."""
        engine, total = self.engine, len(self.responses)
        if self.pages is None:
            self.pages = self.device.empty_pages(
                num_pages=self.num_pages * engine.pools,
                page_size=engine.page_size,
                how=engine.how,
                dtype=engine.cache_dtype.name,
            )
        self._admit()
        if any(job.ready for shard in self.shards for job in shard.jobs):
            self._prefill()
            self._start()
            admitted = sum(len(shard.admitted) for shard in self.shards)
            decoding = sum(len(shard.decoding) for shard in self.shards)
            pending = any(shard.jobs for shard in self.shards)
            if pending and 2 * decoding < admitted:
                return  # most rows would stand idle
        if not any(shard.decoding for shard in self.shards):
            raise RuntimeError("no response can go on; this is a bug of the schedule")
        before = self.finished
        self._decode()
        if progress is not None and self.finished > before:
            progress(self.finished, total)

    def stats(self, clock, seconds):
        """Returns the RolloutStats."""
        engine = self.engine
        return RolloutStats(
            decode_steps=self.decode_steps,
            prefill_tokens=self.read["prompt"],
            prefill_calls=self.prefill_calls,
            generated_tokens=self.generated,
            slot_utilisation=self.generated / self.row_steps if self.row_steps else 0.0,
            compilations=clock.count,
            compile_seconds=clock.seconds,
            seconds=seconds - clock.seconds,
            recomputed_tokens=self.read["again"],
            continued_tokens=self.read["continued"],
            preemptions=sum(shard.preemptions for shard in self.shards),
            page_size=engine.page_size,
            pages_total=(self.num_pages - 1) * engine.row_multiple,
            pages_peak=max(self.in_use, default=0),
            pages_in_use=tuple(self.in_use),
            cache_bytes=self.num_pages * engine.page_bytes,
        )

    # ------------------------------------------------------------ admission and prefill

    def _admit(self):
        for shard in self.shards:
            shard.admit()
        for shard in self.shards:
            if shard.free_rows and not shard.waiting:
                full = [other for other in self.shards if other.waiting and not other.free_rows]
                if full:
                    shard.steal(max(full, key=lambda other: len(other.waiting)))
                    shard.admit()
        self._start()

    def _start(self):
        """Starts what is read, and copies the pages that are needed for it."""
        found = [shard.start() for shard in self.shards]
        if self.engine.record_experts:
            self._keep_prompt_ids()
        most = max(map(len, found))
        if not most:
            return
        size, past = min(self.counts[0], _power_of_4(most)), self.num_pages
        sources = np.zeros((len(found), size), np.int32)
        targets = np.full((len(found), size), past, np.int32)
        for row, pairs in enumerate(found):
            for i, (source, target) in enumerate(pairs):
                sources[row, i], targets[row, i] = source, target
        self.pages = self.device.copy_pages(
            self.pages, sources.reshape(-1), targets.reshape(-1), layout=self.engine.layout
        )

    def _keep_prompt_ids(self):
        for shard in self.shards:
            for key, prompt in shard.prompts.items():
                if key not in self.prompt_ids and prompt.job.done:
                    before = prompt.job.after.ids if prompt.job.after else []
                    self.prompt_ids[key] = [*before, *prompt.job.ids]

    def _prefill(self):
        """Reads one run of as many jobs as one prefill takes."""
        engine, parts = self.engine, self.engine.row_multiple
        ready = [[job for job in shard.jobs if job.ready] for shard in self.shards]
        length = self.run_length([jobs[0] for jobs in ready if jobs])
        most = max(1, engine.max_prefill_tokens // (length * parts))
        taken = [[j for j in jobs if j.least <= length][:most] for jobs in ready]
        # Where a program costs more to compile than its padding to compute: one a length.
        rows = rounded_up(max(map(len, taken)), 1) if engine.by_row else most
        runs, tokens = self._runs(taken, rows, length)
        images = None
        if engine.how.model.vision is not None:
            images = self._images(taken, rows, length)
        self.pages, ids = self.device.prefill(
            self.params,
            self.pages,
            runs,
            tokens,
            images,
            how=engine.how,
            record=engine.record_experts,
        )
        self.prefill_calls += 1
        ids = jax.device_get(ids)
        for part, jobs in enumerate(taken):
            for i, job in enumerate(jobs):
                count = int(runs.counts_R[part * rows + i])
                if ids is not None:
                    job.ids.append(ids[part * rows + i, :count].copy())
                self.read[job.kind] += count
                job.at += count

    def run_length(self, jobs):
        """Tokens of the rows of a prefill that begins with these jobs."""
        unit, engine = self.engine.page_tokens, self.engine
        smallest = -(-SMALLEST_RUN // unit) * unit
        longest = max(smallest, min(LONGEST_RUN, engine.max_prefill_tokens) // unit * unit)
        wanted = min(longest, max(job.remaining for job in jobs))
        wanted = max(wanted, *(job.least for job in jobs)) if jobs else wanted
        most = -(-max(engine.max_length, wanted) // unit) * unit
        if engine.by_row:
            return min(most, smallest * bucket_count(-(-wanted // smallest)))
        return rounded_up(wanted, smallest, most)

    def _runs(self, taken, rows, length):
        """Returns (Runs, (tokens_RT, offsets_R)) of the next run of each job."""
        unit, count = self.engine.page_tokens, rows * len(taken)
        tokens_RT = np.zeros((count, length), np.int32)
        tables_RM = np.zeros((count, self.engine.table_width), np.int32)
        starts_R, counts_R, offsets_R = (np.zeros(count, np.int32) for _ in range(3))
        for part, jobs in enumerate(taken):
            for row, job in enumerate(jobs, start=part * rows):
                size = job.remaining
                if size > length:
                    size = length - length % unit
                tokens_RT[row, :size] = job.tokens[job.at : job.at + size]
                tables_RM[row, : len(job.table)] = job.table
                starts_R[row], counts_R[row] = job.at, size
                offsets_R[row] = self._offset(job.request) if job.at else 0
        return Runs(tables_RM, starts_R, counts_R), (tokens_RT, offsets_R)

    def _offset(self, request):
        """Rotary position minus index, after a prompt's images."""
        if not request.images:
            return 0
        found = self.offsets.get(request.key)
        if found is None:
            tokens = np.asarray(request.tokens)
            after = batch.positions(tokens, request.images, self.engine.how.model)[1]
            found = self.offsets[request.key] = after - len(tokens)
        return found

    def _images(self, taken, rows, length):
        placed = {
            part * rows + i: job for part, jobs in enumerate(taken) for i, job in enumerate(jobs)
        }
        engine = self.engine
        return run_images(
            placed,
            engine.how.model,
            shape=(rows * len(taken), length),
            multiple=engine.row_multiple,
        )

    # ------------------------------------------------------------ decoding

    def _decode(self):
        engine, record = self.engine, self.engine.record_experts
        steps = self._steps()
        if not any(shard.decoding for shard in self.shards):
            return  # all were preempted for others that are still to be read
        for shard in self.shards:
            shard.grow(steps, record)
        self.in_use.append(sum(shard.pool.in_use for shard in self.shards))
        decoding = [shard.decoding for shard in self.shards]
        most = max(map(len, decoding))
        rows = min(count for count in self.counts if count >= most)
        order = [self._ordered(shard) for shard in self.shards]
        idle = rows * len(order) - sum(map(len, decoding))
        chunk_rows = self._rows(order, rows, steps, idle + self._leave_after(decoding, rows))
        self.pages, chunk = self.device.decode_chunk(
            self.params,
            self.pages,
            chunk_rows,
            how=engine.how,
            sampling=engine.sampling,
            chunk_length=engine.chunk_length,
            record=record,
        )
        chunk = jax.device_get(chunk)
        taken = int(chunk.steps)
        self.decode_steps += taken
        self.row_steps += taken * rows * len(order)
        self._harvest(order, rows, chunk)

    def _steps(self):
        """Steps of the next chunk, for which there are pages; preempts where there are few."""
        engine, record = self.engine, self.engine.record_experts
        steps = engine.chunk_length
        if any(shard.jobs for shard in self.shards):
            steps = max(1, steps // 4)  # the next run is not to wait long
        fewest = min(_FEWEST_STEPS, steps)
        for shard in self.shards:
            while (found := shard.most_steps(steps, record)) < fewest:
                shard.make_room()
            steps = min(steps, found)
        return steps

    def _leave_after(self, decoding, rows):
        """Number of responses that end before the host looks again."""
        count = sum(map(len, decoding))
        if any(shard.waiting or shard.jobs for shard in self.shards):
            return max(1, min(count, int(_REFILL * self.counts[0] * len(decoding))))
        if rows > self.counts[-1]:  # until fewer rows will do
            fewer = max(n for n in self.counts if n < rows)
            return max(1, count - fewer)
        return count

    def _ordered(self, shard):
        """The responses of a device, longest first: neighbours are of about one length."""
        return sorted(shard.decoding, key=lambda sample: (-sample.length, sample.index))

    def _rows(self, order, rows, steps, leave_at):
        engine, count = self.engine, rows * len(order)
        tables_BM = np.zeros((count, engine.table_width), np.int32)
        columns = {
            name: np.zeros(count, kind)
            for name, kind in (
                ("tokens_B", np.int32), ("offsets_B", np.int32), ("limits_B", np.int32),
                ("drawn_B", bool), ("steps_B", np.uint32), ("prompt_ids_B", np.uint32),
                ("sample_ids_B", np.uint32),
            )
        }  # fmt: skip
        positions_B, real_B = np.zeros(count, np.int32), np.zeros(count, bool)
        for part, samples in enumerate(order):
            for row, sample in enumerate(samples, start=part * rows):
                tables_BM[row, : len(sample.table)] = sample.table
                positions_B[row], real_B[row] = sample.position, True
                values = (
                    sample.last_token, self._offset(sample.request), sample.limit, sample.drawn,
                    sample.step, sample.request.prompt_id, sample.sample_id,
                )  # fmt: skip
                for column, value in zip(columns.values(), values, strict=True):
                    column[row] = value
        shared = None
        if engine.how.paged_attention == "blocks":
            shared = _shared(order, rows, tables_BM, min(self.group_size, rows))
        return programs.Rows(
            places=Places(tables_BM, positions_B, real_B, shared),
            key=self.key,
            max_steps=np.int32(steps),
            leave_at=np.int32(leave_at),
            **columns,
        )

    def _harvest(self, order, rows, chunk):
        """Takes in a Chunk of NumPy arrays; responses that have ended leave."""
        steps = int(chunk.steps)
        tokens_BC = np.ascontiguousarray(chunk.tokens_CB[:steps].T)
        logprobs_BC = np.ascontiguousarray(chunk.logprobs_CB[:steps].T)
        ids_CBLK = chunk.expert_ids_CBLK
        for part, samples in enumerate(order):
            for row, sample in enumerate(samples, start=part * rows):
                count, read = int(chunk.counts_B[row]), int(chunk.read_B[row])
                sample.extend(
                    tokens_BC[row, :count].copy(),
                    logprobs_BC[row, :count].copy(),
                    None if ids_CBLK is None else ids_CBLK[:read, row].copy(),
                )
                if count:
                    sample.drawn = sample.ends(self.engine.sampling.stop_token_ids)
                if not chunk.live_B[row]:
                    self._finish(self.shards[part], sample)
        self.generated += int(chunk.counts_B.sum())

    def _finish(self, shard, sample):
        self.responses[sample.index] = self._response(sample)
        shard.finish(sample)
        self.finished += 1

    def _response(self, sample, ended=True):
        ids, stops = None, self.engine.sampling.stop_token_ids
        if self.engine.record_experts and sample.expert_ids:
            ids = self._prompt_ids(sample)
        return sample.response(stops, self.version, ids, ended)

    def _prompt_ids(self, sample):
        """The expert ids of all tokens of the prompt; one array for all responses of this call."""
        if sample.prompt_ids is not None:
            return sample.prompt_ids
        key = sample.request.key
        found = self.prompt_ids.get(key)
        if not isinstance(found, np.ndarray):
            found = np.concatenate([*(found or []), sample.expert_ids[0][:1]])
            self.prompt_ids[key] = found
        return found


def _power_of_4(count):
    """The least of 1, 4, 16, … that reaches `count`: few programs, and little is copied in vain."""
    size = 1
    while size < count:
        size *= 4
    return size


def _shared(order, rows, tables_BM, width):
    """Returns the Shared of rows: those of a prompt are a group."""
    count, pages_M = tables_BM.shape
    skipped_B, own_BM = np.zeros(count, np.int32), tables_BM.copy()
    members_BW, places_B = np.zeros((count, width), np.int32), np.full(count, -1, np.int32)
    group_pages_B = np.zeros(count, np.int32)
    group_tables_BM = np.zeros((count, pages_M), np.int32)
    for part, samples in enumerate(order):
        members, first = {}, part * rows
        for row, sample in enumerate(samples):
            if sample.prompt.pages:
                members.setdefault(sample.prompt, []).append(row)
        groups = [found for found in members.items() if len(found[1]) > 1]
        groups.sort(key=lambda found: -len(found[0].pages) * (len(found[1]) - 1))
        for group, (prompt, found) in enumerate(groups[: most_groups(rows, width)]):
            pages, own = len(prompt.pages), first + np.array(found)
            members_BW[first + group, : len(found)] = found
            places_B[own] = group * width + np.arange(len(found))
            group_tables_BM[first + group, :pages] = prompt.pages
            group_pages_B[first + group] = skipped_B[own] = pages
            own_BM[own, : pages_M - pages] = tables_BM[own, pages:]
    return Shared(skipped_B, own_BM, members_BW, places_B, group_tables_BM, group_pages_B)


def run_images(placed: dict[int, Job], config, *, shape, multiple=1):
    """Returns the PromptImages of a prefill; None if no run of it has an image.

    Args:
      placed: row → its job.
      config: the DecoderConfig.
      shape: (rows, tokens) of the prefill.
      multiple: number of devices that share the images.
    """
    pictured = {row: job for row, job in placed.items() if job.least}
    images = [image for job in pictured.values() for image in job.request.images]
    if not images:
        return None
    # Prompts do not share images here: with fewer rows, the last bits of embeddings would differ.
    stacked = batch.in_slots(
        [(image.patches(), image.grid_thw) for image in images],
        config.vision,
        count=rounded_up(len(images), multiple),
    )
    units_RT = np.full(shape, -1, np.int32)
    positions_RT3 = np.zeros((*shape, 3), np.int32)
    at_T = np.arange(shape[1], dtype=np.int32)
    first = 0
    for row, job in placed.items():
        request, offset = job.request, 0
        if request.images:
            tokens = np.asarray(request.tokens)
            positions_T3, after = batch.positions(tokens, request.images, config)
            offset = after - len(tokens)
        positions_RT3[row] = (job.at + offset + at_T)[:, None]
        if row in pictured:
            own = range(first, first + len(request.images))
            first += len(request.images)
            units_T = batch.places(tokens, request.images, own, stacked.num_units, config)[0]
            size = min(shape[1], len(tokens) - job.at)
            units_RT[row, :size] = units_T[job.at : job.at + size]
            positions_RT3[row, :size] = positions_T3[job.at : job.at + size]
    return programs.PromptImages(stacked.images, units_RT, positions_RT3)
