"""Run by each rank of a launch, all one tensor-parallel group: noise, memory and refusals of split models."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.encoder_cases import CASES, arguments, assert_close, split_model, whole
from xlscale.config_sections import ModelConfig
from xlscale.models.dropout import DropoutKey, KeyedDropout
from xlscale.models.heads import MaskedLM
from xlscale.models.init import init_weights
from xlscale.parallel.tensor_parallel import parallel_parts, split_dim
from xlscale.parallel.topology import Topology, process_groups, world_size_from_environment

Gradients = dict[str, torch.Tensor]


def of_all_ranks(tensor: torch.Tensor, topology: Topology) -> list[torch.Tensor]:
    found = [torch.empty_like(tensor) for _ in range(topology.tp)]
    dist.all_gather(found, tensor.contiguous(), group=topology.tp_group)
    return found


def backward(model: MaskedLM, key: DropoutKey, slot: int) -> tuple[float, Gradients]:
    model.zero_grad()
    key.set(7, slot)
    loss = model(**arguments(model.config)).losses_M.mean()
    torch.manual_seed(dist.get_rank())  # a state that something carries must not matter
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def check_noise(topology: Topology, name: str, sequence_parallel: bool) -> None:
    """What all ranks hold alike gets the same gradient to the bit, and a recomputed layer drops what it dropped."""
    config = replace(CASES[name], hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    reference, key = whole(config), DropoutKey()
    results = []
    for recomputed in (0, 1, 2):
        model = split_model(topology, reference, key, sequence_parallel, recomputed)
        results.append(backward(model, key, slot=0))
        for parameter, gradient in results[-1][1].items():
            if split_dim(parameter) is None:
                first, *others = of_all_ranks(gradient, topology)
                assert all(torch.equal(first, other) for other in others), (name, parameter, recomputed)
    (loss, kept), *again = results
    for other_loss, other in again:
        assert other_loss == loss and other.keys() == kept.keys()
        unlike = [parameter for parameter in kept if not torch.equal(kept[parameter], other[parameter])]
        assert not unlike, (name, sequence_parallel, unlike)
    assert backward(model, key, slot=1)[0] != loss, "another key, the same noise"
    for p_hidden, p_attention in ((0.3, 0.0), (0.0, 0.3)):  # each kind alone is keyed
        alone = replace(config, hidden_dropout_prob=p_hidden, attention_probs_dropout_prob=p_attention)
        other = split_model(topology, whole(alone), key, sequence_parallel, 0)
        assert backward(other, key, 0)[0] == backward(other, key, 0)[0] != backward(other, key, 1)[0]


def check_shares(topology: Topology) -> None:
    """Ranks drop alike what all hold, and each on its own what it alone holds."""
    key, ones = DropoutKey(), torch.ones(4, 64)
    key.set(7, 0)
    for sequence_parallel, site, alike in ((False, 0, True), (True, 0, False), (True, -1, True)):
        dropout = parallel_parts(topology, key, sequence_parallel).dropout(0.5, site)
        assert isinstance(dropout, KeyedDropout)
        first, *others = of_all_ranks(dropout(ones), topology)
        assert all(torch.equal(first, other) == alike for other in others), (sequence_parallel, site)
    with parallel_parts(topology, key).seeded_attention(0):
        first, *others = of_all_ranks(torch.rand(16), topology)
    assert not any(torch.equal(first, other) for other in others)
    first, *others = of_all_ranks(torch.rand(16), topology)
    assert all(torch.equal(first, other) for other in others)


def saved_bytes(model: MaskedLM, given: dict[str, Any]) -> int:
    """Bytes kept for the backward pass, each storage once, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    keep = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)  # or another storage may get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**given)
    return sum(sizes.values())


