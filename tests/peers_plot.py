"""What tests/peers.py has measured, as Markdown tables and as a drawing (SVG). Measures nothing itself."""
import json
import math
import re
import statistics

PEERS = ("llama.cpp", "ik_llama.cpp", "llama2.c")


def load(paths):
    """Results of one or several runs on one machine; rounds of the same model and threads come together."""
    results = None
    for path in paths:
        with open(path) as file:
            more = json.load(file)
        if "commit" not in more:
            raise SystemExit("peers.py: %s does not hold results of this script" % path)
        if results is None:
            results = more
            continue
        for key in ("machine", "commit", "date"):
            if more[key] not in results[key]:
                results[key] += " and " + more[key]
        for table in more["tables"]:
            same = [t for t in results["tables"] if t["threads"] == table["threads"]
                    and t["model"]["name"] == table["model"]["name"]]
            (same[0]["rounds"].extend if same else results["tables"].append)(table["rounds"] if same else table)
    return results


def figure_names(rounds):
    """All figures, in the order of the tables."""
    order = (r"decode$", r"generate (\d+)", r"prompt (\d+)", r"(\d+) together", r"c\((\d+)\)", r"decode at (\d+)",
             r"slowdown at (\d+)")
    places = {}
    for name in {n for figures in rounds for values in figures.values() for n in values}:
        for i, pattern in enumerate(order):
            found = re.match(pattern, name)
            if found:
                places[name] = (i, int((found.groups() or (0,))[0]))
    return sorted(places, key=places.get)


def less_is_better(figure):
    return figure.startswith(("c(", "slowdown"))


def median(rounds, engine, figure):
    values = [r[engine][figure] for r in rounds if r.get(engine, {}).get(figure)]
    return statistics.median(values) if values else None


def ratios(rounds, engine, figure):
    """Ours over theirs (theirs over ours where less is better), round by round."""
    values = []
    for r in rounds:
        ours, theirs = r.get("run.c", {}).get(figure), r.get(engine, {}).get(figure)
        if ours and theirs:
            values.append(theirs / ours if less_is_better(figure) else ours / theirs)
    return values


def best(rounds, engines, figure):
    """The engine, of several, with the best median; None if none has the figure."""
    known = [e for e in engines if median(rounds, e, figure)]
    return (min if less_is_better(figure) else max)(known, key=lambda e: median(rounds, e, figure)) if known else None


def peers_of(rounds, variants):
    """{name: its builds}; with variants, each build is a peer."""
    peers = {}
    for figures in rounds:
        for engine in figures:
            if engine != "run.c":
                builds = peers.setdefault(engine if variants else engine.split(" ")[0], [])
                builds += [] if engine in builds else [engine]
    return {p: sorted(peers[p]) for p in sorted(peers, key=lambda name: (PEERS.index(name.split(" ")[0]), name))}


def number(value):
    return "-" if value is None else "%.2f" % value if value < 100 else "%.0f" % value


def spread(values, form="%.2f"):
    if not values:
        return "-"
    middle, low, high = (form % v for v in (statistics.median(values), min(values), max(values)))
    return middle if low == high else "%s (%s-%s)" % (middle, low, high)


def markdown(rows):
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = []
    for i, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])]
        lines.append("| %s |" % " | ".join(cells))
        if i == 0:
            lines.append("|%s|" % "|".join("-" * (w + 1) + (":" if c else "-") for c, w in enumerate(widths)))
    return lines + [""]


def title(table):
    isa = [r["run.c"]["isa"] for r in table["rounds"] if r.get("run.c", {}).get("isa")]
    return "%s, %d thread%s%s" % (table["model"]["name"], table["threads"], "s" * (table["threads"] > 1),
                                  ", run.c with %s" % isa[0] if isa else "")


