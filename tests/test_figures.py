"""Figures that the program prints about itself: bench, info, statistics of a generation.

Nothing here asks how fast it is. Figures of one output must agree with each other and with the file; what
took longer than the whole process, or less than a fifth of the processor time that the same work takes from
outside, cannot be. No load of the machine breaks either.
"""
import json
import re
import resource
import time
import unittest

from common import STORIES, Safetensors, ok, run
from engine import changed, isas, quantized, small_model

PROMPT = "Once upon a time, there was a little girl named Lily. " * 6
DIM, HIDDEN, LAYERS, HEADS, KV, HD, VOCAB = 64, 172, 5, 8, 4, 8, 512        # stories260K
LAYER = DIM * HEADS * HD * 2 + DIM * KV * HD * 2 + 3 * DIM * HIDDEN         # weights of its matrices


def timed(args):
    """What the program prints, (standard output, standard error), seconds, seconds of processor time."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    p = run(args)
    wall, after = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if p.returncode != 0:
        raise AssertionError(p.stderr.decode())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (p.stdout.decode(), p.stderr.decode()), wall, cpu


def endless():
    return changed(STORIES, "figures", {"token.eos": None})


def generation(*more, prompt=PROMPT):
    return timed([endless(), "-m", "generate", "-i", prompt, "-t", "0", "-j", "1"] + list(more))


def possible(new):
    """Tokens a second of processor time from outside, start of the program and all: (prompt, generated)."""
    reading, writing = [min((generation("-n", n, "--json", prompt=text) for _ in range(3)), key=lambda g: g[2])
                        for n, text in (("1", 5 * PROMPT), (new, PROMPT))]     # long ones: the start is small
    return (len(json.loads(reading[0][0])["prompt_ids"]) / reading[2],
            len(json.loads(writing[0][0])["ids"]) / writing[2])


class Bench(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        (out, err), cls.wall, _ = timed([STORIES, "-m", "bench", "--json", "-c", "300", "-j", "1"])
        cls.out, cls.err = json.loads(out), err
        cls.info = json.loads(ok([STORIES, "-m", "info", "--json"]).decode())

    def close(self, a, b, relative=2e-3):       # figures have four digits or more
        self.assertLessEqual(abs(a - b), relative * abs(b), (a, b))

    def test_keys(self):
        out = self.out
        for key, kind in (("decode", dict), ("prompt", dict), ("c", dict), ("pass_ms", dict),
                          ("times_least", dict), ("parts_us", dict), ("start_ms", dict),
                          ("read_gb_s", (int, float)), ("gmac_s", (int, float)), ("bytes_per_token", int),
                          ("roofline", (int, float)), ("isa", str), ("threads", int), ("fingerprint", str)):
            self.assertIsInstance(out[key], kind, key)
        self.assertEqual((set(out["c"]), out["c"]["1"]), ({"1", "2", "4", "8", "16"}, 1))
        self.assertEqual(set(out["times_least"]), set(out["pass_ms"]))
        self.assertEqual(set(out["decode"]), {"tok_s", "min", "max"})
        self.assertEqual(set(out["start_ms"]), {"cold", "warm"})
        self.assertEqual((set(out["prompt"]), out["prompt"]["512"]), ({"128", "512"}, 0))
        self.assertEqual((out["isa"], out["threads"]), (self.info["isa"], 1))
        self.assertEqual(out["fingerprint"], self.info["fingerprint"])
        self.assertEqual(self.err, "")

    def test_cost_of_a_pass(self):
        out = self.out
        self.assertEqual(set(out["c"]), set(out["pass_ms"]))
        reading = out["bytes_per_token"] / (out["read_gb_s"] * 1e9)
        weights = VOCAB * DIM + LAYERS * LAYER
        for k, ms in out["pass_ms"].items():
            self.assertGreater(ms, 0)
            self.close(out["c"][k], ms / out["pass_ms"]["1"])
            least = max(reading, int(k) * weights / (out["gmac_s"] * 1e9))
            self.close(out["times_least"][k], ms / 1e3 / least)
        # the median of seven: four took that long, each of 40 passes or of a quarter of a second
        least = sum(4 * min(40 * ms / 1e3, 0.25) for ms in out["pass_ms"].values())
        self.assertLess(least, self.wall)

    def test_bytes(self):
        self.assertEqual(self.out["bytes_per_token"], 4 * (VOCAB * DIM + LAYERS * LAYER))
        self.assertEqual(self.out["bytes_per_token"], self.info["bytes_per_token"])
        self.close(self.out["roofline"], self.out["bytes_per_token"] * self.out["decode"]["tok_s"]
                   / (self.out["read_gb_s"] * 1e9))

    def test_decode(self):
        decode, parts = self.out["decode"], self.out["parts_us"]
        self.assertTrue(0 < decode["min"] <= decode["tok_s"] <= decode["max"], decode)
        self.assertGreater(min(parts.values()), 0)
        self.assertGreaterEqual(set(parts), {"attention", "logits", "sampler"})
        self.assertLess(sum(parts.values()), 1.01e6 / decode["min"])        # of all tokens, on average
        self.assertGreater(sum(parts.values()), 0.5e6 / decode["max"])
        # the median of seven: four took that long, each of 255 tokens or of a second
        self.assertLess(4 * min(255 / decode["tok_s"], 1), self.wall)

    def test_plausible(self):
        """Within a factor of five of what one core can do; figures of memory and arithmetic, of any machine."""
        prompt, new = possible(350)
        self.assertLess(self.out["decode"]["tok_s"], 5 * new)
        self.assertTrue(0 < self.out["prompt"]["128"] < 5 * prompt, (self.out["prompt"], prompt))
        self.assertTrue(1e-3 < self.out["read_gb_s"] < 2000, self.out["read_gb_s"])
        self.assertTrue(1e-3 < self.out["gmac_s"] < 2000, self.out["gmac_s"])
        for ms in self.out["start_ms"].values():
            self.assertTrue(0 < ms < 1e3 * self.wall, ms)

    def test_text(self):
        """The same relations in the table for people, whose figures have fewer digits."""
        text = ok([STORIES, "-m", "bench", "-c", "140", "-j", "1"]).decode()
        decode = re.search(r"^decode +([\d.]+) tok/s +\(([\d.]+) to ([\d.]+) in 7 runs", text)
        self.assertTrue(decode, text)
        middle, low, high = map(float, decode.groups())
        self.assertTrue(low <= middle <= high)
        passes = re.findall(r"k = (\d+) +([\d.]+) ms +c = ([\d.]+)", text)
        self.assertEqual([int(k) for k, _, _ in passes], [1, 2, 4, 8, 16])
        first = float(passes[0][1])
        for _, ms, c in passes:         # ms to 0.001
            near = float(ms) / first
            self.assertLessEqual(abs(float(c) - near), 0.006 + near * 0.0006 * (1 / float(ms) + 1 / first), text)
        parts = re.findall(r"^  ([a-z, ]+?) +([\d.]+) us +([\d.]+) %", text, re.M)
        self.assertEqual({name for name, _, _ in parts}, set(self.out["parts_us"]))
        total = sum(float(us) for _, us, _ in parts)
        self.assertTrue(0.5e6 / high < total < 1.01e6 / low + 1, text)
        for _, us, percent in parts:
            self.assertLessEqual(abs(float(percent) - 100 * float(us) / total), 0.5, text)
        read, size, of = re.search(r"memory +([\d.]+) GB/s read; a token reads (\d+) bytes.* (\d+) %", text).groups()
        self.assertEqual(int(size), self.out["bytes_per_token"])
        self.assertLessEqual(abs(int(of) - 100 * int(size) * middle / (float(read) * 1e9)), 1 + int(of) / 50, text)

    def compared(self, what, *more):
        args = [STORIES, "-m", "bench", "--compare", what] + list(more)
        out = json.loads(ok(args + ["--json"]).decode())
        self.assertEqual(set(out), {"compare"})
        for row in out["compare"]:
            self.assertEqual(set(row), {what, "decode_tok_s", "prompt_tok_s"})
            self.assertGreater(row["decode_tok_s"], 0)
        rows = re.findall(r"^(\w+) +([\w-]+) +decode +[\d.]+ tok/s", ok(args).decode(), re.M)
        self.assertEqual(rows, [(what, str(row[what])) for row in out["compare"]])
        return [row[what] for row in out["compare"]], [row["prompt_tok_s"] > 0 for row in out["compare"]]

    def test_compare_contexts(self):
        self.assertEqual(self.compared("context", "-c", "600", "-j", "1"), ([0, 256, 512], [True, True, False]))
        self.assertEqual(self.compared("context", "-c", "256", "-j", "1"), ([0], [True]))

    def test_compare_instruction_sets(self):
        self.assertEqual(self.compared("isa", "-c", "60", "-j", "1")[0], isas())

    def test_compare_threads(self):
        labels, prompts = self.compared("threads", "-c", "130", "-j", "3")
        self.assertEqual((labels, prompts), ([1, 2, 3], [True] * 3))


class Info(unittest.TestCase):

    def info(self, path, *more):
        return json.loads(ok([path, "-m", "info", "--json"] + list(more)).decode())

    def test_parameters_and_cache(self):
        parameters = VOCAB * DIM + LAYERS * (LAYER + 2 * DIM) + DIM
        self.assertEqual(parameters, 260032)
        for path in [STORIES] + [quantized(STORIES, kind) for kind in ("q4", "q6", "q8", "f16")]:
            out = self.info(path)
            self.assertEqual(out["parameters"], parameters, path)
            self.assertEqual(out["cache_bytes_per_token"], LAYERS * KV * HD * 2 * 2)
            self.assertEqual(self.info(path, "--kv", "f32")["cache_bytes_per_token"], LAYERS * KV * HD * 2 * 4)
        text = ok([STORIES, "-m", "info"]).decode()
        self.assertRegex(text, r"\nparameters +260032\n")
        self.assertRegex(text, r"\ncache +640 bytes a token\n")
        self.assertRegex(text, r"\nbytes/token +1037312 ")

    def test_bytes_of_a_token(self):
        """Every matrix once: a tied embedding is the output matrix, another one is not read."""
        for path in (quantized(STORIES, "q4"), quantized(STORIES, "q4a"), small_model("llama2"),
                     quantized(small_model("llama_odd"), "q8")):
            file = Safetensors(path)
            untied = "output.weight" in file.tensors
            names = [n for n in file.tensors if n.endswith(".weight") and "norm" not in n
                     and not (untied and n == "token_embd.weight")]
            out = self.info(path)
            self.assertEqual(out["bytes_per_token"], sum(len(file.tensors[n][2]) for n in names), path)
            self.assertEqual({t["name"]: t["bytes"] for t in out["tensors"]},
                             {n: len(d) for n, (_, _, d) in file.tensors.items() if not n.startswith("pad.")})


class Statistics(unittest.TestCase):

    def check(self, prompt_tokens, prompt_speed, tokens, speed, wall):
        self.assertTrue(prompt_speed > 0 and speed > 0)
        self.assertLess(prompt_tokens / prompt_speed + tokens / speed, wall + 1e-3)
        for said, possibly in zip((prompt_speed, speed), self.possible):
            self.assertLess(said, 5 * possibly)

    def test_speed(self):
        self.possible = possible(300)
        (out, _), wall, _ = generation("-n", "300", "--json")
        out = json.loads(out)
        stats, n = out["stats"], len(out["prompt_ids"])
        self.assertGreater(n, 50)
        self.check(n, stats["prompt_tok_s"], 300, stats["decode_tok_s"], wall)
        if not stats["drafted"]:
            self.assertEqual(stats["passes"], 299)
        (_, err), wall, _ = generation("-n", "300")
        line = re.fullmatch(r"prompt: (\d+) tokens, ([\d.]+) tok/s; generated: (\d+) tokens, ([\d.]+) tok/s"
                            r"(?:; drafted: \d+ of \d+ guesses right, [\d.]+ tokens a pass(?:, speed about [+-]\d+ %)?|; no guesses, as they would not pay)?\n", err)
        self.assertTrue(line, err)
        self.assertEqual((int(line.group(1)), int(line.group(3))), (n, 300))
        self.check(n, float(line.group(2)), 300, float(line.group(4)), wall)


if __name__ == "__main__":
    unittest.main()
