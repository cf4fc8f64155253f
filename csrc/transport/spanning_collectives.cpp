#include "transport/spanning_collectives.h"

#include <algorithm>
#include <memory>

#include "transport/collectives.h"

namespace soap::transport {

// Memory of an operation's own, used again for later chunks.
class Pool {
 public:
  struct Block {
    std::unique_ptr<std::byte[]> data;
    uint64_t num_bytes = 0;
  };

  Block take(uint64_t num_bytes) {
    for (Block& block : free_) {
      if (block.num_bytes < num_bytes) continue;
      Block out = std::move(block);
      block = std::move(free_.back());
      free_.pop_back();
      return out;
    }
    return {std::unique_ptr<std::byte[]>(new std::byte[num_bytes]), num_bytes};
  }
  void give_back(Block block) { free_.push_back(std::move(block)); }

 private:
  std::vector<Block> free_;
};

namespace {

using Numbers = std::vector<std::size_t>;

constexpr uint64_t kPiece = 1 << 20;          // of a message; a multiple of all elements' sizes
constexpr uint64_t kSmallSlice = 64 << 10;    // of a sum: up to here everyone sends all to all, between more than two hosts
constexpr uint64_t kSmallTensor = 256 << 10;  // of a broadcast: up to here the root sends to all hosts
constexpr std::size_t kAhead = 2;             // chunks that are begun before one is finished

std::size_t chunks_for(uint64_t num_bytes, uint64_t per_chunk) {
  return std::max<uint64_t>(1, (num_bytes + per_chunk - 1) / per_chunk);
}

// begin(c) for all chunks in order, each followed by finish(c - kAhead).
template <class Begin, class Finish>
void in_turns(std::size_t num_chunks, Begin begin, Finish finish) {
  for (std::size_t c = 0; c < num_chunks + kAhead; ++c) {
    if (c < num_chunks) begin(c);
    if (c >= kAhead) finish(c - kAhead);
  }
}

// Combines sources, each of as many bytes as `out`, element by element in their order; any may be in pieces.
void combine(const Memory& out, const std::vector<Memory>& sources, const Reducer& reducer) {
  std::vector<uint64_t> ends{out.num_bytes()};  // of stretches that are in one piece in all of them
  const auto add_ends = [&](const Memory& memory) {
    memory.for_each(0, memory.num_bytes(), [&](std::byte*, uint64_t offset, uint64_t) { ends.push_back(offset); });
  };
  add_ends(out);
  for (const Memory& source : sources) add_ends(source);
  std::sort(ends.begin(), ends.end());
  uint64_t begin = 0;
  const auto at = [](const Memory& memory, uint64_t where) {
    std::byte* found = nullptr;
    memory.for_each(where, 1, [&](std::byte* data, uint64_t, uint64_t) { found = data; });
    return found;
  };
  std::vector<const std::byte*> pointers(sources.size());
  for (const uint64_t end : ends) {
    if (end == begin) continue;
    for (std::size_t s = 0; s < sources.size(); ++s) pointers[s] = at(sources[s], begin);
    reducer.combine(at(out, begin), pointers, (end - begin) / reducer.element_bytes);
    begin = end;
  }
}

// What one chunk has of it.
class Buffer {
 public:
  Memory of(Pool& pool, uint64_t num_bytes) {
    held_.push_back(pool.take(num_bytes));
    return Memory(held_.back().data.get(), num_bytes);
  }
  void clear(Pool& pool) {
    for (Pool::Block& block : held_) pool.give_back(std::move(block));
    held_.clear();
  }

 private:
  std::vector<Pool::Block> held_;
};

template <typename Chunk>
struct Chunks {
  Pool pool;
  std::vector<Chunk> chunks;
};

// The relay keeps them: messages may still read and write their memory when the operation has failed.
template <typename Chunk>
Chunks<Chunk>& kept_chunks(Relay& relay, std::size_t count) {
  const auto held = std::make_shared<Chunks<Chunk>>();
  held->chunks.resize(count);
  relay.keep(held);
  return *held;
}

// The rank at `place` of this host, and those of other hosts that have to do with it.
std::vector<int> carried(const Relay& relay, int place) {
  const Hosts& hosts = relay.hosts;
  std::vector<int> out{hosts.ranks[relay.host][place]};
  for (int distance = 1; distance < hosts.num_hosts(); ++distance) {
    for (const int r : hosts.ranks[(relay.host + distance) % hosts.num_hosts()]) {
      if (hosts.place[r] % relay.num_local == place) out.push_back(r);
    }
  }
  return out;
}

// An all-gather, or a part of one, within this host.
void pass_on(Relay& relay, const Memory& outgoing, std::vector<Memory> incoming, std::vector<bool> wanted) {
  relay.local(std::make_shared<Exchange>(relay.place, relay.num_local, std::vector<Memory>{outgoing}, std::move(incoming), std::move(wanted)));
}

void meet(Relay& relay) {
  pass_on(relay, {}, std::vector<Memory>(relay.num_local), std::vector<bool>(relay.num_local));
}

}  // namespace

struct SpanningAllReduce::Chunk {
  Memory whole;
  uint64_t slice = 0;                  // bytes of each carrier's but the last
  Memory own, sum_of_host;             // this carrier's slice of the tensor, and what its host has of it
  bool shared_out = false;             // each host sums a part of the slice
  std::vector<Memory> from_host;       // by host
  std::vector<std::size_t> sent, got;  // messages of the slices
  std::vector<std::size_t> sums;       // of the parts' sums
  Buffer buffer;

