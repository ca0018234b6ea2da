"""Small language models with random weights, and real text for them: the documentation behind help(), byte by byte.

Nothing is downloaded: a byte is a token. Knows transformers; must not know of optimizers.
"""

import copy
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

CONTEXT = 32


def text_windows(count, length=CONTEXT):
    """So many pieces of the text, each a dict as models of transformers take it."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()[: count * length]
    ids = torch.tensor(list(text)).view(count, length)
    return [{"input_ids": row, "labels": row} for row in ids]


def gpt2(layers=2, width=32, dropout=0.1):
    config = GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def llama(layers=2, width=32):
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


MODELS = {"GPT-2": gpt2, "Llama": llama}


def copies(model, count):
    """Equal models."""
    return [copy.deepcopy(model) for _ in range(count)]


def weights(model):
    """The params by name, as they are now."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same_weights(ours, theirs):
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing
