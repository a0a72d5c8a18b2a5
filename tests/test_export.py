"""export.py: what it carries over, what it refuses, what hostile files and a failing hub do to it.

The inputs are built here by small writers; nothing of them is shared with export.py.
"""
import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import unittest
import zipfile
import zlib

import common
from common import ROOT, Safetensors, f32, fresh_folder, write_safetensors

sys.path.insert(0, ROOT)
import export as e  # noqa: E402


PARSER = e.usage()
e.usage = lambda: PARSER                                # made once, for the thousands of calls below


class Hang(BaseException):
    """Not an Exception: export.py must not be able to catch it."""


def main(*arguments, seconds=20):
    """export.py in this process: (status, stdout, stderr). Fails on a traceback, a hang, lack of memory."""
    def late(*_):
        raise Hang("export.py %s takes too long" % (arguments,))
    out, err = io.StringIO(), io.StringIO()
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = e.main([str(a) for a in arguments])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    out, err = out.getvalue(), err.getvalue()
    for trouble in ("internal error", "out of memory", "Traceback"):
        if trouble in err:
            raise AssertionError("%s: %s" % (arguments, err))
    if status == 1 and (err.count("export.py: ") != 1 or not err.endswith("\n")):
        raise AssertionError("no sentence: %r" % err)
    return status, out, err


# ---- Small writers


def numbers(n, seed):
    r = random.Random(seed)
    return [r.uniform(-1, 1) for _ in range(n)]


def bf16(values):
    return b"".join(struct.pack("<f", v)[2:] for v in values)


def f16(values):
    return struct.pack("<%de" % len(values), *values)


CODES = {"F32": f32, "F16": f16, "BF16": bf16}
DIM, HIDDEN, LAYERS, HEADS, KV, SIZE, VOCAB = 8, 12, 2, 4, 2, 2, 10


def config(kind="llama", **changes):
    c = {"model_type": kind, "architectures": ["X"], "hidden_size": DIM, "intermediate_size": HIDDEN,
         "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
         "head_dim": SIZE,
         "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 5000.0,
         "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 2, "bos_token_id": 1,
         "sliding_window": None}
    c.update(changes)
    return {k: v for k, v in c.items() if v != "absent"}


OUR_LAYER = [("attn_norm", "input_layernorm", (DIM,)), ("attn_q", "self_attn.q_proj", (HEADS * SIZE, DIM)),
             ("attn_k", "self_attn.k_proj", (KV * SIZE, DIM)),
             ("attn_v", "self_attn.v_proj", (KV * SIZE, DIM)),
             ("attn_output", "self_attn.o_proj", (DIM, HEADS * SIZE)),
             ("ffn_norm", "post_attention_layernorm", (DIM,)), ("ffn_gate", "mlp.gate_proj", (HIDDEN, DIM)),
             ("ffn_up", "mlp.up_proj", (HIDDEN, DIM)), ("ffn_down", "mlp.down_proj", (DIM, HIDDEN))]


def weights(ours=False, dtype="F32", extra=(), layers=LAYERS, scale=1):
    """{name: (dtype, shape, values)}, ours or Hugging Face's; extra: (ours, theirs, shape) a layer."""
    out, seed = {}, 1

    def add(name, theirs, shape):
        nonlocal seed
        n = 1
        for s in shape:
            n *= s
        seed += 1
        out[name if ours else theirs] = (dtype, shape, [v * scale for v in numbers(n, seed)])
    add("token_embd.weight", "model.embed_tokens.weight", (VOCAB, DIM))
    for i in range(layers):
        for name, theirs, shape in OUR_LAYER:
            add("blk.%d.%s.weight" % (i, name), "model.layers.%d.%s.weight" % (i, theirs), shape)
        for name, theirs, shape in extra:
            add("blk.%d.%s" % (i, name), "model.layers.%d.%s" % (i, theirs), shape)
    add("output_norm.weight", "model.norm.weight", (DIM,))
    add("output.weight", "lm_head.weight", (VOCAB, DIM))
    return out


def stored(tensors):
    return {n: (d, s, CODES[d](v)) for n, (d, s, v) in tensors.items()}


def byte_alphabet():
    plain = [b for b in range(256) if 33 <= b < 127 or 161 <= b < 173 or 174 <= b]
    return [chr(b) if b in plain else chr(256 + sum(x not in plain for x in range(b))) for b in range(256)]


def tokenizer_json(n=VOCAB):
    """A byte-level BPE tokenizer of n tokens: <s>, </s>, letters, one merge."""
    words = ["a", "b", "c", "\u0120", "d", "e"] + byte_alphabet()[102:]
    vocab = {w: i for i, w in enumerate(words[:n - 4])}
    vocab["ab"] = len(vocab)
    added = [{"id": len(vocab) + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, t in enumerate(["<s>", "</s>", "<eot>"])]
    split = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|\\s+(?!\\S)|[^\\p{N}]+"},
             "behavior": "Isolated",
             "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                      "merges": [["a", "b"]]}}


def dump(path, value):
    with open(path, "w") as f:
        json.dump(value, f)


def put(path, data):
    with open(path, "wb") as f:
        f.write(data)
    return path


def get(path):
    with open(path, "rb") as f:
        return f.read()


def hf_folder(name, cfg=None, tensors=None, tokenizer=None, generation=None, tokenizer_config=None):
    folder = fresh_folder("export", name)
    dump(os.path.join(folder, "config.json"), cfg or config())
    write_safetensors(os.path.join(folder, "model.safetensors"), {"format": "pt"},
                      stored(tensors or weights()))
    for file, value in (("tokenizer.json", tokenizer), ("generation_config.json", generation),
                        ("tokenizer_config.json", tokenizer_config)):
        if value is not None:
            dump(os.path.join(folder, file), value)
    return folder


def gguf_string(s):
    return struct.pack("<Q", len(s.encode())) + s.encode()


def gguf_value(v):
    """(type, bytes): bool, int as u32, float as f32, str; a list of one of them; (type, bytes) as it is."""
    if isinstance(v, tuple):
        return v
    if isinstance(v, bool):
        return 7, struct.pack("<?", v)
    if isinstance(v, int):
        return 4, struct.pack("<I", v)
    if isinstance(v, float):
        return 6, struct.pack("<f", v)
    if isinstance(v, str):
        return 8, gguf_string(v)
    items = [gguf_value(x) for x in v]
    return 9, struct.pack("<IQ", items[0][0], len(items)) + b"".join(b for _, b in items)


def gguf_bytes(pairs, tensors, version=3):
    """tensors: {name: (type number, shape rows first, bytes)}"""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    for key, v in pairs.items():
        kind, data = gguf_value(v)
        out += gguf_string(key) + struct.pack("<I", kind) + data
    at, body = 0, b""
    for name, (kind, shape, data) in tensors.items():
        out += gguf_string(name) + struct.pack("<I", len(shape)) + struct.pack("<%dQ" % len(shape),
                                                                               *shape[::-1])
        out += struct.pack("<IQ", kind, at)
        body += data + bytes(-len(data) % 32)
        at = len(body)
    return out + bytes(-len(out) % 32) + body


def gguf_pairs(arch="llama", **changes):
    p = {"general.architecture": arch, "general.name": "tiny", "general.license": "mit",
         arch + ".block_count": LAYERS,
         arch + ".context_length": 64, arch + ".embedding_length": DIM, arch + ".feed_forward_length": HIDDEN,
         arch + ".attention.head_count": HEADS, arch + ".attention.head_count_kv": KV,
         arch + ".rope.freq_base": 5000.0, arch + ".attention.layer_norm_rms_epsilon": 0.5,
         arch + ".attention.key_length": SIZE, arch + ".attention.value_length": SIZE}
    p.update({k.replace("__", "."): v for k, v in changes.items()})
    return {k: v for k, v in p.items() if v is not None}


def gguf_tokenizer():
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["<s>", "</s>", "<eot>", "a", "b", "ab", "c", "d", "e", "\u0120"],
            "tokenizer.ggml.token_type": [(5, struct.pack("<i", 3))] * 3 + [(5, struct.pack("<i", 1))] * 7,
            "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.eot_token_id": 2}


def gguf_tensors():
    return {n: ({"F32": 0, "F16": 1, "BF16": 30}[d], s, CODES[d](v))
            for n, (d, s, v) in weights(ours=True).items()}