def check_memory(topology: Topology) -> None:
    """Megatron's formula (arXiv:2205.05198): with sequence parallelism everything in the layers falls to 1 / tp."""
    config = ModelConfig(
        model_type="xlm-roberta-xl", vocab_size=512, hidden_size=64, num_hidden_layers=6, num_attention_heads=8,
        intermediate_size=256, max_position_embeddings=130, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    # Without dropout of the weights the fused kernel runs, on a CPU too, and keeps no [B, N, T, T], as on a GPU.
    ids = torch.randint(3, 512, (4, 128), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(128) % 8 != 0, -100)}
    one = replace(topology, dp=1, tp=1, rank=0)
    reference = MaskedLM(config, parallel_parts(one, DropoutKey()))
    init_weights(reference, config, seed=1)
    alone = saved_bytes(reference, given)
    split, tokens_too = (
        saved_bytes(split_model(topology, reference, DropoutKey(), sequence_parallel, 0), given) / alone
        for sequence_parallel in (False, True)
    )
    print(f"saved for backward: {alone} bytes at tp 1; {split:.4f} of it at tp {topology.tp}, {tokens_too:.4f} with "
          "sequence parallelism", flush=True)  # fmt: skip
    # Not divided: ids and their masks, 1 byte to 8 a token, and the head's input at the masked positions.
    assert 1 / topology.tp <= tokens_too <= 1 / topology.tp + 0.01
    assert split >= 1 / topology.tp + 0.08


def check_collectives(topology: Topology) -> None:
    """Query, key and value share one entry: one sum of gradients for the three."""
    model = split_model(topology, whole(CASES["pre-LN"]), DropoutKey(), False, 0)
    calls, all_reduce = [], dist.all_reduce

    def counting(*given: Any, **named: Any) -> Any:
        calls.append(None)
        return all_reduce(*given, **named)

    dist.all_reduce = counting
    try:
        loss = model(**arguments(model.config)).losses_M.mean()
        forward = len(calls)
        loss.backward()
    finally:
        dist.all_reduce = all_reduce
    layers = model.config.num_hidden_layers
    # Forward: embedding, two a layer, two in the loss. Backward: two a layer, one into the decoder.
    assert (forward, len(calls) - forward) == (1 + 2 * layers + 2, 2 * layers + 1)


def check_other_inputs(topology: Topology) -> None:
    """Vectors in the place of ids, another encoder's states, hidden states and attentions: values and gradients."""
    reference = whole(CASES["decoder"])
    model = split_model(topology, reference, DropoutKey(), True, 0)
    found = []
    for each in (reference, model):
        generator = torch.Generator().manual_seed(3)
        embeds, states = (torch.randn(4, tokens, 32, generator=generator).requires_grad_() for tokens in (8, 6))
        ask = {"output_hidden_states": True, "output_attentions": True, "position_ids": torch.arange(2, 10)[None]}
        out = each.encoder(inputs_embeds=embeds, encoder_hidden_states=states, **ask)
        sum((state * (1 + n)).square().mean() for n, state in enumerate(out.hidden_states)).backward()
        found.append((out, embeds.grad, states.grad))
    (wanted, *wanted_grads), (out, *grads) = found
    for one, other in zip(out.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for one, other in zip(out.attentions, wanted.attentions, strict=True):
        heads = other.shape[1] // topology.tp
        mine = other[:, heads * topology.tp_rank : heads * (topology.tp_rank + 1)]
        torch.testing.assert_close(one, mine, atol=1e-5, rtol=1e-5)
    for one, other in zip(grads, wanted_grads, strict=True):
        assert_close("input", one, other)


def check_refusals(topology: Topology) -> None:
    model = split_model(topology, whole(CASES["pre-LN"]), DropoutKey(), True, 0)
    tokens, padded = topology.tp + 1, 2 * topology.tp
    try:
        model(torch.full((2, tokens), 5))
    except ValueError as error:
        rule = f"{tokens} tokens are not a multiple of parallel.tensor_parallel={topology.tp}"
        assert rule in str(error) and f"pad them to {padded}" in str(error), error
    else:
        raise AssertionError("an odd number of tokens was taken")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_groups(world_size_from_environment()) as topology:
        check_shares(topology)
        for name in ("pre-LN", "post-LN", "xmod-prenorm", "decoder"):
            for sequence_parallel in (False, True):
                check_noise(topology, name, sequence_parallel)
        check_memory(topology)
        check_collectives(topology)
        check_other_inputs(topology)
        check_refusals(topology)
        print("all hold", flush=True)
