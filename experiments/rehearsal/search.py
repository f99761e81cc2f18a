"""Searches for changes that make a program fit, and for the fastest settings that fit.

Settings are compared by hand-counted bytes and times, which cost nothing; compiler results for the
current settings correct the bytes. Only the most promising settings are compiled.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from experiments.rehearsal import case as cases
from experiments.rehearsal import costs, programs, report, resident, tower
from experiments.rehearsal.case import Case
from luspo_jax.run import fields

Changes = dict[str, Any]  # dotted field → value
_COMPILED = 4  # settings that a search compiles, for training and for the rollout each
_TRAINING = ("log-probs", "log-probs (ref)", "update", "pressure")
_REMAT = ("none", "dots", "attention", "full")


def changed(case: Case, changes: Changes) -> Case:
    """Returns the case with fields changed.

    Raises:
      ConfigError, MeshError: incompatible fields.
    """
    config = case.config.copy_and_resolve_references()
    fields.assign(config, changes)
    lengths = case.lengths
    images = lengths.images
    return cases.build(
        config,
        case.topology,
        mean_length=lengths.mean,
        max_length=lengths.longest,
        images=images.count if images else 0,
        image_size=(images.height, images.width) if images else None,
    )


def advice(case: Case, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns, for every program that does not fit, the smallest change that should make it fit.

    Counted by hand and not compiled: {"program", "over_bytes", "change"}. The change makes all of
    training's programs fit, or all of the rollout's; it is empty if nothing here helps.
    """
    given = []
    for training in (False, True):
        records = {k: v for k, v in found["programs"].items() if (k in _TRAINING) == training}
        wrong = {name: one for name, one in records.items() if not one["fits"]}
        if not wrong:
            continue
        slowest = "update" if training else "decode chunk"
        fitting = [
            (len(changes), _speed(other, slowest), changes)
            for changes, other in (_training(case) if training else _rollout(case, found))
            if all(
                _predicted(case, other, name, found) <= one["usable_bytes"]
                for name, one in records.items()
            )
        ]
        best = min(fitting, key=lambda option: option[:2], default=(0, 0, {}))[2]
        given += [
            {"program": name, "over_bytes": one["over_bytes"], "change": best}
            for name, one in wrong.items()
        ]
    return given


def refusal(found: dict[str, Any]) -> str:
    """Describes the programs that do not fit, and what to change."""
    lines = [f"the run does not fit {found['topology']['name']}:"]
    for one in found["advice"]:
        lines.append(
            f"  - {one['program']} is {one['over_bytes'] / 1e9:.2f} GB "
            f"({one['over_bytes']:,.0f} bytes) a device over: {flags(one['change'])}"
        )
    return "\n".join(lines)


def flags(changes: Changes) -> str:
    """Formats changes as flags of a launcher."""
    if not changes:
        return "take a larger machine, shorter responses or a smaller model"
    return "set " + " ".join(f"--config.{name}={value}" for name, value in changes.items())


