// A chart: lines over steps with bands and marks, whose values can be read by mouse and by key. Drawn by uPlot.

const CHART_HEIGHT = 170;
const SERIES_COLOURS = 6;
const MARKED_POINTS = 16; // a line of so few values has its points marked
const MANY_POINTS = 240; // a line of more is faint, with a line of means over it
const WHOLE = Array.from({ length: 24 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3)); // between marks of steps
const charts = new Set(); // that are on the page
let zooming = false;

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function seriesColour(i) {
  return css(`--s${i % SERIES_COLOURS}`);
}

function faint(colour, share) {
  return colour + Math.round(share * 255).toString(16).padStart(2, "0");
}

/** The mean of the values around each, 2% of all that are known; null where there are few values, or at one that is missing. */
function meansAround(values) {
  const known = values.map((_, i) => i).filter((i) => values[i] !== null && values[i] !== undefined);
  if (known.length <= MANY_POINTS) return null;
  const sums = [0], half = Math.round(known.length / 100), means = values.map(() => null);
  for (const i of known) sums.push(sums.at(-1) + values[i]);
  known.forEach((i, k) => {
    const from = Math.max(0, k - half), end = Math.min(known.length, k + half + 1);
    means[i] = (sums[end] - sums[from]) / (end - from);
  });
  return means;
}

/**
 * A figure with a chart.
 *
 * spec: title; help; series [{label, colour, dash, x, y, bands: [[low, high], ...]}] whose x ascend; marks
 * [{x, label}]; least and most of the y axis; percent. look(x): is called with the place of the cursor;
 * open(x): with that of Enter.
 */
function chartFigure(spec, look, open) {
  const tables = spec.series.map((one) => [one.x, one.y, ...(one.bands ?? []).flat()]);
  const means = spec.series.map((one) => meansAround(one.y));
  const data = uPlot.join([...tables, ...spec.series.flatMap((one, i) => (means[i] ? [[one.x, means[i]]] : []))]);
  const show = spec.percent ? (value) => (value === null || value === undefined ? "–" : `${fixed(value * 100, 1)}%`) : number;
  const readings = spec.series.map((one) => make("span", { class: "reading" }));
  const columns = []; // of the series' own values in data
  let column = 1;
  for (const table of tables) {
    columns.push(column);
    column += table.length - 1;
  }
  /** The value of a series at a place of the x axis, or the last one before it; with its interval, where it has one. */
  const reading = (i, at) => {
    const column = columns[i], known = (index) => data[column][index] !== null && data[column][index] !== undefined;
    let index = at ?? data[0].length - 1;
    while (index >= 0 && !known(index)) index--;
    const [low, high] = spec.interval && spec.series[i].bands.length ? [data[column + 1][index] ?? null, data[column + 2][index] ?? null] : [null, null];
    return `${show(data[column][index])}${low === null ? "" : ` (${show(low)} to ${show(high)})`}`;
  };
  const read = (at) => readings.forEach((element, i) => (element.textContent = reading(i, at)));
  read(null);
  const legend = spec.series.map((one, i) =>
    make("span", { class: "key" }, lineSample(one), ` ${one.label} `, readings[i]),
  );
  const canvas = make("div", {
    class: "plot", tabindex: 0, role: "img", "aria-label": describeChart(spec, show),
    "data-focus": `chart ${spec.title}`,
  });
  const figure = make("figure", { class: "chart" },
    make("figcaption", { title: spec.help ?? null }, make("h3", {}, spec.title), make("span", { class: "keys" }, legend)),
    canvas,
  );
  figure.mount = () => mountChart(canvas, spec, data, columns, { read, look, open, reading, means });
  return figure;
}

function lineSample(series) {
  return make("svg:svg", { width: 16, height: 8, "aria-hidden": "true" },
    make("svg:line", { x1: 0, x2: 16, y1: 4, y2: 4, stroke: series.colour, "stroke-width": 2, "stroke-dasharray": (series.dash ?? []).join(" ") || null }),
  );
}

function describeChart(spec, show) {
  const lines = spec.series.map((one) => {
    const known = one.y.filter((value) => value !== null && value !== undefined);
    return `${one.label} from ${show(known[0])} to ${show(known.at(-1))}, least ${show(least(known))}, most ${show(most(known))}`;
  });
  const alarms = (spec.marks ?? []).map(({ x, label }) => `${label} at ${compact(x)}`);
  return `Chart: ${spec.title}. ${lines.join("; ")}. ${alarms.length ? `Alarms: ${alarms.join(", ")}. ` : ""}Left and right arrow keys read its values.`;
}

function least(values) {
  return values.reduce((a, b) => Math.min(a, b), Infinity);
}

