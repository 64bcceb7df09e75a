// What a classifier says of a text: its labels as bars, beside those of the base model.
import { counted, h, percent } from "./dom.js";

const SHOWN = 6;
// More results than these are a line each.
const MANY = 8;

/** The results of `/v1/classify`; `base` says which model a name is of. */
export function resultsOf(results, base) {
  if (results.length <= MANY) {
    return h("div", { class: "cards" }, results.map((result) => resultCard(result, base(result.adapter))));
  }
  return h("div", { class: "card lines" }, results.map(line));
}

function line(result) {
  const summary = h("summary", {}, h("span", { class: "name" }, result.adapter),
    result.error ? h("span", { class: "failed" }, "failed") : [
      h("b", {}, result.labels.length ? result.labels.join(", ") : "none of its labels"),
      h("span", { class: "track", "aria-hidden": "true" },
        h("i", { class: "tuned", style: { "--share": result.probability } })),
      h("span", { class: "share" }, percent(result.probability))]);
  return h("details", {}, summary, result.error ? h("p", { class: "problem" }, result.error.message)
    : bars(result, result.untuned));
}

/** The card of one result of `/v1/classify`. */
export function resultCard(result, base) {
  const head = h("header", {}, h("h3", {}, result.adapter), base && h("small", {}, base));
  if (result.error) {
    return h("article", { class: "result" }, head,
      h("p", { class: "problem" }, result.error.message));
  }
  const said = result.labels.length === 1 || result.labels.length === 0;
  const answer = h("p", { class: "answer" },
    h("b", {}, said ? String(result.label) : result.labels.join(", ")),
    said && h("span", {}, percent(result.probability)));
  if (!result.labels.length) answer.replaceChildren(h("b", { class: "none" }, "none of its labels"));
  const { untuned } = result;
  const beside = untuned && h("p", { class: "beside" }, "The base model alone: ",
    h("b", {}, String(untuned.label)), ` ${percent(untuned.probability)}`);
  return h("article", { class: "result" }, head, answer, bars(result, untuned), beside);
}

/** A bar a label, the likeliest first; with `untuned`, a second one below it. */
function bars(result, untuned) {
  const before = new Map((untuned?.probabilities ?? []).map((each) => [each.label, each.probability]));
  const taken = new Set(result.labels);
  const rows = [...result.probabilities].sort((a, b) => b.probability - a.probability)
    .map(({ label, probability }) => row(label, probability, before.get(label), taken.has(label)));
  const list = (some) => h("ul", { class: "bars" }, some);
  if (rows.length <= SHOWN + 1) return list(rows);
  return h("div", {}, list(rows.slice(0, SHOWN)), h("details", { class: "more" },
    h("summary", {}, `${counted(rows.length - SHOWN, "more label")}`), list(rows.slice(SHOWN))));
}

function row(label, probability, before, taken) {
  const bar = (share, kind) => h("i", { class: kind, style: { "--share": share } });
  return h("li", { class: taken ? "taken" : null },
    h("span", { class: "label" }, String(label)),
    h("span", { class: "track", "aria-hidden": "true" }, bar(probability, "tuned"),
      before !== undefined && bar(before, "base")),
    h("span", { class: "share" }, h("b", {}, percent(probability)),
      before !== undefined && h("small", {}, h("span", { class: "unseen" }, ", base model "),
        percent(before))));
}
