// Rotary position embedding (arXiv:2104.09864), alone and fused with what surrounds it in attention: the norm of the heads
// before it, and after it the write of keys and values to the cache.
#include <cmath>
#include <vector>

#include "cache_shape.h"
#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace {

constexpr int64_t kMaxHead = 1024;

const int64_t* indices_of(const TensorView& t, int64_t length, int64_t end) {
  const int64_t* list = list_of<int64_t>(t, length);
  for (int64_t i = 0; i < length; i++) SKYLINE_CHECK(list[i] >= 0 && list[i] < end, list[i] << " is not below " << end);
  return list;
}

// table [P, R] float32: cos | sin of R / 2 frequencies. `read` rounds a position's row to T, as the reference does.
struct Rotation {
  Rotation(const TensorView& table, int64_t head_dim) : rows(checked(table)), half(rows.cols / 2), head_dim(head_dim) {
    SKYLINE_CHECK(rows.cols % 2 == 0 && rows.cols <= head_dim && head_dim <= kMaxHead, "shapes do not match");
  }
  template <class T>
  void read(float* turns, int64_t position) const {
    const float* row = rows[position];
    sweep(2 * half, [&](int64_t i, auto n) { rounded_to<T>(Vec::load(row + i, n)).store(turns + i, n); });
  }
  // One head. Products and their sum are exact to float32 and rounded to T once.
  template <class T, class From>
  void turn(T* to, const From* x, const float* turns) const {
    sweep(half, [&](int64_t i, auto n) {
      Vec first = Vec::load(x + i, n), second = Vec::load(x + half + i, n);
      Vec cos = Vec::load(turns + i, n), sin = Vec::load(turns + half + i, n);
      fnma(second, sin, first * cos).store(to + i, n);
      fma(second, cos, first * sin).store(to + half + i, n);
    });
    const From* rest = x + 2 * half;
    T* rest_to = to + 2 * half;
    sweep(head_dim - 2 * half, [&](int64_t i, auto n) { Vec::load(rest + i, n).store(rest_to + i, n); });
  }

  Rows<float> rows;
  int64_t half, head_dim;

 private:
  static Rows<float> checked(const TensorView& table) {
    SKYLINE_CHECK(is_float32(table), "takes a float32 table");
    return rows_of<float>(table);
  }
};

float inverse_rms(float squares, int64_t n, float eps) { return 1.0f / std::sqrt(squares / static_cast<float>(n) + eps); }

// Normalises a head into float32.
template <class T>
void normalise(float* to, const T* x, const T* weight, int64_t n, float eps) {
  Vec scale = Vec::all(inverse_rms(sum_of_squares(x, n), n, eps));
  sweep(n, [&](int64_t i, auto m) { (Vec::load(x + i, m) * scale * Vec::load(weight + i, m)).store(to + i, m); });
}

// Norm (unless weight is null) and rotation of a head of 2 * kHalf vectors, all of it rotated, in registers.
template <int kHalf, class T>
void turn_whole(T* to, const T* x, const T* weight, const float* turns, float eps) {
  constexpr int w = Vec::width, half = kHalf * w;
  Vec first[kHalf], second[kHalf];
  for (int j = 0; j < kHalf; j++) first[j] = Vec::load(x + j * w), second[j] = Vec::load(x + half + j * w);
  if (weight != nullptr) {
    Vec one = Vec::zero(), two = Vec::zero();
    for (int j = 0; j < kHalf; j++) one = fma(first[j], first[j], one), two = fma(second[j], second[j], two);
    Vec scale = Vec::all(inverse_rms((one + two).sum(), 2 * half, eps));
    for (int j = 0; j < kHalf; j++) {
      first[j] = first[j] * scale * Vec::load(weight + j * w);
      second[j] = second[j] * scale * Vec::load(weight + half + j * w);
    }
  }
  for (int j = 0; j < kHalf; j++) {
    Vec cos = Vec::load(turns + j * w), sin = Vec::load(turns + half + j * w);
    fnma(second[j], sin, first[j] * cos).store(to + j * w);
    fma(second[j], cos, first[j] * sin).store(to + half + j * w);
  }
}

// Norm and rotation of any head. Between the two nothing is rounded: the result is rounded to T once.
template <class T>
void normalise_and_turn(const Rotation& rotation, T* to, const T* x, const T* weight, const float* turns, float eps) {
  if (2 * rotation.half == rotation.head_dim) {
    if (rotation.half == 2 * Vec::width) return turn_whole<2>(to, x, weight, turns, eps);
    if (rotation.half == 4 * Vec::width) return turn_whole<4>(to, x, weight, turns, eps);
    if (rotation.half == 8 * Vec::width) return turn_whole<8>(to, x, weight, turns, eps);
  }
  if (weight == nullptr) return rotation.turn(to, x, turns);
  alignas(64) float normed[kMaxHead];
  normalise(normed, x, weight, rotation.head_dim, eps);
  rotation.turn(to, normed, turns);
}

// Keys or values of the cache: of the activations' dtype, or int8 with a scale for each of a token's heads.
struct CachePart {
  CachePart(const CacheShape& shape, const TensorView& t, const ffi::Optional<TensorView>& s)
      : base(data<char>(t)), scales(shape.int8 ? data<float>(s.value()) : nullptr), head_dim(shape.head_dim) {}
  template <class T>
  T* at(int64_t row) const {
    return reinterpret_cast<T*>(base) + row * head_dim;
  }
  // Symmetric: the largest magnitude of the head becomes 127.
  template <class From>
  void quantise(int64_t row, const From* x) const {
    Vec most = Vec::zero();
    sweep(head_dim, [&](int64_t i, auto n) { most = max(most, abs(Vec::load(x + i, n))); });
    float largest = most.max();
    scales[row] = largest / 127.0f;
    Vec factor = Vec::all(largest > 0 ? 127.0f / largest : 0.0f);
    int8_t* to = at<int8_t>(row);
    sweep(head_dim, [&](int64_t i, auto n) { (Vec::load(x + i, n) * factor).store(to + i, n); });
  }

