"""The host's account of a pool of pages: which are free, and how many sequences use each."""

from collections.abc import Iterable


class PagePool:
    """The pages of one device along "batch". Page 0 is nobody's: idle rows name it."""

    def __init__(self, num_pages: int):
        self._uses = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """Number of pages that somebody uses."""
        return len(self._uses) - 1 - len(self._free)

    def take(self, count: int) -> list[int]:
        """Takes free pages; there must be as many."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages are asked for and {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._uses[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Adds a user to pages that are in use."""
        for page in pages:
            if not self._uses[page]:
                raise RuntimeError(f"page {page} is shared and nobody uses it")
            self._uses[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Removes a user; a page without users is free."""
        for page in pages:
            if not self._uses[page]:
                raise RuntimeError(f"page {page} is given back and nobody uses it")
            self._uses[page] -= 1
            if not self._uses[page]:
                self._free.append(page)
