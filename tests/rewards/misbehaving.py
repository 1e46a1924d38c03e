"""Bodies of reward functions as users write them by mistake, each with what its call comes to.

A number is the score; a text is the kind of the failure (`RewardError.KINDS`).
"""

# name: (body, expected)
RETURNED = {
    "nothing": ("pass", "type"),
    "None": ("return None", "type"),
    "a text": ("return '1.0'", "type"),
    "an empty text": ("return ''", "type"),
    "bytes": ("return b'1'", "type"),
    "a list": ("return [1.0]", "type"),
    "a tuple": ("return 1.0, 'why'", "type"),
    "a set": ("return {1.0}", "type"),
    "a dict without a score": ("return {'reward': 1.0}", "type"),
    "an empty dict": ("return {}", "type"),
    "a dict whose score is a text": ("return {'score': '1'}", "type"),
    "a dict whose score is None": ("return {'score': None}", "type"),
    "a dict with a number as key": ("return {'score': 1.0, 3: 2.0}", "type"),
    "a dict with a list beside": ("return {'score': 1.0, 'all': [1, 2]}", "type"),
    "a dict with a reserved key": ("return {'score': 1.0, 'dropped': 1.0}", "type"),
    "a dict with nan beside": ("return {'score': 1.0, 'length': math.nan}", "nan"),
    "a complex number": ("return 1j", "type"),
    "a function": ("return compute_score", "type"),
    "a class": ("return float", "type"),
    "a generator": ("return (x for x in [1.0])", "type"),
    "a coroutine": ("return wait()", 1.0),
    "an object with a float": ("return Floaty()", "type"),
    "an array of two": ("return np.array([1.0, 2.0])", "type"),
    "an empty array": ("return np.array([])", "type"),
    "an array of texts": ("return np.array('1.0')", "type"),
    "nan": ("return math.nan", "nan"),
    "numpy's nan": ("return np.float32('nan')", "nan"),
    "inf": ("return math.inf", "inf"),
    "minus inf": ("return -math.inf", "inf"),
    "an int beyond any float": ("return 10 ** 400", "inf"),
    "a fraction beyond any float": ("return Fraction(10 ** 400, 3)", "inf"),
    "numpy's overflow": ("return np.float32(3e38) * np.float32(10)", "inf"),
    "True": ("return True", 1.0),
    "an int": ("return 2", 2.0),
    "a fraction": ("return Fraction(1, 4)", 0.25),
    "a numpy number": ("return np.float64(0.5)", 0.5),
    "an array of one": ("return np.array([0.5])", 0.5),
    "a dict": ("return {'score': np.float32(0.5), 'pred': None}", 0.5),
}
RAISED = {
    "an exception": ("raise ValueError('no answer')", "exception"),
    "an exception with a long text": ("raise ValueError('long ' * 100_000)", "exception"),
    "an exception that cannot be sent": ("raise Unsendable(lambda: 0)", "exception"),
    "an exception whose text raises": ("raise Untold()", "exception"),
    "an exception class": ("raise KeyError", "exception"),
    "an assertion": ("assert solution_str == 'right', 'wrong'", "exception"),
    "a division by zero": ("return 1 / 0", "exception"),
    "a missing key": ("return extra_info['absent']", "exception"),
    "an unknown name": ("return scores", "exception"),
    "a missing package": ("import a_package_that_is_not_there", "exception"),
    "StopIteration": ("return next(iter([]))", "exception"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "exception"),
    "a group of exceptions": ("raise ExceptionGroup('two', [ValueError(1)])", "exception"),
    "recursion without end": (
        "return compute_score(data_source, solution_str, ground_truth, extra_info)",
        "exception",
    ),
    "memory for an array": ("return np.ones(10 ** 15).sum()", "exception"),
    "digits beyond Python's limit": ("return int('9' * 10_000)", "exception"),
    "an event loop of its own": ("return asyncio.run(wait())", 1.0),
}
ENDED = {
    "exit": ("sys.exit()", "exception"),
    "exit 0": ("sys.exit(0)", "exception"),
    "quit": ("raise SystemExit('enough')", "exception"),
    "exit without cleaning up": ("os._exit(0)", "exception"),
    "abort": ("os.abort()", "exception"),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", "exception"),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", "exception"),
}
ENDLESS = {
    "a loop": ("while True: pass", "timeout"),
    "a sleep": ("time.sleep(600)", "timeout"),
    "a regular expression that holds the GIL": (
        "return bool(re.match(r'(a+)+$', 'a' * 40 + 'b'))",
        "timeout",
    ),
    "a lock": ("lock = threading.Lock(); lock.acquire(); lock.acquire()", "timeout"),
    "a child that it waits for": ("subprocess.run(['sleep', '600'])", "timeout"),
    "a thread that it waits for": (
        "t = threading.Thread(target=time.sleep, args=(600,)); t.start(); t.join()",
        "timeout",
    ),
    "SIGTERM that it ignores": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
        "timeout",
    ),
    "SIGSTOP": ("os.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "a coroutine that never ends": ("return asyncio.run(asyncio.sleep(600))", "timeout"),
    "its input": ("return float(sys.stdin.read() or time.sleep(600) or 0)", "timeout"),
}
HARMLESS = {
    "much output": ("print('x' * 1_000_000); return 1.0", 1.0),
    "bytes to standard output": (
        "os.write(1, bytes(range(256)) * 100); return 1.0",
        1.0,
    ),
    "warnings": ("import warnings; warnings.warn('odd'); return 1.0", 1.0),
    "a change of folder": ("os.chdir('/'); return 1.0", 1.0),
    "a change of the row": ("extra_info.clear(); return 1.0", 1.0),
    "a thread that stays": (
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); return 1.0",
        1.0,
    ),
    "a time limit of its own": ("signal.alarm(0); return 1.0", 1.0),
    "a seed": ("random.seed(0); np.random.seed(0); return 1.0", 1.0),
}
CASES = RETURNED | RAISED | ENDED | ENDLESS | HARMLESS

HEAD = """
import asyncio, math, os, random, re, signal, subprocess, sys, threading, time
from fractions import Fraction
import numpy as np
async def wait():
    await asyncio.sleep(0)
    return 1.0
class Floaty:
    def __float__(self): return 1.0
class Unsendable(Exception): pass
class Untold(Exception):
    def __str__(self): raise RuntimeError("no text")
"""


def code() -> str:
    """A reward file whose function does what the completion names."""
    parts = [HEAD]
    for i, (body, _) in enumerate(CASES.values()):
        parts.append(
            f"def case_{i}(data_source, solution_str, ground_truth, extra_info):\n    {body}\n"
        )
    names = ", ".join(f"{name!r}: case_{i}" for i, name in enumerate(CASES))
    parts.append(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    if solution_str == 'right': return 3.0\n"
        f"    return {{{names}}}[solution_str](data_source, solution_str, ground_truth, extra_info)\n"
    )
    return "\n".join(parts)
