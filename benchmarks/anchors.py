"""How attention and whole models of others are called, to measure beside ours.

flashdeberta and disentangled-flash are packages of Triton kernels; both follow transformers' rule of buckets, so beyond
the reach only their speed can be compared. Neither is needed by anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from benchmarks.interleaved import Case, Unable

Attention = Callable[[Tensor, Tensor], Tensor]
"""Context [rows, length, width] of states, which are queries, keys and values, and of the relative table's rows."""


def seen_pairs(segments: Tensor) -> Tensor:
    """Which tokens see which, as transformers' encoder takes it, [rows, 1, length, length]."""
    return (segments.unsqueeze(1) == segments.unsqueeze(2)).unsqueeze(1)


def boundaries(segments: Tensor) -> list[int]:
    """Where the documents of rows without padding begin among all tokens, and where the last one ends."""
    is_start = torch.ones_like(segments, dtype=torch.bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return [*is_start.flatten().nonzero().flatten().tolist(), segments.numel()]


def longest(bounds: list[int]) -> int:
    """Tokens of the longest document."""
    return max(end - start for start, end in pairwise(bounds))


def plain_attention(config: DebertaV2Config, case: Case) -> Attention:
    """Of transformers, eager."""
    attention = DisentangledSelfAttention(config).train()
    for name in ("query_proj", "key_proj", "value_proj"):
        setattr(attention, name, nn.Identity())
    seen = seen_pairs(case.segments)
    return lambda states, table: attention(states, seen, rel_embeddings=table)[0]


def compiled_attention(config: DebertaV2Config, case: Case) -> Attention:
    """Of transformers, by torch.compile."""
    torch._dynamo.reset()  # each case is compiled for its own shapes
    return torch.compile(plain_attention(config, case), dynamic=False)


def flashdeberta_attention(config: DebertaV2Config, case: Case) -> Attention:
    """Of flashdeberta, padded or by documents."""
    from flashdeberta.ops.flash_attention import flash_attention_with_disentangled
    from flashdeberta.ops.flash_attention_varlen import flash_attention_with_disentangled_varlen

    need_gpu(case)
    if config.attention_probs_dropout_prob:
        raise Unable("it has no dropout of attention")
    num_heads, buckets, reach = config.num_attention_heads, config.position_buckets, config.max_relative_positions
    scale = 1 / math.sqrt(3 * config.hidden_size // num_heads)
    bounds = boundaries(case.segments)
    starts = torch.tensor(bounds, dtype=torch.int32, device=case.segments.device)

    def attend(states: Tensor, table: Tensor) -> Tensor:
        rows = table.unflatten(-1, (num_heads, -1)).transpose(0, 1).contiguous().unsqueeze(0)
        heads = states.unflatten(-1, (num_heads, -1))
        if case.is_packed:
            tokens = heads.flatten(0, 1)
            context = flash_attention_with_disentangled_varlen(
                tokens, tokens, tokens, rows, rows, starts, starts, longest(bounds), longest(bounds), False, scale,
                buckets, reach,
            )  # fmt: skip
            return context.flatten(1).view_as(states)
        heads = heads.transpose(1, 2).contiguous()
        context = flash_attention_with_disentangled(heads, heads, heads, None, rows, rows, False, scale, buckets, reach)
        return context.transpose(1, 2).flatten(2)

    return attend


def disentangled_flash_attention(config: DebertaV2Config, case: Case) -> Attention:
    """Of disentangled-flash, padded or by documents."""
    from disentangled_flash.packed import validate_cu_seqlens
    from disentangled_flash.training.attention import TritonTrainingDisentangledSelfAttention

    need_gpu(case)
    attention = TritonTrainingDisentangledSelfAttention(config, assume_unpadded=True).train()
    for name in ("query_proj", "key_proj", "value_proj"):
        setattr(attention, name, nn.Identity())
    attention._project_qkv = lambda states: (states, states, states)
    if not case.is_packed:
        return lambda states, table: attention(states, case.segments, rel_embeddings=table)[0]
    bounds = torch.tensor(boundaries(case.segments), dtype=torch.int32, device=case.segments.device)
    documents = validate_cu_seqlens(bounds, case.segments.numel())

    def attend(states: Tensor, table: Tensor) -> Tensor:
        context, _ = attention.forward_packed(states.flatten(0, 1), bounds, rel_embeddings=table, packed_info=documents)
        return context.view_as(states)

    return attend


def need_gpu(case: Case) -> None:
    """Raise Unable on a CPU."""
    if case.segments.device.type != "cuda":
        raise Unable("it needs a GPU")


ATTENTIONS = {
    "transformers": plain_attention,
    "compiled": compiled_attention,
    "flashdeberta": flashdeberta_attention,
    "disentangled-flash": disentangled_flash_attention,
}


def fresh_model(config: DebertaV2Config, case: Case) -> DebertaV2ForMaskedLM:
    """Of transformers, on the case's device, with the same weights in every call."""
    torch.manual_seed(1)
    with case.segments.device:
        model = DebertaV2ForMaskedLM(config)
    return model.to(case.dtype).train()


def plain_model(config: DebertaV2Config, case: Case) -> nn.Module:
    """Of transformers, eager."""
    model = fresh_model(config, case)
    # The embeddings take no mask of pairs, the encoder does.
    seen = seen_pairs(case.segments)
    model.deberta.encoder.get_attention_mask = lambda _mask: seen
    return model


def compiled_model(config: DebertaV2Config, case: Case) -> nn.Module:
    """Of transformers, by torch.compile."""
    torch._dynamo.reset()
    return torch.compile(plain_model(config, case), dynamic=False)


def flashdeberta_model(config: DebertaV2Config, case: Case) -> nn.Module:
    """Of transformers, with flashdeberta's attention."""
    from flashdeberta import FlashDisentangledSelfAttention

    need_gpu(case)
    if case.is_packed:
        raise Unable("its model takes one document a row")
    if config.attention_probs_dropout_prob:
        raise Unable("it has no dropout of attention")
    model = plain_model(config, case)
    model.deberta.encoder.get_attention_mask = lambda _mask: None  # no padding: it need not look
    for layer in model.deberta.encoder.layer:
        layer.attention.self.__class__ = FlashDisentangledSelfAttention
    return model


def disentangled_flash_model(config: DebertaV2Config, case: Case) -> nn.Module:
    """Of transformers, with disentangled-flash's encoder."""
    from disentangled_flash import DebertaV2OptimizedEncoder, enable_deberta_training
    from disentangled_flash.packed import validate_cu_seqlens

    need_gpu(case)
    model = fresh_model(config, case)
    enable_deberta_training(model.deberta, assume_unpadded=True)
    if not isinstance(model.deberta.encoder, DebertaV2OptimizedEncoder):
        raise Unable("it has no kernel for this model, and leaves transformers' in place")
    if not case.is_packed:
        return model
    encoder = model.deberta.encoder
    bounds = torch.tensor(boundaries(case.segments), dtype=torch.int32, device=case.segments.device)
    documents = validate_cu_seqlens(bounds, case.segments.numel())

    def encode(states: Tensor, *_arguments: object, **_options: object) -> BaseModelOutput:
        encoded = encoder.forward_packed(states.flatten(0, 1), bounds, packed_info=documents).last_hidden_state
        return BaseModelOutput(encoded.view_as(states), (encoded.view_as(states),))

    encoder.forward = encode
    return model


MODELS = {
    "transformers": plain_model,
    "compiled": compiled_model,
    "flashdeberta": flashdeberta_model,
    "disentangled-flash": disentangled_flash_model,
}
