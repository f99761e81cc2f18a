"""A stream of prompts loses and repeats nothing, whatever is killed, refused or shared."""

import collections
import dataclasses
import json

import pytest

from luspo_jax.datasets import DataError, Example
from luspo_jax.images.preparer import ImagePreparer
from luspo_jax.images.settings import ImageSettings
from luspo_jax.prompts import PromptStream, Refusal, Renderer, encode
from luspo_jax.prompts.templates import Template
from tests.prompts.prompt_cases import EXAMPLES, PLAIN, Characters, NoChat, asking, ids, shape


def _stream(examples=EXAMPLES, renderer=PLAIN, **settings):
    return PromptStream(examples, renderer, **{"max_length": 64, "seed": 5} | settings)


def test_every_prompt_once_an_epoch_in_a_new_order():
    stream = _stream()
    first, second = ids(stream.next_prompts(23)), ids(stream.next_prompts(23))
    everything = [example.id for example in EXAMPLES]
    assert sorted(first) == sorted(second) == everything
    assert len({tuple(first), tuple(second), tuple(everything)}) == 3
    assert stream.epoch == 2.0


def test_the_order_is_the_seeds():
    assert ids(_stream().next_prompts(23)) == ids(_stream().next_prompts(23))
    assert ids(_stream().next_prompts(23)) != ids(_stream(seed=6).next_prompts(23))
    assert ids(_stream(shuffle=False).next_prompts(5)) == [100, 101, 102, 103, 104]
    _stream(seed=2**40).next_prompts(1)


@pytest.mark.parametrize("kill_after", range(0, 12, 3))
def test_ledger_across_kill_and_resume(kill_after):
    """Step sizes that do not divide the epoch, long prompts in between, a restart at any step."""
    examples = [Example(n, "x" * (90 if n % 5 == 0 else 9), "") for n in range(29)]
    steps = 12

    def ledger(stream, start, stop):
        return [ids(stream.next_prompts(4)) for _ in range(start, stop)]

    whole_stream = _stream(examples)
    whole = ledger(whole_stream, 0, steps)
    killed = _stream(examples)
    before = ledger(killed, 0, kill_after)
    state = json.loads(json.dumps(killed.get_state()))
    killed.next_prompts(4)  # the step that was lost
    resumed = _stream(examples)
    resumed.set_state(state)
    assert before + ledger(resumed, kill_after, steps) == whole
    assert resumed.get_state() == whole_stream.get_state()
    short = [example.id for example in examples if len(example.problem) < 64]
    counts = collections.Counter(i for step in whole for i in step)
    assert set(counts) == set(short)
    assert set(counts.values()) <= {2, 3}  # 48 prompts of 23 short ones: two epochs and a bit
    assert whole_stream.dropped in (12, 13)


def test_processes_share_one_sequence():
    alone = ids(_stream().next_prompts(12))
    shares = [_stream(process_index=p, process_count=3) for p in range(3)]
    parts = [ids(stream.next_prompts(4)) for stream in shares]
    assert [parts[i % 3][i // 3] for i in range(12)] == alone
    assert len({json.dumps(stream.get_state()) for stream in shares}) == 1
    single = _stream()
    single.set_state(shares[0].get_state())  # a run may go on with another number of processes
    everything = _stream()
    everything.next_prompts(12)
    assert ids(single.next_prompts(9)) == ids(everything.next_prompts(9))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 6}, "seed"),
        ({"shuffle": False}, "shuffle"),
        ({"max_length": 65}, "max_prompt_length"),
        ({"examples": EXAMPLES[:-1]}, "num_examples"),
        ({"examples": [*EXAMPLES[:-1], Example(122, "other", "22")]}, "examples_hash"),
        ({"renderer": Renderer(NoChat(), Template("{problem}!", chat=False))}, "template_hash"),
    ],
)
def test_the_state_of_another_stream_is_refused(change, field):
    with pytest.raises(ValueError, match=f"{field} was"):
        _stream(**change).set_state(_stream().get_state())


def test_streams_without_prompts_are_refused():
    with pytest.raises(DataError, match="empty"):
        _stream([])
    with pytest.raises(DataError, match="max_prompt_length=3"):
        _stream(max_length=3).next_prompts(1)
    with pytest.raises(ValueError, match="process 2 of 2"):
        _stream(process_index=2, process_count=2)


