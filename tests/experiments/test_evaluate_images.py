"""Visual benchmarks through the evaluate command: real sample images, a tiny random Qwen2.5-VL."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

from experiments.command import UsageError
from experiments.evaluation import comparison, plan, scoring, session, storage
from experiments.evaluation.plan import Options
from luspo_jax.benchmarks import BENCHMARKS, protocol
from luspo_jax.benchmarks.visual import VISUAL
from luspo_jax.datasets import shapes
from luspo_jax.models import decoder, decoder_weights
from luspo_jax.models.decoder_config import decoder_config
from luspo_jax.prompts.templates import LUSPO_VL_SYSTEM_PROMPT
from tests import vl_cases

SIX = sorted(VISUAL)
NAMES = sorted([*SIX, "label_sums", "shapes"])  # pictures and text in one command
OPTIONS = Options(
    protocol=protocol("dapo", max_response_length=6, num_samples=2),
    system_prompt="",  # the tokenizer has one token a character: the benchmark's takes 700
    max_pixels=4 * 28 * 28,
    refusals="skip",
    limit=2,
    num_slots=8,
    save_every=3,
    workers=1,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vl")
    (folder / "staged").mkdir()
    vl_cases.write_model(folder / "staged", seed_fields={"max_position_embeddings": 2048})
    config = decoder_config(json.loads((folder / "staged" / "config.json").read_text()))
    params = jax.device_get(decoder.init_params(jax.random.key(0), config))
    decoder_weights.export(folder / "model", params, config, source=folder / "staged")
    return str(folder / "model")


def _draw(path, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def options(shared_data, tmp_path_factory):
    """The sample data as it is where its first problems have images; else those that have."""
    folder, vl = tmp_path_factory.mktemp("data"), shared_data / "vl"
    rows = json.loads((vl / "mathvista" / "testmini.json").read_text())
    choice = next(row for row in rows.values() if row["choices"])
    for row in (rows["1"], choice):  # no images of it are at hand
        _draw(folder / "mathvista" / row["image"])
    (folder / "mathvista" / "test.json").write_text(json.dumps([rows["1"], choice]))
    lines = (vl / "math_vision" / "test.jsonl").read_text().splitlines()
    kept = [s for s in lines if (vl / "math_vision" / json.loads(s)["image"]).is_file()]
    (folder / "mathvision.jsonl").write_text("\n".join(kept))
    rows = json.loads((vl / "logicvista" / "dataset.json").read_text())
    images = {p.name for p in (vl / "logicvista" / "images").iterdir()}
    kept = {key: row for key, row in rows.items() if row["imagename"] in images}
    (folder / "logicvista.json").write_text(json.dumps(kept))
    data = {
        "mathverse": vl / "mathverse" / "visualizer_all.json",
        "dynamath": vl / "dynamath",
        "wemath": vl / "wemath" / "testmini.json",
    }
    return dataclasses.replace(
        OPTIONS,
        data=",".join([str(folder), *(f"{k}={v}" for k, v in data.items())]),
        image_dir=f"mathvision={vl / 'math_vision'},logicvista={vl / 'logicvista'}",
        cache_dir=str(folder / "built"),
    )


def _chosen(*names):
    return [BENCHMARKS[name] for name in names]


@pytest.fixture(scope="module")
def finished(model, options, tmp_path_factory):
    """An evaluation of all six, of the drawn task and of text, and the table it printed."""
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    return folder, session.run(model, _chosen(*NAMES), folder, options)


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def _results(folder):
    return json.loads((folder / "results.json").read_text())["benchmarks"]


def _records(folder, name):
    return storage.read_benchmark(folder, name, _results(folder)[name])


def _files(folder):
    return {str(p): p.read_bytes() for p in sorted((folder / "generations").rglob("*.jsonl"))}


def test_each_of_the_six_has_its_figures_in_two_columns(finished):
    folder, table = finished
    results, report = _results(folder), (folder / "results.md").read_text()
    own = {
        "dynamath": ("worst case", "all"), "logicvista": ("accuracy by skill", None),
        "mathverse": ("accuracy by problem_version", None), "mathvista": ("accuracy by task", None),
        "mathvision": ("accuracy by level", None), "wemath": ("four states, loose", "RM rate"),
    }  # fmt: skip
    for name in SIX:
        lines = results[name]["figures"]["lines"]
        title, group = own[name]
        assert any(x["table"] == title and group in (None, x["group"]) for x in lines)
        assert f"{name}, {title}" in table
        assert f"| {title} | items | strict | vlmevalkit |" in report
        assert VISUAL[name].note in table
        assert results[name]["scorers"] == {name: VISUAL[name].label}
        assert results[name]["results"]["lengths"]["mean"] > 0
    assert "figures" not in results["label_sums"]
    assert "images" not in results["label_sums"]
    assert set(results["shapes"]["results"]["by_field"]["kind"]) == {"bars", "dots"}


def test_a_figure_is_that_of_the_stored_verdicts(finished):
    """Average of DynaMath over questions, variants and responses, counted here."""
    records = _records(finished[0], "dynamath")
    lines = _results(finished[0])["dynamath"]["figures"]["lines"]
    found = {(x["table"], x["group"]): x for x in lines}
    for column in ("strict", "vlmevalkit"):
        shares = [r.verdict.parts[column] for r in records]
        assert found["average", "all"][column] == pytest.approx(np.mean(shares))
    assert (found["average", "all"]["n"], found["worst case", "all"]["n"]) == (6, 2)


def test_what_is_not_asked_is_counted_and_named(finished):
    """Images of variants 1 to 3 are at hand, of ten; the limit is of questions."""
    folder, table = finished
    entry = _results(folder)["dynamath"]
    assert entry["problems"] == 6
    assert {reason: len(names) for reason, names in entry["refused"].items()} == {"missing": 14}
    assert {name.partition("/")[0] for name in entry["refused"]["missing"]} == {"1", "2"}
    for text in (table, (folder / "results.md").read_text()):
        assert "dynamath: 14 of 20 not asked, missing: " in text
        assert "dynamath: the first 20 of 5010 problems only" in text
        assert "worst case is over 3 variants a question, not 10: the fewer" in text
    assert "refused" not in _results(folder)["wemath"]
    assert _results(folder)["wemath"]["problems"] == 6  # two problems, of two steps and a whole


def test_prompts_show_image_question_and_choices(finished):
    folder = finished[0]
    prompt = _records(folder, "wemath")[0].prompt
    assert prompt.startswith("<|vision_start|><|image_pad|><|vision_end|>Now, we require you")
    assert "Option: A. 300, 400;B. 400, 300" in prompt
    prompts = {r.problem_id: r.prompt for r in _records(folder, "mathvista")}
    assert "one decimal place" in prompts[0]
    assert "the correct option letter" in prompts[1]
    assert prompts[1].endswith("\nChoices:\n(A) 135°\n(B) 140°\n(C) 145°\n(D) 150°")
    record = _records(folder, "mathverse")[0]
    assert record.prompt.endswith(f"at the end.\nQuestion: {record.problem}")
    assert "<|image_pad|>" not in _records(folder, "label_sums")[0].prompt


def test_a_stopped_evaluation_goes_on_identically(finished, copy, model, options):
    """Parts of two benchmarks are missing, and of one the last only."""
    before = {path.replace(str(finished[0]), ""): b for path, b in _files(finished[0]).items()}
    shutil.rmtree(copy / "generations" / "wemath")
    storage.part_path(copy, "dynamath", 1).unlink()
    table = session.run(model, _chosen(*NAMES), copy, options)
    assert {path.replace(str(copy), ""): b for path, b in _files(copy).items()} == before
    assert table == finished[1]
    blank = dataclasses.replace(options, blank_images=True)
    with pytest.raises(UsageError, match=r"wemath.images: .*in the workdir, .*'blank': True"):
        session.run(model, _chosen(*NAMES), copy, blank)


def test_rescoring_finds_what_has_changed(finished, copy):
    assert scoring.rescore(copy, OPTIONS).count("; 0 verdicts changed") == len(NAMES)
    assert sorted(_files(copy).values()) == sorted(_files(finished[0]).values())
    path = storage.part_path(copy, "logicvista", 0)
    records = storage.read_part(path)
    right = [dataclasses.replace(r, response=f"Answer: {r.answer}") for r in records]
    storage.write_part(path, right)
    assert f"{VISUAL['logicvista'].label}; 4 verdicts changed" in scoring.rescore(copy, OPTIONS)
    figures = _results(copy)["logicvista"]["figures"]["lines"]
    assert (figures[0]["strict"], figures[0]["vlmevalkit"]) == (1.0, 1.0)
    text = comparison.compare(copy, finished[0])
    assert "logicvista (n = 2 and 2): +100.0 points" in text


def _only(data, name):
    return next(part for part in data.split(",") if part.startswith(f"{name}="))


def test_predictions_give_the_same_figures(options, tmp_path):
    """Columns by name, ids of two columns; VLMEvalKit's mistake shows in its column only."""
    options = dataclasses.replace(options, data=_only(options.data, "dynamath"), image_dir="")
    (problems, _) = plan.examples(_chosen("dynamath"), options)["dynamath"]
    rows = [{"q": p.meta["question_id"], "v": p.meta["variant"], "out": p.answer} for p in problems]
    month = [p.meta["answer_type"] for p in problems].index("text")
    rows[month]["out"] = ""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dataclasses.replace(options, id_columns=("q", "v"), prediction_column="out")
    entry = BENCHMARKS["dynamath"]
    table = scoring.predictions(tmp_path / "p.jsonl", entry, tmp_path / "out", options)
    figures = _results(tmp_path / "out")["dynamath"]["figures"]["lines"]
    assert (figures[0]["strict"], figures[0]["vlmevalkit"]) == (0.95, 1.0)
    assert "not asked, " not in table
    assert _results(tmp_path / "out")["dynamath"]["results"]["statuses"] == {"empty": 1, "ok": 19}
    options = dataclasses.replace(options, id_columns=("q",))
    with pytest.raises(UsageError, match="ids are 'id' of the dataset, as 1/1"):
        scoring.predictions(tmp_path / "p.jsonl", entry, tmp_path / "other", options)


