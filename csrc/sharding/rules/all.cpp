#include "sharding/rules/families.h"

namespace soap {
namespace {

struct Registries {
  RuleRegistry rules;
  ExpansionRegistry expansions;
};

const Registries& registries() {
  static const Registries all = [] {
    Registries r;
    register_pointwise(r.rules);
    register_matmul(r.rules);
    register_view(r.rules);
    register_move(r.rules);
    register_conv(r.rules);
    register_embedding(r.rules);
    register_indexing(r.rules);
    register_opaque(r.rules);
    register_random(r.rules);
    register_reduce(r.rules, r.expansions);
    register_norm(r.rules, r.expansions);
    register_attention(r.rules, r.expansions);
    register_loss(r.rules, r.expansions);
    register_rnn(r.rules, r.expansions);
    return r;
  }();
  return all;
}

}  // namespace

const RuleRegistry& rule_registry() {
  return registries().rules;
}
const ExpansionRegistry& expansion_registry() {
  return registries().expansions;
}

}  // namespace soap