  Memory part(const Memory& of, int host, int num_hosts) const {
    const uint64_t each = (of.num_bytes() + num_hosts * kLine - 1) / (num_hosts * kLine) * kLine;
    return of.cut(host * each, each);
  }
};

SpanningAllReduce::SpanningAllReduce(Memory memory, Reducers reducers) : memory_(std::move(memory)), reducers_(std::move(reducers)) {
  num_bytes = memory_.num_bytes();
}

void SpanningAllReduce::run(Relay& relay) {
  const int carriers = relay.hosts.fewest();
  const uint64_t per_chunk = carriers * kPiece;
  Chunks<Chunk>& held = kept_chunks<Chunk>(relay, chunks_for(memory_.num_bytes(), per_chunk));
  Pool& pool = held.pool;
  std::vector<Chunk>& chunks = held.chunks;
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    chunks[c].whole = memory_.cut(c * per_chunk, per_chunk);
    chunks[c].slice = (chunks[c].whole.num_bytes() + carriers * kLine - 1) / (carriers * kLine) * kLine;
  }
  in_turns(
      chunks.size() + 1,
      [&](std::size_t c) {
        if (c < chunks.size()) begin(relay, pool, chunks[c]);
        if (c > 0) add_up(relay, chunks[c - 1]);
      },
      [&](std::size_t c) {
        if (c < chunks.size()) finish(relay, pool, chunks[c]);
      });
}

// Sums the slices of this host, and sends this rank's on.
void SpanningAllReduce::begin(Relay& relay, Pool& pool, Chunk& chunk) const {
  const int carriers = relay.hosts.fewest();
  std::vector<Memory> slices(relay.num_local);
  for (int p = 0; p < carriers; ++p) slices[p] = chunk.whole.cut(p * chunk.slice, chunk.slice);
  chunk.own = slices[relay.place];
  chunk.sum_of_host = chunk.own;
  if (relay.num_local > 1 || !reducers_.keeps_one) {
    chunk.sum_of_host = chunk.buffer.of(pool, chunk.own.num_bytes());
    relay.local(std::make_shared<ReduceScatter>(relay.place, relay.num_local, std::move(slices), chunk.sum_of_host, reducers_.within));
  }
  if (relay.place >= carriers) return;
  const int num_hosts = relay.hosts.num_hosts();
  chunk.shared_out = num_hosts > 2 && chunk.own.num_bytes() > kSmallSlice;
  chunk.from_host.resize(num_hosts);
  for (int distance = 1; distance < num_hosts; ++distance) {
    const int h = (relay.host + distance) % num_hosts;
    const int peer = relay.hosts.ranks[h][relay.place];
    const Memory theirs = chunk.shared_out ? chunk.part(chunk.sum_of_host, h, num_hosts) : chunk.sum_of_host;
    const Memory mine = chunk.shared_out ? chunk.part(chunk.sum_of_host, relay.host, num_hosts) : chunk.sum_of_host;
    chunk.from_host[h] = chunk.buffer.of(pool, mine.num_bytes());
    chunk.got.push_back(relay.receive(peer, chunk.from_host[h]));
    chunk.sent.push_back(relay.send(peer, theirs));
  }
}

// Adds up over hosts what this rank has to, and sends that on where others wait for it.
void SpanningAllReduce::add_up(Relay& relay, Chunk& chunk) const {
  if (!chunk.shared_out) return;
  const int num_hosts = relay.hosts.num_hosts();
  relay.wait(chunk.got);
  relay.wait(chunk.sent);
  const Memory target = chunk.part(chunk.own, relay.host, num_hosts);
  chunk.from_host[relay.host] = chunk.part(chunk.sum_of_host, relay.host, num_hosts);
  combine(target, chunk.from_host, reducers_.between);
  for (int distance = 1; distance < num_hosts; ++distance) {
    const int h = (relay.host + distance) % num_hosts;
    const int peer = relay.hosts.ranks[h][relay.place];
    chunk.sums.push_back(relay.receive(peer, chunk.part(chunk.own, h, num_hosts)));
    chunk.sums.push_back(relay.send(peer, target));
  }
}

