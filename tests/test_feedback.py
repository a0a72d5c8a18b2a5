"""-m quantize -f TEXT and --bits: statistics against a plain computation, error feedback against packing
without it, the choice of types; whatever the threads and the instruction set, the same file."""
import math
import os
import random
import struct
import unittest

from common import STORIES, Safetensors, f32, fresh_folder, ok, run, scratch
from engine import changed, isas, program, small_model, works
from test_pack import BLOCK_BYTES, MATRIX, model, packed_values, quantize, raw_model

DAMPING, TIED = 0.1, 0.3
# matrices, the point of run_observe that shows their input
POINTS = {"attn_q": "attn_norm", "attn_output": "attn", "ffn_up": "ffn_norm", "ffn_down": "ffn"}


def text(name, words):
    path = scratch("feedback", name)
    with open(path, "w") as f:
        f.write(" ".join(map(str, words)))
    return path


def story(name="story", sentences=60):
    rng = random.Random(3)
    who = ("Lily", "Tom", "The dog", "A big bird", "Mom", "Her friend", "The little cat")
    does = ("saw", "liked", "found", "played with", "ran to", "looked at", "gave Tom")
    what = ("a red ball", "the park", "a big tree", "the old house", "a toy car", "some cake", "the sun")
    return text(name, ["%s %s %s." % (rng.choice(who), rng.choice(does), rng.choice(what)) for _ in range(sentences)])


def ints(values):
    return struct.pack("<%di" % len(values), *values)


