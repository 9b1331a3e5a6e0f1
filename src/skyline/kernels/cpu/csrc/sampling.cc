// The choice of tokens from logits. What is chosen is defined at the top of runner/sampling/choose.py: weights are whole
// numbers whose sums are exact in float64, so nothing here depends on the order in which threads add or select.
#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace {

constexpr int64_t kBlock = 64;            // whose largest logit is kept, so that most blocks are looked at once only
constexpr int64_t kChunk = 64 * kBlock;   // what threads share out among themselves when there are few rows
constexpr int64_t kNucleus = 512;         // candidates for top_p in the first attempt

#if defined(__AVX512F__)
uint32_t at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
uint32_t any_nan(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }
Vec floor(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
Vec zero_below(Vec a, Vec limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, limit.v, _CMP_NLT_UQ), a.v)};
}

// A running sum in float64.
struct Sum {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  void add(Vec a) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};
#else
uint32_t at_least(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)); }
uint32_t any_nan(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)); }
Vec floor(Vec a) { return {_mm256_floor_ps(a.v)}; }
Vec zero_below(Vec a, Vec limit) { return {_mm256_and_ps(a.v, _mm256_cmp_ps(a.v, limit.v, _CMP_NLT_UQ))}; }

struct Sum {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  void add(Vec a) {
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
  }
  double total() const {
    alignas(32) double part[4];
    _mm256_store_pd(part, _mm256_add_pd(low, high));
    return (part[0] + part[1]) + (part[2] + part[3]);
  }
};
#endif

struct Parameters {
  float temperature;
  int64_t top_k;  // at most the vocabulary; 1 is greedy
  double top_p;
  float min_p;
  double u;
};

struct Candidate {
  uint64_t key;  // orders by value, then by lower id
  float weight;
  int64_t id() const { return 0xFFFFFFFF - (key & 0xFFFFFFFF); }
};

uint64_t key_of(float value, int64_t id) {
  value += 0.0f;  // -0 equals 0
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = bits >> 31 ? ~bits : bits | 0x80000000;
  return uint64_t{bits} << 32 | (0xFFFFFFFF - static_cast<uint64_t>(id));
}

bool before(const Candidate& a, const Candidate& b) { return a.key > b.key; }

struct Selected {
  int64_t id;
  double sum;  // of the weights up to it and with it
};

// The first candidate, by falling key, at which the running sum of weights reaches `amount` (Blum et al. 1973, weighted).
Selected select(Candidate* first, Candidate* last, double amount) {
  double sum = 0;  // of what lies before `first` in falling order
  for (int rounds = 0; last - first > 32 && rounds < 100; rounds++) {
    uint64_t a = first->key, b = first[(last - first) / 2].key, c = last[-1].key;
    uint64_t pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    double front = 0;
    Candidate* middle = first;
    for (Candidate* at = first; at != last; at++) {
      if (at->key < pivot) continue;
      front += at->weight;
      std::swap(*at, *middle++);
    }
    // Keys differ, so the pivot is not the lowest of the three: both sides are smaller than the whole.
    if (sum + front >= amount) {
      last = middle;
    } else {
      sum += front;
      first = middle;
    }
  }
  std::sort(first, last, before);
  for (Candidate* at = first;; at++) {
    sum += at->weight;
    if (sum >= amount || at + 1 == last) return {at->id(), sum};
  }
}

double target_of(double total, double u) { return std::min(std::floor(total * u), total - 1); }

// Per thread, or per row where threads share a row.
struct Scratch {
  std::vector<float> block_max, chunk_max;
  std::vector<double> chunk_sum;
  void resize(int64_t cols) {
    block_max.resize((cols + kBlock - 1) / kBlock);
    chunk_max.resize((cols + kChunk - 1) / kChunk);
    chunk_sum.resize(chunk_max.size());
  }
};

struct Work {
  std::vector<float> maxima;
  std::vector<Candidate> candidates;
};
thread_local Work work;

// One row of logits and what is known of it. Ids below are columns; a scaled logit is the logit over the temperature.
template <class T>
class Row {
 public:
  Row(const T* x, int64_t cols, const Parameters& parameters, Scratch& scratch)
      : x_(x),
        cols_(cols),
        blocks_((cols + kBlock - 1) / kBlock),
        p_(parameters),
        scratch_(scratch),
        temperature_(Vec::all(parameters.temperature)),
        scale_(static_cast<float>(std::ldexp(1.0, scale_exponent(cols)))) {}

