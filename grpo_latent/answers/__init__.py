"""What an answer is under its typesetting, and when two answers are the same.

    marks.py    peel, unmark       takes marks off: bold, maths, quotes, brackets, the full stop
    units.py    parse_unit         words beside a number -> a quantity's unit
    values.py   read_value         the number that a text is, exactly
    reading.py  read               text -> one value and the words beside it, or mere text
    compare.py  same_answer        equal as text, as quantities, or by the caller's algebra

Rewards and evaluation's graders both ask here: a policy is trained on what it is graded by.
"""

from grpo_latent.answers.compare import same_answer
from grpo_latent.answers.marks import peel, unmark

__all__ = ["peel", "same_answer", "unmark"]
