"""What is shown of a configuration's prompts is what the model gets, and none of it acts."""

import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers

from configs import quickstart, sft_label_sums
from experiments.prompts import page, reading, terminal
from experiments.prompts.reading import Piece, pieces
from experiments.responses.terminal import console
from luspo_jax import prompts
from luspo_jax.datasets import DataError
from luspo_jax.run.data import load_data
from luspo_jax.run.model import load_model
from tests.experiments.show_cases import TRAP
from tests.experiments.test_show_pages import SEEN, Reader, _acting

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = "Ünïcode ∑ 日本語 👩‍🚀 and  spaces\n\n\tEnd."


def _bytes():
    """A tokenizer of bytes, as GPT-2's and Qwen's are, with a special token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: index for index, sign in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=["<|pad|>"]
    )


def _words():
    """A tokenizer that writes a word's space only after another word, as Llama's does."""
    words = ["<unk>", "<s>", "▁one", "▁two", "▁three", "s"]
    model = tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", unk_token="<unk>"
    )


def _joined(found):
    return "".join(piece.text * piece.repeats for piece in found)


def test_pieces_are_the_text_and_characters_stay_whole():
    tokenizer = _bytes()
    tokens = tokenizer(TEXT + "<|pad|>" * 5 + "é")["input_ids"]
    found = pieces(np.asarray(tokens, np.int32), tokenizer)
    assert _joined(found) == TEXT + "<|pad|>" * 5 + "é"
    assert [token for piece in found for token in piece.ids] == tokens
    assert max(len(piece.ids) for piece in found if not piece.special) == 4
    assert not any("\ufffd" in piece.text for piece in found)
    (special,) = [piece for piece in found if piece.special]
    assert (special.text, special.repeats) == ("<|pad|>", 5)
    cut = pieces(tokens[:1], tokenizer)  # half a character, at the end of all
    assert [piece.ids for piece in cut] == [tuple(tokens[:1])]


def test_a_words_space_belongs_to_it():
    assert [piece.text for piece in pieces([2, 3, 5, 4], _words())] == [
        "one", " two", "s", " three"
    ]  # fmt: skip
    assert _joined(pieces([2, 3, 5, 4], _words())) == "one twos three"


def test_pieces_of_qwens_tokens_are_its_text(shared_data):
    folder = shared_data / "qwen" / "Qwen3-1.7B"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": TEXT}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found = pieces(tokenizer(text)["input_ids"], tokenizer)
    assert _joined(found) == text
    assert [p.text for p in found if p.special] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


def test_tokens_that_are_trained_on_are_marked():
    found = pieces([1, 2, 3, 4], _words(), [False, False, True, True])
    assert [piece.trained for piece in found] == [False, False, True, True]


def _own(tmp_path, rows):
    config = quickstart.get_config()
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.name, config.data.path = "file", str(path)
    config.data.options = {}
    config.data.cache_dir = str(tmp_path / "built")
    config.data.eval_name, config.data.eval_path = "", str(path)
    return config


def test_prompts_are_those_of_the_run_in_its_order():
    config = quickstart.get_config()
    config.eval.num_problems = 16
    model = load_model(config)
    data = load_data(config, model)
    found = reading.preview(config, 5, 50)
    expected = data.stream.next_prompts(5)
    assert [[t for p in one.pieces for t in p.ids] for one in found.prompts] == [
        record.tokens.tolist() for record in expected
    ]
    assert [one.answer for one in found.prompts] == [r.example.answer for r in expected]
    held_out = reading.preview(config, 5, 50, held_out=True)
    assert [_joined(one.pieces) for one in held_out.prompts] == [r.text for r in data.held_out[:5]]


def test_what_is_left_out_and_how_long_prompts_are(tmp_path):
    rows = [{"problem": "ab?" * n, "answer": str(n), "level": n % 2} for n in range(1, 11)]
    config = _own(tmp_path, rows)
    config.data.max_prompt_length, config.data.filter = 12, "level == 1 or len(problem) > 20"
    found = reading.preview(config, 4, 100)
    facts = dict(found.facts)
    sizes = [3 * n for n in range(1, 11) if n % 2 or 3 * n > 20]
    assert found.title.startswith(f"first 4 of {len(sizes)} prompts")
    assert f"(of 10, which data.filter leaves) of {config.data.path[-9:]}" in facts["data"]
    long = sum(size > 12 for size in sizes)
    assert facts["left out"].startswith(f"{long} of {len(sizes)} are longer than data.max_prompt_")
    assert "the longest: problems 6" in facts["left out"]
    said = dict(re.findall(r"(\d+) %: (\d+)", facts["tokens"]))
    for share, value in said.items():
        assert int(value) == np.quantile(sizes, int(share) / 100, method="inverted_cdf"), share
    assert f"mean {np.mean(sizes):.1f}, limit 12" in facts["tokens"]
    config.data.filter = "levle == 1"
    with pytest.raises(DataError, match="did you mean 'level'"):
        reading.preview(config, 1, 10)


def _shown(found, width=80, colour=True, **options):
    out = io.StringIO()
    to = console(
        file=out, force_terminal=colour, width=width, color_system="truecolor" if colour else None
    )
    terminal.show(found, to, **options)
    return out.getvalue()


OURS = re.compile(r"\x1b\[[\d;]*m")


@pytest.mark.parametrize("colour", [True, False])
def test_no_text_acts_on_a_terminal(colour):
    text = f"{TRAP}\tx\nprompt 7  problem 3"
    shown = reading.Shown("prompt 1", (Piece((1,), text), Piece((2,), TRAP, True)), TRAP, (TRAP,))
    out = _shown(reading.Preview("t", (("data", TRAP),), (shown,)), width=400, colour=colour)
    assert bool(OURS.search(out)) == colour
    plain = OURS.sub("", out)
    assert not _acting(plain)
    assert plain.count(SEEN) == 5
    assert sum(line.startswith("prompt") for line in plain.splitlines()) == 1
    assert "\\tx" in plain


def test_neighbouring_tokens_are_told_apart():
    tokens = (Piece((1,), "a"), Piece((2,), "b\n"), Piece((3,), "<s>", True, repeats=3))
    tokens = (*tokens, Piece((4,), "c", trained=True))
    found = reading.Preview("t", (), (reading.Shown("prompt 1", tokens, "4"),))
    out = _shown(found, ids=True)
    assert len({*re.findall(r"(\x1b\[[\d;]*m)(?:a|b↵|<s>×3)", out)}) == 3
    plain = _shown(found, colour=False, ids=True)
    assert "  ┊ a▏b↵▏\n  ┊ <s>×3▏c▍\n  answer  4\n  ids  1 2 3 4\n" in plain


def test_a_page_holds_everything_and_runs_nothing(tmp_path):
    tokens = (Piece((1,), TRAP), Piece((2, 3), "é"), Piece((4,), "<|x|>", True, True, 2))
    shown = reading.Shown("prompt 1", tokens, TRAP, (TRAP,))
    path = tmp_path / "page.html"
    page.write(path, reading.Preview(TRAP, (("data", TRAP),), (shown,)), ids=True)
    text = path.read_text(encoding="utf-8")
    read = Reader(text)
    assert "<script" not in text
    assert not _acting(text)
    assert "".join(read.text).count(SEEN) == 6
    assert [value for name, value in read.attributes if name == "title"] == ["1", "2 3", "4"]
    assert [v for n, v in read.attributes if n == "class" and v in ("a", "b", "s t")] == [
        "a", "b", "s t"
    ]  # fmt: skip
    assert "default-src 'none'" in text
    assert "ids 1 2 3 4" in "".join(read.text)


def test_demonstrations_show_what_is_trained_on():
    config = sft_label_sums.get_config()
    found = reading.preview(config, 2, 10)
    assert len(found.prompts) == 2
    for one in found.prompts:
        trained = "".join(piece.text for piece in one.pieces if piece.trained)
        assert trained.endswith(one.pieces[-1].text)
        assert one.pieces[0].trained is False
        assert "####" in trained
    assert "demonstrations" in dict(found.facts)["training"]


def test_two_beginnings_of_a_text_are_noted():
    model = type("", (), {"tokenizer": _words()})
    record = prompts.PromptRecord(
        3, np.array([1, 1, 2], np.int32), "", reading.Example(3, "one", "1", {"source": "mine"})
    )
    shown = reading._shown(1, record, model)
    assert shown.title == "prompt 1  problem 3  3 tokens  of mine"
    assert "two tokens that begin a text" in shown.notes[0]
    assert not reading._shown(1, prompts.PromptRecord(
        3, np.array([1, 2], np.int32), "", record.example), model).notes  # fmt: skip


@pytest.mark.slow  # starts a process
def test_the_command_writes_a_page(tmp_path):
    command = [sys.executable, "-m", "experiments.preview", "--config=configs/quickstart.py"]
    ran = subprocess.run(
        [*command, f"--html={tmp_path}/p.html", "--num=2"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "p.html: first 2 of 13,677 prompts" in ran.stdout
    Reader((tmp_path / "p.html").read_text())
