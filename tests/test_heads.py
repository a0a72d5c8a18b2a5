"""export.py: draft heads. Every fixture of tests/fixtures/heads is exported, and what its heads propose is
computed here, in plain Python, from the exported file alone: it must be what PyTorch computed.

A float64 reader of all that a head's metadata can say, and hostile files of PyTorch's form.
"""
import json
import math
import operator
import os
import pickle
import random
import re
import shutil
import struct
import sys
import unittest
import zipfile
import zlib

from common import FIXTURES, ROOT, RUN, STORIES, Safetensors, f32, fresh_folder, ok, run, scratch, write_safetensors
from engine import works
from test_export import Export, dump, e, get, gguf_bytes, main, put

HEADS = os.path.join(FIXTURES, "heads")
INSIDE = ["deepseek", "ernie", "facebook", "gguf_llama", "gguf_qwen3", "mimo", "qwen_mtp", "qwen_mtp_plain"]
BESIDE = {"eagle1": "llama", "eagle2": "llama", "eagle3": "llama", "eagle3_speculators": "llama",
          "eagle3_qwen3": "qwen3", "medusa": "llama", "medusa_shared": "llama", "medusa_vllm": "llama"}
EPSILON = 1e-4


# ---- A reader of model files: every equation of a head, as the metadata has it --------------------------

class Part:
    """The tensors and metadata under a prefix: of the trunk, or of a head."""

    def __init__(self, file, prefix=""):
        self.file, self.prefix, self.kept = file, prefix, {}

    def __contains__(self, name):
        return self.prefix + name in self.file.tensors

    def text(self, key, default=None):
        value = self.file.metadata.get(self.prefix + key, default)
        assert value is not None, self.prefix + key
        return value

    def number(self, key, default=None):
        return float(self.text(key, default))

    def count(self, key, default=None):
        return int(self.text(key, default))

    def vector(self, name):
        if name not in self.kept:
            self.kept[name] = self.file.floats(self.prefix + name)
        return self.kept[name]

    def rows(self, name):
        """A matrix as a list of its rows."""
        if (name, 2) not in self.kept:
            flat, (n, columns) = self.vector(name), self.file.tensors[self.prefix + name][1]
            self.kept[name, 2] = [flat[i * columns:(i + 1) * columns] for i in range(n)]
        return self.kept[name, 2]

    def times(self, name, x):
        """A matrix, and its bias if there is one, applied to a row."""
        rows = self.rows(name + ".weight")
        assert len(rows[0]) == len(x), (self.prefix + name, len(rows[0]), len(x))
        bias = self.vector(name + ".bias") if name + ".bias" in self else [0.0] * len(rows)
        return [sum(map(operator.mul, row, x)) + b for row, b in zip(rows, bias)]

    def norm(self, name, x, always=False):
        """An RMS norm; a head's need not be there."""
        if not always and name not in self:
            return x
        scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + self.number("norm.eps", "1e-05"))
        return [v * scale * w for v, w in zip(x, self.vector(name))]


def add(a, b):
    return [x + y for x, y in zip(a, b)]


def silu(x):
    return x / (1 + math.exp(-x))


def rotated(p, x, position):
    """RoPE of one head of a query or key."""
    half = p.count("rope.dims", len(x)) // 2
    freqs = p.vector("rope.freqs") if "rope.freqs" in p else [
        p.number("rope.base", "10000") ** (-i / half) for i in range(half)]
    y = list(x)
    for i, freq in enumerate(freqs):
        c, s = math.cos(position * freq), math.sin(position * freq)
        a, b = (i, i + half) if p.text("rope.pairing", "half") == "half" else (2 * i, 2 * i + 1)
        y[a], y[b] = x[a] * c - x[b] * s, x[b] * c + x[a] * s
    return y


def layer(p, at, x, embedded=None):
    """A decoder layer over all rows, from position 0. embedded: what attention reads beside the state."""
    n, kv, size = p.count("n_heads"), p.count("n_kv_heads"), p.count("head_dim")
    gated = p.count("attention_gate", "0")
    side = [p.norm("h_norm.weight", row) if embedded else p.norm(at + "attn_norm.weight", row) for row in x]
    if embedded and p.text("residual", "state") == "normed":
        x = side

    def project(name, i, width):
        y = p.times(at + name, side[i])
        y = add(y, p.times(at + name + "_e", embedded[i])) if embedded else y
        return [y[j:j + width] for j in range(0, len(y), width)]
    q, k, v, gates = [], [], [], []
    for i in range(len(x)):
        heads = project("attn_q", i, size * (1 + gated))
        assert len(heads) == n
        gates.append([h[size:] for h in heads])
        q.append([rotated(p, p.norm(at + "attn_q_norm.weight", h[:size]), i) for h in heads])
        k.append([rotated(p, p.norm(at + "attn_k_norm.weight", h), i) for h in project("attn_k", i, size)])
        v.append(project("attn_v", i, size))
    out = []
    for i in range(len(x)):
        joined = []
        for h in range(n):
            g = h // (n // kv)
            scores = [sum(map(operator.mul, q[i][h], k[j][g])) / math.sqrt(size) for j in range(i + 1)]
            top = max(scores)
            weights = [math.exp(s - top) for s in scores]
            mean = [sum(w * v[j][g][d] for j, w in enumerate(weights)) / sum(weights) for d in range(size)]
            joined += [m / (1 + math.exp(-a)) for m, a in zip(mean, gates[i][h])] if gated else mean
        row = add(x[i], p.times(at + "attn_output", joined))
        a = p.norm(at + "ffn_norm.weight", row, True)
        gate, up = p.times(at + "ffn_gate", a), p.times(at + "ffn_up", a)
        out.append(add(row, p.times(at + "ffn_down", [silu(x) * y for x, y in zip(gate, up)])))
    return out


class Trunk:
    """The states of a trunk for a sequence: inputs of its layers, before and after its last norm."""

    def __init__(self, file, ids):
        self.p, self.ids, self.inputs = Part(file), ids, []
        x = [self.embedding(i) for i in ids]
        for i in range(self.p.count("n_layers")):
            self.inputs.append(x)
            x = layer(self.p, "blk.%d." % i, x)
        self.last, self.norm = x, [self.finish(row) for row in x]

    def embedding(self, token):
        return self.p.rows("token_embd.weight")[token]

    def finish(self, row):
        return self.p.norm("output_norm.weight", row, True)

    def logits(self, row, tokens=None):
        matrix = self.p.rows("output.weight" if "output.weight" in self.p else "token_embd.weight")
        return [sum(map(operator.mul, matrix[i], row)) for i in tokens or range(len(matrix))]

    def state(self, p):
        """What feeds a head: a row for each token."""
        name = p.text("state")
        if name == "layers":
            return [sum(rows, []) for rows in zip(*(self.inputs[int(i)] for i in p.text("layers").split()))]
        return {"norm": self.norm, "last": self.last, "before": self.inputs[-1]}[name]


