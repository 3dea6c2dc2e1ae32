"""Records as tables: for the terminal, for a README, and beside an older run."""

from math import exp, log

from rich.console import Console
from rich.table import Table
from rich.text import Text

KEY = ("op", "case", "dtype", "pass", "device", "threads")
LEFT = ("op", "case", "dtype", "pass", "backend", "best peer")
COLUMNS = ("op", "case", "dtype", "pass", "threads", "backend", "ours ms", "best peer", "peer ms", "ratio (20-80 %)", "of floor",
           "extra MB, ours / peer", "error / limit")


def _number(value, form="{:.3g}"):
    return "-" if value is None else form.format(value)


def _megabytes(value):
    return _number(None if value is None else value / 1e6, "{:.1f}")


def cells(record):
    """One record as the texts of COLUMNS, and of the host's microseconds per call where they were measured."""
    peer = record["best_peer"]
    spread = "" if peer is None else f" ({record['ratio_low']:.2f}-{record['ratio_high']:.2f})"
    limit = record["error_limit"]
    row = [record["op"], record["case"], record["dtype"], record["pass"], str(record["threads"]), record["backend"],
           _number(record["ours_ms"]), peer or "-", _number(record["peers_ms"].get(peer)), _number(record["ratio"], "{:.2f}") + spread,
           _number(record["of_floor"], "{:.2f}"), f"{_megabytes(record['peak_bytes'])} / {_megabytes(record['peer_peak_bytes'])}",
           _number(record["error"] / limit if limit else 0.0, "{:.2f}")]
    return row + ([f"{record['host_us']:.1f}"] if "host_us" in record else [])


def _columns(records):
    return [*COLUMNS, "host us"] if any("host_us" in r for r in records) else list(COLUMNS)


def mean_ratio(records):
    """Geometric mean of the ratios, or None."""
    ratios = [r["ratio"] for r in records if r["ratio"]]
    return exp(sum(map(log, ratios)) / len(ratios)) if ratios else None


def table(records):
    """For the terminal; ratios below 1 stand out."""
    columns = _columns(records)
    made = Table(box=None, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="left" if name in LEFT else "right", overflow="fold")
    for record in records:
        row = [Text(text) for text in cells(record)]
        if record["ratio"] is not None:
            row[columns.index("ratio (20-80 %)")].stylize("red" if record["ratio"] < 1 else "green")
        made.add_row(*row)
    return made


def markdown(records):
    columns = _columns(records)
    rows = [columns, ["---"] * len(columns), *map(cells, records)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def against(records, old):
    """Rows (key, old ratio, new ratio, change) of the records that an older document also has.

    Ratios are compared, not times, since both sides of a ratio met the same noise. A change is "faster" or "slower" only where the
    20th to 80th percentiles of the two do not overlap.
    """
    before = {tuple(r[k] for k in KEY): r for r in old["records"]}
    rows = []
    for record in records:
        key = tuple(record[k] for k in KEY)
        past = before.get(key)
        if past is None or past["ratio"] is None or record["ratio"] is None:
            rows.append((key, past and past["ratio"], record["ratio"], "not comparable"))
        elif record["ratio_low"] > past["ratio_high"]:
            rows.append((key, past["ratio"], record["ratio"], "faster"))
        elif record["ratio_high"] < past["ratio_low"]:
            rows.append((key, past["ratio"], record["ratio"], "slower"))
        else:
            rows.append((key, past["ratio"], record["ratio"], "same"))
    return rows


def baseline_table(rows):
    made = Table(box=None, pad_edge=False, title="against the baseline", title_justify="left")
    for name in (*KEY, "old ratio", "new ratio", "change"):
        made.add_column(name, justify="right" if "ratio" in name else "left", overflow="fold")
    for key, old, new, change in rows:
        style = {"faster": "green", "slower": "red"}.get(change, "")
        made.add_row(*map(str, key), _number(old, "{:.2f}"), _number(new, "{:.2f}"), Text(change, style=style))
    return made


def overhead_table(rows):
    made = Table(box=None, pad_edge=False, title="one eager call without gradient on 16-element tensors", title_justify="left")
    for name in ("op", "backend", "ours us", "scaled_dot_product_attention us", "ratio"):
        made.add_column(name, justify="left" if name in ("op", "backend") else "right")
    for row in rows:
        made.add_row(row["op"], row["backend"], f"{row['ours_us']:.2f}", f"{row['sdpa_us']:.2f}", f"{row['ratio']:.2f}")
    return made


def console(stream=None, stderr=False):
    """As wide as the table needs where the output is no terminal."""
    made = Console(file=stream, stderr=stderr, highlight=False, markup=False)
    return made if made.is_terminal else Console(file=stream, stderr=stderr, highlight=False, markup=False, width=220)
