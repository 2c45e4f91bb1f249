"use strict";
// Model output only becomes text nodes; nothing here parses it as HTML.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 20;
  const byId = (id) => document.getElementById(id);

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function marked(parts) {
    const box = element("div", "rationale");
    for (const [text, marks] of parts) {
      if (marks) {
        const mark = element("mark", marks, text);
        mark.title = marks.split(" ").map((m) => m.replace("_", " ")).join(", ");
        box.append(mark);
      } else box.append(text);
    }
    return box;
  }

  function facts(words) {
    return element("div", "facts", words.filter(Boolean).join(" · "));
  }

  function sample(entry, before) {
    const right = entry.reward === 1;
    const item = element("li", "item " + (right ? "right" : "wrong"));
    const question = data.questions[entry.q];
    if (!before || before.q !== entry.q) item.append(element("p", "question", question.text));
    item.append(marked(entry.parts));
    const line = facts([
      data.runs.length > 1 && data.runs[entry.run],
      "step " + entry.step,
      entry.try && "try " + entry.try,
      entry.tokens + " tokens" + (entry.cut ? ", cut off" : ""),
      entry.answer === null ? "no answer found" : "answer " + entry.answer + " (" + entry.rule + ")",
      "gold " + question.gold,
      entry.weight !== null && "weight " + entry.weight,
      entry.behaviors.map((b) => b.replace("_", " ")).join(", "),
      "problem " + question.id,
    ]);
    const verdict = entry.reward === null ? "not graded" : "reward " + entry.reward + " (" + entry.reason + ")";
    line.prepend(element("span", "verdict", verdict), " · ");
    item.append(line);
    return item;
  }

  function answer(entry) {
    const item = element("li", "item " + (entry.sides[1].right ? "right" : "wrong"));
    const question = data.questions[entry.q];
    item.append(element("p", "question", question.text));
    const sides = element("div", "sides");
    entry.sides.forEach((side, i) => {
      const column = element("div");
      const verdict = side.right ? "right" : "wrong";
      column.append(element("div", "verdict " + verdict, (i ? "tuned" : "base") + ": " + verdict), marked(side.parts));
      column.append(facts([side.tokens + " tokens", side.rule || "no answer found"]));
      sides.append(column);
    });
    item.append(sides, facts([data.runs.length > 1 && data.runs[entry.run], "gold " + question.gold]));
    return item;
  }

  // A filtered list: `accept` decides whether an entry matches the values of the controls.
  function browser(name, entries, draw, accept) {
    const list = byId(name + "-list");
    if (!list) return;
    const controls = [...byId(name + "-filters").querySelectorAll("select, input")];
    const more = byId(name + "-more");
    const count = byId(name + "-count");
    let found = [];
    let shown = 0;
    function show() {
      const end = Math.min(found.length, shown + PAGE);
      // Show a problem's text once, above its first answer.
      for (let i = shown; i < end; i++) list.append(draw(found[i], i > shown ? found[i - 1] : null));
      shown = end;
      count.textContent = found.length + " of " + entries.length + " match, " + shown + " shown";
      more.hidden = shown === found.length;
    }
    function filter() {
      const wanted = Object.fromEntries(controls.map((c) => [c.name, c.value]));
      found = entries.filter((entry) => accept(entry, wanted));
      list.replaceChildren();
      shown = 0;
      show();
    }
    controls.forEach((c) => c.addEventListener(c.tagName === "INPUT" ? "input" : "change", filter));
    more.addEventListener("click", show);
    filter();
  }

  function fill(id, values, text) {
    const select = byId(id);
    if (!select) return;
    for (const value of values) {
      const option = element("option", "", text ? text(value) : String(value));
      option.value = String(value);
      select.append(option);
    }
  }

  function holds(entry, words) {
    if (!words) return true;
    const question = data.questions[entry.q];
    return (question.text + " " + question.id).toLowerCase().includes(words.toLowerCase());
  }

  const distinct = (values) => [...new Set(values)];
  const runs = data.runs.map((_, i) => i);
  fill("samples-run", runs, (i) => data.runs[i]);
  fill("answers-run", runs, (i) => data.runs[i]);
  fill("samples-step", distinct(data.samples.map((e) => e.step)).sort((a, b) => a - b));

  browser("samples", data.samples, sample, (entry, want) => {
    if (want.run && String(entry.run) !== want.run) return false;
    if (want.step && String(entry.step) !== want.step) return false;
    if (want.reward === "1" && entry.reward !== 1) return false;
    if (want.reward === "0" && entry.reward !== 0) return false;
    if (want.reward === "part" && !(entry.reward > 0 && entry.reward < 1)) return false;
    if (want.reward === "cut" && !entry.cut) return false;
    if (want.behavior && !entry.behaviors.includes(want.behavior)) return false;
    return holds(entry, want.problem);
  });

  browser("answers", data.answers, answer, (entry, want) => {
    const [base, tuned] = entry.sides.map((side) => side.right);
    if (want.run && String(entry.run) !== want.run) return false;
    if (want.outcome && want.outcome !== (base ? "r" : "w") + (tuned ? "r" : "w")) return false;
    return holds(entry, want.problem);
  });

  const root = document.documentElement;
  byId("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });
})();
