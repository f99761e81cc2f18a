"""What a model reads of a problem, with and without images, and what makes no prompt."""

import dataclasses
import shutil

import numpy as np
import pytest

from luspo_jax.datasets import DataError, Example, Mixture
from luspo_jax.datasets.images import ImageFiles
from luspo_jax.datasets.shapes import Shapes
from luspo_jax.prompts import PromptRecord, Refusal, Renderer, encode, outcomes, with_images
from luspo_jax.prompts.templates import LUSPO_VL_SYSTEM_PROMPT, TEMPLATES, Template
from luspo_jax.rewards.format import luspo_vl
from tests import reasoning_cases as r1
from tests.prompts.prompt_cases import (
    EXAMPLES,
    PLAIN,
    VISION,
    Characters,
    NoChat,
    asking,
    ids,
    shape,
)


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
    assert (ids(records), dropped) == ([1, 2, 3, 4], 3)
    assert encode([], PLAIN, max_length=5) == ([], 0)


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
    assert [shape(record.tokens) for record in records] == [
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
    assert [shape(record.tokens) for record in records[:4]] == [
        f"[{tokens}]{example.problem}"
        for tokens, example in zip((10, 6, 4, 6), [task[i] for i in range(4)], strict=True)
    ]


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


def test_a_mixture_knows_where_each_source_has_its_images(renderer, picture_folder):
    pictures = [asking(0, "p", "four")]
    mixture = Mixture(
        {"drawn": Shapes("train", size=1), "files": pictures}, {"drawn": 1, "files": 1}
    )
    sources = {"drawn": ImageFiles(), "files": ImageFiles(picture_folder / "data.jsonl")}
    mixed = dataclasses.replace(renderer, image_files=ImageFiles(of_source=sources))
    records, dropped = encode(mixture, mixed, max_length=64)
    assert dropped == 0
    assert shape(records[4].tokens) == "[4]p"
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


def test_a_template_that_opens_the_reasoning_begins_once_and_ends_in_it(tmp_path):
    """A tokenizer that adds a begin token, and a chat template that writes one: one is enough."""
    import transformers

    ids = r1.write_model(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    renderer = Renderer(tokenizer, "r1")
    (record,), _ = encode([Example(0, "1+1?", "2")], renderer, max_length=256)
    assert record.text == (
        f"{r1.BEGIN}{r1.USER}1+1?\nPlease reason step by step, and put your final answer within "
        f"\\boxed{{}}.{r1.OPEN}"
    )
    tokens = record.tokens.tolist()
    assert tokens[0] == ids[r1.BEGIN]
    assert tokens.count(ids[r1.BEGIN]) == 1
    assert tokens[-3:-1] == [ids[r1.ASSISTANT], ids[r1.THINK]]
    assert tokenizer.decode(tokens) == record.text
    # By itself the tokenizer adds the second one, which is what plain prompts need.
    assert tokenizer(record.text)["input_ids"][:2] == [ids[r1.BEGIN]] * 2
    plain = Renderer(tokenizer, "plain").tokens(["1+1?"])[0].tolist()
    assert plain.count(ids[r1.BEGIN]) == 1


# --- lengths that prompts ask for ----------------------------------------------------------------


def _asking_for(low, high, seed=0):
    text = "{problem} in {target_length} tokens"
    return Renderer(NoChat(), text, template_chat=False, length_targets=(low, high), seed=seed)


def test_a_prompt_states_the_length_that_its_problem_carries():
    records = outcomes(EXAMPLES, _asking_for(5, 900), max_length=99)
    for record, example in zip(records, EXAMPLES, strict=True):
        target = record.example.meta["target_length"]
        assert type(target) is int
        assert 5 <= target <= 900
        assert record.text == f"{example.problem} in {target} tokens"
        assert example.meta == {}
    assert _asking_for(5, 900).columns == ()  # the data needs no such column


def test_lengths_are_drawn_by_seed_and_problem_alone():
    def drawn(examples, **settings):
        records = outcomes(examples, _asking_for(1, 10**6, **settings), max_length=99)
        return {record.prompt_id: record.example.meta["target_length"] for record in records}

    first = drawn(EXAMPLES)
    assert drawn(EXAMPLES[::-2]) == {example.id: first[example.id] for example in EXAMPLES[::-2]}
    assert len({*first.values()}) == len(EXAMPLES)
    assert not {*first.values()} & {*drawn(EXAMPLES, seed=1).values()}
    few = outcomes([Example(n, "?", "!") for n in range(200)], _asking_for(3, 5), max_length=99)
    assert {record.example.meta["target_length"] for record in few} == {3, 4, 5}


def test_the_hash_of_prompts_that_ask_for_lengths_is_their_own():
    hashes = [_asking_for(*x).hash for x in ((0, 0), (1, 2), (1, 3), (1, 2, 1))]
    assert len({*hashes}) == 4
    assert Renderer(NoChat(), "plain").hash == Renderer(NoChat(), "plain", seed=5).hash
    text = TEMPLATES["length"].fill("1+1", {"target_length": 12})
    assert text.startswith("1+1\n\n")
    assert "about 12 tokens" in text
    assert text.endswith("\\boxed{}.")


def test_a_conversation_is_asked_as_it_was_said():
    earlier = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]
    example = Example(1, "last", "", {"earlier_messages": earlier})
    (found,) = outcomes([example], Renderer(Characters(), "Q: {problem}"), max_length=99)
    assert found.text == "<system>S<user>u<user>Q: last<assistant>"
    own = Renderer(Characters(), "chat", "mine")
    (found,) = outcomes([example], own, max_length=99)
    assert found.text == "<system>S<user>u<user>last<assistant>"  # its own, not ours
    example = Example(1, "last", "", {"earlier_messages": earlier[1:]})
    (found,) = outcomes([example], own, max_length=99)
    assert found.text == "<system>mine<user>u<user>last<assistant>"
    with pytest.raises(DataError, match=r"is no chat.*prompt\.0\.content"):
        outcomes([example], PLAIN, max_length=99)
