"""tokenizer.c and the tokenizer section of export.py, against the reference on three vocabularies.

The fixtures are made by fixtures/make_tokenizers.py. tests/check_tokenizer.py does the same with
vocabularies that cannot be shipped.
"""
import hashlib
import json
import lzma
import os
import struct
import subprocess
import sys
import unittest

import common

sys.path.insert(0, common.ROOT)
FOLDER = os.path.join(common.FIXTURES, "tokenizers")
DRIVER = os.path.join(common.ROOT, "tests", "tokenizer_driver.c")
NAMES = ("gpt2", "qwen3", "smollm2")
ROWS = {"gpt2": 50257, "qwen3": 151936, "smollm2": 49152}  # of the models' embeddings
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


# ---- The texts of digests.json -----------------------------------------------------------------------------

def code_points():
    return (c for c in range(0x110000) if not 0xd800 <= c < 0xe000)


def single_points():
    """Every code point as a text of its own."""
    return [chr(c) for c in code_points()]


def points_in_words():
    """Every code point in company: after and before letters, digits, spaces, punctuation. Beyond the last
    assigned blocks every 64th."""
    return ["a%sb 1%s %s!%s'%s\n%s" % ((chr(c),) * 6) for c in code_points()
            if c < 0x32400 or 0xe0000 <= c < 0xe0200 or c % 64 == 63]


COMMON = [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "'\u017f", "a", "B", "the", "\u00e9", "e\u0301",
          "\u4e2d", "\u3042", "\uac00", "\u1112\u1161\u11ab", "\u0661", "\u00bd", "!", "...", "\u200b",
          "\u00a0", "\u3000", "\U0001f600", "\0", "<|im_start|>", "<|endoftext|>", "<|end", "\u0301",
          "\u0327", "\u0344", "\u212a", "\u01c5", "\u1e9b\u0323", "\x1c", "\x85", "\u2167", "_", "0", "123",
          "\ufffd"]


def random_bytes():
    """10,000 strings, half of them any bytes, half made of pieces of text and code points; the same
    everywhere."""
    state, out = 1, []

    def draw(n):
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (state >> 33) % n

    for i in range(10000):
        if i % 2:
            out.append(bytes(draw(256) for _ in range(1 + draw(40))))
        else:
            parts = [COMMON[draw(len(COMMON))] if draw(3) else
                     chr(draw(0xd800) if draw(2) else 0xe000 + draw(0x102000))
                     for _ in range(1 + draw(24))]
            out.append("".join(parts).encode())
    return out


def random_strings():
    return [b.decode("utf-8", "replace") for b in random_bytes()]


TEXTS = {"points": single_points, "words": points_in_words, "strings": random_strings}


def chunks(items, size=4096):
    for i in range(0, len(items), size):
        yield items[i:i + size]


def digest_ids(lists):
    packed = [struct.pack("<I%di" % len(ids), len(ids), *ids) for ids in lists]
    return hashlib.sha256(b"".join(packed)).hexdigest()[:8]


def digest_texts(texts):
    return hashlib.sha256(b"".join(struct.pack("<I", len(t)) + t for t in texts)).hexdigest()[:8]


# ---- Tools -------------------------------------------------------------------------------------------------

def exporter():
    import export
    return export


def tokenizer_json(name):
    """The tokenizer.json and the tokenizer_config.json of a fixture."""
    with open(os.path.join(FOLDER, name + ".xz"), "rb") as file:
        raw = lzma.decompress(file.read())
    size = int.from_bytes(raw[:4], "little")
    head, n = json.loads(raw[4:4 + size].decode()), 0
    n = head["merges"]
    planes = [raw[4 + size + k * n:4 + size + (k + 1) * n] for k in range(6)]
    texts, merges = {token: text for text, token in head["base"].items()}, []
    for rank in range(n):
        left, right = (sum(planes[3 * side + k][rank] << 8 * k for k in range(3)) for side in (0, 1))
        merges.append([texts[left], texts[right]])
        texts[head["first"] + rank] = texts[left] + texts[right]
    head["tokenizer"]["model"].update(vocab={text: token for token, text in texts.items()}, merges=merges)
    return head["tokenizer"], head["config"]


