// The collectives, as steps through shared slots.
//
// P ranks, slots of S bytes. A *share* is what a slot holds for each of the other ranks: S / (P - 1).
//   Exchange     every rank sends to every rank: the same to all (all-gather, broadcast, gather, barrier), S bytes a step, or to each its own (all-to-all,
//                scatter), a share a step. As many steps as the largest message needs.
//   AllReduce    up to `direct` bytes: one step, everyone reads all and sums. More: chunks of P shares, two steps each. Step A publishes the
//                others' shares of a chunk; each rank sums its own share over all ranks; step B publishes the sum. The order is
//                A0 A1 B0 A2 B1 ..., so that a rank has something to do while others still read. Bytes moved by a rank, of N in all:
//                2 N (P - 1) / P written and as many read, against N written and P N read.
//   ReduceScatter the A steps alone.
//   Reduce       everyone publishes, the root sums.
// All sums run over ranks in the order 0, 1, ..., P - 1: the same bits on all ranks and in every run.
#pragma once

#include <memory>
#include <vector>

#include "transport/operation.h"

namespace soap::transport {

class Exchange final : public Collective {
 public:
  // Sizes of `outgoing`: 1 (the same to all) or one for each rank. Sizes of `incoming` and `wanted`: one for each rank; what isn't wanted isn't read, and
  // another number of bytes than `incoming` has is an error of this rank. What goes to oneself is copied when all ranks have come.
  Exchange(int rank, int num_ranks, std::vector<Memory> outgoing, std::vector<Memory> incoming, std::vector<bool> wanted);

  void alone() override;
  void describe(const Layout& layout, Header& header) const override;
  std::string check(const std::vector<const Header*>& headers) override;
  void publish(const Layout& layout, uint64_t step, std::byte* data) override;
  void consume(const Layout& layout, uint64_t step, const std::vector<const std::byte*>& data) override;

 private:
  bool same_to_all() const { return outgoing_.size() == 1; }
  uint64_t bytes_per_step(const Layout& layout) const { return same_to_all() ? layout.slot_bytes : layout.share_bytes(); }

  std::vector<Memory> outgoing_, incoming_;
  std::vector<bool> wanted_;
};

class AllReduce final : public Collective {
 public:
  // In place, or `source` stays as it is.
  AllReduce(int rank, int num_ranks, Memory memory, Reducer reducer) : AllReduce(rank, num_ranks, memory, memory, std::move(reducer)) {}
  AllReduce(int rank, int num_ranks, Memory source, Memory result, Reducer reducer);

  void alone() override;
  void describe(const Layout& layout, Header& header) const override;
  bool may_publish(uint64_t step, uint64_t num_consumed) const override;
  void publish(const Layout& layout, uint64_t step, std::byte* data) override;
  void consume(const Layout& layout, uint64_t step, const std::vector<const std::byte*>& data) override;

 private:
  // What a step is: chunk `chunk`, its A step or its B step.
  struct Part {
    uint64_t chunk = 0;
    bool is_sum = false;
  };
  struct Range {
    uint64_t begin = 0, num_bytes = 0;
  };
  bool direct(const Layout& layout) const;
  uint64_t num_chunks(const Layout& layout) const;
  Part part(uint64_t step, uint64_t num_chunks) const;
  Range share(const Layout& layout, uint64_t chunk, int of) const;

  Memory source_, result_;
  Reducer reducer_;
};

class ReduceScatter final : public Collective {
 public:
  // input[r]: this rank's part for rank r.
  ReduceScatter(int rank, int num_ranks, std::vector<Memory> input, Memory output, Reducer reducer);

  void alone() override;
  void describe(const Layout& layout, Header& header) const override;
  std::string check(const std::vector<const Header*>& headers) override;
  void publish(const Layout& layout, uint64_t step, std::byte* data) override;
  void consume(const Layout& layout, uint64_t step, const std::vector<const std::byte*>& data) override;

 private:
  std::vector<Memory> input_;
  Memory output_;
  Reducer reducer_;
};

class Reduce final : public Collective {
 public:
  // In place at the root.
  Reduce(int rank, int num_ranks, int root, Memory memory, Reducer reducer);

  void alone() override;
  void describe(const Layout& layout, Header& header) const override;
  void publish(const Layout& layout, uint64_t step, std::byte* data) override;
  void consume(const Layout& layout, uint64_t step, const std::vector<const std::byte*>& data) override;

 private:
  int root_;
  Memory memory_;
  Reducer reducer_;
};

}  // namespace soap::transport
