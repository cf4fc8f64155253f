// The candidates with their gain, predicted against measured, how the search went, and what else there is to know.
function drawCandidates() {
  const mine = data.candidates[0], worst = Math.min(4 * mine.step_ns, Math.max(...data.candidates.filter((c) => c.fits).map((c) => c.step_ns), mine.step_ns));
  const row = (c) => {
    const percent = (100 * (c.step_ns - mine.step_ns)) / mine.step_ns;
    const gauge = element("div", {class: "gauge"}, element("i", {style: `width:${Math.min(100, (100 * c.step_ns) / worst).toFixed(1)}%`}));
    const relative = c.mine ? "" : Math.abs(percent) < 0.05 ? "the same" : percent < 900 ? `${signed(Math.abs(percent).toFixed(1), percent)} %` : `${(c.step_ns / mine.step_ns).toFixed(0)} times`;
    const name = c.mine && data.chosen ? `${c.name} (${data.chosen})` : c.name;
    return {class: (c.mine ? "mine" : "") + (c.fits ? "" : " unfit"), cells: [name, {number: ms(c.step_ns)}, gauge, {number: relative}, {number: bytes(c.memory)}, c.fits ? "" : "doesn't fit"]};
  };
  const headings = ["plan", {number: "step"}, "", {number: "against this plan"}, {number: "fullest device"}, ""], first = data.candidates.slice(0, 15), rest = data.candidates.slice(15);
  const made = table(headings, first.map(row));
  byId("candidates").append(made);
  if (!rest.length) return;
  const more = element("button", {onclick: () => {
    made.append(...table([], rest.map(row)).children);
    more.remove();
  }}, `${rest.length} more`);
  byId("candidates").append(more);
}

function drawMeasured() {
  const ran = data.measured.some((r) => r.measured !== null), headings = ["", {number: "predicted"}, ...(ran ? [{number: "measured"}, {number: "prediction is"}] : [])];
  if (!ran) byId("measured").append(element("p", {class: "quiet"}, "Nothing was measured: the plan was not run, or the report was written without its step times."));
  byId("measured").append(table(headings, data.measured.map((r) => {
    const percent = r.measured ? (100 * (r.predicted - r.measured)) / r.measured : null;
    const off = percent === null ? "–" : Math.abs(percent) < 0.05 ? "right" : `${Math.abs(percent).toFixed(1)} % ${percent > 0 ? "high" : "low"}`;
    return [r.what, {number: ms(r.predicted)}, ...(ran ? [{number: r.measured === null ? "–" : ms(r.measured)}, {number: off}] : [])];
  })));
}

// What model.plan.health() found: nothing where nobody has asked it.
function drawHealth() {
  const h = data.health;
  if (!h) return;
  const parts = {step: "", family: "operators: ", link: ""}, off = h.rows.filter((r) => r.off).map((r) => r.what);
  const found = off.length ? `off: ${off.join(", ")}` : h.ok ? "as predicted" : "the step is off, no part of it stands out";
  byId("health").append(element("h3", {}, `While training: ${found}`));
  byId("health").append(table(["", {number: "predicted"}, {number: "measured"}, {number: "times the prediction"}], h.rows.map((r) => (
    {class: r.off ? "off" : "", cells: [parts[r.part] + r.what, {number: ms(r.predicted)}, {number: ms(r.measured)}, {number: r.predicted ? (r.measured / r.predicted).toFixed(2) : "–"}]}
  ))));
  byId("health").append(element("p", {class: "quiet"}, `Medians of ${count(h.num_steps)} steps, parts of ${count(h.num_samples)} sampled ones, on the slowest rank; the step without its update.`));
}

