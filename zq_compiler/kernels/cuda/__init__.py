"""The CUDA provider: Triton kernels, one file an op, beside the op's reference in `kernels/`.

    arithmetic.py      what kernels share: exact division, rounding, rows' ranges, rotations, activations
    registration.py    ops of `torch.ops.zq_cuda`, their fakes, and what a launch needs to know
    configs.py         which tiles an op runs with on an architecture: data, and a formula behind it

Nothing here is imported until a model on CUDA is lowered: Triton is optional. In Triton's interpreter
(`TRITON_INTERPRET=1`, set before torch is imported) the same functions run on CPU tensors.
"""
