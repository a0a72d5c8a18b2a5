"""The same bytes: whatever the threads, the chunks, the instruction set, the compiler, the batch.

engine.c compares inside one process, to the last bit of every logit; here its hashes, texts and fingerprints
are compared across processes. Deliberate mistakes in a copy of run.c must be noticed by the same comparisons.
"""
import json
import os
import struct
import unittest

from common import FIXTURES, STORIES, f32, ok, scratch, Safetensors
from engine import changed, engine, isas, mistake, program, quantized, small_model, works
from test_pack import MATRIX, model

PROMPT = "Lily and Ben went to the park"


def odd_models():
    """Every architecture, every type: sizes that are no multiples of 8, 16, 32 or 64 in all of them."""
    odd = small_model("llama_odd")      # 33 wide, 51 hidden, heads of 10, vocabulary of 77, biases
    return ([small_model(m) for m in ("llama2", "llama3", "llama_linear", "llama_yarn", "qwen2", "qwen3")] +
            [small_model("mistral"), small_model("qwen2_window")] +     # windows of 21 and 30 positions
            [quantized(odd, kind) for kind in ("q4", "q4a", "q6", "q8", "f16", "bf16", "f32")] +
            [quantized(small_model("mistral"), "q4a"), quantized(small_model("qwen3"), "q4")])


def sayings(kind=None, env=None, threads=1, model=STORIES):
    """What the program says: greedy, with sampling, fingerprints, log-probabilities."""
    call = (lambda args: works(["run"] + args, kind, env=env)) if kind else (lambda args: ok(args, env=env))
    common = ["-j", threads, "-n", "60", "-s", "11", "-m", "generate"]
    out = [call([model, "-i", PROMPT, "-t", "0"] + common),
           call([model, "-i", PROMPT, "-t", "1", "-k", "0", "-p", "1", "--min-p", "0"] + common),
           call([model, "-i", PROMPT, "-t", "1", "--repeat-penalty", "1.2", "--kv", "f32"] + common)]
    info = json.loads(call([model, "-m", "info", "--json", "-j", threads]).decode())
    text = json.loads(call([model, "-i", PROMPT, "--json", "--logprobs", "3"] + common).decode())
    del text["stats"]
    return out + [info["fingerprint"], json.dumps(text)], info["isa"]


class Inside(unittest.TestCase):
    """In one process."""

    def check(self, args, word):
        p = engine(args)
        self.assertEqual((p.returncode, p.stderr.decode()), (0, ""), args)
        self.assertIn(word, p.stdout.decode())

    def test_threads_and_chunks(self):
        capped = os.path.join(FIXTURES, "direct", "gemma2.safetensors")     # has norms behind its branches
        for model in odd_models()[::3] + [capped, STORIES]:
            self.check(["same", model], "same with 1 to 4 threads and chunks")

    def test_rewinds_forks_generations(self):
        for name, seed in (("mistral", 1), ("mistral", 2), ("qwen2_window", 3), ("llama3", 4)):
            self.check(["rewinds", small_model(name), seed, -1], "same after rewinds")
        self.check(["rewinds", quantized(small_model("mistral"), "q4a"), 4, -1], "same after rewinds")

    def test_what_failed_leaves_no_trace(self):
        """Token 5 has an embedding that is not finite. Windows must not have lost what they still see."""
        for name in ("mistral", "qwen2_window", "llama2"):
            file = Safetensors(small_model(name))
            dtype, shape, data = file.tensors["token_embd.weight"]
            self.assertEqual(dtype, "F32")
            row = 4 * shape[1]
            data = data[:5 * row] + f32([float("inf")] * shape[1]) + data[6 * row:]
            model = changed(small_model(name), name + "-poison", {},
                            {"token_embd.weight": (dtype, shape, data)})
            for seed in (2, 5, 7, 8) if "window" in name else (5,):
                self.check(["rewinds", model, seed, 5], "same after rewinds")

    def test_rows_of_several_sessions(self):
        odd = small_model("llama_odd")
        for model in (small_model("mistral"), small_model("qwen2"), quantized(odd, "q4a"),
                      quantized(odd, "q6"), quantized(odd, "q8")):
            for seed in (1, 2):
                self.check(["rows", model, seed], "same with rows")


