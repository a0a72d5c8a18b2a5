"""Bad files and bad arguments: a sentence and an exit status, never a crash, nothing half written.

engine.c, built with AddressSanitizer and UBSan, opens thousands of damaged copies of a small model file in
one process; what still opens is used: tokenised, evaluated, generated with, asked for a chat, quantised.
"""
import concurrent.futures
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import unittest

from common import STORIES, Safetensors, export, f32, fresh_folder, ok, run, scratch, write_safetensors
from engine import chat_model, engine, program, works

LIMIT = 20 * 1024
FLIPS = 3000
DIM, HIDDEN, HEADS, KV, SIZE = 16, 24, 2, 1, 8
TEMPLATE = ("{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content|trim }}<|im_end|>\n{% endfor %}"
            "<|im_start|>assistant\n")


def tokenizer_json():
    """Byte-level BPE with splits, merges, added and control tokens, in few tokens."""
    letters = list("abcdehiklmnorstuwxy0123456789.,!?<|>_'\u0120\u010a\u00c3\u00a9\u00ff")
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u0120", "a"), ("a", "n"), ("1", "2")]
    vocab = {t: i for i, t in enumerate(letters + [a + b for a, b in merges])}
    added = [("<s>", True, {}), ("<|im_start|>", True, {}), ("<|im_end|>", True, {"rstrip": True}),
             ("a b", False, {}), ("\u00e9", False, {"lstrip": True})]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [dict(dict(plain, id=len(vocab) + i, content=text, special=special), **more)
             for i, (text, special, more) in enumerate(added)]
    split = {"type": "Split", "pattern": {"Regex": "'s|[^\\r\\n0-9a-z]?[a-z]+|[0-9]{1,3}| ?[^\\sa-z0-9]+|"
                                          "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated",
             "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
            "decoder": dict(level, add_prefix_space=True, use_regex=True),
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                      "merges": [list(m) for m in merges]}}


def numbers(n, dice):
    return f32([dice.gauss(0, 0.3) for _ in range(n)])


def make_model(name):
    """A model file of everything: bf16 and float32 matrices, biases, tokenizer, chat; through export.py."""
    folder, dice = fresh_folder("bad", name), random.Random(4)
    tokenizer = tokenizer_json()
    vocab = max(t["id"] for t in tokenizer["added_tokens"]) + 2         # one row of padding
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": DIM,
              "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS,
              "num_key_value_heads": KV, "vocab_size": vocab, "max_position_embeddings": 48,
              "rms_norm_eps": 1e-6, "rope_theta": 1000.0, "hidden_act": "silu", "tie_word_embeddings": True,
              "use_sliding_window": False, "sliding_window": None, "eos_token_id": vocab - 4,
              "bos_token_id": vocab - 6}
    shapes = {"self_attn.q_proj": (HEADS * SIZE, DIM), "self_attn.k_proj": (KV * SIZE, DIM),
              "self_attn.v_proj": (KV * SIZE, DIM), "self_attn.o_proj": (DIM, HEADS * SIZE),
              "mlp.gate_proj": (HIDDEN, DIM), "mlp.up_proj": (HIDDEN, DIM), "mlp.down_proj": (DIM, HIDDEN)}
    tensors = {"model.embed_tokens.weight": ("F32", (vocab, DIM), numbers(vocab * DIM, dice)),
               "model.norm.weight": ("F32", (DIM,), f32([1.0] * DIM))}
    for part, (rows, columns) in shapes.items():
        data = numbers(rows * columns, dice)
        if part.startswith("mlp"):
            data = b"".join(data[i + 2:i + 4] for i in range(0, len(data), 4))
        tensors["model.layers.0.%s.weight" % part] = ("BF16" if part.startswith("mlp") else "F32",
                                                      (rows, columns), data)
        if part[10:] in ("q_proj", "k_proj", "v_proj"):
            tensors["model.layers.0.%s.bias" % part] = ("F32", (rows,), numbers(rows, dice))
    for part in ("input_layernorm", "post_attention_layernorm"):
        tensors["model.layers.0.%s.weight" % part] = ("F32", (DIM,), f32([1.0] * DIM))
    write_safetensors(os.path.join(folder, "model.safetensors"), {"format": "pt"}, tensors)
    special = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    for file, value in (("config.json", config), ("tokenizer.json", tokenizer),
                        ("tokenizer_config.json", special)):
        with open(os.path.join(folder, file), "w") as f:
            json.dump(value, f)
    out = scratch("bad", name + ".bin")
    export([folder, "-o", out])
    return out


