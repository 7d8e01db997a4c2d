"""The native CPU provider: C++ kernels for AVX512-VNNI or AVX2, compiled on the machine that runs them (see `build`)."""
