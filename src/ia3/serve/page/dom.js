// Elements, made from values: text stays text, whatever is in it.

/** An element with properties and children; `null` and `false` children are left out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  set(element, properties);
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for a drawing. */
export function svg(tag, properties = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  set(element, properties);
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

function set(element, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else if (name === "style") for (const key in value) element.style.setProperty(key, value[key]);
    else element.setAttribute(name, value === true ? "" : value);
  }
}

/** Put these in the place of what an element holds. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

let last = 0;

/** A control under its name. */
export function labelled(name, control, hint) {
  control.id ||= `control-${++last}`;
  const told = hint && h("small", { id: `${control.id}-hint` }, hint);
  if (told) control.setAttribute("aria-describedby", told.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, name), control, told);
}

/** What went wrong, in a box that is read out. */
export function problem(error) {
  return h("div", { class: "problem", role: "alert" }, h("b", {}, "That did not work. "),
    error instanceof Error ? error.message : String(error));
}

/** Show what went wrong in this place, and move it into view. */
export function complain(place, error) {
  fill(place, problem(error)).scrollIntoView({ block: "nearest" });
}

export const percent = (share) => `${(100 * share).toFixed(share >= 0.9995 || share < 0.0005 ? 0 : 1)}%`;

export function counted(count, one, several = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : several}`;
}

export function size(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  return bytes < 2 ** 20 ? `${Math.round(bytes / 1024)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

/** What was asked for may be far from what asked. */
export function bringIntoView(element) {
  const { top } = element.getBoundingClientRect();
  if (top < 0 || top > 0.7 * innerHeight) element.scrollIntoView();
}

/** Let files be dropped on an element. */
export function dropzone(element, take) {
  const over = (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    element.classList.add("over");
  };
  element.addEventListener("dragenter", over);
  element.addEventListener("dragover", over);
  element.addEventListener("dragleave", (event) => {
    if (!element.contains(event.relatedTarget)) element.classList.remove("over");
  });
  element.addEventListener("drop", (event) => {
    element.classList.remove("over");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    // Entries are gone once the handler returns.
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.());
    const files = [...event.dataTransfer.files];
    filesOf(entries, files).then(take);
  });
}

/** Dropped files, with those of a dropped folder; `folder` is its name. */
async function filesOf(entries, files) {
  const folder = entries.find((entry) => entry?.isDirectory);
  if (!folder) return { files, folder: "" };
  const inside = await new Promise((done, failed) => folder.createReader().readEntries(done, failed));
  const opened = inside.filter((entry) => entry.isFile)
    .map((entry) => new Promise((done, failed) => entry.file(done, failed)));
  return { files: await Promise.all(opened), folder: folder.name };
}