def test_hashes_and_states_of_text_do_not_change():
    """Golden: a checkpoint of text prompts can be continued whatever is added for images."""
    assert PLAIN.hash == "cbff961c0777ad07"
    system = Renderer(Characters(), "chat", "Be brief.", enable_thinking=False)
    assert system.hash == "d98db256b15ba8d3"
    assert set(_stream().get_state()) == {
        *("position", "dropped", "seed", "shuffle", "max_prompt_length", "template_hash"),
        *("num_examples", "examples_hash", "mixture"),
    }


def test_a_stream_of_images_refuses_counts_and_resumes(renderer):
    examples = [
        asking(n, "x", *(["bad"] if n % 5 == 0 else ["large"] if n % 7 == 0 else ["four"][: n % 2]))
        for n in range(20)
    ]
    whole = _stream(examples, renderer)
    expected = [ids(whole.next_prompts(4)) for _ in range(6)]
    assert {n for step in expected for n in step} == {n for n in range(20) if n % 5 and n % 7}
    assert whole.refused["corrupt"] > 4
    assert whole.dropped > 1
    assert whole.metrics == {
        "training/epoch": whole.epoch,
        "prompts/dropped": whole.dropped,
        "prompts/refused/corrupt": whole.refused["corrupt"],
    }
    details = {refusal.prompt_id: refusal.detail for refusal in whole.refusals}
    assert "data.jsonl, row 10, image bad.png: image refused as corrupt" in details[10]
    first = _stream(examples, renderer)
    assert [ids(first.next_prompts(4)) for _ in range(3)] == expected[:3]
    state = json.loads(json.dumps(first.get_state()))
    resumed = _stream(examples, renderer)
    resumed.set_state(state)
    assert [ids(resumed.next_prompts(4)) for _ in range(3)] == expected[3:]
    assert resumed.get_state() == whole.get_state()
    shares = [_stream(examples, renderer, process_index=p, process_count=2) for p in range(2)]
    parts = [ids(share.next_prompts(2)) for share in shares]
    assert [parts[i % 2][i // 2] for i in range(4)] == expected[0]


def test_other_image_settings_are_another_stream(renderer, preparer):
    blank = ImagePreparer(ImageSettings(text_blank=(56, 56)))
    other = dataclasses.replace(renderer, images=blank)
    hashes = {renderer.hash, other.hash, dataclasses.replace(renderer, images=None).hash}
    assert len(hashes) == 3
    examples = [asking(n, "x") for n in range(3)]
    with pytest.raises(ValueError, match="template_hash was"):
        _stream(examples, other).set_state(_stream(examples, renderer).get_state())
    (record, *_), _ = encode(examples, other, max_length=64)
    assert shape(record.tokens) == "[4]x"


def test_what_one_process_refuses_all_refuse(renderer):
    examples = [asking(n, "x", "four") for n in range(6)]
    theirs = Refusal(2, "timeout", "stopped at its limit")

    def gather(own):
        return [own, [theirs if n == 2 else None for n in range(len(own))]]

    stream = _stream(examples, renderer, shuffle=False, gather=gather)
    assert ids(stream.next_prompts(3)) == [0, 1, 3]
    assert stream.refused == {"timeout": 1}
    # Prompts of text need no agreement.
    text = dataclasses.replace(renderer, images=None)
    assert ids(_stream(examples, text, shuffle=False, gather=gather).next_prompts(3)) == [0, 1, 2]


def test_a_stream_that_refuses_everything_says_why(renderer):
    examples = [asking(1, "x", "bad"), asking(2, "x", "large")]
    with pytest.raises(
        DataError, match=r"no prompts: of 2, 1 are longer .*=64 tokens.*1 × corrupt.*bad.png"
    ):
        _stream(examples, renderer).next_prompts(1)


def test_a_survey_looks_at_a_sample_and_ends_in_time():
    examples = [Example(n, "x" * (90 if n < 1_000 else 9), "") for n in range(2_000)]
    stream = _stream(examples)
    before = stream.get_state()
    whole = stream.survey(10_000)
    assert (whole.total, whole.looked_at, whole.refused) == (2_000, 2_000, {"too_long": 1_000})
    assert stream.survey(100).looked_at == 100
    short = stream.survey(10_000, seconds=0)
    assert 0 < short.looked_at < 2_000
    assert 0.3 < short.refused["too_long"] / short.looked_at < 0.7  # spread over the problems
    assert stream.get_state() == before
    assert str(short).endswith(f"of {short.looked_at} looked at too long")
