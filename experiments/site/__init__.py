"""The documentation as a site: pages of docs/ and of the rest of the checkout, and a reference.

`python -m mkdocs build --strict` builds it into site/ (mkdocs.yml); nothing is fetched, neither
then nor when a page is read.
"""
