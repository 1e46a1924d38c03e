"""Runs reward functions: loading, a killable process, typed outcomes, weights, a checker.

    functions.py  FunctionSpec, load_function      what to call
    worker.py     the child process                calls it
    process.py    RewardProcess                    sends calls, waits, kills on time-out
    outcome.py    Outcome                          what came back, typed
    combine.py    combine                          outcomes -> one reward and its named terms
    runner.py     RewardRunner                     all of that, and what to do on an error
    view.py       reward_view                      what a reward may see of a trajectory
    check.py      check_function                   tries a function on malformed completions

No verl or ray here, and no torch outside view.py: the child process starts in a tenth of a second.
"""
