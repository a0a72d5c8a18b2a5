#!/usr/bin/env python3
"""SmolLM2-135M-Instruct against transformers in float32, from the same Q4_1 weights. Needs numpy.

    python3 tests/check_smollm2.py DATA [MODEL ...]

DATA holds smollm2/reference.npz, reference.json and text/wikitext2-test.txt. Without MODEL:
models/smollm2-135m-instruct.bin (`make smollm2`), and the same unpacked to float32, which this program
writes to build/smollm2-f32.bin. A file whose matrices are all float32 runs with a float32 cache and must
agree to rounding; any other is judged as packed weights with 8-bit activations. The reference feeds no BOS.
"""
import json
import os
import subprocess
import sys

import numpy as np

from common import BUILD, MODELS, ROOT, Safetensors, build, ok, scratch

PROMPTS = (0, 1, 4)  # those of reference.json that the npz holds; the last is a chat
NEAR = 1e-3
PERPLEXITY, NLL, GREEDY = 0.005, 0.055, 0.03  # what packed weights may be off
results = []


def check(good, text):
    results.append(bool(good))
    print("%-4s %s" % ("ok" if good else "FAIL", text), flush=True)


def log_probabilities(model, kv, requests):
    """Yields [n, vocab] natural logarithms of the softmax for every request, a list of ids."""
    program = build("score", "tests/score.c")
    vocab = int(Safetensors.metadata_of(model)["vocab_size"])
    with open(scratch("smollm2", "requests"), "wb") as f:
        for ids in requests:
            f.write(np.array([len(ids)] + list(ids), dtype="<i4").tobytes())
    with open(scratch("smollm2", "requests"), "rb") as f:
        p = subprocess.Popen([program, model, kv], stdin=f, stdout=subprocess.PIPE)
    for ids in requests:
        out = np.empty((len(ids), vocab))
        for i in range(len(ids)):
            row = np.frombuffer(p.stdout.read(4 * vocab), dtype="<f4").astype(np.float64)
            if row.size != vocab:
                raise SystemExit("score stopped with status %s" % p.wait())
            row = row - row.max()
            out[i] = row - np.log(np.exp(row).sum())
        yield out
    if p.stdout.read(1) or p.wait():
        raise SystemExit("score ended with status %s" % p.wait())


def forced(reference):
    """Every prompt followed by the tokens that the reference chose."""
    return [np.concatenate([reference["p%d_ids" % k], reference["p%d_greedy_ids" % k]]) for k in PROMPTS]


def floats(model, reference):
    """Unpacked: nothing is rounded that the reference does not round."""
    for k, lp in zip(PROMPTS, log_probabilities(model, "f32", forced(reference))):
        n = len(reference["p%d_ids" % k])
        top = reference["p%d_top20_ids" % k]
        off = np.abs(np.take_along_axis(lp[:n], top, 1) - reference["p%d_top20_logprobs" % k]).max(1)
        check(off.max() <= NEAR, "prompt %d: top 20 at %d positions, off by %.2g at most" % (k, n, off.max()))
        # and nothing that the reference ranks lower comes before them
        rest = lp[:n].copy()
        np.put_along_axis(rest, top, -np.inf, 1)
        over = (rest.max(1) - np.take_along_axis(lp[:n], top[:, -1:], 1)[:, 0]).max()
        check(over <= 2 * NEAR, "prompt %d: no other token above the twentieth (%.2g)" % (k, over))
        off = np.abs(lp[n - 1] - reference["p%d_last_logprobs" % k])
        check(off.max() <= 5 * NEAR, "prompt %d: all %d log-probabilities after it, off by %.2g" % (
            k, off.size, off.max()))
        greedy, margin = reference["p%d_greedy_ids" % k], reference["p%d_greedy_margins" % k]
        steps = lp[n - 1:n - 1 + len(greedy)]
        wrong = (steps.argmax(1) != greedy) & (margin > NEAR)
        check(not wrong.any(), "prompt %d: %d greedy tokens of margin above %g, %d differ" % (
            k, (margin > NEAR).sum(), NEAR, wrong.sum()))
        off = np.abs(steps[np.arange(len(greedy)), greedy] - reference["p%d_greedy_logprobs" % k]).max()
        check(off <= NEAR, "prompt %d: their log-probabilities, off by %.2g" % (k, off))


def command_line(model, reference, prompts, cache):
    """The same prompts through the program: tokens of the text, then greedy generation."""
    for k in PROMPTS:
        text = next(p for p in prompts if p["k"] == k)
        special = ["--special"] if text["parse_special"] else []
        with open(scratch("smollm2", "prompt"), "wb") as f:
            f.write(text["text"].encode())
        greedy, margin = reference["p%d_greedy_ids" % k], reference["p%d_greedy_margins" % k]
        out = json.loads(ok([model, "-m", "generate", "-f", scratch("smollm2", "prompt"), "-t", "0", "-n",
                             len(greedy), "--json"] + special + cache).decode())
        check(out["prompt_ids"] == reference["p%d_ids" % k].tolist(), "prompt %d: tokens of its text" % k)
        got, n = out["ids"], len(out["ids"])
        expected = greedy[:n].tolist()
        check(n > 0 and (got == expected or margin[:n].min() <= NEAR) and
              (n == len(greedy) or greedy[n] == 2), "prompt %d: %d tokens generated, then %s" % (
                  k, n, out["stop"]))


