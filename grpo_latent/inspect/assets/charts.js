"use strict";
// Learning curves and ablations, by plotly; each chart is drawn when it comes into view.

const CURVES = [
  [/^critic\/score\/mean$/, "Reward of sampled trajectories"],
  [/^val-core\/([^/]+)\/.*$/, "Held-out: $1"],
  [/^rewards\/([^/]+)\/mean$/, "Reward term: $1"],
  [/^latent\/usage_gap\/(.+)$/, "Accuracy lost under ablation $1 (fixed set)"],
  [/^latent\/usage_own_accuracy$/, "Accuracy on that fixed set", [0, 1.05]],
  [/^latent\/frac_rollouts$/, "Trajectories with a latent span", [0, 1.05]],
  [/^latent\/steps_mean$/, "Latent steps a trajectory"],
  [/^latent\/forced_end_frac$/, "Spans that were ended by force", [0, 1.05]],
  [/^latent\/drift_cosine$/, "Cosine of latents to those of the start", [-1.05, 1.05]],
  [/^latent\/drift_relative$/, "Distance of latents from the start, relative"],
  [/^latent\/alignment_hit$/, "Nearest token is the box's (alignment, not quality)", [0, 1.05]],
  [/^dump\/roi_hit$/, "Nearest patch lies in the box, dumped (alignment, not quality)", [0, 1.05]],
  [/^(latent|dump)\/(latent_)?cosine_across_groups$/, "Cosine of latents across prompts (1: collapsed)", [-1.05, 1.05]],
  [/^(latent|dump)\/(latent_)?cosine_within_group$/, "Cosine of latents within a group (1: no latent exploration)", [-1.05, 1.05]],
  [/^(latent|dump)\/(latent_)?cosine_step_to_step$/, "Cosine of consecutive latent steps"],
  [/^(latent|dump)\/(latent_)?effective_rank$/, "Effective rank of first latents"],
  [/^(latent|dump)\/(latent_)?norm_mean$/, "Norm of latents"],
  [/^latent\/grad_norm_ratio$/, "Gradient at latent inputs, relative to text inputs"],
  [/^latent\/replay_logp_gap_max$/, "Largest rollout–replay gap, nats"],
  [/^actor\/entropy(_loss)?$/, "Entropy, nats"],
  [/^actor\/(kl_loss|ppo_kl)$/, "KL"],
  [/^actor\/pg_clipfrac$/, "Clipped actions"],
  [/^actor\/grad_norm$/, "Gradient norm"],
  [/^frac_reward_zero_std$/, "Groups without any signal", [0, 1.05]],
  [/^response_length\/mean$/, "Completion length, positions"],
];
// what a value says, where its name does not; figures of this toolkit's own runs (docs/concepts.md)
const MEANINGS = [
  [/^latent\/usage_gap\//, "near 0: the latents are not used"],
  [/^latent\/frac_rollouts$/, "near 0: the policy gives latents up"],
  [/^latent\/forced_end_frac$/, "1 where spans have a fixed length"],
  [/^latent\/drift_cosine$/, "1: as at the start"],
  [/^latent\/grad_norm_ratio$/, "0: no gradient reaches latents"],
  [/^latent\/replay_logp_gap_max$/, "1e-6 to 1e-4 in float32, tenths in bfloat16"],
  [/^actor\/entropy(_loss)?$/, "near 0: nothing is explored any more"],
  [/^actor\/(kl_loss|ppo_kl)$/, "grows as the policy leaves its reference"],
  [/^actor\/pg_clipfrac$/, "0 with one update a rollout"],
  [/^frac_reward_zero_std$/, "1: no group teaches anything"],
];
/** A new object each time: plotly writes into the layout that it is given. */
const layout = () => ({
  margin: { l: 46, r: 8, t: 6, b: 32 }, height: 210, hovermode: "x unified", showlegend: false,
  font: { family: "system-ui, sans-serif", size: 11, color: "#1b1f24" }, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
  xaxis: { title: { text: "step", standoff: 4 }, gridcolor: "#eceff3", zeroline: false }, yaxis: { gridcolor: "#eceff3", zeroline: false },
});

/** Draws with plotly, whose megabytes of script are run when the first chart comes into view; the page opens without. */
function drawPlot(plot, traces, plotLayout) {
  if (!window.Plotly) document.head.append(el("script", {}, byId("plotly-source").textContent));
  Plotly.newPlot(plot, traces, plotLayout, { displaylogo: false, responsive: true, displayModeBar: false });
}

/** Traces of one metric: a line a run; for several runs of a family, thin lines, their mean, and the band between extremes. */
function curveTraces(metric) {
  const traces = [];
  for (const family of FAMILIES) {
    const runs = OVERVIEW.runs.filter((run) => run.family === family && run.metrics[metric]);
    if (!runs.length) continue;
    const color = familyColor(family), byStep = new Map();
    for (const run of runs) {
      const [steps, values] = run.metrics[metric];
      steps.forEach((step, i) => { if (values[i] != null) byStep.set(step, [...(byStep.get(step) || []), values[i]]); });
    }
    const steps = [...byStep.keys()].sort((a, b) => a - b), of = (f) => steps.map((step) => f(byStep.get(step)));
    if (runs.length > 1) {
      const edge = { x: steps, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
      traces.push({ ...edge, y: of((v) => Math.min(...v)) });
      traces.push({ ...edge, y: of((v) => Math.max(...v)), fill: "tonexty", fillcolor: `${color}26` });
    }
    const mean = of((v) => v.reduce((a, b) => a + b, 0) / v.length);
    const name = runs.length > 1 ? `${escapeForPlotly(family)} (mean of ${runs.length})` : escapeForPlotly(runs[0].name);
    traces.push({ x: steps, y: mean, name, mode: steps.length < 40 ? "lines+markers" : "lines", line: { color, width: 2 }, marker: { size: 4 } });
  }
  return traces;
}

/** plotly reads a small set of HTML in names. */
const escapeForPlotly = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** yRange: of what can only be a fraction or a cosine; a small change then looks small. */
function addChart(metric, title, yRange) {
  const plot = el("div", { class: "plot" }), meaning = MEANINGS.find(([pattern]) => pattern.test(metric));
  byId("charts").append(el("div", { class: "chart", "data-metric": metric }, el("h3", {}, title), el("div", { class: "sub" }, metric),
    meaning ? el("div", { class: "means" }, meaning[1]) : null, plot));
  whenSeen(plot, () => {
    const traces = curveTraces(metric);
    // a curve that does not move should look flat, not like magnified rounding
    const values = traces.flatMap((trace) => trace.y).filter((v) => v != null), [low, high] = range(values);
    const flat = high - low < 1e-3 * Math.max(1e-9, Math.abs(high));
    const yaxis = layout().yaxis;
    if (yRange) yaxis.range = yRange;
    else if (flat) yaxis.range = [low >= 0 ? 0 : 1.5 * low, high > 0 ? 1.5 * high : low < 0 ? 0 : 1];
    drawPlot(plot, traces, { ...layout(), yaxis });
  });
}

function setUpCurves() {
  const names = [...new Set(OVERVIEW.runs.flatMap((run) => Object.keys(run.metrics)))].sort();
  const shown = new Set();
  for (const [pattern, title, range] of CURVES) {
    for (const name of names.filter((n) => pattern.test(n) && !shown.has(n))) {
      // what training logged needs no second curve made from its dumps
      if (name.startsWith("dump/latent_") && names.includes(name.replace("dump/latent_", "latent/"))) continue;
      shown.add(name);
      addChart(name, name.replace(pattern, title), range);
    }
  }
  if (!names.length) byId("curves").append(el("p", { class: "hint" }, "No metrics.jsonl in the run."));
  for (const family of MANY_RUNS ? FAMILIES : []) {
    const members = OVERVIEW.runs.filter((run) => run.family === family).map((run) => run.name);
    const label = members.length > 1 ? `${family}: mean and range of ${members.join(", ")}` : members[0];
    byId("legend").append(el("span", {}, el("span", { class: "key", style: { background: familyColor(family) } }), label));
  }
  byId("metric-names").append(...names.filter((n) => !shown.has(n)).map((name) => el("option", { value: name })));
  byId("add-metric").addEventListener("change", (event) => {
    const name = event.target.value;
    if (!names.includes(name) || shown.has(name)) return;
    shown.add(name);
    addChart(name, name.split("/").pop());
    event.target.value = "";
  });
}

const VERDICT_TONES = { used: "good", "not used": "bad", "undecided at this n": "warn" };

/** Reports of equal file name, one a run, stand in one chart; one run's reports in a chart each. */
function setUpAblations() {
  const box = byId("ablation-charts"), byName = new Map();
  for (const run of OVERVIEW.runs) for (const report of run.ablations) byName.set(report.name, [...(byName.get(report.name) || []), { run, report }]);
  if (!byName.size) {
    box.append(el("p", { class: "hint" }, "No evaluation in the run's folder. `python -m grpo_latent.evaluate output=<run>/evaluation.json …` writes one."));
  }
  for (const [name, members] of byName) {
    const names = [...new Set(members.flatMap(({ report }) => report.rows.map((row) => row.name)))];
    const plot = el("div", { style: { height: `${90 + 30 * names.length}px` } });
    box.append(el("h3", {}, name), ...(members.length === 1 ? bottomLine(members[0].report) : []),
      el("div", { class: "ablation" }, plot, members.length === 1 ? verdictTable(members[0].report) : comparedVerdicts(members, names)));
    whenSeen(plot, () => drawAblations(plot, members, names));
  }
}

function bottomLine(report) {
  const facts = report.facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, num(value, 3))]);
  return [
    report.verdict ? el("p", { class: "verdict" }, "The latents are ", el("b", { class: VERDICT_TONES[report.verdict.verdict] || "" }, report.verdict.sentence)) : null,
    el("p", { class: "note" }, `${report.num_prompts ?? "?"} prompts, chance ${num(report.chance ?? 0, 2)}. Bars: 95 % bootstrap intervals over questions. Gap: own minus ablated accuracy over the prompts that an ablation changes; ` +
      "its interval and McNemar's test are those of all ablations together."),
    facts.length ? el("dl", { class: "facts" }, ...facts) : null,
  ].filter(Boolean);
}

