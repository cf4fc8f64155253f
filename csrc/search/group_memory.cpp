#include "search/group_memory.h"

#include <algorithm>
#include <map>

#include "sim/memory.h"

namespace soap {
namespace {

struct Slots {
  const GroupStage& s;
  const GroupCost& cost = s.cost;
  const ManualOptions& o = s.options;
  int n = cost.positions;
  int turn = 2 * n, end = 5 * n;
  bool early = s.early_backward && o.order == Order::kInterleaved && o.micro_batches > 1;
  std::vector<int64_t> changes = std::vector<int64_t>(end + 2);  // by slot
  int64_t kept = 0;                                              // from forward to backward
  std::map<int, int> last_of_region = {};                        // its last position

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

  bool here(NodeId node) const { return s.stage_of[node] == s.index; }
  bool again(NodeId node) const { return o.recompute && s.region_of[node] >= 0; }

  void find_regions() {
    for (const GroupTensor& t : cost.tensors) {
      if (!again(t.node) || t.source >= 0) continue;
      int& last = last_of_region.emplace(s.region_of[t.node], t.position).first->second;
      last = std::max(last, t.position);
    }
  }
  int begin_again(NodeId node) const { return refill(last_of_region.at(s.region_of[node])); }

  // Its memory: of a tile or copy of this stage; of what another stage sends, from where the first reader is.
  void hold_value(const GroupTensor& t) {
    if (t.fed && o.pp == 1) return;
    const bool sent = t.fed || !here(t.node),
               computed = !sent && (t.source < 0 || (!t.moved && s.region_of[cost.tensors[t.source].node] == s.region_of[t.node]));
    int made = t.source < 0 && !sent ? compute(t.position) : fill(t.position), forward = -1, outside = -1, inside = -1;
    for (const GroupRead& r : t.reads) {
      if (!here(r.node)) continue;
      if (forward < 0 && sent) made = fill(r.position);
      forward = std::max(forward, r.moves ? fill(r.position) : compute(r.position));
      const bool with_reader = computed && !r.moves && again(r.node) && s.region_of[r.node] == s.region_of[t.node];
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
      hold(t.bytes, made, std::max(forward, outside));
      hold(t.bytes, begin_again(t.node), inside);
    } else {
      hold(t.bytes, made, std::max({forward, outside, inside}));
    }
  }

  void hold_more(const GroupTensor& t) {
    if (!again(t.node)) return hold(t.bytes_more, compute(t.position), back(t.position));
    hold(t.bytes_more, compute(t.position), compute(t.position));
    hold(t.bytes_more, begin_again(t.node), back(t.position));
  }

  // Slots in which the readers of this stage (else of another) make a gradient: the first, and where it is complete.
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
  Span span(const GroupTensor& t, bool of_this_stage) const {
    Span out;
    for (const GroupRead& r : t.reads) {
      if (r.gradient && here(r.node) == of_this_stage) out.add({r.view ? bring(r.position) : back(r.position), bring(r.position), 1});
    }
    return out;
  }

  void hold_gradients() {
    std::vector<Span> begins(cost.tensors.size());  // of tiles
    std::map<int, int64_t> new_sums;                // one after the other
    for (size_t i = 0; i < cost.tensors.size(); ++i) {
      const GroupTensor& t = cost.tensors[i];
      const Span own = span(t, true), others = o.pp > 1 ? span(t, false) : Span{};
      const bool received = t.source >= 0 && t.returns;
      if (own.known() && (received || !here(t.node))) hold(t.bytes, own.begin, own.complete);
      Span& tile = begins[t.source >= 0 ? t.source : static_cast<int>(i)];
      tile.add(received && own.known() ? Span{own.complete, own.complete} : own);
      if (others.known()) tile.add({others.complete, others.complete});
      if (!own.known() || own.readers < 2) continue;
      std::vector<int> adds;
      for (const GroupRead& r : t.reads) {
        if (r.gradient && here(r.node)) adds.push_back(back(r.position));
      }
      std::sort(adds.begin(), adds.end());
      for (size_t k = 1; k < adds.size(); ++k) {
        hold(t.bytes, adds[k], adds[k]);
        if (k == 1) new_sums[adds[k]] = std::max(new_sums[adds[k]], t.bytes);
      }
    }
    for (const auto& [slot, bytes] : new_sums) hold(bytes, slot, slot);
    for (size_t i = 0; i < cost.tensors.size(); ++i) {
      const GroupTensor& t = cost.tensors[i];
      if (t.source < 0 && here(t.node) && begins[i].known()) hold(t.bytes, begins[i].begin, std::max(begins[i].begin, back(t.position)));
    }
  }

