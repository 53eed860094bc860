// The parts of the data: found in the page or beside it, unpacked when they are looked at, kept while they are near.

const facts = JSON.parse(document.getElementById("facts").textContent);
const NO_NUMBER = 65535;
const DTYPES = { uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array };
const KEPT_PARTS = 48;
const unpacked = new Map(); // name -> promise of a part, the one used last at the end
let inPage = null; // name -> script element that holds a part
const KEPT_SCRIPTS = 4;
const handedOver = new Map(); // `RUN/STEP` -> Map of its parts that came with one script, name -> text; the latest at the end
const inOneScript = new Set(); // `RUN/STEP` of which all parts come with the index

globalThis.fr3eViewPart = (name, text) => document.currentScript.parts?.set(name, text);

/** The part of that name: its head, with `arrays` as typed arrays. Rejects where there is none. */
function loadPart(name) {
  let part = unpacked.get(name);
  unpacked.delete(name);
  part ??= packedPart(name).then(unpack).catch((error) => {
    unpacked.delete(name); // so that it is asked for again
    throw error;
  });
  unpacked.set(name, part);
  for (const oldest of unpacked.keys()) {
    if (unpacked.size <= KEPT_PARTS) break;
    if (oldest !== "runs") unpacked.delete(oldest);
  }
  return part;
}

async function packedPart(name) {
  inPage ??= new Map([...document.querySelectorAll("script[data-part]")].map((script) => [script.dataset.part, script]));
  if (inPage.has(name)) return inPage.get(name).textContent;
  if (facts.where === "inline") throw new Error(`the page has no part ${name}`);
  const step = name.slice(0, name.lastIndexOf("/"));
  const text = handedOver.get(step)?.get(name) ?? (await partsOfScript(step, inOneScript.has(step) ? `${step}/index` : name)).get(name);
  if (text === undefined) throw new Error(`${facts.folder}/${name}.js is damaged`);
  return text;
}

/** The parts that a script beside the page hands over: name -> text. */
async function partsOfScript(step, name) {
  const script = make("script", { src: `${facts.folder}/${name}.js` }), parts = new Map();
  script.parts = parts;
  await new Promise((resolve, reject) => {
    script.addEventListener("load", resolve);
    script.addEventListener("error", () => reject(new Error(`${script.src} cannot be loaded`)));
    document.head.append(script);
  }).finally(() => script.remove());
  if (parts.size > 1) {
    inOneScript.add(step);
    handedOver.delete(step);
    handedOver.set(step, parts);
    if (handedOver.size > KEPT_SCRIPTS) handedOver.delete(handedOver.keys().next().value);
  }
  return parts;
}

async function unpack(text) {
  const packed = Uint8Array.fromBase64
    ? Uint8Array.fromBase64(text)
    : Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const size = new DataView(buffer).getUint32(0, true);
  const part = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  for (const [name, [dtype, offset, count]] of Object.entries(part.arrays)) {
    part.arrays[name] = new DTYPES[dtype](buffer, 4 + size + offset, count);
  }
  return part;
}

/** The index of a step: questions, and `rows` as columns. */
function loadIndex(run, step) {
  return loadPart(`${run}/${step}/index`);
}

/** A question of a step, each row with views of its tokens' numbers. */
async function loadQuestion(run, step, place) {
  const part = await loadPart(`${run}/${step}/${place}`);
  if (part.ready) return part;
  let from = 0;
  part.rows.forEach((row, i) => {
    const own = (name) => part.arrays[name].subarray(from, from + row.tokens);
    Object.assign(row, { ids: own("token"), logprobs: own("logprob"), entropies: own("entropy"), widths: own("width") });
    from += row.tokens;
    row.key = row.kind === "base" ? `b${row.trajectory}` : `r${row.trajectory}.${row.state}.${row.rollout}`;
    row.place = i;
    row.part = part;
  });
  part.base = part.rows.filter((row) => row.kind === "base");
  part.partial = part.rows.filter((row) => row.kind === "partial");
  part.ready = true;
  return part;
}

/** Where each token's text begins and ends in a row's text. */
function startsOf(row) {
  if (!row.starts) {
    row.starts = new Uint32Array(row.tokens + 1);
    for (let i = 0; i < row.tokens; i++) row.starts[i + 1] = row.starts[i] + row.widths[i];
  }
  return row.starts;
}

function tokenText(row, i) {
  const starts = startsOf(row);
  return row.text.slice(starts[i], starts[i + 1]);
}

/** A token's entropy in nats, or null. */
function entropyOf(row, i) {
  return row.entropies[i] === NO_NUMBER ? null : row.entropies[i] / 1000;
}

/** The log-probability of a drawn token in nats, or null. */
function logprobOf(row, i) {
  return row.logprobs[i] === NO_NUMBER ? null : -row.logprobs[i] / 1000;
}

/** States of a trajectory in the order of their positions, each with its rows; without positions, of all. */
function statesOf(part, trajectory) {
  const rows = part.partial.length
    ? part.partial.filter((row) => row.trajectory === trajectory)
    : part.base.filter((row) => row.state !== null);
  const states = new Map();
  for (const row of rows) {
    if (!states.has(row.state)) {
      const { state, position, statistic, value, alpha, accepted, rejected } = row;
      states.set(state, { state, position: position ?? 0, statistic, value, alpha, accepted, rejected, rows: [] });
    }
    states.get(row.state).rows.push(row);
  }
  return [...states.values()].sort((a, b) => a.state - b.state);
}

/** A state's continuations: highest reward first, then highest advantage, then by number. */
function byReward(rows) {
  return [...rows].sort(
    (a, b) => b.reward - a.reward || (b.advantage ?? 0) - (a.advantage ?? 0) || (a.rollout ?? a.trajectory) - (b.rollout ?? b.trajectory),
  );
}