def statistics(path, tensor, point, layer, context, tokens, file, windows):
    """(what run.c collects, the same sum in double precision over the windows' rows, undamped), both [n][n]."""
    ids = [i for w in windows for i in [-1] + w]
    data = works(["statistics", path, tensor, point, layer, context, tokens, file], stdin=ints(ids))
    count, flat = sum(map(len, windows)), struct.unpack("<%df" % (len(data) // 4), data)
    n = round((math.sqrt(count * count + 4 * len(flat)) - count) / 2)       # n n + n count floats
    assert n * n + n * count == len(flat), (n, count, len(flat))
    rows = [flat[n * n + i * n:n * n + i * n + n] for i in range(count)]
    columns = list(zip(*rows))
    direct = [[math.fsum(x * y for x, y in zip(a, b)) for b in columns] for a in columns]
    mean = sum(direct[i][i] for i in range(n)) / n
    return [flat[i * n:i * n + n] for i in range(n)], [[x / mean for x in row] for row in direct]


class Statistics(unittest.TestCase):

    def check(self, damping, *args):
        got, direct = statistics(*args)
        for i, row in enumerate(direct):
            for j, x in enumerate(row):
                self.assertAlmostEqual(got[i][j], x + (damping if i == j else 0), delta=1e-5 + 1e-4 * abs(x), msg=(args[1], i, j))
                self.assertEqual(got[i][j], got[j][i])
        return direct

    def test_every_input(self):
        """Windows that end inside of a batch of 256 tokens, odd widths."""
        rng = random.Random(7)
        odd = small_model("llama_odd")
        ids = [rng.randrange(77) for _ in range(600)]
        file = text("ids", ids)
        windows = [ids[i:i + 100] for i in range(0, 600, 100)]
        seen = [self.check(DAMPING, odd, "blk.%d.%s.weight" % (layer, matrix), point, layer, 100, 10000, file, windows)
                for matrix, point in POINTS.items() for layer in (0, 1)]
        seen.append(self.check(DAMPING, odd, "output.weight", "norm", -1, 100, 10000, file, windows))
        self.assertEqual(len({str(s) for s in seen}), 9)

    def test_the_last_norm(self):
        """What the output matrix multiplies, for all rows: its products are the logits."""
        odd, ids = small_model("llama_odd"), [5, 70, 33, 2, 9]
        file = text("norm", [i % 77 for i in range(300)])
        data = works(["statistics", odd, "output.weight", "norm", -1, 100, 300, file], stdin=ints([-1] + ids))[4 * 33 * 33:]
        rows = [struct.unpack_from("<33f", data, 4 * 33 * i) for i in range(len(ids))]
        weights = packed_values(Safetensors(odd), "output.weight")[1]
        logits = works(["logits", odd, 0], stdin=ints(ids))
        self.assertEqual(len(logits), 4 * 77 * len(ids))
        for i, row in enumerate(rows):
            for j, x in enumerate(struct.unpack_from("<77f", logits, 4 * 77 * i)):
                self.assertAlmostEqual(math.fsum(map(float.__mul__, row, weights[j])), x, delta=1e-4)

    def test_every_window_begins_with_bos(self):
        rng = random.Random(8)
        odd = changed(small_model("llama_odd"), "odd-bos", {"token.bos": "1", "token.add_bos": "1"})
        ids = [rng.randrange(77) for _ in range(300)]
        windows = [[1] + ids[i:i + 63] for i in range(0, 300, 63)]
        self.check(DAMPING, odd, "blk.1.ffn_gate.weight", "ffn_norm", 1, 64, 300, text("bos", ids), windows)

    def test_windows_spread_over_a_long_text(self):
        rng = random.Random(9)
        ids = [rng.randrange(77) for _ in range(1000)]
        windows = [ids[i:i + 90] for i in (0, 455, 910)]
        self.check(DAMPING, small_model("llama_odd"), "blk.0.attn_k.weight", "attn_norm", 0, 90, 280, text("long", ids), windows)

    def test_tied_matrices_are_damped_more(self):
        ids = [i % 8 for i in range(256)]
        path = model(scratch("feedback", "tied.bin"), 10, {})
        self.check(TIED, path, "token_embd.weight", "norm", -1, 16, 10000, text("tied", ids),
                   [ids[i:i + 16] for i in range(0, 256, 16)])

    def test_an_embedding_has_none(self):
        ids = text("none", [i % 77 for i in range(300)])
        with self.assertRaisesRegex(AssertionError, "token_embd.weight has none"):
            works(["statistics", small_model("llama_odd"), "token_embd.weight", "norm", -1, 64, 300, ids])


class Feedback(unittest.TestCase):

    def cost(self, hessian, rows, became):
        """What each row of errors costs."""
        out = []
        for w, v in zip(rows, became):
            e = [a - b for a, b in zip(w, v)]
            out.append(math.fsum(x * math.fsum(map(float.__mul__, e, h)) for x, h in zip(e, hessian)))
        return out

    def test_errors_cost_less(self):
        """Errors cost, averaged over four matrices, less than this part of plain packing's; hardly a row costs more."""
        file, plain = story(sentences=300), Safetensors(STORIES)
        tensors = [("blk.2.%s.weight" % matrix, point, 2) for matrix, point in POINTS.items()]
        hessians = {name: [list(map(float, row)) for row in statistics(STORIES, name, point, layer, 512, 16384, file, [[1]])[0]]
                    for name, point, layer in tensors}
        for kind, most in (("q4", 0.5), ("q4a", 0.5), ("q6", 0.48)):
            without = quantize(STORIES, kind)
            before = {name: packed_values(without, name)[1] for name, _, _ in tensors}
            after, ratios, worse, n = quantize(STORIES, kind, "-f", file), [], 0, 0
            for name, _, _ in tensors:
                rows = packed_values(plain, name)[1][::4]
                a, b = (self.cost(hessians[name], rows, x[::4]) for x in (packed_values(after, name)[1], before[name]))
                ratios.append(sum(a) / sum(b))
                worse += sum(x > y for x, y in zip(a, b))
                n += len(a)
            mean = sum(ratios) / len(ratios)
            print("     %s: %.3f of the cost (%s), %d of %d rows worse" % (
                kind, mean, " ".join("%.2f" % r for r in ratios), worse, n))
            self.assertLess(mean, most)
            self.assertLess(worse, 0.05 * n)

    def test_text_is_predicted_better(self):
        """Perplexity moves less from the floats' on the same text; so it does for --bits."""
        file = story(sentences=300)
        nll = lambda path: float(ok([path, "-m", "perplexity", "-f", file, "--json"]).split(b'"nll":')[1].split(b",")[0])
        right, moved = nll(STORIES), {}
        for more in ([], ["-f", file]):
            out = scratch("feedback", "five.bin")
            ok([STORIES, "-m", "quantize", "--bits", "5", "-o", out] + more)
            moved[len(more)] = abs(nll(out) - right)
        print("     nll %.4f moves by %.5f without, by %.5f with statistics" % (right, moved[0], moved[2]))
        self.assertLess(moved[2], moved[0])

    def test_same_file(self):
        """From any number of threads, any instruction set, another compiler, under sanitizers."""
        rng = random.Random(11)
        odd, ids = small_model("llama_odd"), text("same", [rng.randrange(77) for _ in range(700)])
        for options in (["--type", "q4a"], ["--bits", "5.5"], ["--type", "q6"], ["--type", "q4", "-c", "50", "-n", "300"]):
            files = set()
            ways = [(None, j, None) for j in (1, 2, 3)] + [(None, 1, isa) for isa in isas()]
            ways += [(kind, 2, None) for kind in ("other plain", "sanitized", "threads")]
            for kind, threads, isa in ways:
                out = scratch("feedback", "same.bin")
                ok([odd, "-m", "quantize", "-j", threads, "-f", ids, "-o", out] + options if not kind else
                   ["run", odd, "-m", "quantize", "-j", threads, "-f", ids, "-o", out] + options,
                   program=program(kind) if kind else None, env={"RUN_ISA": isa})
                with open(out, "rb") as f:
                    files.add(f.read())
            self.assertEqual(len(files), 1, options)
            ok([odd, "-m", "quantize", "-o", out] + options[:2])
            with open(out, "rb") as f:
                self.assertNotIn(f.read(), files)

    def test_exact_stays_exact(self):
        """What a type holds without error is not touched."""
        path, file = quantize(STORIES, "q4") and scratch("pack", "stories260K-q4.bin"), story()
        for kind in ("q4a", "q6"):
            p = run([path, "-m", "quantize", "--type", kind, "-f", file, "-o", scratch("feedback", "exact.bin")])
            self.assertRegex(p.stderr.decode(), r"^\d+ matrices from q4 to %s: relative error 0\n" % kind)

    def test_small_and_odd_matrices(self):
        """One row, few columns, columns that no text reaches: what is packed is near what was there."""
        ids = text("odd", [i % 3 for i in range(300)])
        for dim, rows in ((1, 1), (7, 1), (33, 1), (40, 17), (97, 5)):
            path = model(scratch("feedback", "odd-%d-%d.bin" % (dim, rows)), dim, {}, rows=rows)
            plain = Safetensors(path)
            for kind in ("q4", "q4a", "q6"):
                file = quantize(path, kind, "-f", ids)
                for name in [n for n in file.tensors if "packed." + n in file.metadata]:
                    _, got = packed_values(file, name)
                    _, right = packed_values(plain, name)
                    scale = max(abs(x) for row in right for x in row)
                    for a, b in zip(got, right):
                        for x, y in zip(a, b):
                            self.assertLess(abs(x - y), scale, (kind, dim, rows, name))

    def test_dead_columns(self):
        """Weights of zero, and what they multiply then: no division by zero."""
        path = model(scratch("feedback", "dead.bin"), 40, {
            MATRIX: ("F32", (5, 40), f32([0.0] * 200), {})}, rows=5)
        file = quantize(path, "q4a", "-f", text("dead", [i % 8 for i in range(300)]))
        self.assertEqual(packed_values(file, MATRIX)[1], [[0.0] * 40] * 5)


class Bits(unittest.TestCase):

    def types(self, path, bits):
        out = scratch("feedback", "bits.bin")
        ok([path, "-m", "quantize", "--bits", bits, "-o", out])
        file, types, stored, padded = Safetensors(out), {}, 0, 0
        for name in [k[7:] for k in file.metadata if k.startswith("packed.")]:
            kind, rows, columns = file.metadata["packed." + name].split()
            types[name] = kind
            stored += len(file.tensors[name][2])
            padded += -(-int(rows) // 16) * 16 * -(-int(columns) // 64) * 64
        return types, 8 * stored / padded

    def test_budget(self):
        order = ["blk.0.attn_q.weight", "token_embd.weight", "blk.0.ffn_down.weight", "blk.3.attn_v.weight",
                 "blk.3.ffn_down.weight", "blk.3.ffn_up.weight"]
        for bits, expected in ((4.5, "q4 q4 q4 q4 q4 q4"), (4.6, "q6 q4 q4 q4 q4 q4"), (4.75, "q4 q6 q4 q4 q4 q4"),
                               (5, "q6 q6 q6 q4 q4 q4"),
                               (5.2, "q6 q6 q6 q6 q4 q4"), (5.7, "q6 q6 q6 q6 q6 q4"), (6.5, "q6 q6 q6 q6 q6 q6"),
                               (7.3, "q8 q8 q8 q8 q6 q6"), (8.5, "q8 q8 q8 q8 q8 q8")):
            types, used = self.types(STORIES, bits)
            print("     %.1f bits: %.3f  %s" % (bits, used, " ".join(types[name] for name in order)))
            self.assertEqual(" ".join(types[name] for name in order), expected)
            self.assertEqual(len(types), 36)
            self.assertLessEqual(used, bits)
            self.assertGreater(used, bits - 0.2)

    def test_the_output_matrix(self):
        """A matrix of its own is what counts, not the embedding."""
        odd = small_model("llama_odd")
        types = [self.types(odd, bits)[0] for bits in (4.5, 8.5)]
        self.assertEqual(len(types[0]), 2 + 2 * 7)


class Refusals(unittest.TestCase):

    def refused(self, path, *args, words, status=1):
        folder = fresh_folder("feedback", "refused")
        out = os.path.join(folder, "out.bin")
        p = run([path, "-m", "quantize", "-o", out] + list(args))
        self.assertEqual(p.returncode, status, p.stderr)
        self.assertEqual((p.stdout, os.listdir(folder)), (b"", []))
        for word in words:
            self.assertIn(word, p.stderr.decode())
        self.assertTrue(p.stderr.startswith(b"run: "))
        self.assertEqual(p.stderr.count(b"\n"), 1, p.stderr)

    def test_texts(self):
        for path in (STORIES, small_model("llama_odd")):
            self.refused(path, "--type", "q4", "-f", "/dev/null", words=["256 tokens or more", "has 0"])
            self.refused(path, "--type", "q4", "-i", "", words=["256 tokens or more", "has 0"])
        self.refused(STORIES, "--type", "q4", "-f", text("short", ["once"] * 50), words=["256 tokens or more"])
        self.refused(STORIES, "--type", "q4", "-f", story(), "-n", "100", words=["-n says less"])
        self.refused(STORIES, "--type", "q4", "-f", "/no/such/file", words=["/no/such/file"])
        self.refused(small_model("llama_odd"), "--type", "q4", "-f", text("no-ids", ["77"] * 300), words=["token ids below 77"])

    def test_no_use(self):
        for options in ([], ["--type", "q8"], ["--type", "f16"], ["--bits", "8.5"]):
            self.refused(STORIES, *options, "-f", story(), words=["has no use"])

    def test_raw_blocks(self):
        path, _ = raw_model("Q4_K")
        self.refused(path, "--type", "q4", "-f", story(), words=["raw Q4_K", "pack them first: ./run FILE -m quantize -o OUT"])

    def test_what_is_not_finite(self):
        ids = text("nan", [i % 8 for i in range(300)])
        for value, words in ((math.nan, ["not finite"]), (3e38, ["not finite"]), (1e30, ["not finite"])):
            path = model(scratch("feedback", "nan.bin"), 20, {MATRIX: ("F32", (4, 20), f32([value] * 80), {})})
            self.refused(path, "--type", "q4", "-f", ids, words=words)

    def test_usage(self):
        self.refused(STORIES, "--type", "q4", "--bits", "5", words=["--type and --bits"], status=2)
        for bits in ("4.4", "8.6", "nan", "five", ""):
            self.refused(STORIES, "--bits", bits, words=["--bits takes a number from 4.5 to 8.5"], status=2)
        p = run([STORIES, "-m", "info", "--bits", "5"])
        self.assertEqual(p.returncode, 2)
        self.assertIn(b"--bits is for quantize", p.stderr)


if __name__ == "__main__":
    unittest.main()
