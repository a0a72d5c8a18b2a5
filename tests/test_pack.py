"""Quantised matrices: the packed layout against a plain reference, imports against values decoded by gguf.

The reference below decodes the layout that run.c documents, one weight after another. It is the only other
text about that layout, so it must stay plain.
"""
import json
import math
import os
import random
import re
import struct
import unittest
import zlib

from common import FIXTURES, STORIES, Safetensors, f32, ok, run, scratch, write_safetensors

EXACT = {"Q4_0": "q4", "Q4_1": "q4a", "Q5_0": "q6", "Q8_0": "q8"}
BLOCK_BYTES = {"q4": 576, "q4a": 640, "q6": 832, "q8": 1088}  # 16 rows x 64 columns
# root mean square of what packing adds to a group of 32, relative to the root mean square of the group:
# the median and the worst group. q4a keeps Q4_K's grid and rounds its scales to halves; 8 bits carry the
# 5 and 6 bit types; 2 and 3 bit types have two scales in a group.
ADDED = {"Q5_1": (0.004, 0.02), "Q4_K": (0.0005, 0.05), "Q5_K": (0.004, 0.02), "Q6_K": (0.005, 0.015),
         "IQ4_NL": (0.004, 0.012), "IQ4_XS": (0.004, 0.012),
         "Q2_K": (0.03, 0.2), "Q3_K": (0.08, 0.2)}
VECTORS = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
MATRIX = "blk.0.ffn_gate.weight"


def half(data, at):
    return struct.unpack_from("<e", data, at)[0]


