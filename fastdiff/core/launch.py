"""Launch tables: rows (least architecture, largest size, settings), in order of preference."""


def pick(table, architecture, size):
    """Settings of the first row whose architecture is at most `architecture` and whose size limit is at least `size`.

    Rows stand from the newest architecture to the oldest; the last row is (0, None, settings) and fits all.
    """
    for least, largest, settings in table:
        if architecture >= least and (largest is None or size <= largest):
            return settings
    raise LookupError(f"launch table has no row for architecture {architecture}, size {size}: its last row must be (0, None, ...)")