def test_blanked_images_are_recorded_and_compared_with_a_note(finished, model, options, tmp_path):
    blank = dataclasses.replace(options, blank_images=True, data="", image_dir="")
    table = session.run(model, _chosen("shapes"), tmp_path / "blank", blank)
    assert "shapes: every image was blanked" in table
    facts = [_results(folder)["shapes"] for folder in (finished[0], tmp_path / "blank")]
    assert facts[0]["images"]["shown"] != facts[1]["images"]["shown"]
    assert facts[0]["problems_hash"] == facts[1]["problems_hash"]
    text = comparison.compare(finished[0], tmp_path / "blank")
    assert "note: shapes: images differ: blank False and blank True" in text


def test_problems_that_cannot_be_asked_stop_or_are_reported(model, tmp_path):
    """A missing image, an unreadable one and one that is too large, beside one that is well."""
    rows = {}
    for n, name in enumerate(("good", "gone", "bad", "large")):
        rows[name] = {"imagename": f"{name}.png", "question": "q", "answer": "A", "skill": ["s"]}
        rows[name] |= {"broad_capability": [], "specific_capability": []}
        if name != "gone":
            _draw(tmp_path / "images" / f"{name}.png", (40 + 20 * n, 40))
    (tmp_path / "images" / "bad.png").write_bytes(b"\x89PNG no image")
    _draw(tmp_path / "images" / "large.png", (1400, 1400))
    (tmp_path / "test.json").write_text(json.dumps(rows))
    options = dataclasses.replace(
        OPTIONS, data=f"logicvista={tmp_path}", cache_dir=str(tmp_path / "built"), limit=0,
        refusals="stop", max_pixels=0,
    )  # fmt: skip
    long = protocol("dapo", max_response_length=1900, num_samples=1)
    options = dataclasses.replace(options, protocol=long)
    with pytest.raises(UsageError, match=r"its longest prompt has \d+ tokens.*--refusals=skip"):
        session.run(model, _chosen("logicvista"), tmp_path / "out", options)
    small = dataclasses.replace(options, max_pixels=64 * 28 * 28)
    with pytest.raises(UsageError, match=r"2 of 4 .* cannot be asked \(1 missing, 1 not_an"):
        session.run(model, _chosen("logicvista"), tmp_path / "out", small)
    skip = dataclasses.replace(options, refusals="skip")
    (task,) = plan.tasks(_chosen("logicvista"), skip, session.load(
        model, step="latest", dtype="float32"
    ).model)  # fmt: skip
    assert [p.example.meta["id"] for p in task.prompts] == ["good"]
    assert {reason for reason in task.refused} == {"missing", "not_an_image", "too_long"}
    assert task.refused["too_long"] == ["large"]


