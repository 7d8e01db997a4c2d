"""The native CPU provider: C++ kernels for AVX512-VNNI or AVX2, compiled where they run (see `build`)."""