def write_pack(path, exported, vocab_size):
    """A tokenizer in the driver's format."""
    items = [("vocab_size", "", str(vocab_size).encode())]
    items += [(key, "", value.encode()) for key, value in exported["meta"].items()]
    items += [(key, dtype, data) for key, (dtype, _, data) in exported["tensors"].items()]
    with open(path, "wb") as file:
        for name, dtype, data in items:
            file.write(struct.pack("<64s4sI", name.encode(), dtype.encode(), len(data)) + data)


class Driver:
    """A running tokenizer_driver."""

    def __init__(self, program, pack):
        self.process = subprocess.Popen([program, pack], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, kind, count, body):
        self.process.stdin.write(kind + struct.pack("<II", count, len(body)) + body)
        self.process.stdin.flush()

    def read(self, n):
        data = self.process.stdout.read(n)
        if len(data) != n:
            raise AssertionError("the driver stopped")
        return data

    def answer(self, width):
        count, = struct.unpack("<I", self.read(4))
        return self.read(width * count)

    def ids(self):
        data = self.answer(4)
        return list(struct.unpack("<%di" % (len(data) // 4), data))

    def encode(self, *spans):
        """spans: texts, or (text, trusted)."""
        body = b""
        for span in spans:
            text, trusted = span if isinstance(span, tuple) else (span, 0)
            text = text.encode() if isinstance(text, str) else text
            body += struct.pack("<II", trusted, len(text)) + text
        self.ask(b"e", len(spans), body)
        return self.ids()

    def batch(self, kind, texts):
        texts = [t.encode() if isinstance(t, str) else t for t in texts]
        self.ask(kind, len(texts), b"".join(struct.pack("<I", len(t)) + t for t in texts))
        return [self.ids() if kind == b"b" else self.answer(1) for _ in texts]

    def decode(self, ids):
        self.ask(b"d", len(ids), struct.pack("<%di" % len(ids), *ids))
        return self.answer(1)

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


def build_driver(name, flags):
    path = common.scratch(name)
    command = common.compiler() + ["-std=c11", "-Wall", "-Wextra", "-Werror"] + flags + ["-o", path, DRIVER]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return path if built.returncode == 0 else None


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def small_json(**changes):
    """A tokenizer.json with the 256 bytes and a few merges; `changes` replace its members."""
    alphabet = {b: c for c, b in exporter().byte_alphabet().items()}
    merges = ["h e", "l l", "he ll", "hell o", "\u0120 hello", "1 2", "\u0120 \u0120"]
    vocab = {alphabet[b]: b for b in range(256)}
    for merge in merges:
        vocab[merge.replace(" ", "")] = len(vocab)
    data = {"normalizer": None, "added_tokens": [], "decoder": BYTES,
            "pre_tokenizer": dict(BYTES, use_regex=True),
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    data.update(changes)
    return data


# Small tokenizers whose like the big ones do not show, each compared with the reference on random texts.
ADDED = [("<a>", {}), ("<a><b>", {}), ("<l>", {"lstrip": True}), ("<r>", {"rstrip": True}),
         ("<w>", {"single_word": True}), ("<n>", {"normalized": True}),
         ("<an>", {"normalized": True, "rstrip": True})]
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
SPACES_BACK = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
FALLBACK, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def added_tokens(first, tokens):
    base = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return [dict(base, id=first + i, content=text, **flags) for i, (text, flags) in enumerate(tokens)]


def chars_json(normalizer, pre_tokenizer, decoder, fallback=False, fuse=True, unknown=True, tokens=()):
    """BPE on characters, with U+2581 for spaces."""
    merges = ["\u2581 a", "a b", "\u2581 \u2581", "\u2581\u2581 \u2581\u2581", "b a", "\u2581a b", "ab ab",
              "\u2581 \u2581a"]
    vocab = {"<unk>": 0}
    for text in ["<0x%02X>" % b for b in range(256)] * fallback + list("\u2581ab1<>\n") + [
            m.replace(" ", "") for m in merges]:
        vocab[text] = len(vocab)
    return {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder,
            "added_tokens": added_tokens(len(vocab), tokens),
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": fallback,
                      "fuse_unk": fuse, "unk_token": "<unk>" if unknown else None}}


def small_cases():
    def metaspace(scheme, split):
        node = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}
        return chars_json(None, node, node, tokens=[("<s>", {"special": True}), ("<u>", {})])

    def bytes_json(*nodes, **changes):
        return small_json(pre_tokenizer={"type": "Sequence", "pretokenizers": list(nodes)}, **changes)

    plain, prefixed = BYTES, dict(BYTES, add_prefix_space=True, use_regex=True)
    llama = {"type": "Sequence", "normalizers": [PREPEND, SPACES]}
    whole = small_json(pre_tokenizer=plain)
    whole["model"] = dict(whole["model"], ignore_merges=True)
    whole["model"]["vocab"]["hey"] = 263
    return {
        "added": small_json(added_tokens=added_tokens(263, ADDED)),
        "added nfc": small_json(added_tokens=added_tokens(263, ADDED), normalizer={"type": "NFC"}),
        "llama": chars_json(llama, None, {"type": "Sequence",
                                          "decoders": [SPACES_BACK, FALLBACK, FUSE, STRIP]}, True,
                            tokens=[("<s>", {"special": True})]),
        "unknown": chars_json(SPACES, None, {"type": "Sequence", "decoders": [SPACES_BACK, FUSE]},
                              fuse=False),
        "dropped": chars_json(SPACES, None, {"type": "Sequence", "decoders": [SPACES_BACK, FUSE]},
                              unknown=False),
        "always": metaspace("always", True), "first": metaspace("first", True),
        "never": metaspace("never", False), "prefix": bytes_json(prefixed), "whole words": whole,
        "digits": bytes_json({"type": "Digits", "individual_digits": False}, plain),
        "removed": bytes_json({"type": "Split", "pattern": {"Regex": "\\s"}, "behavior": "Removed",
                               "invert": False}, plain),
        "string": bytes_json({"type": "Split", "pattern": {"String": "he"}, "behavior": "MergedWithPrevious",
                              "invert": False}, plain),
    }


SMALL_PARTS = [" ", "  ", "a", "b", "ab", "1", "12", "\n", "\t", "hello", "he", "hey", "h", "l", "<", ">",
               "<s>", "<u>", "<a>", "<b>", "<l>", "<r>", "<w>", "<n>", "<an>", "\u2581", "\u00e9", "e\u0301",
               "\u2167", "_", "\u3000", "\u0301", "\u4e2d", "\ud55c", "\u200d", "\u24b6", "\u00bd",
               "\U0001f600"]

# Patterns by behaviour: all those for GGUF files, and these.
PATTERNS = [r"a|ab", r"ab|a", r"(?:a|ab)(?:c|bcd)?", r"a{2,3}", r"a{2,}b{,2}", r"(?:ab?){2}c*",
            r"\d{1,3}+", r"a+$", r"\s+$", r"a(?=b)|b(?!c)", r"[a-c1-9&&[^b]]+",
            r"\p{^L}+", r"\P{Lu}+", r"(?i:[a-c]1|he)", r"\w+|[^\w\s]+", r"[\]\-a]+|[b\-]",
            r"\x61\x{62}?|\u0063", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r".+",
            r"\p{Lu}?\p{Ll}+|\S", r"\s{4}(?!\S)|\s{1,2}(?!\S)|\s"]
PATTERN_PARTS = SMALL_PARTS + ["c", "abc", "aaa", "K", "\u212a", "S", "\u017f", "'", "'s", "'LL", "]", "-",
                               "1234567", "\r\n", "\r", "\u00b2", "\u01c5", "AbC", "\ud55c\uad6d",
                               "\u0915\u093f", "...", "/", "\u3042", "\uff01"]


def random_texts(parts, count=400):
    state, out = 7, []
    for i in range(count):
        text = ""
        for _ in range(1 + i % 19):
            state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            text += parts[(state >> 33) % len(parts)]
        out.append(text)
    return out


def split_cases():
    """Name -> (pattern, behaviour, invert)."""
    patterns = list(PATTERNS)
    for name in ("gpt-2 default smollm llama3 qwen2 deepseek-llm deepseek-coder deepseek-v3 tekken").split():
        patterns += [p for p in exporter().gguf_patterns(name)[0] if p not in patterns]
    cases = {p: (p, "isolated", False) for p in patterns}
    for behaviour in ("removed", "merged_with_previous", "merged_with_next", "contiguous", "isolated"):
        for invert in (False, True):
            cases["%s %d" % (behaviour, invert)] = ("ab?", behaviour, invert)
    return cases


class TokenizerTest(unittest.TestCase):
    drivers = {}

    @classmethod
    def setUpClass(cls):
        cls.program = build_driver("tokenizer_driver", ["-O2"])
        if not cls.program:
            raise AssertionError("tests/tokenizer_driver.c does not compile")

    @classmethod
    def tearDownClass(cls):
        for driver in cls.drivers.values():
            driver.close()
        cls.drivers = {}

    def fixture(self, name):
        if name not in self.drivers:
            data, config = tokenizer_json(name)
            path = common.scratch(name + ".tokenizer")
            write_pack(path, exporter().tokenizer_from_json(data, ROWS[name], config), ROWS[name])
            TokenizerTest.drivers[name] = Driver(self.program, path)
        return self.drivers[name]

    def made(self, data, rows=400):
        """A driver for a tokenizer.json; closed when the test ends."""
        path = common.scratch("small.tokenizer")
        exported = exporter().tokenizer_from_json(data, rows)
        write_pack(path, exported, rows)
        driver = Driver(self.program, path)
        self.addCleanup(driver.close)
        return driver

    def pieces(self, driver, text):
        return [driver.decode([i]).decode("latin-1") for i in driver.encode(text)]

    # -- the reference

    def test_vectors(self):
        with open(os.path.join(FOLDER, "vectors.json"), encoding="utf-8") as file:
            vectors = json.load(file)
        for name in NAMES:
            for text, *expected in vectors[name]:
                for trusted, ids in enumerate(expected):
                    self.assertEqual(self.fixture(name).encode((text, trusted)), ids, (name, text, trusted))

    def check_digests(self, name, kind):
        with open(os.path.join(FOLDER, "digests.json")) as file:
            expected = json.load(file)[name]
        driver = self.fixture(name)
        texts = TEXTS[kind]()
        for chunk, ids, number in zip(chunks(texts), expected[kind].split(), range(1 << 20)):
            got = driver.batch(b"b", chunk)
            what = "%s: ids of %s %d..%d (chunk %d) are not the reference's"
            self.assertEqual(digest_ids(got), ids, what % (
                name, kind, 4096 * number, 4096 * number + len(chunk) - 1, number))
        if kind == "strings":
            for chunk, digest in zip(chunks(texts), expected[kind + " decoded"].split()):
                decoded = [t.decode("utf-8", "replace").encode() for t in driver.batch(b"r", chunk)]
                self.assertEqual(digest_texts(decoded), digest,
                                 "%s: decode(encode(x)) is not the reference's" % name)

    def test_every_code_point(self):
        for name in NAMES:
            self.check_digests(name, "points")

    def test_every_code_point_in_company(self):
        for name in NAMES:
            self.check_digests(name, "words")

    def test_random_strings(self):
        for name in NAMES:
            self.check_digests(name, "strings")

    def test_random_bytes_come_back(self):
        for chunk in chunks(random_bytes()):
            self.assertEqual(self.fixture("gpt2").batch(b"r", chunk), chunk)
            for name in ("qwen3", "smollm2"):  # one normalises, one lacks bytes: as the text that was meant
                meant = self.fixture(name).batch(b"r", [b.decode("utf-8", "replace") for b in chunk])
                got = self.fixture(name).batch(b"r", chunk)
                if name == "qwen3":
                    got = [g.decode("utf-8", "replace").encode() for g in got]
                    self.assertEqual(got, meant)

    def test_small_tokenizers(self):
        with open(os.path.join(FOLDER, "digests.json")) as file:
            expected = json.load(file)["small"]
        for name, data in small_cases().items():
            driver = self.made(data)
            ids = driver.batch(b"b", random_texts(SMALL_PARTS))
            self.assertEqual(digest_ids(ids), expected[name], "%s: the ids are not the reference's" % name)

    def test_splits(self):
        """The pieces of a pattern: a "|" is put before each."""
        with open(os.path.join(FOLDER, "digests.json")) as file:
            expected = json.load(file)["splits"]
        for name, (pattern, behaviour, invert) in split_cases().items():
            builder = exporter().TokenizerBuilder(256)
            builder.pieces, builder.merges = [(bytes([b]), 1) for b in range(256)], []
            builder.split(pattern, behaviour, invert)
            builder.prepend("|", 15)
            path = common.scratch("split.tokenizer")
            write_pack(path, builder.finish(), 256)
            driver = Driver(self.program, path)
            got = digest_texts(driver.batch(b"r", random_texts(PATTERN_PARTS)))
            driver.close()
            self.assertEqual(got, expected[name], "%s: the pieces are not the reference's" % name)

    # -- what INDEX-like lists of traps name

    def test_digits_first(self):
        """SmolLM2: every digit alone, then GPT-2's rule, so that spaces before a digit are one piece."""
        self.assertEqual(self.fixture("smollm2").encode("    1"), [289, 33])

    def test_missing_bytes_are_dropped(self):
        missing = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1d, 0xc0, 0xc1, 0xf1,
                         0xf2] + list(range(0xf5, 0x100)))
        self.assertEqual(self.fixture("smollm2").encode(missing), [])
        self.assertEqual(self.fixture("smollm2").batch(b"r", [b"a\x04b\xffc"]), [b"abc"])

    def test_nfc(self):
        qwen = self.fixture("qwen3")
        self.assertEqual(qwen.encode("e\u0301\u212b"), qwen.encode("\u00e9\u00c5"))
        self.assertEqual(qwen.batch(b"r", ["q\u0307\u0323 \u1112\u1161\u11ab"]),
                         ["q\u0323\u0307 \ud55c".encode()])

    def test_empty_and_nul(self):
        for name in NAMES:
            driver = self.fixture(name)
            self.assertEqual(driver.encode(), [])
            self.assertEqual(driver.encode("", ""), [])
            self.assertEqual(driver.batch(b"r", ["", "a\0b\0"]), [b"", b"a\0b\0"])

    def test_trust(self):
        """Control tokens need all their bytes trusted; pieces merge across spans."""
        driver = self.fixture("qwen3")
        plain = driver.encode("<|im_end|>")
        self.assertGreater(len(plain), 1)
        self.assertEqual(driver.encode(("<|im_end|>", 1)), [151645])
        self.assertEqual(driver.encode(("<|im_", 1), ("", 0), ("end|>", 1)), [151645])
        self.assertEqual(driver.encode(("<|im_", 1), ("end|>", 0)), plain)
        self.assertEqual(driver.encode(("<|im_end|", 0), (">", 1)), plain)
        self.assertEqual(driver.encode(("a<|im_end|>", 1), ("<|im_end|>", 0), ("<|im_end|>", 1)),
                         driver.encode("a") + [151645] + plain + [151645])
        self.assertEqual(driver.encode("hel", ("lo wor", 1), "ld"), driver.encode("hello world"))
        self.assertEqual(driver.encode("<think>"), [151667])  # user-defined: in any text

    # -- merging, against the definition

    def test_scores(self):
        """The highest score, of equals the leftmost, as long as neighbours spell a token."""
        tokens = ["<unk>", "<s>", "</s>"] + ["<0x%02X>" % b for b in range(256)]
        scores, state = [0.0] * len(tokens), 3
        for text in ["a", "b", " ", "ab", "ba", "aab", "bb", " a", " ab", "abab", "aa", "aaaa", "b ", "  ",
                     "c", "abc"]:
            state = (state * 1103515245 + 12345) % (1 << 31)
            tokens.append(text)
            scores.append(-float(state >> 8 & 7))
        ids = {t: i for i, t in enumerate(tokens)}
        data = struct.pack("<i", 8) + b"".join(struct.pack("<fi", s, len(t.encode())) + t.encode()
                                               for t, s in zip(tokens, scores))
        path = common.scratch("scores.tokenizer")
        write_pack(path, exporter().tokenizer_from_llama2c(data, len(tokens)), len(tokens))
        driver = Driver(self.program, path)
        self.addCleanup(driver.close)

        def reference(text):
            parts = list(" " + text) if text else []
            while True:
                best = None
                for i in range(len(parts) - 1):
                    found = ids.get(parts[i] + parts[i + 1])
                    if found is not None and (best is None or scores[found] > best[0]):
                        best = scores[found], i
                if best is None:
                    return [i for p in parts for i in ([ids[p]] if p in ids else [3 + b for b in p.encode()])]
                parts[best[1]:best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]

        for text in random_texts(["a", "b", " ", "c", "\u00e9", "ab"]):
            self.assertEqual(driver.encode(text), reference(text), text)

    def test_long_texts(self):
        """One word of megabytes: time must not grow with its square."""
        driver = self.fixture("gpt2")
        for text in ("ab" * 1500000, " " * 3000000, "\u00e9" * 1000000 + "!" * 1000000):
            ids = driver.encode(text)
            self.assertEqual(driver.decode(ids), text.encode())

    def test_streaming(self):
        """Only whole characters come out, or bytes that can no longer become part of one."""
        driver = self.fixture("gpt2")
        byte = {b: driver.encode(bytes([b]))[0] for b in range(256)}
        for data, expected in ((b"\xf0\x9f\x98\x80a", [b"", b"", b"", b"\xf0\x9f\x98\x80", b"a", b""]),
                               (b"\xe4\xb8\xe4\xb8\xad", [b"", b"", b"\xe4\xb8", b"", b"\xe4\xb8\xad", b""]),
                               (b"\xe0\x80\xff\xc3", [b"", b"\xe0\x80", b"\xff", b"", b"\xc3"])):
            driver.ask(b"s", len(data), struct.pack("<%di" % len(data), *[byte[b] for b in data]))
            self.assertEqual([driver.answer(1) for _ in range(len(data) + 1)], expected)

    # -- what is refused

    def test_refused_patterns(self):
        for pattern, word in ((r"a*", "match nothing"), (r"\bword", "escape"), (r"(?<=a)b", "group"),
                              (r"(a", "not closed"), (r"a(?=bc)", "more than one"), (r"\p{Greek}", "Greek"),
                              (r"(?:ab)++c", "possessive"),
                              (r"(?i:stra\u00dfe)", "case"), (r"(?i:ss)", "folds"),
                              (r"^a", "has a '\\^'"), (r"[z-a]", "range"), (r"(?:a*)*b", "endless"),
                              (r"[[:alpha:]]", "POSIX"), (r"a{1,9999}", "repetition"), (r"a)", "'\\)'"),
                              (r"(a)\1", "escape"), (r"a{2000}", "repetition"), (r"[a", "end"), ("\\", "end"),
                              (r"a+?", "repetition"), (r"(?i)a", "group")):
            with self.assertRaisesRegex(exporter().Refused, word, msg=pattern):
                exporter().Pattern(pattern)

    def test_refused_tokenizers(self):
        model = small_json()["model"]
        for changes, word in (({"model": dict(model, type="Unigram")}, "Unigram"),
                              ({"model": dict(model, type="WordPiece")}, "WordPiece"),
                              ({"model": dict(model, dropout=0.1)}, "dropout"),
                              ({"model": dict(model, end_of_word_suffix="</w>")}, "end_of_word_suffix"),
                              ({"model": dict(model, merges=["h zz"])}, "merge"),
                              ({"normalizer": {"type": "NFKC"}}, "NFKC"),
                              ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
                              ({"decoder": None}, "decoder"),
                              ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "UnicodeScripts"),
                              ({"decoder": {"type": "WordPiece"}}, "WordPiece"),
                              ({"model": 7}, "well formed"),
                              ({"added_tokens": added_tokens(99999, [("<x>", {})])}, "99999"),
                              ({"pre_tokenizer": {"type": "Sequence"}}, "well formed")):
            with self.assertRaisesRegex(exporter().Refused, word, msg=str(changes)[:80]):
                exporter().tokenizer_from_json(small_json(**changes), 400)
        with self.assertRaisesRegex(exporter().Refused, "fancy-bpe"):
            exporter().tokenizer_from_gguf({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "fancy-bpe",
                                            "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}, 1)

    def test_leading_space(self):
        """What the pipeline put before a text is not there when it is decoded."""
        driver = self.made(small_cases()["llama"])
        self.assertEqual(driver.batch(b"r", ["ab", " ab", "  a"]), [b"ab", b" ab", b"  a"])

    def test_refused_programs(self):
        """Steps and patterns that would lead out of bounds, one by one."""
        builder = exporter().TokenizerBuilder(256)
        builder.pieces, builder.merges = [(bytes([b]), 1) for b in range(256)], []
        builder.split("ab", "isolated")
        exported, path = builder.finish(), common.scratch("program.tokenizer")
        match, sets = [0, 0, 0], len(builder.sets)
        programs = {"good": [5, 8, 1, 0, 4, 1, 1, *match]}
        for name, code in (("behaviour", None), ("set", [1, sets, 0]), ("jump", [3, 2, 0]), ("fork", [4, 0, 2]),
                           ("fork first", [4, 2, 0]), ("negative", [3, -1, 0]), ("operation", [5, 0, 0])):
            programs[name] = [5, 8, 1, 0, *code, *match] if code else [5, 8, 5, 0, *match, *match]
        programs.update({"end": [5, 5, 1, 0, 1, 0, 0], "end ahead": [5, 5, 1, 0, 2, 0, 0], "empty": [5, 2, 1, 0],
                         "cut": [5, 6, 1, 0, *match, 0], "long": [4, 1], "half": [4], "no step": [7, 0],
                         "prepend": [1, 0], "replace": [2, 3, 3, 65, 66], "replace nothing": [2, 2, 0, 65],
                         "nfc": [3, 0], "word": [6, 1, sets], "many": [4, 0] * 65})
        for name, numbers in programs.items():
            program = "I32", [len(numbers)], struct.pack("<%di" % len(numbers), *numbers)
            write_pack(path, dict(exported, tensors=dict(exported["tensors"], **{"tokenizer.program": program})), 256)
            done = subprocess.run([self.program, path], input=b"", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual(done.returncode, int(name != "good"), name)
            self.assertEqual(b"tokenizer.program is damaged" in done.stderr, name != "good", name)

    def test_damaged_files(self):
        """Thousands of damaged tokenizers under sanitizers: a sentence or a working tokenizer, no crash."""
        program = build_driver("tokenizer_driver_sanitized", SANITIZERS)
        if not program:
            self.skipTest("this compiler has no sanitizers")
        cases = small_cases()
        for seed, name in enumerate(("added nfc", "llama", "first", "string")):
            path = common.scratch("damaged.tokenizer")
            write_pack(path, exporter().tokenizer_from_json(cases[name], 400), 400)
            done = subprocess.run([program, path, "fuzz", "1500", str(seed)], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            self.assertEqual(done.returncode, 0, done.stdout.decode("utf-8", "replace")[-3000:])
            opened, refused = [int(w) for w in done.stdout.split() if w.isdigit()]
            self.assertGreater(opened, 100)
            self.assertGreater(refused, 100)


if __name__ == "__main__":
    unittest.main()
