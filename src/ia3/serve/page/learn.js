// A new task, learned from labelled texts.
import { events, get, known, lookUp, post, whenKnown } from "./api.js";
import { resultCard } from "./bars.js";
import { bringIntoView, complain, counted, dropzone, fill, h, labelled, percent, problem } from "./dom.js";
import { guessColumns, readCsv } from "./csv.js";
import { curve } from "./curve.js";

const RUNNING = "ia3-learning";
const PREVIEW = 4;
const LABELS = 12;
const TRIES = 5;
const ended = (fit) => ["done", "failed", "cancelled"].includes(fit.state);
const TITLES = {
  training: "Learning", measuring: "Learned, now measuring", done: "Learned", failed: "Not learned",
  cancelled: "Cancelled", stopped: "Learned, but not measured",
};

export function learnView(place) {
  const csv = h("textarea", {
    rows: 7, spellcheck: "false", required: true, placeholder: "text,label\nI was charged twice.,billing\nWhere is my parcel?,delivery", oninput: read,
  });
  const file = h("input", { type: "file", accept: ".csv,.tsv,.txt,text/csv", hidden: true, onchange: () => take({ files: [...file.files] }) });
  const text = h("select", { onchange: preview });
  const label = h("select", { onchange: preview });
  const seen = h("div", { class: "preview" });
  const name = h("input", { required: true, autocomplete: "off", spellcheck: "false", maxlength: 100 });
  const base = h("select", {});
  const basis = labelled("Base model", base, "Automatic: whichever promises more on these texts");
  const begin = h("button", { class: "primary" }, "Learn");
  const failed = h("div", {});
  const columns = h("div", { class: "row fields", hidden: true }, labelled("Texts are in", text), labelled("Labels are in", label));
  const form = h("form", { class: "card", onsubmit: learn }, h("h2", {}, "Labelled texts"),
    labelled("Paste a table, or drop a CSV file", csv, "One line of column names, then a text and its label in each row. 8 to 50 texts of each label are a good start."),
    h("div", { class: "row" }, h("button", { type: "button", onclick: () => file.click() }, "Choose a file"),
      h("button", { type: "button", class: "quiet", onclick: example }, "Use 32 support tickets"), file),
    columns, seen, h("div", { class: "row fields" }, labelled("Name", name), basis),
    h("div", { class: "row end" }, begin), failed);
  const progress = h("div", { class: "learning" });
  const trial = h("div", {});
  const right = h("div", { class: "stack" }, progress, trial);
  fill(place, h("div", { class: "columns" }, form, right));
  dropzone(form, take);
  let table = [];
  idle();

  function idle() {
    fill(progress, h("div", { class: "empty" }, "The training is shown here.",
      h("small", {}, "It takes a minute or two, in a process of its own: the server goes on answering.")));
  }

  async function take({ files }) {
    if (!files.length) return;
    csv.value = await files[0].text();
    if (!name.value) name.value = slug(files[0].name.replace(/\.\w+$/, ""));
    file.value = "";
    read();
  }

  async function example() {
    try {
      const response = await fetch("/page/support-tickets.csv");
      if (!response.ok) throw new Error("The server has no examples.");
      csv.value = await response.text();
      name.value ||= "support-tickets";
      read();
    } catch (error) {
      complain(failed, error);
    }
  }

  function read() {
    fill(failed);
    table = readCsv(csv.value);
    columns.hidden = table.length < 2 || table[0].length < 2;
    if (columns.hidden) {
      fill(seen);
      return;
    }
    const [header] = table;
    const guess = guessColumns(table);
    fill(text, header.map((each, at) => h("option", { value: at }, each)));
    fill(label, header.map((each, at) => h("option", { value: at }, each)));
    [text.value, label.value] = [guess.text, guess.label];
    preview();
  }

  function preview() {
    const rows = table.slice(1);
    const counts = new Map();
    for (const row of rows) counts.set(row[label.value], (counts.get(row[label.value]) ?? 0) + 1);
    const sorted = [...counts].sort((a, b) => b[1] - a[1]);
    fill(seen,
      h("p", {}, h("b", {}, counted(rows.length, "text")), " of ", h("b", {}, counted(counts.size, "label"))),
      h("div", { class: "chips" }, sorted.slice(0, LABELS).map(([each, count]) => h("span", {}, each || "(empty)", " ", h("b", {}, count))),
        sorted.length > LABELS && h("span", { class: "quiet" }, `${sorted.length - LABELS} more`)),
      h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Text"), h("th", { scope: "col" }, "Label"))),
        h("tbody", {}, rows.slice(0, PREVIEW).map((row) => h("tr", {}, h("td", {}, row[text.value]), h("td", {}, row[label.value]))))));
  }

  async function learn(event) {
    event.preventDefault();
    fill(failed);
    const [header] = table;
    const body = { name: name.value, csv: csv.value, base: base.value || null };
    if (header?.length > 1) [body.text_column, body.label_column] = [header[text.value], header[label.value]];
    begin.disabled = true;
    try {
      const fit = await post("/v1/learn", body);
      sessionStorage.setItem(RUNNING, fit.id);
      await follow(fit);
    } catch (error) {
      complain(failed, error);
    } finally {
      begin.disabled = false;
    }
  }

  async function follow(fit) {
    begin.disabled = true;
    fill(trial);
    const show = shownFit(fit);
    show(fit);
    bringIntoView(progress);
    let served = false;
    let now = fit;
    const take = async (news) => {
      now = news;
      show(now);
      if (now.served && !served) {
        await lookUp();  // which fails where the connection has just broken, and is tried again
        served = true;
        fill(trial, tryIt(now.name));
      }
    };
    const isShown = () => ended(now) && served === Boolean(now.served);
    try {
      // A connection may break where a training does not.
      for (let failures = 0; !isShown() && failures < TRIES; failures += 1) {
        if (failures) await new Promise((done) => setTimeout(done, 1000));
        try {
          for await (const news of events(`/v1/learn/${fit.id}/events`)) {
            failures = 0;
            await take(news);
          }
        } catch (error) {
          if (error.status || failures === TRIES - 1) throw error;
        }
      }
    } finally {
      begin.disabled = false;
    }
  }

  /** A card of a fit; what it returns brings it up to date, and leaves alone what is the same. */
  function shownFit({ id, remarks, name: called }) {
    const title = h("span", {});
    const spoken = h("p", { class: "unseen", role: "status" });
    const stop = h("button", { type: "button", class: "quiet", onclick: () => cancel(id) }, "Cancel");
    const bar = h("progress", { "aria-label": "Progress" });
    const told = h("small", {});
    const doing = h("div", { class: "doing" }, bar, told);
    const [wrong, result, drawing] = [h("div", {}), h("div", {}), h("div", {})];
    fill(progress, h("div", { class: "card" },
      h("div", { class: "row head" }, h("h2", {}, title, " ", h("span", { class: "named" }, called)), stop), spoken,
      doing, wrong, result, drawing,
      remarks.length > 0 && h("details", { class: "remarks" }, h("summary", {}, counted(remarks.length, "remark"), " about the texts"),
        h("ul", {}, remarks.map((remark) => h("li", {}, remark))))));
    let last = {};
    return (fit) => {
      const total = fit.of || (fit.state === "training" && fit.steps);
      const state = TITLES[fit.state === "cancelled" && fit.served ? "stopped" : fit.state];
      if (title.textContent !== state) {
        fill(title, state);
        fill(spoken, `${called}: ${state}`);
      }
      stop.hidden = doing.hidden = ended(fit);
      fill(stop, fit.served ? "Stop measuring" : "Cancel");
      if (total) [bar.max, bar.value] = [total, fit.of ? fit.done : fit.step];
      else bar.removeAttribute("value");
      fill(told, fit.doing === "training" ? `step ${fit.step} of ${fit.steps}` : fit.doing, ` · ${fit.seconds.toFixed(0)} s`);
      if (fit.loss.length !== last.loss?.length && fit.loss.length) {
        fill(drawing, h("figure", {}, curve(fit.loss, fit.steps, drawing.clientWidth),
          h("figcaption", {}, "The loss: how wrong the model still is on the texts it learns from. Faint: single steps; bold: their running mean.")));
      }
      if (fit.error !== last.error && fit.error) fill(wrong, problem(fit.error));
      if (fit.state !== last.state || Boolean(fit.measured) !== Boolean(last.measured)) fill(result, fit.served && outcome(fit));
      last = fit;
    };
  }

  async function cancel(id) {
    try {
      await post(`/v1/learn/${id}`, undefined, "DELETE");
    } catch (error) {
      complain(failed, error);
    }
  }

  function outcome(fit) {
    const { measured } = fit;
    if (!measured) {
      return h("p", { class: "quiet" }, fit.state === "measuring"
        ? "It is served already: try it below. How good it is comes next, by trainings that leave some texts out."
        : "It is served, but was not measured.");
    }
    const { frozen } = measured;
    return h("div", { class: "outcome" },
      h("p", { class: "answer" }, h("b", {}, percent(measured.accuracy)), h("span", {}, `right, ± ${(100 * measured.error).toFixed(0)}`)),
      h("p", { class: "quiet" }, `Of ${counted(measured.texts, "text")} that its trainings had not seen. `,
        frozen && `Without the adapter (${frozen.what}): ${percent(frozen.accuracy)}.`),
      h("ul", { class: "bars" }, measured.by_class.map((each) => h("li", { class: "taken" },
        h("span", { class: "label" }, String(each.label)),
        h("span", { class: "track", "aria-hidden": "true" }, h("i", { class: "tuned", style: { "--share": each.recall ?? 0 } })),
        h("span", { class: "share" }, h("b", {}, each.recall === null ? "–" : percent(each.recall)))))),
      measured.mistakes.length > 0 && h("details", { class: "more" }, h("summary", {}, counted(measured.mistakes.length, "text"), " it got wrong"),
        h("table", {}, h("thead", {}, h("tr", {}, ["Text", "Is", "Got"].map((each) => h("th", { scope: "col" }, each)))),
          h("tbody", {}, measured.mistakes.slice(0, 50).map((each) => h("tr", {}, h("td", {}, each.text),
            h("td", { class: "right" }, String(each.label)), h("td", { class: "wrong" }, String(each.predicted))))))));
  }

  function tryIt(adapter) {
    const asked = h("textarea", { rows: 2, required: true });
    const found = h("div", { class: "cards", "aria-live": "polite" });
    const submit = async (event) => {
      event.preventDefault();
      try {
        const answer = await post("/v1/classify", { texts: [asked.value], adapter });
        fill(found, answer.results.map((result) => resultCard(result)));
      } catch (error) {
        fill(found, problem(error));
      }
    };
    const asking = h("form", {
      class: "card", onsubmit: submit, onkeydown: (event) => {
        if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); asking.requestSubmit(); }
      },
    }, labelled(`Try ${adapter}`, asked), h("div", { class: "row end" },
      h("a", { href: `#classify/${encodeURIComponent(adapter)}` }, "Beside other adapters"), h("button", { class: "primary" }, "Classify")), found);
    return asking;
  }

  whenKnown(() => {
    const before = base.value;
    fill(base, known.models.length > 1 && h("option", { value: "" }, "Automatic"),
      known.models.map((model) => h("option", { value: model.id }, model.id)));
    if (before) base.value = before;
    basis.hidden = known.models.length < 2;
  });
  // A training goes on while its page is loaded anew.
  get("/v1/learn").then(({ fits }) => {
    const last = sessionStorage.getItem(RUNNING);
    const fit = fits.find((each) => each.id === last) ?? fits.find((each) => !ended(each));
    return fit && follow(fit);
  }).catch((error) => complain(failed, error));
}

function slug(words) {
  return words.toLowerCase().replace(/[^a-z0-9._-]+/g, "-").replace(/^[-.]+|-+$/g, "");
}
