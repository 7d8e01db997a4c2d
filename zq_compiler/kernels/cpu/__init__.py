"""The native CPU provider: C++ kernels for AVX512-VNNI, compiled on the machine that runs them (see `build`)."""