void SpanningAllReduce::finish(Relay& relay, Pool& pool, Chunk& chunk) const {
  const int carriers = relay.hosts.fewest();
  if (relay.place < carriers && !chunk.shared_out) {
    relay.wait(chunk.got);
    relay.wait(chunk.sent);  // the sum may take its memory
    chunk.from_host[relay.host] = chunk.sum_of_host;
    combine(chunk.own, chunk.from_host, reducers_.between);
  }
  relay.wait(chunk.sums);
  if (relay.num_local > 1) {
    std::vector<Memory> slices(relay.num_local);
    for (int p = 0; p < carriers; ++p) slices[p] = chunk.whole.cut(p * chunk.slice, chunk.slice);
    pass_on(relay, chunk.own, std::move(slices), std::vector<bool>(relay.num_local, true));
  }
  chunk.buffer.clear(pool);
}

SpanningReduceScatter::SpanningReduceScatter(std::vector<Memory> input, Memory output, Reducers reducers)
    : input_(std::move(input)), output_(std::move(output)), reducers_(std::move(reducers)) {
  for (const Memory& part : input_) num_bytes += part.num_bytes();
}

void SpanningReduceScatter::run(Relay& relay) {
  const Hosts& hosts = relay.hosts;
  struct Chunk {
    std::vector<Memory> from_host;
    Numbers sent, got;
    Buffer buffer;
  };
  uint64_t largest = 0;
  for (const Memory& part : input_) largest = std::max(largest, part.num_bytes());
  Chunks<Chunk>& held = kept_chunks<Chunk>(relay, chunks_for(largest, kPiece));
  Pool& pool = held.pool;
  std::vector<Chunk>& chunks = held.chunks;
  const auto served = [&](int place) { return carried(relay, place); };  // ranks for which the one at `place` of this host sums
  const std::vector<int> mine = served(relay.place);
  const bool adds = relay.num_local > 1 || !reducers_.keeps_one;
  const auto begin = [&](std::size_t c) {
    Chunk& chunk = chunks[c];
    std::vector<Memory> sums;
    for (const int r : mine) {
      const Memory part = input_[r].cut(c * kPiece, kPiece);
      sums.push_back(adds ? chunk.buffer.of(pool, part.num_bytes()) : part);
    }
    if (adds) {
      std::vector<Memory> parts(relay.num_local);
      Memory together;
      for (int p = 0; p < relay.num_local; ++p) {
        for (const int r : served(p)) parts[p].add(input_[r].cut(c * kPiece, kPiece));
      }
      for (const Memory& sum : sums) together.add(sum);
      relay.local(std::make_shared<ReduceScatter>(relay.place, relay.num_local, std::move(parts), together, reducers_.within));
    }
    chunk.from_host.resize(hosts.num_hosts());
    chunk.from_host[relay.host] = sums[0];
    for (int h = 0; h < hosts.num_hosts(); ++h) {
      if (h == relay.host) continue;
      chunk.from_host[h] = chunk.buffer.of(pool, sums[0].num_bytes());
      chunk.got.push_back(relay.receive(hosts.ranks[h][relay.place % hosts.ranks[h].size()], chunk.from_host[h]));
    }
    for (std::size_t i = 1; i < mine.size(); ++i) chunk.sent.push_back(relay.send(mine[i], sums[i]));
  };
  in_turns(chunks.size(), begin, [&](std::size_t c) {
    Chunk& chunk = chunks[c];
    relay.wait(chunk.got);
    combine(output_.cut(c * kPiece, kPiece), chunk.from_host, reducers_.between);
    relay.wait(chunk.sent);
    chunk.buffer.clear(pool);
  });
}

SpanningAllGather::SpanningAllGather(Memory outgoing, std::vector<Memory> incoming) : outgoing_(std::move(outgoing)), incoming_(std::move(incoming)) {
  for (const Memory& part : incoming_) num_bytes += part.num_bytes();
}