function most(values) {
  return values.reduce((a, b) => Math.max(a, b), -Infinity);
}

function mountChart(canvas, spec, data, columns, { read, look, open, reading, means }) {
  const ink = css("--soft"), line = css("--line"), warning = css("--warn");
  const axis = { stroke: ink, font: "11px system-ui, sans-serif", grid: { stroke: line, width: 1 }, ticks: { show: false } };
  const series = [{}], bands = [];
  spec.series.forEach((one, i) => {
    series.push({ stroke: means[i] ? faint(one.colour, 0.25) : one.colour, width: 1.6, dash: one.dash, spanGaps: true, points: { show: one.y.filter((v) => v !== null).length <= MARKED_POINTS, size: 4, fill: one.colour } });
    (one.bands ?? []).forEach((_, b) => {
      const low = columns[i] + 1 + 2 * b;
      for (let k = 0; k < 2; k++) series.push({ stroke: "transparent", width: 0, spanGaps: true, points: { show: false } });
      bands.push({ series: [low + 1, low], fill: faint(one.colour, 0.16) });
    });
  });
  spec.series.forEach((one, i) => {
    if (means[i]) series.push({ stroke: one.colour, width: 1.6, dash: one.dash, spanGaps: true, points: { show: false } });
  });
  const range = (u, low, high) => {
    if (low === null) return [0, 1];
    const size = Math.max(Math.abs(low), Math.abs(high));
    const wide = high - low > 1e-4 * size ? high - low : size || 1; // what is smaller is rounding
    return [spec.least ?? (low >= 0 && low < wide ? 0 : low - wide * 0.06), spec.most ?? high + wide * 0.06];
  };
  const chart = new uPlot(
    {
      width: canvas.clientWidth || 360, height: CHART_HEIGHT, legend: { show: false }, pxAlign: 0,
      cursor: { sync: { key: "runs" }, y: false, points: { size: 6 }, drag: { x: true, y: false, dist: 5 } },
      scales: { x: { time: false }, y: { range } },
      axes: [
        { ...axis, size: 26, values: (u, values) => namesOfMarks(values), ...(place.x === "step" ? { incrs: WHOLE } : {}) },
        { ...axis, size: 50, values: (u, values) => (spec.percent ? namesOfMarks(values.map((value) => value * 100)).map((name) => `${name}%`) : namesOfMarks(values)) },
      ],
      series, bands,
      hooks: {
        setCursor: [(u) => { read(u.cursor.idx); if (u.cursor.idx !== null && u.cursor.idx !== undefined) look(u.data[0][u.cursor.idx]); }],
        setScale: [(u, key) => key === "x" && zoomAll(u)],
        draw: [(u) => drawMarks(u, spec.marks, warning)],
      },
    },
    data, canvas,
  );
  canvas.addEventListener("keydown", (event) => {
    const last = data[0].length - 1, at = chart.cursor.idx ?? last;
    const next = { ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, last), Home: 0, End: last }[event.key];
    if (event.key === "Enter") open(data[0][at]);
    if (next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    for (const one of charts) one.setCursor({ left: one.valToPos(data[0][next], "x"), top: 20 }, true, false);
    announce(`${spec.title} at ${compact(data[0][next])}: ${spec.series.map((one, i) => `${one.label} ${reading(i, next)}`).join(", ")}`);
  });
  const resized = new ResizeObserver(() => canvas.clientWidth && chart.setSize({ width: canvas.clientWidth, height: CHART_HEIGHT }));
  resized.observe(canvas);
  chart.end = () => resized.disconnect();
  charts.add(chart);
}

/** Gives all charts the same part of the x axis. */
function zoomAll(from) {
  if (zooming) return;
  zooming = true;
  const { min, max } = from.scales.x;
  for (const chart of charts) if (chart !== from) chart.setScale("x", { min, max });
  zooming = false;
}

function drawMarks(u, marks, colour) {
  const { ctx, bbox } = u, ratio = devicePixelRatio;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour;
  ctx.lineWidth = ratio;
  ctx.setLineDash([3 * ratio, 3 * ratio]);
  for (const { x } of marks ?? []) {
    const left = Math.round(u.valToPos(x, "x", true));
    if (left < bbox.left || left > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(left, bbox.top);
    ctx.lineTo(left, bbox.top + bbox.height);
    ctx.stroke();
    ctx.beginPath();
    ctx.moveTo(left - 4 * ratio, bbox.top);
    ctx.lineTo(left + 4 * ratio, bbox.top);
    ctx.lineTo(left, bbox.top + 6 * ratio);
    ctx.fill();
  }
  ctx.restore();
}

function endCharts() {
  for (const chart of charts) {
    chart.end();
    chart.destroy();
  }
  charts.clear();
}
