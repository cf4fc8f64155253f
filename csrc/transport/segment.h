// The memory that the ranks of a group on one host share.
//
// [Note: stages, slots, rings]
// Collectives of a group run one after another, each as a number of *steps*; counted over the life of the group a step is
// a *stage* (from 1). At each stage every rank publishes at most `slot_bytes` into its slot number stage mod num_slots
// (`published` = stage), reads what concerns it from the slots of all (`consumed` = stage), and may reuse a slot when all
// have consumed the stage that it held. Both counters of a rank are written by that rank alone, with release, and
// read by the others with acquire: what was copied before is visible to who sees the counter.
//   publish(s) needs consumed[q] >= s - num_slots for all q; consume(s) needs published[q] >= s for all q.
// By induction on s no set of ranks that run the same steps can wait in a circle.
//
// Messages between two ranks go through a *ring* of bytes per ordered pair: `written` and `read` count bytes for ever, the
// first written by the sender alone, the second by the receiver alone.
//
// A rank that finds nothing to do sleeps on its own *bell*, a futex word. Who changes a counter then looks at `sleepers`
// of those that may wait for it and rings. Both sides put a full fence between their write and their read, so that one of them
// sees the other.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace soap::transport {

inline constexpr std::size_t kLine = 64;

enum class RankState : uint32_t { kAway = 0, kHere, kLeft, kFailed };

struct RankControl {
  alignas(kLine) std::atomic<uint64_t> published;
  alignas(kLine) std::atomic<uint64_t> consumed;
  alignas(kLine) std::atomic<uint32_t> bell;
  std::atomic<uint32_t> sleepers;
  std::atomic<RankState> state;
  std::atomic<int32_t> blamed;  // kFailed: the rank whose end or absence made this one fail, or its own
};

struct RingControl {
  alignas(kLine) std::atomic<uint64_t> written;
  alignas(kLine) std::atomic<uint64_t> read;
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// Where things lie in the segment. All ranks compute the same from the number of ranks.
struct Layout {
  int num_ranks = 0;
  uint64_t num_slots = 4;
  uint64_t header_bytes = 0;  // of a slot, before its data
  uint64_t slot_bytes = 0;    // data of a slot
  uint64_t ring_bytes = 0;    // a power of two

  uint64_t slot_stride() const { return header_bytes + slot_bytes; }
  uint64_t rings_offset() const;
  uint64_t slots_offset() const;
  uint64_t ring_data_offset() const;
  uint64_t total_bytes() const;
  // What a group needs when all its slots are in use; rings come on top, one pair at a time.
  uint64_t needed_bytes() const { return ring_data_offset(); }
  // Data for each of the other ranks in one slot, a multiple of a line.
  uint64_t share_bytes() const;

  bool operator==(const Layout&) const = default;
};

Layout layout_for(int num_ranks);

// A mapping. Errors are std::system_error or std::runtime_error that say what was asked for.
class Segment {
 public:
  // Makes a file of shared memory with this name; throws where the file system has less room than needed_bytes().
  static std::unique_ptr<Segment> create(const std::string& name, const Layout& layout);
  // Maps one that another process made.
  static std::unique_ptr<Segment> open(const std::string& name, const Layout& layout);
  // Without a name, for threads of this process.
  static std::unique_ptr<Segment> anonymous(const Layout& layout);
  static void unlink(const std::string& name);

  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  const Layout& layout() const { return layout_; }
  RankControl& control(int rank) const;
  std::atomic<uint64_t>& num_attached() const;
  // Header and data of a slot.
  std::byte* slot(int rank, uint64_t index) const;
  RingControl& ring(int source, int destination) const;
  std::byte* ring_data(int source, int destination) const;

  // Makes sure that memory is there: where it isn't, writing would end the process. Throws in words.
  void reserve_slots(int rank) const;
  void reserve_ring(int source, int destination) const;

 private:
  Segment(const Layout& layout, int file);
  void reserve(uint64_t offset, uint64_t bytes, const char* what) const;

  Layout layout_;
  int file_ = -1;
  std::byte* base_ = nullptr;
};

}  // namespace soap::transport
