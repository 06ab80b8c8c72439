"""The causal LM as a decoder against both versions of transformers: cache, greedy tokens, cross-attention."""

from collections.abc import Callable

import pytest
import torch

from tests.conformance.test_heads import assert_same, class_of, config_of, every_family, ours
from tests.conformance.versions import Reference, both_versions
from xlscale.checkpoint.pretrained import save_pretrained

References = Callable[[str], Reference]


def prompts_of(config, crossed):
    """Three prompts, and what every call gets besides."""
    generator = torch.Generator().manual_seed(5)
    given = {}
    if config.languages:
        given["lang_ids"] = torch.tensor([2, 0, 1])
    if crossed:
        given["encoder_hidden_states"] = torch.randn(3, 4, config.hidden_size, generator=generator)
        given["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    return torch.randint(5, config.vocab_size, (3, 6), generator=generator), given


def loud(config):
    """A model whose next token depends on the tokens so far."""
    model = ours(config, "ForCausalLM")
    with torch.no_grad():
        model.encoder.embeddings.position.weight.mul_(3)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith("norm.weight"):
                parameter.mul_(0.1)
    return model


@both_versions
@every_family
@pytest.mark.parametrize("case", ["causal", "cross"])
def test_cached_steps_give_the_same_logits_and_the_same_cache(reference: References, version, family, case, tmp_path):
    config = config_of(family, case)
    model, (ids, given) = loud(config), prompts_of(config, case == "cross")
    folder = save_pretrained(model, tmp_path / "hub")
    steps = [slice(0, 3), slice(3, 4), slice(4, 6)]
    calls = [
        {"input_ids": ids[:, step], "use_cache": True, **given} | ({"past_key_values": True} if step.start else {})
        for step in steps
    ]
    found = reference(version).load(folder, class_of(family, case), calls)
    past = None
    with torch.no_grad():
        whole = model(ids, **given).logits
        for step, expected in zip(steps, found.calls, strict=True):
            output = model(ids[:, step], past_key_values=past, use_cache=True, **given)
            past = output.past_key_values
            assert_same(output, expected)
            torch.testing.assert_close(output.logits, whole[:, step], atol=1e-5, rtol=0)


@both_versions
@every_family
@pytest.mark.parametrize("case", ["causal", "cross"])
def test_greedy_tokens_are_the_best_of_the_reference_without_a_cache(
    reference: References, version, family, case, tmp_path
):
    config = config_of(family, case)
    model, (prompts, given) = loud(config), prompts_of(config, case == "cross")
    ids = model.generate(prompts, max_new_tokens=10, **given)
    assert torch.equal(ids, model.generate(prompts, max_new_tokens=10, use_cache=False, **given))
    assert len(set(ids[:, 6:].flatten().tolist())) > 3, "the comparison needs tokens that differ"
    folder = save_pretrained(model, tmp_path / "hub")
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, **given}
    best = reference(version).load(folder, class_of(family, case), call).tensors["logits"].argmax(-1)
    for row, best_row in zip(ids.tolist(), best.tolist(), strict=True):
        end = row.index(config.eos_token_id) + 1 if config.eos_token_id in row else len(row)
        assert row[6:end] == best_row[5 : end - 1]