def test_a_problem_of_steps_is_asked_whole_or_not_at_all(model, options, shared_data, tmp_path):
    """One image of three is missing: its step is refused as missing, the others as incomplete."""
    source = shared_data / "vl" / "wemath"
    shutil.copy(source / "testmini.json", tmp_path / "test.json")
    shutil.copytree(source / "2steps", tmp_path / "2steps")
    (tmp_path / "2steps" / "image" / "1-2.png").unlink()
    options = dataclasses.replace(options, data=f"wemath={tmp_path}", image_dir="")
    loaded = session.load(model, step="latest", dtype="float32").model
    (task,) = plan.tasks(_chosen("wemath"), options, loaded)
    assert task.refused == {
        "incomplete": ["2steps_1/2steps_1", "2steps_1/2steps_multi"],
        "missing": ["2steps_1/2steps_2"],
    }
    assert {p.example.meta["problem_id"] for p in task.prompts} == {"2steps_2"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_dir": "none"}, "--image_dir: no folder none"),
        ({"image_dir": "wemath=x"}, "--image_dir names wemath, which --benchmarks=shapes does not"),
        ({"min_pixels": 10**6, "max_pixels": 10**5}, "min_pixels=1000000 must be positive and at"),
        ({"max_pixels": 100}, "min_pixels=784 must be positive and at most max_pixels=100"),
        (
            {"template": "nonsense"},
            r"--template: unknown template 'nonsense'.*known: answer_tag, boxed",
        ),
    ],
)
def test_mistakes_are_named(model, fields, message):
    loaded = session.load(model, step="latest", dtype="float32").model
    with pytest.raises(ValueError, match=message):
        plan.tasks(_chosen("shapes"), dataclasses.replace(OPTIONS, **fields), loaded)


