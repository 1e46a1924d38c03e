"""The runner against functions that fail in every way, above all that it kills what hangs."""

import os
import pickle
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from grpo_latent.errors import ConfigError, DataError, RewardError
from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.process import RewardProcess
from grpo_latent.rewards.runner import RewardItem, RewardRunner

CODE = '''
import asyncio, os, pathlib, re, subprocess, sys, time
calls = []
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """Does what the completion says."""
    print("noise on stdout")
    calls.append(solution_str)
    match solution_str.split():
        case ["score", x]: return float(x)
        case ["dict", x]: return {"score": float(x), "length": len(ground_truth), "pred": "p"}
        case ["raise"]: raise KeyError("no such key")
        case ["exit"]: sys.exit(0)
        case ["die", x]: os._exit(int(x))
        case ["loop"]:
            while True: pass
        case ["sleep", x]: time.sleep(float(x)); return 1.0
        case ["regex"]: return float(bool(re.match(r"(a+)+$", "a" * 40 + "b")))
        case ["none"]: return None
        case ["edit"]:
            extra_info["latent"]["num_spans"] += 1
            return extra_info["latent"]["num_spans"]
        case ["count"]: return len(calls)
        case ["pid"]: return os.getpid()
        case ["meet", folder, number]:
            pathlib.Path(folder, str(os.getpid())).touch()
            while len(os.listdir(folder)) < int(number):
                time.sleep(0.01)
            return 1.0
        case ["child", path]:
            child = subprocess.Popen(["sleep", "600"])
            pathlib.Path(path).write_text(str(child.pid))
            child.wait()
async def judge(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    await asyncio.sleep(0.001)
    return kwargs.get("scale", 1) * len(solution_str)
'''


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("reward") / "mine.py"
    file.write_text(textwrap.dedent(CODE))
    return str(file)


@pytest.fixture
def runner(path, request):
    with RewardRunner(
        [FunctionSpec(path)],
        **{"timeout_s": 60.0, "on_error": "drop", **getattr(request, "param", {})},
    ) as r:
        yield r


def items(*texts):
    return [
        RewardItem("d", t, "abc", {"latent": {"num_spans": 1}}, f"group g, trajectory {i}")
        for i, t in enumerate(texts)
    ]


def test_scores_come_back_in_order(runner):
    results = runner.score_many(items(*(f"score {i}" for i in range(20))))
    assert [r.score for r in results] == list(range(20))
    assert runner.score_many([]) == []
    assert not any(runner.errors.values()) and runner.num_dropped == 0


def test_dict_results_are_reported_by_name(runner):
    result = runner.score(items("dict 0.5")[0])
    assert result.info() == {
        "score": 0.5,
        "length": 3.0,
        "pred": "p",
        "mine": 0.5,
        "dropped": 0.0,
        "reward_error": "",
    }


@pytest.mark.parametrize(
    "text, kind, said",
    [
        ("raise", "exception", "KeyError: 'no such key'"),
        ("exit", "exception", "SystemExit"),
        ("die 3", "exception", "exit code 3"),
        ("none", "type", "NoneType"),
        ("score nan", "nan", "nan"),
        ("score inf", "inf", "inf"),
        ("loop", "timeout", "2 s"),
        # holds the GIL: no signal or thread in that process could end it
        ("regex", "timeout", "2 s"),
    ],
)
def test_each_failure_is_typed_counted_and_costs_no_other_call(path, text, kind, said):
    # where none is to run out the limit is far from what a slow machine needs
    timeout_s = 2.0 if kind == "timeout" else 60.0
    with RewardRunner([FunctionSpec(path)], timeout_s=timeout_s, on_error="drop") as runner:
        results = runner.score_many(items("score 1", text, "score 2", text, "score 3"))
        assert [r.score for r in results if not r.dropped] == [1, 2, 3]
        assert [r.error_kind for r in results] == ["", kind, "", kind, ""]
        assert results[1].terms == {"mine": None} and results[1].info()["dropped"] == 1.0
        assert {name: n for name, n in runner.errors.items() if n} == {
            kind: 2
        } and runner.num_dropped == 2
    with RewardRunner([FunctionSpec(path)], timeout_s=timeout_s) as runner:
        with pytest.raises(RewardError, match="group g, trajectory 1") as caught:
            runner.score_many(items("score 1", text))
        assert (
            caught.value.kind == kind
            and said in str(caught.value)
            and "'mine'" in str(caught.value)
        )
        assert pickle.loads(pickle.dumps(caught.value)).kind == kind


@pytest.mark.parametrize("runner", [{"on_error": "score", "error_score": -2.0}], indirect=True)
def test_policy_score_gives_the_configured_reward(runner):
    results = runner.score_many(items("raise", "score 1"))
    assert [(r.score, r.dropped, r.error_kind) for r in results] == [
        (-2.0, False, "exception"),
        (1.0, False, ""),
    ]
    assert runner.errors["exception"] == 1 and runner.num_dropped == 0


