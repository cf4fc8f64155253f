// Collectives of movements: memory instead of tensors.
#include <cstring>

#include "backend/reduce.h"
#include "backend/soap_backend.h"
#include "fmt/format.h"
#include "transport/spanning_collectives.h"

namespace soap::backend {
namespace {

using c10d::OpType;
using transport::Memory;

// The same on a rank that sums what comes and on one that doesn't.
constexpr const char* kExchange = "exchange";

std::vector<bool> not_empty(const std::vector<Memory>& of_ranks) {
  std::vector<bool> out;
  for (const Memory& memory : of_ranks) out.push_back(memory.num_bytes() > 0);
  return out;
}

}  // namespace

void SoapBackend::exchange_memory(std::vector<Memory> outgoing, std::vector<Memory> incoming) {
  outgoing[rank_] = incoming[rank_] = Memory();
  const Call call{OpType::ALLTOALL_BASE, "all_to_all", kExchange, c10d::kUnsetTimeout, true};
  if (spanning_ == nullptr) {
    exchange(call, std::move(outgoing), std::move(incoming), std::vector<bool>(size_, true), {}, {}, {})->wait();
    return;
  }
  // Both sides know of each message whether there is one: who only sends to other hosts waits for nobody there.
  std::vector<bool> sends = not_empty(outgoing), wanted = not_empty(incoming);
  auto operation = std::make_shared<transport::SpanningExchange>(std::move(outgoing), std::move(sends), std::move(incoming), std::move(wanted));
  run(call, std::move(operation), {}, {}, {})->wait();
}

void SoapBackend::exchange_sum(std::vector<Memory> outgoing, const Memory& result, at::ScalarType dtype) {
  auto operation = std::make_shared<transport::ReduceScatter>(rank_, size_, std::move(outgoing), result, make_reducer(dtype, c10d::ReduceOp::SUM, size_));
  const Call call{OpType::ALLTOALL_BASE, "all_to_all", kExchange, c10d::kUnsetTimeout, true};
  run(call, std::move(operation), {}, {}, {})->wait();
}

void SoapBackend::all_reduce_memory(const Memory& source, const Memory& result, at::ScalarType dtype, bool maximum) {
  const c10d::ReduceOp reduce = maximum ? c10d::ReduceOp::MAX : c10d::ReduceOp::SUM;
  std::shared_ptr<transport::Operation> operation;
  if (spanning_ != nullptr) {
    uint64_t begin = 0;
    result.for_each(0, result.num_bytes(), [&](std::byte* to, uint64_t, uint64_t bytes) {
      source.for_each(begin, bytes, [&](const std::byte* from, uint64_t offset, uint64_t inner) { std::memmove(to + offset, from, inner); });
      begin += bytes;
    });
    operation = std::make_shared<transport::SpanningAllReduce>(result, make_reducers(dtype, reduce, size_));
  } else {
    operation = std::make_shared<transport::AllReduce>(rank_, size_, source, result, make_reducer(dtype, reduce, size_));
  }
  const std::string text = fmt::format("all_reduce({} of {})", name_of(reduce), c10::toString(dtype));
  const Call call{OpType::ALLREDUCE, "all_reduce", text, c10d::kUnsetTimeout, true};
  run(call, std::move(operation), {}, {}, {})->wait();
}

}  // namespace soap::backend