def propose(trunk, file, t, following, steps):
    """[step][row]: logits, and the tokens proposed, after reading ids up to t and taking `following`."""
    modules = [Part(file, "draft.%d." % i) for i in range(int(file.metadata["draft.count"]))]
    tokens, h, found, drafts = trunk.ids[1:t + 1] + [following], None, [], []
    for step in range(steps):
        p = modules[min(step, len(modules) - 1)]
        state, kind = trunk.state(p)[:t + 1], p.text("kind")
        ids = p.file.tensors.get(p.prefix + "rows")
        ids = list(struct.unpack("<%di" % ids[1][0], ids[2])) if ids else None
        if kind == "medusa":
            x, j = state[t], 0
            while "res.%d.weight" % j in p:
                x, j = add(x, map(silu, p.times("res.%d" % j, x))), j + 1
        elif kind == "parallel":
            x = layer(p, "blk.0.", state)[-1]
        else:
            h = h or [p.times("fuse", row) for row in state] if "fuse.weight" in p else h or state
            e = [trunk.embedding(i) for i in tokens]
            if p.count("zero_first", "0"):
                e[0] = [0.0] * len(e[0])
            e = [p.norm("e_norm.weight", row) for row in e]
            if "fuse.weight" in p:
                x = layer(p, "blk.0.", h, e)[-1]
            else:
                u = [add(p.times("e_proj", a), p.times("h_proj", p.norm("h_norm.weight", b)))
                     for a, b in zip(e, h)]
                u = [add(row, p.vector("proj.bias")) for row in u] if "proj.bias" in p else u
                x = layer(p, "blk.0.", u)[-1]
        y = {"own": lambda: p.norm("output_norm.weight", x, True), "trunk": lambda: trunk.finish(x),
             "none": lambda: x}[p.text("norm")]()
        assert (p.text("norm") == "own") == ("output_norm.weight" in p)
        found.append(p.times("output", y) if "output.weight" in p else trunk.logits(y, ids))
        assert len(found[-1]) == p.count("vocab_size")
        best = max(range(len(found[-1])), key=found[-1].__getitem__)
        drafts.append(ids[best] if ids else best)
        if kind == "serial":
            tokens, h = tokens + drafts[-1:], h + [y if p.text("chain") == "norm" else x]
    return found, drafts


