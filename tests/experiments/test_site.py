"""The documents as a site: it builds strictly, all its links lead somewhere, and tables are true."""

import ast
import dataclasses
import html.parser
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.parse
from importlib.metadata import PackageNotFoundError, version

import pytest

from experiments.site import reference, tree
from luspo import fields
from luspo_jax import metrics, objectives
from luspo_jax.run.fields import default_config

DOCS = tree.ROOT / "docs"
TABLES = ("from_trl.md", "from_verl.md", "from_tunix.md")
# Attributes that a browser loads at once, by element.
_LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class _Page(html.parser.HTMLParser):
    """Links, ids, what is loaded, and the text outside of code of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.loaded, self.text, self._code = [], set(), [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given.get("id"), given.get("name")}
        self._code += tag in ("pre", "code", "script", "style")
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(_LOADED.get(tag)):
            self.loaded.append(given[_LOADED[tag]])

    def handle_endtag(self, tag):
        self._code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        if not self._code:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Returns (folder of the built site, page → what is on it)."""
    out = tmp_path_factory.mktemp("site")
    began = time.monotonic()
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=tree.ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    assert time.monotonic() - began < 60
    return out, {path: _Page(path) for path in out.rglob("*.html")}


def _outside(address):
    return bool(urllib.parse.urlsplit(address).scheme or address.startswith("//"))


def test_every_link_leads_to_a_page_and_a_place_on_it(site):
    out, pages = site
    missing = []
    for path, page in pages.items():
        if path.name == "404.html":  # served from any folder
            continue
        for link in filter(lambda address: not _outside(address), page.links + page.loaded):
            file, anchor = urllib.parse.unquote(link).split("#")[0], link.partition("#")[2]
            there = (path.parent / file).resolve() if file else path
            there = there / "index.html" if there.is_dir() else there
            known = pages[there].ids if there in pages else ()
            if not there.is_file() or (anchor and urllib.parse.unquote(anchor) not in known):
                missing.append(f"{path.relative_to(out)}: {link}")
    assert not missing


def test_nothing_is_loaded_from_elsewhere(site):
    _, pages = site
    assert not [link for page in pages.values() for link in page.loaded if _outside(link)]


def test_tables_and_fences_of_all_documents_are_read_as_such(site):
    """Python-Markdown needs blank lines where GitHub does not."""
    out, pages = site
    for path, page in pages.items():
        if path.relative_to(out).parts[0] != "files":
            text = " ".join(page.text)
            assert not re.search(r"\|\s*-{3,}|```|\]\(", text), path


def test_every_document_is_found_from_the_first_page(site):
    """Pages of studies, which mkdocs does not miss; those of docs/ it does."""
    out, pages = site
    links = {urllib.parse.unquote(link) for link in pages[out / "index.html"].links}
    studies = (tree.ROOT / "experiments" / "studies").glob("*/README.md")
    for study in studies:
        place = tree.place(study.relative_to(tree.ROOT).as_posix())
        assert place.replace(".md", ".html") in links
    assert (out / "bench" / "index.html").is_file()
    assert (out / "changelog.html").is_file()


def test_fields_and_metrics_in_text_lead_to_their_explanation(site):
    out, pages = site
    links = pages[out / "rollout.html"].links
    assert "reference/fields.html#rollout.overlap" in links
    assert "reference/metrics.html#rollout/preemptions" in links
    known = pages[out / "reference" / "fields.html"].ids
    assert {field.name for s in fields.sections("Settings") for field in s.fields} <= known
    sft = {field.name for s in fields.sections("SftSettings") for field in s.fields}
    assert sft <= pages[out / "reference" / "sft_fields.html"].ids
    assert "reference/sft_fields.html#train.schedule" in pages[out / "sft.html"].links
    shown = pages[out / "reference" / "metrics.html"].ids
    assert {reference.anchor(name) for name in metrics.METRICS} <= shown


def test_the_reference_says_what_a_value_may_be():
    page = reference.fields_page("Settings", "Fields", "rollout.group_size=16")
    (row,) = [line for line in page.splitlines() if "`train.b1`" in line]
    assert "`0.9`" in row
    assert "at least 0 and less than 1" in row
    (row,) = [line for line in page.splitlines() if "`rollout.late`" in line]
    assert "`wait`, `drop`" in row


def test_links_are_rewritten_outside_of_code_only():
    text = "[a](../CONTRIBUTING.md#style) `[b](c.md)` [`d`](../configs/quickstart.py) [e](#f)\n"
    fence = "```\n[g](h.md)\n```\n[i](https://j.example/k.md) ![l](../experiments/studies/m/n.png)"
    found = tree.rewritten(text + fence, "docs/scaling.md", tree.place)
    assert found == (
        "[a](contributing.md#style) `[b](c.md)` [`d`](files/configs/quickstart.py.md) [e](#f)\n"
        "```\n[g](h.md)\n```\n[i](https://j.example/k.md) ![l](studies/m/n.png)"
    )
    page = tree.rewritten("[a](results.md)", "experiments/studies/age/README.md", tree.place)
    assert page == "[a](results.md)"
    assert list(tree.linked(text, "docs/scaling.md")) == ["CONTRIBUTING.md", "configs/quickstart.py"]