@pytest.mark.parametrize("runner", [{"timeout_s": 2.0}], indirect=True)
def test_a_timeout_kills_the_process_and_what_it_started(runner, tmp_path):
    before = runner.score(items("pid")[0]).score
    assert runner.score(items(f"child {tmp_path / 'pid'}")[0]).error_kind == "timeout"
    assert runner.score(items("pid")[0]).score != before
    for pid in (int(before), int((tmp_path / "pid").read_text())):
        assert _gone(pid), f"process {pid} has survived"


def test_the_process_stays_between_calls(runner):
    assert [runner.score(item).score for item in items("count", "count", "count")] == [1, 2, 3]


def test_functions_cannot_edit_the_row_for_each_other(path):
    item = items("edit")[0]
    with RewardRunner(
        [FunctionSpec(path, term="a"), FunctionSpec(path, term="b", weight=10.0)]
    ) as runner:
        result = runner.score(item)
    assert result.terms == {"a": 2.0, "b": 2.0} and result.score == 22.0
    assert item.extra_info == {"latent": {"num_spans": 1}}


def test_asynchronous_functions_and_kwargs(path):
    with RewardRunner([FunctionSpec(path, "judge", kwargs={"scale": 3})]) as runner:
        assert [r.terms for r in runner.score_many(items("ab", "abc"))] == [
            {"judge": 6.0},
            {"judge": 9.0},
        ]


def test_several_processes_run_side_by_side_and_keep_order(path, tmp_path):
    meet = f"meet {tmp_path} 3"  # returns when three processes are in it at once
    with RewardRunner([FunctionSpec(path)], num_processes=3) as runner:
        results = runner.score_many(items(meet, "score 5", meet, "score 6", meet, "score 7"))
        assert [r.score for r in results] == [1, 5, 1, 6, 1, 7]
        with ThreadPoolExecutor(8) as pool:
            scores = list(
                pool.map(lambda i: runner.score(items(f"score {i}")[0]).score, range(40))
            )
        assert scores == list(range(40))


def test_what_functions_print_is_not_mistaken_for_results(path, capfd):
    with RewardRunner([FunctionSpec(path)]) as runner:
        assert runner.score(items("score 1")[0]).score == 1
    captured = capfd.readouterr()
    assert captured.out == "" and "noise on stdout" in captured.err


@pytest.mark.parametrize("text", ["idle", "regex"])
def test_a_child_whose_parent_was_killed_ends(path, text):
    """Idle, or in a call that holds the GIL: the parent is SIGKILLed, so it can kill nobody."""
    code = f"""
import os, signal
from grpo_latent.rewards.process import Call, RewardProcess
from grpo_latent.rewards.functions import FunctionSpec
process = RewardProcess([FunctionSpec({path!r})], 0.2)
print(process._child.pid, flush=True)
if {text!r} != "idle":
    arguments = dict(data_source="", solution_str={text!r}, ground_truth="", extra_info={{}})
    process._send([Call(0, arguments)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=600
    )
    assert _gone(int(parent.stdout))


@pytest.mark.parametrize("value", [lambda: 0, iter([])], ids=["function", "iterator"])
def test_rows_that_cannot_be_sent_are_an_error(runner, value):
    with pytest.raises(DataError, match="cannot be sent"):
        runner.score(
            RewardItem(
                "d",
                "score 1",
                "x",
                {"field": value} if callable(value) else {"f": (x for x in value)},
            )
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"timeout_s": "30"}, "timeout_s"),
        ({"on_error": "ignore"}, "on_error"),
        ({"error_score": float("nan")}, "error_score"),
        ({"error_score": None}, "error_score"),
        ({"num_processes": 0}, "num_processes"),
        ({"num_processes": True}, "num_processes"),
    ],
)
def test_malformed_settings(path, settings, message):
    with pytest.raises(ConfigError, match=f"latent.reward.{message}"):
        RewardRunner([FunctionSpec(path)], **settings)


def test_functions_that_do_not_load_are_an_error_at_once(path, tmp_path):
    with pytest.raises(ConfigError, match="no function 'absent'"):
        RewardRunner([FunctionSpec(path, "absent")])
    (tmp_path / "hang.py").write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(RewardError, match="did not start") as caught:
        RewardProcess([FunctionSpec(str(tmp_path / "hang.py"))], 1.0, start_timeout_s=1.0)
    assert caught.value.kind == "timeout"
    (tmp_path / "die.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(RewardError, match="exit code 5") as caught:
        RewardProcess([FunctionSpec(str(tmp_path / "die.py"))], 1.0)


def _gone(pid, within_s=60.0):
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # a zombie whose parent has not fetched its exit code is gone, too
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.05)
    return False