const points = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
const gapText = (row) => (row.gap == null ? "–" : row.gap_low == null ? points(row.gap) : `${points(row.gap)} [${points(row.gap_low)}, ${points(row.gap_high)}]`);
const verdictText = (row) => (row.about && row.about !== "the latents" ? `${row.about}: ${row.verdict}` : row.verdict);

function verdictTable(report) {
  const head = el("tr", {}, ...["ablation", "changed", "gap", "verdict"].map((name) => el("th", { class: name === "changed" || name === "gap" ? "number" : "" }, name)));
  const rows = report.rows.filter((row) => row.name !== "own").map((row) => el("tr", { title: row.sentence },
    el("td", {}, row.name), el("td", { class: "number" }, num(row.changed)), el("td", { class: "number" }, gapText(row)),
    el("td", { class: VERDICT_TONES[row.verdict] || "" }, row.verdict ? verdictText(row) : "–")));
  return el("table", { class: "verdicts" }, el("thead", {}, head), el("tbody", {}, ...rows));
}

/** A row an ablation, a column a run. */
function comparedVerdicts(members, names) {
  const cell = (report, name) => {
    const row = report.rows.find((r) => r.name === name);
    if (!row) return el("td", {}, "–");
    if (name === "own") return el("td", {}, row.accuracy.toFixed(3));
    return el("td", { class: VERDICT_TONES[row.verdict] || "", title: row.sentence }, row.verdict ? `${verdictText(row)} (${points(row.gap)})` : num(row.accuracy, 3));
  };
  return el("table", { class: "verdicts" }, el("thead", {}, el("tr", {}, el("th", {}, "ablation"), ...members.map(({ run }) => el("th", {}, run.name)))),
    el("tbody", {}, ...names.map((name) => el("tr", {}, el("td", {}, name), ...members.map(({ report }) => cell(report, name))))));
}

