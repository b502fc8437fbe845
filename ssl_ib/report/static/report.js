"use strict";
// Draws the charts of the page with uPlot, and reads them out at a point: hover, or the arrow keys on a focused chart.
(() => {
  const STEPS = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (n) => css(n < 0 ? "--grey" : `--c${n % 8}`);
  const dash = (line) => (line.dashed || line.color >= 8 ? [[6, 4], [2, 3], [8, 3, 2, 3]][Math.floor(line.color / 8) % 3] : []);

  // Four significant digits, as the page's tables have them.
  const say = (value) => {
    if (value == null) return "";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size >= 1e4 || size < 1e-4 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
  };

  function draw(figure) {
    const box = figure.querySelector(".plot");
    const told = JSON.parse(figure.querySelector("script").textContent);
    const readout = figure.querySelector(".readout");
    // A table an x; uPlot lays them over each other. What a table lacks at another's x is undefined there.
    const tables = told.xs.map((x) => [x]);
    const series = [{}];
    const lines = [];
    told.xs.forEach((_, place) => told.lines.forEach((line, number) => {
      if (line.x !== place) return;
      tables[place].push(line.y);
      lines.push({ ...line, number });
      const tone = () => color(line.color);
      series.push({
        stroke: (u) => (line.faint ? `color-mix(in srgb, ${tone()} 32%, transparent)` : tone()),
        width: line.faint ? 1 : 1.8,
        dash: dash(line),
        spanGaps: true,
        paths: line.loose ? () => null : undefined,
        points: { show: !!(line.marks || line.loose), size: line.loose ? 8 : 6, fill: tone },
      });
    }));
    const data = uPlot.join(tables);
    let index = -1, byKey = false;

    const value = (number, at) => {
      for (let i = at; i >= 0; i--) if (data[number][i] != null) return data[number][i];
    };
    // Shows the values at a place: in the legend, and, where the keyboard asked, in words.
    const show = (at, aloud) => {
      index = at;
      const said = [];
      lines.forEach((line, n) => {
        const cell = figure.querySelector(`[data-line="${line.number}"] b`);
        const now = say(value(n + 1, at));
        if (cell) cell.textContent = now;
        if (!line.faint) said.push(lines.length > 1 ? `${line.name} ${now || "–"}` : now);
      });
      readout.setAttribute("aria-live", aloud ? "polite" : "off");
      const few = said.length > 6 ? said.slice(0, 6).concat("…") : said;
      readout.textContent = `${told.x} ${say(data[0][at])}: ${few.join(", ")}${told.unit ? ` ${told.unit}` : ""}`;
    };
    const levels = (u) => {
      const { ctx } = u, ratio = devicePixelRatio, { left, top, width } = u.bbox;
      ctx.save();
      ctx.font = `${12 * ratio}px system-ui, sans-serif`;
      ctx.textBaseline = "middle";
      ctx.textAlign = "left";
      ctx.fillStyle = css("--muted");
      ctx.strokeStyle = css("--grey");
      ctx.lineWidth = ratio;
      ctx.setLineDash([5 * ratio, 4 * ratio]);
      let last = Infinity;
      for (const level of [...told.levels].sort((a, b) => a.y - b.y)) {
        const y = u.valToPos(level.y, "y", true);
        ctx.beginPath();
        ctx.moveTo(left, y);
        ctx.lineTo(left + width, y);
        ctx.stroke();
        last = Math.min(y, last - 15 * ratio);
        if (level.name && named(u.width)) ctx.fillText(text(level), left + width + 8 * ratio, last);
      }
      ctx.restore();
    };
    const whiskers = (u, number) => {
      const line = lines[number - 1];
      if (!line || !line.error) return;
      const { ctx } = u, ratio = devicePixelRatio;
      ctx.save();
      ctx.strokeStyle = color(line.color);
      ctx.lineWidth = ratio;
      const x = told.xs[line.x];
      line.y.forEach((y, i) => {
        const at = u.valToPos(x[i], "x", true);
        const [low, high] = [y - line.error[i], y + line.error[i]].map((v) => u.valToPos(v, "y", true));
        ctx.beginPath();
        ctx.moveTo(at, low);
        ctx.lineTo(at, high);
        ctx.stroke();
      });
      ctx.restore();
    };
    const text = (level) => `${level.name} ${say(level.y)}${told.unit ? ` ${told.unit}` : ""}`;
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = "12px system-ui, sans-serif";
    const nameRoom = 14 + Math.max(0, ...told.levels.map((level) => pen.measureText(text(level)).width));
    const named = (width) => width > 560 && told.levels.some((level) => level.name);
    const size = () => (figure.classList.toggle("direct", named(box.clientWidth)), { width: box.clientWidth, height: figure.classList.contains("span1") ? 190 : 280 });
    const axis = (more) => ({
      stroke: () => css("--muted"),
      font: "12px system-ui, sans-serif",
      grid: { show: false },
      ticks: { stroke: () => css("--rule"), width: 1, size: 4 },
      ...more,
    });
    const [low, high] = told.range;
    const ends = [data[0][0], data[0][data[0].length - 1]];
    const room = ends[1] > ends[0] ? 0.015 * (ends[1] - ends[0]) : 0.5;
    const plot = new uPlot({
      ...size(),
      series,
      padding: [10, (u) => (named(u.width) ? nameRoom : 12), 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: true, y: false }, points: { size: 7 } },
      scales: {
        x: told.log_x
          ? { time: false, distr: 3 }
          : { time: false, range: (u, min, max) => (min === ends[0] && max === ends[1] ? [min - room, max + room] : [min, max]) },
        y: { distr: told.log ? 3 : 1, range: () => [low, high] },
      },
      axes: [
        axis({ size: 26, gap: 4 }),
        axis({
          size: (u, values) => 14 + 7 * Math.max(1, ...(values || []).map((v) => (v || "").length)),
          gap: 4,
          grid: { stroke: () => css("--rule"), width: 1, filter: (u, ticks) => (told.log ? ticks.map((v) => (Math.log10(v) % 1 ? null : v)) : ticks) },
          values: (u, ticks) => ticks.map((v) => (v == null ? "" : say(v))),
          space: 34,
        }),
      ],
      hooks: {
        draw: [levels],
        drawSeries: [whiskers],
        setCursor: [(u) => { if (!byKey && u.cursor.idx != null) show(u.cursor.idx, false); }],
      },
    }, data, box);

    box.addEventListener("keydown", (event) => {
      const last = data[0].length - 1;
      const to = { Home: 0, End: last }[event.key] ?? (event.key in STEPS ? index + STEPS[event.key] : null);
      if (to == null) return;
      event.preventDefault();
      const at = Math.max(0, Math.min(last, index < 0 && STEPS[event.key] < 0 ? last : to));
      byKey = true;
      plot.setCursor({ left: plot.valToPos(data[0][at], "x"), top: 0 });
      byKey = false;
      show(at, true);
    });
    return { resize: () => { if (box.clientWidth && box.clientWidth !== plot.width) plot.setSize(size()); }, redraw: () => plot.redraw() };
  }

  const drawn = new Map();
  const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => drawn.get(target.closest("figure"))?.resize()));
  const begin = (figure) => {
    const box = figure.querySelector(".plot");
    if (drawn.has(figure) || !box.clientWidth) return;
    drawn.set(figure, draw(figure));
    sizes.observe(box);
  };
  // A chart is drawn when it first comes near the screen: a page of many runs opens at once.
  const near = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting) begin(entry.target);
  }), { rootMargin: "600px" });
  const figures = [...document.querySelectorAll("figure.chart")];
  figures.forEach((figure) => near.observe(figure));
  addEventListener("beforeprint", () => figures.forEach(begin));
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", () => drawn.forEach((chart) => chart.redraw()));
  }
})();
