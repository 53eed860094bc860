// The tokens of a response: each a span, coloured by a number, with its numbers beside the text when it is looked at.

const COLOURS = {
  entropy: "entropy", logprob: "log-probability", advantage: "advantage", trained: "trained", none: "none",
};
const COLOUR_HELP = {
  entropy: (most) => `how unsure the model was before each token: 0 to ${most.entropy} nats and more`,
  logprob: (most) => `how unlikely each token was that was drawn: 0 to −${most.logprob} nats and less`,
  advantage: () => "the response's advantage: blue above 0, orange below; a base trajectory that is only branched from has none",
  trained: () => "tokens that carry loss",
  none: () => "no colour",
};
const LEVELS = 8;
const SCALES = [0.5, 1, 2, 3, 5, 7, 10, 20]; // nats at which the deepest colour begins
const BELOW_DEEPEST = 0.9; // share of the tokens of base trajectories that have another colour
const TOKENS_AT_ONCE = 12000; // shown before one asks for more
const CHARACTERS_AT_ONCE = 400_000;

/** The nats at which the deepest colour begins, for both numbers, by the base trajectories of a question. */
function scalesOf(part) {
  if (part.scales) return part.scales;
  const scale = (name) => {
    const known = part.base.flatMap((row) => Array.from(row[name])).filter((value) => value !== NO_NUMBER).sort((a, b) => a - b);
    const high = (known[Math.floor((known.length - 1) * BELOW_DEEPEST)] ?? 0) / 1000;
    return SCALES.find((one) => one >= high) ?? SCALES.at(-1);
  };
  part.scales = { entropy: scale("entropies"), logprob: scale("logprobs") };
  return part.scales;
}

/** The class of a token on the chosen scale. */
function levelClass(row, i, colour) {
  if (colour === "entropy" || colour === "logprob") {
    const value = colour === "entropy" ? entropyOf(row, i) : logprobOf(row, i);
    if (value === null) return "t";
    const share = Math.abs(value) / scalesOf(row.part)[colour];
    const level = Math.min(LEVELS, Math.floor(Math.sqrt(share) * (LEVELS + 0.999)));
    return level ? `t l${level}` : "t";
  }
  if (colour === "advantage" && row.advantage) {
    const level = Math.max(1, Math.min(LEVELS, Math.round(Math.abs(row.advantage) * LEVELS)));
    return `t ${row.advantage > 0 ? "up" : "down"} l${level}`;
  }
  return colour === "trained" && isTrained(row) ? "t on l4" : "t";
}

/** Whether a response carries loss: it belongs to an accepted state. */
function isTrained(row) {
  return row.accepted === true;
}

/**
 * The text of a response as tokens, over which the arrow keys move.
 *
 * before(i): what stands before token i, or nothing. stops: tokens to which [ and ] jump.
 */
