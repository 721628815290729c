"""The CPU functions that replace transformers' rotary embedding and RMS norm compute the same."""

import pytest
import torch
from conftest import load_model
from pairs_of_ids import as_data
from test_layouts_agree import FAMILIES, FAMILY_PAIRS, assert_same, computed, family_folder  # noqa: F401 (a fixture)

from open_rm.model import cpu_kernels


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, weight, q, k = (
        torch.randn(*shape, dtype=torch.double, generator=generator, requires_grad=True)
        for shape in ((2, 3, 8), (8,), (1, 2, 3, 4), (1, 1, 3, 4))
    )
    angles = torch.randn(1, 3, 2, dtype=torch.double, generator=generator).repeat(1, 1, 2)
    assert torch.autograd.gradcheck(lambda x, weight: cpu_kernels._RMSNorm.apply(x, weight, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda q, k: cpu_kernels.rotary(q, k, angles.cos(), angles.sin()), (q, k))


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_and_gradients_are_those_of_the_plain_model(family_folder, tokenizer, family):  # noqa: F811
    folder, pairs = family_folder(family), as_data(*FAMILY_PAIRS)
    reference = computed(load_model(folder, tokenizer, layout="shared_prefix"), pairs, "shared_prefix")
    fused = load_model(folder, tokenizer, layout="shared_prefix")
    bound = cpu_kernels.apply(fused.classifier)
    assert_same(computed(fused, pairs, "shared_prefix"), reference, family)
    if family in ("llama", "mistral", "qwen2", "qwen3"):  # two norms and an attention a layer, and the last norm
        layers = fused.classifier.config.num_hidden_layers
        assert bound == layers * (5 if family == "qwen3" else 3) + 1


def test_other_models_of_the_process_stay_plain(family_folder, tokenizer):  # noqa: F811
    folder = family_folder("llama")
    cpu_kernels.apply(load_model(folder, tokenizer, layout="padded").classifier)
    other = load_model(folder, tokenizer, layout="padded").classifier
    assert not any("forward" in vars(module) for module in other.modules())