def llama2c(version, shared=False, group=4):
    """(bytes, {our name: bytes}) of a llama2.c file; what is int8 comes as values and scales in a row."""
    r, parts, named = random.Random(version), [], {}

    def add(name, shape):
        n = 1
        for s in shape:
            n *= s
        data = f32([r.uniform(-1, 1) for _ in range(n)])
        if version == 2 and len(shape) == 2:
            data = bytes(r.randrange(256) for _ in range(n)) + f32([r.random() for _ in range(n // group)])
        named[name] = data
        parts.append(data)
    shapes = {n: s for n, _, s in OUR_LAYER}

    def layers(*names):
        for name in names:
            for i in range(LAYERS):
                add("blk.%d.%s.weight" % (i, name), shapes[name])
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output"]
    if version == 0:
        add("token_embd.weight", (VOCAB, DIM))
        layers("attn_norm", *matrices)
        layers("ffn_norm", "ffn_gate", "ffn_down", "ffn_up")
        add("output_norm.weight", (DIM,))
        parts.append(f32(numbers(64 * SIZE // 2 * 2, 9)))           # cosines and sines
        head = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB if shared else -VOCAB, 64)
    else:
        layers("attn_norm", "ffn_norm")
        add("output_norm.weight", (DIM,))
        add("token_embd.weight", (VOCAB, DIM))
        layers(*matrices + ["ffn_gate", "ffn_down", "ffn_up"])
        head = b"24ka" + struct.pack("<I7iB", version, DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, 64, shared)
        head = (head + (struct.pack("<i", group) if version == 2 else b"")).ljust(256, b"\0")
    if not shared:
        add("output.weight", (VOCAB, DIM))
    return head + b"".join(parts), named


def llama2c_tokenizer(n=VOCAB):
    words = [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x41>", b"a", b"b", b"ab", b" ", b"c", b"d"][:n]
    return struct.pack("<i", 6) + b"".join(struct.pack("<fi", -i, len(w)) + w for i, w in enumerate(words))


class Export(unittest.TestCase):
    """Asserts on results; each test has a folder of its own."""

    def setUp(self):
        self.folder = fresh_folder("export", "out")
        self.out = os.path.join(self.folder, "m.bin")

    def good(self, *arguments):
        status, out, err = main(*arguments, "-o", self.out)
        self.assertEqual(status, 0, err)
        self.assertEqual(os.listdir(self.folder), ["m.bin"])
        self.printed = out
        return self.sound(self.out)

    def refused(self, words, *arguments):
        """Refused with a sentence that has these words; nothing is left behind."""
        status, _, err = main(*arguments, "-o", self.out)
        self.assertEqual(status, 1, arguments)
        for word in [words] if isinstance(words, str) else words:
            self.assertIn(word, err)
        self.assertEqual(os.listdir(self.folder), [])

    def sound(self, path):
        """The promises of the format: tiles, 64 byte borders, checksums."""
        m, data = Safetensors(path), get(path)
        length = struct.unpack_from("<Q", data)[0]
        self.assertEqual((8 + length) % 64, 0)
        header = json.loads(data[8:8 + length].decode())
        header.pop("__metadata__")
        at = 0
        for name, t in header.items():
            self.assertEqual(t["data_offsets"][0], at, name)
            at = t["data_offsets"][1]
            if not name.startswith("pad."):
                self.assertEqual(t["data_offsets"][0] % 64, 0, name)
                self.assertEqual(m.metadata["crc32." + name], "%08x" % zlib.crc32(m.tensors[name][2]))
        self.assertEqual(8 + length + at, len(data))
        self.assertTrue(all(isinstance(v, str) for v in m.metadata.values()))
        return m

    def same(self, m, expected):
        """Every expected tensor is there with these values, and no other but pads and the tokenizer's."""
        for name, (dtype, shape, values) in expected.items():
            want = "F32" if len(shape) == 1 else dtype
            self.assertEqual(m.tensors[name][:2], (want, list(shape)), name)
            if want == dtype:
                self.assertEqual(m.tensors[name][2], CODES[dtype](values), name)
            else:
                rounded = {"F16": lambda v: struct.unpack("<e", struct.pack("<e", v))[0],
                           "BF16": lambda v: struct.unpack("<f", b"\0\0" + bf16([v]))[0]}[dtype]
                self.assertEqual(m.floats(name), [rounded(v) for v in values], name)
        rest = {n for n in m.tensors if not n.startswith(("pad.", "tokenizer."))} - set(expected)
        self.assertLessEqual(rest, {"rope.freqs"})


class Sources(Export):
    def test_llama2c(self):
        for version in (0, 1, 2):
            for shared in (False, True):
                with self.subTest(version=version, shared=shared):
                    data, named = llama2c(version, shared)
                    folder = fresh_folder("export", "llama2c")
                    source = put(os.path.join(folder, "s.bin"), data)
                    put(os.path.join(folder, "tok%d.bin" % VOCAB), llama2c_tokenizer())
                    m = self.good(source, "--no-pack")
                    os.remove(self.out)
                    for name, want in named.items():
                        self.assertEqual(m.tensors[name][2], want, name)
                    self.assertEqual("output.weight" in m.tensors, not shared)
                    self.assertEqual(m.metadata.get("ggml.token_embd.weight"),
                                     "LLAMA2C_Q8:4 %d %d" % (VOCAB, DIM) if version == 2 else None)
                    self.assertNotIn("ggml.output_norm.weight", m.metadata)
                    for key, want in (("dim", "8"), ("hidden_dim", "12"), ("n_layers", "2"), ("n_heads", "4"),
                                      ("n_kv_heads", "2"), ("vocab_size", "10"), ("context_length", "64"),
                                      ("rope.pairing", "interleaved"), ("token.bos", "1"),
                                      ("token.add_bos", "1"),
                                      ("token.eos", "1 2"), ("tokenizer.merge", "score"),
                                      ("norm.eps", "1e-05")):
                        self.assertEqual(m.metadata.get(key), want, key)
                    self.assertEqual(m.tensors["tokenizer.bytes"][2], b"<unk><s></s>Aabab cd")

    def test_llama2c_tokenizer(self):
        folder = fresh_folder("export", "llama2c")
        source = put(os.path.join(folder, "s.bin"), llama2c(0)[0])
        self.assertNotIn("tokenizer.bytes", self.good(source).tensors)
        self.assertIn("no tokenizer", self.printed)
        elsewhere = put(os.path.join(fresh_folder("export", "elsewhere"), "t.bin"), llama2c_tokenizer())
        self.assertIn("tokenizer.bytes", self.good(source, "--tokenizer", elsewhere).tensors)
        os.remove(self.out)
        put(elsewhere, llama2c_tokenizer(9))
        self.refused("fewer", source, "--tokenizer", elsewhere)
        self.refused("no such file", source, "--tokenizer", elsewhere + "x")

    def test_sentencepiece(self):
        """The same BPE by scores as tokenizer.model of a folder and inside a GGUF file."""
        words = ["<unk>", "<s>", "</s>", "<0x41>", "a", "b", "ab", "\u2581", "c", "d"]
        kinds = [2, 3, 3, 6, 1, 1, 1, 1, 1, 4]
        scores = [-float(i) for i in range(VOCAB)]

        def field(number, data):
            return bytes([number << 3 | 2, len(data)]) + data
        pieces = b"".join(field(1, field(1, w.encode()) + b"\x15" + struct.pack("<f", s) + bytes([24, k]))
                          for w, s, k in zip(words, scores, kinds))
        folder = hf_folder("hf", config(), generation={"eos_token_id": 2})
        path = os.path.join(folder, "tokenizer.model")
        spm = pieces + field(2, b"\x18\2") + field(3, b"\x18\1\x20\0")
        put(path, spm)
        a = self.good(folder)
        self.assertEqual(a.tensors["tokenizer.bytes"][2], b"<unk><s></s>Aabab cd")
        self.assertEqual(list(a.tensors["tokenizer.types"][2]), kinds[:9] + [0x84])
        self.assertEqual(a.floats("tokenizer.scores"), scores)
        for key, want in (("tokenizer.merge", "score"), ("token.bos", "1"), ("token.add_bos", "1"),
                          ("token.eos", "2"), ("tokenizer.unknown", "0"), ("tokenizer.strip_space", "1")):
            self.assertEqual(a.metadata.get(key), want, key)
        os.remove(self.out)
        for data, word in ((pieces + field(2, b"\x18\1") + field(3, b"\x20\0"), "unigram"),
                           (pieces + field(2, b"\x18\2"), "remove_extra_whitespaces"),
                           (spm + field(3, b"\x20\0" + field(2, b"x")), "character map"),
                           (spm[:-1], "ends at"), (b"\xff" * 20, "not well formed"), (b"", "unigram")):
            put(path, data)
            self.refused(["tokenizer.model", word], folder)
        pairs = dict(gguf_pairs(), **{"tokenizer.ggml." + key: value for key, value in {
            "model": "llama", "tokens": words, "scores": scores, "bos_token_id": 1, "eos_token_id": 2,
            "token_type": [(5, struct.pack("<i", k)) for k in kinds], "unknown_token_id": 0}.items()})
        b = self.good(put(os.path.join(fresh_folder("export", "gguf"), "x.gguf"),
                          gguf_bytes(pairs, gguf_tensors())), "--license", "none")
        self.assertEqual(b.metadata["license"], "none")
        for name in ("bytes", "offsets", "scores", "added"):
            self.assertEqual(b.tensors["tokenizer." + name], a.tensors["tokenizer." + name], name)
        for key in ("tokenizer.merge", "token.bos", "token.add_bos", "token.eos", "tokenizer.unknown"):
            self.assertEqual(b.metadata[key], a.metadata[key], key)

    def test_the_shipped_model(self):
        m = self.sound(common.STORIES)
        self.assertEqual((m.metadata["dim"], m.metadata["license"], m.metadata["token.eos"]),
                         ("64", "MIT", "1 2"))

    def test_hugging_face_llama(self):
        for dtype in ("F32", "F16", "BF16"):
            with self.subTest(dtype=dtype):
                w = weights(dtype=dtype)
                folder = hf_folder("hf", config(), w, tokenizer_json(), {"eos_token_id": [2, 9]},
                                   {"bos_token": "<s>", "eos_token": "</s>"})
                m = self.good(folder, "--name", "Tiny \u2603")
                self.same(m, weights(True, dtype))
                for key, want in (("run.c", "1"), ("architecture", "llama"), ("dim", "8"), ("head_dim", "2"),
                                  ("norm.eps", "1e-06"), ("rope.base", "5000.0"), ("activation", "silu"),
                                  ("rope.dims", "2"), ("token.eos", "2 8 9"), ("token.bos", "7"),
                                  ("name", "Tiny \u2603"), ("rope.pairing", None), ("window", None)):
                    self.assertEqual(m.metadata.get(key), want, key)
                self.assertEqual(m.tensors["tokenizer.bytes"][2][:3], b"abc")

    def test_hugging_face_variants(self):
        """Biases, norms of q and k, windows, activations: as data, for the kinds of models that have them."""
        qkv = [("attn_%s.bias" % x, "self_attn.%s_proj.bias" % x, (n * SIZE,)) for x, n in
               (("q", HEADS), ("k", KV), ("v", KV))]
        o = [("attn_output.bias", "self_attn.o_proj.bias", (DIM,))]
        mlp = [("ffn_%s.bias" % x, "mlp.%s_proj.bias" % x, (n,)) for x, n in
               (("gate", HIDDEN), ("up", HIDDEN), ("down", DIM))]
        norms = [("attn_%s_norm.weight" % x, "self_attn.%s_norm.weight" % x, (SIZE,)) for x in "qk"]
        sliding = dict(use_sliding_window=True, sliding_window=5)
        cases = [
            ("llama", dict(attention_bias=True), qkv + o, {}),
            ("llama", dict(mlp_bias=True, hidden_act="gelu_pytorch_tanh"), mlp, {"activation": "gelu_tanh"}),
            ("llama", dict(hidden_act="gelu"), [], {"activation": "gelu"}),
            ("llama", dict(num_key_value_heads="absent", head_dim=None), None, {}),
            ("mistral", dict(sliding_window=5), [], {"window": "5"}),
            ("mistral", dict(sliding_window="absent"), [], {"window": "4096"}),
            ("mistral", dict(), [], {"window": None}),
            ("qwen2", dict(use_sliding_window=False, sliding_window=5), qkv, {"window": None}),
            ("qwen2", dict(sliding, max_window_layers=1), qkv, {"window": "5", "window.layers": "1"}),
            ("qwen2", dict(sliding, max_window_layers=0), qkv, {"window": "5", "window.layers": None}),
            ("qwen2", dict(sliding, max_window_layers=9), qkv, {"window": None}),
            ("qwen2", dict(sliding, layer_types=["sliding_attention", "full_attention"]), qkv,
             {"window": "5", "window.layers": "0"}),
            ("qwen3", dict(), norms, {"architecture": "qwen3"}),
            ("qwen3", dict(attention_bias=True), qkv + o + norms, {}),
        ]
        for kind, changes, extra, meta in cases:
            with self.subTest(kind=kind, changes=changes):
                if extra is None:                       # as many key heads as query heads: another shape
                    self.refused("k_proj", hf_folder("hf", config(kind, **changes)))
                    continue
                m = self.good(hf_folder("hf", config(kind, **changes), weights(extra=extra)))
                self.same(m, weights(True, extra=extra))
                for key, want in meta.items():
                    self.assertEqual(m.metadata.get(key), want, key)
                os.remove(self.out)
                for name, theirs, _ in extra:           # each of them is needed
                    w = weights(extra=extra)
                    del w["model.layers.1." + theirs]
                    self.refused(["missing", theirs], hf_folder("hf", config(kind, **changes), w))

    def test_unused_tensors_are_named(self):
        w = weights()
        w["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (1,), [1.0])
        w["model.layers.0.self_attn.q_proj.bias"] = ("F32", (8,), [1.0] * 8)
        self.same(self.good(hf_folder("hf", config(), w)), weights(True))
        for name in ("rotary_emb.inv_freq", "q_proj.bias"):
            self.assertRegex(self.printed, "not used .*" + name)

    def test_tied(self):
        w = weights()
        same = dict(w, **{"lm_head.weight": w["model.embed_tokens.weight"]})
        none = {n: t for n, t in w.items() if n != "lm_head.weight"}
        tied = config(tie_word_embeddings=True)
        for cfg, tensors, own in ((tied, none, False), (tied, same, False), (config(), same, False),
                                  (config(), w, True)):
            m = self.good(hf_folder("hf", cfg, tensors))
            self.assertEqual("output.weight" in m.tensors, own)
        os.remove(self.out)
        self.refused(["tie_word_embeddings", "lm_head.weight"], hf_folder("hf", tied, w))
        self.refused("lm_head.weight", hf_folder("hf", config(), none))

    def shards(self, names, index=None):
        folder = hf_folder("hf")
        os.remove(os.path.join(folder, "model.safetensors"))
        w = stored(weights())
        where = {}
        for i, name in enumerate(names):
            mine = {n: t for k, (n, t) in enumerate(sorted(w.items())) if k % len(names) == i}
            if "/" not in name:
                write_safetensors(os.path.join(folder, name), {}, mine)
            where.update((n, name) for n in mine)
        dump(os.path.join(folder, "model.safetensors.index.json"), {"metadata": {}, "weight_map": where}
             if index is None else index)
        return folder

    def test_shards(self):
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        folder = self.shards(names)
        self.same(self.good(folder), weights(True))
        os.remove(self.out)
        os.remove(os.path.join(folder, names[1]))
        self.refused([names[1], "no such file"], folder)
        shutil.copy(os.path.join(folder, names[0]), os.path.join(folder, names[1]))
        self.refused("two files", folder)
        self.refused("weight_map", self.shards(names, {"weight_map": 7}))
        self.refused("weight_map", self.shards(names, {}))
        self.refused("object", self.shards(names, [7]))

    def test_no_name_leads_out_of_the_folder(self):
        outside = os.path.join(fresh_folder("export", "outside"), "x.safetensors")
        write_safetensors(outside, {}, stored(weights()))
        for name in ("../outside/x.safetensors", outside, "..", "a/b.safetensors", "a\\b.safetensors",
                     ".hidden.safetensors", "x.safetensors\n", "x.bin", ""):
            with self.subTest(name=name):
                self.refused("no name of a file",
                             self.shards(["ok.safetensors"], {"weight_map": {"a": name}}))

    def test_safetensors_file_with_its_config_beside_it(self):
        folder = hf_folder("hf")
        os.rename(os.path.join(folder, "model.safetensors"), os.path.join(folder, "other.safetensors"))
        self.refused("no model.safetensors", folder)
        m = self.good(os.path.join(folder, "other.safetensors"))
        self.assertEqual(m.metadata["name"], "other")
        again = put(os.path.join(folder, "again.safetensors"), get(self.out))
        os.remove(self.out)
        self.refused("already", again)

    def test_gguf(self):
        for arch, pairing in (("llama", "interleaved"), ("qwen2", "half"), ("qwen3", "half")):
            with self.subTest(arch=arch):
                tensors = gguf_tensors()
                if arch == "qwen3":
                    for i in range(LAYERS):
                        for x in "qk":
                            tensors["blk.%d.attn_%s_norm.weight" % (i, x)] = (0, (SIZE,), f32([1.5] * SIZE))
                if arch == "qwen2":
                    for i in range(LAYERS):
                        tensors["blk.%d.attn_q.bias" % i] = (0, (HEADS * SIZE,), f32([0.5] * HEADS * SIZE))
                source = put(os.path.join(fresh_folder("export", "gguf"), "x.gguf"),
                             gguf_bytes(dict(gguf_pairs(arch), **gguf_tokenizer()), tensors,
                                        2 + (arch == "qwen3")))
                m = self.good(source)
                for name, (_, shape, data) in tensors.items():
                    self.assertEqual(m.tensors[name], ("F32", list(shape), data), name)
                for key, want in (("rope.pairing", pairing), ("norm.eps", "0.5"), ("name", "tiny"),
                                  ("license", "mit"),
                                  ("token.eos", "1 2"), ("token.bos", "0"), ("tokenizer.merge", "rank"),
                                  ("rope.base", "5000.0"), ("architecture", arch)):
                    self.assertEqual(m.metadata.get(key), want, key)

    def quantised(self):
        """A GGUF file whose matrices are blocks: (path, {name: (type, rows, cols, bytes)})."""
        r, raw, tensors = random.Random(3), {}, {}
        kinds = [("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24),
                 ("Q8_0", 8, 32, 34),
                 ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144),
                 ("Q5_K", 13, 256, 176),
                 ("Q6_K", 14, 256, 210), ("IQ4_NL", 20, 32, 18), ("IQ4_XS", 23, 256, 136)]
        dim = 256
        shapes = {"attn_q": (dim, dim), "attn_k": (dim, dim), "attn_v": (dim, dim), "attn_output": (dim, dim),
                  "ffn_gate": (dim, dim), "ffn_up": (dim, dim), "ffn_down": (dim, dim)}
        for i in range(2):
            for norm in ("attn_norm", "ffn_norm"):
                tensors["blk.%d.%s.weight" % (i, norm)] = (0, (dim,), f32([1.0] * dim))
            for j, (name, (rows, cols)) in enumerate(shapes.items()):
                kind, number, block, size = kinds[(i * 7 + j) % 12]
                data = bytes(r.getrandbits(8) for _ in range(rows * cols // block * size))
                tensors["blk.%d.%s.weight" % (i, name)] = (number, (rows, cols), data)
                raw["blk.%d.%s.weight" % (i, name)] = (kind, rows, cols, data)
        tensors["token_embd.weight"] = (30, (3, dim), bf16(numbers(3 * dim, 1)))
        tensors["output_norm.weight"] = (0, (dim,), f32([1.0] * dim))
        p = gguf_pairs(llama__embedding_length=dim, llama__feed_forward_length=dim,
                       llama__attention__head_count=4,
                       llama__attention__head_count_kv=4, llama__attention__key_length=None,
                       llama__attention__value_length=None)
        return put(os.path.join(fresh_folder("export", "gguf"), "q.gguf"), gguf_bytes(p, tensors)), raw

    def test_quantised_blocks_are_carried(self):
        source, raw = self.quantised()
        m = self.good(source, "--no-pack")
        self.assertEqual({t[0] for t in raw.values()}, set(e.BLOCKS))
        for name, (kind, rows, cols, data) in raw.items():
            self.assertEqual(m.metadata["ggml." + name], "%s %d %d" % (kind, rows, cols))
            self.assertEqual(m.tensors[name], ("U8", [len(data)], data))
        self.assertNotIn("ggml.token_embd.weight", m.metadata)
        self.assertIn("-m quantize", self.printed)

    def test_packing(self):
        """The program beside export.py is called on a temporary file, and what it wrote is what stays."""
        source, _ = self.quantised()
        tools = fresh_folder("export", "tools")
        packer = os.path.join(tools, "run")
        self.refused(["make", "--no-pack", "-m quantize"], source, "--run", packer)
        for body, status in (('test "$2 $3 $4" = "-m quantize -o" && cp "$1" "$5" && echo packed >> "$5"', 0),
                             ("exit 3", 1), ("true", 1), ('cp "$1" "$5"; exit 1', 1)):
            with self.subTest(body=body):
                put(packer, b"#!/bin/sh\n" + body.encode() + b"\n")
                os.chmod(packer, 0o755)
                code, _, err = main(source, "--run", packer, "-o", self.out)
                self.assertEqual(code, status, err)
                self.assertEqual(os.listdir(self.folder), [] if status else ["m.bin"])
                if status == 0:
                    self.assertTrue(get(self.out).endswith(b"packed\n"))
                    os.remove(self.out)
                else:
                    self.assertIn("quantize ended", err)

    def test_split_gguf(self):
        path = os.path.join(fresh_folder("export", "gguf"), "x-00001-of-00003.gguf")
        put(path, gguf_bytes(gguf_pairs(split__count=3), gguf_tensors()))
        self.refused("several files", path)

    def test_gguf_in_a_wheel(self):
        folder = fresh_folder("export", "wheel")
        data = gguf_bytes(gguf_pairs(general__name=None), gguf_tensors())
        for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            path = os.path.join(folder, "some.whl")
            with zipfile.ZipFile(path, "w", how) as z:
                z.writestr("p/Model.gguf", data)
                z.writestr("p/__init__.py", "")
            before = set(os.listdir(e.tempfile.gettempdir()))
            m = self.good(path)
            self.same(m, weights(True))
            self.assertEqual((m.metadata["name"], m.metadata["source"]), ("Model", "some.whl"))
            self.assertEqual(set(os.listdir(e.tempfile.gettempdir())) - before, set())
        os.remove(self.out)
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("archive/data.bin", "x")
        self.refused("0 GGUF files", path)
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("archive/data.pkl", "x")
        self.refused("pickled", path)
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("a.gguf", data)
            z.writestr("b.gguf", data)
        self.refused("2 GGUF files", path)

    def test_fixture_models_agree(self):
        """A model as a folder and as a GGUF file: the same tensors, but for q and k of a llama."""
        for name in ("llama3", "llama_odd", "qwen2", "qwen3"):
            folder = os.path.join(common.FIXTURES, "models", name)
            a = self.good(folder)
            b = self.good(os.path.join(folder, name + ".gguf"))
            pads = {n for n in set(a.tensors) | set(b.tensors) if n.startswith("pad.")}
            self.assertEqual(set(a.tensors) - pads, set(b.tensors) - pads)
            for n in set(a.tensors) - pads:
                x, y = a.tensors[n], b.tensors[n]
                if n == "rope.freqs":                   # a divisor in float32 lies between
                    self.assertEqual(len(a.floats(n)), int(a.metadata["rope.dims"]) // 2)
                    for u, v in zip(a.floats(n), b.floats(n)):
                        self.assertAlmostEqual(u / v, 1, delta=1e-6)
                elif name.startswith("llama") and (".attn_q." in n or ".attn_k." in n):
                    self.assertEqual((x[:2], sorted(x[2])), (y[:2], sorted(y[2])), n)
                    self.assertNotEqual(x[2], y[2])
                else:
                    self.assertEqual(x, y, n)

    def test_same_bytes_again(self):
        folder = hf_folder("hf", config(), None, tokenizer_json())
        self.good(folder)
        first = get(self.out)
        other = os.path.join(fresh_folder("export", "other"), "hf")
        shutil.copytree(folder, other)
        again = subprocess.run([sys.executable, os.path.join(ROOT, "export.py"), other, "-o", self.out],
                               stdout=subprocess.PIPE, env=dict(os.environ, PYTHONHASHSEED="5"))
        self.assertEqual((again.returncode, get(self.out)), (0, first))
        saved, e.CHUNK = e.CHUNK, 7                     # however it is cut into pieces
        try:
            self.good(folder)
        finally:
            e.CHUNK = saved
        self.assertEqual(get(self.out), first)

    def test_memory_is_bounded(self):
        """96 MB of weights pass through a process that grows by a few MB."""
        n = 24 << 20
        folder = fresh_folder("export", "big")
        dump(os.path.join(folder, "config.json"), config(vocab_size=n // 8, tie_word_embeddings=True))
        small = stored(weights())
        del small["lm_head.weight"], small["model.embed_tokens.weight"]
        path = os.path.join(folder, "model.safetensors")
        header, at = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [n // 8, 8],
                                                    "data_offsets": [0, 4 * n]}}, 4 * n
        for name, (d, s, b) in small.items():
            header[name] = {"dtype": d, "shape": s, "data_offsets": [at, at + len(b)]}
            at += len(b)
        text = json.dumps(header).encode()
        with open(path, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + 4 * n)           # sparse
            f.seek(0, 2)
            f.write(b"".join(b for _, _, b in small.values()))
        program = "import sys, resource; sys.path.insert(0, %r); import export; " \
            "status = export.main(sys.argv[1:]); " \
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)" % ROOT
        peak = []
        for source in (hf_folder("hf"), folder):
            p = subprocess.run([sys.executable, "-c", program, source, "-o", self.out],
                               stdout=subprocess.PIPE)
            self.assertEqual(p.returncode, 0)
            peak.append(int(p.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024))
        os.remove(self.out)
        shutil.rmtree(folder)
        self.assertLess(peak[1] - peak[0], 16 << 20)


class Configurations(Export):
    def test_refused_by_name(self):
        for changes, word in [
                ({"model_type": "mixtral"}, "known: llama mistral qwen2 qwen3"),
            ({"model_type": None}, "known: llama"),
                ({"model_type": ["llama"]}, "known: llama"),
                ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
                ({"quantization_config": 7}, "quantization_config"),
                ({"hidden_act": "relu"}, "known: silu"), ({"logit_scale": 0.25}, "logit_scale"),
                ({"num_local_experts": 8}, "num_local_experts"), ({"hidden_size": 7}, "shape"),
                ({"hidden_size": 0}, "hidden_size"), ({"hidden_size": -8}, "hidden_size"),
            ({"hidden_size": "8"}, "hidden_size"),
                ({"hidden_size": 8.0}, "hidden_size"), ({"hidden_size": True}, "hidden_size"),
                ({"hidden_size": None}, "hidden_size is missing"), ({"vocab_size": 11}, "embed_tokens"),
                ({"num_hidden_layers": 3}, "layers.2"), ({"num_hidden_layers": 10 ** 9}, "num_hidden_layers"),
                ({"num_attention_heads": 3, "head_dim": None}, "shape"), ({"head_dim": 3}, "even"),
                ({"rms_norm_eps": "x"}, "rms_norm_eps"), ({"rope_theta": 0}, "rope_theta"),
                ({"sliding_window": 9}, "sliding_window"), ({"head_dim": 1 << 40}, "head_dim"),
                ({"max_position_embeddings": 1.5}, "max_position_embeddings"),
            ({"rope_scaling": 3}, "rope_scaling"),
                ({"rope_scaling": {"type": "mrope"}}, "mrope"),
                ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
                ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
                ({"rope_scaling": {"type": "linear", "factor": 2, "alpha": 3}}, "alpha"),
                ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                                   "high_freq_factor": 1.0,
                                   "original_max_position_embeddings": 32}}, "high_freq_factor"),
                ({"rope_scaling": {"type": "longrope", "short_factor": [1]}}, "long_factor is missing"),
                ({"rope_scaling": {"type": "su", "short_factor": [1, 1], "long_factor": [2, 2]}}, "1 RoPE"),
                ({"rope_scaling": {"type": "longrope", "short_factor": ["1"], "long_factor": ["2"]}}, "1 RoPE"),
                ({"rope_scaling": {"type": "dynamic"}}, "factor is missing"),
                ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
                ({"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
                ({"attention_bias": 1}, "attention_bias"), ({"mlp_bias": "yes"}, "mlp_bias")]:
            with self.subTest(changes=changes):
                self.refused(word, hf_folder("hf", config(**changes)))
        self.refused("layer_types", hf_folder("hf", config("qwen2", layer_types=["full_attention"])))
        self.refused("layer_types", hf_folder("hf", config("qwen2", layer_types=["chunked"] * 2)))

    def test_a_field_that_does_not_matter_can_be_ignored(self):
        folder = hf_folder("hf", config(logit_scale=0.25, mystery=0, nothing=None, _private=5))
        self.refused("--ignore logit_scale", folder)
        self.good(folder, "--ignore", "logit_scale")

    def freqs(self, cfg, *options):
        m = self.good(hf_folder("hf", cfg, weights()), *options)
        return m.floats("rope.freqs") if "rope.freqs" in m.tensors else None, m.metadata

    def test_rope_scaling(self):
        """Values of transformers 5.23 for a head of 16 (ROPE_INIT_FUNCTIONS), base 100."""
        cases = json.loads(ROPE_CASES)
        global SIZE, HEADS, KV, OUR_LAYER
        saved = SIZE, HEADS, KV, OUR_LAYER
        try:
            SIZE, HEADS, KV = 16, 1, 1
            OUR_LAYER = [(a, b, (16, DIM) if a in ("attn_q", "attn_k", "attn_v") else (DIM, 16)
                          if a == "attn_output"
                          else s) for a, b, s in OUR_LAYER]
            for rule, context, want, attention in cases:
                for form in ("rope_scaling", "rope_parameters"):
                    with self.subTest(rule=rule, form=form):
                        inner = dict(rule, rope_theta=100.0) if form == "rope_parameters" else rule
                        got, meta = self.freqs(config(max_position_embeddings=context, **{
                            "rope_theta": 100.0 if form == "rope_scaling" else "absent", form: inner}))
                        self.assertEqual(meta["rope.base"], "100.0")
                        self.assertAlmostEqual(float(meta.get("rope.attention_factor", 1)), attention,
                                               delta=1e-9)
                        if rule["rope_type"] in ("default", "dynamic"):     # as far as the context goes
                            self.assertIsNone(got)
                        else:
                            for u, v in zip(got, want):
                                self.assertAlmostEqual(u / v, 1, delta=1e-6)
                            self.assertEqual(len(got), 8)
                        self.assertEqual(meta["context_length"], str(context))
            rule, context, want, attention = LONGROPE_SHORT     # a short context has factors of its own
            got, meta = self.freqs(config(max_position_embeddings=context, rope_theta=100.0, rope_scaling=rule),
                                   "--context", "64")
            self.assertIn("short texts", self.printed)
            self.assertEqual(meta["context_length"], "64")
            self.assertAlmostEqual(float(meta["rope.attention_factor"]), attention, delta=1e-9)
            for u, v in zip(got, want):
                self.assertAlmostEqual(u / v, 1, delta=1e-6)
            del rule["original_max_position_embeddings"]        # as Phi-3 has it: beside the rule, and "su"
            again, meta = self.freqs(config(max_position_embeddings=context, rope_theta=100.0, rope_scaling=dict(
                rule, rope_type="su"), original_max_position_embeddings=64), "--context", "64")
            self.assertEqual(again, got)
            self.freqs(config(max_position_embeddings=context, rope_theta=100.0, rope_scaling=dict(
                rule, original_max_position_embeddings=64)), "--context", "65")
            self.assertIn("more than 64 positions", self.printed)
        finally:
            SIZE, HEADS, KV, OUR_LAYER = saved

    def test_end_tokens(self):
        for model_ids, generation, want in ((2, None, "2"), ([1, 2], None, "1 2"),
                                            (None, {"eos_token_id": 3}, "3"),
                                            (2, {"eos_token_id": [9, 3]}, "2 3 9"), (10, None, None),
                                            (-1, None, None),
                                            ("x", None, None), (True, None, None), (None, {}, None)):
            with self.subTest(model_ids=model_ids, generation=generation):
                m = self.good(hf_folder("hf", config(eos_token_id=model_ids), generation=generation))
                self.assertEqual(m.metadata.get("token.eos"), want)
                self.assertEqual("none of the 10 tokens" in self.printed, model_ids in (10, -1, "x", True))

    def test_chat(self):
        """A template becomes metadata; one that fixed texts cannot reproduce is named, the model exported."""
        simple = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}<s>assistant:"
        odd = "{{ messages | length }}{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
        for template, works in ((simple, True), (odd, False), ("{% bad", False), ([{"name": "default",
                                "template": simple}], True), ([{"name": "tools", "template": simple}], None),
                                (7, None)):
            with self.subTest(template=template):
                m = self.good(hf_folder("hf", config(), tokenizer=tokenizer_json(), tokenizer_config={
                    "bos_token": "<s>", "eos_token": "</s>", "chat_template": template}))
                self.assertEqual("chat.user.before" in m.metadata, works is True)
                self.assertEqual("chat refused" in self.printed, works is False)
                why = m.metadata.get("chat.refused")
                self.assertEqual(why is not None, works is False)
                self.assertTrue(why is None or why.startswith("the chat template") and len(why.encode()) <= 300)
        folder = hf_folder("hf", config(), tokenizer=tokenizer_json())
        put(os.path.join(folder, "chat_template.jinja"), simple.encode())
        self.assertEqual(self.good(folder).metadata["chat.user.before"], "<s>user:")

    def test_gguf_fields(self):
        def run(changes, tensors=None, options=()):
            path = os.path.join(fresh_folder("export", "gguf"), "x.gguf")
            return [put(path, gguf_bytes(gguf_pairs(**changes), tensors or gguf_tensors()))] + list(options)
        for changes, word in [
                ({"general__architecture": "qwen3moe"}, "qwen3moe"),
            ({"general__architecture": None}, "architecture"),
                ({"llama__expert_count": 8}, "expert_count"),
                ({"llama__logit_scale": 0.5}, "llama.logit_scale"),
            ({"llama__block_count": 0}, "block_count"),
                ({"llama__block_count": None}, "block_count is missing"),
            ({"llama__vocab_size": 11}, "token_embd"),
            ({"llama__embedding_length": 16}, "shape"),
                ({"llama__rope__scaling__type": "longrope"}, "short_factor is missing"),
                ({"llama__rope__scaling__type": "su"}, "longrope"),
            ({"llama__context_length": "64"}, "context_length"),
                ({"llama__attention__layer_norm_rms_epsilon": None}, "missing"),
                ({"llama__rope__scaling__yarn_ext_factor": 1.0}, "yarn_ext_factor"),
                ({"general__alignment": 33}, "general.alignment"),
            ({"general__alignment": "x"}, "general.alignment")]:
            with self.subTest(changes=changes):
                self.refused(word, *run(changes))
        self.good(*run({"llama__logit_scale": 0.5}, options=["--ignore", "llama.logit_scale"]))
        self.assertEqual(self.good(*run({"llama__attention__sliding_window": 7})).metadata["window"], "7")
        linear = self.good(*run({"llama__rope__scaling__factor": 4.0}))
        self.assertEqual(linear.floats("rope.freqs"), [0.25])
        yarn = self.good(*run({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0,
                               "llama__rope__scaling__original_context_length": 16}))
        self.assertAlmostEqual(float(yarn.metadata["rope.attention_factor"]), 1.1386294361119891, delta=1e-9)
        divided = self.good(*run({}, dict(gguf_tensors(), **{"rope_freqs.weight": (0, (1,), f32([8.0]))})))
        self.assertEqual(divided.floats("rope.freqs"), [0.125])
        factors = {"rope_factors_%s.weight" % k: (0, (1,), f32([d])) for k, d in (("short", 2.0), ("long", 4.0))}
        changes = {"llama__rope__scaling__original_context_length": 16,
                   "llama__rope__scaling__attn_factor": 1.25, "llama__rope__scaling__type": "longrope"}
        for context, value in ((64, 0.25), (16, 0.5)):
            long = self.good(*run(changes, dict(gguf_tensors(), **factors), ["--context", str(context)]))
            self.assertEqual(long.floats("rope.freqs"), [value])
            self.assertEqual(long.metadata["rope.attention_factor"], "1.25")
        os.remove(self.out)
        self.refused("--context", *run({}, options=["--context", "65"]))
        self.refused("together", *run({"llama__rope__scaling__factor": 4.0}, dict(gguf_tensors(), **factors)))
        for bad in ((0, (2,), f32([1.0, 1.0])), (0, (1,), f32([0.0])), (0, (1,), f32([float("nan")])),
                    (8, (32,), bytes(34))):
            self.refused("rope_freqs.weight", *run({}, dict(gguf_tensors(), **{"rope_freqs.weight": bad})))
        for number, name in ((16, "IQ2_XXS"), (9, "Q8_1"), (28, "F64"), (77, "number 77")):
            self.refused([name, "attn_q"], *run({}, dict(gguf_tensors(), **{"blk.0.attn_q.weight": (
                number, (8, 8), bytes(512))})))
        self.refused("vector of type Q8_0", *run(
            {"llama__embedding_length": 32, "llama__attention__key_length": 8,
             "llama__attention__value_length": 8}, {
                "token_embd.weight": (0, (10, 32), bytes(1280)),
                 "blk.0.attn_norm.weight": (8, (32,), bytes(34))}))
        self.refused("--tokenizer", *run({}, options=["--tokenizer", "x"]))


# [rule, context, frequencies, attention factor]
ROPE_CASES = """[
 [{"rope_type": "default"}, 64, [], 1.0],
 [{"rope_type": "linear", "factor": 4.0}, 64, [0.25, 0.140585333, 0.079056941, 0.0444569848, 0.0250000004,
  0.0140585322, 0.00790569466, 0.00444569858], 1.0],
 [{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64}, 512, [1.0, 0.562341332, 0.244384587, 0.0643098727, 0.0130422562,
  0.0070292661, 0.00395284733, 0.00222284929], 1.0],
 [{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, [1.0, 0.477990121,
  0.221359432, 0.0978053659, 0.0399999991, 0.0140585322, 0.00790569466, 0.00444569858], 1.138629436111989],
 [{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
  256, [1.0, 0.477990121, 0.221359432, 0.0978053659, 0.0399999991, 0.0140585322, 0.00790569466,
  0.00444569858], 1.3],
 [{"rope_type": "longrope", "short_factor": [1, 1.1, 1.2, 1.35, 1.5, 1.5, 2, 2.5],
   "long_factor": [1, 1.3, 2.1, 3.9, 5.5, 8, 8, 9], "original_max_position_embeddings": 64}, 512, [1.0,
  0.432570279, 0.150584653, 0.0455969088, 0.0181818176, 0.0070292661, 0.00395284733, 0.00197586603],
  1.224744871391589],
 [{"rope_type": "longrope", "short_factor": [1, 1.1, 1.2, 1.35, 1.5, 1.5, 2, 2.5], "factor": 4.0,
   "long_factor": [1, 1.3, 2.1, 3.9, 5.5, 8, 8, 9], "original_max_position_embeddings": 64}, 512, [1.0,
  0.432570279, 0.150584653, 0.0455969088, 0.0181818176, 0.0070292661, 0.00395284733, 0.00197586603],
  1.1547005383792517],
 [{"rope_type": "dynamic", "factor": 4.0}, 64, [], 1.0]
]"""
LONGROPE_SHORT = [{"rope_type": "longrope", "short_factor": [1, 1.1, 1.2, 1.35, 1.5, 1.5, 2, 2.5],
                   "long_factor": [1, 1.3, 2.1, 3.9, 5.5, 8, 8, 9], "original_max_position_embeddings": 64},
                  512, [1.0, 0.511219382, 0.263523132, 0.131724402, 0.0666666701, 0.0374894217,
                        0.0158113893, 0.00711311772], 1.224744871391589]


class Hostile(Export):
    """Files that lie. One sentence, no hang, no great allocation, nothing left behind."""

    def test_gguf_by_hand(self):
        good = gguf_bytes(gguf_pairs(), gguf_tensors())
        path = os.path.join(fresh_folder("export", "gguf"), "x.gguf")
        head = b"GGUF" + struct.pack("<I", 3)
        huge = struct.pack("<Q", 1 << 62)
        one = struct.pack("<QQ", 0, 1) + gguf_string("k")
        info = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + gguf_string("t")
        for data, word in [
                (b"GGUF", "ends"), (b"GGUF" + struct.pack("<I", 1) + good[8:], "version 1"),
                (head + huge * 2, "tensors"), (head + struct.pack("<Q", 0) + huge, "keys"),
                (head + struct.pack("<QQ", 0, 1) + huge + bytes(100), "too many"),
                (head + struct.pack("<QQQ", 0, 1, 1 << 20) + bytes(100), "ends"),
                (head + one + struct.pack("<I", 99) + bytes(100), "type 99"),
                (head + one + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(100), "values"),
                (head + one + struct.pack("<IIQ", 9, 9, 1) + bytes(100), "type 9"),
                (head + one + struct.pack("<IIQ", 9, 0, 1 << 40) + bytes(100), "values"),
                (head + struct.pack("<QQ", 0, 2) + (gguf_string("k") + b"\7\0\0\0\1") * 2, "twice"),
                (head + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"\xff" + bytes(100), "UTF-8"),
                (info + struct.pack("<I", 9) + bytes(100), "dimensions"),
                (info + struct.pack("<I4QIQ", 4, *[1 << 62] * 4, 0, 0) + bytes(100), "does not fit"),
                (info + struct.pack("<IQIQ", 1, 8, 0, 1 << 63) + bytes(100), "does not fit"),
                (info + struct.pack("<IQIQ", 1, 8, 0, 1) + bytes(100), "does not fit"),
                (info + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(100), "blocks of 32")]:
            with self.subTest(word=word, data=data[:40]):
                self.refused(word, put(path, data))
        two = b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
        for name, at in (("a", 0), ("b", 0)):
            two += gguf_string(name) + struct.pack("<IQIQ", 1, 8, 0, at)
        self.refused("does not fit", put(path, two + bytes(200)))
        self.refused("twice", put(path, two.replace(gguf_string("b"), gguf_string("a")) + bytes(200)))

    def safetensors(self, header, body=b"", length=None):
        folder = hf_folder("hf")
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        put(os.path.join(folder, "model.safetensors"),
            struct.pack("<Q", len(text) if length is None else length) + text + body)
        return folder

    def test_safetensors_by_hand(self):
        def entry(dtype="F32", shape=(2,), span=(0, 8)):
            return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}}
        ok = bytes(8)
        for header, body, length, word in [
                ({}, b"", 1 << 62, "header of"), ({}, b"", 3, "header of"), (b"[1]", b"", None, "object"),
                (b"{", b"", None, "JSON"), (b'{"a":1,"a":2}', b"", None, "twice"),
            (b'{"a":NaN}', b"", None, "NaN"),
                (b'{"a":' + b"9" * 5000 + b"}", b"", None, "5000 digits"), (b"\xff\xfe", b"", None, "JSON"),
                (b'{"a":' + b"[" * 200000 + b"]" * 200000 + b"}", b"", None,
                 "nested" if sys.version_info < (3, 13) else ""),
                ({"__metadata__": 3}, b"", None, "object"), ({"x": 7}, ok, None, "tensor x"),
                (entry(shape=(3,)), ok, None, "has 8 bytes"), (entry(span=(0, 9)), ok, None, "tensor x"),
                (entry(span=(8, 0)), ok, None, "tensor x"), (entry(span=(0, 8, 9)), ok, None, "tensor x"),
                (entry(span=(0.0, 8)), ok, None, "tensor x"), (entry(shape=(True, 2)), ok, None, "tensor x"),
                (entry(shape=(-2, -1)), ok, None, "tensor x"),
            (entry(shape=(1 << 70,)), ok, None, "tensor x"),
                (entry(dtype=None), ok, None, "tensor x"), (entry(shape=[1] * 9), ok, None, "tensor x"),
                (entry(shape=(1 << 40, 1 << 40)), ok, None, "has 8 bytes"),
                (entry(), bytes(9), None, "the end"), (entry(span=(1, 9)), bytes(9), None, "begins at 1"),
                (dict(entry(), y=entry()["x"]), bytes(16), None, "begins at 0"),
                (entry(dtype="F4"), ok, None, "missing")]:
            with self.subTest(word=word, header=str(header)[:60]):
                self.refused(word, self.safetensors(header, body, length))
        folder = self.safetensors({})
        put(os.path.join(folder, "model.safetensors"), b"version https://git-lfs.github.com/spec/v1\noid "
                                                       b"sha256:0\n")
        self.refused("git lfs pull", folder)
        w = weights()
        for dtype in ("F64", "F8_E4M3"):
            tensors = stored(w)
            name = "model.layers.0.mlp.up_proj.weight"
            tensors[name] = (dtype, (HIDDEN, DIM), bytes(HIDDEN * DIM * (8 if dtype == "F64" else 1)))
            folder = hf_folder("hf")
            write_safetensors(os.path.join(folder, "model.safetensors"), {}, tensors)
            self.refused([dtype, name], folder)

    def test_what_is_no_model(self):
        folder = fresh_folder("export", "files")
        for data, name, word in [(b"\x80\x02}q\x00.", "m.bin", "pickled"),
                                 (b"\x80\x04xxx", "m.pt", "pickled"),
                                 (b"PK\3\4" + bytes(50), "m.zip", "zip"), (b"", "m.bin", "empty"),
                                 (b"\1\2\3\4\5", "m.bin", "ends"), (b"hello, world", "m.bin", "a text"),
                                 (b"\xff\xd8\xff\xe0\0\x10JFIF", "m.jpg", "a picture"),
                                 (b"\x7fELF\2\1\1", "m.bin", "a program"), (b"<!DOCTYPE", "m.gguf", "web page"),
                                 (b"version https://git-lfs", "m.gguf", "git lfs pull"),
                                 (b'{"model_type": "llama"}', "m.json", "the folder"),
                                 (b"\1" * 500, "m.bin", "not a model file"),
                                 (b"24ka" + struct.pack("<I", 7) + bytes(300),
                                                                             "m.bin", "version 7")]:
            with self.subTest(name=name, word=word):
                self.refused(word, put(os.path.join(folder, name), data))
        self.refused("no such file", os.path.join(folder, "none.gguf"))
        for word, gone in (("give m.gguf itself", ["m.gguf"]), ("config.json; m.pt: pickled", ["m.bin", "m.pt"]),
                           ("org/name", [])):
            self.refused(["without config.json", word], folder)
            for name in gone:
                os.remove(os.path.join(folder, name))
        dump(os.path.join(folder, "config.json"), config())
        self.refused("no model.safetensors", folder)
        put(os.path.join(folder, "pytorch_model.bin"), b"\x80\x02")
        self.refused("pytorch_model.bin: pickled", folder)
        for text, word in ((b"[]", "object"), (b"{" * 9, "JSON"), (b"", "JSON"), (b'{"a":' * 99999, "")):
            put(os.path.join(folder, "config.json"), text)
            self.refused(word, folder)

    def test_numbers_that_look_like_other_files(self):
        """A safetensors file begins with a length, llama2.c's with a width: any bytes."""
        for length in (0x4b50, 0x10280, 0x10380, 0x10480):
            folder = hf_folder("hf")
            path = os.path.join(folder, "model.safetensors")
            data = get(path)
            old = struct.unpack_from("<Q", data)[0]
            put(path, struct.pack("<Q", length) + data[8:8 + old].ljust(length) + data[8 + old:])
            self.same(self.good(folder), weights(True))
        for dim in (640, 1152, 60, 828):
            sizes = [2 * dim, dim, dim * dim, 2 * dim, 2 * dim, dim * dim, dim, 4 * dim, 4 * dim, 4 * dim, dim, 8, 8]
            source = put(os.path.join(fresh_folder("export", "llama2c"), "s.bin"),
                         struct.pack("<7i", dim, 4, 1, dim // 2, 1, 2, 8) + bytes(4 * sum(sizes)))
            self.assertEqual(self.good(source).metadata["dim"], str(dim))

    def test_names_do_not_reach_the_terminal(self):
        p = gguf_pairs(general__name="a\x1b[31mb\nc")
        tensors = dict(gguf_tensors(), **{"\x1b[2Jextra": (0, (8,), bytes(32))})
        m = self.good(put(os.path.join(fresh_folder("export", "gguf"), "x.gguf"), gguf_bytes(p, tensors)))
        self.assertEqual(m.metadata["name"], "a\x1b[31mb\nc")
        self.assertNotIn("\x1b", self.printed)
        os.remove(self.out)
        self.refused("NUL", put(os.path.join(fresh_folder("export", "gguf"), "x.gguf"),
                                gguf_bytes(gguf_pairs(general__name="a\0b"), gguf_tensors())))

    def files(self):
        """(what, source, the file to spoil, how many changes); those with a tokenizer take longer."""
        gguf = os.path.join(fresh_folder("export", "fuzz", "gguf"), "x.gguf")
        one = {n: t for n, t in gguf_tensors().items() if not n.startswith("blk.1.")}
        put(gguf, gguf_bytes(gguf_pairs(llama__block_count=1), one))
        yield "gguf", gguf, gguf, 600
        put(gguf, gguf_bytes(dict(gguf_pairs(llama__block_count=1), **gguf_tokenizer()), one))
        yield "gguf with a tokenizer", gguf, gguf, 150
        path = os.path.join(fresh_folder("export", "fuzz", "zip"), "x.whl")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("x.gguf", gguf_bytes(gguf_pairs(llama__block_count=1), one))
        yield "wheel", path, path, 300
        for version in (0, 1, 2):
            folder = fresh_folder("export", "fuzz", "c%d" % version)
            source = put(os.path.join(folder, "m.bin"), llama2c(version)[0])
            yield "llama2.c %d" % version, source, source, 300
        yield "llama2.c tokenizer", source, put(os.path.join(folder, "tok10.bin"), llama2c_tokenizer()), 300
        folder = fresh_folder("export", "fuzz", "hf")
        files = {"config.json": config(num_hidden_layers=1, rope_scaling={"rope_type": "yarn", "factor": 4.0,
                                       "original_max_position_embeddings": 16}),
                 "model.safetensors.index.json": {"weight_map": {"x": "a.safetensors"}},
                 "generation_config.json": {"eos_token_id": [2, 3]},
                 "tokenizer.json": tokenizer_json(),
                 "tokenizer_config.json": {"bos_token": "<s>", "chat_template": "{% for m in messages "
                                                                                "%}<s>{{ m['role'] "
                                           "}}:{{ m['content'] }}</s>{% endfor %}<s>assistant:"}}
        write_safetensors(os.path.join(folder, "a.safetensors"), {}, stored(weights(layers=1)))
        for name in ("config.json", "model.safetensors.index.json"):
            dump(os.path.join(folder, name), files[name])
        yield "safetensors", folder, os.path.join(folder, "a.safetensors"), 600
        for name in files:
            dump(os.path.join(folder, name), files[name])
            yield name, folder, os.path.join(folder, name), 150 if name.startswith("tokenizer") else 500

    def attempt(self, source, what):
        status, _, err = main(source, "--no-pack", "-o", self.out, seconds=10)
        self.assertIn(status, (0, 1), what)
        self.assertEqual(os.listdir(self.folder), [] if status else ["m.bin"], what)
        if status == 0:
            os.remove(self.out)
        return status

    @contextlib.contextmanager
    def little_memory(self):
        """No allocation of more than 1 GB beyond what this process has."""
        try:
            with open("/proc/self/statm") as f:
                now = int(f.read().split()[0]) * resource.getpagesize()
        except OSError:                                 # not Linux
            yield
            return
        old = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, old)

    def test_every_truncation(self):
        """Every byte of headers and tables, every 16th of the weights behind them. All are refused."""
        with self.little_memory():
            for what, source, path, _ in self.files():
                whole = get(path)
                self.assertEqual(self.attempt(source, what), 0, what)
                for n in sorted(set(range(min(len(whole), 1300))) | set(range(1300, len(whole), 16)),
                                reverse=True):
                    os.truncate(path, n)
                    self.assertEqual(self.attempt(source, (what, n)), 1, (what, n))
                put(path, whole)

    def test_single_byte_changes(self):
        r, tried, refused = random.Random(1), 0, 0
        with self.little_memory():
            for what, source, path, times in self.files():
                whole = get(path)
                for _ in range(times):
                    at = r.randrange(min(len(whole), 1500))
                    byte = r.choice([0, 1, 0x7f, 0x80, 0xff, whole[at] ^ 1 << r.randrange(8),
                                     r.randrange(256),
                                     *b'"[{}]:,0-9.e\\'])
                    with open(path, "r+b") as f:
                        f.seek(at)
                        f.write(bytes([byte]))
                        f.flush()
                        tried += 1
                        refused += self.attempt(source, (what, at, byte))
                        f.seek(at)
                        f.write(whole[at:at + 1])
        self.assertGreater(tried, 4000)
        self.assertGreater(refused, tried // 4)         # changes do reach what is checked
        self.assertLess(refused, tried)


class Output(Export):
    def test_the_source_is_never_overwritten(self):
        folder = hf_folder("hf")
        before = get(os.path.join(folder, "model.safetensors"))
        for out in (os.path.join(folder, "model.safetensors"), os.path.join(folder, "link"), folder):
            if out.endswith("link"):
                os.symlink("model.safetensors", out)
            status, _, err = main(folder, "-o", out)
            self.assertEqual(status, 1)
            self.assertIn("-o", err)
        self.assertEqual(get(os.path.join(folder, "model.safetensors")), before)
        path = put(os.path.join(fresh_folder("export", "c"), "m.bin"), llama2c(0)[0])
        self.assertEqual(main(path, "-o", path)[0], 1)
        self.assertEqual(get(path), llama2c(0)[0])

    def test_default_name(self):
        folder = hf_folder("hf")
        here = os.getcwd()
        os.chdir(self.folder)
        try:
            self.assertEqual(main(folder)[0], 0)
        finally:
            os.chdir(here)
        self.assertEqual(os.listdir(self.folder), ["hf.bin"])

    def test_an_old_file_stays_until_the_new_one_is_whole(self):
        folder = hf_folder("hf")
        put(self.out, b"old")
        crc = e.zlib.crc32
        for trouble, word in ((KeyboardInterrupt(), "interrupted"),
                              (OSError(28, "No space left on device"), "No space")):
            def fail(data, start=0):
                raise trouble
            e.zlib = type("z", (), {"crc32": staticmethod(fail), "error": zlib.error})
            try:
                status, _, err = main(folder, "-o", self.out)
            finally:
                e.zlib = zlib
            self.assertEqual((status, get(self.out), os.listdir(self.folder)), (1, b"old", ["m.bin"]))
            self.assertIn(word, err)
        self.assertIs(e.zlib.crc32, crc)
        self.assertEqual(main(folder, "-o", self.out)[0], 0)
        self.sound(self.out)

    def test_full_disk(self):
        folder = hf_folder("hf")

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        p = subprocess.run([sys.executable, "-B", os.path.join(ROOT, "export.py"), folder, "-o", self.out],
                           preexec_fn=limit,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(p.returncode, 1)
        self.assertRegex(p.stderr.decode(), r"\Aexport\.py: .*\n\Z")
        self.assertEqual(os.listdir(self.folder), [])

    def test_unwritable(self):
        folder = hf_folder("hf")
        status, _, err = main(folder, "-o", os.path.join(self.folder, "no", "m.bin"))
        self.assertEqual(status, 1)
        self.assertIn("%s: no such folder" % os.path.join(self.folder, "no"), err)
        put(os.path.join(self.folder, "file"), b"")
        self.assertEqual(main(folder, "-o", os.path.join(self.folder, "file", "m.bin"))[0], 1)
        self.assertEqual(os.listdir(self.folder), ["file"])

    def test_usage(self):
        for arguments, status in (([], 2), (["a", "b"], 2), (["--bogus", "a"], 2), (["a", "-o"], 2),
                                  (["-h"], 0), (["--version"], 0)):
            self.assertEqual(main(*arguments)[0], status, arguments)


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on this machine. files: name -> bytes; plan: name -> list of troubles, one a request."""
    files, plan, log, redirect, commit, linked = {}, {}, [], None, "c" * 40, {}

    def do_GET(self):
        cls = type(self)
        cls.log.append((self.path, dict(self.headers.items())))
        parts = self.path.split("/")
        name = parts[-1]
        trouble = cls.plan.get(name, []).pop(0) if cls.plan.get(name) else None
        if trouble in (401, 403, 500, 503, 418):
            return self.answer(trouble, b"no")
        data = cls.files.get(name)
        if parts[1:3] != ["org", "tiny"] and parts[1] != "cdn" or data is None:
            return self.answer(404, b"none")
        mark = cls.linked.get(name, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
        if cls.redirect and parts[1] != "cdn" and name.endswith(".safetensors"):
            self.send_response(302)
            self.send_header("Location", cls.redirect + "/cdn/" + name)
            self.send_header("X-Linked-Etag", '"%s"' % hashlib.sha256(data).hexdigest())
            self.send_header("X-Linked-Size", str(len(data) + (trouble == "size")))
            self.send_header("X-Repo-Commit", cls.commit)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start, status = 0, 200
        if self.headers.get("Range") and trouble != "no ranges":
            start = int(self.headers["Range"][len("bytes="):-1])
            status = 206 if start < len(data) else 416
        body = data[start:] if trouble != "damage" else bytes(len(data) - start)
        self.send_response(status)
        if status == 206:
            first = start + (trouble == "other part")
            self.send_header("Content-Range", "bytes %d-%d/%d" % (first, len(data) - 1, len(data)))
        if parts[1] != "cdn":
            self.send_header("X-Repo-Commit", cls.commit)
        self.send_header("ETag", '"%s"' % mark)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if trouble == "cut" else body)
        self.close_connection = True

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Download(Export):
    def setUp(self):
        super().setUp()
        folder = hf_folder("hub", config(), weights(), tokenizer_json(), {"eos_token_id": 3})
        self.files = {n: get(os.path.join(folder, n)) for n in os.listdir(folder)}
        Hub.files, Hub.plan, Hub.log, Hub.redirect, Hub.linked = dict(self.files), {}, [], None, {}
        self.servers, self.cache = [], fresh_folder("export", "cache")
        self.address = self.serve()
        self.saved = {k: os.environ.pop(k, None) for k in ("HF_ENDPOINT", "HF_TOKEN", "http_proxy",
                                                           "HTTP_PROXY")}
        os.environ["HF_ENDPOINT"] = self.address + "/"
        e.HUB_PAUSE, self.pause = 0, e.HUB_PAUSE

    def serve(self):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.servers.append(server)
        return "http://127.0.0.1:%d" % server.server_address[1]

    def tearDown(self):
        e.HUB_PAUSE = self.pause
        for key, value in self.saved.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fetch(self, name="org/tiny"):
        m = self.good(name, "--cache", self.cache)
        os.remove(self.out)
        return m

    def kept(self):
        return sorted(n for _, _, names in os.walk(self.cache) for n in names)

    def requests(self, name):
        return [(p, h) for p, h in Hub.log if p.endswith("/" + name)]

    def test_download(self):
        m = self.fetch()
        self.same(m, weights(True))
        self.assertEqual(m.metadata["source"], "org/tiny@" + "c" * 40)
        self.assertEqual(m.metadata["name"], "tiny")
        self.assertEqual(m.metadata["token.eos"], "2 3")
        self.assertIn("tokenizer.bytes", m.tensors)
        self.assertEqual(self.kept(), sorted(self.files))
        paths = [p for p, _ in Hub.log]
        self.assertEqual(paths[0], "/org/tiny/resolve/main/config.json")
        self.assertEqual({p.split("/")[4] for p in paths[1:]}, {"c" * 40})      # one commit for all files
        del Hub.log[:]
        self.fetch()                                    # everything is there
        self.assertEqual(self.requests("model.safetensors"), [])

    def test_revision(self):
        self.fetch("org/tiny@refs/pr/1")
        self.assertEqual(Hub.log[0][0], "/org/tiny/resolve/refs%2Fpr%2F1/config.json")
        Hub.commit = ""
        try:
            self.fetch("org/tiny@..")
        finally:
            Hub.commit = "c" * 40
        self.assertEqual(sorted(os.listdir(self.cache)), ["org--tiny"])
        self.assertEqual(len(os.listdir(os.path.join(self.cache, "org--tiny"))), 2)

    def test_shards(self):
        w = sorted(stored(weights()).items())
        del Hub.files["model.safetensors"]
        names = ["model-0000%d-of-00002.safetensors" % i for i in (1, 2)]
        for i, name in enumerate(names):
            path = common.scratch("export", "shard")
            write_safetensors(path, {}, dict(w[i::2]))
            Hub.files[name] = get(path)
        index = {"weight_map": {n: names[i % 2] for i, (n, _) in enumerate(w)}}
        Hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
        self.same(self.fetch(), weights(True))
        index["weight_map"]["x"] = "../../evil.safetensors"
        Hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
        Hub.commit = "d" * 40
        try:
            self.refused("no name of a file", "org/tiny", "--cache", self.cache)
        finally:
            Hub.commit = "c" * 40
        self.assertEqual([p for p, _ in Hub.log if "evil" in p], [])

    def test_resume(self):
        Hub.plan = {"model.safetensors": ["cut", "cut", 503]}
        self.same(self.fetch(), weights(True))
        size = len(self.files["model.safetensors"])
        ranges = [h.get("Range") for _, h in self.requests("model.safetensors")]
        half = size // 2
        self.assertEqual(ranges, [None, "bytes=%d-" % half] + ["bytes=%d-" % (half + (size - half) // 2)] * 2)

    def test_resume_in_the_next_call(self):
        Hub.plan = {"model.safetensors": ["cut"] + [500] * 3}
        self.refused(["cannot be reached", "kept", "HF_ENDPOINT"], "org/tiny", "--cache", self.cache)
        self.assertIn("model.safetensors.part", self.kept())
        del Hub.log[:]
        self.same(self.fetch(), weights(True))
        self.assertEqual(self.requests("model.safetensors")[0][1]["Range"],
                         "bytes=%d-" % (len(self.files["model.safetensors"]) // 2))
        self.assertEqual(self.kept(), sorted(self.files))

    def test_a_hub_without_ranges_begins_again(self):
        Hub.plan = {"model.safetensors": ["cut", "no ranges"]}
        self.same(self.fetch(), weights(True))

    def test_a_part_that_is_too_long_begins_again(self):
        folder = os.path.join(self.cache, "org--tiny", "at-" + "c" * 40)
        os.makedirs(folder)
        put(os.path.join(folder, "model.safetensors.part"), bytes(1 << 20))
        self.same(self.fetch(), weights(True))

    def test_damage(self):
        Hub.plan = {"model.safetensors": ["damage"]}
        self.refused("damaged on the way", "org/tiny", "--cache", self.cache)
        self.assertNotIn("model.safetensors", self.kept())
        self.assertNotIn("model.safetensors.part", self.kept())
        Hub.plan = {"model.safetensors": ["cut", "other part"]}
        self.refused("another part", "org/tiny", "--cache", self.cache)

    def test_large_files(self):
        """As the hub serves them: redirected elsewhere, with size and sha256; the token does not go there."""
        Hub.redirect = self.serve()
        os.environ["HF_TOKEN"] = "secret"
        Hub.plan = {"model.safetensors": [None, "cut"]}     # the redirection, then what it leads to
        self.same(self.fetch(), weights(True))
        there = [h for p, h in Hub.log if p.startswith("/cdn/")]
        here = [h for p, h in Hub.log if not p.startswith("/cdn/")]
        self.assertEqual([h.get("Authorization") for h in there], [None, None])
        self.assertEqual({h.get("Authorization") for h in here}, {"Bearer secret"})
        self.assertIn("Range", there[1])
        shutil.rmtree(self.cache)
        Hub.plan = {"model.safetensors": ["size"]}
        self.refused(["the hub says", "bytes"], "org/tiny", "--cache", self.cache)
        Hub.plan = {"model.safetensors": [None, "damage"]}
        shutil.rmtree(self.cache)
        self.refused("damaged on the way", "org/tiny", "--cache", self.cache)

    def test_refusals(self):
        self.refused(["no such file", "no such model"], "org/other", "--cache", self.cache)
        Hub.plan = {"config.json": [401]}
        self.refused(["HF_TOKEN", "401"], "org/tiny", "--cache", self.cache)
        Hub.plan = {"config.json": [418]}
        self.refused("418", "org/tiny", "--cache", self.cache)
        del Hub.files["model.safetensors"]
        self.refused("no model.safetensors", "org/tiny", "--cache", self.cache)
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.refused("cannot be reached", "org/tiny", "--cache", self.cache)
        os.environ["HF_ENDPOINT"] = "file:///etc"
        self.refused("HF_ENDPOINT", "org/tiny", "--cache", self.cache)
        self.refused("no such file or folder", "org/tiny/too/deep")

    def test_a_cache_that_cannot_be_written(self):
        self.refused("cannot be written", "org/tiny", "--cache", put(os.path.join(self.cache, "file"), b""))


if __name__ == "__main__":
    unittest.main()
