// Elements, numbers and texts. What a model wrote becomes text nodes alone, never markup.

/** Makes an element. Attributes that begin with "on" are listeners; null and false are left out. */
function make(tag, attributes = {}, ...children) {
  const element = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

// Characters that cannot be seen, or that turn the direction of the text around them.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff]|\p{Variation_Selector}|[\u{e0000}-\u{e007f}]/gu;
const NAMES_OF_UNSEEN = {
  0x00ad: "soft hyphen", 0x061c: "Arabic letter mark", 0x200b: "zero-width space", 0x200c: "zero-width non-joiner",
  0x200d: "zero-width joiner", 0x200e: "left-to-right mark", 0x200f: "right-to-left mark",
  0x2028: "line separator", 0x2029: "paragraph separator", 0x202a: "left-to-right embedding",
  0x202b: "right-to-left embedding", 0x202c: "pop directional formatting", 0x202d: "left-to-right override",
  0x202e: "right-to-left override", 0x2060: "word joiner", 0x2066: "left-to-right isolate",
  0x2067: "right-to-left isolate", 0x2068: "first strong isolate", 0x2069: "pop directional isolate",
  0xfeff: "byte order mark", 0x1b: "escape", 0x0d: "carriage return", 0x00: "null",
};

/** Text nodes, with what cannot be seen written out as its code point. */
function visible(text) {
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(UNSEEN)) {
    if (found.index > from) nodes.push(text.slice(from, found.index));
    const code = found[0].codePointAt(0);
    const name = `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    nodes.push(make("span", { class: "unseen", title: NAMES_OF_UNSEEN[code] ?? "cannot be seen" }, name));
    from = found.index + found[0].length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

/** A text on one line, cut to a length, its spaces joined. */
function brief(text, length = 90) {
  const line = text.slice(0, 4 * length).replace(/\s+/g, " ").trim();
  const cut = line.length > length ? line.slice(0, length).replace(/[\ud800-\udbff]$/, "") + "…" : line;
  return visible(text.length > 4 * length && line.length <= length ? cut + "…" : cut);
}

/** A number in few digits; a dash where there is none. */
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1e7) return compact(value).replace(/-/g, "−");
  if (Number.isInteger(value)) return value.toLocaleString("en").replace("-", "−");
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(2).replace(/-/g, "−");
  return (size >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : String(Number(value.toPrecision(digits)))).replace("-", "−");
}

/** A value between 0 and 1, or another fixed number of decimals. */
function fixed(value, decimals = 2) {
  return value === null || value === undefined ? "–" : value.toFixed(decimals).replace("-", "−");
}

/** Large and small numbers for axes: 1.2k, 3M, 4e15, 5e-6. */
function compact(value, digits = 3) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size >= 1e15 || (size && size < 1e-3)) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    return `${Number(mantissa)}e${Number(exponent)}`;
  }
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return `${Number((value / unit).toPrecision(digits))}${letter}`;
  }
  return String(Number(value.toPrecision(digits + 1)));
}

/** Names of the marks of an axis, with as many digits as tell them apart. */
function namesOfMarks(values) {
  for (let digits = 4; ; digits++) {
    const names = values.map((value) => compact(value, digits));
    if (digits === 8 || new Set(names).size === values.length) return names;
  }
}

function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

/** Says something to people who do not see the page. */
function announce(text) {
  document.getElementById("live").textContent = text;
}

/** The icon and word of a verdict. */
function verdict(right) {
  return make("span", { class: right ? "right" : "wrong" }, right ? "✓ right" : "✗ wrong");
}