def ratio_table(table, variants):
    rounds = table["rounds"]
    peers = peers_of(rounds, variants)
    rows = [["", "run.c"] + list(peers) + ["run.c / " + p for p in peers] + ["run.c / best"]]
    for figure in figure_names(rounds):
        builds = [best(rounds, peers[p], figure) for p in peers]
        top = best(rounds, [b for b in builds if b], figure)
        rows.append([figure] + [number(median(rounds, e, figure)) for e in ["run.c"] + builds]
                    + [spread(ratios(rounds, b, figure)) for b in builds + [top]])
    if len(peers) == 1:
        rows = [row[:-1] for row in rows]
    keep = [c for c in range(len(rows[0])) if c == 0 or any(row[c] != "-" for row in rows[1:])]
    return ["**%s**" % title(table), ""] + markdown([[row[c] for c in keep] for row in rows])


def limits_table(tables):
    """How near ./run comes to what this machine allows, by its own bench."""
    every = [(t, [r["run.c"] for r in t["rounds"] if r.get("run.c", {}).get("limits")]) for t in tables]
    widths = sorted({int(k) for _, ours in every for f in ours for k in f["limits"].get("times_least", {})})
    rows = [["", "read GB/s", "G multiply-adds/s", "decode / reading"] + ["k = %d" % k for k in widths]
            + ["slowdown / by bytes"]]
    for table, ours in every:
        limits = [f["limits"] for f in ours if "roofline" in f["limits"]]
        long = "slowdown at %d" % table["model"]["long"]
        against = [f[long] / f["limits"]["slowdown by bytes"] for f in ours if "slowdown by bytes" in f["limits"]]
        if ours:
            rows.append([title(table).split(", run.c")[0], spread([x["read_gb_s"] for x in limits], "%.1f"),
                         spread([x["gmac_s"] for x in limits], "%.1f"),
                         spread([100 * x["roofline"] for x in limits], "%.0f %%")]
                        + [spread([x["times_least"][str(k)] for x in limits]) for k in widths] + [spread(against)])
    if len(rows) == 1:
        return []
    return ["**run.c against the machine's limits**, all measured by `./run -m bench`: what all threads read and "
            "multiply; decode as a share of what reading its weights allows; the time of a pass over k tokens over "
            "the larger of its bytes / reading and its multiply-adds / multiplying (1: nothing left to gain); "
            "slowdown at the long context over what the bytes of the cache explain", ""] + markdown(rows)


def heading(results):
    """Machine, date, commit, rounds: for table and drawing."""
    rounds = max([len(t["rounds"]) for t in results["tables"]] + [0])
    return "%s, %d cores, %s; run.c at %s; %s" % (
        results["machine"], results["cores"], results["date"], results["commit"],
        "median of %d rounds (smallest-largest)" % rounds if rounds > 1 else "one round")


def remarks(results):
    """What else both should say: versions of the peers, and how busy the machine was."""
    others = max([f.get("others", 0) for t in results["tables"] for r in t["rounds"] for f in r.values()] + [0])
    return ([results["note"] + "."] if results["note"] else []) + (
        ["Other work took up to %.0f %% of the processors: these figures are distorted, those of engines whose "
         "threads spin at barriers most of all." % (100 * others)] if others > 0.05 else [])


def report(results, variants):
    tables = [t for t in results["tables"] if any(f for r in t["rounds"] for f in r.values())]
    lines = [heading(results) + ". Speeds in tokens/s, c(k) and slowdown in times; ratios above 1: run.c is faster"
             + ("" if variants else "; of an engine's builds the better one, figure by figure") + ".", ""]
    for remark in remarks(results):
        lines += [remark, ""]
    for table in tables:
        lines += ratio_table(table, variants)
    return "\n".join(lines + limits_table(tables)).rstrip() + "\n"


# --------------------------------------------------------------------------------------------------
# The drawing: a panel for each model, a group of bars for each figure, a bar for each peer. Ratios on
# a scale of doublings, so that half and twice look alike. No background; tones for white and black pages.

COLOURS = dict(zip(PEERS, ("#4a8fd8", "#d98324", "#3fa06f")))
INK, GRID = "#747f8d", "#8b949e"
BAR, GAP, DOUBLING, LEFT, WIDTH = 24, 16, 46, 46, 900
LOWEST, HIGHEST = -3, 4         # powers of two: bars end there, their numbers tell