function drawProgress() {
  const stage = byId("progress"), width = stage.clientWidth, height = stage.clientHeight, left = 70, foot = 34, top = 12, right = 16;
  const points = data.progress;
  if (!points.length) {
    stage.style.display = "none";
    byId("stats").append(element("p", {}, "This plan was written, not searched."));
    return;
  }
  const last = points[points.length - 1][0], values = points.map((p) => p[1]), low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low || high * 0.1) * 0.08, x = (n) => left + (n / last) * (width - left - right);
  const y = (ns) => height - foot - ((ns - low + pad) / (high - low + 2 * pad || 1)) * (height - foot - top);
  const out = [];
  for (let i = 0; i <= 4; ++i) {
    const ns = low + ((high - low) * i) / 4;
    if (high === low && i) break;
    out.push(svg("line", {class: "grid", x1: left, x2: width - right, y1: y(ns), y2: y(ns)}), svg("text", {class: "axis", x: left - 8, y: y(ns) + 4, "text-anchor": "end"}, ms(ns, 4)));
  }
  ticks(last, 5).forEach((n) => { if (n <= last) out.push(svg("text", {class: "axis", x: x(n), y: height - 18, "text-anchor": "middle"}, count(n))); });
  out.push(svg("text", {class: "axis", x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle"}, "simulations"));
  const path = points.map((p, i) => (i ? `L${x(p[0]).toFixed(1)},${y(points[i - 1][1]).toFixed(1)}L` : "M") + `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("");
  out.push(svg("path", {d: path, fill: "none", stroke: "var(--accent)", "stroke-width": 2}));
  let phase = "", free = 0;
  points.forEach((p, i) => {
    if (i < points.length - 1 || points.length === 1) out.push(svg("circle", {cx: x(p[0]), cy: y(p[1]), r: 2.8, fill: "var(--accent)"}, svg("title", {}, `${p[2]}: ${ms(p[1], 4)} after ${count(p[0])}`)));
    if (p[2] === phase) return;
    phase = p[2];
    const at = Math.min(Math.max(x(p[0]) + 5, free), width - right - phase.length * 6.5);
    out.push(svg("line", {x1: x(p[0]), x2: x(p[0]), y1: top, y2: height - foot, stroke: "var(--line)", "stroke-dasharray": "3 4"}));
    out.push(svg("text", {class: "axis", x: at, y: top + 2}, phase));
    free = at + phase.length * 6.5 + 8;
  });
  stage.replaceChildren(...out);
}

function drawStats() {
  const s = data.stats, words = [];
  if (s.simulations !== undefined) words.push(`${count(s.simulations)} simulations`);
  if (s.search_seconds !== undefined) words.push(`${s.search_seconds.toFixed(2)} s of search`);
  if (s.chains) words.push(s.chains === 1 ? "one chain" : `${s.chains} chains`);
  if (s.capture_seconds !== undefined) words.push(`${s.capture_seconds.toFixed(2)} s of capture`);
  if (s.measured_operators) words.push(`${count(s.measured_operators)} operators measured`);
  if (s.illegal_proposals) words.push(`${count(s.illegal_proposals)} proposals were not legal`);
  byId("stats").append(words.join(", ") + (s.interrupted ? ". It was interrupted: this is the best plan until then." : ""));
}

function drawRest() {
  byId("text").textContent = data.text || "(empty: every operator follows its input)";
  const m = data.machine, linkText = (l) => `${l.gb_per_s.toPrecision(3)} GB/s, ${l.latency_us.toPrecision(3)} µs`;
  byId("machine").append(table([], [
    ["name", m.name], ["devices", `${m.host_of.length} on ${m.hosts} host${m.hosts > 1 ? "s" : ""}`],
    ["a device", `${m.tflops.toPrecision(3)} TFLOP/s, ${m.memory_gb_per_s.toPrecision(3)} GB/s, ${bytes(data.memory_limit)} may be used`],
    ["links within a host", linkText(m.intra)], ...(m.hosts > 1 ? [["links between hosts", linkText(m.inter)]] : []),
    ["communication", m.overlap ? "runs beside compute" : "nothing computes meanwhile"],
  ]));
  if (data.left_out.length) byId("left-out").append(element("p", {class: "quiet"}, "Left out: " + data.left_out.join("; ") + "."));
}