/** One run: accuracies with intervals. Several: a dot a run, and each family's mean with the range of its runs. */
function ablationTraces(members, names) {
  const families = FAMILIES.filter((family) => members.some(({ run }) => run.family === family));
  const traces = [];
  families.forEach((family, f) => {
    const own = members.filter(({ run }) => run.family === family), color = members.length > 1 ? familyColor(family) : null;
    const shift = families.length > 1 ? 0.5 * (f / (families.length - 1) - 0.5) : 0;
    const found = names.map((name, i) => ({ name, y: names.length - 1 - i - shift, rows: own.map(({ run, report }) => ({ run, row: report.rows.find((r) => r.name === name) })).filter(({ row }) => row) }))
      .filter(({ rows }) => rows.length);
    const values = found.map(({ rows }) => rows.map(({ row }) => row.accuracy)), means = values.map((v) => v.reduce((a, b) => a + b, 0) / v.length);
    const edge = (pick, side) => found.map(({ rows }, i) => (own.length > 1 ? pick(...values[i]) : rows[0].row[side] ?? means[i]));
    const label = own.length > 1 ? `${family} (mean and range of ${own.length})` : own[0].run.name;
    traces.push({ type: "scatter", mode: "markers", x: means, y: found.map(({ y }) => y), name: escapeForPlotly(label),
      marker: { size: 11, color: color || found.map(({ name }) => (name === "own" ? "#2458c5" : "#6b3fa0")) },
      error_x: { type: "data", symmetric: false, thickness: 2, width: 5, color: color || "#667080",
        array: edge(Math.max, "high").map((high, i) => high - means[i]), arrayminus: edge(Math.min, "low").map((low, i) => means[i] - low) },
      text: found.map(({ name }) => escapeForPlotly(name)), hovertemplate: "%{text}: %{x:.3f}<extra></extra>" });
    if (own.length > 1) {
      const dots = found.flatMap(({ name, y, rows }) => rows.map(({ run, row }) => ({ y, x: row.accuracy, text: `${name}, ${run.name}` })));
      traces.push({ type: "scatter", mode: "markers", x: dots.map((d) => d.x), y: dots.map((d) => d.y), text: dots.map((d) => escapeForPlotly(d.text)), showlegend: false,
        marker: { size: 5, color: "#fff", line: { color, width: 1.5 } }, hovertemplate: "%{text}: %{x:.3f}<extra></extra>" });
    }
  });
  return traces;
}

function drawAblations(plot, members, names) {
  const own = members[0].report.rows.find((row) => row.name === "own"), chance = members[0].report.chance;
  const line = (x, color) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color, dash: "dot", width: 1 } });
  const lines = [...(own && members.length === 1 ? [line(own.accuracy, "#2458c5")] : []), ...(chance ? [line(chance, "#8a93a0")] : [])];
  const legend = new Set(members.map(({ run }) => run.family)).size > 1;
  drawPlot(plot, ablationTraces(members, names), { ...layout(), height: 90 + 30 * names.length, hovermode: "closest", shapes: lines, showlegend: legend,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, margin: { l: 150, r: 16, t: legend ? 30 : 6, b: 38 },
    xaxis: { ...layout().xaxis, title: { text: chance ? "accuracy (dotted grey: chance)" : "accuracy" }, range: [-0.02, 1.02] },
    yaxis: { ...layout().yaxis, tickvals: names.map((_, i) => i), ticktext: [...names].reverse().map(escapeForPlotly), range: [-0.6, names.length - 0.4] } });
}
