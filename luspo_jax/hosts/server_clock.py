"""How a bucket's clock differs from this host's: times of objects are by the server's."""

import email.utils
import time

from luspo_jax.hosts import buckets

_EQUAL_S = 2.0  # a server states its time in whole seconds, and late by the way back


def ahead_s(url: str) -> float | None:
    """Returns by how many seconds this host's clock is ahead of the server's; 0 for less than two.

    None if the server does not answer with its time.
    """
    scheme, _, rest = url.partition("://")
    fs, bucket = buckets.file_system(scheme), rest.split("/")[0]
    before = time.time()
    try:
        if scheme == "gs":
            headers, _ = fs.call("GET", "b/{}/o", bucket, maxResults=1)
        else:
            answer = fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
            headers = answer["ResponseMetadata"]["HTTPHeaders"]
        stated = next(value for name, value in headers.items() if name.lower() == "date")
        theirs = email.utils.parsedate_to_datetime(stated).timestamp() + 0.5
    except Exception:  # whatever it is, ages can do without, and the listing reports real trouble
        return None
    ahead = (before + time.time()) / 2 - theirs
    return 0.0 if abs(ahead) < _EQUAL_S else ahead
