#include "search/group_memory.h"

#include <algorithm>
#include <map>

#include "sim/memory.h"

namespace soap {
namespace {

struct Slots {
  int n = 0;
  int turn = 2 * n, end = 5 * n;
  std::vector<int64_t> changes = std::vector<int64_t>(end + 2);  // by slot
  int64_t kept = 0;                                              // from forward to backward

  static int fill(int p) { return 2 * p; }
  static int compute(int p) { return 2 * p + 1; }
  int refill(int p) const { return turn + 3 * (n - 1 - p); }
  int back(int p) const { return refill(p) + 1; }
  int bring(int p) const { return refill(p) + 2; }

  void hold(int64_t bytes, int from, int to) {
    if (bytes == 0 || to < from) return;
    changes[from] += bytes;
    changes[to + 1] -= bytes;
    if (from < turn && to >= turn) kept += bytes;
  }
  int64_t peak() const {
    int64_t now = 0, most = 0;
    for (int64_t c : changes) most = std::max(most, now += c);
    return most;
  }
};

// Last positions of the repeated blocks' operators.
std::vector<int> last_positions(const GroupCost& cost, const std::vector<int>& region_of) {
  std::vector<int> out;
  for (const GroupTensor& t : cost.tensors) {
    const int region = region_of[t.node];
    if (region < 0 || t.source >= 0) continue;
    if (region >= static_cast<int>(out.size())) out.resize(region + 1, -1);
    out[region] = std::max(out[region], t.position);
  }
  return out;
}

struct Activations {
  const GroupCost& cost;
  const std::vector<int>& stage_of;
  const std::vector<int>& region_of;
  const std::vector<int>& last_of_region;
  bool recompute = false;
  int index = 0;
  const std::vector<int>& tensors;  // that the stage makes, reads, or whose copies are others'
  const std::vector<int>& place;
  Slots slots;

  bool here(NodeId node) const { return stage_of[node] == index; }
  bool again(NodeId node) const { return recompute && region_of[node] >= 0; }
  int begin_again(NodeId node) const { return slots.refill(place[last_of_region[region_of[node]]]); }
  int fill(int position) const { return Slots::fill(place[position]); }
  int compute(int position) const { return Slots::compute(place[position]); }
  int back(int position) const { return slots.back(place[position]); }
  int bring(int position) const { return slots.bring(place[position]); }

  // Its memory: of a tile or copy of this stage; of what another stage sends, from where the first reader is.
  void hold_value(const GroupTensor& t, bool one_stage) {
    if (t.fed && one_stage) return;
    const bool sent = t.fed || !here(t.node), computed = !sent && (t.source < 0 || (!t.moved && region_of[cost.tensors[t.source].node] == region_of[t.node]));
    int made = t.source < 0 && !sent ? compute(t.position) : fill(t.position), forward = -1, outside = -1, inside = -1;
    for (const GroupRead& r : t.reads) {
      if (!here(r.node)) continue;
      if (forward < 0 && sent) made = fill(r.position);
      forward = std::max(forward, r.moves ? fill(r.position) : compute(r.position));
      const bool with_reader = computed && !r.moves && again(r.node) && region_of[r.node] == region_of[t.node];
      if (r.saved) {
        int& until = with_reader ? inside : outside;
        until = std::max(until, back(r.position));
      }
      if (!with_reader && !r.moves && again(r.node)) outside = std::max(outside, begin_again(r.node));
    }
    if (sent && forward < 0) return;
    forward = std::max(forward, made);
    if (computed && t.saved) inside = std::max(inside, back(t.position));
    if (computed && again(t.node) && begin_again(t.node) > std::max(forward, outside)) {
      slots.hold(t.bytes, made, std::max(forward, outside));
      slots.hold(t.bytes, begin_again(t.node), inside);
    } else {
      slots.hold(t.bytes, made, std::max({forward, outside, inside}));
    }
  }

  void hold_more(const GroupTensor& t) {
    if (!again(t.node)) return slots.hold(t.bytes_more, compute(t.position), back(t.position));
    slots.hold(t.bytes_more, compute(t.position), compute(t.position));
    slots.hold(t.bytes_more, begin_again(t.node), back(t.position));
  }

  // Slots in which readers make a gradient: the first, and where it is complete.
  struct Span {
    int begin = -1, complete = -1, readers = 0;
    bool known() const { return begin >= 0; }
    void add(const Span& other) {
      if (!other.known()) return;
      begin = known() ? std::min(begin, other.begin) : other.begin;
      complete = std::max(complete, other.complete);
      readers += other.readers;
    }
  };

