// Linear attention by the gated delta rule: its convolution and its recurrence (see ops/delta.py).
//
// Both go token by token from the state that the step before left, in float32, so that a request's results have the same
// bits however its tokens were cut into steps.
#include <algorithm>
#include <cmath>
#include <vector>

#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace {

constexpr int64_t kChannels = 512;  // of one task of the convolution
constexpr int64_t kMaxTaps = 64;
constexpr int64_t kTokens = 32;  // whose keys and queries are made at a time
constexpr int kVectors = 4;      // of columns of the memory that are gone through together
constexpr int64_t kColumns = kVectors * Vec::width;

// Whose tokens these are, and where each request's state is read (-1: it begins with zeros) and written.
struct Requests {
  Requests(const TensorView& query_starts, const TensorView& read, const TensorView& write, int64_t tokens, int64_t blocks)
      : count(read.shape()[0]),
        starts(list_of<int32_t>(query_starts, count + 1)),
        reads(list_of<int32_t>(read, count)),
        writes(list_of<int32_t>(write, count)) {
    SKYLINE_CHECK(starts[0] == 0 && starts[count] == tokens, "requests do not cover the tokens");
    for (int64_t r = 0; r < count; r++) {
      SKYLINE_CHECK(starts[r] <= starts[r + 1], "requests do not cover the tokens");
      SKYLINE_CHECK(reads[r] >= -1 && reads[r] < blocks && writes[r] >= 0 && writes[r] < blocks, "no such state");
    }
  }
  int64_t count;
  const int32_t* starts;
  const int32_t *reads, *writes;
};

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// to = x / |x| * factor
template <class T>
void unit(float* to, const T* x, int64_t n, float factor) {
  Vec by = Vec::all(factor / std::sqrt(sum_of_squares(x, n) + 1e-6f));
  sweep(n, [&](int64_t i, auto m) { (Vec::load(x + i, m) * by).store(to + i, m); });
}

// One token on some columns of one head's memory, whose rows lie `stride` apart: it shrinks, what it has for k is taken
// off v, the rest is written, and q reads the result.
template <bool whole, class T>
inline void advance(float* memory, int64_t stride, int64_t dk, int64_t width, const float* k, const float* q, const T* v,
                    float shrink, float beta, T* out) {
  constexpr int w = Vec::width;
  auto left = [&](int u) { return static_cast<int>(std::clamp<int64_t>(width - u * w, 0, w)); };
  auto load = [&](const auto* p, int u) { return whole ? Vec::load(p + u * w) : Vec::load(p + u * w, left(u)); };
  auto store = [&](Vec x, auto* p, int u) { whole ? x.store(p + u * w) : x.store(p + u * w, left(u)); };
  const int vectors = whole ? kVectors : static_cast<int>((width + w - 1) / w);
  Vec change[kVectors], read[kVectors];
  for (int u = 0; u < kVectors; u++) change[u] = read[u] = Vec::zero();
  const Vec by = Vec::all(shrink);
  for (int64_t i = 0; i < dk; i++) {
    float* line = memory + i * stride;
    const Vec key = Vec::all(k[i]);
    for (int u = 0; u < vectors; u++) {
      Vec kept = load(line, u) * by;
      store(kept, line, u);
      change[u] = fma(key, kept, change[u]);
    }
  }
  for (int u = 0; u < vectors; u++) change[u] = (load(v, u) - change[u]) * Vec::all(beta);
  for (int64_t i = 0; i < dk; i++) {
    float* line = memory + i * stride;
    const Vec key = Vec::all(k[i]), query = Vec::all(q[i]);
    for (int u = 0; u < vectors; u++) {
      Vec kept = fma(key, change[u], load(line, u));
      store(kept, line, u);
      read[u] = fma(query, kept, read[u]);
    }
  }
  for (int u = 0; u < vectors; u++) store(read[u], out, u);
}

}  // namespace

