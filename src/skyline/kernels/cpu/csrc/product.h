// Products of activations with packed weights, shared by `linear` and the experts of a mixture.
#pragma once

#include "packed.h"
#include "simd.h"

namespace skyline {

// Activations as the weight's format wants them: rows of bfloat16, int8 or float32, padded with zeros to padded_k().
struct Activations {
  const void* data;
  int64_t stride;            // elements between rows
  const float* scales;       // int8: one a row; int4: [groups][rows]
  const int32_t* sums;       // int4: of a group's integers, [groups][rows]
  int64_t rows;
};

// Rows of A that a panel is best multiplied by before the next one. Without AMX, more of them take so much of the caches that it
// costs more than reading the panels less often gains (Zen 5; on Zen 3 it makes no difference).
#if defined(__AMX_TILE__)
constexpr int64_t kRowsAtOnce = 512;
#else
constexpr int64_t kRowsAtOnce = 144;
#endif

// How a product is gone through. Nothing of this changes its result by a bit, so the fastest can be chosen for any shape.
struct Tactic {
  int64_t rows = kRowsAtOnce;  // of A, that a panel is multiplied by before the next panel: at most 512
  int64_t piece = 512;         // columns of A that all of those are gone through before the next: 128, 256 or 512
  int64_t level_rows = 4;      // up to so many rows, int4 is multiplied as it is read; more are worth widening it for, in tiles
};

// What a gated weight's products become: silu(gate) * up, or with alpha, where gate is at most `limit` and up within it,
// gate * sigmoid(alpha * gate) * (up + 1).
struct Gating {
  float alpha = 0, limit = 0;
};

// y = activations x weight (+ bias), written to rows of type T (float or bf16).
template <class T>
struct Product {
  PackedMatrix weight;
  Activations a;
  const T* bias;
  T* out;
  int64_t out_stride;
  Tactic tactic = {};
  Gating gating = {};
};

// Bytes of scratch that `prepare` needs for so many rows; 0 if x can be used as it is.
template <class T>
int64_t prepared_bytes(const PackedMatrix& weight, int64_t rows, int64_t stride);

// Converts rows of x, in `scratch` if need be, using all threads.
template <class T>
Activations prepare(const PackedMatrix& weight, const T* x, int64_t stride, int64_t rows, uint8_t* scratch);

// Rows [begin, end) of one panel's columns. At most max_rows(weight, tactic) rows at once. next: the panel that this thread will
// probably go through after it, which is asked for meanwhile, or -1.
template <class T>
void compute_panel(const Product<T>& product, int64_t begin, int64_t end, int64_t panel, int64_t next);

int64_t max_rows(const PackedMatrix& weight, const Tactic& tactic);

}  // namespace skyline