  char* base;
  float* scales;
  int64_t head_dim;
};

template <class T>
const T* norm_of(const ffi::Optional<TensorView>& weight, int64_t head_dim) {
  return weight.has_value() ? list_of<T>(weight.value(), head_dim) : nullptr;
}

int64_t grain(int64_t cols) { return 1 + 8192 / (cols + 1); }

}  // namespace

// q_out, q [T, Hq * D], k_out, k [T, Hk * D], positions int64 [T], table float32 [P, R].
void rope(TensorView q_out, TensorView k_out, TensorView q, TensorView k, TensorView positions, TensorView table,
          int64_t head_dim) {
  dispatch_float(q_out, [&]<class T>(T*) {
    Rows<T> to[2] = {rows_of<T>(q_out), rows_of<T>(k_out)}, from[2] = {rows_of<T>(q), rows_of<T>(k)};
    Rotation rotation(table, head_dim);
    const int64_t* at = indices_of(positions, to[0].rows, rotation.rows.rows);
    for (int part = 0; part < 2; part++) {
      SKYLINE_CHECK(to[part].rows == to[0].rows && from[part].rows == to[0].rows && to[part].cols == from[part].cols &&
                        to[part].cols % head_dim == 0,
                    "shapes do not match");
    }
    ThreadPool::get().run_ranges(to[0].rows, grain(to[0].cols + to[1].cols), [&](int64_t begin, int64_t end) {
      alignas(64) float turns[kMaxHead];
      for (int64_t token = begin; token < end; token++) {
        rotation.read<T>(turns, at[token]);
        for (int part = 0; part < 2; part++) {
          for (int64_t column = 0; column < to[part].cols; column += head_dim) {
            rotation.turn(to[part][token] + column, from[part][token] + column, turns);
          }
        }
      }
    });
  });
}

// q_out [T, Hq * D], qkv [T, (Hq + 2 Hk) * D], q_norm, k_norm [D] or both None, positions int64 [T], table float32 [P, R],
// k, v of qkv's dtype or int8, slots int64 [T].
void rope_kv_write(TensorView q_out, TensorView qkv, ffi::Optional<TensorView> q_norm, ffi::Optional<TensorView> k_norm,
                   double eps, TensorView positions, TensorView table, TensorView k, TensorView v,
                   ffi::Optional<TensorView> k_scale, ffi::Optional<TensorView> v_scale, TensorView slots) {
  dispatch_float(qkv, [&]<class T>(T*) {
    auto to = rows_of<T>(q_out), from = rows_of<T>(qkv);
    const CacheShape cache(k, v, k_scale, v_scale);
    const CachePart keys(cache, k, k_scale), values(cache, v, v_scale);
    const int64_t head_dim = cache.head_dim, kv_heads = cache.kv_heads, tokens = from.rows;
    SKYLINE_CHECK(q_out.dtype() == qkv.dtype(), "queries keep their dtype");
    SKYLINE_CHECK(k.dtype() == v.dtype() && (cache.int8 || k.dtype() == qkv.dtype()),
                  "the cache must hold the dtype of the activations or int8");
    SKYLINE_CHECK(to.rows == tokens && to.cols + 2 * kv_heads * head_dim == from.cols && to.cols % head_dim == 0,
                  "shapes do not match");
    SKYLINE_CHECK(q_norm.has_value() == k_norm.has_value(), "both norms or none");
    Rotation rotation(table, head_dim);
    const int64_t* at = indices_of(positions, tokens, rotation.rows.rows);
    const int64_t* slot_of = indices_of(slots, tokens, cache.positions);
    const T *q_weight = norm_of<T>(q_norm, head_dim), *k_weight = norm_of<T>(k_norm, head_dim);
    const float epsilon = static_cast<float>(eps);

    ThreadPool::get().run_ranges(tokens, grain(from.cols), [&](int64_t begin, int64_t end) {
      alignas(64) float turns[kMaxHead];
      alignas(64) T rotated[kMaxHead];
      auto turn = [&](T* result, const T* x, const T* weight) {
        normalise_and_turn(rotation, result, x, weight, turns, epsilon);
      };
      for (int64_t token = begin; token < end; token++) {
        const T* x = from[token];
        const int64_t first = cache.row(slot_of[token]);
        rotation.read<T>(turns, at[token]);
        for (int64_t column = 0; column < to.cols; column += head_dim) turn(to[token] + column, x + column, q_weight);
        x += to.cols;
        for (int64_t head = 0; head < kv_heads; head++, x += head_dim) {
          const int64_t row = first + head * cache.head_stride;
          turn(cache.int8 ? rotated : keys.at<T>(row), x, k_weight);
          if (cache.int8) keys.quantise(row, rotated);
        }
        for (int64_t head = 0; head < kv_heads; head++, x += head_dim) {
          const int64_t row = first + head * cache.head_stride;
          if (cache.int8) {
            values.quantise(row, x);
          } else {
            std::memcpy(values.at<T>(row), x, sizeof(T) * head_dim);
          }
        }
      }
    });
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope, rope);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_kv_write, rope_kv_write);

}  // namespace skyline