void SpanningAllGather::run(Relay& relay) {
  const Hosts& hosts = relay.hosts;
  uint64_t largest = 0;
  for (const Memory& part : incoming_) largest = std::max(largest, part.num_bytes());
  const auto brought = [&](int place) { return carried(relay, place); };  // ranks whose part the one at `place` of this host has first
  const std::vector<int> mine = brought(relay.place);
  std::vector<Numbers> moved(chunks_for(largest, kPiece));
  const auto begin = [&](std::size_t c) {
    for (std::size_t i = 1; i < mine.size(); ++i) moved[c].push_back(relay.receive(mine[i], incoming_[mine[i]].cut(c * kPiece, kPiece)));
    for (int distance = 1; distance < hosts.num_hosts(); ++distance) {
      const auto& there = hosts.ranks[(relay.host + distance) % hosts.num_hosts()];
      moved[c].push_back(relay.send(there[relay.place % there.size()], outgoing_.cut(c * kPiece, kPiece)));
    }
  };
  in_turns(moved.size(), begin, [&](std::size_t c) {
    relay.wait(moved[c]);
    Memory here = outgoing_.cut(c * kPiece, kPiece);
    for (std::size_t i = 1; i < mine.size(); ++i) here.add(incoming_[mine[i]].cut(c * kPiece, kPiece));
    std::vector<Memory> incoming(relay.num_local);
    for (int p = 0; p < relay.num_local; ++p) {
      for (const int r : brought(p)) incoming[p].add(incoming_[r].cut(c * kPiece, kPiece));
    }
    pass_on(relay, here, std::move(incoming), std::vector<bool>(relay.num_local, true));
  });
}

SpanningBroadcast::SpanningBroadcast(int root, Memory memory) : root_(root), memory_(std::move(memory)) {
  num_bytes = memory_.num_bytes();
}

void SpanningBroadcast::run(Relay& relay) {
  const Hosts& hosts = relay.hosts;
  const int num_hosts = hosts.num_hosts();
  const auto first_of = [&](int h) { return hosts.ranks[h][hosts.place[root_] % hosts.ranks[h].size()]; };
  const int first = first_of(relay.host), distance = (relay.host - hosts.host[root_] + num_hosts) % num_hosts;
  const bool chain = memory_.num_bytes() > kSmallTensor;
  std::vector<Numbers> got(chunks_for(memory_.num_bytes(), kPiece));
  const auto send = [&](std::size_t c, int to_distance) {
    if (to_distance < num_hosts) relay.send(first_of((hosts.host[root_] + to_distance) % num_hosts), memory_.cut(c * kPiece, kPiece));
  };
  const auto begin = [&](std::size_t c) {
    if (relay.rank != first) return;
    if (distance > 0) {
      const int source = chain ? first_of((relay.host - 1 + num_hosts) % num_hosts) : root_;
      got[c].push_back(relay.receive(source, memory_.cut(c * kPiece, kPiece)));
      return;
    }
    for (int to = 1; to < (chain ? 2 : num_hosts); ++to) send(c, to);
  };
  in_turns(got.size(), begin, [&](std::size_t c) {
    relay.wait(got[c]);
    if (relay.rank == first && distance > 0 && chain) send(c, distance + 1);
    if (relay.num_local == 1) return;
    const Memory piece = memory_.cut(c * kPiece, kPiece);
    const bool has_it = relay.rank == first;
    std::vector<Memory> incoming(relay.num_local);
    std::vector<bool> wanted(relay.num_local);
    if (!has_it) incoming[hosts.place[first]] = piece, wanted[hosts.place[first]] = true;
    pass_on(relay, has_it ? piece : Memory(), std::move(incoming), std::move(wanted));
  });
}

SpanningExchange::SpanningExchange(std::vector<Memory> outgoing, std::vector<bool> sends, std::vector<Memory> incoming, std::vector<bool> wanted)
    : outgoing_(std::move(outgoing)), incoming_(std::move(incoming)), sends_(std::move(sends)), wanted_(std::move(wanted)) {}

void SpanningExchange::run(Relay& relay) {
  const Hosts& hosts = relay.hosts;
  const int num_ranks = hosts.num_ranks();
  for (int distance = 1; distance < num_ranks; ++distance) {  // not everyone to rank 0 first
    const int to = (relay.rank + distance) % num_ranks, from = (relay.rank - distance + num_ranks) % num_ranks;
    if (hosts.host[from] != relay.host && wanted_[from]) relay.receive(from, incoming_[from]);
    if (hosts.host[to] != relay.host && sends_[to]) relay.send(to, outgoing_[to]);
  }
  std::vector<Memory> outgoing, incoming;
  std::vector<bool> wanted;
  for (const int r : hosts.ranks[relay.host]) {
    outgoing.push_back(outgoing_[r]);
    incoming.push_back(incoming_[r]);
    wanted.push_back(wanted_[r]);
  }
  relay.local(std::make_shared<Exchange>(relay.place, relay.num_local, std::move(outgoing), std::move(incoming), std::move(wanted)));
}

void SpanningBarrier::run(Relay& relay) {
  meet(relay);
  if (relay.place == 0) {
    std::vector<std::size_t> got;
    for (const auto& of_host : relay.hosts.ranks) {
      if (of_host[0] == relay.rank) continue;
      got.push_back(relay.receive(of_host[0], {}));
      relay.send(of_host[0], {});
    }
    relay.wait(got);
  }
  meet(relay);
}

}  // namespace soap::transport
