"""Launch tables: rows (least architecture, largest size, settings), in order of preference; and how programs share a loop."""

# Rows of (programs that fill the chip: its multiprocessors; least blocks a program loops over when it shares a loop). 0: the interpreter.
SHARE = ((100, None, (148, 4)), (90, None, (132, 4)), (1, None, (108, 4)), (0, None, (16, 2)))


def pick(table, architecture, size):
    """Settings of the first row whose architecture is at most `architecture` and whose size limit is at least `size`.

    Rows stand from the newest architecture to the oldest; the last row is (0, None, settings) and fits all.
    """
    for least, largest, settings in table:
        if architecture >= least and (largest is None or size <= largest):
            return settings
    raise LookupError(f"launch table has no row for architecture {architecture}, size {size}: its last row must be (0, None, ...)")


def shares(architecture, tiles, length, block):
    """(splits, per): a loop over `length` is shared by `splits` programs, `per` each, where `tiles` programs would leave the chip idle.

    A matter of sizes and architecture alone, so that the bits are too.
    """
    programs, least = pick(SHARE, architecture, tiles)
    steps = -(-length // block)
    splits = 1 if tiles >= programs else max(1, min(-(-2 * programs // max(tiles, 1)), steps // least))
    per = max(1, -(-steps // splits)) * block
    return max(1, -(-length // per)), per
