// One rank's instructions, in the Program's order. What is rare is done by whoever made the engine (torch_soap/runtime/engine.py): recomputation, copies that
// are given back and gathered again, movements between ranks that don't share memory.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "engine/segment.h"
#include "movement/step.h"

namespace soap::engine {

struct Instruction {
  enum class Kind { kSegment, kSegmentBackward, kFill, kGradFill, kRare };
  Kind kind = Kind::kRare;
  int index = -1;            // of the segment, or of the step
  bool is_backward = false;  // left out where nothing is differentiated
  bool is_param_fill = false;
  std::vector<int> frees, kept;                    // values that go after it; `kept` only where there is no backward
  std::vector<int> released;                       // copies that are given back after it until backward
  std::vector<int> dropped_copies, dropped_grads;  // that are used for the last time here
};

// Tensors that a step begins with: a number of a value (-1: not here), its name and shape.
struct Begin {
  int value = -1;
  std::string name;
  std::vector<int64_t> shape;
};

class Engine {
 public:
  enum Part { kCompute, kBackward, kMove, kNumParts };

  std::vector<Segment> segments;
  std::vector<movement::Step> steps;
  std::vector<Instruction> instructions;
  std::vector<std::vector<int64_t>> shapes;  // of local values
  std::vector<Begin> stores;

  // What the rest runs: segments' operators, and rare instructions.
  struct Host {
    Compute compute;
    std::function<void(int position)> rare;
  };

  // stored[i] becomes the value of stores[i], as it is. Throws where a shape isn't the planned one.
  void begin(State& state, const std::vector<at::Tensor>& stored) const;
  // Instructions [begin, end). `grad`: a backward may follow.
  void run(State& state, int begin, int end, bool grad, const Host& host);
  // The gradients of these values, in these types, out of the state; undefined where there is none.
  static std::vector<at::Tensor> take_gradients(State& state, const std::vector<int>& values, const std::vector<at::ScalarType>& dtypes);

  // Among whom the movement that failed was; empty: none did.
  std::vector<int> moving() const;

  movement::Counts counts;  // since they were taken
  bool timed = false;
  std::array<int64_t, kNumParts> spent_ns{};  // while `timed`, in segments' operators, their backward and movements between ranks

 private:
  void move(State& state, const Instruction& instruction, bool of_gradients);
  void tidy(State& state, const Instruction& instruction, bool grad) const;

  const movement::Step* moving_ = nullptr;
  int64_t moved_before_ = 0;  // it
};

}  // namespace soap::engine