  // `begins`: of tiles, by tensor, as empty before as after.
  void hold_gradients(std::vector<Span>& begins) {
    std::map<int, int64_t> new_sums;  // one after the other
    std::vector<int> adds;
    for (const int i : tensors) {
      const GroupTensor& t = cost.tensors[i];
      Span own, others;
      for (const GroupRead& r : t.reads) {
        if (r.gradient) (here(r.node) ? own : others).add({r.view ? bring(r.position) : back(r.position), bring(r.position), 1});
      }
      const bool received = t.source >= 0 && t.returns;
      if (own.known() && (received || !here(t.node))) slots.hold(t.bytes, own.begin, own.complete);
      Span& tile = begins[t.source >= 0 ? t.source : i];
      tile.add(received && own.known() ? Span{own.complete, own.complete} : own);
      if (others.known()) tile.add({others.complete, others.complete});
      if (!own.known() || own.readers < 2) continue;
      adds.clear();
      for (const GroupRead& r : t.reads) {
        if (r.gradient && here(r.node)) adds.push_back(back(r.position));
      }
      std::sort(adds.begin(), adds.end());
      for (size_t k = 1; k < adds.size(); ++k) {
        slots.hold(t.bytes, adds[k], adds[k]);
        if (k == 1) new_sums[adds[k]] = std::max(new_sums[adds[k]], t.bytes);
      }
    }
    for (const auto& [slot, bytes] : new_sums) slots.hold(bytes, slot, slot);
    for (const int i : tensors) {
      const GroupTensor& t = cost.tensors[i];
      const Span span = begins[i];
      if (t.source < 0 && here(t.node) && span.known()) slots.hold(t.bytes, span.begin, std::max(span.begin, back(t.position)));
    }
    for (const int i : tensors) begins[cost.tensors[i].source >= 0 ? cost.tensors[i].source : i] = {};
  }

  void hold_all(bool one_stage, std::vector<Span>& begins) {
    for (const int i : tensors) {
      const GroupTensor& t = cost.tensors[i];
      if (t.root == i) hold_value(t, one_stage);
      if (here(t.node)) hold_more(t);
      for (const GroupRead& r : t.reads) {
        if (here(r.node)) slots.hold(r.backward_bytes, back(r.position), back(r.position));
      }
    }
    hold_gradients(begins);
  }
};

struct Parameters {
  const GroupStage& s;
  const ManualOptions& o = s.options;
  bool early = s.early_backward && o.order == Order::kInterleaved && o.micro_batches > 1;
  Slots slots;

  int place(NodeId node) const { return s.activations.place[s.cost.nodes[node].position]; }

  void hold_copy(const StageParameter& q) {
    const int first = place(q.first), last = place(q.last), end = slots.end;
    const int64_t received = q.p->bytes / q.group * (q.group - 1);
    slots.hold(received, Slots::fill(first), Slots::fill(first));
    if (o.micro_batches > 1) return slots.hold(q.p->bytes, 0, q.p->saved || early ? end : slots.turn - 1);
    if (o.zero < 3 || !q.p->saved) return slots.hold(q.p->bytes, Slots::fill(first), q.p->saved ? slots.back(first) : Slots::compute(last));
    slots.hold(q.p->bytes, Slots::fill(first), Slots::compute(last));
    slots.hold(received, slots.refill(last), slots.refill(last));
    slots.hold(q.p->bytes, slots.refill(last), slots.back(first));
  }

  enum class Sums { kNone, kThere };  // at the begin: of earlier micro-batches' gradients
  // What a reader's backward adds to a sum that is there, and, the first time, a new sum beside the two.
  void hold_addends(Sums sums, bool new_sums_too) {
    std::map<int, int64_t> new_sums;  // one after the other
    std::vector<int> adds;
    for (const StageParameter& q : s.parameters) {
      if (!q.p->trained) continue;
      adds.clear();
      for (const NodeId reader : q.p->readers) {
        if (const int at = place(reader); at >= 0 && reader >= q.first && reader <= q.last) adds.push_back(slots.back(at));
      }
      std::sort(adds.begin(), adds.end());
      const size_t begin = sums == Sums::kThere ? 0 : 1;
      for (size_t k = begin; k < adds.size(); ++k) slots.hold(q.p->bytes, adds[k], adds[k]);
      if (new_sums_too && begin < adds.size() && (adds.size() == 1) == (sums == Sums::kThere))
        new_sums[adds[begin]] = std::max(new_sums[adds[begin]], q.p->bytes);
    }
    for (const auto& [slot, bytes] : new_sums) slots.hold(bytes, slot, slot);
  }

