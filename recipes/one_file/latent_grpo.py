"""GRPO over latent trajectories, the whole algorithm in one file: torch and transformers alone.

A completion with one latent step (LVR, arXiv 2509.24251), as it is sampled and as it is replayed:

    token    <start>   <latent>   <end>    <answer>   7      </answer>   <eos>
    kind     START     LATENT     END      TEXT       TEXT   TEXT        TEXT
    input    e(start)  head(h)    e(end)   e(token)   e(7)   e(token)    -
    action   yes       no         no       yes        yes    yes         yes

The model writes <start> as it writes any token. What is fed next is no token: it is h, the last
hidden state at <start>, through a small head. After N such steps <end> is placed, and text goes on.
GRPO scores what was *sampled*. A latent is an input: recorded once, and fed again as it was.

    rollout ▸ rewards ▸ advantages within a group ▸ replay with gradient ▸ loss ▸ AdamW

A test holds these equal to the plug-in's (tests/recipes/test_one_file.py). Left out: Ray, FSDP,
resume, vLLM, other treatments of latents, prompts of several lengths, a prompt computed once a
group. The data and the SFT checkpoint that it starts from are the quickstart's:

    ONLY_SFT=1 bash recipes/quickstart/run.sh
    python recipes/one_file/latent_grpo.py outputs/quickstart

Legend: B sequences, P prompts, T positions, M actions of a batch, H hidden size, V vocabulary.
"""

import copy
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from checkpoint_and_data import EDGE, IMAGE, PAD, load_checkpoint, read_questions
from torch import Tensor, nn

NUM_STEPS, NUM_PROMPTS, GROUP_SIZE, MAX_NEW = 60, 32, 8, 10
CLIP, ENTROPY_WEIGHT, KL_WEIGHT, ADVANTAGE_EPS = 0.2, 0.04, 0.05, 1e-4
GAP_BOUND = 1e-3  # nats between rollout and replay; beyond it, something else is replayed
FORM = re.compile(r"\s*<answer>((?:(?!</?answer>).)*)</answer>\s*<\|im_end\|>")

# What a position of a completion is; a prompt's are PROMPT, IMAGE or EDGE (delimiters of the image).
# Masks come from kinds, never from ids: the id at a latent is a placeholder and may be any.
START, LATENT, END, TEXT = range(4, 8)


@dataclass
class Policy:
    """A Qwen2.5-VL with LVR's head, as `python -m grpo_latent.sft` writes it."""

    model: transformers.Qwen2_5_VLForConditionalGeneration
    head: nn.Module  # h -> the vector fed; a replay feeds the record, a constant: no gradient
    tokenizer: transformers.PreTrainedTokenizerBase
    spans: dict  # ids of the span's tokens, steps of a span, spans of a completion

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probs [..., V], in float32 whatever the weights: ratios of bfloat16 are rounding."""
        return self.model.lm_head(hidden).float().log_softmax(-1)


@dataclass
class Batch:
    """Sequences with all that a replay needs. To the model an image token and a latent are the
    same thing: a vector in the place of a token's embedding."""

    ids_BT: Tensor
    kinds_BT: Tensor
    positions_3BT: Tensor  # mRoPE's time, row and column
    vectors_BTH: Tensor  # what is fed at IMAGE and LATENT positions
    answers: list[str]

    def rows(self, rows_B: Tensor) -> "Batch":
        return Batch(
            self.ids_BT[rows_B],
            self.kinds_BT[rows_B],
            self.positions_3BT[:, rows_B],
            self.vectors_BTH[rows_B],
            [self.answers[row] for row in rows_B.tolist()],
        )

    def actions(self) -> tuple[Tensor, ...]:
        """Rows and columns [M] of what the policy chose: text, and to open a span."""
        return ((self.kinds_BT == TEXT) | (self.kinds_BT == START)).nonzero(as_tuple=True)


def attention_bias(kinds_BT: Tensor) -> Tensor:
    """Additive [B, 1, T, T], 0 where row t may look at column s: `latent.visibility=latents_only`.

    Text sees neither the image nor <start>, which does; nor does the last latent of a span: the
    vector fed there, made with the image in sight, is all that passes. A latent before another one
    has to find that in the image, and sees it. (In published models all see everything.)
    """
    is_latent_BT = kinds_BT == LATENT
    is_image_side_BT = (kinds_BT == IMAGE) | (kinds_BT == EDGE) | (kinds_BT == START)
    sees_BT = is_image_side_BT | (is_latent_BT & nn.functional.pad(is_latent_BT[:, 1:], (0, 1)))
    allowed = sees_BT[:, :, None] | ~is_image_side_BT[:, None]
    allowed &= torch.ones_like(allowed).tril()  # and none looks ahead
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]


