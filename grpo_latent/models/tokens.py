"""Adding the latent tokens to a base model's tokenizer, in memory."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_latent_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]
) -> dict[str, int]:
    """Ids of the latent tokens; missing ones are added, and the embeddings grow if needed.

    Args:
        tokens: in the order in which they are added, such as `LVR.published_tokens.values()`.

    The published code renames the input checkpoint's own tokenizer files; nothing on disk is
    touched here.
    """
    tokens = list(tokens)
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": missing}, replace_extra_special_tokens=False
        )
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    # published vocabularies are often padded: there may be rows for the new tokens already
    if len(tokenizer) > weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    vocab = tokenizer.get_vocab()
    return {token: vocab[token] for token in tokens}
