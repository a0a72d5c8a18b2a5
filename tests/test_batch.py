"""Many texts in one pass: each as if it ran alone; files of prompts in shards and after interruptions."""
import json
import os
import random
import shutil
import subprocess
import unittest

from common import RUN, STORIES, fresh_folder, ok, run
from engine import quantized, small_model

WORDS = "Once upon a time there was little girl Lily who loved to play in the park and her friend Tom".split()


def lines(data):
    return [json.loads(line) for line in data.decode().splitlines()]


def without_stats(results):
    return [{key: value for key, value in r.items() if key != "stats"} for r in results]


class Batch(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        dice = random.Random(5)
        cls.folder = fresh_folder("batch")
        cls.file = os.path.join(cls.folder, "prompts.jsonl")
        cls.requests = [{"id": i, "prompt": " ".join(dice.choices(WORDS, k=dice.randint(1, 90))), "chat": False,
                         "more": {"a": [1, -2.5e3, None, True, "\u00e9\U0001f600\"\\\n"], "b": {}, "c": []}} for i in range(37)]
        cls.requests[3]["prompt"], cls.requests[4]["prompt"] = "", "caf\u00e9 \U0001f600\t\"x\"\n"
        with open(cls.file, "w") as f:
            for i, r in enumerate(cls.requests):
                f.write(json.dumps(r, ensure_ascii=i % 2 == 0) + ("\n" if i % 5 else "\n  \n"))
        cls.options = [STORIES, "-f", cls.file, "--json", "-n", "40", "-t", "0.9", "-s", "7", "--stop", "park"]
        cls.results = lines(ok(cls.options))

    def test_each_as_if_alone(self):
        self.assertEqual(len(self.results), len(self.requests))
        for request, result in zip(self.requests, self.results):
            self.assertEqual({key: result[key] for key in request}, request)
            alone = json.loads(ok([STORIES, "-i", request["prompt"], "--json", "-n", "40", "-t", "0.9", "-s", "7",
                                   "--stop", "park", "--draft", "off"]).decode())
            for key in ("prompt_ids", "ids", "text", "stop"):
                self.assertEqual(result[key], alone[key], (key, request["prompt"]))

    def test_settings_and_threads_change_nothing(self):
        for more in (["-j", "2"], ["--draft", "off"], ["--draft", "lookup"]):
            self.assertEqual(without_stats(lines(ok(self.options + more))), without_stats(self.results))

    def test_texts_share_passes(self):
        p = run(self.options)
        said = p.stderr.decode().split()
        tokens, passes = int(said[said.index("tokens") - 1]), int(said[said.index("passes,") - 1])
        self.assertEqual(tokens, sum(len(r["ids"]) for r in self.results))
        self.assertLess(passes, tokens / 8)

    def test_shards(self):
        parts = [lines(ok(self.options + ["--shard", "%d/3" % i])) for i in (1, 2, 3)]
        found = sorted(sum(parts, []), key=lambda r: r["id"])
        self.assertEqual(without_stats(found), without_stats(self.results))
        self.assertGreater(min(map(len, parts)), 5)

    def test_shards_with_gnu_parallel(self):
        parallel = shutil.which("parallel")
        if not parallel or b"GNU" not in subprocess.run([parallel, "--version"], stdout=subprocess.PIPE,
                                                        stderr=subprocess.STDOUT).stdout:
            self.skipTest("no GNU parallel")
        out = os.path.join(self.folder, "part-{}.jsonl")
        subprocess.run([parallel, "-j", "2", RUN, *self.options, "-j", "1", "--shard", "{}/3", "-o", out, ":::", "1", "2", "3"],
                       check=True, stderr=subprocess.DEVNULL)
        found = []
        for i in "123":
            with open(out.replace("{}", i), "rb") as f:
                found += lines(f.read())
        self.assertEqual(without_stats(sorted(found, key=lambda r: r["id"])), without_stats(self.results))

    def test_goes_on_after_an_interruption(self):
        path = os.path.join(self.folder, "out.jsonl")
        ok(self.options + ["-o", path])
        with open(path, "rb") as f:
            whole = f.read()
        self.assertEqual(without_stats(lines(whole)), without_stats(self.results))
        for cut in (0, 10, len(whole) // 3, len(whole) - 1, len(whole)):
            with open(path, "wb") as f:
                f.write(whole[:cut])
            kept = whole[:cut].rfind(b"\n") + 1
            ok(self.options + ["-o", path])
            with open(path, "rb") as f:
                now = f.read()
            self.assertEqual(now[:kept], whole[:kept])
            self.assertEqual(without_stats(lines(now)), without_stats(self.results))
        for other in (b"something else\n", whole.replace(b'"id": 0', b'"id": 9'), whole + b"{}\n"):
            with open(path, "wb") as f:
                f.write(other)
            p = run(self.options + ["-o", path])
            self.assertEqual(p.returncode, 1)
            self.assertIn(b"remove it or name another file", p.stderr)
            with open(path, "rb") as f:
                self.assertEqual(f.read(), other)

    def test_lines_that_are_wrong(self):
        path = os.path.join(self.folder, "wrong.jsonl")
        for line in ("x", "{}", "[]", '{"prompt":1}', '{"prompt":"a","chat":1}', '{"prompt":"a"', '{"prompt":"a"} x', '{"prompt":"a",}',
                     '{"prompt":"a","b":}', '{"prompt":"a","b":[1,}', '{"prompt":"\\ud800"}', '{"prompt":"a","b":' + "[" * 200 + "]" * 200 + "}",
                     '{"prompt":"a","b":tru}', "{'prompt':'a'}"):
            with open(path, "w") as f:
                f.write('{"prompt":"Once"}\n' + line + "\n")
            p = run([STORIES, "-f", path, "--json", "-n", "2"])
            self.assertEqual((p.returncode, p.stdout), (1, b""), line)
            self.assertIn(b"line 2 ", p.stderr, line)

    def test_prompts_that_fail_do_not_stop_the_others(self):
        path = os.path.join(self.folder, "long.jsonl")
        with open(path, "w") as f:
            for r in ({"prompt": "Once", "chat": True}, {"prompt": "Lily " * 300}, {"prompt": "Once"}):
                f.write(json.dumps(r) + "\n")
        p = run([STORIES, "-f", path, "--json", "-n", "5", "-c", "100"])
        self.assertEqual(p.returncode, 1)
        found = lines(p.stdout)
        self.assertEqual([("error" in r, "text" in r) for r in found], [(True, False), (True, False), (False, True)])
        self.assertIn("chat format", found[0]["error"])

    def test_an_empty_file(self):
        path = os.path.join(self.folder, "empty.jsonl")
        open(path, "w").close()
        self.assertEqual(ok([STORIES, "-f", path, "--json"]), b"")


class Samples(unittest.TestCase):

    def test_each_is_another_stream(self):
        for model in (STORIES, small_model("mistral"), quantized(small_model("qwen2_window"), "q8")):
            args = [model, "-i", "Once upon" if model == STORIES else "1 2 3 4 5", "-n", "30", "-t", "1", "-s", "3", "--json"]
            few, many = lines(ok(args + ["--samples", "3"])), lines(ok(args + ["--samples", "21", "-j", "2"]))
            self.assertEqual(len(many), 21)
            self.assertEqual(without_stats(many[:3]), without_stats(few))
            self.assertEqual([r["sample"] for r in many], list(range(21)))
            self.assertGreater(len({tuple(r["ids"]) for r in many}), 10)
            alone = json.loads(ok(args).decode())
            for key in ("prompt_ids", "ids", "text", "stop"):
                self.assertEqual(many[0][key], alone[key], key)

    def test_text(self):
        args = [STORIES, "-i", "Once", "-n", "10", "-s", "1", "--samples", "2"]
        texts = [r["text"] for r in lines(ok(args + ["--json"]))]
        self.assertEqual(ok(args).decode(), "--- 1\n%s\n--- 2\n%s\n" % tuple(texts))