def forward(policy: Policy, batch: Batch, begin: int, end: int, cache=None) -> Tensor:
    """Hidden states [B, end - begin, H] after the final norm: of rollout and replay alike."""
    part = slice(begin, end)
    kinds_BT = batch.kinds_BT[:, part]
    tokens_BTH = policy.model.get_input_embeddings()(batch.ids_BT[:, part])
    is_vector_BT1 = ((kinds_BT == IMAGE) | (kinds_BT == LATENT))[..., None]
    return policy.model.model.language_model(
        inputs_embeds=torch.where(is_vector_BT1, batch.vectors_BTH[:, part], tokens_BTH),
        attention_mask=attention_bias(batch.kinds_BT)[:, :, part, :end].to(tokens_BTH.dtype),
        position_ids=batch.positions_3BT[..., part],
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


@torch.no_grad()
def rollout(policy: Policy, batch: Batch, greedy=False, shuffle=False) -> Tensor:
    """Writes completions into the batch; the log-probs [M] of what was sampled.

    `shuffle` feeds each row the latents of the row before: do answers depend on their own?
    """
    spans, config, eos_id = policy.spans, policy.model.config, policy.tokenizer.eos_token_id
    # An image token would ask for an image that is not there; <latent> and <end> are placed. They
    # stay in the log-probs: a ratio needs probabilities that a replay can make.
    banned = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    banned += [config.vision_end_token_id, spans["latent_id"], spans["end_id"]]
    num_prompt = batch.ids_BT.shape[1] - MAX_NEW
    batch.kinds_BT[:, num_prompt] = TEXT
    log_probs_BT = torch.zeros(batch.ids_BT.shape)
    latents_left_B = torch.zeros(len(batch.answers), dtype=torch.long)
    spans_left_B = torch.full_like(latents_left_B, spans["max_spans"])
    cache = transformers.DynamicCache(config=config.get_text_config())
    for t in range(num_prompt, num_prompt + MAX_NEW):
        hidden_BH = forward(policy, batch, cache.get_seq_length(), t, cache)[:, -1]
        log_probs_BV = policy.log_probs(hidden_BH)
        allowed_BV = log_probs_BV.clone()
        allowed_BV[:, banned] = -torch.inf
        allowed_BV[spans_left_B == 0, spans["start_id"]] = -torch.inf
        token_B = allowed_BV.argmax(-1)
        if not greedy:
            token_B = torch.multinomial(allowed_BV.exp(), 1)[:, 0]
        kind_B = batch.kinds_BT[:, t]  # as planned at t - 1; a view, so that it writes through
        kind_B[(kind_B == TEXT) & (token_B == spans["start_id"])] = START
        token_B[kind_B == LATENT] = spans["latent_id"]
        token_B[kind_B == END] = spans["end_id"]
        batch.ids_BT[:, t] = token_B
        batch.vectors_BTH[:, t] = policy.head(hidden_BH).roll(int(shuffle), 0)
        log_probs_BT[:, t] = log_probs_BV.gather(1, token_B[:, None])[:, 0]
        # plan t + 1: within a span nothing is sampled, so neither <eos> nor a word can leave it
        spans_left_B -= (kind_B == START).long()
        latents_left_B -= (kind_B == LATENT).long()
        latents_left_B[kind_B == START] = spans["steps"]
        is_in_span_B = (kind_B == START) | (kind_B == LATENT)
        is_over_B = (kind_B == PAD) | ((kind_B == TEXT) & (token_B == eos_id))
        next_B = torch.where(is_in_span_B, torch.where(latents_left_B > 0, LATENT, END), TEXT)
        if t + 1 < batch.ids_BT.shape[1]:
            batch.kinds_BT[:, t + 1] = next_B.masked_fill(is_over_B, PAD)
    return log_probs_BT[batch.actions()]


def replay(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [M] of the actions: the hidden state at t - 1 predicts t."""
    rows_M, columns_M = batch.actions()
    hidden_BTH = forward(policy, batch, 0, batch.ids_BT.shape[1])
    log_probs_MV = policy.log_probs(hidden_BTH[rows_M, columns_M - 1])
    log_probs_M = log_probs_MV.gather(1, batch.ids_BT[rows_M, columns_M][:, None])[:, 0]
    return log_probs_M, -(log_probs_MV.exp() * log_probs_MV).sum(-1)


def rewards(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """1 for the right digit and 0.1 for the form; and whether the digit is right: both [B]."""
    scores, correct = [], []
    for ids_T, kinds_T, answer in zip(batch.ids_BT, batch.kinds_BT, batch.answers, strict=True):
        match = FORM.fullmatch(str(policy.tokenizer.decode(ids_T[kinds_T == TEXT])))
        found = match.group(1).strip() if match else ""
        begins = kinds_T[kinds_T >= START][0] == START  # nothing is written before the span
        correct.append(float(found == answer))
        scores.append(correct[-1] + 0.1 * float(found != "" and begins))
    return torch.tensor(scores), torch.tensor(correct)


def advantages(rewards_B: Tensor) -> Tensor:
    """How much better than its group: (r - mean) / (std + eps), [B]."""
    rewards_PG = rewards_B.double().view(-1, GROUP_SIZE)  # so that equal rewards come out as 0
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return (centred_PG / (rewards_PG.std(1, keepdim=True) + ADVANTAGE_EPS)).flatten().float()


def loss(log_probs_M, old_M, reference_M, entropies_M, advantages_M) -> Tensor:
    """Clipped ratio, KL to the reference (k3) and an entropy bonus: a mean over all actions."""
    ratio_M = (log_probs_M - old_M).exp()
    clipped_M = ratio_M.clamp(1 - CLIP, 1 + CLIP)
    policy_M = -torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M)
    delta_M = (reference_M - log_probs_M).clamp(-20, 20)
    kl_M = delta_M.exp() - delta_M - 1
    return (policy_M + KL_WEIGHT * kl_M - ENTROPY_WEIGHT * entropies_M).mean()


def step_loss(policy, reference, batch: Batch, sampled_M: Tensor, rewards_B: Tensor) -> Tensor:
    """The loss of one update on a rollout, with gradient."""
    log_probs_M, entropies_M = replay(policy, batch)
    gap = (log_probs_M - sampled_M).abs().max().item()
    if gap > GAP_BOUND:
        raise ValueError(f"rollout and replay differ by {gap:.1e} nats, expected <= {GAP_BOUND}")
    with torch.no_grad():
        reference_M, _ = replay(reference, batch)
    advantages_M = advantages(rewards_B)[batch.actions()[0]]
    # one update a rollout: the policy that acted is the one that learns, and each ratio is 1
    return loss(log_probs_M, log_probs_M.detach(), reference_M, entropies_M, advantages_M)


def accuracy(policy: Policy, prompts: Batch, shuffle: bool = False) -> float:
    batch = prompts.rows(torch.arange(len(prompts.answers)))
    rollout(policy, batch, greedy=True, shuffle=shuffle)
    return rewards(policy, batch)[1].mean().item()


def make_optimizer(parameters):
    optimizer = torch.optim.AdamW(parameters, 3e-4, betas=(0.9, 0.98), weight_decay=0.0)
    return optimizer, transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=5, num_training_steps=NUM_STEPS, min_lr_rate=0.1
    )


def main(quickstart: Path) -> None:
    torch.manual_seed(0)
    folder = quickstart / "sft" / "model"
    policy = Policy(*load_checkpoint(folder))
    reference = copy.deepcopy(policy)
    train = Batch(*read_questions(policy, folder, quickstart / "data/train_rl.parquet", MAX_NEW))
    held_out = Batch(*read_questions(policy, folder, quickstart / "data/heldout.parquet", MAX_NEW))
    print(f"held-out accuracy {accuracy(policy, held_out):.3f}")
    optimizer, schedule = make_optimizer(policy.model.parameters())
    order = torch.randperm(len(train.answers)).split(NUM_PROMPTS)
    for step, rows_P in enumerate(order[:NUM_STEPS], 1):
        batch = train.rows(rows_P.repeat_interleave(GROUP_SIZE))
        sampled_M = rollout(policy, batch)
        rewards_B, correct_B = rewards(policy, batch)
        optimizer.zero_grad()
        step_loss(policy, reference, batch, sampled_M, rewards_B).backward()
        nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        print(f"step {step}/{NUM_STEPS}  accuracy of the rollouts {correct_B.mean():.3f}")
    print(f"held-out accuracy {accuracy(policy, held_out):.3f}")
    print(f"with another question's latents {accuracy(policy, held_out, shuffle=True):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
