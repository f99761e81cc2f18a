"""What mkdocs calls while it builds the site (`hooks` of mkdocs.yml)."""

import pathlib
import posixpath
import re
import sys

# The program `mkdocs`, unlike `python -m mkdocs`, does not look into the checkout it is run in.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from experiments.site import reference, tree

# A whole element that is left alone, or a piece of code outside of it.
_CODE = re.compile(r"<(a|pre|h[1-6])\b.*?</\1>|<code>(?P<code>[^<]+)</code>", re.DOTALL)
_NAMED = re.compile(r"(?:--)?(?P<config>config\.)?(?P<name>[\w./*]+?)(?:=\S*)?")


def on_files(files, config):
    """Adds the documents outside docs/, the reference, and files that documents link."""
    from mkdocs.structure.files import File

    documents, written = tree.documents(), reference.pages()
    for path in documents:
        if not path.startswith("docs/"):
            source = str(tree.ROOT / path)
            files.append(File.generated(config, tree.place(path), abs_src_path=source))
    texts = {p: (tree.ROOT / p).read_text("utf-8") for p in documents if p.endswith(".md")}
    texts |= {f"docs/{place}": text for place, text in written.items()}
    shown: dict[str, str] = {}
    while texts:
        path, text = texts.popitem()
        for link in tree.linked(text, path):
            if link not in (*documents, *shown) and (tree.ROOT / link).is_file():
                texts[link] = shown[link] = tree.shown(link)
    written |= {tree.place(path): text for path, text in shown.items()}
    for place, text in written.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points a page's links to their places in the site."""
    return tree.rewritten(markdown, tree.origin(page.file.src_uri), tree.place)


def on_page_content(html, page, config, files):
    """Links each field and metric that stands as code to its line in the reference."""
    here = page.file.src_uri
    places = reference.anchors(fine_tuning=here in ("sft.md", "reference/sft_fields.md"))

    def replace(match):
        named = _NAMED.fullmatch(match["code"] or "")
        if not named or not (named["config"] or re.search(r"[./]", named["name"])):
            return match[0]
        file, _, anchor = places.get(named["name"], here).partition("#")
        if file == here:
            return match[0]
        url = posixpath.relpath(files.get_file_from_path(file).url, posixpath.dirname(page.url))
        return f'<a href="{url}#{anchor}">{match[0]}</a>'

    return _CODE.sub(replace, html)