  // Step 1, for each chunk: the largest logits of the chunk and its blocks. NaN if there is one.
  void find_max(int64_t chunk) {
    const int64_t end = std::min(cols_, (chunk + 1) * kChunk);
    float most = -INFINITY;
    uint32_t nan = 0;
    for (int64_t begin = chunk * kChunk; begin < end; begin += kBlock) {
      float block = -INFINITY;
      if (begin + kBlock <= end) {
        Vec part = Vec::all(-INFINITY);
        for (int64_t i = begin; i < begin + kBlock; i += 2 * Vec::width) {
          Vec a = Vec::load(x_ + i), b = Vec::load(x_ + i + Vec::width);
          nan |= any_nan(a, b);
          part = max(part, max(a, b));
        }
        block = part.max();
      } else {
        for (int64_t i = begin; i < end; i++) {
          float value = to_float(x_[i]);
          nan |= value != value;
          block = value > block ? value : block;
        }
      }
      scratch_.block_max[begin / kBlock] = block;
      most = block > most ? block : most;
    }
    scratch_.chunk_max[chunk] = nan ? NAN : most;
  }

  // Step 2: the row's largest scaled logit, and from where on weights may be other than zero.
  void merge_max() {
    top_ = -INFINITY;
    for (float chunk : scratch_.chunk_max) {
      if (!(chunk <= top_)) top_ = chunk;
      if (chunk != chunk) break;
    }
    top_ = top_ / p_.temperature;
    // One power of two and a thousandth more than needed, for what exp may be off.
    double least = -0.6931471805599453 * (scale_exponent(cols_) + 1);
    if (p_.min_p > 0) least = std::max(least, std::log(double{p_.min_p}) - 1e-3);
    least_ = top_ + static_cast<float>(least);
  }

  bool needs_sums() const { return p_.top_k >= cols_ && std::isfinite(top_); }

  // Step 3, for each chunk if needed: the sum of its weights.
  void add_up(int64_t chunk) {
    scratch_.chunk_sum[chunk] = sum_of(chunk * kChunk, std::min(cols_, (chunk + 1) * kChunk));
  }

  // Step 4.
  int64_t choose() {
    if (p_.top_k <= 1) return std::isnan(top_) ? 0 : first_largest();
    if (!std::isfinite(top_)) return 0;
    if (p_.top_k < cols_) return draw_top_k();
    double total = 0;
    for (double sum : scratch_.chunk_sum) total += sum;
    return p_.top_p < 1 ? draw_top_p(total) : draw_any(total);
  }

  float top() const { return top_; }

