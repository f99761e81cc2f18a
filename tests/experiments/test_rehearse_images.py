"""Rehearsals of runs on images: what is assumed of images, and the tower's shapes and costs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.command import UsageError
from experiments.rehearsal import case as cases
from experiments.rehearsal import programs, report, resident, search, tower
from experiments.rehearsal.costs import Parts
from luspo_jax.images.preparer import PreparedImage
from luspo_jax.images.settings import ImageSettings
from luspo_jax.learner.state import abstract_state
from luspo_jax.models import vision
from luspo_jax.models.forward import Forward
from luspo_jax.ops import reference_attention
from luspo_jax.prompts import PromptRecord
from luspo_jax.rollout import Request
from luspo_jax.rollout import programs as rollout_programs
from luspo_jax.rollout.loop import run_images
from luspo_jax.rollout.schedule import Job
from tests import vl_cases
from tests.experiments.test_rehearse import assert_same_shapes, brought, machine, products

TEXT = 4  # tokens of a prompt besides its images'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vl")
    vl_cases.write_model(folder)
    return folder


def tiny(folder, **leaves):
    """Two layers of decoder and tower, and packed rows of 48 tokens."""
    config = vl_cases.config(folder)
    config.data.max_pixels = 112 * 112  # 16 tokens, a window of 4 × 4 patches each 4 of them
    config.data.max_prompt_length = 24
    config.rollout.max_response_length = 24
    config.rollout.prompts_per_step, config.rollout.num_slots = 16, 16
    config.eval.num_slots = 16
    config.train.packing, config.train.microbatch_tokens = True, 8 * 48
    config.train.num_length_buckets = 1
    config.model.head_chunk_tokens = 64
    for name, value in leaves.items():
        section, field = name.split("__")
        config[section][field] = value
    return config


def built(folder, *, devices=8, images=None, image_size=None, **leaves):
    config = tiny(folder, **leaves)
    return cases.build(
        config, machine(devices), mean_length=8, images=images, image_size=image_size
    )


# ---------------------------------------------------------------- what is assumed


def test_images_are_the_largest_square_that_limits_and_prompt_allow(folder):
    assumed = built(folder).lengths.images
    assert assumed == tower.Pictures(count=1, height=112, width=112, tokens=16, slots=64)
    # Of 24 tokens two images leave 10 each, with the two around each: 3 × 3 units.
    two = built(folder, images=2).lengths.images
    assert (two.count, two.height, two.tokens, two.slots) == (2, 84, 9, 64)
    free = built(folder, data__max_pixels=0).lengths.images
    assert (free.height, free.tokens) == (112, 16)  # 22 tokens hold 4 × 4
    long = built(folder, image_size=(28, 160)).lengths.images
    assert (long.height, long.width, long.tokens) == (28, 168, 6)
    assert long.slots == 3 * 16  # windows of 2 × 2 units, half of each empty
    assert built(folder, images=0).lengths.images is None


@pytest.mark.parametrize(
    ("images", "size", "leaves", "message"),
    [
        (2, (112, 112), {}, "--images=2 of 112 x 112 pixels take 16 tokens each .* holds 10"),
        (30, None, {}, "--images=30"),
        (1, (4, 4000), {}, "one side is 1000 times the other"),
    ],
)
def test_images_that_no_prompt_holds_are_refused(folder, images, size, leaves, message):
    with pytest.raises(UsageError, match=message):
        built(folder, images=images, image_size=size, **leaves)


def test_a_model_of_text_has_no_images():
    from tests.experiments.test_rehearse import tiny as text

    case = cases.build(text(), machine(), mean_length=100)
    assert case.lengths.images is None
    assert tower.described(None) == {}
    with pytest.raises(UsageError, match="embedded:label_sums reads no images"):
        cases.build(text(), machine(), images=1)


def test_a_size_is_two_numbers():
    assert tower.image_size("448x672") == (448, 672)
    assert tower.image_size("") is None
    for wrong in ("448", "448x", "0x28", "axb", "1x2x3"):
        with pytest.raises(UsageError, match=f"--image_size={wrong} must be HEIGHTxWIDTH"):
            tower.image_size(wrong)


# ---------------------------------------------------------------- shapes


def prompts(case, count):
    """Prompts with images of the assumed size, different ones."""
    assumed, model = case.lengths.images, case.model
    side = model.vision.patch_size
    grid = (1, assumed.height // side, assumed.width // side)
    found = []
    for number in range(count):
        patches = np.full((grid[1] * grid[2], 3, side, side), number, np.uint8)
        image = PreparedImage(patches, grid, str(number), ImageSettings())
        around = [model.vision_start_token_id, *[model.image_token_id] * assumed.tokens,
                  model.vision_end_token_id]  # fmt: skip
        text = np.full(case.lengths.prompt - len(around), 5)
        tokens = np.concatenate([around, text]).astype(np.int32)
        found.append(PromptRecord(number, tokens, "", None, (image,)))
    return found


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_those_that_a_run_would_bring(folder, packed, monkeypatch):
    leaves = {} if packed else {"train__packing": False, "train__microbatch_tokens": 0,
                                "train__num_microbatches": 2}  # fmt: skip
    case = built(folder, **leaves)
    count = case.sizes.responses_per_minibatch
    passes, real = brought(case, prompts(case, case.sizes.prompts_per_step), monkeypatch)
    batch, _ = programs.train_batch(case)
    assert_same_shapes(batch, real)
    made = batch.rows.images.images.patches_ISC
    assert made.sharding == real.rows.images.images.patches_ISC.sharding
    assert list(passes) == ["old"]
    assert_same_shapes(programs.pass_rows(case, case.programs.passes()["old"])[0], passes["old"])
    # Several micro-batches, and in each no more images than the prompts of a minibatch.
    parts = cases.plan(case, count).num_microbatches
    assert parts > 1
    assert len(made) == parts * cases.images_at_once(case, count)


def test_prompts_of_a_prefill_are_those_that_a_run_would_bring(folder):
    case = built(folder)
    engine = case.engine
    arrays = programs.rollout_arrays(case, engine, case.sampled)
    R, T = arrays["prefill"][1][0].shape
    placed = {}
    for row, prompt in enumerate(prompts(case, R)):
        request = Request(row, prompt.tokens, images=prompt.images)
        placed[row] = Job(request, prompt.tokens[:-1], [], 0)
    real = run_images(placed, case.model, shape=(R, T), multiple=engine.row_multiple)
    assert_same_shapes(arrays["images"], real)


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize("remat", ["none", "full", "attention"])
@pytest.mark.parametrize("full_layers", [(), (0, 1)])
def test_operations_of_the_tower_are_those_of_its_program(folder, full_layers, remat):
    model = cases.architecture(tiny(folder))
    config = dataclasses.replace(model.vision, full_layers=full_layers)
    how = Forward(dataclasses.replace(model, vision=config), remat=remat)
    I, S = 2, 64
    params = vision.abstract_params(config)
    arrays = tower.shapes(I, tower.Pictures(1, 112, 112, 16, S), config)

    def units(params, arrays):
        return vision.encode(
            params, arrays.patches_ISC, arrays.positions_IS2, arrays.valid_IS,
            how=how,
        )  # fmt: skip

    args = (config, I, S, Parts(), 4)
    found = products(jax.make_jaxpr(units)(params, arrays).jaxpr)
    assert found == pytest.approx(tower.forward(*args).flops)
    trained = jax.grad(lambda params, arrays: jnp.sum(units(params, arrays) ** 2))
    found = products(jax.make_jaxpr(trained)(params, arrays).jaxpr)
    counted = tower.training(*args, frozen=False, remat=remat, kernel="reference").flops
    unread = 2 * I * S * 1176 * config.embed_dim  # the gradient of the pixels, which XLA drops
    assert found == pytest.approx(counted + unread, rel=1e-3)
    assert tower.training(*args, frozen=True, remat=remat, kernel="reference") == tower.forward(
        *args
    )


def test_operations_of_a_prefill_are_those_of_its_program(folder):
    case = built(folder, devices=1)
    engine = case.engine
    arrays = programs.rollout_arrays(case, engine, case.sampled)
    traced = rollout_programs.prefill.trace(
        arrays["params"], arrays["pages"], *arrays["prefill"], arrays["images"],
        how=engine.how,
    )  # fmt: skip
    program = next(p for p in programs.programs(case) if p.name == "prefill")
    # In the trace both kinds of attention stand in every block of the tower, and the larger is
    # counted; the decoder's reference computes a piece of queries at a time with all keys up to the
    # end of its block, and a turn over pages stands there for what may come before a run.
    model, assumed = case.model, case.lengths.images
    (R, T), images = arrays["prefill"][1][0].shape, arrays["images"].images.valid_IS.shape[0]
    assert images == R
    of_blocks = dataclasses.replace(model.vision, full_layers=(0, 1))
    args = (images, assumed.slots, Parts(), 4)
    extra = tower.forward(of_blocks, *args).flops - tower.forward(model.vision, *args).flops
    pair = 4 * model.num_heads * model.head_dim * model.num_layers
    _, block, _ = reference_attention._pieces(R, T, T, model.num_heads, causal=True)
    assert T % block == 0
    ends = range(block, T + 1, block)
    extra += pair * R * (sum(block * end for end in ends) - T * (T + 1) / 2)
    pages = min(512 // engine.page_size, engine.table_width)
    extra += pair * R * T * pages * engine.page_size
    assert products(traced.jaxpr.jaxpr) == pytest.approx(program.work.flops + extra, rel=1e-3)


def test_matrices_of_the_7b_tower_and_what_a_mesh_makes_of_them():
    from configs import qwen2_5_vl_7b_virl39k

    model = cases.architecture(qwen2_5_vl_7b_virl39k.get_config())
    kernels = [
        x.size
        for path, x in jax.tree.leaves_with_path(vision.abstract_params(model.vision))
        if path[-1].key == "kernel"
    ]
    assert tower.matrices(model.vision) == sum(kernels)
    args = (model.vision, 8, 6144)
    alone = tower.training(*args, Parts(), 2, frozen=False, remat="full", kernel="splash")
    assert alone.links == 0
    for part in (Parts(8, 1, 8, 1, 1), Parts(4, 2, 8, 1, 1)):
        shared = tower.training(*args, part, 2, frozen=False, remat="full", kernel="splash")
        assert shared.flops == pytest.approx(alone.flops / 8)
        assert shared.links > 0
    gathered = tower.forward(*args, Parts(8, 1, 8, 1, 1), 2).links
    units = 2 * 8 * 6144 / 4 * 3584
    assert gathered == pytest.approx((2 * sum(kernels) + units) * 7 / 8)
    # 64 patches a window in 28 blocks, all of an image in 4.
    pairs = 6144 * (28 * 64 + 4 * 6144)
    flops = 2 * 6144 * (sum(kernels) - 5120 * (5120 + 3584) * 3 / 4) + 4 * 1280 * pairs
    assert tower.forward(*args, Parts(), 2).flops == pytest.approx(8 * flops)


# ---------------------------------------------------------------- whole rehearsals


@pytest.fixture(scope="module")
def rehearsed(folder):
    """A case, and its rehearsal."""
    case = built(folder, model__remat="full")
    return case, report.rehearse(case, say=lambda _: None)


def test_a_run_on_images_is_rehearsed(rehearsed):
    _, found = rehearsed
    assert found["fits"]
    assert {"prefill", "decode chunk", "log-probs", "update"} <= set(found["programs"])
    assert found["lengths"]["images"] == {
        "a_prompt": 1, "height": 112, "width": 112, "tokens": 16, "slots": 64
    }  # fmt: skip
    assert found["attention"]["images"] == "reference"
    json.dumps(found, allow_nan=False)
    text = report.text(found)
    assert "reference (images)" in text
    assert "1 image(s) of 112 × 112 pixels, 16 tokens each, in 64 slots of the tower" in text


def test_arguments_of_a_run_on_images_are_the_bytes_of_its_arrays(rehearsed):
    case, found = rehearsed
    batch, _ = programs.train_batch(case)
    size = found["programs"]["update"]["bytes"]
    given = size["arguments"] + size["beside"]["inputs that it does not read"]
    state = abstract_state(case.rule)
    assert given == pytest.approx(resident.device_bytes((state, batch)), rel=0.01)
    # The tower is among the weights, and pixels are cut over the devices.
    of_tower = vision.abstract_params(case.model.vision)
    assert case.num_params > sum(x.size for x in jax.tree.leaves(of_tower))
    pixels = batch.rows.images.images.patches_ISC
    assert resident.device_bytes(pixels) == 4 * np.prod(pixels.shape) / 8


def test_images_cost_and_a_frozen_tower_costs_less(folder, rehearsed):
    def update_of(**settings):
        case = built(folder, model__remat="full", **settings)
        return next(p for p in programs.programs(case) if p.name == "update")

    trained = rehearsed[1]["programs"]["update"]
    frozen = update_of(train__freeze_vision=True)
    assert update_of(images=0).work.flops < frozen.work.flops < trained["flops"]
    assert programs.compiled(frozen).temporaries < trained["bytes"]["temporaries"]


def test_a_search_keeps_the_images(folder):
    case = built(folder, image_size=(28, 160))
    other = search.changed(case, {"model.remat": "full"})
    assert other.lengths == case.lengths
    assert search.changed(built(folder, images=0), {"model.remat": "full"}).lengths.images is None
    more = search._counted_training(case, "update")
    assert more > search._counted_training(built(folder, images=0), "update")
