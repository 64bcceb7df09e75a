// A chat with a language model: with an adapter, without, or both side by side.
import { chat, known, whenKnown } from "./api.js";
import { fill, h, labelled, problem } from "./dom.js";

export function chatView(place) {
  const model = h("select", { onchange: restart });
  const compare = h("input", { type: "checkbox", onchange: restart });
  const beside = h("label", { class: "check" }, compare, h("span", {}, "Beside the base model"));
  const temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0 });
  const most = h("input", { type: "number", min: 1, max: 2048, step: 1, value: 128 });
  const panes = h("div", { class: "panes" });
  const input = h("textarea", {
    rows: 2, "aria-label": "Message", placeholder: "Write a message", required: true, onkeydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!send.hidden) form.requestSubmit();
    },
  });
  const send = h("button", { class: "primary" }, "Send");
  const stop = h("button", { type: "button", hidden: true, onclick: () => running?.abort() }, "Stop");
  const form = h("form", { class: "card composer", onsubmit: ask }, input, send, stop);
  const settings = h("div", { class: "card settings" }, labelled("Model", model), beside,
    labelled("Temperature", temperature, "0 takes the likeliest token"), labelled("Most tokens", most),
    h("button", { type: "button", class: "quiet", onclick: restart }, "New chat"));
  const chatting = h("div", { class: "columns" }, settings, h("div", { class: "talk" }, panes, form));
  const none = h("div", { class: "card empty", hidden: true }, "No language model is served.",
    h("small", {}, "A sentence encoder classifies, but writes nothing. Start the server with ",
      h("code", {}, "--model smollm2-135m-instruct"), " too."));
  fill(place, chatting, none);
  let running = null;
  let talks = [];
  let wanted = null;

  function restart() {
    running?.abort();
    const adapter = known.adapters.find((each) => each.name === model.value);
    beside.hidden = !adapter;
    const names = adapter && compare.checked ? [adapter.base, adapter.name] : [model.value];
    talks = names.filter(Boolean).map((name) => {
      const log = h("div", { class: "log", role: "log", "aria-label": `Chat with ${name}`, tabindex: 0 });
      const speed = h("small", {});
      const kind = name === adapter?.name ? "adapter" : "base model";
      const head = h("header", {}, h("h3", {}, name), h("small", { class: "kind" }, kind), speed);
      return { name, log, speed, messages: [], element: h("article", { class: "pane" }, head, log) };
    });
    fill(panes, talks.map((talk) => talk.element));
    for (const talk of talks) fill(talk.log, h("p", { class: "quiet" }, "Say something."));
  }

  async function ask(event) {
    event.preventDefault();
    const text = input.value.trim();
    if (!text || running) return;
    input.value = "";
    running = new AbortController();
    [send.hidden, stop.hidden] = [true, false];
    await Promise.all(talks.map((talk) => answer(talk, text, running.signal)));
    running = null;
    [send.hidden, stop.hidden] = [false, true];
    input.focus();
  }

  async function answer(talk, text, signal) {
    const { log, messages } = talk;
    if (!messages.length) fill(log);
    messages.push({ role: "user", content: text });
    const said = h("p", { class: "said waiting" });
    log.append(h("p", { class: "asked" }, text), said);
    log.scrollTop = log.scrollHeight;
    const body = {
      model: talk.name, messages, stream: true, stream_options: { include_usage: true },
      temperature: temperature.valueAsNumber || 0, max_tokens: most.valueAsNumber || 128,
    };
    let whole = "";
    let first = 0;
    let pieces = 0;
    try {
      for await (const event of chat(body, signal)) {
        if (event.error) throw new Error(event.error.message);
        const piece = event.choices[0]?.delta?.content ?? "";
        if (piece) {
          first ||= performance.now();
          pieces += 1;
          const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
          whole += piece;
          said.classList.remove("waiting");
          said.textContent = whole;
          if (atEnd) log.scrollTop = log.scrollHeight;
        }
        const tokens = event.usage?.completion_tokens;
        if (tokens || pieces > 1) {
          const seconds = (performance.now() - first) / 1000;
          fill(talk.speed, `${tokens ?? pieces} tokens`, first && seconds > 0.05
            ? ` · ${((tokens ?? pieces) / seconds).toFixed(0)} a second` : "");
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") said.before(problem(error));
    }
    said.classList.remove("waiting");
    if (whole) messages.push({ role: "assistant", content: whole });
    else messages.pop();
    if (!whole) said.remove();
  }

  whenKnown(() => {
    const able = known.adapters.filter((adapter) => adapter.engine === "language-model");
    const bases = known.models.filter((each) => each.kind === "language-model").map((each) => each.id);
    chatting.hidden = !bases.length;
    none.hidden = Boolean(bases.length) || !known.models.length;
    const before = model.value;
    const option = (name) => h("option", { value: name }, name);
    fill(model, h("optgroup", { label: "Base model" }, bases.map(option)),
      able.length > 0 && h("optgroup", { label: "Adapters" }, able.map((each) => option(each.name))));
    if ([...model.options].some((each) => each.value === before)) model.value = before;
    if (model.value !== before || !talks.length) restart();
    takeWanted();
  });

  /** Begin with what the address names, once it is known. */
  function takeWanted() {
    if (![...model.options].some((each) => each.value === wanted)) return;
    [model.value, wanted] = [wanted, null];
    restart();
  }

  return (name) => {
    compare.checked = true;
    wanted = name;
    takeWanted();
  };
}