 private:
  static int scale_exponent(int64_t cols) {
    return std::min(40, 53 - static_cast<int>(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(cols, 2) - 1))));
  }

  float scaled(float value) const { return value / p_.temperature; }

  Vec weight(Vec scaled) const {
    return floor(zero_below(exp(scaled - Vec::all(top_)), Vec::all(p_.min_p)) * Vec::all(scale_));
  }

  // body(first id, scaled logits, how many) for the vectors of a block.
  template <class Body>
  void each_vector(int64_t block, const Body& body) const {
    const int64_t begin = block * kBlock;
    sweep(std::min(kBlock, cols_ - begin), [&](int64_t i, auto n) __attribute__((always_inline)) {
      body(begin + i, Vec::load(x_ + begin + i, n) / temperature_, n);
    });
  }

  static uint32_t lanes(int n) { return n >= 32 ? ~0u : (1u << n) - 1; }

  double sum_of(int64_t begin, int64_t end) const {
    Sum sum;
    for (int64_t block = begin / kBlock; block * kBlock < end; block++) {
      if (scaled(scratch_.block_max[block]) < least_) continue;
      each_vector(block, [&](int64_t, Vec s, auto n) {
        Vec weights = weight(s);
        if (n < Vec::width) {
          float part[Vec::width] = {};
          weights.store(part, n);
          weights = Vec::load(part);
        }
        sum.add(weights);
      });
    }
    return sum.total();
  }

  int64_t first_largest() const {
    for (int64_t block = 0; block < blocks_; block++) {
      if (scaled(scratch_.block_max[block]) != top_) continue;
      int64_t found = -1;
      each_vector(block, [&](int64_t id, Vec s, auto n) {
        uint32_t equal = at_least(s, Vec::all(top_)) & lanes(n);
        if (found < 0 && equal) found = id + std::countr_zero(equal);
      });
      if (found >= 0) return found;
    }
    return 0;
  }

  // The first id whose running sum of weights exceeds the target: its chunk, its block, itself.
  int64_t draw_any(double total) const {
    double left = target_of(total, p_.u);
    int64_t chunk = 0, chunks = scratch_.chunk_sum.size();
    for (; chunk + 1 < chunks && left >= scratch_.chunk_sum[chunk]; chunk++) left -= scratch_.chunk_sum[chunk];
    const int64_t end = std::min(blocks_, (chunk + 1) * (kChunk / kBlock));
    for (int64_t block = chunk * (kChunk / kBlock); block < end; block++) {
      double sum = sum_of(block * kBlock, std::min(cols_, (block + 1) * kBlock));
      if (left >= sum) {
        left -= sum;
        continue;
      }
      int64_t found = -1;
      each_vector(block, [&](int64_t id, Vec s, auto n) {
        float weights[Vec::width];
        weight(s).store(weights);
        for (int i = 0; i < n && found < 0; i++) {
          if (left < weights[i]) found = id + i;
          left -= weights[i];
        }
      });
      return found;
    }
    return cols_ - 1;
  }

  int64_t draw_top_k() const {
    std::vector<Candidate>& candidates = work.candidates;
    collect(p_.top_k);
    if (static_cast<int64_t>(candidates.size()) > p_.top_k) {
      std::nth_element(candidates.begin(), candidates.begin() + p_.top_k, candidates.end(), before);
      candidates.resize(p_.top_k);
    }
    double total = 0;
    for (const Candidate& candidate : candidates) total += candidate.weight;
    return draw_nucleus(total);
  }

  int64_t draw_top_p(double total) const {
    collect(kNucleus);
    double sum = 0;
    for (const Candidate& candidate : work.candidates) sum += candidate.weight;
    if (sum < total * p_.top_p) collect(cols_);
    return draw_nucleus(total);
  }

  // Among the fewest leading candidates that hold top_p of the total.
  int64_t draw_nucleus(double total) const {
    Candidate *first = work.candidates.data(), *last = first + work.candidates.size();
    double kept = select(first, last, total * p_.top_p).sum;
    return select(first, last, target_of(kept, p_.u) + 1).id;
  }

  // Makes work.candidates the tokens from some scaled logit on, in no order: all of them, at least `count` of them unless
  // fewer have a weight. The count-th largest maximum of the blocks is such a logit.
  void collect(int64_t count) const {
    float least = least_;
    if (2 * count <= blocks_) {
      std::vector<float>& maxima = work.maxima;
      maxima = scratch_.block_max;
      std::nth_element(maxima.begin(), maxima.begin() + (count - 1), maxima.end(), std::greater<float>());
      least = std::max(least, scaled(maxima[count - 1]));
    }
    std::vector<Candidate>& candidates = work.candidates;
    candidates.clear();
    for (int64_t block = 0; block < blocks_; block++) {
      if (scaled(scratch_.block_max[block]) < least) continue;
      each_vector(block, [&](int64_t id, Vec s, auto n) {
        uint32_t taken = at_least(s, Vec::all(least)) & lanes(n);
        if (!taken) return;
        float values[Vec::width], weights[Vec::width];
        s.store(values);
        weight(s).store(weights);
        for (; taken; taken &= taken - 1) {
          int i = std::countr_zero(taken);
          candidates.push_back({key_of(values[i], id + i), weights[i]});
        }
      });
    }
  }

  const T* x_;
  int64_t cols_, blocks_;
  Parameters p_;
  Scratch& scratch_;
  Vec temperature_;
  float scale_, top_ = 0, least_ = 0;
};

Parameters parameters_of(const Rows<double>& numbers, int64_t row, int64_t cols) {
  double top_k = numbers[1][row];
  return {static_cast<float>(numbers[0][row]), top_k < double(cols) ? static_cast<int64_t>(std::max(top_k, 1.0)) : cols,
          numbers[2][row], static_cast<float>(numbers[3][row]), numbers[4][row]};
}

}  // namespace

