"""float8: what it computes, what it leaves alone, and that training and evaluation see the right one of both.

On a CPU torch._scaled_mm multiplies 8-bit numbers too, so that everything but the GPU's own kernels is tried here.
"""

import re

import pytest
import torch
import transformers
import triton
from conftest import REPOSITORY, in_a_process, load_model, on_gpu, read_pairs
from pairs_of_ids import as_data
from test_layouts_agree import CPU, FAMILIES, FAMILY_PAIRS, fed
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from open_rm.batching.rules import LAYOUTS
from open_rm.errors import UserError
from open_rm.flags import ModelFlags
from open_rm.model import families, float8, kernels
from open_rm.model.reward_model import RewardModel
from open_rm.training.losses import ranking_loss

# Relative, of a product's norm. Rounding to 3 bits of mantissa is 2.6 % of an element on average (uniform within half a
# spacing) and 2^-4 at most; two factors make 3.7 %. Measured: 3.7 % of the output and of the input's gradient.
PRODUCT = 0.045
BFLOAT16 = 2.0**-8  # rounding of a result


def layer(ins: int, outs: int, *, bias: bool = False, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(ins, outs, bias=bias, dtype=torch.bfloat16)


def in_float8(module: nn.Linear) -> nn.Linear:
    module.__class__ = float8.Float8Linear
    return module


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    """Numbers whose size differs from row to row, as activations' does."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.rand(*shape[:-1], 1, generator=generator) * 10
    return x.bfloat16().requires_grad_()


def products(module: nn.Linear, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """output, gradient of the input, gradient of the weight"""
    x = x.detach().requires_grad_()
    module.zero_grad()
    output = module(x)
    output.backward(gradient)
    return [output.detach(), x.grad, module.weight.grad.clone()]


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows rounded to e4m3 by its definition: 1 + 3 bits of mantissa, exponents from -6 on, 448 at most."""
    x = x.double()
    largest = x.abs().amax(1, keepdim=True).clamp(min=2.0**-100)
    scale = 2.0 ** torch.floor(torch.log2(448 / largest))
    exponent = torch.floor(torch.log2((x * scale).abs().clamp(min=2.0**-6)))
    spacing = 2.0 ** (exponent - 3)
    return torch.round(x * scale / spacing) * spacing / scale  # torch rounds to even


# ---------------------------------------------------------------- one layer


def test_products_are_float8s_rounding_away_from_those_of_float32():
    x, gradient, module = inputs(3, 37, 96), inputs(3, 37, 160, seed=2).detach(), layer(96, 160)
    wide = nn.Linear(96, 160, bias=False)
    wide.weight.data = module.weight.detach().float()
    reference = products(wide, x.float(), gradient.float())
    output, of_x, of_weight = products(in_float8(module), x, gradient)
    # no element further than both factors' largest rounding allows (and subnormal ones', which are 2^-14 of the row's largest)
    for result, right, a, b in (
        (output, reference[0], x, module.weight),
        (of_x, reference[1], gradient, module.weight.t()),
    ):
        a, b = a.detach().float(), b.detach().float()
        bound = (2 * 2**-4 + 2**-8) * (a.abs() @ b.abs().t()) + 2**-13 * a.shape[-1] * (
            a.abs().amax(-1, keepdim=True) * b.abs().amax(-1)
        )
        assert ((result.float() - right).abs() <= bound + BFLOAT16 * right.abs()).all()
        apart = ((result.float() - right).norm() / right.norm()).item()
        assert 0.01 < apart < PRODUCT  # and it is 8 bits that were computed with
    assert (of_weight.float() - reference[2]).norm() < BFLOAT16 * reference[2].norm()


@pytest.mark.parametrize(("tokens", "ins", "outs"), [(1, 16, 32), (37, 96, 160), (64, 256, 48)])
def test_products_are_those_of_rounded_factors(tokens, ins, outs):
    x, gradient, module = inputs(tokens, ins), inputs(tokens, outs, seed=2).detach(), in_float8(layer(ins, outs))
    output, of_x, of_weight = products(module, x, gradient)
    weight = module.weight.detach()
    for result, right in (
        (output, rounded(x.detach()) @ rounded(weight).t()),
        (of_x, rounded(gradient) @ rounded(weight.t()).t()),
        (of_weight, gradient.double().t() @ x.detach().double()),
    ):
        # sums in float32, a result in bfloat16
        assert torch.allclose(result.double(), right, rtol=BFLOAT16, atol=1e-6 * right.abs().max().item())


def test_a_bias_is_added_and_trained_as_ever():
    x, gradient = inputs(5, 32), inputs(5, 48, seed=2).detach()
    plain, ours = layer(32, 48, bias=True), in_float8(layer(32, 48, bias=True))
    without = in_float8(layer(32, 48, bias=True))
    without.bias = None
    assert torch.equal(products(ours, x, gradient)[0], products(without, x, gradient)[0] + ours.bias)
    products(plain, x, gradient)
    assert torch.allclose(ours.bias.grad, plain.bias.grad, rtol=BFLOAT16)


def test_a_token_does_not_depend_on_its_neighbours():
    """A scale for the whole tensor would: the largest number of a micro-batch would decide how all others are rounded."""
    x, gradient, module = inputs(40, 64), inputs(40, 96, seed=2).detach(), in_float8(layer(64, 96))
    output, of_x, _ = products(module, x, gradient)
    with torch.no_grad():
        x[5:] *= 1000
        gradient[5:] *= 1000
    beside, of_x_beside, _ = products(module, x, gradient)
    assert torch.equal(output[:5], beside[:5]) and torch.equal(of_x[:5], of_x_beside[:5])
    assert not torch.equal(output[5:], beside[5:])


def test_what_is_no_number_stays_in_its_row_and_zeros_stay_zeros():
    x, module = inputs(6, 64).detach(), in_float8(layer(64, 32))
    before = module(x)
    x[1, 3], x[2, 4], x[3, 5], x[4] = torch.nan, torch.inf, -torch.inf, 0.0
    after = module(x)
    assert not after[1:4].isfinite().any()
    assert (after[4] == 0).all()
    assert torch.equal(after[[0, 5]], before[[0, 5]])


def test_numbers_of_any_size_keep_their_precision():
    values = inputs(4, 64).detach().float()
    for size in (1e-25, 1e-12, 1.0, 1e12, 1e35):
        x = (values * size).bfloat16()
        eight, inverse = float8.to_float8(x)
        apart = (eight.double() * inverse.double() - x.double()).norm() / x.double().norm()
        assert apart < 0.03 and inverse.isfinite().all(), size
    # what a scale of its own would not be finite for becomes zero
    eight, inverse = float8.to_float8(torch.full((1, 16), 1e-38, dtype=torch.bfloat16))
    assert (eight.float() == 0).all() and inverse.isfinite().all()


# ---------------------------------------------------------------- a whole model

LINEAR = {
    "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    "phi3": "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj",
    "gpt_neox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
}


def made(family: str = "llama", **changes) -> RewardModel:
    """A model of two layers with random weights, in bfloat16."""
    torch.manual_seed(0)
    config = FAMILIES[family](num_labels=1, **changes)
    classifier = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    return RewardModel(classifier).train()


def rewards(model: RewardModel, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(5, 500, (4, 24), generator=torch.Generator().manual_seed(seed))
    index = torch.arange(4) * 24 + 23
    return model(input_ids=ids, reward_index=index, read_index=index, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("family", LINEAR)
def test_all_but_the_last_layers_matrices_compute_in_float8_and_nothing_else(family):
    model = made(family)
    kinds = {name: type(module) for name, module in model.named_modules()}
    parameters, state = dict(model.named_parameters()), model.state_dict()
    line = float8.apply(model, worth=0)
    changed = {name for name, module in model.named_modules() if type(module) is not kinds[name]}
    prefix = f"classifier.{model.backbone_name}.layers.0"
    assert changed == {f"{prefix}.{name}" for name in LINEAR[family].split()}
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert {key: (value.dtype, value.shape) for key, value in model.state_dict().items()} == {
        key: (value.dtype, value.shape) for key, value in state.items()
    }
    share = sum(parameters[f"{name}.weight"].numel() for name in changed) / sum(p.numel() for p in parameters.values())
    assert f"{len(changed)} linear layers with {share:.0%} of the weights" in line


def test_layers_that_gain_are_the_large_ones_of_sizes_that_kernels_take():
    def gains(ins: int, outs: int) -> bool:
        return float8._gains(nn.Linear(ins, outs, device="meta"), float8.WORTH)

    # Llama 8B: queries and outputs, the MLP; 1B: the same
    assert gains(4096, 4096) and gains(4096, 14336) and gains(14336, 4096) and gains(2048, 2048) and gains(2048, 8192)
    # keys and values of grouped attention, small models
    assert not gains(4096, 1024) and not gains(2048, 512) and not gains(896, 896)
    assert not gains(4096 + 8, 14336) and not gains(4096, 14336 + 8)


def test_a_model_without_large_layers_is_refused():
    with pytest.raises(
        UserError, match="--float8 is not possible: no linear layer before the last decoder layer is large"
    ):
        float8.apply(made())


def test_evaluation_and_plain_compute_as_before_and_training_in_float8():
    model = made()
    before = rewards(model)
    float8.apply(model, worth=0)
    ours = rewards(model)
    assert not torch.equal(ours, before)
    with float8.plain(model):
        assert torch.equal(rewards(model), before)
    assert torch.equal(rewards(model), ours)
    with pytest.raises(KeyError), float8.plain(model):
        raise KeyError
    assert torch.equal(rewards(model), ours)
    model.eval()
    assert torch.equal(rewards(model), before)


def test_hooks_and_who_replaces_an_mlp_see_the_same_modules(monkeypatch):
    """Liger's MLP takes the place of the module's forward and calls its linear layers."""
    from liger_kernel.transformers import swiglu

    model, seen = made(), []
    first = model.classifier.model.layers[0]
    first.mlp.gate_proj.register_forward_pre_hook(lambda module, args: seen.append(type(module)))
    float8.apply(model, worth=0)
    before = rewards(model)
    assert seen == [float8.Float8Linear]
    monkeypatch.setattr(swiglu, "_swiglu_dispatch", lambda a, b: nn.functional.silu(a) * b)  # Triton's, for a GPU alone
    first.mlp.forward = swiglu.LigerSwiGLUMLP.forward.__get__(first.mlp)
    assert torch.equal(rewards(model), before)
    assert seen == [float8.Float8Linear] * 2


def test_recomputed_activations_give_the_same_gradients():
    kept, recomputed = made(), made()
    for model in (kept, recomputed):
        float8.apply(model, worth=0)
    recomputed.classifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (kept, recomputed):
        rewards(model).sum().backward()
    for (name, p), q in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name


def test_zero_3_gives_the_gradients_of_zero_2_and_can_take_the_weights_away():
    """Between forward and backward their memory is free: what is kept for the backward pass is no view of it."""
    script = f"""
import json, torch
from deepspeed.utils import safe_get_full_grad
from test_float8 import made, rewards
from open_rm.flags import BatchFlags, OptimizerFlags
from open_rm.model import float8
from open_rm.ranks import joined_ranks
from open_rm.training.ds_config import fill_config
from open_rm.training.engine import Engine

found = []
with joined_ranks() as ranks:
    for stage in (2, 3):
        model = made()
        float8.apply(model, worth=0)
        flags = BatchFlags(deepspeed=f"{REPOSITORY}/configs/ds/zero{{stage}}.json")
        config = fill_config(flags, width=32, bf16=True, max_grad_norm=0.0)
        engine = Engine(model, OptimizerFlags(), config, ranks)
        if stage == 3:
            assert model.classifier.model.layers[0].mlp.up_proj.weight.numel() == 0, "the model was not partitioned"
        loss = rewards(engine).sum()
        nodes, seen, kept = [loss.grad_fn], set(), []
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            if node.name() == "_ProductBackward":
                kept.append(node.saved_tensors[1].numel())
        engine.backward(loss, last=True)
        found.append([safe_get_full_grad(parameter).float() for parameter in model.parameters()])
equal = [torch.equal(a, b) for a, b in zip(*found, strict=True)]
print(json.dumps([len(equal), all(equal), kept, max(gradient.abs().max().item() for gradient in found[1])]))
"""
    count, equal, kept, largest = in_a_process(WITH_TESTS + script)
    assert equal and count == 21 and largest > 0.01
    assert kept == [0] * 7


# ---------------------------------------------------------------- training


def bfloat16_model(toy, tokenizer, layout: str) -> RewardModel:
    return load_model(toy / "model", tokenizer, layout=layout).bfloat16()


def test_rewards_are_near_those_of_bfloat16_in_every_layout(toy, tokenizer):
    pairs = as_data(*FAMILY_PAIRS)
    found = {}
    for layout in LAYOUTS:
        model = bfloat16_model(toy, tokenizer, layout)
        float8.apply(model, worth=0)
        for name in ("float8", "bfloat16"):
            model.train(name == "float8")
            (micro,) = (micro for rank in fed(pairs, layout) for micro in rank)
            with torch.no_grad():
                both = torch.stack(micro.sides(model(**micro.batch.inputs(CPU)))[:2], 1)
            found[layout, name] = both[torch.as_tensor(micro.indices).argsort()]
    for layout in LAYOUTS:
        # rewards of 1 or so; measured: 0.08, where bfloat16 is 0.013 away from float32
        assert 0.01 < (found[layout, "float8"] - found[layout, "bfloat16"]).abs().max() < 0.15
        # measured: 0.003 with 8 bits, 0.005 in bfloat16. Layouts differ by the order of sums alone
        assert (found[layout, "float8"] - found["padded", "float8"]).abs().max() < 0.015


def test_training_learns_as_in_bfloat16(toy, tokenizer, tmp_path):
    """Measured over three heads and 16 steps: the losses are at most 0.009 apart, those of bfloat16 and float32 0.022."""
    data = read_pairs([toy / "data" / "train.jsonl", "24"], tokenizer, dataset_local_cache_dir=str(tmp_path))
    (micros,) = fed(data, "shared_prefix", max_tokens=2000)
    losses = []
    for in_8_bits in (False, True):
        model = bfloat16_model(toy, tokenizer, "shared_prefix")
        if in_8_bits:
            float8.apply(model, worth=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        losses.append([])
        for _ in range(7):
            loss = torch.zeros(())
            for micro in micros:
                chosen, rejected, _ = micro.sides(model(**micro.batch.inputs(CPU)))
                loss = loss + ranking_loss(chosen, rejected).sum() / len(data)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[1][0] > 0.6 and losses[1][-1] < 0.02


# ---------------------------------------------------------------- when it is refused

CAN = dict(capability=(9, 0), dtype=torch.bfloat16, family="llama", use_peft=False, freeze_backbone=False)


def test_hopper_and_later_in_bfloat16_can():
    assert float8.why_not(**CAN) is None
    for capability in ((9, 0), (10, 0), (12, 0)):
        for family in families.SEGMENTS:
            assert float8.why_not(**CAN | {"capability": capability, "family": family}) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"capability": None}, "need a GPU, Hopper or later .* and there is none"),
        ({"capability": (8, 0)}, "this GPU has 8.0"),
        ({"capability": (8, 9)}, "this GPU has 8.9"),
        ({"dtype": torch.float32}, "goes with --dtype bfloat16, and this run computes in float32"),
        ({"use_peft": True}, "with --use_peft the large matrices are frozen"),
        ({"freeze_backbone": True}, "with --freeze_backbone the large matrices are frozen"),
        ({"family": "modernbert"}, "not known for modernbert; it is for llama, mistral"),
        ({"family": "gpt2"}, "not known for gpt2"),
    ],
)
def test_why_not_names_what_is_in_the_way(changed, reason):
    assert re.search(reason, float8.why_not(**CAN | changed))


