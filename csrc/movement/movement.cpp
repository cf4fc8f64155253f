#include "movement/movement.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "base/error.h"
#include "fmt/ranges.h"
#include "movement/sources.h"
#include "movement/strided.h"

namespace soap::movement {
namespace {

using kernels::cpu::Block;
using kernels::cpu::Nest;
using kernels::cpu::Runs;

std::string text_of(at::IntArrayRef sizes) {
  return fmt::format("[{}]", fmt::join(sizes.begin(), sizes.end(), ", "));
}

std::vector<Runs> whole_runs(at::IntArrayRef shape) {
  std::vector<Runs> out;
  for (const int64_t size : shape) out.push_back({{0, size}});
  return out;
}

int64_t first_element(const Part& part, at::IntArrayRef strides) {
  int64_t out = 0;
  for (size_t d = 0; d < strides.size(); ++d) out += part.runs[d].empty() ? 0 : part.runs[d].front().begin * strides[d];
  return out;
}

bool is_aligned(const at::Tensor& tensor, std::size_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

}  // namespace

Part::Part(std::vector<int64_t> box_shape, const Index& index) : shape(std::move(box_shape)), runs(whole_runs(shape)), whole(shape.size(), true) {
  for (const auto& [dim, pairs] : index) {
    SOAP_CHECK(dim >= 0 && static_cast<size_t>(dim) < shape.size(), "a run of dim {} in a box of shape {}", dim, text_of(shape));
    whole[dim] = false;
    runs[dim].clear();
    int64_t size = 0;
    for (const auto& [begin, end] : pairs) {
      SOAP_CHECK(begin >= 0 && end >= begin, "a run [{},{})", begin, end);
      runs[dim].push_back({begin, end});
      size += end - begin;
    }
    SOAP_CHECK(size == shape[dim], "runs of {} positions in dim {} of a box of shape {}", size, dim, text_of(shape));
    interval &= pairs.size() == 1;
  }
  for (const int64_t size : shape) elements *= size;
}

void Part::check(at::IntArrayRef sizes) const {
  SOAP_CHECK(sizes.size() == shape.size(), "a box of shape {} in a tensor of shape {}", text_of(shape), text_of(sizes));
  for (size_t d = 0; d < shape.size(); ++d) {
    if (whole[d]) {
      SOAP_CHECK(sizes[d] == shape[d], "a box of shape {} has all of dim {} of a tensor of shape {}", text_of(shape), d, text_of(sizes));
      continue;
    }
    for (const Run& run : runs[d])
      SOAP_CHECK(run.end <= sizes[d], "a box has [{},{}) of dim {} of a tensor of shape {}", run.begin, run.end, d, text_of(sizes));
  }
}

bool Part::is_whole() const {
  return std::all_of(whole.begin(), whole.end(), [](bool w) { return w; });
}

Packing::Packing(std::vector<Sent> parts, int num_peers) : peer_bytes_(num_peers, 0), one_each_(static_cast<int>(parts.size()) == num_peers) {
  for (int peer = 0; peer < num_peers; ++peer) {
    for (const Sent& sent : parts) {
      if (sent.peer != peer) continue;
      const int64_t size = sent.part.elements * bytes_of(sent.dtype);
      items_.push_back({.sent = sent,
                        .begin = num_bytes_,
                        .strides = dense_strides(sent.part.shape),
                        .blocks = kernels::cpu::blocks_of(sent.part.runs, whole_runs(sent.part.shape))});
      num_bytes_ += size;
      peer_bytes_[peer] += size;
    }
  }
  SOAP_CHECK(items_.size() == parts.size(), "parts for peers that aren't among {}", num_peers);
  for (size_t i = 0; i < items_.size(); ++i) one_each_ &= items_[i].sent.peer == static_cast<int>(i);
}

std::vector<at::Tensor> Packing::pack(const std::vector<at::Tensor>& sources) const {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> tensors = plain(sources);
  bool stretches = one_each_;
  for (const Item& item : items_) {
    const at::Tensor& tensor = at_index(tensors, item.sent.source, "source");
    item.sent.part.check(tensor.sizes());
    SOAP_CHECK(tensor.scalar_type() == item.sent.dtype, "{} is sent as {}", c10::toString(tensor.scalar_type()), c10::toString(item.sent.dtype));
    stretches = stretches && item.sent.part.interval && is_dense(item.sent.part.shape, tensor.strides());
  }
  std::vector<at::Tensor> out;
  out.reserve(peer_bytes_.size());
  if (stretches) {
    for (const Item& item : items_) {
      const at::Tensor& tensor = tensors[item.sent.source];
      const int64_t begin = tensor.storage_offset() + first_element(item.sent.part, tensor.strides());
      out.push_back(tensor.as_strided({item.sent.part.elements}, {1}, begin).view(at::kByte));
    }
    return out;
  }
  const at::Tensor flat = at::empty({num_bytes_}, at::TensorOptions().dtype(at::kByte));
  char* data = static_cast<char*>(flat.mutable_data_ptr());
  Nest nest;
  at::Tensor buffer;
  for (const Item& item : items_) {
    const at::Tensor& tensor = tensors[item.sent.source];
    const Source source = {.data = data_of(tensor), .dtype = tensor.scalar_type(), .strides = tensor.strides()};
    char* to = data + item.begin;
    if (item.begin % bytes_of(source.dtype) != 0) {  // elements of another type lie before it
      buffer = at::empty(item.sent.part.shape, tensor.options());
      to = static_cast<char*>(buffer.mutable_data_ptr());
    }
    combine(to, source.dtype, item.strides, source, item.blocks, Combine::kReplace, nest);
    if (to != data + item.begin && buffer.numel() > 0) std::memcpy(data + item.begin, to, buffer.nbytes());
  }
  int64_t begin = 0;
  for (const int64_t size : peer_bytes_) {
    out.push_back(flat.narrow(0, begin, size));
    begin += size;
  }
  return out;
}

Assembly::Assembly(std::vector<Result> results) {
  for (Result& result : results) {
    Plan plan;
    for (Arriving& arriving : result.pieces) {
      SOAP_CHECK(arriving.from.shape == arriving.to.shape, "a piece of shape {} goes to a box of shape {}", text_of(arriving.from.shape),
                 text_of(arriving.to.shape));
      arriving.to.check(result.shape);
      num_bytes_ += arriving.to.elements * bytes_of(result.dtype);
      Piece piece = {.strides = dense_strides(arriving.from.shape),
                     .blocks = kernels::cpu::blocks_of(arriving.from.runs, arriving.to.runs),
                     .whole = arriving.to.is_whole()};
      if (arriving.source < 0 && arriving.from.elements > 0) {
        SOAP_CHECK(arriving.message >= 0, "a piece of no message");
        if (arrivals_.size() <= static_cast<size_t>(arriving.message)) arrivals_.resize(arriving.message + 1);
        arrivals_[arriving.message].emplace_back(plans_.size(), plan.pieces.size());
      }
      piece.arriving = std::move(arriving);
      plan.pieces.push_back(std::move(piece));
    }
    result.pieces.clear();
    const bool first_is_part = !plan.pieces.empty() && !plan.pieces.front().whole;
    if (result.combine == Combine::kReplace && first_is_part) placed_.push_back(static_cast<int>(plans_.size()));
    if (plan.pieces.size() == 1 && plan.pieces.front().whole) result.sums = result.dtype;  // nothing to add up
    plan.result = std::move(result);
    plans_.push_back(std::move(plan));
  }
  const auto begin_of = [&](const std::pair<int, int>& which) { return plans_[which.first].pieces[which.second].arriving.begin; };
  for (auto& arrivals : arrivals_) std::stable_sort(arrivals.begin(), arrivals.end(), [&](auto& a, auto& b) { return begin_of(a) < begin_of(b); });
}

std::vector<at::Tensor> Assembly::unpack(const std::vector<at::Tensor>& sources, const std::vector<at::Tensor>& messages,
                                         const std::vector<std::optional<at::Tensor>>& places) const {
  SOAP_CHECK(places.empty() || places.size() == placed_.size(), "{} places for {} results", places.size(), placed_.size());
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> tensors = plain(sources);
  std::vector<at::Tensor> out;
  out.reserve(plans_.size());
  size_t next = 0;
  for (size_t i = 0; i < plans_.size(); ++i) {
    std::optional<at::Tensor> place;
    if (next < placed_.size() && placed_[next] == static_cast<int>(i)) {
      if (!places.empty()) place = places[next];
      ++next;
    }
    out.push_back(assemble(plans_[i], tensors, messages, place));
  }
  return out;
}

// `buffer` gets the memory of a message's part that isn't aligned.
Source Assembly::source_of(const Piece& piece, at::ScalarType dtype, const std::vector<at::Tensor>& sources, const std::vector<at::Tensor>& messages,
                           at::Tensor& buffer) {
  const Part& part = piece.arriving.from;
  if (piece.arriving.source >= 0) {
    const at::Tensor& tensor = at_index(sources, piece.arriving.source, "source");
    part.check(tensor.sizes());
    return {.data = data_of(tensor), .dtype = tensor.scalar_type(), .strides = tensor.strides()};
  }
  Source source = {.dtype = dtype, .strides = piece.strides};
  if (part.elements == 0) return source;
  const at::Tensor& message = at_index(messages, piece.arriving.message, "message");
  const int64_t size = part.elements * bytes_of(dtype);
  SOAP_CHECK(piece.arriving.begin + size <= message.numel() && message.is_contiguous() && message.element_size() == 1, "{} bytes from {} on of a message of {}",
             size, piece.arriving.begin, message.numel());
  source.data = data_of(message) + piece.arriving.begin;
  if (reinterpret_cast<uintptr_t>(source.data) % bytes_of(dtype) != 0) {
    buffer = at::empty(part.shape, at::TensorOptions().dtype(dtype));
    std::memcpy(buffer.mutable_data_ptr(), source.data, size);
    source.data = data_of(buffer);
  }
  return source;
}

at::Tensor Assembly::memory_for(const Result& result, const std::optional<at::Tensor>& place) {
  if (!place.has_value()) return at::empty(result.shape, at::TensorOptions().dtype(result.sums));
  SOAP_CHECK(place->sizes() == at::IntArrayRef(result.shape) && place->scalar_type() == result.sums && is_dense(place->sizes(), place->strides()),
             "memory for a result of shape {} has shape {}", text_of(result.shape), text_of(place->sizes()));
  return *place;
}

at::Tensor Assembly::assemble(const Plan& plan, const std::vector<at::Tensor>& sources, const std::vector<at::Tensor>& messages,
                              const std::optional<at::Tensor>& place) const {
  const Result& result = plan.result;
  const auto options = at::TensorOptions().dtype(result.sums);
  at::Tensor target;
  bool own = false;  // nobody else has this memory
  Nest nest;
  const auto put = [&](const Source& source, const Piece& piece, Combine how) {
    combine(static_cast<char*>(target.mutable_data_ptr()), result.sums, target.strides(), source, piece.blocks, how, nest);
  };
  for (const Piece& piece : plan.pieces) {
    const Part& part = piece.arriving.from;
    const bool local = piece.arriving.source >= 0;
    at::Tensor buffer;
    const Source source = source_of(piece, result.dtype, sources, messages, buffer);
    const bool stretch = part.interval && is_dense(part.shape, source.strides);
    if (piece.whole && (!target.defined() || result.combine == Combine::kReplace)) {
      own = false;
      if (stretch && source.dtype == result.sums && local) {
        const at::Tensor& tensor = sources[piece.arriving.source];
        const int64_t begin = first_element(part, tensor.strides());
        const bool same = part.is_whole() && tensor.strides() == at::IntArrayRef(piece.strides);
        target = same ? tensor : tensor.as_strided(part.shape, piece.strides, tensor.storage_offset() + begin);
      } else if (stretch && source.dtype == result.sums && part.elements > 0 && !buffer.defined()) {
        const int64_t size = part.elements * bytes_of(result.dtype);
        target = messages[piece.arriving.message].narrow(0, piece.arriving.begin, size).view(result.dtype).view(part.shape);
      } else {
        target = at::empty(result.shape, options);
        own = true;
        put(source, piece, Combine::kReplace);
      }
      continue;
    }
    if (piece.whole && !own && stretch && source.dtype == result.sums && part.elements > 0) {  // one pass for both
      char* data = const_cast<char*>(source.data) + (local ? first_element(part, source.strides) * bytes_of(source.dtype) : 0);
      const at::Tensor other = at::from_blob(data, part.shape, options);
      target = result.combine == Combine::kAdd ? at::add(target, other) : at::maximum(target, other);
      own = true;
      continue;
    }
    if (!target.defined()) {
      target = result.combine == Combine::kReplace ? memory_for(result, place) : at::full(result.shape, result.identity, options);
    } else if (!own) {  // the first piece may be a view of its source
      target = target.clone(at::MemoryFormat::Contiguous);
    }
    own = true;
    put(source, piece, result.combine);
  }
  if (!target.defined()) return at::full(result.shape, result.identity, at::TensorOptions().dtype(result.dtype));
  target = target.to(result.dtype);
  return is_aligned(target, kAlignment) ? target : target.clone(at::MemoryFormat::Contiguous);
}

at::Tensor flatten(const std::vector<at::Tensor>& tensors, at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> sources = plain(tensors);
  int64_t total = 0;
  for (const at::Tensor& source : sources) total += source.numel();
  const at::Tensor flat = at::empty({total}, at::TensorOptions().dtype(dtype));
  char* data = static_cast<char*>(flat.mutable_data_ptr());
  Nest nest;
  for (const at::Tensor& source : sources) {
    if (source.numel() == 0) continue;
    nest.loops.clear();
    int64_t dst_stride = source.numel();
    for (int64_t d = 0; d < source.dim(); ++d) {
      dst_stride /= source.size(d);
      nest.add({source.size(d), source.stride(d), dst_stride});
    }
    combine(data, dtype, {.data = data_of(source), .dtype = source.scalar_type(), .strides = source.strides()}, nest, Combine::kReplace);
    data += source.numel() * bytes_of(dtype);
  }
  return flat;
}

std::vector<at::Tensor> unflatten(const at::Tensor& flat, const std::vector<at::Tensor>& like) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> out;
  out.reserve(like.size());
  int64_t begin = 0;
  for (const at::Tensor& tensor : like) {
    out.push_back(flat.as_strided(tensor.sizes(), dense_strides(tensor.sizes()), flat.storage_offset() + begin));
    begin += tensor.numel();
  }
  SOAP_CHECK(begin == flat.numel(), "{} elements for {}", flat.numel(), begin);
  return out;
}

}  // namespace soap::movement
