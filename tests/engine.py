"""What test_same, test_bad_input and test_cli share: models, and builds of engine.c, made when wanted."""
import functools
import hashlib
import json
import os
import re
import shlex
import struct
import subprocess
import unittest

from common import BUILD, CC, FIXTURES, ROOT, STORIES, Safetensors, build, compiler, export, ok, run, scratch
from common import write_safetensors

OTHER = ["gcc" if "clang" in os.path.basename(CC[0]) else "clang"]
WRAP = ["-DCOUNT_ALLOCATIONS", "-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=mmap"]
SANITIZE = ["-O0", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow",
            "-fno-sanitize-recover=all", "-DCOPY_FILES", "-Wl,--wrap=mmap,--wrap=munmap"]

# Deliberate mistakes in a copy of run.c: what it is, a text that stands there exactly once, what becomes of
# it. The environment variable MUTANT chooses one: 1 + the place in this list, M below.
MISTAKES = [
    ("float sums in another order",
     "s[k % 16] = fma_(float_weight(w, at + (size_t)k), x->x[(size_t)(r0 + r) * x->stride + (size_t)k], "
     "s[k % 16]);",
     "{ int j = mutant == M ? k % 8 : k % 16; s[j] = fma_(float_weight(w, at + (size_t)k), "
     "x->x[(size_t)(r0 + r) * x->stride + (size_t)k], s[j]); }"),
    ("vector sums without the tree", "t[i] = (q[0] + q[2]) + (q[1] + q[3]);",
     "t[i] = mutant == M ? (q[0] + q[1]) + (q[2] + q[3]) : (q[0] + q[2]) + (q[1] + q[3]);"),
    ("groups of columns in descending order",
     "for (int group = 0; group < 2 * (int)blocks(w->cols); group++) {",
     "for (int j = 0; j < 2 * (int)blocks(w->cols); j++) {"
     " int group = mutant == M ? 2 * (int)blocks(w->cols) - 1 - j : j;"),
    ("rounding that depends on the batch", "inverse = 127.0f / amax,",
     "inverse = (mutant == M && in->n > 1 ? 126.0f : 127.0f) / amax,"),
    ("blocks of positions in descending order if there are many rows",
     "for (int block = low / BLOCK; block <= high / BLOCK; block++) {",
     "for (int j = low / BLOCK; j <= high / BLOCK; j++) {"
     " int block = mutant == M && end - first > 1 ? high / BLOCK + low / BLOCK - j : j;"),
    ("rewinds that trust overwritten slots", "if (window && position > 0 &&",
     "if (mutant != M && window && position > 0 &&"),
    ("products that depend on the threads", "out[i] = a->add ? out[i] + from[i] : from[i];",
     "out[i] = (a->add ? out[i] + from[i] : from[i])"
     " * (mutant == M && p->team->active == 3 ? 1.000001f : 1);"),
    ("draws that prefer the best", "if (sum > unit * kept &&",
     "if (sum > (mutant == M ? unit * unit : unit) * kept &&"),
    ("memory for every token", "int stop = find_stop(o, &ready);",
     "if (mutant == M) o->held = realloc(o->held, o->room);\n    int stop = find_stop(o, &ready);"),
    ("trusted users", "add_span(r, m->text, m->length, c->trusted && m->role == USER);",
     "add_span(r, m->text, m->length, mutant == M);"),
    ("proposals that stand although another token was drawn", "if (!s->ahead || s->tokens[s->length] != g->id)",
     "if (mutant == M && s->ahead && g->id % 2) { s->tokens[s->length] = g->id; }\n"
     "        if (!s->ahead || s->tokens[s->length] != g->id)"),
    ("lossy acceptance", "return g->failed = -1;",
     "return g->failed = -1;\n"
     "        g->id = mutant == M && s->ahead && g->id % 8 == 3 ? s->tokens[s->length] : g->id;"),
    ("rows behind the end of what was drawn", "return s->ahead = 0;",
     "{ s->length += mutant == M && s->ahead > 1; return s->ahead = 0; }"),
    ("lookup that remembers what is gone", "if (s->drafting && s->drafting->text.n > position)",
     "if (mutant != M && s->drafting && s->drafting->text.n > position)"),
    ("a second model that does not see a rewind", "if (s->drafting && s->drafting->agreed > position)",
     "if (mutant != M && s->drafting && s->drafting->agreed > position)"),
    ("matches other than the longest", "if (state_length(l, q) == state_length(l, p) + 1) {",
     "if (mutant == M || state_length(l, q) == state_length(l, p) + 1) {"),
    ("a temperature that multiplies", "sharpness = 1.0f / how->temperature;",
     "sharpness = mutant == M ? how->temperature : 1.0f / how->temperature;"),
]