// out, x [T, C], weight [C, taps + 1], conv [blocks, taps, C]
void causal_conv(TensorView out, TensorView x, TensorView weight, TensorView conv, TensorView query_starts, TensorView reads,
                 TensorView writes) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<T>(x);
    auto factors = rows_of<T>(weight);
    const int64_t channels = to.cols, taps = factors.cols - 1;
    SKYLINE_CHECK(from.rows == to.rows && from.cols == channels && factors.rows == channels && taps <= kMaxTaps,
                  "shapes do not match");
    SKYLINE_CHECK(conv.ndim() == 3 && conv.shape()[1] == taps && conv.shape()[2] == channels && conv.IsContiguous() &&
                      conv.dtype().bits == 8 * sizeof(T),
                  "takes a cache of inputs in the dtype of the rows");
    Requests requests(query_starts, reads, writes, to.rows, conv.shape()[0]);
    T* states = data<T>(conv);
    const int64_t parts = (channels + kChannels - 1) / kChannels;
    ThreadPool::get().run(requests.count * parts, [&](int64_t task) {
      const int64_t r = task / parts, first = task % parts * kChannels, width = std::min(kChannels, channels - first);
      const int64_t begin = requests.starts[r], end = requests.starts[r + 1];
      // The last `taps` inputs before each token, and the weights with channels side by side.
      std::vector<float> past(static_cast<size_t>(taps * width)), by(static_cast<size_t>((taps + 1) * width));
      for (int64_t j = 0; j <= taps; j++)
        for (int64_t c = 0; c < width; c++) by[j * width + c] = to_float(factors[first + c][j]);
      if (requests.reads[r] >= 0) {
        const T* old = states + int64_t{requests.reads[r]} * taps * channels + first;
        for (int64_t j = 0; j < taps; j++)
          for (int64_t c = 0; c < width; c++) past[j * width + c] = to_float(old[j * channels + c]);
      }
      int64_t oldest = 0;  // `past` is a ring
      for (int64_t token = begin; token < end; token++) {
        const T* fresh = from[token] + first;
        T* result = to[token] + first;
        sweep(width, [&](int64_t i, auto n) {
          Vec sum = Vec::zero();
          for (int64_t j = 0; j < taps; j++) {
            const int64_t at = (oldest + j) % std::max<int64_t>(taps, 1);
            sum = fma(Vec::load(past.data() + at * width + i, n), Vec::load(by.data() + j * width + i, n), sum);
          }
          sum = fma(Vec::load(fresh + i, n), Vec::load(by.data() + taps * width + i, n), sum);
          silu(rounded_to<T>(sum)).store(result + i, n);
        });
        if (taps > 0) {
          sweep(width, [&](int64_t i, auto n) { Vec::load(fresh + i, n).store(past.data() + oldest * width + i, n); });
          oldest = (oldest + 1) % taps;
        }
      }
      T* kept = states + int64_t{requests.writes[r]} * taps * channels + first;
      for (int64_t j = 0; j < taps; j++) {
        const float* row = past.data() + (oldest + j) % taps * width;
        for (int64_t c = 0; c < width; c++) kept[j * channels + c] = from_float<T>(row[c]);
      }
    });
  });
}

// out [T, H * Dv], qkv [T, 2 * K * Dk + H * Dv], b, a [T, H], decay, dt_bias [H], states [blocks, H, Dk, Dv] float32.
void gated_delta_rule(TensorView out, TensorView qkv, TensorView b, TensorView a, TensorView decay, TensorView dt_bias,
                      int64_t key_heads, TensorView states, TensorView query_starts, TensorView reads, TensorView writes) {
  SKYLINE_CHECK(states.ndim() == 4 && is_float32(states) && states.IsContiguous(), "takes states in float32");
  const int64_t heads = states.shape()[1], dk = states.shape()[2], dv = states.shape()[3];
  SKYLINE_CHECK(key_heads > 0 && heads % key_heads == 0, "shapes do not match");
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<T>(qkv), betas = rows_of<T>(b), steps = rows_of<T>(a);
    const T *rate = list_of<T>(decay, heads), *bias = list_of<T>(dt_bias, heads);
    SKYLINE_CHECK(to.cols == heads * dv && from.cols == 2 * key_heads * dk + heads * dv && from.rows == to.rows &&
                      betas.rows == to.rows && betas.cols == heads && steps.rows == to.rows && steps.cols == heads,
                  "shapes do not match");
    Requests requests(query_starts, reads, writes, to.rows, states.shape()[0]);
    float* all = data<float>(states);
    ThreadPool::get().run(requests.count * heads, [&](int64_t task) {
      const int64_t r = task / heads, head = task % heads, source = head / (heads / key_heads);
      float* memory = all + (int64_t{requests.writes[r]} * heads + head) * dk * dv;
      if (requests.reads[r] < 0) {
        std::fill_n(memory, dk * dv, 0.0f);
      } else if (requests.reads[r] != requests.writes[r]) {
        std::copy_n(all + (int64_t{requests.reads[r]} * heads + head) * dk * dv, dk * dv, memory);
      }
      const float slope = -std::exp(to_float(rate[head])), offset = to_float(bias[head]);
      std::vector<float> q(static_cast<size_t>(kTokens * dk)), k(static_cast<size_t>(kTokens * dk));
      float shrink[kTokens], beta[kTokens];
      for (int64_t first = requests.starts[r]; first < requests.starts[r + 1]; first += kTokens) {
        const int64_t count = std::min<int64_t>(kTokens, requests.starts[r + 1] - first);
        for (int64_t t = 0; t < count; t++) {
          const T* row = from[first + t];
          unit(q.data() + t * dk, row + source * dk, dk, 1.0f / std::sqrt(static_cast<float>(dk)));
          unit(k.data() + t * dk, row + (key_heads + source) * dk, dk, 1.0f);
          shrink[t] = std::exp(slope * softplus(to_float(steps[first + t][head]) + offset));
          beta[t] = 1.0f / (1.0f + std::exp(-to_float(betas[first + t][head])));
        }
        // Columns of the memory know nothing of each other: some of them go through all tokens in the first-level cache.
        for (int64_t column = 0; column < dv; column += kColumns) {
          const int64_t width = std::min<int64_t>(kColumns, dv - column);
          for (int64_t t = 0; t < count; t++) {
            const T* v = from[first + t] + 2 * key_heads * dk + head * dv + column;
            T* result = to[first + t] + head * dv + column;
            const float *key = k.data() + t * dk, *query = q.data() + t * dk;
            if (width == kColumns) {
              advance<true>(memory + column, dv, dk, width, key, query, v, shrink[t], beta[t], result);
            } else {
              advance<false>(memory + column, dv, dk, width, key, query, v, shrink[t], beta[t], result);
            }
          }
        }
      }
    });
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(causal_conv, causal_conv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gated_delta_rule, gated_delta_rule);

}  // namespace skyline
