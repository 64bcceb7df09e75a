// One text, asked of any number of adapters.
import { known, post, whenKnown } from "./api.js";
import { resultsOf } from "./bars.js";
import { bringIntoView, counted, fill, h, labelled, problem } from "./dom.js";
import { picker } from "./picker.js";

export function classifyView(place) {
  let fields = [];
  let wanted = null;
  const inputs = new Map();
  const texts = h("div", { class: "texts" });
  const compare = h("input", { type: "checkbox", checked: true });
  const beside = h("label", { class: "check" }, compare,
    h("span", {}, "Beside the base model", h("small", {}, "What a language model says without the adapter")));
  const button = h("button", { class: "primary" }, "Classify");
  const results = h("div", { class: "results", "aria-live": "polite" });
  const adapters = picker(picked);
  const form = h("form", { class: "card asking", onsubmit: ask, onkeydown: shortcut },
    texts, h("div", { class: "field" }, h("span", { class: "name" }, "Adapters"), adapters.element),
    beside, h("div", { class: "row end" }, h("small", {}, h("kbd", {}, "Ctrl"), " ", h("kbd", {}, "Enter")), button));
  fill(place, h("div", { class: "columns" }, form, results));
  drawFields(["text"]);

  function shortcut(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  }

  function drawFields(names) {
    if (names.join("\0") === fields.join("\0")) return;
    fields = names;
    fill(texts, names.map((name) => {
      if (!inputs.has(name)) {
        inputs.set(name, h("textarea", { rows: names.length > 1 ? 2 : 4, required: true }));
      }
      return labelled(name === "text" ? "Text" : name, inputs.get(name));
    }));
    if (names.includes("text")) inputs.get("text").placeholder = "Write or paste what is to be classified";
  }

  function picked(names) {
    const chosen = known.adapters.filter((adapter) => names.includes(adapter.name));
    const read = new Set(chosen.flatMap((adapter) => adapter.fields ?? []));
    // An adapter of one field takes a text, whatever the field is called.
    const several = chosen.some((adapter) => (adapter.fields ?? []).length > 1);
    drawFields(several ? [...read] : ["text"]);
    button.disabled = !names.length;
    beside.hidden = !chosen.some((adapter) => adapter.engine === "language-model");
  }

  async function ask(event) {
    event.preventDefault();
    const names = adapters.picked;
    if (!names.length) return;
    button.disabled = true;
    results.classList.add("busy");
    const of = new Map(known.adapters.map((adapter) => [adapter.name, adapter]));
    const text = fields.length === 1 ? inputs.get(fields[0]).value
      : Object.fromEntries(fields.map((name) => [name, inputs.get(name).value]));
    const body = { text, adapters: names };
    if (compare.checked && !beside.hidden) body.untuned = true;
    const began = performance.now();
    try {
      const answer = await post("/v1/classify", body);
      const took = performance.now() - began;
      const untuned = answer.results.some((result) => result.untuned);
      fill(results,
        h("div", { class: "told" }, h("span", {}, counted(answer.results.length, "adapter"), " in ",
          took < 1000 ? `${took.toFixed(0)} ms` : `${(took / 1000).toFixed(1)} s`),
        untuned && h("span", { class: "legend" }, h("i", { class: "tuned" }), "with the adapter ",
          h("i", { class: "base" }), "base model alone")),
        resultsOf(answer.results, (name) => of.get(name)?.base));
    } catch (error) {
      fill(results, problem(error));
    } finally {
      results.classList.remove("busy");
      button.disabled = !adapters.picked.length;
      bringIntoView(results);
    }
  }

  function empty() {
    const able = known.adapters.some((adapter) => adapter.kind === "classifier");
    fill(results, h("div", { class: "empty" }, able
      ? ["Type a text and pick adapters.", h("small", {}, "Each says which of its labels the text has, and how sure it is.")]
      : ["No classifier is served yet.", h("small", {}, h("a", { href: "#learn" }, "Learn a task"), " from a few labelled texts, or ",
        h("a", { href: "#adapters" }, "drop an adapter's files"), ".")]));
  }

  whenKnown(() => {
    const able = known.adapters.filter((adapter) => adapter.kind === "classifier");
    const before = adapters.picked;
    adapters.show(able);
    if (!before.length && able.length) adapters.pick([able[0].name]);
    takeWanted();
    if (!results.querySelector(".told")) empty();
  });

  /** Begin with what the address names, once it is known. */
  function takeWanted() {
    if (!known.adapters.some((adapter) => adapter.name === wanted)) return;
    adapters.pick([wanted]);
    wanted = null;
  }

  return (name) => {
    wanted = name;
    takeWanted();
  };
}
