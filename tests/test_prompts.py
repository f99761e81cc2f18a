"""Prompts: rendering, the length limit, and a stream that loses and repeats nothing."""

import collections
import json

import numpy as np
import pytest

from luspo_jax.datasets import DataError, Example
from luspo_jax.prompts import TEMPLATES, PromptStream, Renderer, Template, encode


class Characters:
    """A tokenizer of one token a character; the chat template marks roles."""

    chat_template = "roles in angle brackets"

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt, **extra):
        assert not tokenize
        assert add_generation_prompt
        turns = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return turns + "<assistant>" + "".join(f"[{k}={v}]" for k, v in extra.items())

    def __call__(self, texts, add_special_tokens):
        marks = [1] if add_special_tokens else []
        return {"input_ids": [marks + [ord(c) for c in text] for text in texts]}


class NoChat(Characters):
    chat_template = None


EXAMPLES = [Example(100 + n, f"problem {n}", str(n)) for n in range(23)]
PLAIN = Renderer(NoChat(), "plain")


def _stream(examples=EXAMPLES, renderer=PLAIN, **settings):
    return PromptStream(examples, renderer, **{"max_length": 64, "seed": 5} | settings)


def _ids(records):
    return [record.prompt_id for record in records]


def test_rendering():
    assert PLAIN.text("1+1") == "1+1"
    assert Renderer(Characters(), "chat").text("1+1") == "<user>1+1<assistant>"
    system = Renderer(Characters(), "chat", "Be brief.", enable_thinking=False)
    assert system.text("1+1") == "<system>Be brief.<user>1+1<assistant>[enable_thinking=False]"
    own = Renderer(NoChat(), Template("Q: {problem}\nA:", chat=False))
    assert own.text(r"\frac{a}{b}") == "Q: \\frac{a}{b}\nA:"


def test_the_dapo_prompt_is_the_known_text():
    text = Renderer(Characters(), "dapo").text("PROBLEM")
    assert text == (
        "<user>Solve the following math problem step by step. The last line of your response "
        "should be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
        'problem.\n\nPROBLEM\n\nRemember to put your answer on its own line after "Answer:".'
        "<assistant>"
    )


def test_the_dapo_prompt_is_that_of_dapos_own_file(shared_data):
    import pyarrow.parquet

    path = shared_data / "math_eval" / "aime24" / "dapo_aime-2024.parquet"
    row = pyarrow.parquet.read_table(path).slice(0, 1).to_pylist()[0]
    rendered = TEMPLATES["dapo"].text.replace("{problem}", row["extra_info"]["raw_problem"])
    assert rendered == row["prompt"][0]["content"]


def test_special_tokens_come_with_plain_prompts_only():
    assert PLAIN.tokens(["ab"])[0].tolist() == [1, 97, 98]
    assert Renderer(Characters(), "chat").tokens(["ab"])[0].tolist() == [97, 98]
    assert PLAIN.tokens(["ab"])[0].dtype == np.int32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "dap"}, "did you mean 'dapo'"),
        ({"template": "plain", "system_prompt": "x"}, "would be ignored"),
        ({"template": "plain", "enable_thinking": True}, "would be ignored"),
        ({"tokenizer": NoChat(), "template": "chat"}, "needs a chat template"),
    ],
)
def test_senseless_renderers_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Renderer(**{"tokenizer": Characters()} | settings)


def test_a_template_without_a_place_for_the_problem_is_refused():
    with pytest.raises(ValueError, match="problem"):
        Template("Q: {question}", chat=False)


def test_the_hash_changes_with_everything_that_changes_a_prompt():
    class Other(Characters):
        chat_template = "another"

    hashes = [
        Renderer(Characters(), "chat").hash,
        Renderer(Other(), "chat").hash,
        Renderer(Characters(), "dapo").hash,
        Renderer(Characters(), "chat", "Be brief.").hash,
        Renderer(Characters(), "chat", enable_thinking=True).hash,
        Renderer(Characters(), "chat", enable_thinking=False).hash,
        PLAIN.hash,
    ]
    assert len(set(hashes)) == len(hashes)
    # What the chat template says does not matter to a prompt that does not use it.
    assert Renderer(Characters(), "plain").hash == PLAIN.hash


def test_encode_drops_and_counts_long_prompts():
    examples = [Example(n, "x" * n, "") for n in range(1, 8)]
    records, dropped = encode(examples, PLAIN, max_length=5)  # one special token each
    assert (_ids(records), dropped) == ([1, 2, 3, 4], 3)
    assert encode([], PLAIN, max_length=5) == ([], 0)


def test_every_prompt_once_an_epoch_in_a_new_order():
    stream = _stream()
    first, second = _ids(stream.next_prompts(23)), _ids(stream.next_prompts(23))
    everything = [example.id for example in EXAMPLES]
    assert sorted(first) == sorted(second) == everything
    assert len({tuple(first), tuple(second), tuple(everything)}) == 3
    assert stream.epoch == 2.0


def test_the_order_is_the_seeds():
    assert _ids(_stream().next_prompts(23)) == _ids(_stream().next_prompts(23))
    assert _ids(_stream().next_prompts(23)) != _ids(_stream(seed=6).next_prompts(23))
    assert _ids(_stream(shuffle=False).next_prompts(5)) == [100, 101, 102, 103, 104]
    _stream(seed=2**40).next_prompts(1)


@pytest.mark.parametrize("kill_after", range(0, 12, 3))
def test_ledger_across_kill_and_resume(kill_after):
    """Step sizes that do not divide the epoch, long prompts in between, a restart at any step."""
    examples = [Example(n, "x" * (90 if n % 5 == 0 else 9), "") for n in range(29)]
    steps = 12

    def ledger(stream, start, stop):
        return [_ids(stream.next_prompts(4)) for _ in range(start, stop)]

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
    alone = _ids(_stream().next_prompts(12))
    shares = [_stream(process_index=p, process_count=3) for p in range(3)]
    parts = [_ids(stream.next_prompts(4)) for stream in shares]
    assert [parts[i % 3][i // 3] for i in range(12)] == alone
    assert len({json.dumps(stream.get_state()) for stream in shares}) == 1
    single = _stream()
    single.set_state(shares[0].get_state())  # a run may go on with another number of processes
    everything = _stream()
    everything.next_prompts(12)
    assert _ids(single.next_prompts(9)) == _ids(everything.next_prompts(9))


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


def test_the_real_tokenizer_and_chat_template(shared_data):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "qwen" / "Qwen3-1.7B")
    renderer = Renderer(tokenizer, "dapo")
    (record,), _ = encode(EXAMPLES[:1], renderer, max_length=512)
    assert record.text.startswith("<|im_start|>user\nSolve the following math problem")
    assert record.text.endswith('"Answer:".<|im_end|>\n<|im_start|>assistant\n')
    assert tokenizer.decode(record.tokens) == record.text
    message = [
        {"role": "user", "content": TEMPLATES["dapo"].text.replace("{problem}", "problem 0")}
    ]
    whole = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    assert record.tokens.tolist() == whole["input_ids"]
    assert "<think>\n\n</think>" in Renderer(tokenizer, "chat", enable_thinking=False).text("x")