  // `bring_them`: to where they are stored, in buckets, which hold what they send and receive.
  void hold_all(Sums sums, bool bring_them) {
    const int end = slots.end;
    for (const int64_t bytes : s.activations.fed) slots.hold(bytes * o.micro_batches / o.pp, 0, end);
    for (const StageParameter& q : s.parameters) {
      const int64_t part = q.p->bytes / q.group;
      slots.hold(part * (q.p->trained ? 1 + kOptimizerCopies : 1), 0, end);
      if (q.p->trained) slots.hold(part, 0, early ? end : sums == Sums::kThere ? -1 : slots.turn - 1);  // the last step's gradient
      if (q.group > 1) hold_copy(q);
    }
    hold_addends(sums, sums == Sums::kNone || !bring_them || o.micro_batches == 2);
    size_t first = 0;
    int64_t bytes = 0;
    const auto flush = [&](size_t until, int slot) {
      int64_t moved = 0;
      for (; first < until; ++first) {
        const StageParameter& q = s.parameters[s.by_end[first]];
        const int begin = sums == Sums::kThere ? 0 : slots.back(place(q.last));
        slots.hold(q.p->bytes, begin, bring_them ? slot : end);
        if (bring_them) slots.hold(q.p->bytes / q.group, slot + 1, end);
        if (q.group > 1)
          moved += 2 * (q.p->bytes / q.group) * (o.dp - 1);  // sent and received
        else if (o.dp > 1 || q.p->alike)
          moved += q.p->bytes / q.p->element_bytes * q.p->reduced_element_bytes;
      }
      if (bring_them) slots.hold(moved, slot, slot);
      bytes = 0;
    };
    for (size_t k = 0; k < s.by_end.size(); ++k) {
      const GroupParameter& p = *s.parameters[s.by_end[k]].p;
      bytes += p.whole_bytes;
      if (bytes >= s.bucket_bytes || k + 1 == s.by_end.size()) flush(k + 1, slots.bring(place(p.last)));
    }
  }
};

}  // namespace

std::vector<StageActivations> stage_activations(const GroupCost& cost, const std::vector<int>& stage_of, const std::vector<int>& region_of, bool recompute,
                                                const std::vector<std::vector<StageParameter>>& parameters) {
  const int count = static_cast<int>(parameters.size());
  std::vector<std::vector<int>> tensors(count);
  const auto list = [&](NodeId node, int i) {
    auto& of_stage = tensors[stage_of[node]];
    if (of_stage.empty() || of_stage.back() != i) of_stage.push_back(i);
  };
  std::vector<int64_t> fed;
  for (size_t k = 0; k < cost.tensors.size(); ++k) {
    const GroupTensor& t = cost.tensors[k];
    const int i = static_cast<int>(k);
    list(t.node, i);
    if (t.source >= 0) list(cost.tensors[t.source].node, i);
    for (const GroupRead& r : t.reads) list(r.node, i);
    if (t.fed) fed.push_back(t.bytes);
  }
  const std::vector<int> last_of_region = last_positions(cost, region_of);
  std::vector<Activations::Span> begins(cost.tensors.size());
  std::vector<StageActivations> out(count);
  for (int index = 0; index < count; ++index) {
    StageActivations& stage = out[index];
    std::vector<char> there(cost.positions);
    const auto mark = [&](NodeId node, int position) {
      there[position] = 1;
      if (recompute && region_of[node] >= 0) there[last_of_region[region_of[node]]] = 1;
    };
    for (const int i : tensors[index]) {
      mark(cost.tensors[i].node, cost.tensors[i].position);
      for (const GroupRead& r : cost.tensors[i].reads) mark(r.node, r.position);
    }
    for (const StageParameter& q : parameters[index]) {
      for (const NodeId node : {q.first, q.last, q.p->last}) {
        if (node >= 0) there[cost.nodes[node].position] = 1;
      }
      for (const NodeId node : q.p->readers) {
        if (stage_of[node] == index) there[cost.nodes[node].position] = 1;
      }
    }
    stage.place.resize(cost.positions);
    for (int p = 0; p < cost.positions; ++p) stage.place[p] = there[p] ? stage.places++ : -1;
    Activations a{.cost = cost,
                  .stage_of = stage_of,
                  .region_of = region_of,
                  .last_of_region = last_of_region,
                  .recompute = recompute,
                  .index = index,
                  .tensors = tensors[index],
                  .place = stage.place,
                  .slots = {.n = stage.places}};
    a.hold_all(count == 1, begins);
    stage.changes = std::move(a.slots.changes);
    stage.kept = a.slots.kept;
    stage.fed = fed;
  }
  return out;
}

int64_t stage_memory(const GroupStage& stage) {
  const ManualOptions& o = stage.options;
  using Sums = Parameters::Sums;
  const auto with = [&](Sums sums, bool bring_them, int micro_batches) {
    Parameters all{.s = stage, .slots = {.n = stage.activations.places, .changes = stage.activations.changes}};
    all.hold_all(sums, bring_them);
    return (micro_batches - 1) * stage.activations.kept + all.slots.peak();
  };
  if (o.micro_batches == 1) return with(Sums::kNone, true, 1);
  // As lowering allows and a greedy order takes (program/order.h): a stage is ahead of the last one by the stages between.
  const bool early = stage.early_backward && o.order == Order::kInterleaved;
  const int most = o.pp - stage.index;
  const int held = early ? std::min(o.micro_batches, most) : o.micro_batches;
  const int later = early && o.micro_batches > held ? held : std::max(held - 1, 1);
  return std::max({with(Sums::kNone, false, held), with(Sums::kThere, false, later), with(Sums::kThere, true, 1)});
}

}  // namespace soap
