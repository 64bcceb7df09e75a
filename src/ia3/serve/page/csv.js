// A pasted table, read as the server reads it: for a look at it before it is sent.

/** The rows of a text in CSV, the header first; separated by what the first line has most of. */
export function readCsv(text) {
  const source = text.replace(/^\uFEFF/, "");
  const header = source.replace(/^[\r\n]+/, "").split("\n", 1)[0];
  const count = (mark) => header.split(mark).length;
  const mark = [",", ";", "\t"].reduce((best, each) => (count(each) > count(best) ? each : best));
  const rows = [];
  let row = [];
  let value = "";
  let quoted = false;
  const end = () => {
    row.push(value);
    if (row.length > 1 || value) rows.push(row);
    [row, value] = [[], ""];
  };
  for (let at = 0; at < source.length; at += 1) {
    const character = source[at];
    if (quoted) {
      if (character !== '"') value += character;
      else if (source[at + 1] === '"') { value += '"'; at += 1; } else quoted = false;
    } else if (character === '"' && !value) quoted = true;
    else if (character === mark) { row.push(value); value = ""; }
    else if (character === "\n") end();
    else if (character === "\r") { if (source[at + 1] !== "\n") end(); }
    else value += character;
  }
  if (value || row.length) end();
  return rows;
}

/** Which columns are the text and the label, by their names, else by what they hold. */
export function guessColumns([header, ...rows]) {
  const different = header.map((_, at) => new Set(rows.map((row) => row[at])).size);
  const length = header.map((_, at) => rows.reduce((sum, row) => sum + (row[at] ?? "").length, 0));
  const named = (names) => header.findIndex((name) => names.includes(name.trim().toLowerCase()));
  let label = named(["label", "labels", "class", "category", "target", "intent"]);
  let text = named(["text", "message", "sentence", "content", "body"]);
  const order = header.map((_, at) => at);
  if (text < 0) text = order.filter((at) => at !== label).sort((a, b) => length[b] - length[a])[0] ?? 0;
  if (label < 0) {
    const rest = order.filter((at) => at !== text);
    label = rest.filter((at) => different[at] > 1).sort((a, b) => different[a] - different[b])[0] ?? rest[0] ?? 0;
  }
  return { text, label };
}
