"""The treatment axis: what RL makes of latent positions. One file a treatment, one protocol.

    name           the rollout feeds       training feeds          the loss has at latents
    mask           h                       what was recorded       nothing
    recompute      h                       the current policy's h  nothing; gradient through text
    gaussian       h + noise               what was recorded       a clipped ratio and a KL
    gaussian_head  h + noise of a width that is learned by the same loss; else as gaussian
    gumbel_soft    top-k token mixture     what was recorded       a clipped ratio and a KL
    vmf            h, turned at random     what was recorded       a clipped ratio and a closed KL

Sources: mask 2509.24251; recompute 2509.24251 and 2511.21395; gaussian 2511.21395 (VLPO);
gumbel_soft 2511.06411; vmf, the von Mises-Fisher distribution.

Any of them takes the latent anchor, a pull of the prediction at each latent position towards the
reference's.

One file here under `@register` adds a treatment. One of your own is a subclass of `Treatment` in
any module that the workers can import: `latent.treatment.name=package.module:Class`, its options
as `+latent.treatment.options.<name>=<value>`.

HRPO's hybrid gate (2505.18454) is no treatment but a mechanism: the input of each sampled token is
composed of its embedding and a recorded vector (MIXED). There the token is the action, so only
`mask` and `recompute` go with such a mechanism: see `Treatment.check`.
"""

from grpo_latent.common.registry import import_folder
from grpo_latent.latent.treatments.mask import Mask
from grpo_latent.latent.treatments.protocol import GRADIENTS, LatentSource, Treatment
from grpo_latent.latent.treatments.registry import TREATMENTS, register
from grpo_latent.latent.treatments.settings import parse_treatment, to_dict
from grpo_latent.latent.treatments.terms import LatentTerms

__all__ = [
    "GRADIENTS",
    "TREATMENTS",
    "LatentSource",
    "LatentTerms",
    "Mask",
    "Treatment",
    "parse_treatment",
    "register",
    "to_dict",
]

import_folder(__name__, __path__)
