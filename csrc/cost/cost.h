// Cost: the time of one tile of one operator, measured where it is known, else a roofline scaled by what was measured of its operator.
//
//   roofline(tile) = overhead + max(flops / F(type), bytes / B) / part(family, size)      flops, bytes, size: cost/work.h; the rates: machine/machine.h
//   estimate(tile) = roofline(tile) * mean over measured tiles m of the same operator of (measured(m) / roofline(m))
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "machine/machine.h"
#include "program/program.h"

namespace soap {

struct OpTime {
  int64_t forward_ns = 0;
  int64_t backward_ns = 0;
};

// One tile of one operator, for measuring it.
struct OpSample {
  std::string key;
  NodeId node = -1;
  int tile = 0, chunk = 0;
};

class CostModel {
 public:
  // Throws std::invalid_argument where the machine isn't one (check in machine/machine.h).
  explicit CostModel(Machine machine) : machine_(std::move(machine)) { check(machine_); }
  const Machine& machine() const { return machine_; }

  // Operator, local shapes and attributes: equal keys take equal time.
  static std::string key(const Program& program, NodeId node, int tile, int chunk);
  // On a device, once it begins.
  OpTime time(const Program& program, NodeId node, int tile, int chunk) const;
  // Of the host to queue one tile (Machine::launch).
  OpTime launch(const Program& program, NodeId node) const;
  void measure(const Program& program, const OpSample& sample, OpTime time);
  void set(const std::string& key, OpTime time) { measured_[key] = time; }
  const std::map<std::string, OpTime>& measured() const { return measured_; }
  // What a program needs and nobody has measured, one sample for each key.
  std::vector<OpSample> missing(const Program& program) const;
  // Of what has these keys, each time that a rank computes it in a step's forward, in its order: rank 0, then of each other rank what none before it computes.
  static std::vector<OpSample> turns(const Program& program, const std::set<std::string>& keys);

 private:
  struct Ratio {
    double forward = 0, backward = 0;
    int count = 0;
  };
  OpTime roofline(const Program& program, NodeId node, int tile, int chunk) const;
  Machine machine_;
  std::map<std::string, OpTime> measured_;
  std::map<std::string, Ratio> ratios_;  // by operator
};

}  // namespace soap
