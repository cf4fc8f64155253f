// Collectives of a group on several hosts.
//
// H hosts; rank (h, p) is the one at place p of host h. Tensors go in pieces of at most 1 MiB for each message, and while some are on their way the next
// ones are prepared in shared memory.
//
//   AllReduce      Reduce-scatter within each host among its *carriers*, the first M ranks, M the fewest ranks that a host has; each sends its slice to, or
//                  shares the sum with, the carriers at its place on the other hosts; all-gather within the host. A host sends N bytes to the other one
//                  of two, 2 N (H - 1) / H in general, however many ranks it has.
//   ReduceScatter  Reduce-scatter within each host, where the rank at place q mod (ranks of the host) sums what goes to (h', q) and sends it there.
//   AllGather      (h, p) sends to (h', p mod ranks of h'); within each host ranks pass on what they have got. Everything goes to each host once.
//   Broadcast      The same from one rank; a large tensor from host to host in a chain, so that nobody sends it more than once.
//   Scattering     Messages of each rank to each: those to other hosts go straight there, one each.
//   Barrier        Within each host, among the first ranks of the hosts, within each host.
//
// Sums run over the ranks of a host in their order, then over hosts in theirs: the same bits on all ranks and in every run. Numbers of 16 bits or fewer are
// rounded after each of the two.
#pragma once

#include <vector>

#include "transport/spanning.h"

namespace soap::transport {

class Pool;

// How elements are combined within a host, and what that has made over hosts.
struct Reducers {
  Reducer within, between;
  bool keeps_one = true;  // `within` leaves a single source as it is
};

class SpanningAllReduce final : public Spanning {
 public:
  // In place.
  SpanningAllReduce(Memory memory, Reducers reducers);
  void run(Relay& relay) override;

 private:
  struct Chunk;
  void begin(Relay& relay, Pool& pool, Chunk& chunk) const;
  void add_up(Relay& relay, Chunk& chunk) const;
  void finish(Relay& relay, Pool& pool, Chunk& chunk) const;

  Memory memory_;
  Reducers reducers_;
};

class SpanningReduceScatter final : public Spanning {
 public:
  // input[r]: this rank's part for rank r.
  SpanningReduceScatter(std::vector<Memory> input, Memory output, Reducers reducers);
  void run(Relay& relay) override;

 private:
  std::vector<Memory> input_;
  Memory output_;
  Reducers reducers_;
};

class SpanningAllGather final : public Spanning {
 public:
  // incoming[r]: for what rank r brings; as many bytes as that.
  SpanningAllGather(Memory outgoing, std::vector<Memory> incoming);
  void run(Relay& relay) override;

 private:
  Memory outgoing_;
  std::vector<Memory> incoming_;
};

class SpanningBroadcast final : public Spanning {
 public:
  SpanningBroadcast(int root, Memory memory);
  void run(Relay& relay) override;

 private:
  int root_;
  Memory memory_;
};

class SpanningExchange final : public Spanning {
 public:
  // One of each for each rank: what goes there and comes from there, and whether anything does, be it of no bytes. Where nothing is wanted nothing is sent.
  SpanningExchange(std::vector<Memory> outgoing, std::vector<bool> sends, std::vector<Memory> incoming, std::vector<bool> wanted);
  void run(Relay& relay) override;

 private:
  std::vector<Memory> outgoing_, incoming_;
  std::vector<bool> sends_, wanted_;
};

class SpanningBarrier final : public Spanning {
 public:
  void run(Relay& relay) override;
};

}  // namespace soap::transport
