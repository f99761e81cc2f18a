"""The models inside the package: loadable, small, and with the properties that training needs."""

import functools
import json

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from luspo_jax import prompts
from luspo_jax.datasets import label_lookup, label_sums, load, shapes
from luspo_jax.experience import groups, held_out
from luspo_jax.images.preparer import ImagePreparer
from luspo_jax.images.settings import read_settings
from luspo_jax.models import decoder, decoder_weights
from luspo_jax.models.decoder_config import read_config
from luspo_jax.models.forward import Forward
from luspo_jax.models.locate import EMBEDDED, embedded_models, model_folder
from luspo_jax.rewards import Scorer
from luspo_jax.rollout import Engine, Request, Sampling

NAMES = embedded_models()
MIXTURES = {"label_sums_moe": "label_sums"}  # those with experts, and their task
SEEING = ("shapes",)  # those with a vision tower
MAX_RESPONSE = 40
SIZE_LIMIT = 6_000_000  # bytes, all models together
REWARDS = {"shapes": ("exact", {"pattern": shapes.ANSWER_PATTERN})}  # of others, gsm8k


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name):
    return model_folder(f"embedded:{name}")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_there_are_models_and_they_are_small():
    assert {"label_sums", "label_lookup", *MIXTURES, *SEEING} <= set(NAMES)
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT


def test_folder_is_a_checkpoint(folder):
    hf = json.loads((folder / "config.json").read_text())
    config = read_config(folder)
    kind = "Qwen3MoeForCausalLM" if folder.name in MIXTURES else "Qwen3ForCausalLM"
    if folder.name in SEEING:
        kind = "Qwen2_5_VLForConditionalGeneration"
    assert hf["architectures"] == [kind]
    assert (config.num_experts > 0) == (folder.name in MIXTURES)
    assert (config.vision is not None) == (folder.name in SEEING)
    assert 100_000 <= decoder_weights.num_params(config) <= 1_000_000
    params = decoder_weights.load_params(folder, config)
    expected = decoder.abstract_params(config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)


@pytest.mark.parametrize("seeing", SEEING)
def test_image_processor_belongs_to_the_tower(seeing):
    """Drawings keep their size, so that a unit of the tower is a cell of the drawing."""
    folder = model_folder(f"embedded:{seeing}")
    vision, patching = read_config(folder).vision, read_settings(folder).patching
    assert (patching.patch_size, patching.merge_size) == (vision.patch_size, vision.merge_size)
    examples, _ = load(seeing, split="test")
    for record in encoded(seeing, folder, [examples[i] for i in range(8)]):
        drawn = shapes.draw(record.example.meta["images"][0]).shape
        (image,) = record.images
        assert tuple(14 * side for side in image.grid_thw[1:]) == drawn[:2]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_routers_of_a_mixture_use_all_experts(mixture):
    """None gets less than a quarter of an even load or more than twice it, on right answers."""
    folder = model_folder(f"embedded:{mixture}")
    config, tokenizer = read_config(folder), AutoTokenizer.from_pretrained(folder)
    examples, _ = load(MIXTURES[mixture], split="test")
    texts = [
        example.problem + label_sums.trace(example.meta["values"], (1,) * 6)
        for example in list(examples)[:64]
    ]
    tokens_BT = np.array([tokenizer.encode(text) for text in texts], np.int32)
    ones_BT = np.ones_like(tokens_BT)
    _, routed = decoder.forward(
        decoder_weights.load_params(folder, config),
        tokens_BT,
        np.cumsum(ones_BT, axis=1) - 1,
        ones_BT,
        how=Forward(config),
    )
    counts_LE = np.stack(
        [
            np.bincount(np.ravel(ids), minlength=config.num_experts)
            for ids in np.moveaxis(np.asarray(routed.expert_ids), -2, 0)
        ]
    )
    even = tokens_BT.size * config.experts_per_token / config.num_experts
    assert counts_LE.shape == (config.num_layers, config.num_experts)
    assert counts_LE.min() > even / 4
    assert counts_LE.max() < 2 * even


