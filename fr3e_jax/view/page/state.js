// What is looked at: a few words in the address, so that a link leads back to the same view.

const DEFAULTS = {
  view: "run", x: "step", hidden: "",
  run: "0", step: "", query: "", round: "", trajectory: "", state: "", colour: "entropy", open: "", compare: "", token: "",
  text: "", where: "anywhere", from: "", to: "", source: "", least: "", most: "", kind: "", right: "", split: "",
};
const OWN_QUESTION = ["trajectory", "state", "open", "compare", "token"]; // what another question begins without
let place = readPlace();
let drawPage = () => {};

function readPlace() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) if (given.has(name)) found[name] = given.get(name);
  return found;
}

/** The address of the present place with changes. */
function linkTo(changes) {
  const next = withChanges(changes);
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(next)) if (value !== DEFAULTS[name]) words.set(name, value);
  return `#${words}`;
}

function withChanges(changes) {
  const texts = Object.fromEntries(Object.entries(changes).map(([name, value]) => [name, String(value ?? "")]));
  const elsewhere = ["run", "step", "query", "round"].some((name) => name in texts && texts[name] !== place[name]);
  const dropped = elsewhere ? Object.fromEntries(OWN_QUESTION.map((name) => [name, ""])) : {};
  return { ...place, ...dropped, ...texts };
}

/** Goes to a place; `silently` leaves no entry in the browser's history. */
function go(changes, silently = false) {
  const link = linkTo(changes);
  place = withChanges(changes);
  if (link !== location.hash) history[silently ? "replaceState" : "pushState"](null, "", link);
  drawPage();
}

/** Keeps a small change in the address, without drawing again. */
function remember(changes) {
  const link = linkTo(changes);
  place = withChanges(changes);
  history.replaceState(null, "", link);
}

addEventListener("hashchange", () => {
  place = readPlace();
  drawPage();
});

/** Writes what was chosen by default into the address, so that a link means the same later. */
function keep(changes) {
  for (const [name, value] of Object.entries(changes)) place[name] = String(value);
  history.replaceState(null, "", linkTo({}));
}

/** Replaces the children of an element where `signature` has changed; what had the focus gets it again. */
function redraw(element, signature, build) {
  if (element.signature === signature) return false;
  element.signature = signature;
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  const scrolled = element.scrollTop;
  element.replaceChildren(...[build()].flat().filter(Boolean));
  element.scrollTop = scrolled;
  if (focused) element.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  return true;
}
