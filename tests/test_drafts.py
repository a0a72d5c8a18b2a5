"""Drafting changes speed and nothing else: the same tokens, text, logits and cache with every drafter.

engine.c compares generations without drafting with others whose drafters know the answer, avoid it, are half
right or talk nonsense, and with the real ones, also when all decisions of their controller are random. Deliberate
mistakes must be noticed.
"""
import json
import re
import unittest

from common import STORIES, Safetensors, ok, run, scratch, write_safetensors
from engine import engine, mistake, quantized, small_model, works


class Same(unittest.TestCase):

    def drafts(self, model, seed, trials):
        out = works(["drafts", model, seed, trials]).decode()
        accepted, drafted, passes, second = map(int, re.search(
            r"(\d+) of (\d+) accepted in (\d+) passes, .*, (\d+) by a second", out).groups())
        self.assertGreater(min(accepted, drafted - accepted, passes), 100, out)
        return second

    def test_text_logits_cache(self):
        second = self.drafts(STORIES, 1, 12)
        for seed, model in enumerate([small_model(m) for m in ("mistral", "qwen2_window", "llama3", "qwen3", "llama_odd")] +
                                     [quantized(small_model("llama_odd"), "q4a"), quantized(small_model("mistral"), "q8")]):
            second += self.drafts(model, seed, 20)
        self.assertGreater(second, 200)

    def test_lookup_finds_the_longest_match(self):
        works(["lookups", "-", 400])

    def test_frequencies(self):
        for model, percent in ((STORIES, 100), (small_model("mistral"), 40)):
            works(["frequencies", model, 20000, percent])

    def test_controller(self):
        """Passes and guesses that take simulated time: near the best fixed width whatever they cost, never much
        below none; also 200 tokens after the costs or the chances have changed."""
        out = works(["controller", STORIES]).decode()
        cases = re.findall(r"(steady|change) .* chance (\S+): (\S+) of the best, (\S+) of none", out)
        self.assertEqual(len(cases), 39)
        steady = [float(best) for kind, _, best, _ in cases if kind == "steady"]
        self.assertGreater(sum(steady) / len(steady), 0.98, out)
        for kind, chance, best, none in cases:
            self.assertGreater(float(best), 0.92 if kind == "change" or float(chance) > 0.9 else 0.95, out)
            self.assertGreater(float(none), 0.98, out)

    def test_mistakes_are_noticed(self):
        drafts, frequencies = ["drafts", small_model("mistral"), 1, 12], ["frequencies", small_model("mistral"), 20000, 40]
        for word, args in (("second model that", ["drafts", STORIES, 1, 12]), ("stand although", drafts), ("lossy", frequencies), ("behind the end", drafts),
                           ("remembers", drafts), ("other than the longest", ["lookups", "-", 100])):
            p = engine(args, "mistakes", env={"MUTANT": mistake(word)})
            self.assertNotEqual(p.returncode, 0, (word, args, p.stdout))
        for args in (drafts, frequencies):
            p = engine(args, "mistakes", env={"MUTANT": "0"})
            self.assertEqual(p.returncode, 0, (args, p.stderr))


class Program(unittest.TestCase):

    def test_a_second_model(self):
        """The model itself, and a copy with another context: the same text; one with other tokens is refused."""
        short = scratch("drafts", "short.bin")
        file = Safetensors(STORIES)
        write_safetensors(short, dict(file.metadata, context_length="64"), file.tensors)
        args = [STORIES, "-i", self.PROMPT, "-n", "150", "-t", "0"]
        for draft in (STORIES, short):
            self.assertEqual(ok(args + ["--draft", draft]), ok(args + ["--draft", "off"]), draft)
        p = run([STORIES, "-i", "a", "--draft", small_model("mistral")])
        self.assertEqual(p.returncode, 1)
        self.assertIn(b"its tokens are others", p.stderr)

    def test_bench(self):
        for draft in ("lookup", STORIES):
            out = json.loads(ok([STORIES, "-m", "bench", "--draft", draft, "--json", "-t", "0", "-n", "40"]).decode())["draft"]
            self.assertGreater(min(out["tok_s"], out["tok_s_off"], out["gain_low"]), 0)
            self.assertLessEqual(out["gain_low"], out["gain"])
            self.assertLessEqual(out["gain"], out["gain_high"])
            self.assertLessEqual(out["accepted"], out["drafted"])
        self.assertGreater(min(out["acceptance"]), 0.8)     # the model itself; some guesses come behind the end
        self.assertIn("acceptance        by place", ok([STORIES, "-m", "bench", "--draft", STORIES, "-t", "0", "-n", "40", "-i", "Once"]).decode())
        self.assertEqual(run([STORIES, "-m", "bench", "--draft", "auto", "--compare", "isa"]).returncode, 2)

    PROMPT = "Lily said: one two three four five six seven. Tom said: one two three four"

    def test_the_same_text(self):
        for args in (["-t", "0"], ["-t", "1", "-s", "5"], ["-t", "0.7", "-s", "6", "--repeat-penalty", "1.1"],
                     ["-t", "0", "--stop", "and"], ["-t", "0", "-c", "64", "-n", "0"]):
            texts = {ok([STORIES, "-i", self.PROMPT, "-n", "200"] + args + ["--draft", d] + more)
                     for d in ("off", "auto", "lookup") for more in ([], ["--draft-max", "1"], ["-j", "2"])}
            self.assertEqual(len(texts), 1, args)

    def test_statistics(self):
        out = json.loads(ok([STORIES, "-i", self.PROMPT, "-n", "250", "-t", "0", "--json", "--draft", "lookup"]).decode())
        stats = out["stats"]
        self.assertLessEqual(stats["passes"] + stats["accepted"], len(out["ids"]))
        self.assertGreater(stats["drafted"], 0)     # the prompt repeats itself, and there are trials even if none pays
        self.assertEqual([sum(x) for x in zip(*stats["by_position"])], [stats["accepted"], stats["drafted"]])
        self.assertEqual([sum(x) for x in zip(*stats["drafters"].values())], [stats["accepted"], stats["drafted"]])
        self.assertAlmostEqual(stats["tokens_per_pass"], 1 + stats["accepted"] / stats["passes"], delta=1e-3)
        self.assertAlmostEqual(stats["tokens_per_pass"], len(out["ids"]) / stats["passes"], delta=2 / stats["passes"])
        self.assertGreater(stats["draft_s"], 0)
        self.assertGreater(stats["verify_s"], stats["draft_s"])
        off = json.loads(ok([STORIES, "-i", self.PROMPT, "-n", "50", "--json", "--draft", "off"]).decode())["stats"]
        self.assertEqual((off["drafted"], off["accepted"], off["net_gain"], off["passes"]), (0, 0, 0, 49))