# ---------------------------------------------------------------- the kernel of a GPU

WITH_TESTS = f"""
import sys
sys.path[:0] = ["{REPOSITORY}", "{REPOSITORY}/tests", "{REPOSITORY}/tests/model"]
"""


def test_the_kernel_scales_as_torch_does():
    """Under Triton's interpreter, which rounds halves to float8 away from zero, so that scaled numbers are compared before."""
    script = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import json, torch
from test_float8 import odd_matrices
from open_rm.model import float8
equal = []
for x in odd_matrices():
    eight, inverse = float8.to_float8(x)
    scaled, own = float8._in_one_kernel(x, torch.float32)
    near = scaled.nan_to_num(0).clamp(-448, 448).to(torch.float8_e4m3fn).float(), eight.float().nan_to_num(0)
    equal.append(torch.equal(inverse, own) and torch.equal(*near) and torch.equal(scaled.isnan(), eight.float().isnan()))
x = odd_matrices()[0]
x[1, 3] = torch.nan
equal.append(float8._in_one_kernel(x, torch.float32)[0].isnan().nonzero().tolist() == [[1, 3]])
print(json.dumps(equal))
"""
    assert in_a_process(WITH_TESTS + script) == [True] * (len(odd_matrices()) + 1)


def odd_matrices() -> list[torch.Tensor]:
    """Rows and columns that no tile divides, sizes from the least to the largest, zeros, infinities, a transpose."""
    matrices = [
        inputs(37, 80).detach(),
        inputs(1, 16).detach(),
        inputs(70, 1040).detach(),
        torch.zeros(3, 16, dtype=torch.bfloat16),
        (inputs(5, 48).detach().float() * 1e-36).bfloat16(),
        (inputs(5, 48).detach().float() * 1e35).bfloat16(),
        (inputs(64, 32).detach().float() ** 7).bfloat16(),
    ]
    infinite = inputs(6, 64).detach()
    infinite[1, 3], infinite[2, 4] = torch.inf, -torch.inf
    return matrices + [infinite] + [x.t() for x in matrices]


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernel_compiles_for_hopper_and_blackwell(tmp_path, monkeypatch, capability, transposed):
    """To the instruction that rounds to the nearest even number and does not overflow; no GPU is needed for that."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"TRANSPOSED": transposed, "HEIGHT": 32 if transposed else 4}
    types = {"x": "*bf16", "out": "*fp8e4nv", "inverse": "*fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in float8._kernel.arg_names}
    source = ASTSource(fn=float8._kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.asm["ptx"]


@pytest.mark.gpu
def test_a_gpus_products_are_those_of_the_cpu():
    """Casts bit for bit; products as far apart as the tensor cores' own sums are from float32's."""
    script = """
import json, torch
from test_float8 import in_float8, inputs, layer, odd_matrices, products
from open_rm.model import float8
casts = []
for x in odd_matrices():
    ours = [part.cpu() for part in float8.to_float8(x.cuda())]
    right = float8.to_float8(x)
    casts.append(torch.equal(ours[0].float().nan_to_num(9), right[0].float().nan_to_num(9)) and torch.equal(ours[1], right[1]))
apart = []
for tokens in (1, 37, 512):
    x, gradient, module = inputs(tokens, 1024), inputs(tokens, 2048, seed=2).detach(), in_float8(layer(1024, 2048))
    right = products(module, x, gradient)
    ours = products(module.cuda(), x.cuda(), gradient.cuda())
    apart += [((a.cpu().float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(ours, right, strict=True)]
print(json.dumps([casts, apart]))
"""
    casts, apart = on_gpu(script)
    assert all(casts) and len(casts) == len(odd_matrices())
    assert max(apart) < 2.0**-7


def test_a_run_that_cannot_train_in_float8_is_refused_in_a_sentence(monkeypatch):
    """By what is known of the device, and by trying a small product there: not every GPU takes a scale for each row."""
    given = (transformers.LlamaConfig(), torch.device("cpu"), torch.bfloat16)
    assert kernels.check_float8(ModelFlags(), *given, use_peft=False) is None
    with pytest.raises(UserError, match="--float8 is not possible: 8-bit products need a GPU.*; leave it out"):
        kernels.check_float8(ModelFlags(float8=True), *given, use_peft=False)
    monkeypatch.setattr(kernels, "capability_of", lambda device: (12, 0))
    assert kernels.check_float8(ModelFlags(float8=True), *given, use_peft=False) is None

    def refuses(*_, **__):
        raise RuntimeError("row-wise scaling is not there\nmore")

    monkeypatch.setattr(float8, "_multiply", refuses)
    with pytest.raises(UserError, match="--float8 is not possible: row-wise scaling is not there; leave it out"):
        kernels.check_float8(ModelFlags(float8=True), *given, use_peft=False)