def run_c():
    with open(os.path.join(ROOT, "run.c")) as f:
        return f.read()


def mistake(word):
    """The number of the mistake whose description contains the word."""
    found = [i for i, m in enumerate(MISTAKES) if word in m[0]]
    assert len(found) == 1, word
    times = run_c().count(MISTAKES[found[0]][1])
    if times != 1:
        raise AssertionError("the mistake \"%s\" changes what stands %d times, not once, in run.c:\n%s" % (
            MISTAKES[found[0]][0], times, MISTAKES[found[0]][1]))
    return str(found[0] + 1)


def mistaken_source():
    """A copy of run.c that can make any of the mistakes."""
    text = run_c()
    text = text.replace("#ifndef RUN_KERNELS", "extern int mutant;\n#ifndef RUN_KERNELS", 1)
    for number, (_, there, instead) in enumerate(MISTAKES, 1):
        if text.count(there) == 1:      # else mistake() says so
            text = text.replace(there, re.sub(r"\bM\b", str(number), instead))
    folder = os.path.join(BUILD, "mistakes-" + hashlib.sha256(text.encode()).hexdigest()[:10])
    os.makedirs(folder, exist_ok=True)
    new, path = scratch("mistakes.c"), os.path.join(folder, "run.c")
    with open(new, "w") as f:
        f.write(text)
    os.replace(new, path)               # whole at any time, for a process that compiles it
    return path


