"""What the program chooses where nobody tells it: threads, context, sampling, seeds, tokens."""
import itertools
import json
import os
import re
import unittest

from common import STORIES, ok, run, scratch
from engine import changed, chat_model, engine, works
from test_pack import model

PROMPT = "Once upon a time"


def first_line(path):
    try:
        with open(path) as f:
            return f.readline().split()
    except OSError:
        return []


class Threads(unittest.TestCase):

    def cores(self, allowed):
        """Physical cores among some processors, within the quota of the control group."""
        found = set()
        for i in allowed:
            siblings = first_line("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list" % i)
            found.add(siblings[0] if siblings else i)
        quota = first_line("/sys/fs/cgroup/cpu.max")
        if not quota:
            quota = (first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") +
                     first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
        if len(quota) == 2 and quota[0].isdigit():
            return max(1, min(len(found), -(-int(quota[0]) // int(quota[1]))))
        return min(len(found), 256)

    def test_one_for_each_core(self):
        if not hasattr(os, "sched_getaffinity"):
            self.skipTest("this system does not say which processors a process may use")
        mine = sorted(os.sched_getaffinity(0))
        for allowed in (mine, mine[:1], mine[-1:], mine[::2], mine[1:] or mine):
            out = ok([STORIES, "-m", "info", "--json"], limits=lambda: os.sched_setaffinity(0, allowed))
            self.assertEqual(json.loads(out.decode())["threads"], self.cores(allowed), allowed)
            out = ok([STORIES, "-m", "info", "--json", "-j", "3"],
                     limits=lambda: os.sched_setaffinity(0, allowed))
            self.assertEqual(json.loads(out.decode())["threads"], 3)

    def used(self, size, bad, good, share):
        """Four rounds of lists: threads in use after each run that waited, and each that did not."""
        numbers = [int(w) for w in works(["adapt", "-", size, bad, good, share]).split()]
        self.assertEqual(len(numbers), 4 * (bad + good))
        rounds = [numbers[i:i + bad + good] for i in range(0, len(numbers), bad + good)]
        return [(r[:bad], r[bad:]) for r in rounds]

    def test_a_team_does_without_threads_that_wait(self):
        """After some such runs, at most as many fewer as waited, on average; then it rests, tries again, and recovers."""
        cases = itertools.product((1, 2, 3, 4, 7, 16), (20, 40), (30, 100), (6000,))
        for size, bad, share, good in list(cases) + [(2, 400, 100, 4000), (16, 400, 30, 9000)]:
            before, where = size, (size, bad, share)
            for down, up in self.used(size, bad, good, share):
                self.assertEqual(down[0], before, "one run that waits may be an accident")
                steps = [now - then for then, now in zip([before] + down, down)]
                self.assertIn(min(steps), [-1] if size == 2 else range(1 - size, 1) if size == 1 else range(1 - size, 0), where)
                for then, now in zip([before] + down, down):
                    self.assertGreaterEqual(now, max(1, then - max(1, -(-share * then // 100))), where)
                before = down[-1]
                if before < size:
                    self.assertLess(up.index(size), good - 500, "tries again")
                for now in up:
                    self.assertTrue(before - 1 <= now <= size, (where, before, now))
                    before = now
                self.assertEqual(set(up[-500:]), {size}, "recovers, and stays")

    def test_a_thread_that_always_waits_is_tried_less_and_less(self):
        for size in (2, 3, 4):
            used = self.used(size, 20000, 0, 100)[0][0]
            last = used[-10000:]
            self.assertLess(sum(now > 1 for now in last), 0.02 * len(last), size)
            self.assertGreater(max(last), 1, "but it is tried")

    def test_accidents_change_nothing(self):
        """One run in twenty in which every thread waited all the time."""
        self.assertEqual(set(self.used(2, 1, 19, 100)[0][0] + self.used(2, 1, 19, 100)[3][1]), {2})

    def test_a_team_that_never_waits_stays(self):
        for size in (1, 2, 5):
            self.assertEqual(self.used(size, 0, 100, 0)[0], ([], [size] * 100))


class Context(unittest.TestCase):

    def test_as_much_as_memory_permits(self):
        """Half of the memory for the cache; what was asked for is asked for."""
        heads, size = 64, 64
        path = model(scratch("choices", "long.bin"), 8, {}, heads=heads, head_dim=size)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for trained in (2 ** 26, 3 * 2 ** 24, 1000):
            long = changed(path, "long-%d" % trained, {"context_length": str(trained)})
            got, expected = int(works(["context", long, 0])), trained
            while expected > 512 and -(-expected // 64) * 64 * heads * size * 2 * 2 > memory / 2:
                expected //= 2
            self.assertEqual(got, expected)
            self.assertEqual(int(works(["context", long, 1 << 20])), 1 << 20)


class Defaults(unittest.TestCase):
    """A run without options is a run with those that the help names."""

    @classmethod
    def setUpClass(cls):
        cls.help = ok(["-h"]).decode()
        cls.model = changed(STORIES, "never-ends", {"token.eos": None})

    def number(self, option, pattern=r"\((\d[\d.]*)\)$"):
        lines = [line for line in self.help.split("\n") if line.startswith("  %s " % option)]
        self.assertEqual(len(lines), 1, option)
        found = re.search(pattern, lines[0])
        self.assertTrue(found, lines[0])
        return found.group(1)

    def said(self, *args):
        out = json.loads(ok([self.model, "-i", PROMPT, "-m", "generate", "--json", "-s", "7"] + list(args)).decode())
        del out["stats"]
        return out

    def test_all(self):
        words = ["-t", "-k", "-p", "--min-p", "--repeat-penalty"]
        for n in ([], ["-n", "300"]):
            given = n or ["-n", self.number("-n", r"\(generate (\d+), chat 0\)")]
            for option in words:
                given += [option, self.number(option)]
            self.assertEqual(self.said(*n), self.said(*given))
            self.assertEqual(len(self.said(*n)["ids"]), int(given[1]))

    def test_each(self):
        """Where the others have no say. Another number gives another text: the comparison would notice."""
        nearly_uniform = ["-t", "1000", "-n", "200"]
        for option, others, change in (
                ("-t", ["-k", "0", "-p", "1", "--min-p", "0", "-n", "200"], 0.1),
                ("-k", nearly_uniform + ["-p", "1", "--min-p", "0"], 1),
                ("-p", nearly_uniform + ["-k", "0", "--min-p", "0"], 0.01),
                ("--min-p", ["-t", "1.5", "-k", "0", "-p", "1", "-n", "200"], 0.01),
                ("--repeat-penalty", ["-t", "0", "-n", "100"], 0.1)):
            value = self.number(option)
            plain = self.said(*others)
            self.assertEqual(self.said(*others, option, value), plain, option)
            for other in (float(value) + change, float(value) - change):
                self.assertNotEqual(self.said(*others, option, "%g" % other), plain, (option, other))

    def test_cache(self):
        self.assertIn("(f16)", [line for line in self.help.split("\n") if "--kv " in line][0])
        args = ["-t", "0", "-n", "20", "--logprobs", "1"]
        self.assertEqual(self.said(*args), self.said(*args, "--kv", "f16"))
        self.assertNotEqual(self.said(*args), self.said(*args, "--kv", "f32"))

    def test_an_answer_ends_with_the_context(self):
        self.assertIn("chat 0)", self.help)
        chat = changed(chat_model(), "chat-never-ends", {"token.eos": None})
        out = json.loads(ok([chat, "-i", "Hello", "--json", "-t", "0", "-c", "400"]).decode())
        self.assertEqual((out["stop"], len(out["ids"]) + len(out["prompt_ids"])), ("context", 400))
        p = run([chat, "-t", "0", "-c", "64"], stdin="Hello\n/stats\n/reset\nHello\n")
        self.assertEqual(p.returncode, 0)
        line = "(the context of 64 tokens is full)\n"
        self.assertEqual(p.stderr.decode().count(line), 2, p.stderr)
        self.assertTrue(p.stderr.decode().startswith(line), p.stderr)
        self.assertIn("context: 64 of 64 tokens\n", p.stderr.decode())
        p = run([chat, "-t", "0", "-c", "64", "-n", "3"], stdin="Hello\n")
        self.assertEqual(p.stderr, b"")
        p = run([chat, "-t", "0", "-c", "64", "-m", "generate", "-n", "0", "-i", "Hello"])
        self.assertTrue(p.stderr.decode().endswith("\nthe context of 64 tokens is full\n"), p.stderr)

    def test_seeds_are_drawn(self):
        seeds, texts = [], set()
        for i in range(20):
            p = run([STORIES, "-i", PROMPT, "-m", "generate", "-n", "12", "-t", "1000", "-k", "0"])
            seeds.append(re.search(r"; seed (\d+)\n", p.stderr.decode()).group(1))
            texts.add(p.stdout)
        self.assertEqual(len(set(seeds)), 20, seeds)
        self.assertEqual(len(texts), 20)
        p = run([STORIES, "-i", PROMPT, "-m", "generate", "-n", "1", "--json"])
        self.assertRegex(p.stderr.decode(), r"^seed \d+\n$")


if __name__ == "__main__":
    unittest.main()
