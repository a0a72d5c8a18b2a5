#!/usr/bin/env python3
"""Runs the tests: python3 tests/test.py [AREA ...]

AREA is the middle of a file name, tests/test_AREA.py, or AREA.WORD for the tests in it whose name contains
WORD. Two areas run at a time, each in a process of its own. One line a test; details of what failed at the
end; the last line is "N passed, N failed" (and ", N skipped", where a compiler or an instruction set is
missing). Exit status 1 if anything failed.
"""
import glob
import io
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
sys.dont_write_bytecode = True
import common

WORKERS = 2
LONGEST = ["tokenizer", "bad_input", "same", "export", "cli"]       # first, so that the workers end together


class Result(unittest.TestResult):
    """Reports one line a test; what a test prints itself stands above its line, indented by the test.

    report: called with "line" and a text, "passed", "skipped", "failed" and a pair (test, details)."""

    def __init__(self, area, report):
        super().__init__()
        self.area, self.report, self.spoiled = area, report, None
        self.began = time.time()        # so that the first test of a class includes its preparation

    def line(self, word, test):
        printed, now = sys.stdout.getvalue(), time.time()
        sys.stdout.seek(0)
        sys.stdout.truncate()
        name = getattr(test, "_testMethodName", str(test)).replace("test_", "", 1)
        self.report("line", "%s%-4s %-12s %-58s %6.2f s" % (printed, word, self.area, name, now - self.began))
        self.began = now

    def addSuccess(self, test):
        if self.spoiled is not test:    # else one of its parts has failed
            self.line("ok", test)
            self.report("passed", None)

    def addSkip(self, test, reason):
        print("     %s" % reason)
        self.line("skip", test)
        self.report("skipped", None)

    def addFailure(self, test, err):
        if self.spoiled is not test:
            self.line("FAIL", test)
        self.spoiled = test
        self.report("failed", (test.id(), self._exc_info_to_string(err, test).rstrip()))

    addError = addFailure

    def addSubTest(self, test, subtest, err):
        if err is None:
            return
        if isinstance(err[1], AssertionError):
            named = type(err[1])("%s\n%s" % (subtest.id().split(".")[-1], err[1]))
            err = (err[0], named, err[2])
        self.addFailure(test, err)

    def addUnexpectedSuccess(self, test):
        self.addFailure(test, (AssertionError, AssertionError("unexpected success"), None))


class Totals:
    """What all areas came to, printed as it comes."""

    def __init__(self):
        self.passed, self.skipped, self.failed = 0, 0, []

    def add(self, kind, value):
        if kind == "line":
            print(value, flush=True)
        elif kind == "failed":
            self.failed.append(value)
        else:
            setattr(self, kind, getattr(self, kind) + 1)

    def finish(self, seconds):
        for test, details in self.failed:
            print("\n---- %s\n%s" % (test, details))
        failed = len({test for test, _ in self.failed})
        print("\n%.0f s" % seconds)
        print("%d passed, %d failed%s" % (self.passed, failed,
                                          ", %d skipped" % self.skipped if self.skipped else ""))
        return 1 if failed or not self.passed else 0


def cases(suite):
    for each in suite:
        if isinstance(each, unittest.TestSuite):
            yield from cases(each)
        else:
            yield each


def run_area(area, words, report):
    """The tests of an area whose names contain one of the words."""
    found = cases(unittest.defaultTestLoader.loadTestsFromName("test_" + area))
    suite = unittest.TestSuite(case for case in found if any(word in case.id() for word in words))
    result, screen = Result(area, report), sys.stdout
    sys.stdout = io.StringIO()
    try:
        suite.run(result)
    finally:
        sys.stdout = screen


def worker(connection):
    """Runs areas as they come through the connection, and answers each with None at its end."""
    common.SCRATCH = os.path.join(common.BUILD, "test-%d" % os.getpid())
    failed = []

    def report(kind, value):
        if kind == "failed":
            failed.append(value)
        connection.send((kind, value))
    try:
        for area, words in iter(connection.recv, None):
            run_area(area, words, report)
            connection.send(None)
        if not failed:                  # else there is something to look at
            shutil.rmtree(common.SCRATCH, ignore_errors=True)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        shutil.rmtree(common.SCRATCH, ignore_errors=True)
        os._exit(1)


def run_areas(waiting, totals):
    """Hands [(area, words)] to the workers until none is left."""
    fork, workers = multiprocessing.get_context("fork"), {}
    for _ in range(min(WORKERS, len(waiting))):
        here, there = fork.Pipe()
        process = fork.Process(target=worker, args=(there,), daemon=True)
        process.start()
        there.close()
        workers[here] = [process, waiting[0][0]]
        here.send(waiting.pop(0))
    while workers:
        for here in multiprocessing.connection.wait(list(workers)):
            process, area = workers[here]
            try:
                message = here.recv()
            except EOFError:
                process.join()
                totals.add("failed", ("test_" + area, "its process ended with %d" % process.exitcode))
                del workers[here]
                continue
            if message:
                totals.add(*message)
                continue
            here.send(waiting[0] if waiting else None)
            if waiting:
                workers[here][1] = waiting.pop(0)[0]
            else:
                process.join()
                del workers[here]
    for area, _ in waiting:
        totals.add("failed", ("test_" + area, "no process was left to run it"))


def sweep():
    """Removes what dead processes left of LLVM's OpenMP: a file for each process, named by its number. An
    empty one, from a process that was killed as it began, kills the next with that number by SIGBUS."""
    for path in glob.glob("/dev/shm/__KMP_REGISTERED_LIB_*_%d" % os.getuid()):
        if not os.path.exists("/proc/" + path.split("_")[-2]):
            try:
                os.unlink(path)
            except OSError:
                pass


def main(argv):
    areas = sorted(f[5:-3] for f in os.listdir(HERE) if f.startswith("test_") and f.endswith(".py"))
    wanted = [argument.split(".", 1) for argument in argv]
    for each in wanted:
        if each[0] not in areas:
            sys.exit("test.py: no area %s; there are: %s" % (each[0], " ".join(areas)))
    areas.sort(key=lambda area: LONGEST.index(area) if area in LONGEST else len(LONGEST))
    words = {area: [(w + [""])[1] for w in wanted if w[0] == area] if wanted else [""] for area in areas}
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C
    sweep()
    began, totals = time.time(), Totals()
    try:
        run_areas([(area, words[area]) for area in areas if words[area]], totals)
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        print("interrupted")
        return 130
    return totals.finish(time.time() - began)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
