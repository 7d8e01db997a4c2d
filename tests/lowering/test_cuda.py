"""The lowering for CUDA, without a GPU: which kernel each op of a model gets, on fake tensors there, and why not."""

from __future__ import annotations

import functools
import os
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fake_cuda import fake_on_cuda
from tests import tiny_models
from tests.cuda_ops import cases, lone
from tests.fake_cuda import as_on_cuda, quantize_on_cuda, run_on_cuda
from tests.programs import captured, dialect
from zq_compiler import KernelBuildError, kernels
from zq_compiler.batches import Batches
from zq_compiler.capture import capture
from zq_compiler.kernels.cuda import registration
from zq_compiler.lowering import inductor, triton_cuda
from zq_compiler.program import Program, copy_graph, fake_value
from zq_compiler.recipe import load_recipe
from zq_compiler.torch_private import FakeTensorMode

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs without Triton's interpreter")
aten = torch.ops.aten
H100, A100 = 90, 80


@functools.cache
def float_program(family: str) -> Program:
    model, inputs = tiny_models.build(family)
    program = capture(model, (), inputs, load_recipe("w8a8"))
    program.calibration = Batches([inputs])
    return program


@functools.cache
def quantized(family: str, recipe: str) -> Program:
    """A family's tiny model after all passes, its values on CUDA."""
    of_family = float_program(family)
    fresh = {"plan": {}, "history": [], "near_misses": [], "notes": [], "refinements": []}
    return quantize_on_cuda(
        replace(of_family, gm=copy_graph(of_family.gm), recipe=load_recipe(recipe), **fresh)  # type: ignore[arg-type]
    )


def cuda_ops(lowered: inductor.Lowered) -> dict[str, int]:
    targets = (str(node.target) for node in lowered.gm.graph.nodes if node.op == "call_function")
    return dict(Counter(t.split(".")[1] for t in targets if t.startswith("zq_cuda.")))


def inlined(lowered: inductor.Lowered) -> dict[str, str]:
    """Why what is inlined is."""
    return {choice.op: choice.reason for choice in lowered.providers if choice.provider == "inline"}