def has_openmp(cc):
    """As the Makefile asks."""
    text = b"#include <omp.h>\nint main(void){return omp_get_num_threads()-1;}"
    p = subprocess.run(cc + ["-fopenmp", "-x", "c", "-", "-o", "/dev/null"],
                       input=text, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return p.returncode == 0


FLAGS = {
    "plain": ["-O1"] + WRAP,
    "mistakes": ["-O0"] + WRAP,
    "other": ["-O2"] + WRAP,
    "other plain": ["-O0"],
    "sanitized": SANITIZE,
    "threads": ["-O0", "-fsanitize=thread"],
}


@functools.lru_cache(None)
def program(kind="plain"):
    """The path of engine.c compiled in one of these ways:

    plain        POSIX threads, as with OPENMP=0     other        another compiler, OpenMP if it has it
    mistakes     the copy that can be wrong          other plain  another compiler, POSIX threads, unoptimised
    sanitized    AddressSanitizer, UBSan             threads      ThreadSanitizer
    The program under test itself is what make built: optimised, with OpenMP if there is one."""
    wanted = OTHER if kind.startswith("other") else CC
    cc = compiler(wanted)
    if not cc or not compiler():
        raise unittest.SkipTest("no %s" % shlex.join(wanted))
    if kind == "sanitized":
        cc = compiler(["clang"]) or cc          # compiles this three times as fast
    flags = FLAGS[kind] + ["-Wno-psabi"]
    flags += ["-fopenmp"] if kind == "other" and has_openmp(cc) else ["-pthread"]
    if kind == "mistakes":
        flags.append('-DENGINE="%s"' % mistaken_source())
    return build("engine-" + kind.replace(" ", "-"), "tests/engine.c", flags, cc)


def engine(args, kind="plain", **kw):
    """Runs engine and returns its CompletedProcess."""
    return run(args, program=program(kind), **kw)


def works(args, kind="plain", **kw):
    """The same for what must succeed: standard output."""
    return ok(args, program=program(kind), **kw)


def isas():
    """The instruction sets of this machine as the program under test names them."""
    return json.loads(ok([STORIES, "-m", "info", "--json"]).decode())["isas"]


def small_model(name):
    """One of the fixtures, exported."""
    out = scratch("small", name + ".bin")
    if not os.path.exists(out):
        export([os.path.join(FIXTURES, "models", name), "-o", out])
    return out


def quantized(path, kind):
    out = scratch("small", "%s-%s.bin" % (os.path.basename(path)[:-4], kind))
    if not os.path.exists(out):
        ok([path, "-m", "quantize", "--type", kind, "-o", out])
    return out


def changed(path, name, metadata=(), tensors=()):
    """A copy of a model file with other metadata (None removes) and tensors, without checksums and pads."""
    file = Safetensors(path)
    meta = {k: v for k, v in file.metadata.items() if not k.startswith("crc32.")}
    parts = {k: v for k, v in file.tensors.items() if not k.startswith("pad.")}
    for old, new in ((meta, metadata), (parts, tensors)):
        old.update(new)
        for key in [k for k, v in old.items() if v is None]:
            del old[key]
    out = scratch("changed", name + ".bin")
    # F32 first, bytes last: everything lies aligned
    write_safetensors(out, meta, dict(sorted(parts.items(), key=lambda t: -len(t[1][0]))))
    return out


CHATML = {"chat.user.before": "<|im_start|>user\n", "chat.user.after": "<|im_end|>\n",
          "chat.assistant.before": "<|im_start|>assistant\n", "chat.assistant.after": "<|im_end|>\n",
          "chat.generate": "<|im_start|>assistant\n", "chat.system.place": "start",
          "chat.system.before": "<|im_start|>system\n", "chat.system.after": "<|im_end|>\n"}


def chat_model():
    """stories260K with a chat format and two control tokens in place of its last two; no BOS is added."""
    file = Safetensors(STORIES)
    n = int(file.metadata["vocab_size"])
    texts = token_texts(file)
    texts[n - 2:] = [b"<|im_start|>", b"<|im_end|>"]
    types = bytearray(file.tensors["tokenizer.types"][2])
    types[n - 2:] = b"\3\3"
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    added = [i for _, i in sorted((texts[i], i) for i in range(n) if types[i] & 15 in (3, 4) and texts[i])]
    tensors = {"tokenizer.bytes": ("U8", (offsets[-1],), b"".join(texts)),
               "tokenizer.offsets": ("I32", (n + 1,), struct.pack("<%di" % (n + 1), *offsets)),
               "tokenizer.types": ("U8", (n,), bytes(types)),
               "tokenizer.added": ("I32", (len(added),), struct.pack("<%di" % len(added), *added))}
    meta = dict(CHATML, **{"token.eos": str(n - 1), "token.add_bos": "0", "name": "tiny chat"})
    return changed(STORIES, "chat", meta, tensors)


def token_texts(file):
    """The bytes of every token of an opened model file."""
    data, at = file.tensors["tokenizer.bytes"][2], file.tensors["tokenizer.offsets"][2]
    at = struct.unpack("<%di" % (len(at) // 4), at)
    return [data[a:b] for a, b in zip(at, at[1:])]


def conversation(messages):
    """As `engine render` takes it."""
    out = struct.pack("<i", len(messages))
    for m in messages:
        text = m["content"].encode() if isinstance(m["content"], str) else m["content"]
        out += struct.pack("<ii", ["system", "user", "assistant"].index(m["role"]), len(text)) + text
    return out


def rendered(model, conversations, kind="plain", **kw):
    """[(text, ids)] of conversations."""
    data = works(["render", model], kind, stdin=b"".join(map(conversation, conversations)), **kw)
    out, at = [], 0
    while at < len(data):
        n = struct.unpack_from("<i", data, at)[0]
        text = data[at + 4:at + 4 + n]
        at += 4 + n
        n = struct.unpack_from("<i", data, at)[0]
        out.append((text, list(struct.unpack_from("<%di" % n, data, at + 4))))
        at += 4 + 4 * n
    return out
