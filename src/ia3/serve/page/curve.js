// The loss of a training as it falls.
import { svg } from "./dom.js";

const [HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [220, 44, 12, 12, 28];
const MEAN = 5;

/** Single steps faint, their running mean bold; `steps` is how many there are at most. */
export function curve(loss, steps, width) {
  const wide = Math.max(240, width);
  const most = Math.max(...loss, 0.001);
  const unit = 10 ** Math.floor(Math.log10(most));
  const step = [0.2, 0.5, 1, 2, 5].map((each) => each * unit).find((each) => most / each <= 5) ?? 5 * unit;
  const top = Math.ceil(most / step) * step;
  const x = (at) => LEFT + (wide - LEFT - RIGHT) * (steps > 1 ? at / (steps - 1) : 0);
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top);
  const line = (values, name) => svg("polyline", {
    class: name, points: values.map((value, at) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(" "),
  });
  const mean = loss.map((_, at) => {
    const part = loss.slice(Math.max(0, at - MEAN + 1), at + 1);
    return part.reduce((sum, value) => sum + value, 0) / part.length;
  });
  const marks = [];
  for (let value = 0; value <= top * 1.001; value += step) {
    marks.push(svg("line", { class: "grid", x1: LEFT, x2: wide - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, Number(value.toPrecision(3)).toString()));
  }
  const last = loss.length - 1;
  const head = svg("circle", { class: "head", cx: x(last), cy: y(mean[last]), r: 4 });
  return svg("svg", { class: "curve", viewBox: `0 0 ${wide} ${HEIGHT}`, role: "img", "aria-label": `Loss over ${loss.length} of ${steps} steps: ${loss[0].toFixed(2)} at first, ${mean[last].toFixed(2)} now` },
    marks, svg("text", { x: LEFT, y: HEIGHT - 8 }, "step 1"),
    svg("text", { x: wide - RIGHT, y: HEIGHT - 8, "text-anchor": "end" }, `step ${steps}`),
    line(loss, "single"), line(mean, "mean"), head);
}
