#!/usr/bin/env python3
"""Runs the tests: python3 tests/test.py [AREA ...] [-v]

AREA is the middle of a file name, tests/test_AREA.py, or AREA.WORD for the tests in it whose name contains
WORD. One line a test; details of what failed at the end; the last line is "N passed, N failed" (and ", N
skipped", where a compiler or an instruction set is missing). Exit status 1 if anything failed.
"""
import os
import sys
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
sys.dont_write_bytecode = True


class Result(unittest.TestResult):
    """Prints one line a test; what a test prints itself is indented by the test."""

    def __init__(self):
        super().__init__()
        self.passed, self.bad = 0, []

    def startTest(self, test):
        super().startTest(test)
        self.started, self.spoiled = time.time(), False

    def line(self, test, word):
        area = type(test).__module__.replace("test_", "", 1)
        name = getattr(test, "_testMethodName", str(test))
        seconds = time.time() - getattr(self, "started", time.time())
        print("%-4s %-12s %-58s %6.2f s" % (word, area, name.replace("test_", "", 1), seconds), flush=True)

    def addSuccess(self, test):
        if not self.spoiled:
            self.passed += 1
            self.line(test, "ok")

    def fail(self, test, err):
        if not self.spoiled:
            self.line(test, "FAIL")
        self.spoiled = True
        text = self._exc_info_to_string(err, test)
        self.bad.append((test, text))

    def addFailure(self, test, err):
        self.fail(test, err)

    def addError(self, test, err):
        self.fail(test, err)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.fail(test, (err[0], type(err[1])("%s\n%s" % (subtest.id().split(".")[-1], err[1])), err[2])
                      if isinstance(err[1], AssertionError) else err)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.line(test, "skip")
        print("     %s" % reason, flush=True)

    def addUnexpectedSuccess(self, test):
        self.fail(test, (AssertionError, AssertionError("unexpected success"), None))


def cases(suite):
    for each in suite:
        if isinstance(each, unittest.TestSuite):
            yield from cases(each)
        else:
            yield each


def main(argv):
    areas = sorted(f[5:-3] for f in os.listdir(HERE) if f.startswith("test_") and f.endswith(".py"))
    wanted = [a.split(".", 1) for a in argv if not a.startswith("-")]
    for each in wanted:
        if each[0] not in areas:
            sys.exit("test.py: no area %s; there are: %s" % (each[0], " ".join(areas)))
    suite = unittest.TestSuite()
    for area in areas:
        words = [w[1] if len(w) > 1 else "" for w in wanted if w[0] == area]
        if words or not wanted:
            for case in cases(unittest.defaultTestLoader.loadTestsFromName("test_" + area)):
                if any(w in case.id() for w in words or [""]):
                    suite.addTest(case)
    began, result = time.time(), Result()
    suite.run(result)
    for test, text in result.bad:
        print("\n---- %s\n%s" % (test.id(), text.rstrip()))
    failed = len({test.id() for test, _ in result.bad})
    print("\n%.0f s" % (time.time() - began))
    print("%d passed, %d failed%s" % (result.passed, failed, ", %d skipped" % len(result.skipped)
                                      if result.skipped else ""))
    return 1 if failed or not result.passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