def test_a_model_of_text_is_told_so(tmp_path):
    with pytest.raises(UsageError, match=r"--benchmarks=shapes: .* reads text only: give a Qwen"):
        session.run("embedded:label_sums", _chosen("label_sums", "shapes"), tmp_path, OPTIONS)


def test_the_paper_s_system_prompt_is_the_benchmarks_own(model, tmp_path):
    """Unless another is given; the drawn task has none."""
    _draw(tmp_path / "images" / "a.png")
    row = {"imagename": "a.png", "question": "Which?", "answer": "A", "skill": ["s"]}
    (tmp_path / "test.json").write_text(json.dumps({"a": row}))
    options = dataclasses.replace(
        OPTIONS, data=f"logicvista={tmp_path}", cache_dir=str(tmp_path / "b"), system_prompt=None
    )
    loaded = session.load(model, step="latest", dtype="float32").model
    visual, drawn = plan.tasks(_chosen("logicvista", "shapes"), options, loaded)
    assert visual.prompts[0].text.startswith(LUSPO_VL_SYSTEM_PROMPT)
    assert drawn.prompts[0].text.endswith(shapes.Shapes("test")[0].problem)
    other = dataclasses.replace(options, system_prompt="Look.")
    (visual,) = plan.tasks(_chosen("logicvista"), other, loaded)
    assert visual.prompts[0].text.startswith("Look.<|vision_start|>")
    assert visual.renderer.hash != drawn.renderer.hash
    assert pathlib.Path(loaded.folder).is_dir()
