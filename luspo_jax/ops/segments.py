"""Which tokens of a row see each other, by their segment ids.

A segment sees itself. A branch also sees its trunk, the segment that it continues: a prompt whose
responses lie behind it in a row, once for all of them. A branch's id is its trunk's plus a multiple
of `BRANCH`, so that one array of ids says both.
"""

BRANCH = 2**16  # ids of segments that are no branches are below


def branch(trunk, number):
    """Returns the id of a trunk's branch, number 0, 1, …."""
    return trunk + (number + 1) * BRANCH


def trunk(ids):
    """Returns the ids of the segments that branches continue; of another segment its own."""
    return ids & (BRANCH - 1)


def sees(query_ids, key_ids):
    """Returns whether queries see keys, their order left aside; ids are broadcast."""
    return (query_ids == key_ids) | (trunk(query_ids) == key_ids)
