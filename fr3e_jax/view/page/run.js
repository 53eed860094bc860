// The run: its numbers over steps, tokens, FLOPs or seconds, several runs over one another, and its alarms.

const X_AXES = { step: "steps", tokens: "tokens", flops: "FLOPs", seconds: "seconds" };
const GROUPS = [
  ["Learning", [
    { title: "Held-out accuracy", of: ["eval/accuracy"], percent: true, interval: true },
    { title: "Reward", of: ["reward/root_mean", "reward/base_mean"] },
    { title: "Length of answers", of: ["response/length", "response/continuation", "eval/length"] },
    { title: "Cut by the length limit", of: ["response/cut", "response/continuation_cut", "eval/cut"], percent: true },
  ]],
  ["Exploration", [
    { title: "Entropy, nats", of: ["entropy/mean", "entropy/positions", "entropy/elsewhere", "update/entropy"] },
    { title: "States", of: ["states/accepted", "states/rejected", "states/all_wrong", "states/all_right", "states/identical"] },
    { title: "V over states", quantiles: "value", least: 0 },
    { title: "V, mean", of: ["value/mean", "value/accepted_mean", "value/accepted_std"] },
    { title: "Advantage over accepted rollouts", quantiles: "advantage" },
    { title: "Advantage of accepted states", of: ["advantage/accepted_mean", "advantage/accepted_std"] },
    { title: "Forks whose continuations disagree", of: ["forks/disagree"], percent: true },
    { title: "Distance to the next position, tokens", of: ["positions/distance"] },
    { title: "Depth of accepted states", of: ["states/depth"], percent: true },
    { title: "Modulation alpha, mean", of: ["modulation/mean"] },
  ]],
  ["Update", [
    { title: "Gradient norm", of: ["update/grad_norm"] },
    { title: "Loss", of: ["update/loss"] },
    { title: "Clipped", of: ["update/clip_low", "update/clip_high", "update/clip_dual", "update/left_out"], percent: true },
    { title: "KL divergence, nats", of: ["update/approx_kl", "update/reference_kl"] },
    { title: "Sampler and learner: absolute log ratio", of: ["update/abs_log_ratio", "mismatch/outside", "mismatch/bounded"] },
    { title: "Ratio", of: ["update/ratio_max", "update/ratio_mean", "update/ratio_min"] },
    { title: "Learning rate", of: ["update/learning_rate"] },
  ]],
  ["Cost", [
    { title: "Seconds a stage", prefix: "time/", but: "time/share_" },
    { title: "Waiting, share of the step", prefix: "time/share_", percent: true },
    { title: "FLOPs a stage", prefix: "flops/", but: "flops/utilisation_" },
    { title: "Utilisation", prefix: "flops/utilisation_", percent: true },
    { title: "Occupancy of rows", of: ["rows/occupancy"], percent: true },
    { title: "Tokens a step", of: ["tokens/generated", "tokens/trained", "tokens/reused"] },
    { title: "Tokens an accepted state", of: ["tokens/per_accepted"] },
    { title: "Memory, GiB", prefix: "memory/" },
  ]],
];
const DASHES = [null, [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [12, 3], [4, 6]]; // of the numbers of a run among several; of those beyond the colours in one run
let lookedAt = null; // x under the cursor

/** Draws the view. */
function drawRun(main, all) {
  redraw(main, `run ${place.x} ${place.hidden} ${theme()}`, () => {
    endCharts();
    const shown = all.runs.filter((_, i) => !hiddenRuns().includes(i));
    const figures = [];
    const figure = (spec) => {
      const one = chartFigure(spec, look, open);
      figures.push(one);
      return one;
    };
    const named = new Set();
    const groups = GROUPS.map(([name, specs]) => {
      const own = specs.map((spec) => specOf(spec, all, shown, named)).filter(Boolean).map(figure);
      return own.length ? make("section", {}, make("h2", {}, name), make("div", { class: "charts" }, own)) : null;
    });
    const rest = [...new Set(shown.flatMap((run) => Object.keys(run.columns)))]
      .filter((name) => !named.has(name) && name !== "step" && name !== "tokens/total")
      .map((name) => specOf({ title: name, of: [name] }, all, shown, named)).filter(Boolean);
    const others = make("details", { class: "others" }, make("summary", { "data-focus": "others" }, `${plural(rest.length, "other number")}`));
    others.addEventListener("toggle", () => {
      if (!others.open || others.children.length > 1) return;
      const own = rest.map((spec) => chartFigure(spec, look, open));
      others.append(make("div", { class: "charts" }, own));
      own.forEach((one) => one.mount());
    });
    queueMicrotask(() => figures.forEach((one) => one.isConnected && one.mount()));
    return make("div", { class: "run-view" },
      runBar(all), alarmList(all, shown), groups, rest.length ? others : null, numbersTable(all, shown), settingsTable(shown),
    );
  });
}

function hiddenRuns() {
  return place.hidden ? place.hidden.split(".").map(Number) : [];
}

/** The x of each step of a run on the chosen axis, null where it is not known; never descending. */
function xOf(run) {
  const steps = run.columns.step;
  if (place.x === "step") return steps;
  if (place.x === "tokens") return steps.map((step, i) => run.columns["tokens/total"]?.[i] ?? (step === 0 ? 0 : null));
  const names = place.x === "seconds"
    ? ["time/step", "time/evaluate"]
    : Object.keys(run.columns).filter((name) => name.startsWith("flops/") && !name.startsWith("flops/utilisation_"));
  let sum = 0;
  return steps.map((_, i) => (sum += names.reduce((total, name) => total + (run.columns[name]?.[i] ?? 0), 0)));
}

/** The step of a run that is nearest to a place on the x axis. */
function stepAt(run, x) {
  let best = 0;
  const xs = xOf(run);
  xs.forEach((value, i) => { if (value !== null && Math.abs(value - x) < Math.abs((xs[best] ?? Infinity) - x)) best = i; });
  return run.columns.step[best];
}

function namesFor(spec, shown) {
  if (spec.of) return spec.of.filter((name) => shown.some((run) => run.columns[name]));
  const names = [...new Set(shown.flatMap((run) => Object.keys(run.columns)))];
  return names.filter((name) => name.startsWith(spec.prefix) && !(spec.but && name.startsWith(spec.but)));
}

/** What a chart shows, or null where no run has it. */
function specOf(spec, all, shown, named) {
  const series = [];
  const several = shown.length > 1;
  const colourOf = (run, i) => seriesColour(several || spec.quantiles ? all.runs.indexOf(run) : i);
  if (spec.quantiles) {
    for (const run of shown) {
      const known = run.quantiles.filter(([, found]) => found[spec.quantiles]);
      if (!known.length) continue;
      const xs = xOf(run), of = (q) => known.map(([, found]) => found[spec.quantiles][q]);
      const x = known.map(([step]) => xs[run.columns.step.indexOf(step)] ?? null);
      series.push(line(several ? run.name : "median, 25–75%, 10–90%", colourOf(run, 0), null, x, of(2), [[of(0), of(4)], [of(1), of(3)]]));
    }
  } else {
    const names = namesFor(spec, shown);
    names.forEach((name, i) => {
      named.add(name);
      for (const run of shown) {
        if (!run.columns[name]) continue;
        const label = names.length > 1 || !several ? shortName(name, names, spec) : "";
        const bands = spec.interval && run.effective ? [intervals(run.columns[name], run.effective)] : [];
        const dash = DASHES[(several ? i : Math.floor(i / SERIES_COLOURS)) % DASHES.length];
        series.push(line([several ? run.name : "", label].filter(Boolean).join(" · "), colourOf(run, i), dash, xOf(run), run.columns[name], bands));
      }
    });
  }
  if (!series.length) return null;
  const help = namesFor(spec.of || spec.prefix ? spec : { of: [] }, shown).map((name) => meaningLine(all, name)).filter(Boolean).join("\n");
  return { ...spec, series, help: help || null, marks: marksOf(shown) };
}

/** A line of a chart, without the steps whose x is not known. */
function line(label, colour, dash, x, y, bands = []) {
  const known = x.map((_, i) => i).filter((i) => x[i] !== null && (i === 0 || x[i] !== x[i - 1]));
  const of = (values) => known.map((i) => values[i] ?? null);
  return { label, colour, dash, x: of(x), y: of(y), bands: bands.map(([low, high]) => [of(low), of(high)]) };
}

/** A metric's name without what its chart already says: what stands before the slash, where that is clear. */
function shortName(name, names, spec) {
  const bare = (one) => one.slice((spec.prefix ?? one.slice(0, one.lastIndexOf("/") + 1)).length);
  const clear = names.filter((one) => bare(one) === bare(name)).length === 1;
  return (clear && bare(name) ? bare(name) : name).replaceAll("_", " ");
}

/** Wilson intervals (95%) of shares, each of so many independent answers: [lows, highs]. */
function intervals(shares, counts) {
  const z2 = 1.96 ** 2;
  const ends = shares.map((p, i) => {
    const n = counts[i];
    if (p === null || n === null) return [null, null];
    const middle = p + z2 / (2 * n), half = 1.96 * Math.sqrt((p * (1 - p)) / n + z2 / (4 * n ** 2));
    return [(middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)];
  });
  return [ends.map(([low]) => low), ends.map(([, high]) => high)];
}

/** Where alarms went off: not the steps after it, at which they are still on. */
function marksOf(shown) {
  return shown.flatMap((run) => {
    const xs = xOf(run), on = new Set(run.alarms.map(([step, name]) => `${step} ${name}`));
    return run.alarms.map(([step, name]) => [run.columns.step.indexOf(step), name])
      .filter(([i, name]) => Number.isFinite(xs[i]) && !on.has(`${run.columns.step[i - 1]} ${name}`))
      .map(([i, name]) => ({ x: xs[i], label: name.replaceAll("_", " ") }));
  });
}

function meaningLine(all, name) {
  const meaning = all.meanings[name];
  return meaning ? `${name}: ${meaning.help}${meaning.unit ? `, ${meaning.unit}` : ""}${meaning.over ? `, over ${meaning.over}` : ""}.${meaning.watch ? ` Look for: ${meaning.watch}.` : ""}` : "";
}
