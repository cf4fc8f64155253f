#include "search/grid_schedule.h"

#include <algorithm>
#include <limits>
#include <map>

#include "base/error.h"

namespace soap {
namespace {

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
    auto& clock = o.machine.overlap ? movement : compute;
    return clock[from] = clock[to] = std::max({ready, clock[from], clock[to]}) + ns;
  }

  // All stages meet.
  void together(int64_t ns, int64_t ready) {
    if (ns == 0 || !o.meets) return;
    auto& clock = o.machine.overlap ? movement : compute;
    const int64_t end = std::max(ready, *std::max_element(clock.begin(), clock.end())) + ns;
    std::fill(clock.begin(), clock.end(), end);
  }

  // The `number`th backward of a stage.
  int64_t backward(int stage, int number) const {
    const StageTimes& t = times[stage];
    return number + 1 == count ? t.last_backward : number == 0 ? t.first_backward : t.backward;
  }

  void ended(int stage, int64_t begin) {
    ends[stage] = std::max({compute[stage], movement[stage], begin + times[stage].synchronised});
    first_buckets[stage] = begin + times[stage].first_bucket;
  }
  std::vector<int64_t> first_buckets = compute;

  // Gradients that fill no bucket travel with the first that an earlier stage fills, or at the very end: sums over the ranks of each stage by themselves, what
  // is exchanged by all of them together.
  void finish() {
    std::vector<int> waiting;
    for (int s = depth; s-- > 0;) {
      ends[s] = std::max({ends[s], compute[s], movement[s]});
      if (times[s].first_bucket > 0) {
        deliver(waiting, first_buckets[s]);
        waiting.clear();
      }
      if (!times[s].left.empty()) waiting.push_back(s);
      ends[s] += times[s].left_reduce_ns;
    }
    deliver(waiting, 0);
  }
  // Stages on one host share its links.
  void deliver(const std::vector<int>& stages, int64_t ready) {
    if (stages.empty()) return;
    ExchangeLoad all;
    std::map<int, std::pair<int64_t, int64_t>> by_host;
    for (int s : stages) {
      const ExchangeLoad& load = times[s].left;
      auto& [within, between] = by_host[o.machine.host_of[s * o.stage_devices]];
      all.within_host = std::max(all.within_host, within += load.within_host);
      all.between_host = std::max(all.between_host, between += load.between_host);
      all.within = std::max(all.within, load.within);
      all.between = std::max(all.between, load.between);
      all.copied = std::max(all.copied, load.copied);
      ready = std::max(ready, ends[s]);
    }
    const int num_ranks = std::max(static_cast<int>(stages.size()) * o.stage_devices, 2);
    const int64_t end = ready + exchange_ns(o.machine, num_ranks, all.between > 0 ? 2 : 1, all);
    for (int s : stages) ends[s] = end;
  }

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
        if (o.machine.overlap && o.meets && s == 0 && c == 0) ready = std::max(ready, grid.ahead_ns);
        done[s][c] = compute[s] = std::max(compute[s], ready) + (c == 0 ? times[s].first_forward : times[s].forward);
      }
    }
    together(grid.return_ns, compute[depth - 1]);
    together(grid.return_gradient_ns * count, 0);
    if (o.machine.overlap && grid.return_gradient_ns > 0) compute[depth - 1] = std::max(compute[depth - 1], movement[depth - 1]);
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
    finish();
  }

  // A forward or backward under way: what is left of it, by lowering's estimate of work, what of that was done since its time was last counted, and time that
  // is left to count.
  struct Task {
    double left = -1, uncounted = 0;  // left below 0: not begun
    int64_t ns = 0;
  };
  // Of a stage while micro-batches take turns.
  struct Turn {
    int forward = 0, backward = 0;  // the next micro-batch of each
    Task forth, back;
    bool backwards = false, busy = false;  // what it does now
    int64_t last_begin = 0;                // of the last backward
  };
  std::vector<Turn> turns = std::vector<Turn>(depth);
  int64_t first_movement = 0;                                       // behind what all stages do together
  std::vector<std::vector<int>> inputs_missing, gradients_missing;  // by stage and micro-batch
  std::vector<std::vector<int64_t>> input, gradient;                // when they are there

  bool may_go_forward(int s) const {
    const int c = turns[s].forward, most = o.early_backward ? depth : count;
    return c < count && c < turns[s].backward + most && inputs_missing[s][c] == 0;
  }
  bool may_go_back(int s) const {
    const int c = turns[s].backward;
    return c < count && c < turns[s].forward && (o.early_backward || turns[s].forward == count) && gradients_missing[s][c] == 0;
  }

  // Counts the time of what the stage has done so far.
  void settle(int s) {
    Turn& t = turns[s];
    Task& task = t.backwards ? t.back : t.forth;
    if (!t.busy || (task.uncounted == 0 && task.left > 0)) return;
    const int64_t share = task.left <= 0 ? task.ns : static_cast<int64_t>(static_cast<double>(task.ns) * task.uncounted / (task.left + task.uncounted));
    compute[s] = std::max(compute[s], t.backwards ? gradient[s][t.backward] : input[s][t.forward]) + share;
    task.ns -= share;
    task.uncounted = 0;
  }

  void begin(int s) {
    Turn& t = turns[s];
    Task& task = t.backwards ? t.back : t.forth;
    if (task.left >= 0) return;
    task.left = grid.stages[s].work * (t.backwards ? 2 : 1);
    const int64_t at = std::max(compute[s], t.backwards ? gradient[s][t.backward] : input[s][t.forward]);
    task.ns = t.backwards ? backward(s, t.backward) : forward(s, t.forward, at);
    if (t.backwards) t.last_begin = at;
  }

  int64_t forward(int s, int number, int64_t at) const {
    const StageTimes& t = times[s];
    if (number > 0) return t.forward;
    if (!o.machine.overlap) return t.first_forward - t.gathers;
    return std::max(t.forward, (t.gathers > 0 ? first_movement : 0) + t.first_forward - at);
  }

  // What a stage has made goes to another, which is interrupted for it.
  void send(int from, int to, int64_t ns, std::vector<int>& missing, std::vector<int64_t>& there, int micro_batch) {
    settle(to);
    there[micro_batch] = std::max(there[micro_batch], move(from, to, ns, compute[from]));
    --missing[micro_batch];
  }

  void run_in_turns() {
    together(grid.return_gradient_ns * count, 0);
    together(grid.ahead_ns, 0);
    input.assign(depth, std::vector<int64_t>(count));
    gradient = input;
    for (int s = 0; s < depth; ++s) {
      if (!o.machine.overlap) compute[s] += times[s].gathers;
      const auto needed = std::count_if(outgoing[s].begin(), outgoing[s].end(), [](const auto* t) { return t->backward_bytes > 0; });
      inputs_missing.emplace_back(count, static_cast<int>(incoming[s].size()));
      gradients_missing.emplace_back(count, static_cast<int>(needed));
    }
    first_movement = movement[0];
    if (o.machine.overlap && o.meets) std::fill(input[0].begin(), input[0].end(), grid.ahead_ns);
    for (const SharedParameter& p : grid.shared) input[p.other][0] = std::max(input[p.other][0], move(p.home, p.other, p.fill_ns, 0));
    for (int left = 2 * depth * count; left > 0; --left) {
      int next = -1;
      double soonest = std::numeric_limits<double>::infinity();
      for (int s = 0; s < depth; ++s) {
        Turn& t = turns[s];
        const bool back = may_go_back(s), forth = may_go_forward(s);
        if (t.busy && t.backwards != back) settle(s);
        t.busy = back || forth;
        t.backwards = back;
        if (!t.busy) continue;
        begin(s);
        const double its = (back ? t.back : t.forth).left;
        if (its < soonest) {
          soonest = its;
          next = s;
        }
      }
      SOAP_CHECK(next >= 0, "[grid] the schedule of {} stages and {} micro-batches stands still", depth, count);
      for (Turn& t : turns) {
        if (!t.busy) continue;
        Task& task = t.backwards ? t.back : t.forth;
        task.left -= soonest;
        task.uncounted += soonest;
      }
      Turn& t = turns[next];
      Task& ended_task = t.backwards ? t.back : t.forth;
      ended_task.left = 0;
      settle(next);
      ended_task = {};
      t.busy = false;
      if (t.backwards) {
        const int c = t.backward++;
        if (c + 1 == count) ended(next, t.last_begin);
        for (const StageTransfer* x : incoming[next]) {
          if (x->backward_bytes > 0) send(next, x->from, x->backward_ns, gradients_missing[x->from], gradient[x->from], c);
        }
      } else {
        const int c = t.forward++;
        for (const StageTransfer* x : outgoing[next]) send(next, x->to, x->forward_ns, inputs_missing[x->to], input[x->to], c);
      }
    }
    finish();
    if (o.meets && grid.return_ns > 0) std::fill(ends.begin(), ends.end(), *std::max_element(ends.begin(), ends.end()) + grid.return_ns);
  }
};

}  // namespace

std::vector<int64_t> stage_ends(const GridStages& grid, const std::vector<StageTimes>& times, const ScheduleOptions& options) {
  Schedule s{.grid = grid, .times = times, .o = options};
  grid.interleaved ? s.run_in_turns() : s.run_in_order();
  return std::move(s.ends);
}

}  // namespace soap
