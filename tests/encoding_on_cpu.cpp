// Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
//
// The kernels of spear_hf/mvq/encoding.cu as functions of a shared library.

#include "cuda_on_cpu.h"

#include "../spear_hf/mvq/encoding.cu"

using cuda_on_cpu::run;

extern "C" void run_standardise(int blocks, unsigned seed, const float* frames, int dim, const float* mean,
                                const float* deviation, float* standardised, unsigned short* split, float* scale,
                                int* bad) {
    run(blocks, THREADS, seed,
        [=] { standardise(frames, dim, mean, deviation, standardised, split, scale, bad); });
}

extern "C" void run_classify(int blocks, unsigned seed, const float* logits, const float* scale, float weight_scale,
                             const float* bias, unsigned char* codes) {
    run(blocks, THREADS, seed, [=] { classify(logits, scale, weight_scale, bias, codes); });
}

extern "C" void run_subtract(int blocks, unsigned seed, const float* standardised, int dim, const float* offset,
                             const float* centres, const unsigned char* codes, const int* active, float* residual,
                             unsigned short* split, float* scale) {
    run(blocks, THREADS, seed,
        [=] { subtract(standardised, dim, offset, centres, codes, active, residual, split, scale); });
}

extern "C" void run_refine(int blocks, unsigned seed, const float* products, const float* scale, float centre_scale,
                           const float* half_norms, const float* gram, const int* active, unsigned char* codes,
                           unsigned char* again) {
    run(blocks, LANES, seed, [=] { refine(products, scale, centre_scale, half_norms, gram, active, codes, again); });
}