@pytest.mark.parametrize("name", [*TABLES, "own_model.md", "own_dataset.md", "own_reward.md"])
def test_fields_that_tables_name_exist_with_their_defaults(name):
    config = default_config()
    known = {f.name for s in fields.sections("Settings") for f in s.fields}
    text = (DOCS / name).read_text(encoding="utf-8")
    # A cell of another library holds names with dots as well: those with a root of ours are ours.
    roots = {field.partition(".")[0] for field in known if "." in field}
    named = 0
    for span in re.finditer(r"`(?:config\.)?(\w+)\.(\w+)[^`]*`(?: \(([^)`]+)\))?", text):
        field = f"{span[1]}.{span[2]}"
        if span[1] not in roots or span[2] in ("py", "jsonl", "json") or _theirs(text, span.start()):
            continue
        assert field in known, field
        named += 1
        if span[3] and not span[3].endswith("in all presets"):
            assert _same(span[3], config[span[1]][span[2]]), span[0]
        elif span[3]:
            value = span[3].partition(" ")[0]
            for preset in objectives.PRESETS.values():
                assert _same(value, getattr(preset, span[2])), span[0]
    assert named > 5


def _theirs(text, position):
    """Whether a position is in the first column of a table of another library's names."""
    line = text[text.rfind("\n", 0, position) + 1 : position]
    return line.startswith("|") and line.count("|") == 1


def _same(said, value):
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return said != "None" and float(said) == value
    return said == str(value)


def _first_column(page, heads):
    """Yields (name, default or None) of each code span in the first column of tables so headed."""
    inside = False
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.startswith(heads):
            inside = True
        elif inside:
            cell = line.split("|")[1]
            if " of the trainer" not in cell:
                yield from re.findall(r"`([\w.]+)`(?: \(((?:[^()]|\([^)]*\))+)\))?", cell)


def _declared(kind):
    for field in dataclasses.fields(kind):
        has = field.default is not dataclasses.MISSING
        yield field.name, field.default if has else field.default_factory


def test_names_and_defaults_of_trl():
    """Where the version that the page is about is installed."""
    _need("trl", "1.16.0")
    from trl import GRPOConfig

    theirs, seen = dict(_declared(GRPOConfig)), 0
    for name, said in _first_column("from_trl.md", "| `GRPOConfig`"):
        assert name in theirs, name
        if said:
            assert _same(said, theirs[name]), name
        seen += 1
    assert seen > 60


def test_names_and_defaults_of_tunix():
    _need("google-tunix", "0.1.7")
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig
    from tunix.rl.rollout.base_rollout import RolloutConfig

    kinds = (GRPOConfig, rl_cluster.RLTrainingConfig, rl_cluster.ClusterConfig, RolloutConfig)
    text = (DOCS / "from_tunix.md").read_text(encoding="utf-8")
    for kind in kinds:
        part = text.partition(f"## `{kind.__name__}`")[2].partition("\n## ")[0]
        theirs = dict(_declared(kind))
        rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
        assert rows
        for name, said in re.findall(r"`(\w+)`(?: \(((?:[^()]|\([^)]*\))+)\))?", " ".join(rows)):
            assert name in theirs, name
            if said:
                assert _same(said, theirs[name]), name


def _need(package, exactly):
    try:
        found = version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} {exactly} is not installed")
    if found != exactly:
        pytest.skip(f"the page is about {package} {exactly}, and {found} is installed")


def test_code_of_the_pages_about_your_own_runs(tmp_path, monkeypatch):
    """The functions and configurations that readers are told to write."""
    blocks = {
        name: re.findall(r"```python\n(.*?)```", (DOCS / name).read_text("utf-8"), re.DOTALL)
        for name in ("own_reward.md", "own_objective.md", "own_dataset.md")
    }
    (function, wiring), (objective,), (mixture,) = blocks.values()
    (tmp_path / "my_rewards.py").write_text(function, encoding="utf-8")
    config = default_config()
    exec(wiring + mixture, {"config": config})
    monkeypatch.chdir(tmp_path)
    from luspo_jax.objectives.length_scales import LENGTH_SCALES
    from luspo_jax.rewards.record import Sample
    from luspo_jax.rewards.user import user_reward

    mine = user_reward(config.reward.options.mine.function)
    assert mine.check(Sample("4", "4", length=10, max_length=40)).value == 1.0
    assert mine.check(Sample("4", "4", length=30, max_length=40)).value == 0.5
    assert mine.check(Sample("5", "4", length=10, max_length=40)).value == 0.0
    assert config.data.mixture.own.weight == 3.0
    monkeypatch.setattr("luspo_jax.objectives.length_scales.LENGTH_SCALES", LENGTH_SCALES)
    made = {}
    try:
        exec(objective, made)
        chosen = made["get_config"]().objective
        preset = objectives.preset(
            chosen.preset,
            length_scale=chosen.length_scale, reference_length=chosen.reference_length,
        )  # fmt: skip
        scale_B = objectives.length_scales(preset, [5.0, 20.0], [0, 0])
        assert [float(w) for w in scale_B] == [10.0, 20.0]
    finally:
        del LENGTH_SCALES["root"]


def _public(body, prefix=""):
    """Yields (name, node) of public classes and functions, also inside of classes and branches."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _public(node.body, prefix)
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


def test_every_public_name_has_a_docstring():
    missing = []
    for folder in ("luspo_jax", "luspo", "experiments"):
        for path in sorted((tree.ROOT / folder).rglob("*.py")):
            module = ast.parse(path.read_text(encoding="utf-8"))
            names = [("the module", module), *_public(module.body)]
            if path.name.startswith("_") and path.name not in ("__init__.py", "__main__.py"):
                continue
            place = path.relative_to(tree.ROOT)
            missing += [f"{place}: {name}" for name, n in names if not ast.get_docstring(n)]
    assert not missing


def test_the_readme_is_for_a_newcomer():
    text = (tree.ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    assert pathlib.Path(tree.ROOT / "docs" / "quickstart.png").is_file()
    assert "pip install -e '.[test]' && pytest" in text
