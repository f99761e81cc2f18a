"""What a model wrote reaches neither a terminal nor a browser as anything but text."""

import html
import html.parser
import io
import pathlib
import re
import subprocess
import sys
import unicodedata

import pytest

from experiments.responses import page, reading, terminal, texts
from experiments.responses.selection import Filters
from experiments.responses.view import view
from luspo_jax.prompts import renderer
from tests.experiments.show_cases import STEPS, TRAP, record, write_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOID = {"meta", "link"}
SEEN = TRAP.replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\u202e", "\\u202e")


class Reader(html.parser.HTMLParser):
    """Checks that elements nest, and collects text, classes and attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.tags, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def _page(tmp_path, steps=STEPS, numbers=None, chars=0, **filters):
    run = reading.stored(write_run(tmp_path / "run", steps))
    path = tmp_path / "page.html"
    page.write(path, run, numbers or list(run.steps), Filters(**filters), chars=chars)
    text = path.read_text(encoding="utf-8")
    return text, Reader(text)


def _terminal(tmp_path, steps=STEPS, number=None, chars=0, width=80, colour=True, **filters):
    run = reading.stored(write_run(tmp_path / "run", steps))
    out = io.StringIO()
    console = terminal.console(
        file=out, width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    number = number or max(run.steps)
    with run.steps[number].open("rb") as file:
        terminal.show(view(run, number, file, Filters(**filters)), console, chars=chars)
    return out.getvalue()


def test_a_page_holds_every_response_as_text(tmp_path):
    _, read = _page(tmp_path)
    found = "".join(read.text)
    for records in STEPS.values():
        for each in records:
            assert each.prompt in found
            assert texts.visible(each.response) in found
    assert "step 10" in found
    assert {"script", "img", "iframe", "object", "embed", "form"}.isdisjoint(read.tags)


def test_a_page_runs_and_loads_nothing(tmp_path):
    text, read = _page(tmp_path)
    assert "http:" not in text
    assert "https:" not in text
    assert "//" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    policy = next(v for n, v in read.attributes if n == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'")
    links = [value for name, value in read.attributes if name in ("src", "href")]
    assert links == ["data:,", "#step-1", "#step-2", "#step-10"]
    assert not [name for name, _ in read.attributes if name.startswith("on")]


PLACES = ("prompt", "response", "answer", "prediction", "status", "parts", "images")


@pytest.mark.parametrize("place", PLACES)
def test_no_text_acts_on_a_page(tmp_path, place):
    text, read = _page(tmp_path, _trapped(place))
    assert "<script" not in text
    assert not _acting(text)
    assert SEEN in "".join(read.text)


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_no_text_acts_on_a_terminal(tmp_path, place, colour):
    out = _terminal(tmp_path, _trapped(place), width=400, colour=colour)
    ours = re.compile(r"\x1b\[[\d;]*m")
    assert bool(ours.search(out)) == colour
    assert not _acting(ours.sub("", out))
    assert "\x1b[31mred\x1b[0m" not in out
    assert SEEN in ours.sub("", out)


def _trapped(place):
    """A step with the trap in one field."""
    value = {"parts": {TRAP: 1.0, "exact": 1.0}, "images": [TRAP]}.get(place, TRAP)
    prompt = {"prompt": f"<|vision_start|><|image_pad|><|vision_end|>{'?' * 3}"}
    return {1: [record(1, 0, **(prompt if place == "images" else {}) | {place: value})]}


def _acting(text):
    """Signs that do something other than to be seen, besides line breaks."""
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return [sign for sign in text if unicodedata.category(sign) in kinds and sign != "\n"]


def test_a_model_cannot_write_a_line_of_ours(tmp_path):
    fake = "fine\n#7  right  3 tokens\nproblem 1  8 of 8 right"
    for width, colour in ((40, True), (40, False)):
        folder = tmp_path / f"{width}{colour}"
        out = _terminal(folder, {1: [record(1, 0, response=fake)]}, width=width, colour=colour)
        lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in out.splitlines()]
        assert sum(line.startswith("  #") for line in lines) == 1
        assert sum(line.startswith("problem") for line in lines) == 1
        body = [line.removeprefix("  │ ").rstrip() for line in lines if line.startswith("  │ ")]
        assert body == fake.split("\n")


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("place", ["answer", "prediction"])
def test_a_long_phrase_begins_no_line_of_a_terminal(tmp_path, place, width):
    fake = "problem 1 " + "a" * 60 + " #7 right " + "b" * 100
    out = _terminal(tmp_path, {1: [record(1, 0, **{place: fake})]}, width=width)
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in out.splitlines()]
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("problem") for line in lines) == 1
    assert sum(line.startswith("  #") for line in lines) == 1
    assert "".join(fake.split()) in "".join("".join(lines).split())


def test_facts_that_do_not_fit_go_to_an_indented_line_whole(tmp_path):
    out = re.sub(r"\x1b\[[\d;]*m", "", _terminal(tmp_path, number=2, width=50))
    lines = out.splitlines()
    first = lines.index("problem 9  1 of 2 right")
    assert lines[first : first + 7] == [
        "problem 9  1 of 2 right",
        "    10 … 40 tokens, mean 25.0  mean reward 1",
        "  ┊ What is 9?",
        "  answer  9",
        "  #0  right  10 tokens  reward 1.5  exact 1",
        "      form 0.5  advantage +0.7  read as 9",
        "  │ It is 9, I say, sample 0",
    ]


def test_lines_fit_a_terminal_and_are_whole_in_a_file(tmp_path):
    steps = {1: [record(1, 0, response="word " * 60)]}
    plain = re.sub(r"\x1b\[[\d;]*m", "", _terminal(tmp_path / "a", steps, width=50))
    body = [line for line in plain.splitlines() if line.startswith("  │")]
    assert len(body) > 5
    assert max(map(len, body)) <= 50
    whole = _terminal(tmp_path / "b", steps, width=50, colour=False)
    assert [line for line in whole.splitlines() if line.startswith("  │")] == [
        "  │ " + "word " * 60
    ]


def test_signs_tell_without_colour(tmp_path):
    out = _terminal(tmp_path, number=2, width=200, colour=False)
    lines = [line for line in out.splitlines() if line.startswith("  #")]
    assert lines[0] == (
        "  #0  right  10 tokens  reward 1.5  exact 1  form 0.5  advantage +0.7  read as 9"
    )
    assert lines[1] == (
        "  #1  wrong  40 tokens  reward 0.5  exact 0  form 0.5  advantage −0.7  TRUNCATED  "
        "read as 9"
    )
    assert "  no verdict  8 tokens" in lines[4]
    assert lines[4].endswith("advantage 0  status timeout  read as 7")
    assert lines[5].endswith("advantage 0  status unparsed")


def test_long_texts_are_cut_and_say_so(tmp_path):
    response = "a" * 3000 + "needle" + "b" * 3000
    steps = {1: [record(1, 0, response=response)]}
    out = _terminal(tmp_path / "a", steps, chars=400, width=80, colour=False)
    assert " [… 5,606 characters left out …] " in out
    assert "needle" not in out
    found = _terminal(tmp_path / "b", steps, chars=400, find="NEEDLE", colour=False)
    assert "needle" in found
    assert found.count("characters left out") == 2
    text, read = _page(tmp_path / "c", steps, chars=400, find="NEEDLE")
    assert "<mark>needle</mark>" in text
    assert read.text.count("needle") == 1
    assert response in "".join(_page(tmp_path / "d", steps)[1].text)


@pytest.mark.parametrize("most", [0, 1, 3, 4, 10, 99, 100, 101])
@pytest.mark.parametrize("find", ["", "05", "50", "98", "nowhere"])
def test_an_excerpt_and_what_it_leaves_out_are_the_text(most, find):
    text = "".join(f"{n:02d}" for n in range(50))
    pieces = texts.excerpt(text, most, find)
    kept = [piece for piece in pieces if isinstance(piece, str)]
    left = sum(piece for piece in pieces if isinstance(piece, int))
    assert sum(map(len, kept)) + left == len(text)
    if most and len(text) > most:
        assert sum(map(len, kept)) <= most
        assert all(pieces)
        pattern = (p if isinstance(p, str) else f"[0-9]{{{p}}}" for p in pieces)
        assert re.fullmatch("".join(pattern), text)
        kinds = [type(piece) for piece in pieces]
        assert kinds == [(str, int)[n % 2] for n in range(len(pieces))]
    else:
        assert pieces == [text]
    if find and find in text and (not most or most >= 10):
        assert any(find in piece for piece in kept)


def test_images_are_named(tmp_path):
    assert renderer.VISION_START + renderer.IMAGE_TOKEN + renderer.VISION_END == (
        "<|vision_start|><|image_pad|><|vision_end|>"
    )
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    prompt = f"{place}and {place}: which?"
    old = record(1, 0, prompt=prompt)
    steps = {1: [record(2, 0, prompt=prompt, images=["figures/a.png", "b, row 3"]), old]}
    out = _terminal(tmp_path, steps, colour=False)
    assert "[image 1: figures/a.png]and [image 2: b, row 3]: which?" in out
    assert "[image 1]and [image 2]: which?" in out


def test_half_a_surrogate_pair_is_written(tmp_path):
    steps = {1: [record(1, 0, response="half \ud83d pair", answer="\udc80")]}
    assert "half \\ud83d pair" in _page(tmp_path / "a", steps)[0]
    assert "half \\ud83d pair" in _terminal(tmp_path / "b", steps, colour=False)


def test_a_page_of_many_folds_its_groups(tmp_path):
    steps = {1: [record(n, s) for n in range(20) for s in range(8)]}
    text, read = _page(tmp_path / "a", steps)
    assert text.count("<details><summary>") == 20
    assert text.count("<details open><summary>") == 160
    assert text.count("✓") == 160
    assert "all 160 responses shown" in "".join(read.text)
    few, _ = _page(tmp_path / "b", steps, problems=[3])
    assert "<details><summary>" not in few


def test_a_page_that_fails_leaves_nothing(tmp_path):
    run = reading.stored(write_run(tmp_path / "run"))
    (tmp_path / "run" / "rollouts" / "step_000010.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        page.write(tmp_path / "out" / "page.html", run, [1, 10], Filters())
    assert list((tmp_path / "out").iterdir()) == []


def test_a_page_needs_no_rich(tmp_path):
    write_run(tmp_path / "run")
    code = (
        "import sys; sys.modules['rich'] = sys.modules['rich.console'] = None\n"
        f"sys.argv = ['show', {str(tmp_path / 'run')!r}, *sys.argv[1:]]\n"
        "from experiments import command, show\n"
        "sys.exit(command.call(show.main, required=('workdir',), positional='workdir'))"
    )
    for flags, status in (([f"--html={tmp_path / 'page.html'}"], 0), ([], 2)):
        ran = subprocess.run(
            [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert ran.returncode == status, ran.stderr
    assert ran.stderr.endswith("(pip install rich); --html=FILE writes a page without it\n")
    assert (tmp_path / "page.html").exists()
