// Tensors and a reducer that the tests of the transport share.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

#include "transport/collectives.h"

namespace soap::transport {

using Floats = std::vector<float>;

inline Memory memory_of(Floats& values) {
  return Memory(values.data(), values.size() * sizeof(float));
}

// Not commutative in its bits: the order of the ranks shows.
inline float fold(float a, float b) {
  return a * 0.75F + b;
}

inline Reducer reducer() {
  return {sizeof(float), [](std::byte* out, const std::vector<const std::byte*>& sources, uint64_t num_elements) {
            Floats sum(num_elements);
            for (std::size_t s = 0; s < sources.size(); ++s) {
              const float* source = reinterpret_cast<const float*>(sources[s]);
              for (uint64_t i = 0; i < num_elements; ++i) sum[i] = s == 0 ? source[i] : fold(sum[i], source[i]);
            }
            std::memcpy(out, sum.data(), num_elements * sizeof(float));
          }};
}

inline Floats values(int rank, std::size_t count) {
  Floats out(count);
  for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>((i * 7 + rank * 13) % 101);
  return out;
}

}  // namespace soap::transport
