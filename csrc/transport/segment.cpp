#include "transport/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <stdexcept>
#include <system_error>

#include "base/error.h"

namespace soap::transport {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kControlOffset = kPage;  // the first page holds the count of those attached

uint64_t up(uint64_t value, uint64_t to) {
  return (value + to - 1) / to * to;
}

[[noreturn]] void system_error(int code, const std::string& what) {
  throw std::system_error(code, std::generic_category(), what);
}

}  // namespace

uint64_t Layout::rings_offset() const {
  return up(kControlOffset + num_ranks * sizeof(RankControl), kPage);
}
uint64_t Layout::slots_offset() const {
  return up(rings_offset() + uint64_t(num_ranks) * num_ranks * sizeof(RingControl), kPage);
}
uint64_t Layout::ring_data_offset() const {
  return up(slots_offset() + num_ranks * num_slots * slot_stride(), kPage);
}
uint64_t Layout::total_bytes() const {
  return ring_data_offset() + uint64_t(num_ranks) * num_ranks * ring_bytes;
}
uint64_t Layout::share_bytes() const {
  return num_ranks < 2 ? slot_bytes : slot_bytes / (num_ranks - 1) / kLine * kLine;
}

Layout layout_for(int num_ranks) {
  if (num_ranks < 1) user_error("[soap] a group of {} ranks", num_ranks);
  constexpr uint64_t kSmallest = 64 << 10, kLargest = 256 << 10, kAllSlots = 16 << 20, kAllRings = 64 << 20;
  Layout out;
  out.num_ranks = num_ranks;
  out.header_bytes = up(128 + 8 * num_ranks, kLine);
  out.slot_bytes = up(std::clamp(kAllSlots / (num_ranks * out.num_slots), kSmallest, kLargest), kPage) - out.header_bytes;
  while (out.share_bytes() < kLine) out.slot_bytes += kSmallest;
  out.ring_bytes = std::bit_floor(std::clamp<uint64_t>(kAllRings / (uint64_t(num_ranks) * num_ranks), 16 << 10, kLargest));
  return out;
}

Segment::Segment(const Layout& layout, int file) : layout_(layout), file_(file) {
  void* mapped = mmap(nullptr, layout.total_bytes(), PROT_READ | PROT_WRITE, file < 0 ? MAP_SHARED | MAP_ANONYMOUS : MAP_SHARED, file, 0);
  if (mapped == MAP_FAILED) {
    const int code = errno;
    if (file_ >= 0) close(file_);
    system_error(code, fmt::format("[soap] mapping {} bytes of shared memory", layout.total_bytes()));
  }
  base_ = static_cast<std::byte*>(mapped);
}

Segment::~Segment() {
  munmap(base_, layout_.total_bytes());
  if (file_ >= 0) close(file_);
}

std::unique_ptr<Segment> Segment::create(const std::string& name, const Layout& layout) {
  const int file = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (file < 0) system_error(errno, fmt::format("[soap] making the shared memory {}", name));
  try {
    struct statvfs room{};
    if (fstatvfs(file, &room) == 0 && room.f_blocks > 0 && uint64_t(room.f_bavail) * room.f_frsize < layout.needed_bytes()) {
      throw std::runtime_error(fmt::format("[soap] /dev/shm has {} KiB free, a group of {} ranks needs {} KiB: make it larger (docker: --shm-size)",
                                           uint64_t(room.f_bavail) * room.f_frsize >> 10, layout.num_ranks, layout.needed_bytes() >> 10));
    }
    if (ftruncate(file, static_cast<off_t>(layout.total_bytes())) != 0) system_error(errno, fmt::format("[soap] sizing the shared memory {}", name));
  } catch (...) {
    close(file);
    shm_unlink(name.c_str());
    throw;
  }
  try {
    std::unique_ptr<Segment> out(new Segment(layout, file));
    out->reserve(0, layout.slots_offset(), "the counters");
    return out;
  } catch (...) {
    shm_unlink(name.c_str());
    throw;
  }
}

std::unique_ptr<Segment> Segment::open(const std::string& name, const Layout& layout) {
  const int file = shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0600);
  if (file < 0) system_error(errno, fmt::format("[soap] opening the shared memory {}", name));
  return std::unique_ptr<Segment>(new Segment(layout, file));
}

std::unique_ptr<Segment> Segment::anonymous(const Layout& layout) {
  return std::unique_ptr<Segment>(new Segment(layout, -1));
}

void Segment::unlink(const std::string& name) {
  shm_unlink(name.c_str());
}

RankControl& Segment::control(int rank) const {
  return reinterpret_cast<RankControl*>(base_ + kControlOffset)[rank];
}

std::atomic<uint64_t>& Segment::num_attached() const {
  return *reinterpret_cast<std::atomic<uint64_t>*>(base_);
}

std::byte* Segment::slot(int rank, uint64_t index) const {
  return base_ + layout_.slots_offset() + (rank * layout_.num_slots + index) * layout_.slot_stride();
}

RingControl& Segment::ring(int source, int destination) const {
  return reinterpret_cast<RingControl*>(base_ + layout_.rings_offset())[source * layout_.num_ranks + destination];
}

std::byte* Segment::ring_data(int source, int destination) const {
  return base_ + layout_.ring_data_offset() + (uint64_t(source) * layout_.num_ranks + destination) * layout_.ring_bytes;
}

void Segment::reserve(uint64_t offset, uint64_t bytes, const char* what) const {
  if (file_ < 0) return;
  int code = 0;
  do {
    code = posix_fallocate(file_, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  } while (code == EINTR);
  if (code != 0) {
    system_error(code, fmt::format("[soap] /dev/shm has no room for {} ({} KiB) of a group of {} ranks: make it larger (docker: --shm-size)", what, bytes >> 10,
                                   layout_.num_ranks));
  }
}

void Segment::reserve_slots(int rank) const {
  const uint64_t bytes = layout_.num_slots * layout_.slot_stride();
  reserve(layout_.slots_offset() + rank * bytes, bytes, "the slots of a rank");
}

void Segment::reserve_ring(int source, int destination) const {
  reserve(layout_.ring_data_offset() + (uint64_t(source) * layout_.num_ranks + destination) * layout_.ring_bytes, layout_.ring_bytes, "messages between two");
}

}  // namespace soap::transport
