"use strict";
(() => {
  const all = (query) => [...document.querySelectorAll(query)];
  const buttons = all("button[data-word]");
  const parts = all("[data-word]:not(button)");
  const block = document.getElementById("data");
  const data = block ? JSON.parse(block.textContent) : null;
  const picture = document.getElementById("picture");
  const canvases = all("canvas[data-map]");
  const asked = /^#word-([0-9]+)$/.exec(location.hash);
  const first = buttons.findIndex((one) => one.getAttribute("aria-pressed") === "true");
  let kept = asked && Number(asked[1]) < buttons.length ? Number(asked[1]) : first;
  let word = kept;
  let unit = -1;

  const number = (value) => {
    const text = Math.abs(value) >= 1e-4 ? Number(value.toPrecision(3)).toString() : value.toExponential(1);
    return value === 0 ? "0" : text.replaceAll("-", "−");
  };
  const peakOf = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value || 0)), 0);
  const color = (value, peak) => {
    const strength = peak > 0 ? Math.min(1, Math.abs(value) / peak) : 0;
    return `rgba(${value < 0 ? "33, 86, 190" : "190, 30, 30"}, ${0.88 * strength})`;
  };

  const draw = (canvas) => {
    const name = canvas.dataset.map;
    const values = data.maps[name][word].map((value, n) => value / (data.units[n][2] * data.units[n][3]));
    const peak = peakOf(values);
    canvas.width = 640;
    canvas.height = Math.round(640 * picture.naturalHeight / picture.naturalWidth);
    const pen = canvas.getContext("2d");
    const [down, across] = [canvas.height / data.grid[0], canvas.width / data.grid[1]];
    if (name !== "exact") pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    pen.fillStyle = "rgba(255, 255, 255, 0.35)";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    data.units.forEach(([row, column, rows, columns], n) => {
      const place = [column * across, row * down, columns * across, rows * down];
      pen.fillStyle = color(values[n], peak);
      pen.fillRect(...place);
      if (n === unit) {
        pen.lineWidth = 5;
        pen.strokeStyle = "#fff";
        pen.strokeRect(...place);
        pen.lineWidth = 2.5;
        pen.strokeStyle = "#111";
        pen.strokeRect(...place);
      }
    });
    if (data.region) {
      const [left, top, width, height] = data.region;
      pen.lineWidth = 3;
      pen.strokeStyle = "#0a7d32";
      pen.strokeRect(left * canvas.width, top * canvas.height, width * canvas.width, height * canvas.height);
    }
    if (name === "exact") {
      document.getElementById("high").textContent = number(peak);
      document.getElementById("low").textContent = number(-peak);
    } else {
      document.querySelector(`[data-peak="${name}"]`).textContent = number(peak);
    }
  };

  const show = () => {
    buttons.forEach((one, n) => one.setAttribute("aria-pressed", String(n === word)));
    parts.forEach((part) => { part.hidden = Number(part.dataset.word) !== word; });
    if (data) canvases.forEach(draw);
  };

  const tell = () => {
    const values = unit < 0 ? [] : data.maps.exact.map((map) => map[unit]);
    const peak = peakOf(values);
    buttons.forEach((one, n) => {
      one.style.backgroundColor = unit < 0 ? "" : color(values[n], 2 * peak);
    });
    const best = values.map((value, n) => [value, n]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 3);
    const change = (value) => `${number(data.gains ? value : -value)} nats`;
    const [row, column, rows, columns] = data.units[unit] || [];
    const place = `Row ${row}, column ${column}` + (rows * columns > 1 ? ` (${rows} × ${columns} cells)` : "");
    document.getElementById("cell").textContent = unit < 0 ? "" :
      `${place}: ${best.map(([value, n]) => `“${data.words[n]}” ${change(value)}`).join(", ")}`;
    canvases.forEach(draw);
  };

  const at = (row, column) => data.units.findIndex(
    ([r, c, rows, columns]) => r <= row && row < r + rows && c <= column && column < c + columns);

  const point = (found) => {
    if (found === unit) return;
    unit = found;
    tell();
  };

  buttons.forEach((one, n) => {
    const look = () => { word = n; show(); };
    const back = () => { word = kept; show(); };
    one.addEventListener("mouseenter", look);
    one.addEventListener("focus", look);
    one.addEventListener("mouseleave", back);
    one.addEventListener("blur", back);
    one.addEventListener("click", () => { kept = n; history.replaceState(null, "", `#word-${n}`); look(); });
  });

  if (data) canvases.forEach((canvas) => {
    canvas.addEventListener("mousemove", (event) => {
      const box = canvas.getBoundingClientRect();
      point(at(
        Math.floor((event.clientY - box.top) / box.height * data.grid[0]),
        Math.floor((event.clientX - box.left) / box.width * data.grid[1])));
    });
    canvas.addEventListener("mouseleave", () => point(-1));
    canvas.addEventListener("focus", () => {
      const values = data.maps.exact[word];
      point(values.indexOf(Math.max(...values)));
    });
    canvas.addEventListener("blur", () => point(-1));
    canvas.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const step = steps[event.key];
      if (!step || unit < 0) return;
      event.preventDefault();
      const [row, column, rows, columns] = data.units[unit];
      const next = at(row + (step[0] > 0 ? rows : step[0]), column + (step[1] > 0 ? columns : step[1]));
      if (next >= 0) point(next);
    });
  });

  if (picture.complete) show(); else picture.addEventListener("load", show);
})();
