#include "search/grid_schedule.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace soap {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

struct Schedule {
  const GridStages& grid;
  const std::vector<StageTimes>& times;
  const ScheduleOptions& o;
  int depth = grid.pp, count = o.micro_batches;
  std::vector<int64_t> compute = std::vector<int64_t>(depth), movement = compute, ends = compute;
  std::vector<std::vector<const StageTransfer*>> incoming = by_stage(false), outgoing = by_stage(true);

  std::vector<std::vector<const StageTransfer*>> by_stage(bool from) const {
    std::vector<std::vector<const StageTransfer*>> out(depth);
    for (const StageTransfer& t : grid.transfers) out[from ? t.from : t.to].push_back(&t);
    return out;
  }

  // What moves between two stages and can begin at `ready`; when it is there.
  int64_t move(int from, int to, int64_t ns, int64_t ready) {
    if (ns == 0) return ready;
    auto& clock = o.overlap ? movement : compute;
    return clock[from] = clock[to] = std::max({ready, clock[from], clock[to]}) + ns;
  }

  // All stages meet.
  void together(int64_t ns, int64_t ready) {
    if (ns == 0 || !o.meets) return;
    auto& clock = o.overlap ? movement : compute;
    const int64_t end = std::max(ready, *std::max_element(clock.begin(), clock.end())) + ns;
    std::fill(clock.begin(), clock.end(), end);
  }

  // The `number`th backward of a stage.
  int64_t backward(int stage, int number) const {
    const StageTimes& t = times[stage];
    return number + 1 == count ? t.last_backward : number == 0 ? t.first_backward : t.backward;
  }

  void ended(int stage, int64_t begin) { ends[stage] = std::max({compute[stage], movement[stage], begin + times[stage].synchronised}); }

  void run_in_order() {
    together(grid.ahead_ns, 0);
    std::vector<std::vector<int64_t>> done(depth, std::vector<int64_t>(count)), undone = done;
    for (int c = 0; c < count; ++c) {
      for (int s = 0; s < depth; ++s) {
        int64_t ready = compute[s];
        for (const StageTransfer* t : incoming[s]) ready = std::max(ready, move(t->from, s, t->forward_ns, done[t->from][c]));
        for (const SharedParameter& p : grid.shared) {
          if (c == 0 && p.other == s) ready = std::max(ready, move(p.home, s, p.fill_ns, 0));
        }
        if (o.overlap && o.meets && s == 0 && c == 0) ready = std::max(ready, grid.ahead_ns);
        done[s][c] = compute[s] = std::max(compute[s], ready) + (c == 0 ? times[s].first_forward : times[s].forward);
      }
    }
    together(grid.return_ns, compute[depth - 1]);
    together(grid.return_gradient_ns * count, 0);
    if (o.overlap && grid.return_gradient_ns > 0) compute[depth - 1] = std::max(compute[depth - 1], movement[depth - 1]);
    for (int c = count; c-- > 0;) {
      for (int s = depth; s-- > 0;) {
        int64_t ready = compute[s];
        for (const StageTransfer* t : outgoing[s]) {
          if (t->backward_bytes > 0) ready = std::max(ready, move(t->to, s, t->backward_ns, undone[t->to][c]));
        }
        const int64_t begin = std::max(compute[s], ready);
        undone[s][c] = compute[s] = begin + backward(s, count - 1 - c);
        if (c == 0) ended(s, begin);
      }
    }
  }

  // Of a stage while micro-batches take turns.
  struct Turn {
    int forward = 0, backward = 0;  // the next micro-batch of each
    int64_t forward_left = kNever, backward_left = kNever;
    bool backwards = false, busy = false;  // what it does now
  };
  std::vector<Turn> turns = std::vector<Turn>(depth);
  std::vector<std::vector<int64_t>> input = std::vector<std::vector<int64_t>>(depth, std::vector<int64_t>(count, kNever)), gradient = input;  // there from then on

  // When the next forward or backward may begin, as far as is known.
  int64_t forward_at(int s) const {
    const int c = turns[s].forward, most = o.early_backward ? depth : count;
    return c == count || turns[s].backward + most <= c ? kNever : input[s][c];
  }
  int64_t backward_at(int s) const {
    const int c = turns[s].backward;
    const bool may = o.early_backward || turns[s].forward == count;
    return c == count || turns[s].forward <= c || !may ? kNever : gradient[s][c];
  }