function tokenBox(row, label, before, stops) {
  const box = make("div", {
    class: `tokens by-${place.colour}`, dir: "auto", tabindex: 0, role: "group", "aria-label": `${label}: arrow keys move over its ${plural(row.tokens, "token")}`,
    "data-focus": `tokens ${row.key}`,
  });
  const more = make("button", { type: "button", class: "more", onclick: () => fill() });
  let shown = 0;
  function fill() {
    more.remove();
    const nodes = [], most = shown + TOKENS_AT_ONCE;
    let characters = 0;
    while (shown < row.tokens && shown < most && characters < CHARACTERS_AT_ONCE) {
      const chip = before?.(shown);
      if (chip) nodes.push(chip);
      const text = tokenText(row, shown);
      const at = shown++;
      characters += text.length;
      const span = make("span", { class: levelClass(row, at, place.colour), "data-i": at });
      if (text === "") {
        span.className += " empty";
        span.append("·");
      } else if (text.length > CHARACTERS_AT_ONCE) span.append(...visible(text.slice(0, CHARACTERS_AT_ONCE)), "…");
      else span.append(...visible(text.replaceAll("\n", "\u21b5\n")));
      nodes.push(span);
    }
    if (shown < row.tokens) {
      more.textContent = `show more: ${plural(row.tokens - shown, "token")} left`;
      nodes.push(more);
    } else {
      const rest = row.text.slice(startsOf(row)[row.tokens]);
      nodes.push(...visible(rest));
      if (!row.stopped) nodes.push(make("span", { class: "cut", title: "rollout.max_response cut it off" }, "✂ cut off"));
    }
    box.append(...nodes);
  }
  fill();
  const spanOf = (i) => {
    while (i >= shown && i < row.tokens) fill();
    return box.querySelector(`[data-i="${Number(i)}"]`);
  };
  const choose = (i, spoken) => {
    const span = spanOf(i);
    if (!span) return;
    document.querySelectorAll(".t.at").forEach((one) => one.classList.remove("at"));
    span.classList.add("at");
    remember({ token: `${row.key}:${i}` });
    readToken(row, i, spoken);
    if (spoken) span.scrollIntoView({ block: "nearest" });
  };
  box.addEventListener("pointerover", (event) => {
    const span = event.target.closest(".t");
    if (span) readToken(row, Number(span.dataset.i), false);
  });
  box.addEventListener("pointerleave", () => readChosen());
  box.addEventListener("click", (event) => {
    const span = event.target.closest(".t");
    if (span && getSelection().isCollapsed) choose(Number(span.dataset.i), false);
  });
  box.addEventListener("keydown", (event) => {
    if (event.target !== box || event.ctrlKey || event.metaKey || event.altKey) return;
    const [key, at] = place.token.split(":");
    const now = key === row.key ? Number(at) : -1;
    const beyond = (direction) => direction > 0 ? stops?.find((one) => one > now) : stops?.findLast((one) => one < now);
    const next = { ArrowRight: now + 1, ArrowDown: now + 10, ArrowLeft: now - 1, ArrowUp: now - 10, Home: 0, End: row.tokens - 1, "}": beyond(1), "{": beyond(-1) }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(row.tokens - 1, next)), true);
  });
  const [key, at] = place.token.split(":");
  if (key === row.key) spanOf(Number(at))?.classList.add("at");
  return box;
}

let chosenToken = null; // [row, i] that the reading goes back to

/** Shows the numbers of a token in the line at the bottom. */
function readToken(row, i, spoken) {
  const reading = document.getElementById("reading");
  if (!reading || i >= row.tokens || Number.isNaN(i)) return;
  const logprob = logprobOf(row, i), text = tokenText(row, i);
  const readings = [
    ["token", `${(i + 1).toLocaleString("en")} of ${row.tokens.toLocaleString("en")}`], ["id", String(row.ids[i])],
    ["probability", logprob === null ? "–" : fixed(Math.exp(logprob), 3)], ["log-probability", fixed(logprob, 3)],
    ["entropy", `${fixed(entropyOf(row, i), 3)} nats`], ["advantage", fixed(row.advantage, 3)], ["trained", isTrained(row) ? "yes" : "no"],
  ];
  const shown = text === "" ? [make("i", {}, "no text")] : visible(JSON.stringify(text.slice(0, 60)));
  reading.replaceChildren(
    make("code", { class: "token" }, ...shown),
    ...readings.map(([name, value]) => make("span", { class: "fact" }, make("span", { class: "name" }, name), " ", value)));
  if (spoken) {
    chosenToken = [row, i];
    announce(`${text || "no text"}: ${readings.map(([name, value]) => `${name} ${value}`).join(", ")}`);
  } else if (place.token === `${row.key}:${i}`) chosenToken = [row, i];
}

/** Shows the chosen token again, or how to choose one. */
function readChosen() {
  if (chosenToken && place.token === `${chosenToken[0].key}:${chosenToken[1]}`) readToken(...chosenToken, false);
  else document.getElementById("reading")?.replaceChildren(make("span", { class: "name" }, "Point at a token, or move over the text with the arrow keys, for its numbers."));
}