FUSED = "Inductor fuses it with its neighbours"
NO_KERNEL = "no triton kernel: Inductor fuses it"
NO_FP8 = "compute capability 8.0 has no conversion to FP8"
# What runs of a model under a recipe on an H100, and why the rest is left to Inductor.
EXPECTED: dict[tuple[str, str], tuple[dict[str, int], dict[str, str]]] = {
    ("bert", "w8a8"): (
        dict(norm_quantize=4, int8_linear=12, int8_linear_add=1, quantize_per_token=3, gelu_quantize=2),
        {},
    ),
    ("bert", "w8a8+lorc"): (
        dict(norm_quantize=4, low_rank_hidden=13, int8_linear_low_rank=13, quantize_per_token=3, gelu_quantize=2),
        {"dequantize": NO_KERNEL},
    ),
    ("bert", "hero-m1"): (
        dict(embedding_layer_norm_quantize=1, norm_quantize=3, int8_linear=9, quantize_per_token=1),
        {"int8_embedding": FUSED, "dequantize": NO_KERNEL},
    ),
    ("bert", "hero-m2"): (
        dict(embedding_layer_norm_quantize=1, norm_quantize=3, int8_linear_quantize=8, int8_attention=2, int8_linear=3,
             quantize_per_token=1),
        {"int8_embedding": FUSED, "dequantize": NO_KERNEL},
    ),
    ("bert", "hero-m3"): (
        dict(embedding_layer_norm_quantize=1, norm_quantize=3, int8_linear_quantize=10, int8_attention=2,
             int8_linear_gelu_quantize=2, int8_linear=1, quantize_per_token=1),
        {"int8_embedding": FUSED, "dequantize": NO_KERNEL},
    ),
    ("bert", "hero-m3-tensorrt"): (
        dict(norm_quantize=4, int8_linear_quantize=10, int8_attention=2, int8_linear_gelu_quantize=2, int8_linear=1,
             quantize_per_token=1),
        {"dequantize": NO_KERNEL},
    ),
    ("bert", "w4a8-g128"): (dict(norm_quantize=4, w4a8_linear=13, quantize_per_token=3, gelu_quantize=2), {}),
    ("bert", "w4a4"): (dict(quantize_per_token_int4=9, w4a8_linear=13), {}),
    ("bert", "fp8"): (dict(quantize_per_token_fp8=9, fp8_linear=13), {}),
    ("bert", "fp8-static"): (dict(quantize_static_fp8=2, fp8_linear=13), {"quantize_static_fp8": FUSED}),
    ("bert", "w4a16-g64+lorc"): (dict(weight_only_linear=13, low_rank_hidden=13), {}),
    ("gpt2", "w8a8"): (dict(norm_quantize=4, int8_linear=8, quantize_per_token=2, gelu_quantize=2), {}),
    ("gpt2", "hero-m1"): (dict(norm_quantize=4, int8_linear=4), {"int8_embedding": FUSED}),
    ("gpt2", "w4a8-fp"): (dict(quantize_per_token_fp8=8, fp8_linear=8), {}),
    ("gpt2", "w4a16-g64"): (dict(weight_only_linear=8), {}),
    ("llama", "w8a8"): (
        dict(norm_quantize=4, int8_linear=13, int8_linear_add=1, quantize_per_token=2, silu_mul_quantize=2),
        {},
    ),
    ("llama", "hero-decoder"): (
        dict(int8_embedding=1, norm_quantize=4, int8_linear=11, int8_linear_add=1, quantize_static=4, int8_attention=2,
             int8_linear_quantize=2, silu_mul_quantize=2),
        {"quantize_static": FUSED},
    ),
    ("llama", "w4a8"): (dict(norm_quantize=4, w4a8_linear=14, quantize_per_token=2, silu_mul_quantize=2), {}),
    ("llama", "fp8"): (dict(quantize_per_token_fp8=8, fp8_linear=14), {}),
    ("llama", "w4a16-g64-asym"): (dict(weight_only_linear=14), {}),
}  # fmt: skip


@pytest.mark.parametrize(("family", "recipe"), EXPECTED)
def test_models_run_on_kernels(family, recipe):
    program = quantized(family, recipe)
    lowered = inductor.lower(program, architecture=H100)
    kernels_of, left = EXPECTED[family, recipe]
    assert cuda_ops(lowered) == kernels_of
    assert inlined(lowered) == left
    counted: Counter[str] = Counter()
    for choice in lowered.providers:
        assert choice.provider in ("triton", "inline") and bool(choice.reason) == (choice.provider == "inline")
        counted[choice.op] += choice.count
    assert counted == dialect(program), "every op has a provider"
    assert_same_outputs(program, lowered)


def assert_same_outputs(program: Program, lowered: inductor.Lowered) -> None:
    """Device, shape, dtype and strides, by the fakes of the kernels and of the dialect."""
    expected = [fake_value(node) for node in program.graph.output_node().args[0]]
    actual = run_on_cuda(lowered.gm, *map(fake_value, program.graph.find_nodes(op="placeholder")))
    assert list(map(layout, actual)) == list(map(layout, expected))
    assert {x.device.type for x in actual if isinstance(x, Tensor)} == {"cuda"}


