#!/usr/bin/env python3
"""What drafting gains: ./run with and without it, in interleaved rounds, timed from outside, by kind of prompt.

    make && python3 tests/drafting.py MODEL --prompts FOLDER [--settings auto lookup ...] [--each 10] [--rounds 2]
            [--tokens 200] [--temperature 0] [--threads 2] [--json FILE]

FOLDER holds spec_bench_question.jsonl, HumanEval.jsonl and gsm8k_test.jsonl as their authors publish them; a Spec-Bench
question is the first turn of a conversation. Two more kinds are made of them: "copies" asks for the beginning of an
article word for word, "edits" for a program with another name in it; the mean and the row "all" leave them out. Prompts go
through the chat format if the model has one, else they are plain text. --settings are values of --draft (a file of heads
too); "off" always runs, in every round beside the others, in turning order.

Of each text the time of decoding is what a whole run takes less what the same run takes for one token (loading, prompt).
  gain             off's time over the setting's: median over the texts; in brackets the worst and the best text
  tokens a pass    in all texts of the kind together
  at 1, 2, 3, 4    share of proposals in that place that stood
  repeated         share of 8-grams of the texts that had been in them before: loops flatter lookup
Every text must be the same with every setting, or the program ends with status 1.
"""
import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import time

from common import RUN

REPEATING = ("copies", "edits")


def prompts(folder, each):
    """[(kind, text)], `each` of a kind, evenly over the files."""
    kinds = collections.defaultdict(list)
    def read(name):
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return [json.loads(line) for line in f]
    for q in read("spec_bench_question.jsonl"):
        kind = q["category"]
        kinds[kind if kind in ("translation", "summarization", "qa", "math_reasoning", "rag") else "mt_bench"].append(q["turns"][0])
    for q in read("HumanEval.jsonl"):
        kinds["HumanEval"].append("Complete this Python function:\n\n" + q["prompt"])
        kinds["edits"].append("Rename the function %s to compute in this program, and print all of it:\n\n%s%s" %
                              (q["entry_point"], q["prompt"], q["canonical_solution"]))
    for text in list(kinds["summarization"]):
        article = text.split(":", 1)[-1].strip()
        kinds["copies"].append("Repeat this text word for word:\n\n" + article[:article.rfind(".", 0, 700) + 1 or 700])
    for q in read("gsm8k_test.jsonl"):
        kinds["GSM8K"].append(q["question"])
    return [(kind, found[i * len(found) // n]) for kind, found in kinds.items() for n in [min(each, len(found))] for i in range(n)]


def generate(options, prompt, draft, tokens):
    command = [RUN, options.model, "-i", prompt, "-n", str(tokens), "-t", str(options.temperature), "-s", "1", "--json",
               "--draft", draft] + (["-j", str(options.threads)] if options.threads else [])
    start = time.perf_counter()
    p = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if p.returncode:
        raise SystemExit(p.stderr.decode("utf-8", "replace"))
    return time.perf_counter() - start, json.loads(p.stdout.decode())


def repeated(ids, n=8):
    seen, again = set(), 0
    for i in range(len(ids) - n + 1):
        gram = tuple(ids[i:i + n])
        again += gram in seen
        seen.add(gram)
    return again, max(0, len(ids) - n + 1)


class Sums:
    def __init__(self):
        self.gains, self.accepted, self.passes, self.grams, self.places = [], 0, 0, [0, 0], collections.defaultdict(lambda: [0, 0])

    def row(self):
        places = ["%.2f" % (a / b) if b else "-" for a, b in (self.places[i] for i in range(4))]
        return "%5.2f (%.2f-%.2f) | %.2f | %s | %.0f %%" % (
            statistics.median(self.gains), min(self.gains), max(self.gains), 1 + self.accepted / max(1, self.passes),
            " ".join(places), 100 * self.grams[0] / max(1, self.grams[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--settings", nargs="+", default=["auto"])
    parser.add_argument("--kinds", nargs="+", help="only these")
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    found, different, log = collections.defaultdict(lambda: collections.defaultdict(Sums)), 0, []
    everything = prompts(options.prompts, options.each)
    if options.kinds:
        unknown = set(options.kinds) - {kind for kind, _ in everything}
        if unknown:
            parser.error("there is no kind %s; there are %s" % (
                ", ".join(sorted(unknown)), ", ".join(sorted({kind for kind, _ in everything}))))
        everything = [p for p in everything if p[0] in options.kinds]
    settings = ["off"] + options.settings
    for number, (kind, prompt) in enumerate(everything):
        times, results = collections.defaultdict(list), {}
        for turn in range(options.rounds):
            first = generate(options, prompt, "off", 1)[0]
            for draft in settings[turn % len(settings):] + settings[:turn % len(settings)]:
                seconds, results[draft] = generate(options, prompt, draft, options.tokens)
                times[draft].append(max(seconds - first, 1e-6))
        if len(results["off"]["ids"]) < 16:
            continue                            # too short to time
        for draft in options.settings:
            r, s = results[draft], results[draft]["stats"]
            if (r["ids"], r["text"], r["stop"]) != tuple(results["off"][key] for key in ("ids", "text", "stop")):
                different += 1
                print("DIFFERENT with --draft %s: %r" % (draft, prompt[:100]))
            again, grams = repeated(r["ids"])
            gain = statistics.median(times["off"]) / statistics.median(times[draft])
            log.append({"kind": kind, "draft": draft, "gain": gain, "estimate": 1 + s["net_gain"], "stats": s})
            for sums in [found[draft][kind]] + [found[draft]["all"]] * (kind not in REPEATING):
                sums.gains.append(gain)
                sums.accepted += s["accepted"]
                sums.passes += s["passes"]
                sums.grams[0] += again
                sums.grams[1] += grams
                for i, (a, b) in enumerate(s.get("by_position", [])):
                    sums.places[i][0] += a
                    sums.places[i][1] += b
        if sys.stderr.isatty():
            print("\r%d of %d " % (number + 1, len(everything)), end="", file=sys.stderr)
    for draft, kinds in found.items():
        texts = sum(len(sums.gains) for kind, sums in kinds.items() if kind != "all")
        print("\n--draft %s, temperature %g, %d texts, %d rounds\n" % (draft, options.temperature, texts, options.rounds))
        print("| prompts | gain | tokens a pass | at 1, 2, 3, 4 | repeated |\n|---|---|---|---|---|")
        for kind, sums in kinds.items():
            if kind != "all":
                print("| %s | %s |" % (kind, sums.row()))
        if kinds["all"].gains:
            means = [statistics.median(sums.gains) for kind, sums in kinds.items() if kind not in ("all",) + REPEATING]
            print("| all | %s |\n\nmean of the kinds %.2f, worst kind %.2f" % (
                kinds["all"].row(), statistics.mean(means), min(means)))
        off = [abs(x["estimate"] / x["gain"] - 1) for x in log if x["draft"] == draft]
        print("\nthe program's own estimate of its gain was off by %.0f %% (median)" % (100 * statistics.median(off)))
    if options.json:
        with open(options.json, "w") as f:
            json.dump(log, f)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
