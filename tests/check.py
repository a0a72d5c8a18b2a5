#!/usr/bin/env python3
"""make check DATA=folder: comparisons that need models, reference data or packages which are not in the repository.

DATA: tokenizers/ (vocabularies and vectors), smollm2/ (reference outputs), text/. Each check says what it misses; one whose
needs are not there is skipped. With aarch64-linux-gnu-gcc and qemu-aarch64, the program is also run as an AArch64 one.
"""
import importlib.util
import os
import shutil
import subprocess
import sys

from common import BUILD, MODELS, ROOT, STORIES, ok

HERE = os.path.dirname(os.path.abspath(__file__))
SMOLLM2 = os.path.join(MODELS, "smollm2-135m-instruct.bin")


def fingerprint(model, program=None, env=None):
    return ok([model, "-m", "info"], program=program, env=env).decode().split()[-1]


def check_aarch64():
    """The same fingerprints on AArch64, under emulation, for every instruction set."""
    if not shutil.which("aarch64-linux-gnu-gcc") or not shutil.which("qemu-aarch64"):
        return None
    program = os.path.join(BUILD, "run-aarch64")
    os.makedirs(BUILD, exist_ok=True)
    ok(["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-pthread",
        os.path.join(ROOT, "run.c"), "-o", program, "-lm"], program=["aarch64-linux-gnu-gcc"])
    emulated = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", program]
    packed, again = (os.path.join(BUILD, "check-%s.bin" % where) for where in ("here", "aarch64"))
    words = [STORIES, "-m", "quantize", "--bits", "5", "-i", "Once upon a time there was a dog. " * 50, "-o"]
    ok(words + [packed])
    ok(words + [again], program=emulated)
    with open(packed, "rb") as f, open(again, "rb") as g:
        if f.read() != g.read():
            print("FAIL aarch64: packs another file")
            return False
    for model in (STORIES, packed, SMOLLM2):
        for isa in ("neon", "dotprod", "scalar") if os.path.exists(model) else ():
            if isa == "scalar" and model == SMOLLM2:
                continue        # plain C under emulation takes minutes
            if fingerprint(model, emulated, {"RUN_ISA": isa}) != fingerprint(model):
                print("FAIL aarch64 %s: another fingerprint for %s" % (isa, os.path.basename(model)))
                return False
            print("ok   aarch64 %s: the fingerprint of x86-64 for %s" % (isa, os.path.basename(model)))
    return True


def script(name, *needs):
    """Runs a check that is a program of its own, if the packages it needs are there."""
    missing = [n for n in needs if not (importlib.util.find_spec(n) if not os.sep in n else os.path.exists(n))]
    if missing:
        print("skipped %s: needs %s" % (name, ", ".join(missing)))
        return None
    return subprocess.call([sys.executable, os.path.join(HERE, name), DATA]) == 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or not os.path.isdir(sys.argv[1]):
        sys.exit("usage: make check DATA=folder (with tokenizers/, smollm2/ and text/ in it)")
    DATA = os.path.abspath(sys.argv[1])
    results = [check_aarch64(), script("check_tokenizer.py"), script("check_smollm2.py", "numpy", SMOLLM2)]
    print("%d passed, %d failed, %d skipped" % (results.count(True), results.count(False), results.count(None)))
    sys.exit(False in results)