def layout(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.device, x.dtype, [str(n) for n in x.shape], [str(n) for n in x.stride()]


@pytest.mark.parametrize(
    ("recipe", "quantize"), [("fp8", "quantize_per_token_fp8"), ("fp8-static", "quantize_static_fp8")]
)
def test_fp8_before_the_first_gpu_that_converts_to_it(recipe, quantize):
    program = quantized("bert", recipe)
    lowered = inductor.lower(program, architecture=A100)
    assert cuda_ops(lowered) == {"fp8_linear": 13}
    assert inlined(lowered) == {quantize: NO_FP8}
    assert_same_outputs(program, lowered)


def test_weights_are_laid_out_once_for_each_architecture():
    program = quantized("bert", "fp8")
    name = "pooler.dense.weight_q_codes"
    first, again, other = (
        dict(inductor.lower(program, architecture=a).gm.named_buffers())[name] for a in (H100, H100, A100)
    )
    assert first is again
    assert (first.dtype, other.dtype) == (torch.uint8, torch.int16)
    assert name not in dict(program.gm.named_buffers())


def test_without_triton_cuda_is_an_error_that_names_the_mend(monkeypatch):
    monkeypatch.setattr(registration, "unavailable_reason", lambda: "Triton is not installed")
    program = quantized("bert", "w8a8")
    with pytest.raises(KernelBuildError, match=r"Triton is not installed.*pip install"):
        inductor.lower(program)
    lowered = inductor.lower(program, native=False)
    assert cuda_ops(lowered) == {}
    assert set(inlined(lowered).values()) == {"native kernels were switched off"}


def test_the_architecture_is_asked_of_the_device_that_values_are_on(monkeypatch):
    asked = []
    monkeypatch.setattr(registration, "architecture", lambda device: asked.append(device) or A100)
    assert inlined(inductor.lower(quantized("bert", "fp8"))) == {"quantize_per_token_fp8": NO_FP8}
    assert asked == [torch.device("cuda", 0)]


# --- fusions of their own ------------------------------------------------------------------------------------------


def of_blocks(forward: Any, *inputs: Tensor, recipe: str = "w8a8-plain") -> inductor.Lowered:
    return inductor.lower(quantize_on_cuda(captured(forward, *inputs, recipe=recipe)), architecture=H100)


X = torch.randn(3, 32)


def test_a_residual_goes_into_the_linear():
    for forward in (lambda self, x, r: self.a(x) + r, lambda self, x, r: r + self.a(x)):
        lowered = of_blocks(forward, X, X.clone())
        assert cuda_ops(lowered) == {"quantize_per_token": 1, "int8_linear_add": 1}
        call = next(n for n in lowered.gm.graph.nodes if "int8_linear_add" in str(n.target))
        assert call.args[5].op == "placeholder" and call.args[6] is torch.float32
        assert not lowered.gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, r: self.a(x) + r[0],  # broadcast
        lambda self, x, r: torch.add(self.a(x), r, alpha=2),
        lambda self, x, r: self.a(x) + 1.0,
        lambda self, x, r: (lambda y: (y + r, y))(self.a(x)),  # read twice
        lambda self, x, r: (lambda y: y + y)(self.a(x)),
        lambda self, x, r: self.a(x) + r.double(),  # another dtype
    ],
)
def test_other_sums_stay(forward):
    ops = cuda_ops(of_blocks(forward, X, X.clone()))
    assert ops == {"quantize_per_token": 1, "int8_linear": 1}


def test_a_norm_that_takes_the_sum_keeps_it():
    ops = cuda_ops(of_blocks(lambda self, x, r: self.b(self.norm(self.a(x) + r)), X, X.clone()))
    assert ops == {"quantize_per_token": 1, "int8_linear": 2, "norm_quantize": 1}


def test_two_linears_of_one_sum_leave_one_residual():
    ops = cuda_ops(of_blocks(lambda self, x, r: self.a(x) + self.b(r), X, X.clone()))
    assert ops == {"quantize_per_token": 2, "int8_linear": 1, "int8_linear_add": 1}


@pytest.mark.parametrize(
    ("recipe", "linear"),
    [
        ("w8a8-plain+lorc", "int8_linear_low_rank"),
        ("w4a8-g128+lorc", "w4a8_linear"),
        ("w4a16-g64+lorc", "weight_only_linear"),
        ("w4a8-fp+lorc", "fp8_linear"),
    ],
)
def test_a_low_rank_branch_goes_into_the_linear(recipe, linear):
    lowered = of_blocks(lambda self, x: self.a(x), X, recipe=recipe)
    ops = cuda_ops(lowered)
    assert ops.pop("low_rank_hidden") == ops.pop(linear) == 1
    assert not any("linear" in name for name in ops)


