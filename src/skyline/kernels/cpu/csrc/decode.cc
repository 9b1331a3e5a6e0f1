// The ends of a decode step, in which each of R requests computes one token: what the model reads, and where its tokens go.
#include <algorithm>

#include "tensors.h"

namespace skyline {
namespace {

// Where slot `slot` has position `at` in rows [slots, positions].
template <class T>
T& at(const Rows<T>& rows, int64_t slot, int64_t position) {
  SKYLINE_CHECK(slot >= 0 && slot < rows.rows && position >= 0 && position < rows.cols, "there is no such slot or position");
  return rows[slot][position];
}

}  // namespace

// ids, positions int64 [R] and context_lens int32 [R] of the tokens at starts int64 [R] of slots int64 [R] in token_ids int32
// [slots, positions].
void decode_inputs(TensorView ids, TensorView positions, TensorView context_lens, TensorView slots, TensorView starts,
                   TensorView token_ids) {
  SKYLINE_CHECK(is_int32(token_ids), "takes token ids of int32");
  const int64_t count = ids.shape()[0];
  int64_t *id = list_of<int64_t>(ids, count), *position = list_of<int64_t>(positions, count);
  int32_t* context = list_of<int32_t>(context_lens, count);
  const int64_t *slot = list_of<int64_t>(slots, count), *start = list_of<int64_t>(starts, count);
  const Rows<int32_t> tokens = rows_of<int32_t>(token_ids);
  for (int64_t r = 0; r < count; r++) {
    id[r] = at(tokens, slot[r], start[r]);
    position[r] = start[r];
    context[r] = static_cast<int32_t>(start[r] + 1);
  }
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_inputs, decode_inputs);

// tables int32 [R, blocks]: the slots' rows of block_tables int32 [slots, blocks], as far as their contexts reach; places int64 [R]:
// where the tokens at `starts` lie in a cache of such blocks.
void decode_places(TensorView places, TensorView tables, TensorView block_tables, TensorView slots, TensorView starts, int64_t block_size) {
  SKYLINE_CHECK(is_int32(tables) && is_int32(block_tables) && block_size > 0, "takes block tables of int32");
  const int64_t count = places.shape()[0];
  int64_t* place = list_of<int64_t>(places, count);
  const int64_t *slot = list_of<int64_t>(slots, count), *start = list_of<int64_t>(starts, count);
  const Rows<int32_t> from = rows_of<int32_t>(block_tables), to = rows_of<int32_t>(tables);
  SKYLINE_CHECK(to.rows == count && to.cols == from.cols, "takes tables of one width");
  for (int64_t r = 0; r < count; r++) {
    const int64_t last = start[r] / block_size, block = at(from, slot[r], last);
    std::copy_n(from[slot[r]], last + 1, to[r]);
    place[r] = block * block_size + start[r] % block_size;
  }
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_places, decode_places);

// Puts tokens int64 [R] behind those at `starts` of the slots.
void decode_outputs(TensorView token_ids, TensorView slots, TensorView starts, TensorView tokens) {
  SKYLINE_CHECK(is_int32(token_ids), "takes token ids of int32");
  const int64_t count = tokens.shape()[0];
  const int64_t* token = list_of<int64_t>(tokens, count);
  const int64_t *slot = list_of<int64_t>(slots, count), *start = list_of<int64_t>(starts, count);
  const Rows<int32_t> to = rows_of<int32_t>(token_ids);
  for (int64_t r = 0; r < count; r++) at(to, slot[r], start[r] + 1) = static_cast<int32_t>(token[r]);
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_outputs, decode_outputs);

}  // namespace skyline