def rounded(x):
    """bfloat16."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return struct.pack("<H", (bits + 0x7fff + (bits >> 16 & 1)) >> 16)


def crafted(file, trunk):
    """Heads whose facts agree with each other and not with the model; and whose sums overflow."""
    def fill(*shape):
        return "F32", list(shape), struct.pack("<f", 1) * math.prod(shape)

    dim, wide = int(trunk.metadata["dim"]), 70000
    others = {k: v for k, v in file.metadata.items() if not k.startswith("draft.0.")}
    rest = {k: v for k, v in file.tensors.items() if not k.startswith("draft.0.")}
    small = {"draft.0." + k: v for k, v in {
        "dim": str(wide), "n_heads": "1", "n_kv_heads": "1", "head_dim": "2", "hidden_dim": "1", "vocab_size": "2"}.items()}
    rows = {"draft.0.rows": ("I32", [2], struct.pack("<2i", 1, 2)), "draft.0.output.weight": fill(2, wide)}
    yield (dict(others, **small, **{"draft.0.kind": "medusa", "draft.0.state": "last", "draft.0.norm": "none"}),
           dict(rest, **rows, **{"draft.0.fuse.weight": fill(1, 1)}))
    shapes = {"fuse": (wide, dim), "h_norm": (wide,), "blk.0.attn_q_e": (2, dim), "blk.0.attn_k_e": (2, dim),
              "blk.0.attn_v_e": (2, dim), "blk.0.attn_q": (2, wide), "blk.0.attn_k": (2, wide), "blk.0.attn_v": (2, wide),
              "blk.0.attn_output": (wide, 2), "blk.0.ffn_norm": (wide,), "blk.0.ffn_gate": (1, wide),
              "blk.0.ffn_up": (1, wide), "blk.0.ffn_down": (wide, 1)}
    yield (dict(others, **small, **{"draft.0.kind": "serial", "draft.0.state": "norm", "draft.0.norm": "trunk"}),
           dict(rest, **rows, **{"draft.0.%s.weight" % name: fill(*shape) for name, shape in shapes.items()}))
    for value in (1e34, math.nan):
        for name in [k for k in file.tensors if re.match(r"draft\.0\..*(output|output_norm|proj|res\.0|fuse)\.weight", k)]:
            floats = [x * value for x in file.floats(name)]
            yield (dict(file.metadata, **{"draft.0.logit.scale": "1000000", "draft.0.chain": "out"}),
                   dict(file.tensors, **{name: ("F32", file.tensors[name][1], struct.pack("<%df" % len(floats), *floats))}))


class Heads(Export):

    def source(self, name):
        folder = os.path.join(HEADS, name)
        return os.path.join(folder, name + ".gguf") if name.startswith("gguf") else folder

    def copy(self, name):
        folder = fresh_folder("heads", name)
        shutil.copytree(self.source(name), folder, dirs_exist_ok=True)
        return folder

    def changed(self, name, change=None, settings=None, remove=()):
        """A copy of a fixture in safetensors: change(tensors), and fields of its config.json."""
        folder = self.copy(name)
        path = os.path.join(folder, "model.safetensors")
        tensors = dict(Safetensors(path).tensors)
        if change:
            change(tensors)
        write_safetensors(path, {}, tensors)
        file = os.path.join(folder, "config.json")
        config = dict(json.loads(get(file).decode()), **(settings or {}))
        dump(file, {key: value for key, value in config.items() if key not in remove})
        return folder

    def trunk(self, name):
        """The model file of a trunk, made once for each test."""
        path = scratch("heads", "trunks", name + ".bin")
        status, _, err = main(self.source(name), "-o", path)
        self.assertEqual(status, 0, err)
        return path

    def exported(self, name, *arguments):
        """The files of the trunk and of the heads."""
        if name in INSIDE:
            m = self.good(self.source(name), *arguments)
            return m, m
        trunk = self.trunk(BESIDE[name])
        return Safetensors(trunk), self.good(self.source(name), "--heads-for", trunk, *arguments)

    def differences(self, name, trunk, heads):
        """The largest differences of the trunk's logits and of the heads', and whether the drafts agree."""
        folder = os.path.join(HEADS, name)
        with open(os.path.join(folder, "expected.json")) as f:
            expected = json.load(f)
        data = zlib.decompress(get(os.path.join(folder, "expected.f32z")))
        want = list(struct.unpack("<%df" % (len(data) // 4), data))
        t, positions = Trunk(trunk, expected["ids"]), expected["positions"]
        mine = [x for at in positions for x in t.logits(t.norm[at])]
        drafts = expected["cases"][0]["drafts"]
        found = [propose(t, heads, at, following, len(drafts[0]))
                 for at, following in zip(positions, expected["next"])]
        heads = [x for logits, _ in found for step in logits for x in step]
        self.assertGreaterEqual(len(want), len(mine) + len(heads))
        return (max(abs(a - b) for a, b in zip(mine, want)),
                max(abs(a - b) for a, b in zip(heads, want[len(mine):])), [d for _, d in found] == drafts)

    # ---- What is exported

    def test_logits_are_those_of_pytorch(self):
        for name in INSIDE + list(BESIDE):
            with self.subTest(name):
                trunk, heads = self.exported(name)
                t, h, drafts = self.differences(name, trunk, heads)
                self.assertLess(t, EPSILON)
                self.assertLess(h, EPSILON)
                self.assertTrue(drafts)

    def said_by_run_c(self, name, expected, piece):
        """Logits of the trunk and of every step, as run.c computes them; the prompt read at once or id by id."""
        path = scratch("heads", name + ".bin")
        more = ["--heads-for", self.trunk(BESIDE[name])] if name in BESIDE else []
        status, _, err = main(self.source(name), "-o", path, *more)
        self.assertEqual(status, 0, err)
        steps = len(expected["cases"][0]["drafts"][0])
        asked = "".join("%d %s %d %d\n" % (at + 1, " ".join(map(str, expected["ids"][:at + 1])), following, piece)
                        for at, following in zip(expected["positions"], expected["next"]))
        both = [self.trunk(BESIDE[name]), path] if name in BESIDE else [path, "-"]
        out = works(["heads"] + both + [steps], stdin=asked)
        return both, list(struct.unpack("<%df" % (len(out) // 4), out)), steps

    def test_run_c_says_the_same(self):
        for name in INSIDE + list(BESIDE):
            with open(os.path.join(HEADS, name, "expected.json")) as f:
                expected = json.load(f)
            data = zlib.decompress(get(os.path.join(HEADS, name, "expected.f32z")))
            want = list(struct.unpack("<%df" % (len(data) // 4), data))
            for piece in (1, 0):
                with self.subTest(name, piece=piece):
                    files, found, steps = self.said_by_run_c(name, expected, piece)
                    n = len(expected["positions"])
                    rows = len(expected["rows"] or []) or self.vocabulary(files[0])
                    each, vocabulary = len(found) // n, self.vocabulary(files[0])
                    self.assertEqual(each, vocabulary + steps * rows)
                    mine = [x for i in range(n) for x in found[i * each:i * each + vocabulary]]
                    mine += [x for i in range(n) for x in found[i * each + vocabulary:(i + 1) * each]]
                    self.assertLess(max(abs(a - b) for a, b in zip(mine, want)), EPSILON)

    def vocabulary(self, path):
        return int(Safetensors(path).metadata["vocab_size"])

    def test_drafting_with_heads_changes_nothing(self):
        """All kinds of heads, decisions at random: text, logits and caches as without drafting."""
        for name in ("mimo", "qwen_mtp", "facebook", "eagle1", "eagle3_qwen3", "medusa_shared"):
            with open(os.path.join(HEADS, name, "expected.json")) as f:
                files, _, _ = self.said_by_run_c(name, json.load(f), 1)
            out = works(["drafts", files[0], 3, 6, files[1] if name in BESIDE else ""]).decode()
            self.assertGreater(int(re.search(r"(\d+) by heads", out).group(1)), 50, (name, out))

    def test_packing_spares_heads(self):
        """At least 8 bits, last, on a page of their own; and the packed model drafts."""
        path, packed = scratch("heads", "mimo.bin"), scratch("heads", "mimo-packed.bin")
        self.assertEqual(main(self.source("mimo"), "-o", path)[0], 0)
        for more in (["--type", "q4"], ["--type", "q6"], ["--bits", "4.5"], ["--type", "f32"]):
            ok([path, "-m", "quantize", "-o", packed] + more)
            file = Safetensors(packed)
            types = {file.metadata.get("packed." + name, dtype).split()[0] for name, (dtype, shape, _) in file.tensors.items()
                     if name.startswith("draft.") and name.endswith("weight") and "norm" not in name}
            self.assertLessEqual(types, {"q8", "BF16", "F32"}, more)
            data = get(packed)
            start = 8 + struct.unpack("<Q", data[:8])[0]
            places = {name: at["data_offsets"][0] + start for name, at in json.loads(data[8:start].decode()).items() if name[:2] != "__"}
            first = min(at for name, at in places.items() if name.startswith("draft."))
            self.assertEqual(first % 4096, 0)
            self.assertLess(max(at for name, at in places.items() if name[:6] not in ("draft.", "pad.%s" % name[4:6])), first)
            self.assertIn("by heads", works(["drafts", packed, 3, 2]).decode())

    def test_damaged_heads(self):
        """Every cut, changed bytes, hostile facts: a sentence or a working model, under sanitizers."""
        for name in ("mimo", "eagle3", "medusa"):
            with open(os.path.join(HEADS, name, "expected.json")) as f:
                (trunk, path), _, _ = self.said_by_run_c(name, json.load(f), 1)
            path, env = (path, {"HEADS_OF": trunk}) if name in BESIDE else (trunk, {})
            size, work = os.path.getsize(path), scratch("heads", "damaged")
            out = works(["bad", path, work, 0, 400, 3], "sanitized", env=env).decode()
            fine, refused = map(int, re.findall(r"\d+", out))
            self.assertGreater(min(fine, refused), 60, out)
            out = works(["bad", path, work, size, max(0, size - 300), 0], "sanitized", env=env).decode()
            self.assertEqual(out, "0 fine, %d refused\n" % min(size, 300))
            file, names, said = Safetensors(path), [], set()
            for key in [k for k in file.metadata if k.startswith("draft.")] + ["draft.0.layers", "draft.0.may_chain"]:
                for value in ("-1", "0", "17", "x 2"):
                    names.append(scratch("heads", "hostile-%d" % len(names)))
                    write_safetensors(names[-1], dict(file.metadata, **{key: value}), file.tensors)
            for lost in [t for t in file.tensors if t.startswith("draft.")]:
                names.append(scratch("heads", "hostile-%d" % len(names)))
                write_safetensors(names[-1], file.metadata, {t: v for t, v in file.tensors.items() if t != lost})
            for metadata, tensors in crafted(file, Safetensors(trunk)):
                names.append(scratch("heads", "hostile-%d" % len(names)))
                write_safetensors(names[-1], metadata, tensors)
            for line in works(["files"], "sanitized", env=env, stdin="".join(n + "\n" for n in names)).decode().split("\n"):
                said.add(re.sub(r"^\S+: ", "", line))
            self.assertGreater(len(said), 15, said)
            for n in names:
                os.remove(n)

    def test_merged(self):
        """Heads of a file of their own, put into the model's: the same logits, on a page of their own; not for others."""
        sys.path.insert(0, os.path.join(ROOT, "models"))
        import smollm2
        with open(os.path.join(HEADS, "eagle2", "expected.json")) as f:
            (trunk, path), _, _ = self.said_by_run_c("eagle2", json.load(f), 1)
        out = scratch("heads", "merged.bin")
        smollm2.merge(trunk, path, out)
        p = run([out, "-m", "info", "--verify"])
        self.assertEqual(p.returncode, 0, p.stderr)
        self.assertIn(b"match their checksums", p.stdout + p.stderr)
        p = run([path, "-m", "info"])       # a description, though no model
        self.assertEqual(p.returncode, 0, p.stderr)
        self.assertIn(b"give it with --draft to the model", p.stderr)
        self.assertNotRegex(p.stdout, b"UNKNOWN|fingerprint")
        requests = b"4 1 2 3 4 5 1\n3 7 8 9 10 0\n"
        self.assertEqual(works(["heads", out, "-", 3], stdin=requests.decode()), works(["heads", trunk, path, 3], stdin=requests.decode()))
        with open(out, "rb") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(size))
        first = min(v["data_offsets"][0] for k, v in header.items() if k.startswith("draft."))
        self.assertEqual((8 + size + first) % 4096, 0)
        self.assertEqual(max(header, key=lambda k: header[k]["data_offsets"][1] if "data_offsets" in header[k] else 0)[:6], "draft.")
        with self.assertRaises(ValueError):
            smollm2.merge(STORIES, path, out)

    def test_every_option_matters(self):
        """With any fact about a head changed, its logits are others: the test above sees it."""
        for name, key, value in (
                ("mimo", "state", "last"), ("mimo", "chain", "out"), ("mimo", "zero_first", "1"),
                ("deepseek", "zero_first", "0"), ("ernie", "norm", "trunk"),
                ("facebook", "state", "norm"), ("facebook", "rope.pairing", "half"),
                ("gguf_llama", "rope.pairing", "half"), ("qwen_mtp", "norm.eps", "0.1"),
                ("eagle2", "rope.base", "10000.0"), ("eagle3", "layers", "1 2 3"),
                ("eagle3", "residual", "normed"),
                ("eagle3_speculators", "residual", "state"), ("medusa", "state", "last")):
            with self.subTest(name, key=key):
                trunk, heads = self.exported(name)
                heads.metadata["draft.0." + key] = value
                self.assertGreater(self.differences(name, trunk, heads)[1], 100 * EPSILON)

    def test_facts(self):
        for name, facts in (
                ("mimo", "kind serial state norm chain norm norm own n_layers 1 rope.base 640.0"),
                ("qwen_mtp", "attention_gate 1 head_dim 10 vocab_size 52 activation silu context_length 256"),
                ("ernie", "norm none chain out zero_first 1"),
                ("gguf_llama", "norm trunk rope.pairing interleaved"),
                ("facebook", "kind parallel state before norm trunk hidden_dim 28 n_kv_heads 2"),
                ("eagle1", "rope.base 10000.0 norm none chain out dim 24 n_heads 4 head_dim 6"),
                ("eagle3", "state layers layers 2,3,4 residual state vocab_size 29 context_length 2048"),
                ("eagle3_speculators", "layers 1,4,6 residual normed rope.base 300.0 head_dim 10"),
                ("medusa", "kind medusa state norm norm none n_layers 0 vocab_size 64 dim 24"),
                ("medusa_vllm", "vocab_size 37")):
            _, m = self.exported(name)
            words = facts.split()
            for key, value in zip(words[::2], words[1::2]):
                self.assertEqual(m.metadata.get("draft.0." + key), value.replace(",", " "), (name, key))
            for key in "architecture", "name", "run.c", "n_tokens", "window":
                self.assertNotIn("draft.0." + key, m.metadata)
            several = name == "facebook" or name.startswith("medusa")
            self.assertEqual(m.metadata["draft.count"], "3" if several else "1")

    def test_head_files(self):
        """Nothing of the trunk is in them but a checksum; it can be given as a folder or as a model file."""
        for name, on in BESIDE.items():
            trunk, m = self.exported(name)
            self.assertTrue(all(n.startswith(("draft.", "pad.")) for n in m.tensors), name)
            self.assertEqual(m.metadata["run.c"], "heads 1")
            self.assertEqual(m.metadata["draft.trunk"], trunk.metadata["crc32.output_norm.weight"])
            before = get(self.out)
            self.good(self.source(name), "--heads-for", self.source(on))
            other = Safetensors(self.out)
            self.assertEqual(other.tensors, m.tensors)
            self.assertEqual(other.metadata, m.metadata)
            self.assertEqual(get(self.out), before)
        # What heads the trunk has itself does not matter, not even if they would be refused.
        trunk = self.changed("deepseek", lambda t: t.pop("model.layers.2.enorm.weight"))
        self.good(self.source("medusa_shared"), "--heads-for", trunk)
        folder = self.copy("medusa")
        self.good(os.path.join(folder, "medusa_lm_head.pt"), "--heads-for", self.source("llama"))

    def test_heads_lie_last_on_a_page(self):
        for name in INSIDE + list(BESIDE):
            _, m = self.exported(name)
            data = get(self.out)
            length = struct.unpack_from("<Q", data)[0]
            header = json.loads(data[8:8 + length].decode())
            header.pop("__metadata__")
            names = [n for n in header if not n.startswith("pad.")]
            first = next(i for i, n in enumerate(names) if n.startswith("draft."))
            self.assertTrue(all(n.startswith("draft.") for n in names[first:]), name)
            self.assertFalse(any(n.startswith("draft.") for n in names[:first]), name)
            self.assertEqual((8 + length + header[names[first]]["data_offsets"][0]) % 4096, 0, name)
        self.good(self.source("llama"))
        self.assertNotEqual((8 + struct.unpack_from("<Q", get(self.out))[0]) % 4096, 0)     # no page

    def test_nothing_is_stored_twice(self):
        for name in INSIDE + list(BESIDE):
            _, m = self.exported(name)
            self.assertFalse([n for n in m.tensors if n.startswith("draft.") and "token_embd" in n], name)
            own = [n for n in m.tensors if n.startswith("draft.") and n.endswith(".output.weight")]
            self.assertEqual(bool(own), name in ("eagle3", "eagle3_qwen3", "eagle3_speculators", "medusa"),
                             name)
        # A copy that is none: an embedding is refused, an output matrix becomes the head's own.
        for name in ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"):
            def change(tensors):
                dtype, shape, data = tensors[name]
                tensors[name] = dtype, shape, data[:-2] + b"\x00\x3c"
            folder = self.changed("deepseek", change)
            os.path.exists(self.out) and os.remove(self.out)
            if "embed" in name:
                self.refused(["not the trunk's embedding", "--no-heads"], folder)
            else:
                self.assertEqual(self.good(folder).tensors["draft.0.output.weight"][2][-2:], b"\x00\x3c")

    def test_copies_of_another_type(self):
        """EAGLE-2's embedding as float32 and bfloat16 beside a float16 trunk: the same but for rounding."""
        values = Safetensors(os.path.join(HEADS, "llama",
                                          "model.safetensors")).floats("model.embed_tokens.weight")
        for kind, data, good in (
                ("F32", f32(values), True), ("F32", f32([values[0] * 1.001] + values[1:]), True),
                ("F32", f32(values[:-1] + [values[-1] + 0.01]), False),
                ("BF16", b"".join(map(rounded, values)), True),
                ("F16", struct.pack("<%de" % len(values), *values), True),
                ("F16", struct.pack("<%de" % len(values), *values[:-1], values[-1] * 1.001), False)):
            tensors = {}
            e.read_torch(os.path.join(HEADS, "eagle2", "pytorch_model.bin"), tensors)
            tensors = {n: (t.kind, t.shape, b"".join(t.chunks())) for n, t in tensors.items()}
            tensors["embed_tokens.weight"] = kind, (64, 24), data
            folder = self.copy("eagle2")
            os.remove(os.path.join(folder, "pytorch_model.bin"))
            write_safetensors(os.path.join(folder, "model.safetensors"), {}, tensors)
            os.path.exists(self.out) and os.remove(self.out)
            if good:
                self.good(folder, "--heads-for", self.source("llama"))
            else:
                self.refused("embed_tokens.weight", folder, "--heads-for", self.source("llama"))

    def test_no_heads(self):
        """--no-heads gives the bytes of the same model without heads."""
        for name, begins, fields in (("mimo", "model.mtp_layers.", ["num_nextn_predict_layers"]),
                                     ("deepseek", "model.layers.2.", ["num_nextn_predict_layers"]),
                                     ("ernie", "model.mtp_", ["num_nextn_predict_layers"]),
                                     ("qwen_mtp", "mtp.", ["mtp_num_hidden_layers"])):
            self.good(self.source(name), "--no-heads")
            self.assertIn("not used   " + begins, self.printed)
            with_option = get(self.out)

            def without(tensors):
                for n in [n for n in tensors if n.startswith(begins)]:
                    del tensors[n]
            folder = self.changed(name, without, remove=fields)
            m = self.good(folder)
            self.assertFalse([k for k in m.metadata if k.startswith("draft")])
            self.assertEqual(get(self.out), with_option, name)
        for name in ("gguf_qwen3", "facebook"):
            trunk = {n: t for n,
                     t in self.exported(name)[0].tensors.items() if not n.startswith(("draft.", "pad."))}
            alone = self.good(self.source(name), "--no-heads")
            self.assertEqual({n: t for n, t in alone.tensors.items() if not n.startswith("pad.")}, trunk)
            self.assertFalse([k for k in alone.metadata if k.startswith("draft")])

    def test_what_is_announced_and_what_is_there(self):
        def more(tensors):
            tensors["model.mtp_layers.0.extra.weight"] = "F32", (2,), bytes(8)
        self.good(self.changed("mimo", more))
        self.assertIn("not used   model.mtp_layers.0.extra.weight", self.printed)
        self.assertNotIn("announced", self.printed)
        self.good(self.changed("mimo", None, {"num_nextn_predict_layers": 2}))
        self.assertIn("2 are announced, 1 are here", self.printed)
        self.good(self.changed("mimo", lambda t: t.pop("model.mtp_layers.0.input_proj.weight")))
        self.assertIn("1 are announced, 0 are here", self.printed)
        self.good(self.changed("medusa_vllm", None, {"num_heads": 4}), "--heads-for", self.source("llama"))
        self.assertIn("4 are announced, 3 are here", self.printed)

        def two(tensors):
            for n in list(tensors):
                if n.startswith("model.mtp_layers.0."):
                    tensors[n.replace(".0.", ".1.")] = tensors[n]
        m = self.good(self.changed("mimo", two, {"num_nextn_predict_layers": 2}))
        self.assertEqual(m.metadata["draft.count"], "2")
        self.assertEqual(m.tensors["draft.1.h_proj.weight"], m.tensors["draft.0.h_proj.weight"])

    def test_context(self):
        m = self.good(self.source("mimo"), "--context", "40")
        self.assertEqual([m.metadata[k] for k in ("context_length", "draft.0.context_length")], ["40", "40"])
        m = self.good(self.source("eagle1"), "--heads-for", self.source("llama"), "--context", "99")
        self.assertEqual(m.metadata["draft.0.context_length"], "99")

    def test_scaled_rope(self):
        """A head inside the model rotates as its trunk does."""
        m = self.good(self.changed("mimo", None, {"rope_scaling": {"type": "linear", "factor": 4.0}}))
        self.assertEqual(m.tensors["draft.0.rope.freqs"], m.tensors["rope.freqs"])
        self.assertAlmostEqual(m.floats("rope.freqs")[0], 0.25)

    # ---- What is refused

    def test_refusals_inside(self):
        mimo, deepseek = "model.mtp_layers.0.", "model.layers.2."

        def shaped(name, shape):
            return lambda t: t.update({name: ("BF16", shape, bytes(2 * shape[0] * (shape + (1,))[1]))})
        for words, name, change, settings in (
                ("q_proj.weight: a tensor of shape", "mimo",
                 shaped(mimo + "self_attn.q_proj.weight", (72, 28)), {}),
                ("input_proj.weight: a tensor of shape", "mimo",
                 shaped(mimo + "input_proj.weight", (28, 28)), {}),
                ("k_proj.weight: this tensor is missing", "deepseek",
                 lambda t: t.pop(deepseek + "self_attn.k_proj.weight"), {}),
                ("gate_proj.weight: this tensor is missing", "deepseek",
                 lambda t: t.pop(deepseek + "mlp.gate_proj.weight"), {}),
                ("norm.weight: this tensor is missing", "deepseek",
                 lambda t: t.pop(deepseek + "shared_head.norm.weight"), {}),
                ("enorm.weight: this tensor is missing", "deepseek",
                 lambda t: t.pop(deepseek + "enorm.weight"), {}),
                ("mtp_use_dedicated_embeddings", "qwen_mtp", None, {"mtp_use_dedicated_embeddings": True})):
            folder = self.changed(name, change, settings)
            self.refused([words] + ["--no-heads"] * bool(change), folder)
            if change:
                self.good(folder, "--no-heads")
                os.remove(self.out)

    def test_refusals_beside(self):
        def d2t(values):
            return lambda t: t.update(d2t=("I64", [25], struct.pack("<25q", *values)))
        good = [struct.unpack_from("<q", Safetensors(os.path.join(
            HEADS, "eagle3_qwen3", "model.safetensors")).tensors["d2t"][2], 8 * i)[0] for i in range(25)]

        def inner(**changes):
            config = json.loads(get(os.path.join(HEADS, "eagle3_speculators", "config.json")).decode())
            return {"transformer_layer_config": dict(config["transformer_layer_config"], **changes)}
        for words, name, change, settings in (
                ("tokens beyond", "eagle3_qwen3", d2t(good[:-1] + [40]), {}),
                ("tokens beyond", "eagle3_qwen3", d2t([-1] + good[1:]), {}),
                ("does not mark", "eagle3_qwen3", d2t(good[:-1] + [good[-1] + 1]), {}),
                ("a list of integers", "eagle3_qwen3", lambda t: t.update(d2t=("F32", [25], bytes(100))), {}),
                ("lm_head.weight: a tensor of shape", "eagle3_qwen3",
                 lambda t: t.pop("d2t") and t.pop("t2d"), {}),
                ("2 layers in a head", "eagle3_qwen3", None, {"num_hidden_layers": 2}),
                ("draft heads: width 40", "eagle3_qwen3", None, {"hidden_size": 40, "head_dim": 10}),
                ("target_hidden_size is not the trunk's 20", "eagle3_qwen3", None,
                 {"target_hidden_size": 40}),
                ("eagle_config", "eagle3_qwen3", None, {"eagle_config": {"use_last_layernorm": True}}),
                ("reads the layers [1, 2, 7]", "eagle3_qwen3", None,
                 {"eagle_aux_hidden_state_layer_ids": [1, 2, 7]}),
                ("reads the layers [1, 2]", "eagle3_qwen3", None,
                 {"eagle_aux_hidden_state_layer_ids": [1, 2]}),
                ("reads the layers", "eagle3_qwen3", None,
                 {"eagle_aux_hidden_state_layer_ids": [[[1]], 2, 3]}),
                ("norm_before_fc", "eagle3_speculators", None, {"norm_before_fc": True}),
                ("speculators_model_type", "eagle3_speculators", None, {"speculators_model_type": "dflash"}),
                ("model_type", "eagle3_speculators", None, inner(model_type="mamba")),
                ("hidden_norm", "eagle3_qwen3", lambda t: t.update(
                    {"midlayer.hidden_norm.weight": ("BF16", [10], bytes(20))}), {}),
                ("heads share a matrix", "medusa_vllm", lambda t: t.update(
                    {"lm_heads.0.weight": ("F16", [64, 24], bytes(64 * 24 * 2))}), {}),
                ("tokens beyond", "medusa_vllm", lambda t: t.update(
                    token_map=("I64", [37], struct.pack("<37q", *range(28, 65)))), {})):
            with self.subTest(words):
                trunk = self.source("qwen3" if name == "eagle3_qwen3" else "llama")
                self.refused(words, self.changed(name, change, settings), "--heads-for", trunk)
        self.refused("no draft heads here", self.source("qwen3") + "/..", "--heads-for", self.source("qwen3"))
        self.refused("width 24, for a trunk of", self.source("eagle2"), "--heads-for", STORIES)
        self.refused("width 24, for a trunk of", self.source("eagle2"), "--heads-for", self.source("qwen3"))
        self.refused("no such file", self.source("eagle2"), "--heads-for", self.source("none.gguf"))
        heads = scratch("heads", "trunks", "heads.bin")
        self.assertEqual(main(self.source("eagle2"), "--heads-for", self.source("llama"), "-o", heads)[0], 0)
        self.refused("dim is missing", self.source("eagle2"), "--heads-for", heads)
        self.refused("7 layers in a head", self.source("llama"), "--heads-for", self.source("llama"))

    def test_rows_of_token_maps(self):
        """vLLM's Medusa: matrices that are not the trunk's, whole or cut already."""
        ids, values = list(range(63, 26, -1)), list(range(64 * 24))
        whole = [struct.pack("<24e", *values[i * 24:(i + 1) * 24]) for i in range(64)]
        wanted = b"".join(whole[i] for i in ids)
        for rows in (whole, [whole[i] for i in ids]):
            def change(tensors):
                tensors["token_map"] = "I64", [37], struct.pack("<37q", *ids)
                for i in range(3):
                    tensors["lm_heads.%d.weight" % i] = "F16", [len(rows), 24], b"".join(rows)
            m = self.good(self.changed("medusa_vllm", change), "--heads-for", self.source("llama"))
            for i in range(3):
                self.assertEqual(m.tensors["draft.%d.output.weight" % i], ("F16", [37, 24], wanted))
                self.assertEqual(m.tensors["draft.%d.rows" % i], ("I32", [37], struct.pack("<37i", *ids)))

    def test_quantised_blocks(self):
        """A GGUF file of blocks: the mixing matrix is cut between them, or not at all."""
        dim, r = 64, random.Random(3)

        def blocks(rows, columns):
            return 8, (rows, columns), bytes(r.randrange(256) for _ in range(rows * columns // 32 * 34))

        def made(dim, kind=blocks):
            ones = 0, (dim,), f32([1] * dim)
            tensors = {"token_embd.weight": kind(40, dim), "output_norm.weight": ones}
            for i in range(2):
                for name, rows, columns in (("attn_q", dim, dim), ("attn_k", dim, dim), ("attn_v", dim, dim),
                                            ("attn_output", dim, dim), ("ffn_gate", 96, dim),
                                            ("ffn_up", 96, dim),
                                            ("ffn_down", dim, 96)):
                    tensors["blk.%d.%s.weight" % (i, name)] = kind(rows, columns)
                for name in "attn_norm", "ffn_norm", "nextn.enorm", "nextn.hnorm":
                    if i or "nextn" not in name:
                        tensors["blk.%d.%s.weight" % (i, name)] = ones
            tensors["blk.1.nextn.eh_proj.weight"] = blocks(dim, 2 * dim)
            tensors["blk.1.nextn.embed_tokens.weight"] = tensors["token_embd.weight"]
            pairs = {"general.architecture": "llama", "llama.block_count": 2, "llama.nextn_predict_layers": 1,
                     "llama.context_length": 64, "llama.embedding_length": dim,
                     "llama.feed_forward_length": 96,
                     "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 0.5}
            path = os.path.join(fresh_folder("heads", "gguf"), "q.gguf")
            return put(path, gguf_bytes(pairs, tensors)), tensors
        path, tensors = made(dim)
        m = self.good(path, "--no-pack")
        whole, row = tensors["blk.1.nextn.eh_proj.weight"][2], dim // 32 * 34
        rows = [whole[i:i + row] for i in range(0, len(whole), row)]
        self.assertEqual(m.tensors["draft.0.e_proj.weight"][2], b"".join(rows[::2]))
        self.assertEqual(m.tensors["draft.0.h_proj.weight"][2], b"".join(rows[1::2]))
        self.assertEqual(m.metadata["ggml.draft.0.h_proj.weight"], "Q8_0 64 64")
        self.assertEqual(m.tensors["draft.0.blk.0.attn_q.weight"][2], tensors["blk.1.attn_q.weight"][2])
        os.remove(self.out)
        self.refused("cut at column 48, inside a block of Q8_0", made(
            48, lambda rows, columns: (0, (rows, columns), bytes(4 * rows * columns)))[0], "--no-pack")

    def test_medusa_names(self):
        """With the module's name before them, as vLLM's converter has them, with rows of their own."""
        tensors = {}
        e.read_torch(os.path.join(HEADS, "medusa", "medusa_lm_head.pt"), tensors)
        want = self.good(self.source("medusa"), "--heads-for", self.source("llama"))
        for prefix in "medusa_head.", "medusa_heads.":
            folder = self.copy("medusa")
            os.remove(os.path.join(folder, "medusa_lm_head.pt"))
            write_safetensors(os.path.join(folder, "medusa_lm_head.safetensors"), {}, {
                prefix + n: (t.kind, t.shape, b"".join(t.chunks())) for n, t in tensors.items()})
            m = self.good(folder, "--heads-for", self.source("llama"))
            self.assertEqual(m.tensors, want.tensors)

    def test_a_packed_trunk(self):
        """Copies cannot be compared with packed matrices: an embedding counts as the trunk's, with a note."""
        packed = scratch("heads", "trunks", "packed.bin")
        ok([self.trunk("llama"), "-m", "quantize", "--type", "q8", "-o", packed])
        m = self.good(self.source("eagle2"), "--heads-for", packed)
        self.assertIn("cannot be compared", self.printed)
        want = self.good(self.source("eagle2"), "--heads-for", self.source("llama"))
        self.assertNotIn("cannot be compared", self.printed)
        self.assertEqual((m.tensors, m.metadata["draft.trunk"]), (want.tensors, want.metadata["draft.trunk"]))
        os.remove(self.out)
        self.refused("give the folder", self.source("medusa_vllm"), "--heads-for", packed)


# ---- PyTorch's files -------------------------------------------------------------------------------------

def text(s):
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def number(n):
    if -1 << 31 <= n < 1 << 31:
        return b"J" + struct.pack("<i", n)
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def group(*items):
    return b"(" + b"".join(items) + b"t"


DICT, REBUILD = b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n"
EMPTY_DICT = DICT + b")R"


def tensor(key="0", shape=(2, 3), strides=(3, 1), n=6, offset=0, kind=b"ctorch\nFloatStorage\n",
           tag="storage"):
    where = group(text(tag), kind, text(key), text("cpu"), number(n)) + b"Q"
    return REBUILD + group(where, number(offset), group(*map(number, shape)), group(*map(number, strides)),
                           b"\x89", EMPTY_DICT) + b"R"


# A tuple in the place of a storage.
FORGED = REBUILD + group(group(text("F32"), group(number(0), number(0)), number(9), number(6)), number(0),
                         group(number(6)), group(number(1)), b"\x89", EMPTY_DICT) + b"R"


def listing(*items):
    """The pickle of {name: tensor}."""
    return b"\x80\x02" + EMPTY_DICT + b"(" + b"".join(text(n) + t for n, t in items) + b"u."


def archive(path, data, members=None, how=zipfile.ZIP_STORED, order=b"little"):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/data.pkl", data, how)
        z.writestr("a/byteorder", order, zipfile.ZIP_STORED)
        for name, content in (members or {"a/data/0": f32(range(6))}).items():
            z.writestr(name, content, how)
    return path


class Torch(Export):

    def read(self, data, **kw):
        tensors = {}
        e.read_torch(archive(scratch("heads", "x.pt"), data, **kw), tensors)
        return {n: (t.kind, t.shape, b"".join(t.chunks())) for n, t in tensors.items()}

    def bad(self, words, data, **kw):
        """A sentence, from the function and from the program."""
        folder = fresh_folder("heads", "hostile")
        path = archive(os.path.join(folder, "medusa_lm_head.pt"), data, **kw)
        with self.assertRaises(e.Refused) as caught:
            e.read_torch(path, {})
        self.assertIn(words, str(caught.exception))
        self.assertLess(len(str(caught.exception)), 400)
        self.refused(words, folder, "--heads-for", os.path.join(HEADS, "llama"))

    def test_tensors(self):
        want = "F32", (2, 3), f32(range(6))
        self.assertEqual(self.read(listing(("w", tensor()))), {"w": want})
        self.assertEqual(self.read(listing(("w", tensor()))[:-1] + b"}" + text("_metadata") + b"}sb."),
                         {"w": want})
        got = self.read(listing(("a", tensor()), ("b", tensor(shape=(2,), strides=(1,), offset=4)),
                                ("c", tensor(shape=(1, 3, 1), strides=(77, 1, 99), offset=3)),
                                ("d", tensor(shape=(0, 3), offset=6)), ("e", tensor(shape=(), strides=()))))
        self.assertEqual(got, {
            "a": want, "b": ("F32", (2,), f32([4, 5])), "c": ("F32", (1, 3, 1), f32([3, 4, 5])),
            "d": ("F32", (0, 3), b""), "e": ("F32", (), f32([0]))})
        for kind, name, size in (("Half", "F16", 2), ("BFloat16", "BF16", 2), ("Long", "I64", 8),
                                 ("Int", "I32", 4), ("Bool", "BOOL", 1)):
            data = bytes(range(6 * size))
            got = self.read(listing(("w", tensor(kind=b"ctorch\n%sStorage\n" % kind.encode()))),
                            members={"a/data/0": data})
            self.assertEqual(got, {"w": (name, (2, 3), data)})

    def test_nothing_is_run(self):
        canary = scratch("heads", "canary")
        evil = text("touch '%s'" % canary)
        python = text("open(%r, 'w')" % canary)
        system = b"cposix\nsystem\n" if os.name == "posix" else b"cnt\nsystem\n"
        calls = [system + b"(" + evil + b"tR", b"cos\nsystem\n(" + evil + b"tR",
                 b"(" + evil + b"ios\nsystem\n", b"(cos\nsystem\n" + evil + b"o", b"cbuiltins\neval\n(" + python + b"tR",
                 b"cbuiltins\nexec\n(" + python + b"tR", b"q\x01h\x01cbuiltins\neval\n(" + python + b"tR"]
        for i, call in enumerate(calls):
            for data in (b"\x80\x02}" + text("w") + call + b"s.",
                         b"\x80\x02" + (b"N" if b"q\x01" in call else b"") +
                         call + b".", listing(("ok", tensor()), ("w", b"(" + call + b"t"))):
                os.path.exists(canary) and os.remove(canary)
                self.bad("", data)
                self.assertFalse(os.path.exists(canary), i)
                if data[-1:] == b"." and b"torch" not in data:      # it is as bad as it looks
                    try:
                        pickle.loads(data)
                    except TypeError:
                        pass
                    self.assertTrue(os.path.exists(canary), call)
                    os.remove(canary)
        for words, data in (
                ("posix system", b"\x80\x02cposix\nsystem\n."),
                ("STACK_GLOBAL", b"\x80\x04" + text("os") + text("system") + b"\x93."),
                ("_rebuild_parameter", b"\x80\x02ctorch._utils\n_rebuild_parameter\n."),
                ("torch load", b"\x80\x02ctorch\nload\n."),
                ("builtins getattr", b"\x80\x02cbuiltins\ngetattr\n."),
                ("NEWOBJ", b"\x80\x02" + DICT + b")\x81."), ("EXT1", b"\x80\x02\x82\x01."),
                ("INST", b"\x80\x02(ios\nsystem\n."), ("OBJ", b"\x80\x02(" + DICT + b"o."),
                # a text is not a global, and a global is not called unless it is one of two
                ("a call of something else", b"\x80\x02" + text("collections OrderedDict") + b")R."),
                ("a call of something else", b"\x80\x02ctorch\nFloatStorage\n)R."),
                ("unknown kind", listing(("w", tensor(kind=text("torch FloatStorage"))))),
                ("unknown kind", listing(("w", tensor(kind=DICT)))),
                ("unknown kind", listing(("w", tensor(tag="x")))),
                ("dictionary of tensors", b"\x80\x02" + DICT + b"."),
                ("no tensor", listing(("w", text("x")))),
                ("no tensor", listing(("w", EMPTY_DICT))), ("", b"\x80\x02h\x07."), ("", b"\x80\x02."),
                ("", b""), ("", b"\x80\x02}"), ("", b"\x80\x02t."), ("", b"\x80\x02(R."), ("", b"\xff\xff"),
                ("", listing(("w", tensor()))[:-3]), ("", b"\x80\x02" + text("x") + b"Q."),
                ("", b"\x80\x02X\xff\xff\xff\xffx."), ("", b"\x80\x02\x8e" + bytes([255] * 8) + b"."),
                ("", b"\x80\x02(((((tQ."), ("", b"\x80\x02K\x01K\x01K\x02s."),
                ("", b"\x80\x02" + DICT + b"(K\x05tR."), ("", listing(("w", FORGED))),
                ("", b"\x80\x02" + REBUILD + b"(NNNNtR."),
                ("", b"\x80\x02}(" + text("x") + b"u."), ("no texts", b"\x80\x02}K\x01K\x02s.")):
            with self.subTest(words, data=data[:60]):
                self.bad(words, data)

    def test_bombs(self):
        """Sizes that are claimed, values that double, keys whose hashes would take for ever."""
        nest = b")" + b"q\x01(h\x01h\x01t" * 60
        pairs = group(group(group(group(nest), number(1))))
        for data in (b"\x80\x02}" + group(nest) + b"K\x01s.", b"\x80\x02" + DICT + pairs + b"R.",
                     b"\x80\x02" + nest + b".", b"\x80\x02" + nest + b"Q.",
                     listing(("w", nest)), listing(("w", tensor(shape=(1 << 40, 1 << 40)))),
                     listing(("w", tensor().replace(group(number(2), number(3)), nest))),
                     b"\x80\x02N" + b"r\xff\xff\xff\x7f" + b".", b"\x80\x02" + b"(" * 100000 + b".",
                     b"\x80\x02" + b"(" * 50000 + b"t" * 50000 + b".", b"\x80\x02" + b")\x85" * 50000 + b".",
                     b"\x80\x02" + REBUILD + b")" + b"\x85" * 50000 + b"R.",
                     b"\x80\x02N" + b"2" * 100000 + b"."):
            self.bad("", data)
        self.bad("a list of tensors of", b"\x80\x02N." + bytes(9 << 20))

    def test_storages(self):
        for words, item in (
                ("within its storage", tensor(offset=1)), ("within its storage", tensor(offset=-1)),
                ("within its storage", tensor(shape=(3, 3))), ("within its storage", tensor(shape=(-2, 3))),
                ("within its storage", tensor(shape=(2,))),
                ("within its storage", tensor(shape=(1,) * 9, strides=(1,) * 9)),
                ("within its storage", tensor(offset=1 << 60)),
                ("within its storage", tensor(shape=(1 << 50, 0))),
                ("contiguous", tensor(strides=(1, 2))), ("contiguous", tensor(strides=(0, 1))),
                ("contiguous", tensor(shape=(2, 2))), ("contiguous", tensor(shape=(3,), strides=(2,))),
                ("has 24 bytes", tensor(n=7)), ("has 24 bytes", tensor(n=5)), ("has 24 bytes", tensor(n=-6)),
                ("has 24 bytes", tensor(n=1 << 70)), ("has 24 bytes", tensor(kind=b"ctorch\nHalfStorage\n")),
                ("a/data/9", tensor(key="9")), ("", tensor(key="../data.pkl")),
                ("", tensor(key="")), ("torch DoubleStorage", tensor(kind=b"ctorch\nDoubleStorage\n"))):
            with self.subTest(words, item=item[-60:]):
                self.bad(words, listing(("w", item)))

    def test_archives(self):
        good = listing(("w", tensor()))
        self.bad("compressed", good, how=zipfile.ZIP_DEFLATED)
        self.bad("byte order", good, order=b"big")
        self.bad("byte order", good, order=b"big endian")
        self.bad("no zip file of torch.save", good, members={"b/data.pkl": b"", "a/data/0": b""})
        path = archive(scratch("heads", "sizes.pt"), good)
        data = get(path)
        entry = data.rindex(b"PK\1\2", 0, data.rindex(b"a/data/0"))     # in the directory at the end
        for at, form, value, words in ((20, "<II", (400, 400), "does not fit"),
                                       (42, "<I", (1 << 30,), "not there"),
                                       (42, "<I", (9,), "does not fit"), (8, "<H", (1,), "encrypted"),
                                       (20, "<II", (8, 24), "compressed"),
                                       (10, "<H", (8,), "compressed")):
            broken = bytearray(data)
            struct.pack_into(form, broken, entry + at, *value)
            with self.assertRaises(e.Refused) as caught:
                e.read_torch(put(path, bytes(broken)), {})
            self.assertIn(words, str(caught.exception))
        local = data.index(b"a/data/0") - 30                # what stands before the bytes themselves
        for broken, words in ((data[:local] + b"PX" + data[local + 2:], "does not fit"),
                              (data.replace(b"a/byteorder", b"a/data/0\0\0\0"), "no zip file of torch.save")):
            with self.assertRaises(e.Refused) as caught:
                e.read_torch(put(path, broken), {})
            self.assertIn(words, str(caught.exception))
        e.read_torch(put(path, data), {})

    def test_fuzz(self):
        """Files with some bytes changed, or cut: a sentence or a result (main() sees to it)."""
        r, ends = random.Random(7), [0, 0]
        for name, file, option in (("medusa", "medusa_lm_head.pt", True),
                                   ("eagle3", "pytorch_model.bin", True),
                                   ("facebook", "consolidated.pth", False)):
            folder = fresh_folder("heads", "fuzz")
            shutil.copytree(os.path.join(HEADS, name), folder, dirs_exist_ok=True)
            path, options = os.path.join(folder, file), ["--heads-for", STORIES] if option else []
            data = get(path)
            interesting = [i for i in range(len(data)) if i < 4000 or i > len(data) - 3000]
            for _ in range(150):
                broken = bytearray(data)
                for _ in range(r.choice((1, 1, 2, 8))):
                    broken[r.choice(interesting)] = r.randrange(256)
                if r.random() < 0.2:
                    broken = broken[:r.randrange(len(broken))]
                put(path, bytes(broken))
                tensors = {}
                try:
                    e.read_torch(path, tensors)
                    for t in tensors.values():
                        self.assertEqual(sum(map(len, t.chunks())), t.size)
                    ends[0] += 1
                except e.Refused:
                    ends[1] += 1
                main(folder, *options, "-o", self.out)
        self.assertGreater(min(ends), 30, ends)

    def test_models_in_these_files(self):
        """A folder with pytorch_model.bin in place of model.safetensors; the old form is still refused."""
        folder = fresh_folder("heads", "torch_model")
        source = os.path.join(HEADS, "llama")
        shutil.copy(os.path.join(source, "config.json"), folder)
        tensors = Safetensors(os.path.join(source, "model.safetensors")).tensors
        items, members = [], {}
        for i, (name, (_, shape, data)) in enumerate(tensors.items()):
            strides = (shape[1], 1) if len(shape) == 2 else (1,)
            items.append((name, tensor(str(i), shape, strides, len(data) // 2, 0, b"ctorch\nHalfStorage\n")))
            members["a/data/%d" % i] = data
        archive(os.path.join(folder, "pytorch_model.bin"), listing(*items), members)
        m = self.good(folder, "--name", "x")
        self.assertEqual(m.tensors, self.good(source, "--name", "x").tensors)
        os.remove(self.out)
        put(os.path.join(folder, "pytorch_model.bin"), b"\x80\x02\x8a\x0al\xfc")
        self.refused("pickled", folder)


if __name__ == "__main__":
    unittest.main()