def test_a_low_rank_branch_of_a_float_linear_stays_an_op():
    """So does one whose linear something else reads too."""
    y, x, v, u = torch.randn(3, 16), torch.randn(3, 32), torch.randn(4, 32).half(), torch.randn(16, 4).half()
    program = on_cuda(kernels.low_rank_linear, y, x, v, u)
    assert cuda_ops(inductor.lower(program, architecture=H100)) == {"low_rank_linear": 1}


def test_elementwise_ops_alone_have_kernels():
    """Between a product and a product there is nothing that Inductor could fuse them with."""
    program = on_cuda(kernels.quantize_static, torch.randn(3, 32), torch.rand(1, 32) + 0.1)
    assert cuda_ops(inductor.lower(program, architecture=H100)) == {"quantize_static": 1}


def test_what_kernels_cannot_run_is_inlined():
    doubles = on_cuda(kernels.quantize_per_token, torch.randn(3, 32, dtype=torch.float64))
    assert inlined(inductor.lower(doubles, architecture=H100)) == {
        "quantize_per_token": "the Triton kernels have no torch.float64"
    }
    heads = torch.zeros(1, 2, 4, 320, dtype=torch.int8)
    one = torch.ones(1, 1, 1, 1)
    wide = on_cuda(kernels.int8_attention, heads, heads, heads, one, None, False, None, one, torch.float32)
    assert inlined(inductor.lower(wide, architecture=H100)) == {
        "int8_attention": "heads have 320 features, more than 256"
    }


@pytest.mark.parametrize("architecture", [None, H100], ids=["cpu", "cuda"])
@pytest.mark.parametrize(
    "key, value", [((2, 2, 5, 32), (2, 2, 5, 48)), ((2, 2, 5, 32), (2, 2, 5, 16)), ((1, 2, 5, 32), (1, 2, 5, 32))]
)
def test_attention_of_odd_values_or_shared_keys_is_inlined(key, value, architecture):
    """Kernels take one width, and a batch of keys for each of queries; the reference takes them all."""
    torch.manual_seed(0)
    query, key, value = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((2, 2, 5, 32), key, value))
    one = torch.full((1, 1, 1, 1), 0.01)
    operands = [query, key, value, one, None, False, None, one, torch.float32]
    mode = FakeTensorMode()
    program = lone(kernels.int8_attention, operands, (), mode, mode.from_tensor)
    lowered = inductor.lower(program, architecture=architecture)
    [(op, reason)] = inlined(lowered).items()
    assert op == "int8_attention" and "are not all of the queries' batch and width, 2 and 32" in reason


def test_gpus_that_are_too_old_run_no_kernel_and_are_told_so():
    program = on_cuda(kernels.quantize_per_token, torch.randn(3, 32))
    assert inlined(inductor.lower(program, architecture=75)) == {
        "quantize_per_token": "compute capability 7.5 is older than 8.0"
    }


# --- fakes ---------------------------------------------------------------------------------------------------------


def on_cuda(target: Any, *operands: Any, constants: tuple[int, ...] = ()) -> Program:
    mode = FakeTensorMode()
    with as_on_cuda(mode):
        return lone(target, list(operands), constants, mode, fake_on_cuda)


def test_every_kernel_has_a_case():
    assert cases(torch.float32).keys() == triton_cuda.provider(torch.device("cuda"), H100).rewrites.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", cases(torch.float32), ids=str)
def test_fakes_agree_with_the_dialects(target, dtype):
    operands, constants = cases(dtype)[target]
    program = on_cuda(target, *operands, constants=constants)
    lowered = inductor.lower(program, architecture=H100)
    assert sum(cuda_ops(lowered).values()) == 1
    assert_same_outputs(program, lowered)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, whichever it is."""

    class EnteredError(Exception):
        pass

    def enter(device: torch.device) -> None:
        raise EnteredError(str(device))

    monkeypatch.setattr(torch.cuda, "device", enter)
    with FakeTensorMode():
        x = torch.empty(2, 32, device="cuda:1")
    registration.load()
    with pytest.raises(EnteredError, match="cuda:1"):
        registration.HOSTS["quantize_per_token"](x)
