"""Checks that users run on their own plug-ins: nothing of our test folder is needed.

from grpo_latent.testing import check_mechanism

def test_my_mechanism():
    check_mechanism(MyMechanism, steps=4)
"""

from grpo_latent.testing.conformance import CHECKS, Outcome, check_mechanism

__all__ = ["CHECKS", "Outcome", "check_mechanism"]