def search(
    case: Case, found: dict[str, Any], *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Returns the fastest settings of training and of the rollout whose programs compile and fit.

    Returns:
      {"changes", "fits", "step", "tried"}: fields to set, whether all programs then fit, the step's
      times with them, and every compiled setting with its verdict.
    """
    tried: list[dict[str, Any]] = []
    changes: Changes = {}
    for part, options in (
        (_TRAINING, list(_training(case))),
        (("prefill", "decode chunk"), list(_rollout(case, found))),
    ):
        best = _best(case, found, part, options, tried, say)
        if best is None:
            return {"changes": {}, "fits": False, "step": {}, "tried": tried}
        changes |= best
    other = changed(case, changes)
    step = report.step(other, programs.programs(other, pressure=False))
    return {"changes": changes, "fits": True, "step": step, "tried": tried}


def text(result: dict[str, Any]) -> str:
    """Describes the result of a search."""
    count = len(result["tried"])
    if not result["fits"]:
        return f"search: none of the {count} settings that were compiled fits"
    return (
        f"search: of {count} settings compiled, the fastest that fits: "
        f"{flags(result['changes']) if result['changes'] else 'the settings as they are'} "
        f"(step {result['step']['expected_s']:.0f} s as expected, "
        f"{result['step']['roofline_s']:.0f} s at the roofline)"
    )


def _best(case, found, names, options, tried, say):
    """Returns changes of the fastest option whose programs compile and fit; None if none does."""
    ranked = []
    for changes, other in options:
        present = [name for name in names if name in found["programs"]]
        limit = case.topology.chip.usable
        if all(_predicted(case, other, name, found) <= limit for name in present):
            ranked.append((sum(_speed(other, name) for name in present), len(changes), changes))
    ranked.sort(key=lambda option: option[:2])
    for _, _, changes in ranked[:_COMPILED]:
        other = changed(case, changes)
        records = {}
        for program in programs.programs(other):
            if program.name in names:
                say(f"search: {flags(changes) if changes else 'as it is'}: {program.name} …")
                made = programs.compiled(program) if changes else None
                records[program.name] = (
                    report.record(case.topology, program, made)
                    if changes
                    else found["programs"][program.name]
                )
                say(f"    {report.line(records[program.name])}")
        fits = all(one["fits"] for one in records.values())
        # fmt: off
        tried.append({"changes": changes, "fits": fits,
                      "peak_bytes": {n: one["peak_bytes"] for n, one in records.items()}})
        # fmt: on
        if fits:
            return changes
    return None


# ---------------------------------------------------------------- settings worth looking at


def _valid(case, options) -> Iterator[tuple[Changes, Case]]:
    """Yields options that a run would accept, without unchanged fields."""
    seen = []
    now = fields.flat(case.config)
    for option in options:
        changes = {name: value for name, value in option.items() if now[name] != value}
        if changes in seen:
            continue
        seen.append(changes)
        try:
            yield changes, changed(case, changes)
        except ValueError:
            continue


def _training(case):
    """Yields options: remat, rows at once, devices per row or for experts, tokens with logits."""
    config, devices = case.config, len(case.topology.devices) - case.apart
    contexts = [c for c in (1, 2, 4, 8, 16) if devices % c == 0]
    head = sorted({config.model.head_chunk_tokens, 512})
    experts = _expert_axes(case, config.mesh)
    options = []
    for remat, context, expert, chunk, times in itertools.product(
        _REMAT, contexts, experts, head, (1, 2, 4)
    ):
        option = {"model.remat": remat, "model.head_chunk_tokens": chunk}
        option |= {"mesh.context": context} if context != config.mesh.context else {}
        option |= {"mesh.expert": expert} if expert != config.mesh.expert else {}
        batch = devices // context // max(1, config.mesh.tensor)
        if config.train.packing:
            option["train.microbatch_tokens"] = times * batch * case.sizes.pack_length
        else:
            rows = case.sizes.responses_per_minibatch
            if times * batch > rows or rows % (times * batch):
                continue
            option["train.num_microbatches"] = rows // (times * batch)
        options.append(option)
    return _valid(case, [{}, *options])


def _expert_axes(case, mesh):
    """Returns the devices that share experts: unchanged, none, or a host's."""
    if not case.model.num_experts:
        return [mesh.expert]
    return sorted({mesh.expert, 1, case.topology.chip.host_devices})


def _rollout(case, found):
    """Yields options: rows and pages, offloading to host memory, devices that share the weights."""
    config = case.config
    offload = "both" if case.rule.objective.kl_coef else "optimizer"
    options: list[Changes] = [{}]
    experts = _expert_axes(case, config.rollout_mesh)
    now, tested = config.rollout.num_slots, config.eval.num_slots
    wanted = case.responses()
    for tensor, expert, waits in itertools.product(
        (1, 2, 4, 8), experts, (config.train.offload, offload)
    ):
        option = {"rollout_mesh.tensor": tensor, "train.offload": waits}
        option |= {"rollout_mesh.expert": expert} if expert != config.rollout_mesh.expert else {}
        try:
            other = changed(case, option)
        except ValueError:
            continue
        batch = other.engine.row_multiple
        slots = {wanted, now, now // 2 // batch * batch, batch}
        sized = [{}] + [{"rollout.cache_gb": gb} for gb in _rooms(other, found)]
        options += [
            option | room | {"rollout.num_slots": n, "eval.num_slots": min(n, tested)}
            for n in sorted(slots)
            if 0 < n <= max(now, wanted)
            for room in sized
        ]
    return _valid(case, options)


def _rooms(other, found):
    """Returns gigabytes of a device for pages: all that should be left, and parts of it."""
    least = max(other.engine.least_bytes, other.held_out.least_bytes)
    passing = [
        one["bytes"]["temporaries"]
        for name, one in found["programs"].items()
        if name.startswith(("prefill", "copy", "decode")) and not one["compiler_error"]
    ]
    free = other.topology.chip.usable - sum(resident.parked(other).values())
    free -= resident.weights_bytes(other) + max(passing, default=0)
    rooms = {math.floor(free * share / 1e6) / 1e3 for share in (1, 0.75, 0.5, 0.25)}
    return sorted(gb for gb in rooms | {math.ceil(least / 1e6) / 1e3} if gb * 1e9 >= least)


def _speed(case, name):
    """Returns the expected seconds of a program in a step, in which all responses end.

    Partial rollouts take far longer to play; which settings are faster is the same question.
    """
    if case.config.rollout.overlap:
        case = changed(case, {"rollout.overlap": 0})
    expected = report.rates(case.topology, report.EXPECTED)
    for program in programs.programs(case):
        if program.name == name:
            return report.seconds(case, program, expected)
    return 0.0


def _predicted(case, other, name, found):
    """Predicts bytes of a program with other settings: its bytes now, plus the counted change."""
    one = found["programs"][name]
    difference = _counted(other, name) - _counted(case, name)
    # If the compiler refused, its message names the bytes of its own arrays.
    own = (
        one["peak_bytes"]
        if not one["compiler_error"]
        else (one["usable_bytes"] + one["over_bytes"])
    )
    return own + difference


def _counted(case, name):
    """Counts bytes of a program's large arrays by hand, including what is resident beside it."""
    if name in _TRAINING:
        return _counted_training(case, name)
    held = resident.weights_bytes(case) + sum(resident.parked(case).values())
    if name.startswith("hand-over"):
        return held
    held_out = name.endswith(programs.HELD_OUT)
    engine = case.held_out if held_out else case.engine
    rows = engine.most_rows(case.responses(held_out))
    if name.startswith("copy"):
        passing = rows * engine.page_bytes
    elif name.startswith("decode"):
        passing = 4 * 4 * rows * case.model.vocab_size
    else:
        passing = 0.0
    return held + resident.pool_bytes(case, held_out) + passing


def _counted_training(case, name):
    part, width = case.train_parts, case.width
    sizes = case.sizes
    tokens = sizes.rows_per_microbatch * sizes.row_length / part.tokens
    model = case.model
    mlp_dim = model.mlp_dim if model.num_expert_layers < model.num_layers else 0
    layer = 16 * model.embed_dim + 3 * mlp_dim + 4 * model.num_heads * model.head_dim
    kept = {
        "none": layer, "full": model.embed_dim, "offload": model.embed_dim,
        "attention": model.embed_dim + model.num_heads * model.head_dim,
        "dots": 4 * model.embed_dim + 2 * mlp_dim + 2 * model.num_heads * model.head_dim,
    }[case.config.model.remat]  # fmt: skip
    scores = name.startswith("log-probs")
    if scores:
        kept = 0
    inside = 0 if case.config.model.remat == "none" and not scores else layer
    inside += model.experts_per_token * (6 * model.embed_dim + 7 * model.expert_dim)
    activations = width * tokens * (model.num_layers * kept + inside) / part.tensor
    unsummed = scores or case.adapter is not None
    head = costs.head(model) / part.tensor * (width + (0 if unsummed else 4))
    logits = 8 * case.config.model.head_chunk_tokens * model.vocab_size / part.tensor
    activations += _counted_images(case, name)
    names = ("params", "opt_state", "ref_params", "base")
    state = sum(resident.state_bytes(case, *names).values())
    gradients = 2 * resident.state_bytes(case, "params")["params"]
    return state + gradients + activations + head + logits


def _counted_images(case, name):
    """Counts a program's pixels, the tower's kept activations per micro-batch, and embeddings."""
    pictures, vision, part = case.lengths.images, case.model.vision, case.train_parts
    if pictures is None:
        return 0
    responses = case.sizes.responses_per_minibatch
    images = cases.images_at_once(case, responses)
    remat = "full" if name.startswith("log-probs") else case.config.model.remat
    kept = tower.activation_values(vision, remat) / part.tensor
    pixels = resident.device_bytes(tower.shapes(images, pictures, vision)) / images
    units = pictures.slots / vision.unit_patches * vision.out_dim
    own = images / part.tokens
    held = cases.plan(case, responses).num_microbatches * images / part.batch * pixels
    return held + case.width * (own * pictures.slots * kept + images * units)