class Outside(unittest.TestCase):
    """Across processes and builds."""

    @classmethod
    def setUpClass(cls):
        cls.said, cls.isa = sayings()
        cls.models = odd_models()
        cls.hashes = [works(["hash", m]) for m in cls.models]

    def test_it_says_something(self):
        self.assertEqual(len(set(self.said)), 5)
        for text in self.said[:3]:
            self.assertTrue(text.decode().startswith(PROMPT))
            self.assertGreater(len(text), 150)
        self.assertEqual(len(self.said[3]), 16)
        self.assertEqual(len({h for out in self.hashes for h in out.split(b"\n")[:2]}), 2 * len(self.models))

    def test_threads(self):
        for threads in (2, 3, 4):
            self.assertEqual(sayings(threads=threads)[0], self.said)

    def test_every_instruction_set(self):
        sets = isas()
        self.assertEqual(self.isa, sets[0])
        self.assertEqual(sets[-1], "scalar")
        print("     %s" % " ".join(sets))
        for isa in sets:
            said, used = sayings(env={"RUN_ISA": isa})
            self.assertEqual(used, isa)
            self.assertEqual(said, self.said, isa)
            self.assertEqual(works(["isa"], env={"RUN_ISA": isa}).split()[0].decode(), isa)
            for model, expected in zip(self.models, self.hashes):
                self.assertEqual(works(["hash", model], env={"RUN_ISA": isa}), expected, (isa, model))

    def test_largest_sums(self):
        """All weights and activations of a group at an end of their range: no partial sum overflows."""
        half = struct.pack("<32e", *[1 / 64] * 32)
        for kind, quants, scales in (("q4", 512, half), ("q4a", 512, 2 * half), ("q6", 768, half), ("q8", 1024, half)):
            for byte in (b"\0", b"\xff", b"\x80", b"\x7f"):
                path = model(scratch("extreme", "%s-%s.bin" % (kind, byte.hex())), 64, {"token_embd.weight": (
                    "F32", (8, 64), f32([(-1) ** (i // 64) for i in range(512)]), {}), MATRIX: (
                    "U8", (quants + len(scales),), byte * quants + scales, {"packed." + MATRIX: kind + " 16 64"})}, rows=16)
                expected = works(["hash", path], env={"RUN_ISA": "scalar"})
                for isa in isas():
                    self.assertEqual(works(["hash", path], env={"RUN_ISA": isa}), expected, (isa, path))

    def test_an_unknown_instruction_set_is_refused(self):
        p = engine(["run", STORIES, "-m", "info"], env={"RUN_ISA": "avx9"})
        self.assertEqual(p.returncode, 1)
        self.assertIn(b'run: this machine has no instruction set "avx9"',
                      p.stderr.replace(STORIES.encode() + b": ", b""))

    def other_build(self, kind):
        program(kind)
        self.assertEqual(sayings(kind)[0], self.said)
        self.assertEqual(sayings(kind, threads=3)[0], self.said)
        for model, expected in zip(self.models, self.hashes):
            self.assertEqual(works(["hash", model], kind), expected, (kind, model))

    def test_without_openmp(self):
        self.other_build("plain")

    def test_other_compiler(self):
        self.other_build("other")

    def test_other_compiler_without_openmp_and_optimisation(self):
        self.other_build("other plain")


class Mistakes(unittest.TestCase):
    """The comparisons above notice what is wrong."""
    right = []

    def noticed_inside(self, word, args, sentence):
        if args not in self.right:      # unoptimised: once is enough
            works(args, "mistakes", env={"MUTANT": "0"})
            self.right.append(args)
        wrong = engine(args, "mistakes", env={"MUTANT": mistake(word)})
        self.assertEqual(wrong.returncode, 1, word)
        self.assertIn(sentence, wrong.stderr.decode())

    def noticed_outside(self, word, model, isa):
        expected = works(["hash", model])
        self.assertEqual(works(["hash", model], "mistakes", env={"RUN_ISA": isa, "MUTANT": "0"}), expected)
        wrong = works(["hash", model], "mistakes", env={"RUN_ISA": isa, "MUTANT": mistake(word)})
        self.assertNotEqual(wrong, expected, word)

    def test_a_kernel_that_sums_in_another_order(self):
        self.noticed_outside("float sums in another order", small_model("llama2"), "scalar")
        self.noticed_outside("groups of columns", quantized(small_model("llama_odd"), "q4a"), "scalar")

    def test_a_vector_kernel_that_sums_in_another_order(self):
        if isas()[0] == "scalar":
            self.skipTest("this machine has no vector instructions that run.c uses")
        self.noticed_outside("vector sums", small_model("llama2"), isas()[0])

    def test_a_fingerprint_from_a_wrong_kernel(self):
        args = ["run", STORIES, "-m", "info", "--json"]
        right, wrong = [json.loads(works(args, "mistakes", env={"RUN_ISA": "scalar", "MUTANT": m}).decode())
                        for m in ("0", mistake("float sums"))]
        self.assertNotEqual(right["fingerprint"], wrong["fingerprint"])

    def test_rounding_that_depends_on_the_batch(self):
        model = quantized(small_model("llama_odd"), "q8")
        self.noticed_inside("depends on the batch", ["same", model], "other logits")
        self.noticed_inside("depends on the batch", ["rows", model, "1"], "other logits")

    def test_attention_that_depends_on_the_chunk(self):
        self.noticed_inside("blocks of positions", ["same", small_model("llama2")], "other logits")

    def test_threads_that_change_sums(self):
        self.noticed_inside("depend on the threads", ["same", small_model("llama2")], "3 threads")

    def test_rewinds_that_forget(self):
        self.noticed_inside("overwritten slots", ["rewinds", small_model("mistral"), "2", "-1"],
                            "than a fresh session")


if __name__ == "__main__":
    unittest.main()
