"""Demonstrations in tokens: which are trained on, what is too long, and the order of a run."""

import numpy as np
import pytest

from luspo_jax.datasets import DataError, Example
from luspo_jax.models.locate import model_folder
from luspo_jax.prompts import Renderer
from luspo_jax.prompts.demonstrations import (
    DemonstrationStream,
    Marking,
    demonstrations,
    fingerprint,
    length_counts,
)

# One character a token; a turn is <role>…$, and "$" (36) ends an answer.
STOP = ord("$")


class Turns:
    """A tokenizer of one token a character, whose chat template closes every turn with "$"."""

    chat_template = "<role>content$"
    eos_token_id = STOP
    merges = ""  # two characters that are one token where they meet

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize
        text = "".join(f"<{m['role']}>{m['content']}$\n" for m in messages)
        return text + "<assistant>" * add_generation_prompt

    def decode(self, tokens, **_):
        return "".join(map(chr, tokens))

    def __call__(self, texts, add_special_tokens):
        begin = [1] if add_special_tokens else []
        return {"input_ids": [begin + self._ids(text) for text in texts]}

    def _ids(self, text):
        if self.merges:
            text = text.replace(self.merges, "\x02")
        return [ord(c) for c in text]


class Plain(Turns):
    chat_template = None


class Open(Turns):
    """Answers end with nothing."""

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + (
            "<assistant>" * add_generation_prompt
        )


class Rewriting(Turns):
    """Forgets the question once an answer is there."""

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        shown = messages if add_generation_prompt else messages[1:]
        return super().apply_chat_template(
            shown, tokenize=tokenize, add_generation_prompt=add_generation_prompt
        )


CHAT = Example(
    7, "q2", "a2", {"messages": [
        {"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"},
    ]},
)  # fmt: skip


def _marking(tokenizer=None, template="chat", stops=(STOP,), **fields):
    return Marking(Renderer(tokenizer or Turns(), template), stops, **fields)


def _shown(one):
    """The text, with trained characters in upper brackets: what a reader can check."""
    pairs = zip(one.tokens, one.trained, strict=True)
    return "".join(f"[{chr(t)}]" if trained else chr(t) for t, trained in pairs).replace("][", "")


def _one(example, **fields):
    (found,) = demonstrations([example], _marking(**fields), "f.jsonl").kept
    return found


def test_a_pair_trains_on_its_answer_and_the_token_that_ends_it():
    one = _one(Example(3, "2+2?", "4"), tokenizer=Plain(), template="plain")
    assert _shown(one) == "\x012+2?[4$]"
    assert one.prompt.tokens.tolist() == [1, *map(ord, "2+2?")]
    assert (one.prompt.text, one.prompt.prompt_id, one.answer_length) == ("2+2?", 3, 2)
    assert one.tokens.dtype == one.prompt.tokens.dtype == np.int32


def test_a_pair_in_a_chat_template():
    one = _one(Example(3, "2+2?", "4"))
    assert _shown(one) == "<user>2+2?$\n<assistant>[4$]"
    assert one.prompt.text == "<user>2+2?$\n<assistant>"


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "<user>q1$\n<assistant>a1$\n<user>q2$\n<assistant>[a2$]"),
        ({"turns": "all"}, "<user>q1$\n<assistant>[a1$]\n<user>q2$\n<assistant>[a2$]"),
        ({"train_on_prompt": True}, "<[user>q1$\n<assistant>a1$\n<user>q2$\n<assistant>a2$]"),
    ],
)
def test_turns_of_a_chat(fields, shown):
    one = _one(CHAT, **fields)
    assert _shown(one) == shown
    # Whatever is trained on, a rollout is asked for the last answer.
    assert one.prompt.text == "<user>q1$\n<assistant>a1$\n<user>q2$\n<assistant>"
    assert one.answer_length == 3


def test_a_template_without_an_end_gets_one_after_the_last_answer_only():
    assert _shown(_one(CHAT, tokenizer=Open())).endswith("<assistant>[a2$]")
    with pytest.raises(DataError, match=r"f\.jsonl, row 7: .*ends answer 1 with none.*turns=last"):
        _one(CHAT, tokenizer=Open(), turns="all")


def test_a_model_that_nothing_stops_gets_no_end():
    tokenizer = Plain()
    tokenizer.eos_token_id = None
    one = _one(Example(3, "2+2?", "4"), tokenizer=tokenizer, template="plain", stops=())
    assert _shown(one) == "\x012+2?[4]"


def test_a_border_that_the_tokenizer_joins_is_cut_in_two():
    tokenizer = Plain()
    tokenizer.merges = "?4"
    one = _one(Example(3, "2+2?", "4?4"), tokenizer=tokenizer, template="plain")
    assert _shown(one) == "\x012+2?[4\x02$]"


@pytest.mark.parametrize(
    ("example", "fields", "message"),
    [
        (Example(4, "q", "a$b"), {}, r"f\.jsonl, row 4: a text holds '\$'"),
        (CHAT, {"tokenizer": Rewriting()}, r"row 7: .*otherwise once"),
    ],
)
def test_what_cannot_be_marked_is_refused_by_row(example, fields, message):
    with pytest.raises(DataError, match=message):
        _one(example, **fields)


