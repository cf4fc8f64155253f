// Movements without packing: memory where what goes lies, and where what comes stays.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "movement/movement.h"
#include "movement/sources.h"
#include "movement/strided.h"

namespace soap::movement {

using kernels::cpu::Block;
using kernels::cpu::Nest;
using transport::Memory;

namespace {

// Adds a part of a tensor, in the order of its elements; without rows a copy of it, which `held` gets.
void add_part(Memory& memory, const at::Tensor& tensor, const Part& part, const std::vector<int64_t>& strides, const std::vector<Block>& blocks,
              std::vector<at::Tensor>& held, Nest& nest) {
  if (part.elements == 0) return;
  if (blocks.size() == 1) {
    kernels::cpu::lay_out(blocks.front(), tensor.strides(), strides, nest);
    if (add_rows(memory, const_cast<char*>(data_of(tensor)), nest, true, bytes_of(tensor.scalar_type()))) return;
  }
  const at::Tensor copy = held.emplace_back(at::empty(part.shape, tensor.options()));
  combine(static_cast<char*>(copy.mutable_data_ptr()), tensor.scalar_type(), strides,
          {.data = data_of(tensor), .dtype = tensor.scalar_type(), .strides = tensor.strides()}, blocks, Combine::kReplace, nest);
  memory.add(copy.mutable_data_ptr(), copy.nbytes());
}

}  // namespace

std::vector<Memory> Packing::memory(const std::vector<at::Tensor>& sources, std::vector<at::Tensor>& held) const {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> tensors = plain(sources);
  std::vector<Memory> out(peer_bytes_.size());
  Nest nest;
  for (const Item& item : items_) {
    const at::Tensor& tensor = at_index(tensors, item.sent.source, "source");
    item.sent.part.check(tensor.sizes());
    SOAP_CHECK(tensor.scalar_type() == item.sent.dtype, "{} is sent as {}", c10::toString(tensor.scalar_type()), c10::toString(item.sent.dtype));
    add_part(out[item.sent.peer], tensor, item.sent.part, item.strides, item.blocks, held, nest);
  }
  held.insert(held.end(), tensors.begin(), tensors.end());
  return out;
}

Assembly::Landing Assembly::land(const std::vector<at::Tensor>& sources, const std::vector<std::optional<at::Tensor>>& places) const {
  SOAP_CHECK(places.empty() || places.size() == placed_.size(), "{} places for {} results", places.size(), placed_.size());
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> tensors = plain(sources);
  Landing out;
  out.incoming.resize(arrivals_.size());
  out.messages.resize(arrivals_.size());
  out.results.resize(plans_.size());
  Nest nest;
  at::Tensor unused;
  for (const auto& arrivals : arrivals_) {
    for (const auto& [index, unused_piece] : arrivals) {
      const Plan& plan = plans_[index];
      if (plan.result.combine != Combine::kReplace || out.results[index].defined()) continue;
      const auto found = std::find(placed_.begin(), placed_.end(), index);
      const at::Tensor target = out.results[index] =
          memory_for(plan.result, places.empty() || found == placed_.end() ? std::nullopt : places[found - placed_.begin()]);
      for (const Piece& piece : plan.pieces) {
        if (piece.arriving.source < 0) continue;
        combine(static_cast<char*>(target.mutable_data_ptr()), plan.result.sums, target.strides(), source_of(piece, plan.result.dtype, tensors, {}, unused),
                piece.blocks, Combine::kReplace, nest);
      }
    }
  }
  for (size_t m = 0; m < arrivals_.size(); ++m) {
    for (const auto& [index, which] : arrivals_[m]) {
      const Plan& plan = plans_[index];
      const Piece& piece = plan.pieces[which];
      if (const at::Tensor& target = out.results[index]; target.defined()) {
        if (piece.blocks.size() == 1) {
          kernels::cpu::lay_out(piece.blocks.front(), piece.strides, target.strides(), nest);
          if (add_rows(out.incoming[m], static_cast<char*>(target.mutable_data_ptr()), nest, false, bytes_of(plan.result.dtype))) continue;
        }
        out.unplaced.emplace_back(index, which);
      }
      at::Tensor& message = out.messages[m];
      if (!message.defined()) {
        const auto& [last_index, last] = arrivals_[m].back();
        const Arriving& end = plans_[last_index].pieces[last].arriving;
        message = at::empty({end.begin + end.from.elements * bytes_of(plans_[last_index].result.dtype)}, at::TensorOptions().dtype(at::kByte));
      }
      const Arriving& arriving = piece.arriving;
      out.incoming[m].add(static_cast<char*>(message.mutable_data_ptr()) + arriving.begin, arriving.from.elements * bytes_of(plan.result.dtype));
    }
  }
  return out;
}

std::vector<at::Tensor> Assembly::finish(Landing landing, const std::vector<at::Tensor>& sources) const {
  const at::NoGradGuard no_grad;
  Nest nest;
  for (const auto& [index, which] : landing.unplaced) {
    const Plan& plan = plans_[index];
    const at::Tensor& target = landing.results[index];
    at::Tensor buffer;
    combine(static_cast<char*>(target.mutable_data_ptr()), plan.result.sums, target.strides(),
            source_of(plan.pieces[which], plan.result.dtype, {}, landing.messages, buffer), plan.pieces[which].blocks, Combine::kReplace, nest);
  }
  const std::vector<at::Tensor> tensors = plain(sources);
  for (size_t i = 0; i < plans_.size(); ++i) {
    if (!landing.results[i].defined()) landing.results[i] = assemble(plans_[i], tensors, landing.messages, std::nullopt);
  }
  return std::move(landing.results);
}

bool Assembly::sums_all(int rank, int num_ranks, const std::vector<int>& from) const {
  if (arrivals_.size() + 1 != static_cast<size_t>(num_ranks) || from.size() != arrivals_.size() || plans_.empty()) return false;
  std::vector<int64_t> begins(num_ranks, 0);
  for (const Plan& plan : plans_) {
    const Result& result = plan.result;
    if (result.combine != Combine::kAdd || !c10::isFloatingType(result.dtype) || result.dtype != plans_.front().result.dtype) return false;
    if (plan.pieces.size() != static_cast<size_t>(num_ranks)) return false;
    for (int r = 0; r < num_ranks; ++r) {
      const Piece& piece = plan.pieces[r];
      if (!piece.whole || piece.arriving.to.elements == 0) return false;
      const bool local = piece.arriving.source >= 0;
      if ((local ? rank : from[piece.arriving.message]) != r) return false;
      if (local) continue;
      if (piece.arriving.begin != begins[r]) return false;
      begins[r] += piece.arriving.from.elements * bytes_of(result.dtype);
    }
  }
  return true;
}

Assembly::Sums Assembly::sums(const std::vector<at::Tensor>& sources) const {
  const at::NoGradGuard no_grad;
  Sums out;
  out.held = plain(sources);
  out.dtype = plans_.front().result.dtype;
  const size_t num_sources = out.held.size();
  Nest nest;
  for (const Plan& plan : plans_) {
    const at::Tensor& result = out.results.emplace_back(at::empty(plan.result.shape, at::TensorOptions().dtype(out.dtype)));
    out.memory.add(result.mutable_data_ptr(), result.nbytes());
    const Piece& own = *std::find_if(plan.pieces.begin(), plan.pieces.end(), [](const Piece& piece) { return piece.arriving.source >= 0; });
    SOAP_CHECK(static_cast<size_t>(own.arriving.source) < num_sources, "source {} of {}", own.arriving.source, num_sources);
    const at::Tensor tensor = out.held[own.arriving.source];
    own.arriving.from.check(tensor.sizes());
    SOAP_CHECK(tensor.scalar_type() == out.dtype, "{} is added to {}", c10::toString(tensor.scalar_type()), c10::toString(out.dtype));
    add_part(out.own, tensor, own.arriving.from, own.strides, own.blocks, out.held, nest);
  }
  return out;
}

}  // namespace soap::movement
