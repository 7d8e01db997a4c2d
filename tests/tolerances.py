"""Every tolerance of the tests, in one place, each with its reason."""

W8A8_DB = 30.0  # one or two INT8 linears on Gaussian data: each costs about 44 dB
ROUNDING_DB = 100.0  # the same float32 mathematics in another order
BF16_DB = 40.0  # the same mathematics rounded to bfloat16 (8 bits) once more or less
HALF_STEP = 0.5 + 1e-4  # of a quantization step: half of one, and the float32 rounding of q * scale at |q| <= 127
ULPS = 4e-7  # relative: a few roundings of float32, 2^-24 each
IMPORT_SECONDS = 0.3  # `import zq_compiler` on top of torch
