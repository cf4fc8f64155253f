#include "backend/reduce.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_local_scalar_dense.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <type_traits>

#include "fmt/format.h"

namespace soap::backend {
namespace {

using c10d::ReduceOp;

// In what elements of type T are combined.
template <class T>
struct Accumulate {
  using type = T;
};
template <>
struct Accumulate<at::Half> {
  using type = float;
};
template <>
struct Accumulate<at::BFloat16> {
  using type = float;
};
template <>
struct Accumulate<at::Float8_e4m3fn> {
  using type = float;
};
template <>
struct Accumulate<at::Float8_e5m2> {
  using type = float;
};
template <>
struct Accumulate<at::Float8_e4m3fnuz> {
  using type = float;
};
template <>
struct Accumulate<at::Float8_e5m2fnuz> {
  using type = float;
};

template <class A>
constexpr bool kComplex = false;
template <class R>
constexpr bool kComplex<c10::complex<R>> = true;

template <class A>
bool is_nan(A value) {
  return value != value;
}

// What two elements make; A is the type of accumulation.
template <class A>
struct Sum {
  static A combine(A a, A b) {
    if constexpr (std::is_same_v<A, bool>)
      return a || b;
    else
      return static_cast<A>(a + b);
  }
};
template <class A>
struct Product {
  static A combine(A a, A b) {
    if constexpr (std::is_same_v<A, bool>)
      return a && b;
    else
      return static_cast<A>(a * b);
  }
};
template <class A>
struct Min {
  static A combine(A a, A b) { return is_nan(a) || a < b ? a : b; }
};
template <class A>
struct Max {
  static A combine(A a, A b) { return is_nan(a) || a > b ? a : b; }
};
template <class A>
struct And {
  static A combine(A a, A b) { return static_cast<A>(a & b); }
};
template <class A>
struct Or {
  static A combine(A a, A b) { return static_cast<A>(a | b); }
};
template <class A>
struct Xor {
  static A combine(A a, A b) { return static_cast<A>(a ^ b); }
};

struct Ends {  // before and after combining
  bool scaled = false;
  double factor = 1;    // of each source
  int64_t divisor = 1;  // of the result
};

template <class T, class A, template <class> class Op>
void combine(std::byte* to, const std::vector<const std::byte*>& sources, uint64_t num_elements, const Ends& ends) {
  T* out = reinterpret_cast<T*>(to);
  if constexpr (std::is_same_v<T, A>) {
    if (sources.size() == 2 && !ends.scaled && ends.divisor == 1) {
      const T* first = reinterpret_cast<const T*>(sources[0]);
      const T* second = reinterpret_cast<const T*>(sources[1]);
      for (uint64_t i = 0; i < num_elements; ++i) out[i] = Op<A>::combine(first[i], second[i]);
      return;
    }
  }
  // `out` may be a source that is read after the first: sums wait in a block.
  constexpr uint64_t kBlock = 512;
  std::array<A, kBlock> block;
  const A factor = static_cast<A>(ends.factor), divisor = static_cast<A>(ends.divisor);
  for (uint64_t begin = 0; begin < num_elements; begin += kBlock) {
    const uint64_t size = std::min(kBlock, num_elements - begin);
    for (std::size_t s = 0; s < sources.size(); ++s) {
      const T* source = reinterpret_cast<const T*>(sources[s]) + begin;
      const auto each = [&](auto value) {
        if (s == 0) {
          for (uint64_t i = 0; i < size; ++i) block[i] = value(source[i]);
        } else {
          for (uint64_t i = 0; i < size; ++i) block[i] = Op<A>::combine(block[i], value(source[i]));
        }
      };
      if (ends.scaled) {
        each([&](T value) { return static_cast<A>(static_cast<A>(value) * factor); });
      } else {
        each([](T value) { return static_cast<A>(value); });
      }
    }
    if (ends.divisor == 1) {
      for (uint64_t i = 0; i < size; ++i) out[begin + i] = static_cast<T>(block[i]);
    } else {
      for (uint64_t i = 0; i < size; ++i) out[begin + i] = static_cast<T>(block[i] / divisor);
    }
  }
}

template <class T, template <class> class Op>
transport::Reducer reducer_of(const Ends& ends) {
  using A = typename Accumulate<T>::type;
  return {sizeof(T),
          [ends](std::byte* out, const std::vector<const std::byte*>& sources, uint64_t num_elements) { combine<T, A, Op>(out, sources, num_elements, ends); }};
}

[[noreturn]] void cannot(at::ScalarType dtype, const ReduceOp& reduce) {
  C10_THROW_ERROR(ValueError, fmt::format("[soap] Cannot use ReduceOp.{} with tensors of dtype {}", name_of(reduce), c10::toString(dtype)));
}

template <class T>
transport::Reducer reducer_for(at::ScalarType dtype, const ReduceOp& reduce, int num_ranks) {
  using A = typename Accumulate<T>::type;
  Ends ends;
  switch (reduce.op_) {
    case ReduceOp::PREMUL_SUM: {
      const auto* supplement = dynamic_cast<const c10d::PreMulSumSupplement*>(reduce.supplement_.get());
      if (supplement == nullptr || std::is_same_v<T, bool>) cannot(dtype, reduce);
      ends.scaled = true;
      ends.factor = supplement->tensor_factor.defined() ? at::_local_scalar_dense(supplement->tensor_factor).toDouble() : supplement->double_factor;
      return reducer_of<T, Sum>(ends);
    }
    case ReduceOp::AVG:
      if (std::is_same_v<T, bool>) cannot(dtype, reduce);
      ends.divisor = num_ranks;
      return reducer_of<T, Sum>(ends);
    case ReduceOp::SUM: return reducer_of<T, Sum>(ends);
    case ReduceOp::PRODUCT: return reducer_of<T, Product>(ends);
    default: break;
  }
  if constexpr (!kComplex<A>) {
    if (reduce.op_ == ReduceOp::MIN) return reducer_of<T, Min>(ends);
    if (reduce.op_ == ReduceOp::MAX) return reducer_of<T, Max>(ends);
  }
  if constexpr (std::is_integral_v<A>) {
    if (reduce.op_ == ReduceOp::BAND) return reducer_of<T, And>(ends);
    if (reduce.op_ == ReduceOp::BOR) return reducer_of<T, Or>(ends);
    if (reduce.op_ == ReduceOp::BXOR) return reducer_of<T, Xor>(ends);
  }
  cannot(dtype, reduce);
}

}  // namespace

std::string name_of(const ReduceOp& reduce) {
  switch (reduce.op_) {
    case ReduceOp::SUM: return "SUM";
    case ReduceOp::AVG: return "AVG";
    case ReduceOp::PRODUCT: return "PRODUCT";
    case ReduceOp::MIN: return "MIN";
    case ReduceOp::MAX: return "MAX";
    case ReduceOp::BAND: return "BAND";
    case ReduceOp::BOR: return "BOR";
    case ReduceOp::BXOR: return "BXOR";
    case ReduceOp::PREMUL_SUM: return "PREMUL_SUM";
    default: return "UNUSED";
  }
}

transport::Reducer make_reducer(at::ScalarType dtype, const ReduceOp& reduce, int num_ranks) {
  switch (dtype) {
    case at::kBool: return reducer_for<bool>(dtype, reduce, num_ranks);
    case at::kByte: return reducer_for<uint8_t>(dtype, reduce, num_ranks);
    case at::kChar: return reducer_for<int8_t>(dtype, reduce, num_ranks);
    case at::kShort: return reducer_for<int16_t>(dtype, reduce, num_ranks);
    case at::kInt: return reducer_for<int32_t>(dtype, reduce, num_ranks);
    case at::kLong: return reducer_for<int64_t>(dtype, reduce, num_ranks);
    case at::kUInt16: return reducer_for<uint16_t>(dtype, reduce, num_ranks);
    case at::kUInt32: return reducer_for<uint32_t>(dtype, reduce, num_ranks);
    case at::kUInt64: return reducer_for<uint64_t>(dtype, reduce, num_ranks);
    case at::kHalf: return reducer_for<at::Half>(dtype, reduce, num_ranks);
    case at::kBFloat16: return reducer_for<at::BFloat16>(dtype, reduce, num_ranks);
    case at::kFloat: return reducer_for<float>(dtype, reduce, num_ranks);
    case at::kDouble: return reducer_for<double>(dtype, reduce, num_ranks);
    case at::kComplexFloat: return reducer_for<c10::complex<float>>(dtype, reduce, num_ranks);
    case at::kComplexDouble: return reducer_for<c10::complex<double>>(dtype, reduce, num_ranks);
    case at::kFloat8_e4m3fn: return reducer_for<at::Float8_e4m3fn>(dtype, reduce, num_ranks);
    case at::kFloat8_e5m2: return reducer_for<at::Float8_e5m2>(dtype, reduce, num_ranks);
    case at::kFloat8_e4m3fnuz: return reducer_for<at::Float8_e4m3fnuz>(dtype, reduce, num_ranks);
    case at::kFloat8_e5m2fnuz: return reducer_for<at::Float8_e5m2fnuz>(dtype, reduce, num_ranks);
    default: cannot(dtype, reduce);
  }
}

transport::Reducers make_reducers(at::ScalarType dtype, const ReduceOp& reduce, int num_ranks) {
  switch (reduce.op_) {
    case ReduceOp::AVG:
      // Sums of small floats may be out of range where the mean is not; integers are cut once.
      if (c10::isFloatingType(dtype) && c10::elementSize(dtype) <= 2) {
        return {make_reducer(dtype, reduce, num_ranks), make_reducer(dtype, ReduceOp::SUM, num_ranks), false};
      }
      return {make_reducer(dtype, ReduceOp::SUM, num_ranks), make_reducer(dtype, reduce, num_ranks), true};
    case ReduceOp::PREMUL_SUM: return {make_reducer(dtype, reduce, num_ranks), make_reducer(dtype, ReduceOp::SUM, num_ranks), false};
    default: return {make_reducer(dtype, reduce, num_ranks), make_reducer(dtype, reduce, num_ranks), true};
  }
}

}  // namespace soap::backend
