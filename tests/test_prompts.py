"""Prompts: rendering, the length limit, and a stream that loses and repeats nothing."""

import collections
import dataclasses
import json
import shutil

import numpy as np
import pytest

from luspo_jax.datasets import DataError, Example, Mixture
from luspo_jax.datasets.images import ImageFiles
from luspo_jax.datasets.shapes import Shapes
from luspo_jax.datasets.templates import LUSPO_VL_SYSTEM_PROMPT, TEMPLATES, Template
from luspo_jax.images.preparer import ImagePreparer
from luspo_jax.images.settings import ImageSettings
from luspo_jax.prompts import (
    PromptRecord,
    PromptStream,
    Refusal,
    Renderer,
    encode,
    outcomes,
    with_images,
)
from luspo_jax.rewards.format import luspo_vl


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


def test_hashes_and_states_of_text_do_not_change():
    """Golden: a checkpoint of text prompts can be continued whatever is added for images."""
    assert PLAIN.hash == "cbff961c0777ad07"
    system = Renderer(Characters(), "chat", "Be brief.", enable_thinking=False)
    assert system.hash == "d98db256b15ba8d3"
    assert set(_stream().get_state()) == {
        *("position", "dropped", "seed", "shuffle", "max_prompt_length", "template_hash"),
        *("num_examples", "examples_hash", "mixture"),
    }


# Prompts with images; a tokenizer of a character a token, which marks images as Qwen does.
VISION = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
START, PAD, END = 1, 2, 3


@pytest.fixture(scope="module")
def small_tokenizer():
    import tokenizers
    import transformers

    words = ["<|unknown|>", *VISION, *(chr(c) for c in range(32, 127)), "\n"]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<|unknown|>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("[\\s\\S]"), "isolated"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<|unknown|>", additional_special_tokens=VISION
    )


@pytest.fixture(scope="module")
def preparer():
    with ImagePreparer(ImageSettings(), workers=2) as ready:
        yield ready


@pytest.fixture
def renderer(small_tokenizer, preparer, picture_folder):
    source = picture_folder / "data.jsonl"
    return Renderer(small_tokenizer, images=preparer, image_files=ImageFiles(source))


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    """Files of 4 (56 × 56) and 6 (56 × 84) tokens, a damaged one, and one of 1,024."""
    import PIL.Image

    folder = tmp_path_factory.mktemp("pictures")
    for name, size in {"four": (56, 56), "six": (84, 56), "large": (896, 896)}.items():
        PIL.Image.new("RGB", size, "red").save(folder / f"{name}.png")
    (folder / "bad.png").write_bytes((folder / "four.png").read_bytes()[:60])
    return folder


def asking(number, problem, *names):
    references = [{"row": number, "path": f"{name}.png"} for name in names]
    return Example(number, problem, "", {"images": references} if names else {})


def _shape(tokens):
    """Tokens as text, each image as [number of its tokens]."""
    found, count = "", 0
    for token in tokens.tolist():
        if token == START:
            count = 0
        elif token == PAD:
            count += 1
        elif token == END:
            found += f"[{count}]"
        else:
            found += chr(token - 5 + 32)
    return found


def test_images_stand_where_the_problem_marks_them(renderer):
    examples = [
        asking(1, "no image"),
        asking(2, "first", "four"),
        asking(3, "a<image>b", "six"),
        asking(4, "<image>then<image>?", "six", "four"),
        asking(5, "two", "four", "six"),
    ]
    records, dropped = encode(examples, renderer, max_length=64)
    assert dropped == 0
    assert [_shape(record.tokens) for record in records] == [
        *("no image", "[4]first", "a[6]b", "[6]then[4]?", "[4][6]two"),
    ]
    assert [[image.num_tokens for image in record.images] for record in records] == [
        *([], [4], [6], [6, 4], [4, 6]),
    ]
    assert records[2].text == "a<|vision_start|><|image_pad|><|vision_end|>b"
    assert all(record.tokens.dtype == np.int32 for record in records)