def single(x):
    """x rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def to_half(x):
    return struct.unpack("<e", struct.pack("<e", x))[0]


def unpack(kind, rows, columns, data):
    """Rows of values of a packed matrix.

    Strips of 16 rows one after another, in a strip blocks of 64 columns. A block: lines of 64 bytes, then
    halves d[group][row] for its two groups of 32 columns, then for q4a m[group][row].
    Line j, byte 4r + c. q4, q4a: group g = j / 4, i = j % 4: low nibble row r, column 32g + 8i + c; high
    nibble column 32g + 8i + 4 + c. q6: the same for the lower 4 bits; then lines of the upper two: line j,
    byte 4r + c, bits 2i and 2i + 1 for column 16j + 4i + c. q8: row r, column 4j + c, signed."""
    strips, blocks, size = -(-rows // 16), -(-columns // 64), BLOCK_BYTES[kind]
    if len(data) != strips * blocks * size:
        raise AssertionError("%s %d x %d: %d bytes" % (kind, rows, columns, len(data)))
    lines = {"q8": 16, "q6": 12}.get(kind, 8)
    out = [[None] * (blocks * 64) for _ in range(strips * 16)]
    for s in range(strips):
        for b in range(blocks):
            at = (s * blocks + b) * size
            for r in range(16):
                row = out[16 * s + r]
                d = [half(data, at + 64 * lines + 32 * g + 2 * r) for g in (0, 1)]
                m = None
                if kind == "q4a":
                    m = [half(data, at + 64 * lines + 64 + 32 * g + 2 * r) for g in (0, 1)]
                for j in range(16 if kind == "q8" else 8):
                    for c in range(4):
                        byte = data[at + 64 * j + 4 * r + c]
                        if kind == "q8":
                            k = 4 * j + c
                            row[64 * b + k] = (byte - 256 * (byte > 127)) * d[k // 32]
                            continue
                        g, i = j // 4, j % 4
                        for k, q in ((32 * g + 8 * i + c, byte & 15), (32 * g + 8 * i + 4 + c, byte >> 4)):
                            if kind == "q6":
                                upper = data[at + 512 + 64 * (k // 16) + 4 * r + c] >> 2 * (k // 4 % 4) & 3
                                row[64 * b + k] = (q + 16 * upper - 32) * d[g]
                                continue
                            # products of a half and 4 bits are exact: rounding the sum is what an fma does
                            row[64 * b + k] = single(q * d[g] + m[g]) if kind == "q4a" else (q - 8) * d[g]
                if 16 * s + r >= rows and any(d + (m or [])):
                    raise AssertionError("row %d is padding and has a scale" % (16 * s + r))
    for row in out[:rows]:
        for g in range(columns // 32 + (columns % 32 > 0), 2 * blocks):
            if any(row[32 * g:32 * g + 32]):
                raise AssertionError("group %d is padding and has values" % g)
    return [row[:columns] for row in out[:rows]]


def model(path, dim, matrices, vocab=8, rows=None, heads=1, head_dim=8):
    """Writes a complete model of one layer around given matrices {name: (dtype, shape, bytes, metadata)}."""
    rng = random.Random(dim)
    hidden = rows if rows is not None else 4
    shapes = {"token_embd.weight": (vocab, dim), "blk.0.attn_q.weight": (heads * head_dim, dim),
              "blk.0.attn_k.weight": (heads * head_dim, dim), "blk.0.attn_v.weight": (heads * head_dim, dim),
              "blk.0.attn_output.weight": (dim, heads * head_dim), MATRIX: (hidden, dim),
              "blk.0.ffn_up.weight": (hidden, dim), "blk.0.ffn_down.weight": (dim, hidden)}
    tensors = {name: ("F32", (dim,), f32([1.0] * dim)) for name in VECTORS}
    metadata = {"run.c": "1", "dim": dim, "hidden_dim": hidden, "n_layers": 1, "n_heads": heads,
                "head_dim": head_dim, "vocab_size": vocab, "context_length": 16}
    for name, (r, c) in shapes.items():
        if name in matrices:
            dtype, shape, data, more = matrices[name]
            tensors[name] = (dtype, shape, data)
            metadata.update(more)
        else:
            tensors[name] = ("F32", (r, c), f32([rng.gauss(0, 0.1) for _ in range(r * c)]))
    write_safetensors(path, metadata, tensors)
    return path


def quantize(source, kind, *more):
    """Runs -m quantize and returns the file it wrote."""
    out = scratch("pack", "%s-%s.bin" % (os.path.basename(source)[:-4], kind))
    if os.path.exists(out):
        os.remove(out)
    ok([source, "-m", "quantize", "--type", kind, "-o", out] + list(more))
    return Safetensors(out)


def packed_values(file, name):
    """(type, rows of values) of any matrix that run.c can run."""
    dtype, shape, data = file.tensors[name]
    if dtype != "U8":
        flat = file.floats(name)
        return dtype, [flat[i:i + shape[1]] for i in range(0, len(flat), shape[1])]
    kind, rows, columns = file.metadata["packed." + name].split()
    return kind, unpack(kind, int(rows), int(columns), data)


def raw_model(name):
    """The fixture of a GGML type as a model file, and the rows of values that it stands for."""
    with open(os.path.join(FIXTURES, "ggml", "index.json")) as f:
        rows, columns = json.load(f)[name]
    with open(os.path.join(FIXTURES, "ggml", name + ".bin"), "rb") as f:
        raw = f.read()
    with open(os.path.join(FIXTURES, "ggml", name + ".f32z"), "rb") as f:
        flat = struct.unpack("<%df" % (rows * columns), zlib.decompress(f.read()))
    path = model(scratch("pack", name + ".bin"), columns, {MATRIX: (
        "U8", (len(raw),), raw, {"ggml." + MATRIX: "%s %d %d" % (name, rows, columns)})}, rows=rows)
    return path, [list(flat[i:i + columns]) for i in range(0, len(flat), columns)]


def groups(rows):
    """All groups of 32 columns (the last of a row may be shorter) with where they begin."""
    for r, row in enumerate(rows):
        for c in range(0, len(row), 32):
            yield r, c, row[c:c + 32]


def squares(values):
    return math.fsum(x * x for x in values)


class Import(unittest.TestCase):
    """Raw GGML blocks become what the gguf package says they are."""

    def check_same(self, name, got, expected):
        self.assertEqual(len(got), len(expected))
        for r, (a, b) in enumerate(zip(got, expected)):
            self.assertEqual(len(a), len(b))
            for c, (x, y) in enumerate(zip(a, b)):
                self.assertEqual(x, y, "%s row %d column %d" % (name, r, c))

    def one(self, name):
        path, expected = raw_model(name)
        plain = quantize(path, "f32")
        kind, got = packed_values(plain, MATRIX)
        self.assertEqual(kind, "F32")
        self.check_same(name, got, expected)
        packed = quantize(path, "auto")
        kind, got = packed_values(packed, MATRIX)
        again = quantize(scratch("pack", name + "-auto.bin"), "f32")
        self.check_same(name + " unpacked by run.c", packed_values(again, MATRIX)[1], got)
        if name in EXACT:
            self.assertEqual(kind, EXACT[name])
            self.check_same(name + " " + kind, got, expected)
            return
        added = []
        for (r, c, a), (_, _, b) in zip(groups(got), groups(expected)):
            # a half cannot hold the tiny scales of some blocks: what is below 1e-6 may be lost
            error = max(0.0, math.sqrt(squares([x - y for x, y in zip(a, b)]) / 32) - 1e-6)
            size = math.sqrt(squares(b) / 32)
            added.append(error / size if size else (0.0 if error == 0 else math.inf))
        added.sort()
        print("     %s -> %s: relative error median %.2g, worst group %.2g" % (
            name, kind, added[len(added) // 2], added[-1]))
        self.assertLessEqual(added[len(added) // 2], ADDED[name][0])
        self.assertLessEqual(added[-1], ADDED[name][1])

    def test_raw_blocks_are_not_run(self):
        path, _ = raw_model("Q4_0")
        p = run([path, "-n", "2"])
        self.assertEqual(p.returncode, 1)
        self.assertIn(b"quantize", p.stderr)

    def test_llama2c_int8(self):
        """runq.c's blocks: all int8 values, then a float32 scale for every group along the rows."""
        rng = random.Random(5)
        for size in (32, 64, 16):
            rows, columns = 19, 192
            q = [rng.randint(-127, 127) for _ in range(rows * columns)]
            scales = [single(rng.choice([1, 1, 1e-3, 0]) * rng.uniform(0.001, 0.1))
                      for _ in range(rows * columns // size)]
            raw = struct.pack("<%db" % len(q), *q) + f32(scales)
            path = model(scratch("pack", "int8-%d.bin" % size), columns, {MATRIX: (
                "U8", (len(raw),), raw,
                {"ggml." + MATRIX: "LLAMA2C_Q8:%d %d %d" % (size, rows, columns)})}, rows=rows)
            expected = [single(q[i] * scales[i // size]) for i in range(len(q))]
            expected = [expected[i:i + columns] for i in range(0, len(q), columns)]
            self.check_same("int8", packed_values(quantize(path, "f32"), MATRIX)[1], expected)
            kind, got = packed_values(quantize(path, "auto"), MATRIX)
            self.assertEqual(kind, "q8")
            for (r, c, a), (_, _, b) in zip(groups(got), groups(expected)):
                largest = max(abs(x) for x in b)
                for x, y in zip(a, b):
                    # half a step of the grid, and a scale rounded to a half
                    allowed = largest / 254 * 1.01 + largest * 2 ** -11
                    self.assertLessEqual(abs(x - y), allowed + 127 * 3e-8)


for _name in list(EXACT) + list(ADDED):
    setattr(Import, "test_" + _name, lambda self, name=_name: self.one(name))


def naive(kind, x):
    """What rounding to the grid through the largest value gives, without any search."""
    if kind == "q8":
        d = to_half(max(map(abs, x)) / 127)
        return [d * max(-127, min(127, round(v / d))) if d else 0.0 for v in x]
    if kind in ("q4", "q6"):
        top = {"q4": 8, "q6": 32}[kind]
        d = to_half(max(x, key=abs) / -top)
        return [d * max(-top, min(top - 1, round(v / d))) if d else 0.0 for v in x]
    low = to_half(min(min(x), 0.0))
    d = to_half((max(x) - low) / 15)
    return [d * max(0, min(15, round((v - low) / d))) + low if d else low for v in x]


def fitted(kind, x):
    """The least sum of squared errors that run.c's search finds, plainly, in double precision."""
    n, best = len(x), math.inf
    low, high, extreme = min(x), max(x), max(x, key=abs)
    if kind == "q8":        # the smallest scale that cuts nothing off
        d = to_half(max(map(abs, x)) / 127)
        if d * 127.5 < max(map(abs, x)):
            d = struct.unpack("<e", struct.pack("<H", struct.unpack("<H", struct.pack("<e", d))[0] + 1))[0]
        return squares([v - d * max(-127, min(127, round(v / d))) for v in x]) if d else squares(x)
    for k in range(16):
        if kind != "q4a":
            top, step = {"q4": (8, 0.04), "q6": (32, 0.02)}[kind]
            inverse = (-1) ** (k + 1) * top * (1 + step * (3 - k // 2)) / extreme if extreme else 0
            q = [max(-top, min(top - 1, round(v * inverse))) for v in x]
            d = to_half(sum(v * i for v, i in zip(x, q)) / max(1, sum(i * i for i in q)))
            best = min(best, squares([v - d * i for v, i in zip(x, q)]))
            continue
        m, d = low + 0.04 * (k // 4) * (high - low), (1 - 0.04 * (k // 4 + k % 4)) * (high - low) / 15
        for _ in range(2):
            q = [max(0, min(15, round((v - m) / d))) if d else 0 for v in x]
            determinant = n * sum(i * i for i in q) - sum(q) ** 2
            wq = sum(v * i for v, i in zip(x, q))
            d = to_half((n * wq - sum(q) * math.fsum(x)) / determinant if determinant else 0)
            m = to_half((math.fsum(x) - d * sum(q)) / n)
            best = min(best, squares([v - (d * i + m) for v, i in zip(x, q)]))
    return best


class Floats(unittest.TestCase):
    """From floats to q4, q4a, q6, q8, f16, bf16."""

    def weights(self, rows, columns, seed):
        """Rows of different kinds: normal, heavy tails, outliers, one sign, constant, zeros, tiny, large."""
        rng = random.Random(seed)
        kinds = [lambda: rng.gauss(0, 0.05), lambda: rng.gauss(0, 0.05) ** 3 * 100,
                 lambda: rng.uniform(0.5, 0.7), lambda: -0.3, lambda: 0.0,
                 lambda: rng.gauss(0, 1e-5), lambda: rng.gauss(0, 3000.0),
                 lambda: rng.choice([-1.0, 1.0]) * rng.uniform(0.01, 0.02)]
        out = []
        for r in range(rows):
            row = [kinds[r % len(kinds)]() for _ in range(columns)]
            if r % 5 == 1:
                row[rng.randrange(columns)] = 2.0
            out.append([single(v) for v in row])
        return out

    def file(self, name, rows, columns):
        w = self.weights(rows, columns, rows * 1000 + columns)
        flat = [v for row in w for v in row]
        return w, model(scratch("pack", name + ".bin"), columns,
                        {MATRIX: ("F32", (rows, columns), f32(flat), {})}, rows=rows)

    def one(self, kind):
        total, plain, searched = 0.0, 0.0, 0.0
        for rows, columns in ((32, 128), (17, 96), (8, 33), (9, 7)):
            w, path = self.file("float%dx%d" % (rows, columns), rows, columns)
            file = quantize(path, kind)
            got_kind, got = packed_values(file, MATRIX)
            self.assertEqual(got_kind, kind)
            self.assertEqual(file.metadata["packed." + MATRIX], "%s %d %d" % (kind, rows, columns))
            again = quantize(scratch("pack", "float%dx%d-%s.bin" % (rows, columns, kind)), "f32")
            self.assertEqual(packed_values(again, MATRIX)[1], got, "run.c unpacks its own layout otherwise")
            for (r, c, a), (_, _, b) in zip(groups(got), groups(w)):
                error = squares([x - y for x, y in zip(a, b)])
                without_search = squares([x - y for x, y in zip(naive(kind, b), b)])
                where = "%s %dx%d row %d column %d" % (kind, rows, columns, r, c)
                # scales are halves: relative 2^-11, absolute 3e-8
                largest = max(map(abs, b))
                rounding = largest * 2 ** -11 + {"q4": 8, "q4a": 15, "q6": 32, "q8": 127}[kind] * 3e-8
                self.assertLessEqual(error, without_search + len(b) * rounding ** 2, where)
                if kind == "q8":  # nothing is clipped
                    worst = max(abs(x - y) for x, y in zip(a, b))
                    self.assertLessEqual(worst, largest / 254 * 1.01 + largest * 2 ** -11 + 127 * 3e-8, where)
                if largest > 1e-3:  # below, rounding of the scales is all that is left
                    total, plain = total + error / squares(b), plain + without_search / squares(b)
                    searched += fitted(kind, b) / squares(b)
        self.assertLess(total, searched * 1.002)
        print("     %s: %.4f of the squared error of naive rounding" % (kind, total / plain))
        self.assertLess(total, plain * {"q4": 0.92, "q4a": 0.92, "q6": 0.94, "q8": 1.0001}[kind])

    def test_q4(self):
        self.one("q4")

    def test_q4a(self):
        self.one("q4a")

    def test_q6(self):
        self.one("q6")

    def test_q8(self):
        self.one("q8")

    def test_tiny_q8(self):
        """Where halves have few bits, a scale that is rounded down would cut off the largest weights."""
        rng = random.Random(4)
        rows = []
        for r in range(16):
            scale = rng.uniform(1, 12) * 2 ** -24
            row = [single(rng.uniform(-127, 127) * scale) for _ in range(64)]
            row[3] = row[40] = single(127 * scale)
            rows.append(row)
        path = model(scratch("pack", "tiny.bin"), 64, {MATRIX: (
            "F32", (16, 64), f32([v for row in rows for v in row]), {})}, rows=16)
        up = 0
        for (r, c, a), (_, _, b) in zip(groups(packed_values(quantize(path, "q8"), MATRIX)[1]), groups(rows)):
            largest = max(map(abs, b))
            d = 2.0 ** -24 * math.ceil(largest / 127.5 * 2 ** 24)      # a subnormal half
            up += d > to_half(largest / 127)
            for x, y in zip(a, b):
                self.assertLessEqual(abs(x - y), d * 0.501, (r, c))
        self.assertGreater(up, 4)

    def test_printed_error(self):
        """The relative error of all matrices of a kind, as it is said on standard error."""
        _, path = self.file("printed", 24, 70)
        source = Safetensors(path)
        for kind in ("q4", "q4a", "q6", "q8", "f16", "bf16"):
            out = scratch("pack", "printed-%s.bin" % kind)
            p = run([path, "-m", "quantize", "--type", kind, "-o", out])
            self.assertEqual(p.returncode, 0, p.stderr)
            file, sums = Safetensors(out), {}
            for name, (_, shape, _) in source.tensors.items():
                if len(shape) == 2:
                    to, rows = packed_values(file, name)
                    got, expected = [v for row in rows for v in row], source.floats(name)
                    n, error, square = sums.get(to.lower(), (0, 0.0, 0.0))
                    sums[to.lower()] = (n + 1, error + squares([a - b for a, b in zip(got, expected)]),
                                        square + squares(expected))
            said = re.findall(r"^(\d+) matrices from f32 to (\w+): relative error ([\d.e-]+)$", p.stderr.decode(),
                              re.M)
            self.assertEqual({to: int(n) for n, to, _ in said}, {to: n for to, (n, _, _) in sums.items()})
            self.assertEqual(len(said), 1 if kind not in ("q4", "q4a") else 2)
            for _, to, error in said:
                expected = math.sqrt(sums[to][1] / sums[to][2])
                self.assertGreater(expected, 1e-5)
                self.assertAlmostEqual(float(error), expected, delta=expected * 0.0051, msg=to)

    def test_grids_that_contain_another(self):
        """q4 is a q4a, a q6 and a q8, in groups that are not full too: the same weights, the same logits."""
        def fingerprint(path):
            return json.loads(ok([path, "-m", "info", "--json"]).decode())["fingerprint"]
        _, odd = self.file("odd", 20, 75)
        for path in (STORIES, odd):
            name = os.path.basename(path)[:-4]
            first = quantize(path, "q4")
            plain = quantize(scratch("pack", name + "-q4.bin"), "f32")
            expected = fingerprint(scratch("pack", name + "-q4-f32.bin"))
            for kind in ("q4a", "q6", "q8"):
                out = scratch("pack", "%s-q4-%s.bin" % (name, kind))
                p = run([scratch("pack", name + "-q4.bin"), "-m", "quantize", "--type", kind, "-o", out])
                self.assertRegex(p.stderr.decode(), r"^\d+ matrices from q4 to %s: relative error 0\n" % kind)
                again = quantize(out, "f32")
                unlike = ("pad.", "token_embd") if kind == "q6" else ("pad.",)  # it was q8 and becomes a q6 too
                self.assertEqual(p.stderr.count(b"matrices"), len(unlike), p.stderr)
                self.assertEqual({n: t for n, t in again.tensors.items() if not n.startswith(unlike)},
                                 {n: t for n, t in plain.tensors.items() if not n.startswith(unlike)})
                if kind != "q6":
                    self.assertEqual(fingerprint(scratch("pack", "%s-q4-%s-f32.bin" % (name, kind))), expected)
                file = Safetensors(out)
                self.assertEqual(packed_values(file, MATRIX)[0], kind)
                self.assertEqual(packed_values(file, MATRIX)[1], packed_values(first, MATRIX)[1])

    def test_finer_grids_to_coarser(self):
        """Levels that the new type lacks are not taken over."""
        w, path = self.file("finer", 16, 64)
        for first, kind in (("q8", "q6"), ("q8", "q4"), ("q6", "q4"), ("q8", "q4a")):
            quantize(path, first)
            got = packed_values(quantize(scratch("pack", "finer-%s.bin" % first), kind), MATRIX)[1]
            for (r, c, a), (_, _, b) in zip(groups(got), groups(w)):
                self.assertLessEqual(squares([x - y for x, y in zip(a, b)]),
                                     0.1 * squares(b) + 1e-10, (first, kind, r, c))

    def test_grid_points_stay(self):
        """Values that lie on a grid come back as they are."""
        rng = random.Random(1)
        for kind, point in (("q4", lambda d, m: (rng.randint(0, 15) - 8) * d),
                            ("q6", lambda d, m: (rng.randint(0, 63) - 32) * d),
                            ("q8", lambda d, m: rng.randint(-127, 127) * d)):
            rows = []
            for _ in range(16):
                row = []
                for _ in range(2):
                    d = to_half(rng.uniform(0.01, 0.02))
                    group = [point(d, 0) for _ in range(32)]
                    group[rng.randrange(32)] = {"q4": -8, "q6": -32, "q8": 127}[kind] * d
                    row += group
                rows.append(row)
            path = model(scratch("pack", "grid-%s.bin" % kind), 64, {MATRIX: (
                "F32", (16, 64), f32([v for row in rows for v in row]), {})}, rows=16)
            self.assertEqual(packed_values(quantize(path, kind), MATRIX)[1], rows, kind)

    def test_f16_and_bf16(self):
        rng = random.Random(2)
        values = [0.0, -0.0, 1.0, 65504.0, -65504.0, 65519.0, 6e-8, 2.9e-8, -3.1e-8, 6.1e-5, 6.09e-5,
                  1.0009765625, 1.00048828125, 1.00146484375, 2049.0, 2051.0, 1.00390625,
                  1.01171875, 1e-20, -3e30]
        values += [struct.unpack("<f", struct.pack("<I", rng.getrandbits(32) & 0xBF7FFFFF))[0]
                   for _ in range(300)]
        values += [rng.gauss(0, 1) for _ in range(192)]
        values = [single(v) for v in values]
        path = model(scratch("pack", "halves.bin"), 64, {MATRIX: ("F32", (8, 64), f32(values), {})}, rows=8)
        dtype, got = packed_values(quantize(path, "bf16"), MATRIX)
        self.assertEqual(dtype, "BF16")
        for x, y in zip([v for row in got for v in row], values):
            bits = struct.unpack("<I", struct.pack("<f", y))[0]
            bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
            self.assertEqual(x, struct.unpack("<f", struct.pack("<I", bits))[0], y)
        dtype, got = packed_values(quantize(path, "f16"), MATRIX)
        self.assertEqual(dtype, "F16")
        for x, y in zip([v for row in got for v in row], values):
            expected = to_half(y) if abs(y) < 65520 else math.copysign(65504, y)  # saturates
            self.assertEqual(x, expected, y)
        wide = quantize(scratch("pack", "halves-bf16.bin"), "f32")
        self.assertEqual(wide.floats(MATRIX), quantize(path, "bf16").floats(MATRIX))
        same = quantize(path, "f32")
        self.assertEqual(same.tensors[MATRIX][2], f32(values))

    def test_same_file_from_any_number_of_threads(self):
        _, path = self.file("threads", 40, 200)
        for kind in ("q4", "q4a", "q6", "q8"):
            files = []
            for threads in (1, 3):
                quantize(path, kind, "-j", str(threads))
                with open(scratch("pack", "threads-%s.bin" % kind), "rb") as f:
                    files.append(f.read())
            self.assertEqual(files[0], files[1], kind)

    def test_checksums_and_alignment(self):
        _, path = self.file("sums", 20, 72)
        file = quantize(path, "q4a")
        with open(scratch("pack", "sums-q4a.bin"), "rb") as f:
            data = f.read()
        length = struct.unpack_from("<Q", data)[0]
        self.assertEqual((8 + length) % 64, 0)
        header = json.loads(data[8:8 + length].decode())
        ends = sorted(t["data_offsets"] for name, t in header.items() if name != "__metadata__")
        self.assertEqual([b for b, _ in ends], [0] + [e for _, e in ends[:-1]])
        self.assertEqual(ends[-1][1], len(data) - 8 - length)
        for name, (_, _, content) in file.tensors.items():
            if name.startswith("pad."):
                self.assertEqual(header[name]["dtype"], "U8")
                continue
            self.assertEqual((8 + length + header[name]["data_offsets"][0]) % 64, 0, name)
            self.assertEqual(file.metadata["crc32." + name], "%08x" % zlib.crc32(content), name)


if __name__ == "__main__":
    unittest.main()