def test_too_long_is_left_out_cut_or_refused():
    examples = [Example(n, "q" * n, "a" * 5) for n in (1, 3, 6, 12)]

    def marked(too_long):
        how = _marking(Plain(), "plain", max_length=10, too_long=too_long)
        return demonstrations(examples, how, "f.jsonl")

    dropped = marked("drop")
    assert ([len(x.tokens) for x in dropped.kept], dropped.dropped, dropped.cut) == ([8, 10], 2, 0)
    assert dropped.long == (6, 12)
    cut = marked("cut")
    assert ([len(x.tokens) for x in cut.kept], cut.dropped, cut.cut) == ([8, 10, 10], 1, 1)
    assert _shown(cut.kept[2]) == "\x01qqqqqq[aaa]"  # no end is taught that is none
    with pytest.raises(DataError, match=r"2 demonstrations are longer .*row 6 \(13\), row 12 \(19"):
        marked("refuse")
    with pytest.raises(DataError, match=r"all 1 demonstrations are longer"):
        demonstrations(examples[3:], _marking(Plain(), "plain", max_length=10), "f.jsonl")


def test_counts():
    kept = demonstrations([Example(1, "q", "aa"), Example(2, "qq", "a")],
                          _marking(Plain(), "plain")).kept  # fmt: skip
    assert length_counts(kept) == {"tokens": 10, "trained": 5, "longest": 5}


def _stream(seed=0, count=10):
    kept = demonstrations(
        [Example(n, f"q{n}", f"a{n}") for n in range(count)], _marking(Plain(), "plain")
    ).kept
    return DemonstrationStream(kept, seed=seed)


def _ids(taken):
    return [one.prompt.prompt_id for one in taken]


def test_a_stream_shows_each_once_an_epoch_and_goes_on_where_it_stood():
    stream = _stream()
    first = _ids(stream.take(7))
    state = stream.get_state()
    rest = _ids(stream.take(13))
    assert sorted([*first, *rest[:3]]) == sorted(rest[3:]) == list(range(10))
    assert [*first, *rest[:3]] != rest[3:]
    assert stream.epoch == 2.0
    other = _stream()
    other.set_state(state)
    assert _ids(other.take(13)) == rest
    assert _ids(_stream(seed=1).take(7)) != first


@pytest.mark.parametrize(("changed", "named"), [({"seed": 1}, "seed"), ({"count": 9}, "num_ex")])
def test_another_stream_is_refused(changed, named):
    with pytest.raises(ValueError, match=named):
        _stream(**changed).set_state(_stream().get_state())


def test_a_fingerprint_changes_with_tokens_and_masks():
    found = {
        fingerprint([_one(example, **fields)])
        for example, fields in (
            (CHAT, {}), (CHAT, {"turns": "all"}), (Example(7, "q2", "a2"), {}),
            (Example(7, "q2", "a3"), {}),
        )
    }  # fmt: skip
    assert len(found) == 4


# ---------------------------------------------------------------- tokenizers of models


def test_the_embedded_model_reads_its_task():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("embedded:label_sums"))
    one = _one(
        Example(1, "a4b3?", "b3=2 #### 2"), tokenizer=tokenizer, template="plain", stops=(1,)
    )
    assert tokenizer.decode(one.tokens) == "a4b3?b3=2 #### 2<|end|>"
    assert tokenizer.decode(one.tokens[one.trained]) == "b3=2 #### 2<|end|>"
    # Its chat template writes contents as they are, and ends no turn: the last gets its end.
    chat = Example(1, "", "", {"messages": [
        {"role": "user", "content": "a4b3?"}, {"role": "assistant", "content": "#### 2"},
    ]})  # fmt: skip
    one = _one(chat, tokenizer=tokenizer, stops=(1,))
    assert tokenizer.decode(one.tokens[one.trained]) == "#### 2<|end|>"


@pytest.fixture(scope="module")
def qwen3(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "qwen" / "Qwen3-1.7B")


QWEN_STOPS = (151_643, 151_645)
TALK = Example(5, "", "", {"messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
]})  # fmt: skip


@pytest.mark.parametrize(
    ("turns", "trained"),
    [
        ("last", ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"]),
        ("all", ["2<|im_end|>", "<think>\nTwo and two.\n</think>\n\n4<|im_end|>"]),
    ],
)
def test_qwen3_trains_on_what_a_rollout_would_have_sampled(qwen3, turns, trained):
    one = _one(TALK, tokenizer=qwen3, stops=QWEN_STOPS, turns=turns)
    assert qwen3.decode(one.tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nTwo and two.\n</think>\n\n4<|im_end|>"
    )
    edges = np.flatnonzero(np.diff(one.trained.astype(int), append=0, prepend=0))
    found = [qwen3.decode(one.tokens[a:b]) for a, b in edges.reshape(-1, 2)]
    assert found == trained
    # The prompt is what the renderer asks in RL.
    (asked,) = Renderer(qwen3, "chat").tokens([one.prompt.text])
    np.testing.assert_array_equal(one.prompt.tokens, asked)


@pytest.mark.parametrize("thinking", [None, False])
def test_qwen3_without_reasoning(qwen3, thinking):
    """The template writes an empty thought: it is given if a rollout is given it, else trained."""
    how = Marking(Renderer(qwen3, "chat", enable_thinking=thinking), QWEN_STOPS)
    (one,) = demonstrations([Example(1, "1+1?", "2")], how).kept
    said = qwen3.decode(one.tokens[one.trained])
    empty = "<think>\n\n</think>\n\n"
    assert said == ("2<|im_end|>" if thinking is False else f"{empty}2<|im_end|>")
    assert one.prompt.text.endswith(empty if thinking is False else "<|im_start|>assistant\n")
