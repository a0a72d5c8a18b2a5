"""What the tests share: where things are, how to run a program, how to compile one, safetensors files.

Everything that a test writes goes below BUILD, which git ignores. Standard library alone, Python 3.8+.
"""
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIXTURES = os.path.join(ROOT, "tests", "fixtures")
BUILD = os.path.join(ROOT, "build")
SCRATCH = os.path.join(BUILD, "test")          # tests/test.py gives each of its processes another
MODELS = os.path.join(ROOT, "models")
RUN = os.environ.get("RUN", os.path.join(ROOT, "run"))  # the program under test
CC = shlex.split(os.environ.get("CC", "cc"))
STORIES = os.path.join(MODELS, "stories260K.bin")
TIMEOUT = 600


def run(args, stdin=None, env=None, program=None, timeout=TIMEOUT, cwd=ROOT, limits=None):
    """Runs `program` (./run) and returns its CompletedProcess: returncode, stdout, stderr (bytes).

    stdin: bytes or str; without it the standard input is empty. env: variables to set beside the usual ones,
    None as a value removes one. limits: a function to call in the child, for resource.setrlimit."""
    variables = dict(os.environ)
    for key, value in (env or {}).items():
        variables.pop(key, None)
        if value is not None:
            variables[key] = str(value)
    if isinstance(stdin, str):
        stdin = stdin.encode()
    program = [program or RUN] if not isinstance(program, list) else program
    if not shutil.which(program[0]):
        raise AssertionError("there is no %s; `make` builds it" % program[0])
    return subprocess.run(program + [a if isinstance(a, bytes) else str(a) for a in args],
                          input=stdin if stdin is not None else b"", stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=variables, timeout=timeout, cwd=cwd, preexec_fn=limits)


def ok(args, **kw):
    """As run(), for what must succeed; returns the bytes of its standard output."""
    p = run(args, **kw)
    if p.returncode != 0:
        program = kw.get("program") or "./run"
        raise AssertionError("%s %s: exit status %d\n%s" % (
            program if isinstance(program, str) else " ".join(program), " ".join(map(str, args)),
            p.returncode, p.stderr.decode("utf-8", "replace")))
    return p.stdout


def export(args, **kw):
    """python3 export.py ARGS, which must succeed."""
    return ok([os.path.join(ROOT, "export.py")] + list(args), program=[sys.executable], **kw)


def scratch(*names):
    """A path in a folder of this process; its own folder exists afterwards."""
    path = os.path.join(SCRATCH, *names)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def fresh_folder(*names):
    """An empty folder in there."""
    path = scratch(*names)
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    return path


def compiler(cc=None):
    """The command of the compiler as a list, or None where there is none."""
    cc = shlex.split(cc) if isinstance(cc, str) else (cc or CC)
    return cc if shutil.which(cc[0]) else None


def build(name, sources, flags=(), cc=None):
    """Compiles a C program of the tests to build/NAME-HASH (command) and returns its path.

    Compiled again only when a source, or any .c or .h file at the top or in tests/, is newer. flags: put
    after the defaults, so that they win. A missing compiler skips the test, an error of it fails the test."""
    cc = compiler(cc)
    if cc is None:
        raise unittest.SkipTest("no C compiler")
    sources = [os.path.join(ROOT, s) for s in ([sources] if isinstance(sources, str) else sources)]
    command = cc + ["-std=c11", "-O2", "-g", "-ffp-contract=off", "-I" + ROOT]
    command += list(flags) + sources + ["-lm", "-lpthread"]
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:10]
    out = os.path.join(BUILD, "%s-%s" % (name, key))
    os.makedirs(os.path.dirname(out), exist_ok=True)
    watched = list(sources)
    for folder in (ROOT, os.path.join(ROOT, "tests")):
        watched += [os.path.join(folder, f) for f in os.listdir(folder) if f.endswith((".c", ".h"))]
    with open(out + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # another process may be at it
        if os.path.exists(out) and os.path.getmtime(out) >= max(map(os.path.getmtime, watched)):
            return out
        temporary = "%s.tmp-%d" % (out, os.getpid())
        p = subprocess.run(command + ["-o", temporary], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           cwd=ROOT)
        if p.returncode != 0:
            raise AssertionError("%s\n%s" % (" ".join(command), p.stdout.decode("utf-8", "replace")))
        os.replace(temporary, out)
    return out


class Safetensors:
    """A safetensors file read plainly: .metadata, .tensors {name: (dtype, shape, bytes)}."""

    def __init__(self, path):
        with open(path, "rb") as f:
            data = f.read()
        length = struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8:8 + length].decode())
        self.metadata = header.pop("__metadata__", {})
        self.tensors = {}
        for name, t in header.items():
            begin, end = t["data_offsets"]
            self.tensors[name] = (t["dtype"], t["shape"], data[8 + length + begin:8 + length + end])

    @staticmethod
    def metadata_of(path):
        """The metadata alone, of a file however large."""
        with open(path, "rb") as f:
            length = struct.unpack("<Q", f.read(8))[0]
            return json.loads(f.read(length).decode()).get("__metadata__", {})

    def floats(self, name):
        """The values of an F32, F16 or BF16 tensor as a flat list."""
        dtype, _, data = self.tensors[name]
        if dtype == "BF16":
            data = b"".join(b"\0\0" + data[i:i + 2] for i in range(0, len(data), 2))
        code, size = {"F32": ("f", 4), "BF16": ("f", 4), "F16": ("e", 2)}[dtype]
        return list(struct.unpack("<%d%s" % (len(data) // size, code), data))


def write_safetensors(path, metadata, tensors):
    """The plainest writer there is: {name: (dtype, shape, bytes)}; only the header is padded, to 8 bytes."""
    tensors = dict(sorted(tensors.items(), key=lambda t: t[1][0] == "U8"))  # so that floats lie aligned
    header, at = {"__metadata__": {k: str(v) for k, v in metadata.items()}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            f.write(data)


def f32(values):
    """Bytes of a list of numbers as float32."""
    return struct.pack("<%df" % len(values), *values)