def perplexity_command(model, reference, info, data, nll):
    """-m perplexity on the text behind wiki_ids must say what the tokens one by one say."""
    path = os.path.join(data, "text", "wikitext2-test.txt")
    if not os.path.exists(path):
        print("     no %s: -m perplexity is not checked" % path)
        return
    with open(path, encoding="utf-8", newline="") as f:
        text = f.read().replace("\r\n", "\n")[:info["wikitext"]["text_chars"]]
    with open(scratch("smollm2", "wiki.txt"), "wb") as f:
        f.write(text.encode())
    out = json.loads(ok([model, "-m", "tokenize", "-f", scratch("smollm2", "wiki.txt"), "--json"]).decode())
    ids = out["ids"]
    check(ids == reference["wiki_ids"].tolist(), "%d tokens of wikitext" % len(ids))
    out = json.loads(ok([model, "-m", "perplexity", "-f", scratch("smollm2", "wiki.txt"), "-c", "1024",
                         "--json"]).decode())
    check(out["tokens"] == nll.size and abs(out["nll"] - nll.mean()) < 1e-5 and
          abs(out["perplexity"] - np.exp(nll.mean())) < 1e-3,
          "-m perplexity: %(tokens)d tokens, nll %(nll).6f, perplexity %(perplexity).4f" % out)


def packed(model, reference, info, data):
    """Packed weights are the reference's; activations and cache are rounded."""
    windows = reference["wiki_ids"].reshape(4, 1024)
    expected = reference["wiki_nll"].astype(np.float64)[:, 1:]
    got = np.stack([-lp[np.arange(1023), ids[1:]] for ids, lp in
                    zip(windows, log_probabilities(model, "f16", windows))])
    for w in range(4):
        p, q = np.exp(got[w].mean()), np.exp(expected[w].mean())
        print("     window %d: perplexity %.4f, reference %.4f (%+.2f %%)" % (w, p, q, 100 * (p / q - 1)))
    p, q = np.exp(got.mean()), np.exp(expected.mean())
    check(abs(p / q - 1) <= PERPLEXITY, "perplexity %.4f, reference %.4f (%+.2f %%, allowed %.1f)" % (
        p, q, 100 * (p / q - 1), 100 * PERPLEXITY))
    off = np.abs(got - expected).mean()
    check(off <= NLL, "mean absolute difference per token %.4f nats (allowed %.3f)" % (off, NLL))
    wrong = steps = 0
    for k, lp in zip(PROMPTS, log_probabilities(model, "f16", forced(reference))):
        n, greedy = len(reference["p%d_ids" % k]), reference["p%d_greedy_ids" % k]
        different = lp[n - 1:n - 1 + len(greedy)].argmax(1) != greedy
        wrong, steps = wrong + different.sum(), steps + len(greedy)
        margins = reference["p%d_greedy_margins" % k][different]
        print("     prompt %d: %d of %d greedy tokens differ, margins %s" % (
            k, different.sum(), len(greedy), margins.round(3).tolist()))
    check(wrong <= GREEDY * steps, "%d of %d teacher-forced greedy tokens differ (%.1f %%, allowed %.0f)" % (
        wrong, steps, 100 * wrong / steps, 100 * GREEDY))
    perplexity_command(model, reference, info, data, got)


def main(argv):
    if not argv:
        sys.exit(__doc__.split("\n\n")[1].strip())
    data, models = argv[0], argv[1:]
    if not models:
        shipped = os.path.join(MODELS, "smollm2-135m-instruct.bin")
        if not os.path.exists(shipped):
            sys.exit("check_smollm2: no %s; `make smollm2` fetches it" % os.path.relpath(shipped, ROOT))
        unpacked = os.path.join(BUILD, "smollm2-f32.bin")
        os.makedirs(BUILD, exist_ok=True)
        ok([shipped, "-m", "quantize", "--type", "f32", "-o", unpacked])
        models = [shipped, unpacked]
    folder = os.path.join(data, "smollm2") if os.path.isdir(os.path.join(data, "smollm2")) else data
    with np.load(os.path.join(folder, "reference.npz")) as f:
        reference = {key: f[key] for key in f}
    with open(os.path.join(folder, "reference.json"), encoding="utf-8") as f:
        info = json.load(f)
    for model in models:
        print(model)
        metadata = Safetensors.metadata_of(model)
        if any(key.startswith("packed.") for key in metadata):
            packed(model, reference, info, data)
        else:
            floats(model, reference)
            command_line(model, reference, info["prompts"], ["--kv", "f32"])
    print("%d passed, %d failed" % (sum(results), len(results) - sum(results)))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
