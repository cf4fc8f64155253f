// Messages between hosts through the send and recv of another c10d backend, gloo's.
#pragma once

#include <memory>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "transport/wire.h"

namespace soap::backend {

// `gloo` has all ranks of the group, and no other user: when the wire is destroyed its connections end, which those on the other side see at once.
std::unique_ptr<transport::Wire> make_wire(c10::intrusive_ptr<c10d::Backend> gloo);

}  // namespace soap::backend
