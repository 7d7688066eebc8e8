#include "rows.h"

namespace go {

void load_row(const void* from, int dtype, int64_t n, float* to) {
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    const auto* p = static_cast<const typename T::Storage*>(from);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, T::load(p + i));
    for (; i < n; ++i) to[i] = T::get(p[i]);
  });
}

void store_row(const float* from, void* to, int dtype, int64_t n) {
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    auto* p = static_cast<typename T::Storage*>(to);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) T::store(p + i, load(from + i));
    for (; i < n; ++i) p[i] = T::put(from[i]);
  });
}

void round_row(float* row, int dtype, int64_t n) {
  if (dtype == F32) return;
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < n; ++i) row[i] = T::get(T::put(row[i]));
  });
}

}  // namespace go
