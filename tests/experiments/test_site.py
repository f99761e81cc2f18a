"""The documents as a site: it builds strictly, and every link leads somewhere."""

import html.parser
import os
import re
import subprocess
import sys
import time
import urllib.parse

import pytest

from experiments.site import reference, tree
from luspo import fields
from luspo_jax import metrics

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
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
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
    assert "reference/fields.html#rollout.group_size" in pages[out / "from_trl.html"].links
    assert "reference/metrics.html#rollout/preemptions" in pages[out / "rollout.html"].links
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


def test_documents_link_each_other_in_the_checkout_as_well():
    """Where they are read without the site, a link is a path from the document's own folder."""
    for path in tree.documents():
        if path.endswith(".md"):
            text = (tree.ROOT / path).read_text(encoding="utf-8")
            missing = [x for x in tree.linked(text, path) if not (tree.ROOT / x).exists()]
            assert not missing, path


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
    assert list(tree.linked(text, "docs/scaling.md")) == [
        "CONTRIBUTING.md",
        "configs/quickstart.py",
    ]