def test_what_makes_no_prompt_is_named(renderer):
    examples = [
        asking(1, "<image>and<image>", "four"),
        asking(2, "<image>"),
        asking(3, "x", "four", "bad"),
        asking(4, "x", "gone"),
        asking(5, "x", "large"),
        asking(6, "x<|image_pad|>", "four"),
        asking(7, "x<|vision_start|>"),
        asking(8, "<video>x", "four"),
        asking(9, "<|video_pad|>"),
        asking(10, "fine", "four"),
    ]
    found = outcomes(examples, renderer, max_length=64)
    *refusals, fine = found
    assert isinstance(fine, PromptRecord)
    assert all(isinstance(refusal, Refusal) for refusal in refusals)
    assert [refusal.prompt_id for refusal in refusals] == list(range(1, 10))
    assert [refusal.reason for refusal in refusals] == [
        *("markers", "markers", "corrupt", "missing", "too_long"),
        *("placeholders", "placeholders", "video", "placeholders"),
    ]
    details = [refusal.detail for refusal in refusals]
    assert details[0] == "2 × <image> in the problem and 1 images"
    assert "data.jsonl, row 3, image bad.png: image refused as corrupt" in details[2]
    assert "gone.png is missing" in details[3]
    assert details[4] == "1027 tokens"
    assert encode(examples, renderer, max_length=64)[1] == 9
    # A model of text is asked the bare problem, as ever.
    text = Renderer(renderer.tokenizer)
    assert text.text("<image>and<image>") == "<image>and<image>"
    assert encode(examples, text, max_length=64)[1] == 0


def test_all_prompts_of_the_drawn_task(small_tokenizer, preparer):
    task = Shapes("train", size=5)
    renderer = Renderer(small_tokenizer, images=preparer)
    records, dropped = encode(task, renderer, max_length=24)
    assert dropped == 0
    assert [_shape(record.tokens) for record in records[:4]] == [
        f"[{tokens}]{example.problem}"
        for tokens, example in zip((10, 6, 4, 6), [task[i] for i in range(4)], strict=True)
    ]


def test_a_stream_of_images_refuses_counts_and_resumes(renderer):
    examples = [
        asking(n, "x", *(["bad"] if n % 5 == 0 else ["large"] if n % 7 == 0 else ["four"][: n % 2]))
        for n in range(20)
    ]
    whole = _stream(examples, renderer)
    expected = [_ids(whole.next_prompts(4)) for _ in range(6)]
    assert {n for step in expected for n in step} == {n for n in range(20) if n % 5 and n % 7}
    assert whole.refused["corrupt"] > 4
    assert whole.dropped > 1
    details = {refusal.prompt_id: refusal.detail for refusal in whole.refusals}
    assert "data.jsonl, row 10, image bad.png: image refused as corrupt" in details[10]
    first = _stream(examples, renderer)
    assert [_ids(first.next_prompts(4)) for _ in range(3)] == expected[:3]
    state = json.loads(json.dumps(first.get_state()))
    resumed = _stream(examples, renderer)
    resumed.set_state(state)
    assert [_ids(resumed.next_prompts(4)) for _ in range(3)] == expected[3:]
    assert resumed.get_state() == whole.get_state()
    shares = [_stream(examples, renderer, process_index=p, process_count=2) for p in range(2)]
    parts = [_ids(share.next_prompts(2)) for share in shares]
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
    assert _shape(record.tokens) == "[4]x"


def test_what_one_process_refuses_all_refuse(renderer):
    examples = [asking(n, "x", "four") for n in range(6)]
    theirs = Refusal(2, "timeout", "stopped at its limit")

    def gather(own):
        return [own, [theirs if n == 2 else None for n in range(len(own))]]

    stream = _stream(examples, renderer, shuffle=False, gather=gather)
    assert _ids(stream.next_prompts(3)) == [0, 1, 3]
    assert stream.refused == {"timeout": 1}
    # Prompts of text need no agreement.
    text = dataclasses.replace(renderer, images=None)
    assert _ids(_stream(examples, text, shuffle=False, gather=gather).next_prompts(3)) == [0, 1, 2]


def test_an_image_that_has_changed_since_is_named(renderer, picture_folder):
    shutil.copyfile(picture_folder / "four.png", picture_folder / "moving.png")
    (record,), _ = encode([asking(7, "x", "moving")], renderer, max_length=64)
    kept = dataclasses.replace(record, images=())
    assert with_images([kept], renderer)[0].images[0].sha == record.images[0].sha
    shutil.copyfile(picture_folder / "six.png", picture_folder / "moving.png")
    with pytest.raises(DataError, match=r"problem 7 had images of 4 tokens .* now of 6"):
        with_images([kept], renderer)
    (picture_folder / "moving.png").unlink()
    with pytest.raises(DataError, match=r"made before.*moving\.png.*missing"):
        with_images([kept], renderer)


