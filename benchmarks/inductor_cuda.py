"""What Inductor makes of a quantized layer on CUDA, without a GPU: its own kernels between ours, compiled to cubins.

    python -m benchmarks.inductor_cuda --recipe hero-m3 --architecture 90

A BERT layer is quantized on the CPU and lowered for CUDA. Its constants and inputs become fake tensors there, torch is
made to believe in the GPU, and `compile_fx` goes all the way that `torch.compile` goes on a real one, but for the call:
Triton compiles with the driver of `offline_gpu`. A build of torch without CUDA has no fused attention, so one in floats
is taken to pieces. Prints as JSON which ops of ours Inductor calls, how often, and of each Triton kernel that it wrote
the bytes of its cubin. This process believes in that GPU until it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a worker process would know nothing of the GPU
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
import transformers as hf
import triton
from torch import Tensor, fx, nn
from torch._dynamo import device_interface
from torch._inductor import compile_fx, config
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers

import zq_compiler as zq
from benchmarks.fake_cuda import DEVICE, fake_on_cuda, without_guards
from benchmarks.offline_gpu import LIMITS, OfflineGPU, offline_gpu
from zq_compiler.kernels.cuda.matmul_configs import CHIPS
from zq_compiler.lowering import inductor
from zq_compiler.torch_private import FakeTensorMode, pytree

OUR_CALL = r"= torch\.ops\.zq_cuda\.(\w+)\.default\("
OTHER_CALL = r"\bextern_kernels\.(\w+)\("


@dataclass
class Compiled:
    """What Inductor wrote.

    Args:
        ours: how often the code calls each op of `torch.ops.zq_cuda`.
        others: how often it calls a library's product.
        kernels: bytes of the cubin of each Triton kernel of its own.
    """

    ours: dict[str, int]
    others: dict[str, int]
    kernels: dict[str, int]


class Layer(nn.Module):
    """One layer of BERT-base."""

    def __init__(self, hidden: int = 768) -> None:
        super().__init__()
        settings = hf.BertConfig(hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=4 * hidden)
        settings._attn_implementation = "sdpa"
        self.layer = hf.models.bert.modeling_bert.BertLayer(settings)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


def compiled(model: nn.Module, x: Tensor, recipe: str, architecture: int, native: bool = True) -> Compiled:
    """A model's graph on one input, quantized, lowered and compiled for an architecture."""
    program = zq.quantize(model.eval(), x, recipe=recipe, calibration=[x], dynamic_shapes={"x": None}).program
    lowered = inductor.lower(program, native=native, architecture=architecture).gm
    mode, sources, cubins = FakeTensorMode(), list[str](), dict[str, int]()
    codegen, load = GraphLowering.codegen, OfflineGPU.load_binary

    def noted_codegen(self: GraphLowering) -> Any:
        code = codegen(self)
        sources.append(code[0].value)
        return code

    def noted_load(self: OfflineGPU, name: str, cubin: bytes, *args: Any) -> Any:
        cubins[name] = len(cubin)
        return load(self, name, cubin, *args)

    with (
        patch.object(GraphLowering, "codegen", noted_codegen),
        patch.object(OfflineGPU, "load_binary", noted_load),
        offline_gpu(architecture) as gpu,
    ):
        believe_in(gpu)
        with mode, without_guards(), torch.no_grad():
            move(lowered, mode)
            compile_fx.compile_fx(lowered, [fake_on_cuda(x)])
    (source,) = sources
    ours, others = (Counter(re.findall(call, source)) for call in (OUR_CALL, OTHER_CALL))
    return Compiled(dict(ours), dict(others), cubins)


def move(gm: fx.GraphModule, mode: FakeTensorMode) -> None:
    """A graph's constants, and what it makes of nothing, go to CUDA."""
    for module in gm.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake_on_cuda(buffer))
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(fake_on_cuda(parameter), requires_grad=False))
    for node in gm.graph.nodes:
        move_device = pytree.tree_map_only(torch.device, lambda _: DEVICE, (node.args, node.kwargs))
        node.args, node.kwargs = move_device
    gm.recompile()


def believe_in(gpu: OfflineGPU) -> None:
    """Tell torch of a GPU of this architecture; all it is asked for is what it is."""
    chip, limits = CHIPS[gpu.architecture], LIMITS[gpu.architecture]
    major, minor = divmod(gpu.architecture, 10)
    properties = SimpleNamespace(
        name="offline", major=major, minor=minor, multi_processor_count=chip.sms, warp_size=32, gcnArchName="",
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=32 * limits.warps, max_threads_per_block=1024,
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=chip.shared, L2_cache_size=40 << 20,
        shared_memory_per_multiprocessor=limits.shared, total_memory=40 << 30, uuid="offline",
    )  # fmt: skip
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (major, minor),
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "synchronize": None,
        "set_device": None,
        "init": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "mem_get_info": (40 << 30, 40 << 30),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        function = staticmethod(lambda *args, _answer=answer, **kwargs: _answer)
        setattr(torch.cuda, name, function)
        if hasattr(device_interface.CudaInterface, name.lstrip("_")):
            setattr(device_interface.CudaInterface, name.lstrip("_"), function)
    for owner, name in (
        (torch.cuda, "device"),
        (torch.cuda, "_DeviceGuard"),
        (device_interface.CudaInterface, "device"),
    ):
        setattr(owner, name, Anywhere)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    device_interface.CudaInterface.get_raw_stream = staticmethod(lambda device: 0)
    device_interface.caching_worker_device_properties["cuda"] = [properties]
    device_interface.caching_worker_current_devices["cuda"] = 0
    triton_helpers.set_driver_to_gpu = lambda: triton.runtime.driver.set_active(gpu)
    config.use_static_triton_launcher = config.joint_graph_constant_folding = False  # folding computes on the device
    joint_graph.lazy_init = lambda device: None  # patterns of attentions in pieces, traced from real tensors


class Anywhere:
    """In place of the context in which a device is the current one."""

    def __init__(self, *device: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: Any) -> None: ...


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--inline", action="store_true", help="leave everything to Inductor")
    given = parser.parse_args()
    x = torch.randn(1, given.rows, given.hidden)
    print(json.dumps(asdict(compiled(Layer(given.hidden), x, given.recipe, given.architecture, not given.inline))))
