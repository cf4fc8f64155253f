// The panel beside the graph: what an operator does, what it costs, and why it isn't cut otherwise.
function link(n, text) {
  return element("button", {class: "link mono", title: n.name, onclick: () => choose({node: n}, true)}, text || n.name);
}
function chips(n) {
  const [samples, attributes, parameters] = n.degrees, degree = {S: samples, A: attributes, P: parameters};
  const mine = letters(n);
  if (!mine.length) return [element("span", {class: "chip", style: "background:var(--whole)"}, data.world > 1 ? "whole on every device" : "whole")];
  return mine.map((l) => element("span", {class: "chip", style: `background:${colour(l)}`}, l === "O" ? `Operator: ${n.devices.length} of ${data.world} devices` : `${LETTERS[l][0]} × ${degree[l]}`));
}
function change(ns) {
  const percent = (100 * ns) / data.step_ns, small = Math.abs(percent) < 0.005;
  const text = small ? "no change" : `${signed(ms(Math.abs(ns)), ns)}`;
  return element("span", {class: small ? "" : ns > 0 ? "bad" : "good"}, text, small ? null : element("small", {}, `${signed(Math.abs(percent).toFixed(2), ns)} %`));
}

function inspect(what) {
  const panel = byId("inspector");
  panel.replaceChildren(...(what.node ? aboutNode(what.node) : aboutGroup(what.group)));
  panel.scrollTop = 0;
}

function aboutNode(n) {
  const out = [element("p", {class: "title"}, n.name)];
  if (n.kind === "edge") {
    const feed = !n.inputs.length;
    out.push(element("p", {class: "quiet"}, feed ? "An input: each process feeds its own rows." : "An output: each process takes its own rows."), facts([["shape", n.shape]]));
    return [...out, ...neighbours(n)];
  }
  out.push(element("div", {class: "quiet"}, n.target, n.source ? element("span", {class: "mono", title: n.source}, ", " + where(n.source)) : null));
  out.push(element("div", {class: "chips"}, chips(n)));
  const follows = n.config === null;
  out.push(facts([
    ["configuration", element("span", {class: "mono"}, follows ? `follows its input${n.cuts ? ": " + n.cuts : ""}` : n.config || n.cuts || "whole")],
    ["devices", ranges(n.devices) + (n.replicas > 1 ? `, ${n.replicas} alike` : "")],
    n.chunks > 1 ? ["in time", `${n.chunks} chunks, one after another`] : null,
    ["result", n.shape],
    ["time", `${ms(n.ns)}, forward and backward on the slowest device (${((100 * n.ns) / data.step_ns).toFixed(1)} % of the step)`],
    ["its result moves", n.moved ? bytes(n.moved) : "nothing"],
    ["result's memory", `${bytes(n.bytes)} on a device`],
    n.parts.length ? ["expanded into", n.parts.join(", ")] : null,
  ]));
  if (n.parameters.length) {
    out.push(element("h3", {}, "Parameters"));
    out.push(table(["", {number: "whole"}, {number: "on a device"}, {number: "moves"}], n.parameters.map((p) => [
      [element("span", {class: "mono"}, p.name), element("small", {class: "quiet"}, " " + p.shape + (p.config ? `, stored ${p.config}` : ""))],
      {number: bytes(p.bytes)}, {number: bytes(p.stored)}, {number: p.moved ? bytes(p.moved) : "–"},
    ])));
  }
  out.push(element("h3", {}, "Why not otherwise?"), ...why(n));
  return [...out, ...neighbours(n)];
}

// The file's last folders and the line.
function where(source) {
  const found = /File "([^"]+)", line (\d+)/.exec(source);
  return found ? `${found[1].split("/").slice(-3).join("/")}:${found[2]}` : source;
}
const facts = (rows) => table([], rows.filter((r) => r).map(([name, value]) => [element("span", {class: "quiet"}, name), value]));

function neighbours(n) {
  const list = (title, indices) => (indices.length ? [element("h3", {}, title), ...indices.map((i) => element("div", {}, link(nodes[i])))] : []);
  return [...list("Reads", n.inputs), ...list("Read by", n.outputs)];
}

function why(n) {
  const choices = n.alternatives;
  if (data.world === 1) return [element("p", {}, "There is one device.")];
  if (!choices) return [element("p", {class: "quiet"}, "Not priced: there was no time left for it. plan.why_not(…) prices any line.")];
  const legal = choices.filter((c) => c.ns !== undefined), best = legal[0];
  const out = [];
  if (best) {
    const far = Math.abs(best.ns) / data.step_ns < 5e-5;
    out.push(element("p", {}, far ? `Nothing that was tried is faster; to ${best.said} costs the same.` : best.ns > 0 ? `Nothing that was tried is faster. The nearest, to ${best.said}, makes a step ${ms(best.ns)} longer.`
      : best.fits === false ? `To ${best.said} would be ${ms(-best.ns)} faster, but doesn't fit.` : `To ${best.said} would be ${ms(-best.ns)} faster by the simulation.`));
  }
  const rows = legal.map((c) => {
    const notes = [];
    if (c.parts) notes.push(Object.entries(c.parts).filter(([, v]) => Math.abs(v) > data.step_ns * 5e-5).map(([k, v]) => `${k} ${signed(ms(Math.abs(v)), v)}`).join(", "));
    if (c.memory !== undefined && c.memory !== 0) notes.push(`memory ${signed(bytes(Math.abs(c.memory)), c.memory)}`);
    if (c.fits === false) notes.push("doesn't fit");
    return [[element("span", {class: "said"}, c.said), element("small", {}, c.words ? element("span", {class: "mono"}, c.words) : null, notes.filter((t) => t).length ? (c.words ? " · " : "") + notes.filter((t) => t).join("; ") : "")], {number: change(c.ns)}];
  });
  for (const c of choices.filter((c) => c.ns === undefined)) rows.push([[element("span", {class: "said quiet"}, c.said), element("small", {}, `not legal: ${c.reason}`)], {number: "–"}]);
  const made = table(["instead", {number: "step"}], rows);
  made.classList.add("why");
  return [...out, made];
}

function aboutGroup(group) {
  const sum = (key) => group.members.reduce((total, n) => total + n[key], 0);
  const stored = group.members.flatMap((n) => n.parameters).reduce((total, p) => total + p.stored, 0);
  return [
    element("p", {class: "title"}, group.path),
    element("p", {class: "quiet"}, `A module of ${group.members.length} operators. `, element("button", {onclick: () => toggle(group)}, open.has(group.path) ? "collapse" : "expand")),
    facts([
      ["time", `${ms(sum("ns"))} (${((100 * sum("ns")) / data.step_ns).toFixed(1)} % of the step)`],
      ["its results move", bytes(sum("moved"))],
      ["parameters", `${bytes(stored)} on a device`],
    ]),
    element("h3", {}, "Its operators, the slowest first"),
    table(["", "cut", {number: "time"}], [...group.members].sort((a, b) => b.ns - a.ns).map((n) => [
      [element("i", {class: "swatch", style: `background:${colour(letters(n)[0])}`}), link(n, n.name.slice(group.path.length).replace(/^[./]/, ""))], element("span", {class: "mono whole-word"}, n.cuts || "whole"), {number: ms(n.ns)},
    ])),
  ];
}