// tokens int64 [R] and tops float32 [R], each row's largest scaled logit, from logits [R, V], which stay as they are.
// numbers float64 [5, R]: temperature, top_k, top_p, min_p, u; without them all rows are greedy. Where a row's top is not
// finite, its token is any of the vocabulary.
void choose_tokens(TensorView tokens, TensorView tops, TensorView logits, ffi::Optional<TensorView> numbers) {
  dispatch_float(logits, [&]<class T>(T*) {
    auto from = rows_of<T>(logits);
    SKYLINE_CHECK(is_int64(tokens) && is_float32(tops), "gives int64 tokens and float32 tops");
    SKYLINE_CHECK(tokens.ndim() == 1 && tops.ndim() == 1 && tokens.shape()[0] == from.rows &&
                      tops.shape()[0] == from.rows && (from.rows <= 1 || (tokens.stride(0) == 1 && tops.stride(0) == 1)),
                  "takes a contiguous vector with an entry for each row");
    SKYLINE_CHECK(0 < from.cols && from.cols < (int64_t{1} << 31), "takes a vocabulary of 1 to 2^31 - 1 tokens");
    Rows<double> given{};
    if (numbers.has_value()) {
      SKYLINE_CHECK(numbers.value().dtype().code == kDLFloat, "takes float64 numbers");
      given = rows_of<double>(numbers.value());
      SKYLINE_CHECK(given.rows == 5 && given.cols == from.rows, "takes 5 numbers for each row");
    }
    auto row_at = [&](int64_t row, Scratch& scratch) {
      Parameters greedy{1, 1, 1, 0, 0};
      return Row<T>(from[row], from.cols, given.data ? parameters_of(given, row, from.cols) : greedy, scratch);
    };
    int64_t* token = data<int64_t>(tokens);
    float* top = data<float>(tops);
    ThreadPool& pool = ThreadPool::get();
    const int64_t chunks = (from.cols + kChunk - 1) / kChunk;

    if (from.rows >= 4 * pool.size()) {  // a row stays in the cache of one thread
      pool.run_ranges(from.rows, 1 + 16384 / (from.cols + 1), [&](int64_t begin, int64_t end) {
        thread_local Scratch scratch;
        scratch.resize(from.cols);
        for (int64_t i = begin; i < end; i++) {
          Row<T> row = row_at(i, scratch);
          for (int64_t chunk = 0; chunk < chunks; chunk++) row.find_max(chunk);
          row.merge_max();
          for (int64_t chunk = 0; chunk < chunks && row.needs_sums(); chunk++) row.add_up(chunk);
          token[i] = row.choose();
          top[i] = row.top();
        }
      });
      return;
    }

    thread_local std::vector<Scratch> scratch;
    if (static_cast<int64_t>(scratch.size()) < from.rows) scratch.resize(from.rows);
    std::vector<Row<T>> rows;
    for (int64_t i = 0; i < from.rows; i++) {
      scratch[i].resize(from.cols);
      rows.push_back(row_at(i, scratch[i]));
    }
    auto each_chunk = [&](const auto& body) {
      pool.run_ranges(from.rows * chunks, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) body(rows[i / chunks], i % chunks);
      });
    };
    each_chunk([](Row<T>& row, int64_t chunk) { row.find_max(chunk); });
    bool sums = false;
    for (Row<T>& row : rows) {
      row.merge_max();
      sums |= row.needs_sums();
    }
    if (sums) {
      each_chunk([](Row<T>& row, int64_t chunk) {
        if (row.needs_sums()) row.add_up(chunk);
      });
    }
    pool.run(from.rows, [&](int64_t i) {
      token[i] = rows[i].choose();
      top[i] = rows[i].top();
    });
  });
}

// out float32, x bfloat16, both [R, V].
void widen(TensorView out, TensorView x) {
  SKYLINE_CHECK(is_float32(out) && is_bf16(x), "turns bfloat16 into float32");
  auto to = rows_of<float>(out);
  auto from = rows_of<bf16>(x);
  SKYLINE_CHECK(to.rows == from.rows && to.cols == from.cols, "shapes do not match");
  const int64_t chunks = (to.cols + kChunk - 1) / kChunk;
  ThreadPool::get().run_ranges(to.rows * chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; piece++) {
      int64_t start = piece % chunks * kChunk;
      const bf16* source = from[piece / chunks] + start;
      float* target = to[piece / chunks] + start;
      sweep(std::min(kChunk, to.cols - start), [&](int64_t i, auto n) { Vec::load(source + i, n).store(target + i, n); });
    }
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(choose_tokens, choose_tokens);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(widen, widen);

}  // namespace skyline
