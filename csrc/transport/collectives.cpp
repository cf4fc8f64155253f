#include "transport/collectives.h"

#include "base/error.h"

namespace soap::transport {
namespace {

constexpr uint64_t kDirectBytes = 16 << 10;

uint64_t steps_for(uint64_t num_bytes, uint64_t per_step) {
  return std::max<uint64_t>(1, (num_bytes + per_step - 1) / per_step);
}

// Part `step` of `num_bytes` bytes cut into steps of `per_step`.
uint64_t bytes_of_step(uint64_t num_bytes, uint64_t step, uint64_t per_step) {
  return num_bytes <= step * per_step ? 0 : std::min(per_step, num_bytes - step * per_step);
}

// Where the slot of `source` keeps the share for `destination`.
uint64_t share_index(int source, int destination) {
  return destination < source ? destination : destination - 1;
}

// Sums [begin, begin + num_bytes) of `out` over ranks; own[...] stands for the data of `rank`.
void reduce_into(const Memory& out, const Memory& own, int rank, uint64_t begin, uint64_t num_bytes, const std::vector<const std::byte*>& data,
                 const Reducer& reducer) {
  // Both are cut in pieces, each in its own places.
  std::vector<const std::byte*> sources(data.size());
  out.for_each(begin, num_bytes, [&](std::byte* to, uint64_t offset, uint64_t bytes) {
    own.for_each(begin + offset, bytes, [&](const std::byte* from, uint64_t inner, uint64_t inner_bytes) {
      for (std::size_t r = 0; r < data.size(); ++r) sources[r] = static_cast<int>(r) == rank ? from : data[r] + offset + inner;
      reducer.combine(to + inner, sources, inner_bytes / reducer.element_bytes);
    });
  });
}

void copy(const Memory& from, const Memory& to) {
  to.for_each(0, to.num_bytes(), [&](std::byte* data, uint64_t offset, uint64_t bytes) {
    from.for_each(offset, bytes, [&](const std::byte* source, uint64_t inner, uint64_t inner_bytes) {
      if (data + inner != source) std::memmove(data + inner, source, inner_bytes);
    });
  });
}

}  // namespace

Exchange::Exchange(int rank, int num_ranks, std::vector<Memory> outgoing, std::vector<Memory> incoming, std::vector<bool> wanted)
    : Collective(rank, num_ranks), outgoing_(std::move(outgoing)), incoming_(std::move(incoming)), wanted_(std::move(wanted)) {}

void Exchange::alone() {
  const Memory& own = outgoing_[same_to_all() ? 0 : rank];
  if (wanted_[rank]) copy(own, incoming_[rank]);
}

void Exchange::describe(const Layout& layout, Header& header) const {
  uint64_t largest = 0;
  for (int r = 0; r < num_ranks; ++r) {
    header.counts[r] = outgoing_[same_to_all() ? 0 : r].num_bytes();
    if (r != rank) largest = std::max(largest, header.counts[r]);
  }
  header.num_steps = steps_for(largest, bytes_per_step(layout));
}

std::string Exchange::check(const std::vector<const Header*>& headers) {
  for (int r = 0; r < num_ranks; ++r) {
    if (wanted_[r] && headers[r]->counts[rank] != incoming_[r].num_bytes()) {
      return fmt::format("rank {} sends {} bytes to rank {}, which expects {}", label(r), headers[r]->counts[rank], label(rank), incoming_[r].num_bytes());
    }
  }
  return {};
}

void Exchange::publish(const Layout& layout, uint64_t step, std::byte* data) {
  const uint64_t per_step = bytes_per_step(layout);
  if (same_to_all()) {
    outgoing_[0].read(step * per_step, bytes_of_step(outgoing_[0].num_bytes(), step, per_step), data);
    return;
  }
  for (int r = 0; r < num_ranks; ++r) {
    if (r != rank) outgoing_[r].read(step * per_step, bytes_of_step(outgoing_[r].num_bytes(), step, per_step), data + share_index(rank, r) * per_step);
  }
}

void Exchange::consume(const Layout& layout, uint64_t step, const std::vector<const std::byte*>& data) {
  if (step == 0) alone();
  const uint64_t per_step = bytes_per_step(layout);
  for (int distance = 1; distance < num_ranks; ++distance) {  // not everyone from rank 0 first
    const int r = (rank + distance) % num_ranks;
    if (!wanted_[r]) continue;
    const std::byte* from = data[r] + (same_to_all() ? 0 : share_index(r, rank) * per_step);
    incoming_[r].write(step * per_step, bytes_of_step(incoming_[r].num_bytes(), step, per_step), from);
  }
}

AllReduce::AllReduce(int rank, int num_ranks, Memory source, Memory result, Reducer reducer)
    : Collective(rank, num_ranks), source_(std::move(source)), result_(std::move(result)), reducer_(std::move(reducer)) {}

void AllReduce::alone() {
  reduce_into(result_, source_, 0, 0, source_.num_bytes(), {nullptr}, reducer_);
}

bool AllReduce::direct(const Layout&) const {
  return source_.num_bytes() <= kDirectBytes;
}

uint64_t AllReduce::num_chunks(const Layout& layout) const {
  return steps_for(source_.num_bytes(), layout.share_bytes() * num_ranks);
}

AllReduce::Part AllReduce::part(uint64_t step, uint64_t num_chunks) const {
  if (step == 0) return {0, false};
  if (step == 2 * num_chunks - 1) return {num_chunks - 1, true};
  return step % 2 == 1 ? Part{(step + 1) / 2, false} : Part{step / 2 - 1, true};
}

AllReduce::Range AllReduce::share(const Layout& layout, uint64_t chunk, int of) const {
  const uint64_t largest = layout.share_bytes() * num_ranks;
  const uint64_t in_chunk = bytes_of_step(source_.num_bytes(), chunk, largest);
  const uint64_t share = (in_chunk + num_ranks * kLine - 1) / (num_ranks * kLine) * kLine;
  return {chunk * largest + of * share, bytes_of_step(in_chunk, of, share)};
}

void AllReduce::describe(const Layout& layout, Header& header) const {
  header.num_bytes = source_.num_bytes();
  header.num_steps = direct(layout) ? 1 : 2 * num_chunks(layout);
}

bool AllReduce::may_publish(uint64_t step, uint64_t num_consumed) const {
  if (step == 0 || num_steps == 1) return true;
  const Part what = part(step, num_steps / 2);
  if (!what.is_sum) return true;
  const uint64_t summed_at = what.chunk == 0 ? 0 : 2 * what.chunk - 1;  // the step of its A
  return num_consumed > summed_at;
}

void AllReduce::publish(const Layout& layout, uint64_t step, std::byte* data) {
  if (direct(layout)) {
    source_.read(0, source_.num_bytes(), data);
    return;
  }
  const Part what = part(step, num_chunks(layout));
  if (what.is_sum) {
    const Range own = share(layout, what.chunk, rank);
    result_.read(own.begin, own.num_bytes, data);
    return;
  }
  for (int r = 0; r < num_ranks; ++r) {
    if (r == rank) continue;
    const Range theirs = share(layout, what.chunk, r);
    source_.read(theirs.begin, theirs.num_bytes, data + share_index(rank, r) * layout.share_bytes());
  }
}

void AllReduce::consume(const Layout& layout, uint64_t step, const std::vector<const std::byte*>& data) {
  if (direct(layout)) {
    reduce_into(result_, source_, rank, 0, source_.num_bytes(), data, reducer_);
    return;
  }
  const Part what = part(step, num_chunks(layout));
  if (what.is_sum) {
    for (int distance = 1; distance < num_ranks; ++distance) {
      const int r = (rank + distance) % num_ranks;
      const Range theirs = share(layout, what.chunk, r);
      result_.write(theirs.begin, theirs.num_bytes, data[r]);
    }
    return;
  }
  std::vector<const std::byte*> shares(data.size());
  for (int r = 0; r < num_ranks; ++r) shares[r] = r == rank ? nullptr : data[r] + share_index(r, rank) * layout.share_bytes();
  const Range own = share(layout, what.chunk, rank);
  reduce_into(result_, source_, rank, own.begin, own.num_bytes, shares, reducer_);
}

ReduceScatter::ReduceScatter(int rank, int num_ranks, std::vector<Memory> input, Memory output, Reducer reducer)
    : Collective(rank, num_ranks), input_(std::move(input)), output_(std::move(output)), reducer_(std::move(reducer)) {}

void ReduceScatter::alone() {
  reduce_into(output_, input_[0], 0, 0, output_.num_bytes(), {nullptr}, reducer_);
}

void ReduceScatter::describe(const Layout& layout, Header& header) const {
  uint64_t largest = 0;
  for (int r = 0; r < num_ranks; ++r) largest = std::max(largest, header.counts[r] = input_[r].num_bytes());
  header.num_steps = steps_for(largest, layout.share_bytes());
}

std::string ReduceScatter::check(const std::vector<const Header*>& headers) {
  for (int r = 0; r < num_ranks; ++r) {
    if (headers[r]->counts[rank] != output_.num_bytes()) {
      return fmt::format("rank {} has {} bytes for rank {}, which expects {}", label(r), headers[r]->counts[rank], label(rank), output_.num_bytes());
    }
  }
  return {};
}

void ReduceScatter::publish(const Layout& layout, uint64_t step, std::byte* data) {
  const uint64_t per_step = layout.share_bytes();
  for (int r = 0; r < num_ranks; ++r) {
    if (r != rank) input_[r].read(step * per_step, bytes_of_step(input_[r].num_bytes(), step, per_step), data + share_index(rank, r) * per_step);
  }
}

void ReduceScatter::consume(const Layout& layout, uint64_t step, const std::vector<const std::byte*>& data) {
  const uint64_t per_step = layout.share_bytes();
  std::vector<const std::byte*> shares(data.size());
  for (int r = 0; r < num_ranks; ++r) shares[r] = r == rank ? nullptr : data[r] + share_index(r, rank) * per_step;
  reduce_into(output_, input_[rank], rank, step * per_step, bytes_of_step(output_.num_bytes(), step, per_step), shares, reducer_);
}

Reduce::Reduce(int rank, int num_ranks, int root, Memory memory, Reducer reducer)
    : Collective(rank, num_ranks), root_(root), memory_(std::move(memory)), reducer_(std::move(reducer)) {}

void Reduce::alone() {
  reduce_into(memory_, memory_, 0, 0, memory_.num_bytes(), {nullptr}, reducer_);
}

void Reduce::describe(const Layout& layout, Header& header) const {
  header.num_bytes = memory_.num_bytes();
  header.num_steps = steps_for(memory_.num_bytes(), layout.slot_bytes / kLine * kLine);
}

void Reduce::publish(const Layout& layout, uint64_t step, std::byte* data) {
  const uint64_t per_step = layout.slot_bytes / kLine * kLine;
  if (rank != root_) memory_.read(step * per_step, bytes_of_step(memory_.num_bytes(), step, per_step), data);
}

void Reduce::consume(const Layout& layout, uint64_t step, const std::vector<const std::byte*>& data) {
  const uint64_t per_step = layout.slot_bytes / kLine * kLine;
  if (rank == root_) reduce_into(memory_, memory_, rank, step * per_step, bytes_of_step(memory_.num_bytes(), step, per_step), data, reducer_);
}

}  // namespace soap::transport
