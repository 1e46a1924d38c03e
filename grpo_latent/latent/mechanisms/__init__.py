"""The mechanism axis: what makes a vector the next input. One file a system, one protocol.

    name         latents stand in      fed at a latent step         ends               source
    lvr          spans, by `start`     h (through a head, if any)   N steps            2509.24251
    ilvr         spans between texts   h                            end token, at K    2512.05665
    ivt_lr       slots of the prompt   K image embeddings, then h   n slots            2510.12603
    coconut      slots of the prompt   h                            n slots            2412.06769
    hybrid_gate  beside each token     a gate's mix of token and    at a delimiter     2505.18454
                                       its distribution
    own_slots    slots of the prompt   a learned embedding          n slots            2310.02226

One file here under `@register` adds a mechanism. One of your own is a subclass of `Mechanism`,
`SpanMechanism` or `SlotMechanism` in any module that all processes can import; wherever a name
stands, package.module:Class may stand.
"""

from grpo_latent.common.registry import import_folder
from grpo_latent.latent.mechanisms.coconut import Coconut
from grpo_latent.latent.mechanisms.hidden_source import HiddenSource
from grpo_latent.latent.mechanisms.hybrid_gate import HybridGate
from grpo_latent.latent.mechanisms.ilvr import ILVR
from grpo_latent.latent.mechanisms.ivt_lr import IVTLR
from grpo_latent.latent.mechanisms.lvr import LVR
from grpo_latent.latent.mechanisms.own_slots import OwnSlots
from grpo_latent.latent.mechanisms.protocol import (
    LATENT_CONFIG_FILE,
    POSITIONS,
    UNBOUNDED,
    VISIBILITIES,
    Mechanism,
    Refusal,
)
from grpo_latent.latent.mechanisms.registry import MECHANISMS, register
from grpo_latent.latent.mechanisms.row_states import RowStates
from grpo_latent.latent.mechanisms.slots import SlotMechanism
from grpo_latent.latent.mechanisms.spans import SpanMechanism
from grpo_latent.latent.mechanisms.stored import from_dict, load_mechanism

__all__ = [
    "ILVR",
    "IVTLR",
    "LATENT_CONFIG_FILE",
    "LVR",
    "MECHANISMS",
    "POSITIONS",
    "UNBOUNDED",
    "VISIBILITIES",
    "Coconut",
    "HiddenSource",
    "HybridGate",
    "Mechanism",
    "OwnSlots",
    "Refusal",
    "RowStates",
    "SlotMechanism",
    "SpanMechanism",
    "from_dict",
    "load_mechanism",
    "register",
]

import_folder(__name__, __path__)
