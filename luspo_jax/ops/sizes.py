"""Sizes to compile for: few of them, so that few programs serve everything that comes."""


def rounded_up(count: int, multiple: int, most: int | None = None) -> int:
    """The least of multiple · {1, 2, 4, …} that reaches `count`, cut at `most`.

    With devices as the multiple, a size that all of them share.
    """
    size = multiple * (1 << max(0, -(-count // multiple) - 1).bit_length())
    return size if most is None else min(size, most)


def bucket_count(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is at least `count`.

    At most a third of it is padding, of three or more.
    """
    power = 1 << max(0, int(count) - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def bucket_length(longest: int, maximum: int, *, num_buckets: int) -> int:
    """Smallest of `num_buckets` equally spaced lengths up to `maximum` that holds `longest`.

    A step compiles once a bucket; more buckets compute less padding.
    """
    if longest > maximum:
        raise ValueError(f"a row of {longest} tokens exceeds the maximum of {maximum}")
    size = -(-maximum // num_buckets)
    return min(maximum, max(1, -(-longest // size)) * size)
