"""The tokenizers that cannot be shipped, and the packages: python3 tests/check_tokenizer.py DATAFOLDER

DATAFOLDER has tokenizers/ (llama2.model, llama3.json, qwen3.json, gpt-2.gguf, deepseek-llm.gguf,
llama-spm.gguf, vectors/) and smollm2/tokens.tsv; what is missing is left out. llama.cpp's vectors need
nothing else; where the packages tokenizers, sentencepiece and tiktoken can be imported, texts of all sorts
are compared with them too.
"""
import json
import os
import random
import struct
import sys

import common
import test_tokenizer as base

X = base.exporter()
FAILED = []


def gguf_pairs(path):
    """The metadata of a GGUF file."""
    with open(path, "rb") as file:
        data = file.read()
    at = 24

    def value(kind):
        nonlocal at
        if kind == 8:
            size, = struct.unpack_from("<Q", data, at)
            at += 8 + size
            return data[at - size:at].decode("utf-8", "surrogateescape")
        if kind == 9:
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            return [value(inner) for _ in range(count)]
        form = "BbHhIif?  QqD"[kind].replace("D", "d")
        found, = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return found

    pairs = {}
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        key = value(8)
        kind, = struct.unpack_from("<I", data, at)
        at += 4
        pairs[key] = value(kind)
    return pairs


def opened(name, exported):
    rows = len(exported["tensors"]["tokenizer.types"][2])
    path = common.scratch(name + ".tokenizer")
    base.write_pack(path, exported, rows)
    return base.Driver(PROGRAM, path)


def report(what, bad, total, example=None):
    found = "%d WRONG" % bad if bad else "all"
    print("%-60s %s of %d%s" % (what, found, total, ": %r" % (example,) if bad else ""), flush=True)
    if bad:
        FAILED.append(what)


def compare(what, texts, ours, theirs):
    wrong = [(t, a, b) for t, a, b in zip(texts, ours, theirs) if list(a) != list(b)]
    report(what, len(wrong), len(texts), wrong[0] if wrong else None)


def check_vectors(folder, name, driver):
    with open(os.path.join(folder, name + ".inp"), encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    with open(os.path.join(folder, name + ".out")) as file:
        expected = [[int(i) for i in line.split()] for line in file]
    compare("vectors of llama.cpp: " + name, texts, [driver.encode(t) for t in texts], expected)


def many_texts(data):
    texts = [t for t in base.random_strings()] + base.single_points()[::7] + base.points_in_words()[::5]
    folder = os.path.join(data, "text")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        with open(os.path.join(folder, name), encoding="utf-8", newline="") as file:
            text = file.read()
        draw = random.Random(1)
        texts += [text[:100000]] + [text[i:i + 300] for i in (draw.randrange(len(text)) for _ in range(100))]
    return texts


def against_tokenizers(what, path, driver, texts):
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return
    reference = Tokenizer.from_file(path)
    reference.encode_special_tokens = True
    for chunk in base.chunks(texts, 20000):
        ids = [e.ids for e in reference.encode_batch(chunk, add_special_tokens=False)]
        compare("the package tokenizers: " + what, chunk, driver.batch(b"b", chunk), ids)
        decoded = [t.decode("utf-8", "replace") for t in driver.batch(b"r", chunk)]
        compare("    decoded", chunk, decoded, reference.decode_batch(ids, skip_special_tokens=False))


def against_sentencepiece(path, driver, texts):
    try:
        import sentencepiece
    except ImportError:
        return
    reference = sentencepiece.SentencePieceProcessor(model_file=path)
    compare("the package sentencepiece: llama2.model", texts, driver.batch(b"b", texts),
            reference.encode(texts))
    compare("    decoded", texts, [t.decode("utf-8", "replace") for t in driver.batch(b"r", texts)],
            reference.decode(reference.encode(texts)))


def against_tiktoken(driver, exported, texts):
    """GPT-2 by ranks of bytes, which tiktoken calls mergeable."""
    try:
        import tiktoken
    except ImportError:
        return
    offsets = struct.unpack("<%di" % 50258, exported["tensors"]["tokenizer.offsets"][2])
    data = exported["tensors"]["tokenizer.bytes"][2]
    ranks = {data[offsets[i]:offsets[i + 1]]: i for i in range(50256)}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    reference = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    compare("the package tiktoken: gpt-2", texts, driver.batch(b"b", texts),
            reference.encode_ordinary_batch(texts))


def main(data):
    folder = os.path.join(data, "tokenizers")
    vectors = os.path.join(folder, "vectors")
    texts = many_texts(data)

    def load(name):
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return json.load(file)

    for name, rows, names in (("llama3", 128256, ["llama-bpe"]), ("qwen3", 151936, ["qwen2"])):
        path = os.path.join(folder, name + ".json")
        if os.path.exists(path):
            driver = opened(name, X.tokenizer_from_json(load(name + ".json"), rows,
                                                        load(name + "_config.json")))
            for vector in names:
                check_vectors(vectors, vector, driver)
            against_tokenizers(name, path, driver, texts)
    for name, vector in (("gpt-2", "gpt-2"), ("deepseek-llm", "deepseek-llm"), ("llama-spm", "llama-spm")):
        path = os.path.join(folder, name + ".gguf")
        if os.path.exists(path):
            pairs = gguf_pairs(path)
            exported = X.tokenizer_from_gguf(pairs, len(pairs["tokenizer.ggml.tokens"]))
            driver = opened(name, exported)
            check_vectors(vectors, vector, driver)
            if name == "gpt-2":
                against_tiktoken(driver, exported, [t for t in texts if len(t) < 1000])
    path = os.path.join(folder, "llama2.model")
    if os.path.exists(path):
        with open(path, "rb") as file:
            driver = opened("llama2", X.tokenizer_from_spm(file.read(), 32000))
        check_vectors(vectors, "llama-spm", driver)
        check_vectors(vectors, "phi-3", driver)
        against_sentencepiece(path, driver, [t for t in texts if "\0" not in t])
    path = os.path.join(data, "smollm2", "tokens.tsv")
    if os.path.exists(path):
        loaded, config = base.tokenizer_json("smollm2")
        driver = opened("smollm2", X.tokenizer_from_json(loaded, 49152, config))
        with open(path) as file:
            rows = [line.rstrip("\n").split("\t") for line in file if not line.startswith("#")]
        for column, trusted in ((1, 0), (2, 1)):
            compare("smollm2/tokens.tsv, column %d" % column, [r[0] for r in rows],
                    [driver.encode((bytes.fromhex(r[0]), trusted)) for r in rows],
                    [[int(i) for i in r[column].split()] for r in rows])
    print("%d comparisons failed" % len(FAILED))
    return 1 if FAILED else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    PROGRAM = base.build_driver("tokenizer_driver", ["-O2"])
    sys.exit(main(sys.argv[1]))
