// Whole rows of a run-time float dtype moved through fp32 buffers, so that the row kernels are
// written once, in fp32.
#pragma once
#include "vec.h"

namespace go {

inline bool is_float(int dtype) { return dtype == F32 || dtype == BF16 || dtype == F16; }
inline bool is_dtype(int dtype) { return dtype >= F32 && dtype <= BOOL; }
inline int64_t item_size(int dtype) {
  constexpr int64_t SIZES[] = {4, 2, 2, 8, 4, 1, 1, 1};
  return SIZES[dtype];
}

// Calls f(Float<dtype>{}) for a float dtype.
template <class F>
GO_INLINE void with_float(int dtype, F&& f) {
  if (dtype == F32) {
    f(Float<F32>{});
  } else if (dtype == BF16) {
    f(Float<BF16>{});
  } else {
    f(Float<F16>{});
  }
}

// n contiguous elements <-> fp32.
void load_row(const void* from, int dtype, int64_t n, float* to);
void store_row(const float* from, void* to, int dtype, int64_t n);
// Rounds n fp32 values to what `dtype` can hold.
void round_row(float* row, int dtype, int64_t n);

// The address of element `index` of an array of `dtype`.
GO_INLINE char* at(char* base, int dtype, int64_t index) { return base + index * item_size(dtype); }

}  // namespace go
