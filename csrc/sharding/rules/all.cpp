#include "sharding/rules/families.h"

namespace soap {

const RuleRegistry& rule_registry() {
  static const RuleRegistry registry = [] {
    RuleRegistry r;
    register_pointwise(r);
    register_matmul(r);
    register_view(r);
    return r;
  }();
  return registry;
}

const ExpansionRegistry& expansion_registry() {
  static const ExpansionRegistry registry = [] {
    ExpansionRegistry e;
    return e;
  }();
  return registry;
}

}  // namespace soap
