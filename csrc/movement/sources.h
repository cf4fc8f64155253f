// Tensors as the pieces of movements read them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "base/error.h"

namespace soap::movement {

inline int64_t bytes_of(at::ScalarType dtype) {
  return static_cast<int64_t>(c10::elementSize(dtype));
}

inline const char* data_of(const at::Tensor& tensor) {
  return static_cast<const char*>(tensor.const_data_ptr());
}

// A source as its memory has it: on the CPU, strided, without lazy conjugation.
inline at::Tensor plain(const at::Tensor& source) {
  SOAP_CHECK(source.defined() && source.is_cpu() && source.layout() == at::kStrided, "a source of a movement is no strided tensor on the CPU");
  return source.is_conj() || source.is_neg() ? source.resolve_conj().resolve_neg() : source;
}

inline std::vector<at::Tensor> plain(const std::vector<at::Tensor>& sources) {
  std::vector<at::Tensor> out;
  out.reserve(sources.size());
  for (const at::Tensor& source : sources) out.push_back(plain(source));
  return out;
}

template <class T>
const T& at_index(const std::vector<T>& list, int index, const char* what) {
  SOAP_CHECK(index >= 0 && static_cast<size_t>(index) < list.size(), "{} {} of {}", what, index, list.size());
  return list[index];
}

}  // namespace soap::movement