def test_a_stream_that_refuses_everything_says_why(renderer):
    examples = [asking(1, "x", "bad"), asking(2, "x", "large")]
    with pytest.raises(
        DataError, match=r"no prompts: of 2, 1 are longer .*=64 tokens.*1 × corrupt.*bad.png"
    ):
        _stream(examples, renderer).next_prompts(1)


def test_a_mixture_knows_where_each_source_has_its_images(renderer, picture_folder):
    pictures = [asking(0, "p", "four")]
    mixture = Mixture(
        {"drawn": Shapes("train", size=1), "files": pictures}, {"drawn": 1, "files": 1}
    )
    sources = {"drawn": ImageFiles(), "files": ImageFiles(picture_folder / "data.jsonl")}
    mixed = dataclasses.replace(renderer, image_files=ImageFiles(of_source=sources))
    records, dropped = encode(mixture, mixed, max_length=64)
    assert dropped == 0
    assert _shape(records[4].tokens) == "[4]p"
    assert [len(record.images) for record in records] == [1] * 5


def test_tokenizers_without_images_are_refused(small_tokenizer, preparer):
    import transformers

    class NoPads(NoChat):
        unk_token_id = None

        def convert_tokens_to_ids(self, token):
            return None

    with pytest.raises(ValueError, match=r"no token <\|image_pad\|>, which images need"):
        Renderer(NoPads(), images=preparer)
    ignoring = transformers.PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizer.backend_tokenizer,
        unk_token="<|unknown|>",
        additional_special_tokens=VISION,
        chat_template="{% for m in messages %}{{ m['role'] }}{% endfor %}",
    )
    with pytest.raises(ValueError, match="do not turn an image into one"):
        Renderer(ignoring, "chat", images=preparer)


@pytest.fixture(scope="module")
def qwen_vl(shared_data):
    import transformers

    folder = shared_data / "qwen" / "Qwen2.5-VL-7B-Instruct"
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_qwens_own_chat_template_with_images(qwen_vl, renderer):
    chat = Renderer(qwen_vl, "chat", images=renderer.images, image_files=renderer.image_files)
    examples = [asking(1, "Compare <image> and\n<image>.", "six", "four"), asking(2, "Find x.")]
    (record, text), _ = encode(examples, chat, max_length=512)
    # The processor expands the placeholders in the text, and then encodes all of it.
    expanded = record.text
    for image in record.images:
        expanded = expanded.replace("<|image_pad|>", "<|mark|>" * image.num_tokens, 1)
    expanded = expanded.replace("<|mark|>", "<|image_pad|>")
    assert record.tokens.tolist() == qwen_vl(expanded)["input_ids"]
    assert expanded.count("<|image_pad|>") == 10
    assert record.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nCompare "
        "<|vision_start|><|image_pad|><|vision_end|> and\n<|vision_start|><|image_pad|>"
        "<|vision_end|>.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text.text == Renderer(qwen_vl, "chat").text("Find x.")
    assert chat.image_token_id == 151_655


def test_the_papers_system_prompt_asks_for_what_its_format_rewards(qwen_vl, renderer):
    chat = dataclasses.replace(
        *(renderer,), tokenizer=qwen_vl, template="chat", system_prompt=LUSPO_VL_SYSTEM_PROMPT
    )
    (record,), _ = encode([asking(1, "<image>Find x.", "four")], chat, max_length=512)
    assert record.text.startswith("<|im_start|>system\nSolve the question. When the user asks")
    assert "<|im_start|>user\n<|vision_start|>" in record.text
    example = LUSPO_VL_SYSTEM_PROMPT.split("For example: ")[1].split(". The output")[0]
    assert luspo_vl(example)


def test_a_real_file_of_embedded_images(shared_data, qwen_vl, preparer):
    from luspo_jax.datasets.table import Table, read_examples

    source = shared_data / "vl" / "deepeyes_mini" / "deepeyes_mini_10.parquet"
    table = Table(
        problem=("extra_info.question",),
        answer=("reward_model.ground_truth",),
        identity=(("data_source",), ("extra_info.index",)),
        images=("images",),
    )
    examples, _ = read_examples(table, source)
    chat = Renderer(qwen_vl, "boxed", images=preparer, image_files=ImageFiles(source))
    records, dropped = encode(examples, chat, max_length=4096)
    assert dropped == 0
    for record in records:
        tokens = sum(image.num_tokens for image in record.images)
        assert (record.tokens == 151_655).sum() == tokens > 4
        assert record.images[0].patches().shape == (4 * record.images[0].num_tokens, 1_176)