def drawn_groups(table):
    """[(figure, [(peer, ratios)])] of a table; slowdown is left to the table."""
    rounds = table["rounds"]
    peers, groups = peers_of(rounds, False), []
    for figure in figure_names(rounds):
        bars = [(p, ratios(rounds, best(rounds, peers[p], figure), figure)) for p in peers]
        bars = [bar for bar in bars if bar[1]]
        if bars and not figure.startswith("slowdown"):
            groups.append((figure, bars))
    return groups


def draw(results):
    """The SVG."""
    out, y, used = [], 64, set()

    def text(x, y, words, size=11, anchor="middle", fill=INK, more=""):
        words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        out.append('<text x="%.1f" y="%.1f" font-size="%g" text-anchor="%s" fill="%s"%s>%s</text>'
                   % (x, y, size, anchor, fill, more, words))

    def line(x1, y1, x2, y2, colour=GRID, width=1.0, more=""):
        out.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="%g"%s/>'
                   % (x1, y1, x2, y2, colour, width, more))

    for table in results["tables"]:
        groups = drawn_groups(table)
        if not groups:
            continue
        logs = [math.log2(v) for _, bars in groups for _, values in bars for v in values]
        low = max(LOWEST, min(-1, math.floor(min(logs) - 0.2)))
        high = min(HIGHEST, max(1, math.ceil(max(logs) + 0.2)))
        text(0, y, title(table), 13, "start", more=' font-weight="bold"')
        top = y + 16

        def level(ratio):
            return top + (high - min(max(math.log2(ratio), low), high)) * DOUBLING

        for power in range(low, high + 1):
            mark = "%g" % 2.0 ** power
            line(LEFT - 4, level(2.0 ** power), WIDTH, level(2.0 ** power), width=0.6, more=' stroke-opacity="0.45"')
            text(LEFT - 9, level(2.0 ** power) + 4, mark, 11, "end")
        room = sum(max(2, len(bars)) * BAR + GAP for _, bars in groups)
        slack = max(0, min(24, (WIDTH - LEFT - room) / len(groups)))
        x = LEFT + 6
        for figure, bars in groups:
            wide = max(2, len(bars)) * BAR
            at = x + (wide - len(bars) * BAR) / 2
            for peer, values in bars:
                used.add(peer)
                middle = statistics.median(values)
                begin, end = sorted((level(middle), level(1)))
                out.append('<rect x="%.1f" y="%.1f" width="%d" height="%.1f" fill="%s"/>'
                           % (at, begin, BAR - 3, max(end - begin, 1), COLOURS.get(peer, INK)))
                centre = at + (BAR - 3) / 2
                line(centre, level(min(values)), centre, level(max(values)), INK, 1.4)
                above = level(max(values)) - 4 if middle >= 1 else level(min(values)) + 11
                text(centre, above, "%.1f" % middle if middle >= 9.95 else "%.2f" % middle, 9)
                at += BAR
            for i, word in enumerate(figure.split(" ", 1)):
                text(x + wide / 2, level(2.0 ** low) + 15 + 12 * i, word)
            x += wide + GAP + slack
        line(LEFT - 4, level(1), WIDTH, level(1), INK, 1.8)
        y = level(2.0 ** low) + 62
    if not used:
        return None
    body, out = out, []
    text(0, 16, "How many times as fast as its neighbours run.c is; above the line at 1 it is faster", 14, "start",
         more=' font-weight="bold"')
    x = 0
    for peer in [p for p in COLOURS if p in used]:
        out.append('<rect x="%d" y="27" width="12" height="12" fill="%s"/>' % (x, COLOURS[peer]))
        text(x + 17, 37, "against " + peer, 11, "start")
        x += 40 + 6.2 * len("against " + peer)
    for words in [heading(results) + "."] + remarks(results) + [
            "Bars: median; lines: smallest to largest. k together: speed of a pass over k tokens; c(k): its time "
            "over that of one token."]:
        text(0, y - 18, words, 10, "start")
        y += 14
    y -= 18
    head = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" '
            'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif">' % (WIDTH, y + 4, WIDTH, y + 4))
    return "\n".join([head] + out + body + ["</svg>", ""])
