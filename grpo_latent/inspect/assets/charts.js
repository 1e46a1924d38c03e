"use strict";
// Learning curves and ablations, by plotly; each chart is drawn when it comes into view.

const CURVES = [
  [/^critic\/score\/mean$/, "Reward of sampled trajectories"],
  [/^val-core\/([^/]+)\/.*$/, "Held-out: $1"],
  [/^rewards\/([^/]+)\/mean$/, "Reward term: $1"],
  [/^latent\/usage_gap\/(.+)$/, "Accuracy lost under ablation $1"],
  [/^latent\/frac_rollouts$/, "Trajectories with a latent span", [0, 1.05]],
  [/^latent\/steps_mean$/, "Latent steps a trajectory"],
  [/^latent\/forced_end_frac$/, "Spans that were ended by force", [0, 1.05]],
  [/^dump\/roi_hit$/, "Nearest patch lies in the box (alignment, not quality)", [0, 1.05]],
  [/^dump\/latent_cosine_across_groups$/, "Cosine of latents across prompts (1: collapsed)", [-1.05, 1.05]],
  [/^dump\/latent_cosine_within_group$/, "Cosine of latents within a group (1: no latent exploration)", [-1.05, 1.05]],
  [/^dump\/latent_cosine_step_to_step$/, "Cosine of consecutive latent steps"],
  [/^dump\/latent_effective_rank$/, "Effective rank of first latents"],
  [/^latent\/norm_mean$/, "Norm of latents"],
  [/^latent\/replay_logp_gap_max$/, "Largest rollout–replay gap, nats"],
  [/^actor\/entropy(_loss)?$/, "Entropy, nats"],
  [/^actor\/(kl_loss|ppo_kl)$/, "KL"],
  [/^actor\/pg_clipfrac$/, "Clipped actions"],
  [/^actor\/grad_norm$/, "Gradient norm"],
  [/^frac_reward_zero_std$/, "Groups without any signal", [0, 1.05]],
  [/^response_length\/mean$/, "Completion length, positions"],
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
  const plot = el("div", { class: "plot" });
  byId("charts").append(el("div", { class: "chart", "data-metric": metric }, el("h3", {}, title), el("div", { class: "sub" }, metric), plot));
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
    for (const name of names.filter((n) => pattern.test(n) && !shown.has(n))) { shown.add(name); addChart(name, name.replace(pattern, title), range); }
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

function setUpAblations() {
  const box = byId("ablation-charts");
  const reports = OVERVIEW.runs.flatMap((run) => run.ablations.map((report) => ({ run, report })));
  if (!reports.length) {
    box.append(el("p", { class: "hint" }, "No evaluation in the run's folder. `python -m grpo_latent.evaluate output=<run>/evaluation.json …` writes one."));
  }
  for (const { run, report } of reports) {
    const plot = el("div", { style: { height: `${90 + 30 * report.rows.length}px` } });
    const words = el("div", {}, el("h3", {}, MANY_RUNS ? `${run.name}: ${report.name}` : report.name),
      el("p", { class: "note" }, `${report.num_prompts ?? "?"} prompts. Intervals: 95 % bootstrap over prompts. ` +
        (report.paired ? "Verdicts: paired." : "This file has no per-prompt outcomes: verdicts assume the pairing that is least favourable to them.")));
    const facts = report.facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, num(value, 3))]);
    for (const row of report.rows) {
      if (row.sentence) words.append(el("p", { class: "verdict" }, el("b", {}, `${row.name}: `), row.sentence));
    }
    if (facts.length) words.append(el("dl", { class: "facts" }, ...facts));
    box.append(el("div", { class: "ablation" }, plot, words));
    whenSeen(plot, () => drawAblations(plot, report));
  }
}

function drawAblations(plot, report) {
  const rows = [...report.rows].reverse(), own = report.rows.find((row) => row.name === "own");
  const trace = {
    type: "scatter", mode: "markers", y: rows.map((row) => escapeForPlotly(row.name)), x: rows.map((row) => row.accuracy),
    marker: { size: 11, color: rows.map((row) => (row.name === "own" ? "#2458c5" : "#6b3fa0")) },
    error_x: { type: "data", symmetric: false, thickness: 2, width: 5, color: "#667080",
      array: rows.map((row) => (row.high ?? row.accuracy) - row.accuracy), arrayminus: rows.map((row) => row.accuracy - (row.low ?? row.accuracy)) },
    hovertemplate: "%{y}: %{x:.3f}<extra></extra>",
  };
  const line = own ? [{ type: "line", x0: own.accuracy, x1: own.accuracy, yref: "paper", y0: 0, y1: 1, line: { color: "#2458c5", dash: "dot", width: 1 } }] : [];
  drawPlot(plot, [trace], { ...layout(), height: 90 + 30 * rows.length, hovermode: "closest", shapes: line,
    margin: { l: 110, r: 16, t: 6, b: 38 }, xaxis: { ...layout().xaxis, title: { text: "accuracy" }, range: [-0.02, 1.02] },
    yaxis: { type: "category", range: [-0.6, rows.length - 0.4] } });
}
