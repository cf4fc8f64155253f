#include "search/layouts.h"

#include <algorithm>
#include <array>
#include <bit>
#include <memory>

#include "base/error.h"
#include "sim/simulate.h"

namespace soap {

Layouts::Layouts(const Machine& machine, bool each_way)
    : machine_(machine),
      each_way_(each_way),
      several_hosts_(std::any_of(machine.host_of.begin(), machine.host_of.end(), [](int host) { return host != 0; })),
      traffic_(machine),
      slots_(256, -1) {}

int Layouts::set(const IndexSet& set) {
  const auto [it, fresh] = known_sets_.try_emplace(set, static_cast<int>(sets_.size()));
  if (fresh) {
    sets_.push_back({.begin = set.is_interval() ? set.begin() : -1, .end = set.end(), .size = set.size(), .set = &it->first});
  }
  return it->second;
}

int Layouts::add(const Sharding& sharding) {
  const size_t dims = sharding.coords.empty() ? 0 : sharding.coords.front().box.size();
  key_.assign({static_cast<int>(sharding.partial), static_cast<int>(dims)});
  for (const Coord& c : sharding.coords) {
    SOAP_CHECK(c.chunk == 0, "[layout] {} is cut in time", to_string(c.box));
    if (std::any_of(c.box.begin(), c.box.end(), [](const IndexSet& s) { return s.empty(); })) continue;
    for (const IndexSet& s : c.box) key_.push_back(set(s));
    key_.push_back(static_cast<int>(c.devices.size()));
    key_.insert(key_.end(), c.devices.begin(), c.devices.end());
  }
  return add_key(dims);
}

int Layouts::add(Reduce partial, const Tiles& tiles) {
  key_.assign({static_cast<int>(partial), static_cast<int>(tiles.dims)});
  for (size_t t = 0; t < tiles.count; ++t) {
    const int *sets = tiles.sets + t * tiles.dims, *devices = tiles.devices + t * tiles.replicas;
    if (tiles.here && !tiles.here[t]) continue;
    if (std::any_of(sets, sets + tiles.dims, [&](int s) { return sets_[s].size == 0; })) continue;
    key_.insert(key_.end(), sets, sets + tiles.dims);
    key_.push_back(static_cast<int>(tiles.replicas));
    key_.insert(key_.end(), devices, devices + tiles.replicas);
  }
  return add_key(tiles.dims);
}

int Layouts::add_key(size_t dims) {
  uint64_t hash = key_.size();
  for (int x : key_) hash = (hash ^ static_cast<uint64_t>(x)) * 0x9e3779b97f4a7c15ULL, hash ^= hash >> 29;
  const auto slot_of = [&](uint64_t h, const auto& matches) {
    size_t i = h & (slots_.size() - 1);
    while (slots_[i] >= 0 && !matches(known_[slots_[i]])) i = (i + 1) & (slots_.size() - 1);
    return i;
  };
  const size_t slot = slot_of(hash, [&](const Known& k) { return k.hash == hash && std::ranges::equal(k.key, key_); });
  if (slots_[slot] >= 0) return slots_[slot];
  const int id = static_cast<int>(layouts_.size());
  int* kept = static_cast<int*>(memory_.allocate(key_.size() * sizeof(int), alignof(int)));
  std::copy(key_.begin(), key_.end(), kept);
  known_.push_back({hash, {kept, key_.size()}});
  layouts_.push_back(parsed(known_.back().key, dims));
  slots_[slot] = id;
  if (2 * known_.size() > slots_.size()) {
    slots_.assign(slots_.size() * 4, -1);
    for (size_t k = 0; k < known_.size(); ++k) slots_[slot_of(known_[k].hash, [](const Known&) { return false; })] = static_cast<int>(k);
  }
  return id;
}

Layout Layouts::parsed(std::span<const int> key, size_t dims) {
  parts_.clear();
  for (size_t at = 2; at < key.size();) {
    Layout::Part part{.sets = key.subspan(at, dims), .devices = key.subspan(at + dims + 1, key[at + dims]), .volume = 1};
    for (int s : part.sets) part.volume *= sets_[s].size;
    for (int d : part.devices) {
      SOAP_CHECK(d < kLargestLayoutWorld, "[layout] device {} of at most {}", d, kLargestLayoutWorld);
      part.mask |= uint64_t{1} << d;
    }
    at += dims + 1 + part.devices.size();
    parts_.push_back(part);
  }
  auto* parts = static_cast<Layout::Part*>(memory_.allocate(parts_.size() * sizeof(Layout::Part), alignof(Layout::Part)));
  std::uninitialized_copy(parts_.begin(), parts_.end(), parts);
  int* alike = static_cast<int*>(memory_.allocate(dims * sizeof(int), alignof(int)));
  for (size_t d = 0; d < dims; ++d) {
    alike[d] = parts_.empty() ? -1 : parts_.front().sets[d];
    for (const Layout::Part& p : parts_) {
      if (p.sets[d] != alike[d]) alike[d] = -1;
    }
  }
  return {.partial = static_cast<Reduce>(key[0]),
          .parts = {parts, parts_.size()},
          .alike = {alike, dims},
          .single = std::all_of(parts_.begin(), parts_.end(), [](const Layout::Part& p) { return p.devices.size() == 1; })};
}

int Layouts::storage(int copies, const std::vector<int64_t>& shape, int world_size) {
  if (storage_.size() < layouts_.size()) storage_.resize(layouts_.size(), -1);
  if (storage_[copies] >= 0) return storage_[copies];
  struct Kept {
    std::span<const int> sets;
    uint64_t devices = 0;
  };
  std::vector<Kept> kept;
  uint64_t used = 0;
  int64_t covered = 0;
  bool parts = true;  // one per device, which make up the whole
  for (const Layout::Part& part : layouts_[copies].parts) {
    size_t same = 0;
    while (same < kept.size() && !std::ranges::equal(kept[same].sets, part.sets)) ++same;
    if (same == kept.size()) {
      for (const Kept& other : kept) {
        int64_t overlap = 1;
        for (size_t d = 0; d < shape.size(); ++d) overlap *= common(other.sets[d], part.sets[d]);
        parts = parts && overlap == 0;
      }
      kept.push_back({part.sets});
      covered += part.volume;
    }
    const uint64_t more = part.mask & ~kept[same].devices;
    parts = parts && (used & more) == 0;
    used |= more;
    kept[same].devices |= more;
  }
  key_.assign({static_cast<int>(Reduce::kNone), static_cast<int>(shape.size())});
  const auto add_devices = [&](uint64_t mask) {
    key_.push_back(std::popcount(mask));
    for (; mask != 0; mask &= mask - 1) key_.push_back(std::countr_zero(mask));
  };
  if (parts && covered == numel(shape) && covered > 0) {
    for (const Kept& k : kept) {
      key_.insert(key_.end(), k.sets.begin(), k.sets.end());
      add_devices(k.devices);
    }
  } else if (numel(shape) > 0) {
    for (int64_t size : shape) key_.push_back(set(IndexSet::all(size)));
    add_devices(~uint64_t{0} >> (kLargestLayoutWorld - world_size));
  }
  const int stored = add_key(shape.size());
  storage_[copies] = stored;
  return stored;
}

int64_t Layouts::common_of_many(int a, int b) {
  const auto [size, fresh] = common_.at(static_cast<uint64_t>(std::max(a, b)) << 32 | static_cast<uint64_t>(std::min(a, b)));
  if (fresh) *size = size_of_common(*sets_[a].set, *sets_[b].set);
  return *size;
}

namespace {

std::vector<int> list_of(uint64_t mask) {
  std::vector<int> out;
  for (; mask != 0; mask &= mask - 1) out.push_back(std::countr_zero(mask));
  return out;
}

}  // namespace

int64_t Layouts::all_reduce(uint64_t ranks, int64_t bytes, int at_once) {
  const auto [it, fresh] = all_reduces_.try_emplace({ranks, bytes, at_once});
  if (fresh) it->second = movement_ns(machine_, "all_reduce", list_of(ranks), bytes, at_once);
  return it->second;
}

// Every piece is all of its source and of its copy; see reduce_groups in reshard/reshard.cpp for the rules.
int64_t Layouts::all_reduce(const std::vector<Piece>& pieces, const Layout& to, int64_t element_bytes) {
  std::array<int8_t, kLargestLayoutWorld> parent, addend, copy, group;
  parent.fill(-1);
  addend.fill(-1);
  copy.fill(-1);
  group.fill(-1);
  const auto root = [&](int device) {
    while (parent[device] != device) device = parent[device];
    return device;
  };
  const auto claim = [](int8_t& slot, int value) {
    if (slot < 0) slot = static_cast<int8_t>(value);
    return slot == value;
  };
  for (const Piece& p : pieces) {
    if (p.source > 127 || p.copy > 127 || !claim(addend[p.from], p.source) || !claim(copy[p.to], p.copy)) return -1;
    for (int d : {p.from, p.to}) {
      if (parent[d] < 0) parent[d] = static_cast<int8_t>(d);
    }
    const int a = root(p.from), b = root(p.to);
    parent[std::max(a, b)] = static_cast<int8_t>(std::min(a, b));
  }
  groups_.clear();
  for (const Piece& p : pieces) {
    int8_t& own = group[root(p.from)];
    if (own < 0) {
      own = static_cast<int8_t>(groups_.size());
      groups_.push_back({.sets = to.parts[p.copy].sets});
    }
    Group& g = groups_[own];
    g.ranks |= uint64_t{1} << p.from | uint64_t{1} << p.to;
    ++g.pieces;
    if (!std::ranges::equal(g.sets, to.parts[p.copy].sets)) return -1;
  }
  bool several = false;
  for (const Group& g : groups_) {
    std::array<uint64_t, 2> addends{};
    for (uint64_t left = g.ranks; left != 0; left &= left - 1) {
      const int r = std::countr_zero(left);
      if (addend[r] < 0 || copy[r] < 0) return -1;
      uint64_t& word = addends[addend[r] / 64];
      const uint64_t bit = uint64_t{1} << addend[r] % 64;
      if (word & bit) return -1;
      word |= bit;
    }
    const auto ranks = static_cast<size_t>(std::popcount(g.ranks));
    if (g.pieces != ranks * ranks) return -1;
    several = several || ranks > 1;
    // Groups of the same part add the same addends in the same order.
    for (const Group* other = groups_.data(); other != &g; ++other) {
      if (!std::ranges::equal(other->sets, g.sets)) continue;
      uint64_t a = other->ranks, b = g.ranks;
      for (; a != 0 && b != 0; a &= a - 1, b &= b - 1) {
        if (addend[std::countr_zero(a)] != addend[std::countr_zero(b)]) return -1;
      }
      if (a != b) return -1;
    }
  }
  if (!several) return 0;
  int at_once = 1;
  if (several_hosts_) {
    std::vector<std::vector<int>> reduced;
    for (const Group& g : groups_) {
      if (std::popcount(g.ranks) > 1) reduced.push_back(list_of(g.ranks));
    }
    at_once = groups_at_once(machine_, reduced);
  }
  int64_t ns = 0;
  for (const Group& g : groups_) {
    if (std::popcount(g.ranks) > 1) ns = std::max(ns, all_reduce(g.ranks, to.parts[copy[std::countr_zero(g.ranks)]].volume * element_bytes, at_once));
  }
  return ns;
}

int64_t Layouts::alike_in(const Layout& from, const Layout& to) {
  if (from.parts.empty() || to.parts.empty()) return 0;
  int64_t shared = 1;
  differing_.clear();
  for (size_t d = 0; d < to.alike.size(); ++d) {
    if (from.alike[d] >= 0 && to.alike[d] >= 0)
      shared *= common(from.alike[d], to.alike[d]);
    else
      differing_.push_back(static_cast<int>(d));
  }
  return shared;
}

std::pair<int64_t, bool> Layouts::exchange(const Layout& from, const Layout& to, int64_t element_bytes) {
  const int64_t shared = alike_in(from, to);
  if (shared == 0) return {0, false};
  uint64_t ranks = 0;
  bool whole = true;
  traffic_.clear();
  for (const Layout::Part& copy : to.parts) {
    for (const Layout::Part& source : from.parts) {
      const int64_t volume = shared * common_of_differing(source, copy);
      if (volume == 0) continue;
      whole = whole && volume == source.volume && volume == copy.volume;
      if (source.mask == copy.mask) continue;
      ranks |= source.mask | copy.mask;
      traffic_.add(source.devices[0], copy.devices[0], volume * element_bytes);
    }
  }
  if (ranks == 0) return {0, false};
  ranks_.clear();
  for (; ranks != 0; ranks &= ranks - 1) ranks_.push_back(std::countr_zero(ranks));
  return {exchange_ns(machine_, ranks_, traffic_), whole};
}

// fill_pieces (or grad_pieces) and recognise in one walk; see there for the rules.
int64_t Layouts::price(const Layout& from, const Layout& to, Reduce reduce, int64_t element_bytes, int64_t reduced_bytes) {
  const int64_t shared = alike_in(from, to);
  if (shared == 0) return 0;
  pieces_.clear();
  uint64_t ranks = 0;
  bool whole = reduce != Reduce::kNone;       // every piece is all of its source and all of its copy, and they are summed
  std::array<int, kLargestLayoutWorld> held;  // the replica that a device holds
  held.fill(-1);
  for (const Layout::Part& source : from.parts) {
    for (size_t r = 0; r < source.devices.size(); ++r) {
      if (held[source.devices[r]] < 0) held[source.devices[r]] = static_cast<int>(r);
    }
  }
  for (size_t j = 0; j < to.parts.size(); ++j) {
    const Layout::Part& copy = to.parts[j];
    for (size_t k = 0; k < from.parts.size(); ++k) {
      const Layout::Part& source = from.parts[k];
      const int64_t volume = shared * common_of_differing(source, copy);
      if (volume == 0) continue;
      whole = whole && volume == source.volume && volume == copy.volume;
      for (size_t r = 0; r < copy.devices.size(); ++r) {
        const int device = copy.devices[r];
        const int sender = source.mask >> device & 1 ? device : source.devices[(held[device] < 0 ? r : held[device]) % source.devices.size()];
        pieces_.push_back({static_cast<int>(k), static_cast<int>(j), sender, device, volume});
        if (sender != device) ranks |= uint64_t{1} << device | uint64_t{1} << sender;
      }
    }
  }
  if (ranks == 0) return 0;
  if (whole) {
    const int64_t ns = all_reduce(pieces_, to, reduced_bytes);
    if (ns >= 0) return ns;
  }
  ranks_.clear();
  for (; ranks != 0; ranks &= ranks - 1) ranks_.push_back(std::countr_zero(ranks));
  traffic_.clear();
  for (const Piece& p : pieces_) traffic_.add(p.from, p.to, p.volume * element_bytes);
  return exchange_ns(machine_, ranks_, traffic_);
}

namespace {

enum class Way { kFill, kGradient, kThereAndBack };

uint64_t key_of(int tiles, int copies, Way way, const Tensor& t) {
  SOAP_CHECK(tiles < (1 << 26) && copies < (1 << 26) && t.element_bytes < 256, "[layout] too many layouts: {}", std::max(tiles, copies));
  return static_cast<uint64_t>(tiles) << 38 | static_cast<uint64_t>(copies) << 12 | static_cast<uint64_t>(t.element_bytes) << 4 |
         static_cast<uint64_t>(way) << 1 | static_cast<uint64_t>(is_float(t));
}

}  // namespace

// Equal layouts of a complete tensor are one: every copy is the tile of its device, either way.
int64_t Layouts::fill_ns(int tiles, int copies, const Tensor& t) {
  if (tiles == copies && layouts_[tiles].partial == Reduce::kNone) return 0;
  const auto [ns, fresh] = prices_.at(key_of(tiles, copies, Way::kFill, t));
  if (fresh) {
    const Layout& from = layouts_[tiles];
    *ns = price(from, layouts_[copies], from.partial, t.element_bytes, reduced_element_bytes(t, from.partial));
  }
  return *ns;
}

int64_t Layouts::gradient_ns(int tiles, int copies, const Tensor& t) {
  if (tiles == copies && layouts_[tiles].partial == Reduce::kNone) return 0;
  const auto [ns, fresh] = prices_.at(key_of(tiles, copies, Way::kGradient, t));
  if (fresh) *ns = price(layouts_[copies], layouts_[tiles], Reduce::kSum, t.element_bytes, reduced_element_bytes(t, Reduce::kSum));
  return *ns;
}

// Where each part is on one device and the machine is a model, the gradient's exchange is the fill's the other way round, and as busy. Not so where
// the pieces are whole: those may be the addends of an all-reduce.
int64_t Layouts::there_and_back_ns(int tiles, int copies, const Tensor& t) {
  const Layout &from = layouts_[tiles], &to = layouts_[copies];
  if (tiles == copies && from.partial == Reduce::kNone) return 0;
  if (from.partial != Reduce::kNone || !from.single || !to.single || !machine_.tables.empty() || each_way_) {
    return fill_ns(tiles, copies, t) + gradient_ns(tiles, copies, t);
  }
  const uint64_t key = key_of(tiles, copies, Way::kThereAndBack, t);
  const auto [known, fresh] = prices_.at(key);
  if (!fresh) return *known;
  const auto [ns, whole] = exchange(from, to, t.element_bytes);
  const int64_t both = ns + (whole ? gradient_ns(tiles, copies, t) : ns);
  return *prices_.at(key).first = both;
}

}  // namespace soap