  void run_in_turns() {
    together(grid.return_gradient_ns * count, 0);
    together(grid.ahead_ns, 0);
    std::vector<int> needed(depth);
    for (int s = 0; s < depth; ++s) {
      if (!o.overlap) compute[s] += times[s].gathers;
      needed[s] = static_cast<int>(std::count_if(outgoing[s].begin(), outgoing[s].end(), [](const auto* t) { return t->backward_bytes > 0; }));
      if (incoming[s].empty()) std::fill(input[s].begin(), input[s].end(), o.overlap && o.meets ? grid.ahead_ns : 0);
      if (needed[s] == 0) std::fill(gradient[s].begin(), gradient[s].end(), 0);
    }
    std::vector<std::vector<int>> inputs_left(depth, std::vector<int>(count)), gradients_left = inputs_left;
    for (int s = 0; s < depth; ++s) {
      std::fill(inputs_left[s].begin(), inputs_left[s].end(), static_cast<int>(incoming[s].size()));
      std::fill(gradients_left[s].begin(), gradients_left[s].end(), needed[s]);
    }
    std::vector<std::vector<int64_t>> input_so_far(depth, std::vector<int64_t>(count)), gradient_so_far = input_so_far;
    for (const SharedParameter& p : grid.shared) input_so_far[p.other][0] = std::max(input_so_far[p.other][0], move(p.home, p.other, p.fill_ns, 0));
    int64_t now = 0;
    for (int left = 2 * depth * count; left > 0;) {
      int64_t next = kNever;
      int at = -1;
      bool ends_task = false;
      for (int s = 0; s < depth; ++s) {
        Turn& t = turns[s];
        const int64_t from = std::max(now, compute[s]), back = backward_at(s), forth = forward_at(s);
        t.busy = back <= from || forth <= from;
        t.backwards = back <= from;
        if (t.backwards && t.backward_left == kNever) t.backward_left = backward(s, t.backward);
        if (!t.backwards && t.busy && t.forward_left == kNever) t.forward_left = forward_of(s, from);
        const int64_t end = !t.busy ? kNever : from + (t.backwards ? t.backward_left : t.forward_left);
        const int64_t wakes = t.backwards ? kNever : std::min(back, t.busy ? kNever : forth);
        if (std::min(end, wakes) < next) {
          next = std::min(end, wakes);
          at = s;
          ends_task = end <= wakes;
        }
      }
      SOAP_CHECK(at >= 0, "[grid] the schedule of {} stages and {} micro-batches stands still", depth, count);
      for (int s = 0; s < depth; ++s) {
        Turn& t = turns[s];
        if (!t.busy) continue;
        (t.backwards ? t.backward_left : t.forward_left) -= std::max<int64_t>(next - std::max(now, compute[s]), 0);
        compute[s] = std::max(compute[s], next);
      }
      now = next;
      if (!ends_task) continue;
      --left;
      Turn& t = turns[at];
      compute[at] = now;
      if (t.backwards) {
        const int c = t.backward++;
        t.backward_left = kNever;
        if (c + 1 == count) ended(at, now - times[at].last_backward);
        for (const StageTransfer* x : incoming[at]) {
          if (x->backward_bytes == 0) continue;
          const int64_t there = move(at, x->from, x->backward_ns, now);
          gradient_so_far[x->from][c] = std::max(gradient_so_far[x->from][c], there);
          if (--gradients_left[x->from][c] == 0) gradient[x->from][c] = gradient_so_far[x->from][c];
        }
      } else {
        const int c = t.forward++;
        t.forward_left = kNever;
        for (const StageTransfer* x : outgoing[at]) {
          const int64_t there = move(at, x->to, x->forward_ns, now);
          input_so_far[x->to][c] = std::max(input_so_far[x->to][c], there);
          if (--inputs_left[x->to][c] == 0) input[x->to][c] = input_so_far[x->to][c];
        }
      }
    }
    const int64_t end = *std::max_element(ends.begin(), ends.end());
    if (grid.return_ns > 0 && o.meets) std::fill(ends.begin(), ends.end(), end + grid.return_ns);
  }

  int64_t forward_of(int s, int64_t begin) const {
    const StageTimes& t = times[s];
    if (turns[s].forward > 0) return t.forward;
    return o.overlap ? std::max(t.forward, t.first_forward - begin) : t.first_forward - t.gathers;
  }
};

}  // namespace

std::vector<int64_t> stage_ends(const GridStages& grid, const std::vector<StageTimes>& times, const ScheduleOptions& options) {
  Schedule s{.grid = grid, .times = times, .o = options};
  grid.interleaved ? s.run_in_turns() : s.run_in_order();
  return std::move(s.ends);
}

}  // namespace soap
