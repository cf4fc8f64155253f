#include "transport/process.h"

#include <pthread.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <fstream>
#include <sstream>

#include "base/error.h"
#include "fmt/ranges.h"

namespace soap::transport {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

struct Stat {
  char state = 0;
  uint64_t start_ticks = 0;
};

// /proc/<pid>/stat: the name is in parentheses and may hold anything, so fields are counted from the last one. state 0: there is none.
Stat stat_of(int64_t pid) {
  const std::string line = first_line(fmt::format("/proc/{}/stat", pid));
  const std::size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return {};
  std::istringstream fields(line.substr(name_end + 1));
  Stat out;
  fields >> out.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  fields >> out.start_ticks;
  return out;
}

std::atomic<uint64_t> forks{0};

const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });

}  // namespace

ProcessIdentity this_process(const std::string& host) {
  ProcessIdentity out;
  struct stat found{};
  const std::string boot = first_line("/proc/sys/kernel/random/boot_id");
  out.kernel = boot.empty() ? fmt::format("alone-{}-{}", gethostid(), getpid()) : boot;
  if (!host.empty()) {
    out.host = host;
  } else {
    const bool has_shm = stat("/dev/shm", &found) == 0;
    out.host = has_shm && !boot.empty() ? fmt::format("{}-{}-{}", boot, found.st_dev, found.st_ino) : fmt::format("alone-{}-{}", gethostid(), getpid());
  }
  out.pid_namespace = stat("/proc/self/ns/pid", &found) == 0 ? fmt::format("{}", found.st_ino) : "unknown";
  out.pid = getpid();
  out.start_ticks = stat_of(out.pid).start_ticks;
  cpu_set_t cores;
  CPU_ZERO(&cores);
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) {
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &cores)) out.cores.push_back(core);
    }
  }
  return out;
}

std::string to_text(const ProcessIdentity& identity) {
  return fmt::format("{} {} {} {} {} {}", identity.host, identity.kernel, identity.pid_namespace, identity.pid, identity.start_ticks,
                     fmt::join(identity.cores, " "));
}

ProcessIdentity process_from_text(const std::string& text) {
  std::istringstream fields(text);
  ProcessIdentity out;
  if (!(fields >> out.host >> out.kernel >> out.pid_namespace >> out.pid >> out.start_ticks)) user_error("'{}' is not the text of a process", text);
  for (int core; fields >> core;) out.cores.push_back(core);
  return out;
}

bool has_ended(const ProcessIdentity& other, const ProcessIdentity& self) {
  if (other.pid_namespace != self.pid_namespace || other.pid_namespace == "unknown") return false;
  if (kill(static_cast<pid_t>(other.pid), 0) != 0 && errno == ESRCH) return true;
  const Stat stat = stat_of(other.pid);
  if (stat.state == 0) return false;  // no /proc, or it ended just now: the next look tells
  return stat.state == 'Z' || stat.state == 'X' || stat.start_ticks != other.start_ticks;
}

uint64_t fork_generation() {
  return fork_handler == 0 ? forks.load(std::memory_order_relaxed) : 0;
}

}  // namespace soap::transport