  int64_t hold_activations() {
    find_regions();
    for (size_t i = 0; i < cost.tensors.size(); ++i) {
      const GroupTensor& t = cost.tensors[i];
      if (t.root == static_cast<int>(i)) hold_value(t);
      if (here(t.node)) hold_more(t);
      for (const GroupRead& r : t.reads) {
        if (here(r.node)) hold(r.backward_bytes, back(r.position), back(r.position));
      }
    }
    hold_gradients();
    return kept;
  }

  // -- parameters ----
  int position(NodeId node) const { return cost.nodes[node].position; }

  struct Readers {
    int first = -1, last = -1;
  };
  Readers readers(const GroupParameter& p) const {
    Readers out;
    for (NodeId reader : p.readers) {
      if (!here(reader)) continue;
      if (out.first < 0) out.first = position(reader);
      out.last = position(reader);
    }
    return out;
  }

  void hold_copy(const StageParameter& q) {
    const Readers at = readers(*q.p);
    const int64_t received = q.p->bytes / q.group * (q.group - 1);
    hold(received, fill(at.first), fill(at.first));
    if (o.micro_batches > 1) return hold(q.p->bytes, 0, q.p->saved || early ? end : turn - 1);
    if (o.zero < 3 || !q.p->saved) return hold(q.p->bytes, fill(at.first), q.p->saved ? back(at.first) : compute(at.last));
    hold(q.p->bytes, fill(at.first), compute(at.last));
    hold(received, refill(at.last), refill(at.last));
    hold(q.p->bytes, refill(at.last), back(at.first));
  }

  enum class Sums { kNone, kThere };  // at the begin: of earlier micro-batches' gradients
  // `bring_them`: to where they are stored, in buckets, which hold what they send and receive.
  void hold_parameters(Sums sums, bool bring_them) {
    for (const GroupTensor& t : cost.tensors) {
      if (t.fed) hold(t.bytes * o.micro_batches / o.pp, 0, end);
    }
    std::vector<StageParameter> by_end;
    for (const StageParameter& q : s.parameters) {
      const int64_t part = q.p->bytes / q.group;
      const bool trained = q.p->trained && q.p->last >= 0;
      hold(part * (q.p->trained ? 1 + kOptimizerCopies : 1), 0, end);
      if (q.p->trained) hold(part, 0, early ? end : sums == Sums::kThere ? -1 : turn - 1);  // the last step's gradient
      if (q.group > 1) hold_copy(q);
      if (trained) by_end.push_back(q);
    }
    std::stable_sort(by_end.begin(), by_end.end(), [&](const auto& a, const auto& b) { return position(a.p->last) > position(b.p->last); });
    std::vector<StageParameter> bucket;
    int64_t bytes = 0;
    const auto flush = [&](int slot) {
      int64_t moved = 0;
      for (const StageParameter& q : bucket) {
        const int begin = sums == Sums::kThere ? 0 : back(readers(*q.p).last);
        hold(q.p->bytes, begin, bring_them ? slot : end);
        if (bring_them) hold(q.p->bytes / q.group, slot + 1, end);
        if (q.group > 1)
          moved += 2 * (q.p->bytes / q.group) * (o.dp - 1);  // sent and received
        else if (o.dp > 1 || q.p->alike)
          moved += q.p->bytes / q.p->element_bytes * q.p->reduced_element_bytes;
      }
      if (bring_them) hold(moved, slot, slot);
      bucket.clear();
      bytes = 0;
    };
    for (const StageParameter& q : by_end) {
      bucket.push_back(q);
      bytes += q.p->whole_bytes;
      if (bytes >= s.bucket_bytes) flush(bring(position(q.p->last)));
    }
    if (!by_end.empty()) flush(bring(position(by_end.back().p->last)));
  }
};

}  // namespace

int64_t stage_memory(const GroupStage& stage) {
  const ManualOptions& o = stage.options;
  Slots activations{.s = stage};
  const int64_t kept = activations.hold_activations();
  const auto with = [&](Slots::Sums sums, bool bring_them, int micro_batches) {
    Slots all = activations;
    all.hold_parameters(sums, bring_them);
    return (micro_batches - 1) * kept + all.peak();
  };
  if (o.micro_batches == 1) return with(Slots::Sums::kNone, true, 1);
  // As lowering allows and a greedy order takes (program/order.h). The last stage's backward follows its forward at once, but for what a group moves.
  const int most = stage.index + 1 < o.pp ? o.pp : std::min(o.pp, o.tp > 1 ? 2 : 1);
  const int held = activations.early ? std::min(o.micro_batches, most) : o.micro_batches;
  const int later = activations.early && o.micro_batches > held ? held : std::max(held - 1, 1);
  return std::max({with(Slots::Sums::kNone, false, held), with(Slots::Sums::kThere, false, later), with(Slots::Sums::kThere, true, 1)});
}

}  // namespace soap