def test_tokenizer_belongs_to_the_model(folder, tokenizer):
    config = read_config(folder)
    assert len(tokenizer) == config.vocab_size < 64
    assert (tokenizer.eos_token_id,) == config.eos_token_ids
    assert tokenizer.pad_token_id == config.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer.encode("#### 4")) == 3


def test_tokenizer_round_trip(name, tokenizer):
    examples, _ = load(MIXTURES.get(name, name), split="test")
    for example in list(examples)[:200]:
        for text in written(name, example):
            ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
            assert len(ids) <= MAX_RESPONSE


def written(name, example):
    """The problem, and responses to it."""
    if name in SEEING:
        return [example.problem, shapes.trace(example, (1,) * len(example.meta["steps"]))]
    texts = [example.problem, label_sums.trace(example.meta["values"], (1,) * 6)]
    return texts + [label_lookup.response(int(example.answer), count) for count in (0, 9)]


def encoded(name, folder, examples, *, blank=False):
    """Prompts, with their images where the model sees."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name not in SEEING:
        return prompts.encode(examples, prompts.Renderer(tokenizer), max_length=24)[0]
    with ImagePreparer(read_settings(folder, blank=blank), workers=1) as preparer:
        renderer = prompts.Renderer(tokenizer, images=preparer)
        return prompts.encode(examples, renderer, max_length=24)[0]


def measured(name, folder, tokenizer, *, num_problems, num_samples, blank=False):
    """The evaluation of a base policy on held-out problems, and its response lengths."""
    config = read_config(folder)
    examples, _ = load(MIXTURES.get(name, name), split="test")
    examples = [examples[i] for i in range(num_problems)]
    records = encoded(name, folder, examples, blank=blank)
    assert len(records) == num_problems
    sampling = Sampling(
        max_response_length=MAX_RESPONSE, stop_token_ids=config.eos_token_ids, temperature=1.0
    )
    engine = Engine(Forward(config), sampling, num_slots=256, max_prompt_length=24, chunk_length=16)
    responses, _ = engine.generate(
        decoder_weights.load_params(folder, config),
        [Request(record.prompt_id, record.tokens, record.images) for record in records],
        group_size=num_samples,
        seed=1,
    )
    metric, options = REWARDS.get(name, ("gsm8k", {}))
    with Scorer({metric: 1.0}, options={metric: options}) as scorer:
        found = groups.judged(
            records,
            responses,
            scorer=scorer,
            decode=functools.partial(tokenizer.decode, skip_special_tokens=True),
            max_length=MAX_RESPONSE,
        )
    result = held_out.summarize(found, metric=metric)
    return result, np.array([len(response.tokens) for response in responses])


def test_base_policy_answers_and_stops(name, folder, tokenizer):
    """A quick look: 64 problems × 4, so with wide margins."""
    result, _ = measured(name, folder, tokenizer, num_problems=64, num_samples=4)
    assert 0.15 <= result.accuracy <= 0.65
    assert result.truncated < 0.05


@pytest.mark.slow
def test_base_policy_has_the_spread_that_training_needs(name, folder, tokenizer):
    result, lengths_B = measured(name, folder, tokenizer, num_problems=512, num_samples=12)
    shortest, _, longest = result.accuracy_by_third
    assert 0.15 <= result.accuracy <= 0.60
    assert result.truncated < 0.05
    assert lengths_B.std() > 0.4 * lengths_B.mean()
    if MIXTURES.get(name, name) in ("label_sums", "shapes"):
        assert longest - shortest >= 0.25
    else:  # longer is no better
        assert abs(longest - shortest) < 0.05


@pytest.mark.slow
def test_a_model_with_a_tower_looks(folder, tokenizer):
    """With blank images it is right about as often as the best constant answers, or less."""
    if folder.name not in SEEING:
        pytest.skip("reads no images")
    asked = {"num_problems": 256, "num_samples": 8}
    seen, _ = measured(folder.name, folder, tokenizer, **asked)
    blind, _ = measured(folder.name, folder, tokenizer, blank=True, **asked)
    examples, _ = load(folder.name, split="test")
    constant = shapes.blind_accuracy(examples)["all"]
    assert blind.accuracy < constant + 0.05
    assert seen.accuracy > constant + 0.05