class Parts:
    """A model file in pieces that can be put together wrongly: header and data are free to disagree."""

    def __init__(self, path):
        with open(path, "rb") as f:
            self.whole = f.read()
        length = struct.unpack_from("<Q", self.whole)[0]
        self.header = json.loads(self.whole[8:8 + length].decode())
        self.data = self.whole[8 + length:]
        self.meta = self.header["__metadata__"]

    def bytes(self, text=None, length=None):
        text = json.dumps(self.header, ensure_ascii=False) if text is None else text
        text = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        text += b" " * (-(8 + len(text)) % 64)
        return struct.pack("<Q", len(text) if length is None else length) + text + self.data

    def resized(self, name, data):
        """Gives a tensor other data, at the end; its old bytes become another tensor."""
        begin, end = self.header[name]["data_offsets"]
        self.header["old." + name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        pad = -len(self.data) % 64
        if pad:
            self.header["pad.x"] = {"dtype": "U8", "shape": [pad],
                                    "data_offsets": [len(self.data), len(self.data) + pad]}
            self.data += bytes(pad)
        self.header[name]["data_offsets"] = [len(self.data), len(self.data) + len(data)]
        self.data += data


# Metadata key = value > word of the sentence; nothing behind > where it may well work.
METADATA = """
run.c=2>version                run.c=>version                      n_kv_heads=3>n_kv_heads
n_kv_heads=0>n_kv_heads        head_dim=0>head_dim                 head_dim=1025>head_dim
head_dim=1024>tensor           head_dim=7>rope|tensor              rope.dims=7>pairs
rope.dims=10>rope.dims         rope.dims=-2>rope.dims              rope.dims=0>
rope.dims=2>                   rope.base=0>rope.base               rope.base=inf>rope.base
rope.base=nan>rope.base        rope.base=1e12>                     rope.base=1e-3>
rope.pairing=both>rope.pairing rope.attention_factor=0>attention_factor
activation=relu>activation     norm.eps=-1>norm.eps                norm.eps=0>
attention.scale=1e6>           attention.scale=1e7>attention.scale attention.soft_cap=1e-30>
attention.soft_cap=-1>soft_cap logit.soft_cap=1e-38>               logit.scale=0>
logit.scale=-1e6>              embedding.scale=1e6>                embedding.scale=0>
window=-1>window               window=1>                           window=2147483647>
window=2147483648>window       window.layers=1>window.layers       window.layers=-1>window.layers
window.layers=0_0_0>window.layers                                  window.layers=x>window.layers
window.layers=>                window.layers=0>                    window.layers=_0>window.layers
window.layers=99999999999999999999999999999999>window.layers      token.bos=999999>token.bos
token.bos=-2>token.bos         token.bos=-1>                       token.eos=-1>token.eos
token.eos=1_1_1_1_1_1_1_1_1_1_1_1_1_1_1_1_1>token.eos             token.eos=16777216>token.eos
token.add_bos=2>add_bos        tokenizer.merge=fast>tokenizer      tokenizer.symbols=words>tokenizer
tokenizer.unknown=9999>tokenizer                                   tokenizer.unknown=x>tokenizer
tokenizer.fuse_unknown=yes>tokenizer                               chat.system.place=nowhere>
chat.trim=system_system_user_turn_assistant_x>                     chat.think.end=x>
chat.think.trim=space>         chat.system.default=>               context_length=67108864>
packed.token_embd.weight=q4_60_16>token_embd                       packed.token_embd.weight=>token_embd
ggml.token_embd.weight=Q4_0_60_16>token_embd                       packed.blk.0.attn_norm.weight=q8_1_16>
dim=1048576>tensor|head|share  hidden_dim=4194304>tensor           n_layers=4096>tensor
vocab_size=16777216>tensor     n_heads=4096>tensor|head|share
"""
# Packings of blk.0.ffn_gate.weight: TYPE ROWS COLUMNS = bytes that it has > word
PACKINGS = """
q4_24_16=1152>           q4a_24_16=1280>          q6_24_16=1664>           q8_24_16=2176>
q4_24_16=1151>ffn_gate   q4a_24_16=1279>ffn_gate  q6_24_16=1663>ffn_gate   q8_24_16=2175>ffn_gate
q4_24_17=1152>ffn_gate   q4_17_16=1152>ffn_gate
q4_24=1152>ffn_gate      q4_24_16_1=1152>ffn_gate q4_-24_16=1152>ffn_gate  q4_24_-16=1152>ffn_gate
q4_0_0=1152>ffn_gate     q4_0_16=0>ffn_gate       q9_24_16=1152>ffn_gate
q4_999999999_999999999=1152>ffn_gate
Q4_0_24_32=432>ffn_gate  Q4_0_24_16=432>ffn_gate  Q4_K_1_256=144>ffn_gate  Q9_9_24_32=432>ffn_gate
IQ4_XS_1_256=136>ffn_gate                         Q6_K_1_256=210>ffn_gate  F32_24_16=1536>ffn_gate
LLAMA2C_Q8:16_24_16=480>ffn_gate                  LLAMA2C_Q8:0_24_16=480>ffn_gate
LLAMA2C_Q8:-16_24_16=480>ffn_gate                 LLAMA2C_Q8_24_16=480>ffn_gate
LLAMA2C_Q8:7_24_16=480>ffn_gate                   Q4_0_999999999_999999999=432>ffn_gate
"""


def table(text):
    """(left, right, word or None)"""
    for each in text.split():
        left, right = each.split("=", 1)
        right, word = right.rsplit(">", 1)
        yield left, right, word or None


class Attacks(list):
    """(name, bytes of a file, a word of the sentence or None where it may well work)."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        parts = Parts(base)
        self.text = json.dumps(parts.header)
        self.add("as it is", None)
        self.lengths(len(parts.whole))
        self.headers()
        self.descriptions(parts)
        self.metadata()
        self.missing(parts)
        self.weights(parts)
        self.tokenizer(parts)
        self.packings()

    def add(self, name, word, change=None, **kw):
        p = Parts(self.base)
        if change:
            change(p)
        self.append((name, p.bytes(**kw), word))

    def lengths(self, size):
        for length in (0, 1, 2 ** 63, 2 ** 64 - 1, 10 ** 8 + 1, size, size - 7):
            self.add("length %d" % length, "header|cut short|aligned", length=length)
        parts = Parts(self.base)
        start = len(parts.bytes()) - len(parts.data)
        self.append(("header cut by a byte", parts.bytes()[:start - 1],
                     "has %d bytes, but its header alone should have %d" % (start - 1, start)))
        self.add("data missing", "cut short|belong", lambda p: setattr(p, "data", p.data[:-64]))
        self.add("data too long", "belong to no tensor", lambda p: setattr(p, "data", p.data + bytes(64)))

    def headers(self):
        text = self.text
        for name, word, header in (
                ("nothing", "header", ""), ("only a brace", "header", "{"),
                ("empty", "belong to no tensor", "{}"), ("a list", "header", "[" + text + "]"),
                ("cut", "damaged|description", text[:len(text) // 2]),
                ("something behind", "behind", text + "x"),
                ("two objects", "behind", text + text), ("trailing comma", "damaged", text[:-1] + ",}"),
                ("deep", "not dtype", text[:-1] + ',"a":' + '{"a":' * 50000 + "1" + "}" * 50000 + "}"),
                ("deep shape", "not dtype", text[:-1] + ',"a":{"shape":' + "[" * 50000 + "]" * 50000 + "}}"),
                ("metadata twice", "twice", text[:-1] + ', "__metadata__": {}}'),
                ("single quotes", "damaged", text.replace('"', "'"))):
            self.add(name, word, text=header)
        for name, word, old, new in (
                ("deep metadata", "strings", '"__metadata__": {', '"__metadata__": {"a":' + "[" * 9999),
                ("metadata null", "object", '"__metadata__": {', '"__metadata__": null, "x": {'),
                ("key twice", "twice", '"dim":', '"dim": "16", "dim":'),
                ("no comma", "damaged", "}, ", "} "),
                ("a number in the metadata", "strings", '"dim": "16"', '"dim": 16'),
                ("bad escape", "strings", '"dim"', '"d\\qm"'),
                ("cut escape", "strings", '"dim": "16"', '"dim": "16\\u00"'),
                ("lone surrogate", "strings", '"dim": "16"', '"dim": "\\ud800"'),
                ("other surrogate", "strings", '"dim": "16"', '"dim": "\\udc00"'),
                ("two high surrogates", "strings", '"dim": "16"', '"dim": "\\ud800\\ud800"'),
                ("an escaped NUL", "strings", '"dim": "16"', '"dim": "16\\u0000"'),
                ("raw control", "strings", '"dim": "16"', '"dim": "16\n"'),
                ("escapes that are fine", None, '"dim": "16"', '"\\u0064im": "\\u0031\\u0036"'),
                ("pairs that are fine", None, '"dim"', '"\\ud83d\\ude00\\/\\b\\f": "x", "dim"'),
                ("long metadata", None, '"dim"', '"%s": "%s", "dim"' % ("k" * 5000, "v" * 70000)),
                ("a missing shape", "incomplete", '"shape": [16], ', ""),
                ("another field", "not dtype", '"shape": [16], ', '"shape": [16], "more": [1], ')):
            assert old in text, name
            self.add(name, word, text=text.replace(old, new, 1))
        strange = text.encode().replace(b'"dim"', b'"\xff\xfe\xc0": "\x80\xed\xa0\x80", "dim"', 1)
        self.add("not UTF-8", None, text=strange)
        for name, word, tensor, dtype, shape in (
                ("control characters", "F99", "\\u001b[2J\\n", "F99", "[]"),
                ("a long name", "9000 bytes", "n" * 9000, "F99", "[]"), ("no name", None, "", "U8", "[0]"),
                ("quotes in a name", None, 'a\\"b\\\\.weight', "F32", "[0, 0]"),
                ("a long name of weights", None, "n" * 3000 + ".weight", "U8", "[0]"),
                ("no columns", None, "x.weight", "F32", "[3, 0]"),
                ("no rows", None, "x.weight", "F32", "[0, 3]"),
                ("many rows of nothing", None, "x.weight", "F16", "[2147483647, 0]")):
            self.add(name, word, text=text[:-1] +
                     ', "%s": {"dtype": "%s", "shape": %s, "data_offsets": [0, 0]}}' % (tensor, dtype, shape))

    def descriptions(self, parts):
        """Of one vector, in every wrong way."""
        name, text = "blk.0.attn_norm.weight", self.text
        same = json.dumps(parts.header[name])
        begin, end = parts.header[name]["data_offsets"]
        self.add("name twice", "two tensors|overlap", text=text[:-1] + ', "%s": %s}' % (name, same))
        self.add("a gap", "gap", lambda p: p.header.pop("blk.0.ffn_norm.weight"))

        def change(word, **fields):
            self.add("tensor %s" % fields, word, lambda p: p.header[name].update(fields))
        for shape in ([16, 1], [1], [17], [0], [], [16, 16], [2 ** 40, 2 ** 40], [2 ** 61],
                      [2 ** 32, 2 ** 32], [1] * 5, [4, 4, 1, 1], [2 ** 62]):
            change("attn_norm", shape=shape)
        for offsets in ([end, begin], [begin + 4, end + 4], [begin - 4, end - 4], [0, 2 ** 62], [begin],
                        [2 ** 62, 2 ** 62 + 64], [begin, end, end], [], [begin + 1, end + 1],
                        [len(parts.data), len(parts.data) + 64]):
            change("attn_norm|overlap|gap", data_offsets=offsets)
        for dtype in ("F64", "F16", "U8", "f32", "", "F32 ", "Q4", "F32" * 100, "I32"):
            change("attn_norm", dtype=dtype)
        for shape in ("[-16]", "[16.0]", "[1e1]", "[016]", '["16"]', "[16", "[,]", "[16,]", "16", "null",
                      "[99999999999999999999]"):
            other = same.replace("[16]", shape, 1)
            self.add("shape %s" % shape, "attn_norm|damaged",
                     text=text.replace('"%s": %s' % (name, same), '"%s": %s' % (name, other), 1))

        def unaligned(p):
            p.resized(name, b"\0" * 13)
            p.data += f32([1.0] * DIM)
            p.header[name].update(dtype="U8", shape=[13])
            p.header["late"] = {"dtype": "F32", "shape": [DIM],
                                "data_offsets": [len(p.data) - 4 * DIM, len(p.data)]}
        self.add("unaligned", "aligned", unaligned)

    def metadata(self):
        for key in ("dim", "hidden_dim", "n_layers", "n_heads", "vocab_size", "context_length"):
            self.add("no %s" % key, key, lambda p, key=key: p.meta.pop(key))
            for value in ("0", "-1", "", " 16", "16 ", "1e3", "0x10", "16.5", "nan", "99999999999999999999",
                          "2147483648", "\u0661"):
                self.add("%s is %r" % (key, value), key, lambda p, k=key, v=value: p.meta.update({k: v}))
        for key, value, word in table(METADATA):
            value = value.replace("_", " ") if key[:5] != "ggml." else "Q4_0 60 16"
            self.add("%s is %r" % (key, value), word, lambda p, k=key, v=value: p.meta.update({k: v}))

    def missing(self, parts):
        for gone in parts.header:
            if not gone.startswith(("pad.", "__")):
                word = gone if "bias" not in gone and "tokenizer" not in gone else None

                def rename(p, gone=gone):
                    p.header["x." + gone] = p.header.pop(gone)
                self.add("without %s" % gone, word, rename)

    def weights(self, parts):
        names = [k for k in parts.header if k.endswith((".weight", ".bias"))]
        for value in (float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, -0.0):
            for name in names if value != value else names[::3]:
                n = 1
                for d in parts.header[name]["shape"]:
                    n *= d
                data = f32([value] * n)
                if parts.header[name]["dtype"] == "BF16":
                    data = b"".join(data[i + 2:i + 4] for i in range(0, len(data), 4))
                self.add("%s is full of %g" % (name, value), None, lambda p, t=name, d=data: p.resized(t, d))
        for value in (float("nan"), float("inf"), -1.0, 3e38, 1e-45, 1e9):
            def frequencies(p, data=f32([value] * 4)):
                p.header["rope.freqs"] = {"dtype": "F32", "shape": [4],
                                          "data_offsets": [len(p.data), len(p.data) + 16]}
                p.data += data
            self.add("rope.freqs are %g" % value, None, frequencies)

    def tokenizer(self, parts):
        def put(at, data):
            return lambda p: setattr(p, "data", p.data[:at] + data + p.data[at + len(data):])
        for name in [k for k in parts.header if k.startswith("tokenizer.")]:
            t = parts.header[name]
            begin, end = t["data_offsets"]
            for value in (-1, 0, 1, int(parts.meta["vocab_size"]), 2 ** 31 - 1, -2 ** 31, 255):
                word = struct.pack("<i", value)
                for at in sorted({0, 4, (end - begin) // 8 * 4, (end - begin) // 4 * 4 - 4}):
                    if t["dtype"] == "I32":
                        self.add("%s[%d] is %d" % (name, at // 4, value), None, put(begin + at, word))
                self.add("%s is all %d" % (name, value), None,
                         put(begin, (word * (end - begin))[:end - begin]))

            def empty(p, name=name):
                p.resized(name, b"")
                p.header[name]["shape"][0] = 0
            self.add("%s is empty" % name, None, empty)

    def packings(self):
        name = "blk.0.ffn_gate.weight"
        for what, size, word in table(PACKINGS):
            what = re.sub("_(?=-?[0-9]+(_|$))", " ", what).replace("Q4 0 ", "Q4_0 ").replace("Q9 9 ", "Q9_9 ")

            def change(p, what=what, size=int(size)):
                p.resized(name, (bytes(range(256)) * 10)[:size])
                p.header[name].update(dtype="U8", shape=[size])
                p.meta[("packed." if what[0] == "q" else "ggml.") + name] = what
            self.add("%s in %s bytes" % (what, size), word, change)


class Damaged(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.model = make_model("model")

    def sanitized(self, args, **kw):
        p = engine(args, "sanitized", env={"ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1",
                                           "UBSAN_OPTIONS": "print_stacktrace=1"}, **kw)
        self.assertEqual(p.returncode, 0, "%s\n%s" % (args, p.stderr[-6000:].decode("utf-8", "replace")))
        return p

    def many(self, jobs):
        """Runs them two at a time; returns the sums of what they report."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            reports = list(pool.map(lambda args: self.sanitized(args).stdout.split(), jobs))
        return sum(int(r[0]) for r in reports), sum(int(r[2]) for r in reports)

    def test_the_file_is_small_and_works(self):
        self.assertLessEqual(os.path.getsize(self.model), LIMIT)
        p = self.sanitized(["files"], stdin=self.model + "\n")
        self.assertEqual(p.stdout, b"\n")
        file = Safetensors(self.model)
        for name in ("tokenizer.merges", "tokenizer.program", "tokenizer.sets", "tokenizer.added"):
            self.assertIn(name, file.tensors)
        self.assertIn("chat.user.before", file.metadata)

    def test_every_truncation(self):
        """None of them opens: the file is whole or it is refused."""
        size = os.path.getsize(self.model)
        fine, refused = self.many([["bad", self.model, scratch("bad", "cut%d.work" % a), a, b, 0]
                                   for a, b in ((size, size // 2), (size // 2, 0))])
        self.assertEqual((fine, refused), (0, size))

    def test_single_byte_changes(self):
        half = FLIPS // 2
        fine, refused = self.many([["bad", self.model, scratch("bad", "flip%d.work" % a), a, a + half, 17]
                                   for a in (0, half)])
        self.assertEqual(fine + refused, FLIPS)
        self.assertGreater(fine, FLIPS // 5)        # weights may be anything
        self.assertGreater(refused, FLIPS // 5)

    def test_attacks(self):
        folder, paths, cases = fresh_folder("bad", "attacks"), [], Attacks(self.model)
        for i, (name, data, word) in enumerate(cases):
            paths.append(os.path.join(folder, "%03d" % i))
            with open(paths[-1], "wb") as f:
                f.write(data)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            lists = ["".join(path + "\n" for path in paths[k::2]) for k in (0, 1)]
            parts = list(pool.map(lambda names: self.sanitized(["files"], stdin=names), lists))
        said = [None] * len(cases)
        for k, part in enumerate(parts):
            lines = part.stdout.decode("utf-8", "replace").split("\n")[:-1]
            self.assertEqual(len(lines), len(paths[k::2]))
            said[k::2] = lines
        opened = 0
        for (name, _, word), path, line in zip(cases, paths, said):
            with self.subTest(name):
                line = line.replace(path, "")
                opened += not line
                if word:
                    self.assertTrue(any(w in line for w in word.split("|")), "%s: said \"%s\"" % (name, line))
        self.assertGreater(opened, 30)
        print("     %d files, %d of them work" % (len(cases), opened))

    def test_on_the_command_line(self):
        """A sample, with the program itself: a sentence that begins with run: and status 1."""
        dice, path = random.Random(3), scratch("bad", "cli.bin")
        for name, data, word in dice.sample([a for a in Attacks(self.model) if a[2]], 25):
            with open(path, "wb") as f:
                f.write(data)
            for mode in (["-i", "a"], ["-m", "info"], ["-m", "tokenize", "-i", "a"]):
                p = run([path] + mode)
                self.assertEqual(p.returncode, 1, (name, mode))
                self.assertTrue(p.stderr.startswith(b"run: "), (name, p.stderr))
                self.assertEqual(p.stderr.count(b"\n"), 1, p.stderr)


class Places(unittest.TestCase):
    """What is no model file at all, and where nothing can be written."""

    def refused(self, args, *words, **kw):
        p = run(args, **kw)
        self.assertEqual(p.returncode, 1, (args, p.stderr))
        text = p.stderr.decode()
        self.assertTrue(text.startswith("run: ") and text.endswith("\n") and text.count("\n") == 1, text)
        for word in words:
            self.assertIn(word, text, args)
        self.assertEqual(p.stdout, b"")

    def test_no_model_file(self):
        folder = fresh_folder("bad", "none")
        files = {"empty": b"", "text": b"hello\n" * 100, "short": b"abc", "gguf": b"GGUF\3\0\0\0" +
                 bytes(100), "zeros": bytes(100), "json": b"{}", "other.safetensors": b"\2\0\0\0\0\0\0\0{}"}
        words = {"gguf": "export.py", "text": "not a model file", "empty": "empty",
                 "other.safetensors": "export.py"}
        for mode in ([], ["-m", "info"], ["-m", "generate", "-i", "x"],
                     ["-m", "quantize", "-o", os.path.join(folder, "out")]):
            for name, data in files.items():
                with open(os.path.join(folder, name), "wb") as f:
                    f.write(data)
                word = "run.c" if name == "other.safetensors" and "-o" in mode else words.get(name, name)
                if name != "other.safetensors" or mode != ["-m", "info"]:   # that one can be explained
                    self.refused([os.path.join(folder, name)] + mode, word, name)
            self.refused([os.path.join(folder, "missing")] + mode, "missing", "No such file")
            self.refused([folder] + mode, folder, "not a file")
        self.assertEqual(sorted(os.listdir(folder)), sorted(files))
        self.refused([os.path.join(folder, "text", "x")], "Not a directory")
        self.refused(["x" * 300], "File name too long")
        self.refused([""], "No such file")
        fifo = os.path.join(folder, "fifo")
        os.mkfifo(fifo)
        writer = os.open(fifo, os.O_RDWR)
        try:
            self.refused([fifo], "not a file")
        finally:
            os.close(writer)

    def test_no_prompt_file(self):
        self.refused([STORIES, "-s", "1", "-f", "/no/such/file"], "/no/such/file")
        self.refused([STORIES, "-s", "1", "-f", "/tmp"], "/tmp")
        self.refused([STORIES, "-m", "perplexity", "-f", "/no/such/file"], "/no/such/file")
        self.refused([STORIES, "-m", "tokenize", "-f", "/no/such/file"], "/no/such/file")

    def quantize(self, out, *words, **kw):
        self.refused([STORIES, "-m", "quantize", "--type", "q8", "-o", out], *words, **kw)

    def test_full_disk(self):
        """A limit on the size of files is as a full disk, at every stage of writing."""
        folder = fresh_folder("bad", "full")
        out = os.path.join(folder, "out.bin")
        ok([STORIES, "-m", "quantize", "--type", "q8", "-o", out])
        size = os.path.getsize(out)
        with open(out, "rb") as f:
            before = f.read()

        def limit(n):
            def set_limit():
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
            return set_limit
        # LLVM's OpenMP makes a file of 1024 bytes when it starts: no less than that.
        for n in (1024, 4096, 5000, size // 2, size - 4096, size - 1):
            self.quantize(out, "File too large", limits=limit(n))
            self.assertEqual(os.listdir(folder), ["out.bin"], n)
            with open(out, "rb") as f:
                self.assertTrue(f.read() == before, n)
        self.assertEqual(run([STORIES, "-m", "quantize", "--type", "q8", "-o", out],
                             limits=limit(size)).returncode, 0)
        if os.path.exists("/dev/full"):
            self.quantize("/dev/full/x", "Not a directory")

    def test_unwritable_places(self):
        folder = fresh_folder("bad", "places")
        self.quantize(os.path.join(folder, "no", "such", "folder.bin"), "No such file")
        os.mkdir(os.path.join(folder, "taken"))
        self.quantize(os.path.join(folder, "taken"), "taken")
        self.quantize(os.path.join(folder, "x" * 300), "File name too long")
        self.quantize("", "")
        self.assertEqual(os.listdir(folder), ["taken"])
        copy = os.path.join(folder, "copy.bin")
        shutil.copy(STORIES, copy)
        os.symlink("copy.bin", os.path.join(folder, "link.bin"))
        for name in ("copy.bin", "link.bin", "./copy.bin"):
            self.refused([copy, "-m", "quantize", "-o", os.path.join(folder, name)], "being read")
        with open(copy, "rb") as f, open(STORIES, "rb") as g:
            self.assertTrue(f.read() == g.read())
        if os.getuid():                 # root may write everywhere
            os.chmod(folder, 0o500)
            self.quantize(os.path.join(folder, "new.bin"), "denied")
            os.chmod(folder, 0o700)


class Arguments(unittest.TestCase):
    """Wrong usage: a sentence, exit status 2, nothing on standard output."""

    def wrong(self, *args, word=None):
        p = run(list(args))
        text = p.stderr.decode("utf-8", "replace")
        self.assertEqual(p.returncode, 2, (args, text))
        self.assertTrue(text.startswith("run: ") and text.endswith("\n") and text.count("\n") == 1,
                        (args, text))
        self.assertEqual(p.stdout, b"", args)
        self.assertIn(word or args[1], text)

    def test_values(self):
        integers = ["", " ", "x", "1x", "1.5", "1e3", "-1", " 1", "1 ", "0x10", "99999999999999999999", "+1",
                    "--", "\u0661"]
        for name in ("-n", "-k", "-c", "-j", "-s", "--draft-max", "--logprobs"):
            for value in integers:
                self.wrong(STORIES, name, value)
        for name in ("-c", "-j"):
            self.wrong(STORIES, name, "0")
        for name, values in (("-t", ["1001"]), ("-p", ["1.01"]), ("--min-p", ["2"]),
                             ("--repeat-penalty", ["0", "101"])):
            for value in values + ["", "x", "1x", "-1", "nan", "inf", "-inf", "0x1p3", " 1", "1 ", "1,5",
                                   "1e999", "--", "1..2", "."]:
                self.wrong(STORIES, name, value)
        for name in ("-m", "--type", "--kv", "--draft"):
            for value in ("", "x", "Generate", "q5", "f64", "AUTO", "generate ", "-m"):
                self.wrong(STORIES, name, value)
        self.wrong(STORIES, "--stop", "")

    def test_options(self):
        for name in ("-x", "--nonsense", "--", "-ii", "-n5", "-t=1", "--temperature", "--json=1", "---"):
            self.wrong(STORIES, name, word="option")
        for name in ("-m", "-i", "-f", "-y", "-o", "-n", "-t", "-p", "-k", "--min-p", "--repeat-penalty",
                     "-s", "-c", "-j", "--kv", "--draft", "--draft-max", "--logprobs", "--type", "--stop"):
            self.wrong(STORIES, name)
            self.wrong(name, word=name)

    def test_what_does_not_go_together(self):
        self.wrong(word="model")
        self.wrong("-i", "text", word="model")
        self.wrong(STORIES, STORIES, word="two model files")
        self.wrong(STORIES, "-i", "a", "-f", "b", word="-f")
        self.wrong(STORIES, "-m", "quantize", word="-o")
        self.wrong(STORIES, *["--stop", "x"] * 65, word="--stop")
        self.wrong(chat_model(), "--json", "-m", "chat", word="--json")
        fits = {"generate": ("--no-echo", "--stop"), "info": ("--verify",), "quantize": ("-o", "--type")}
        for mode in ("generate", "tokenize", "info", "bench", "perplexity", "quantize"):
            for option in (["-y", "x"], ["-o", "x"], ["--type", "q8"], ["--verify"], ["--no-echo"],
                           ["--stop", "x"], ["--logprobs", "1"]):
                if option[0] not in fits.get(mode, ()):
                    self.wrong(STORIES, "-m", mode, *option, word=option[0])

    def test_help_is_no_mistake(self):
        p = run(["-h"])
        self.assertEqual((p.returncode, p.stderr), (0, b""))
        for option in ("-m", "-i", "-f", "-y", "-n", "-t", "-p", "-k", "--min-p", "--repeat-penalty", "-s",
                       "-c", "-j", "--kv", "--draft", "--draft-max", "--stop", "--logprobs", "--special",
                       "--no-echo", "--json", "-o", "--type"):
            self.assertIn(b"\n  %s " % option.encode(), p.stdout)
        self.assertEqual(run([STORIES, "--help"]).stdout, p.stdout)


if __name__ == "__main__":
    unittest.main()
